"""The garbage collector does not walk over a run's graphs, and gets them back at its end."""

import gc
import weakref

import keras
import pytest
import tensorflow as tf
from tiny import gpt2

from dpo_keras.app.console import prepare_keras
from dpo_keras.training import DPOModel
from dpo_keras.utils import garbage_collection
from dpo_keras.utils.garbage_collection import freeze_graphs, frozen_graphs


@pytest.fixture
def nothing_frozen(monkeypatch):
    """What the other tests have frozen is walked over here, and by no test after."""
    monkeypatch.setattr(garbage_collection._Freezing, "runs", 0)  # commands begin one for good
    gc.unfreeze()
    yield
    gc.freeze()


def graphs():
    """Return the graphs that a full collection would walk over now, by identity."""
    return {id(found): found for found in gc.get_objects() if isinstance(found, tf.Graph)}


def test_no_full_collection_walks_over_the_graphs_of_a_run(dataset, nothing_frozen):
    model = DPOModel(gpt2(num_layers=1))
    model.compile("sgd", loss="simpo")  # without a reference, which takes long to trace
    before = graphs()
    walked = []

    def collect(epoch, logs):  # as Python does by itself when enough has come
        walked.append(len(graphs().keys() - before.keys()))
        gc.collect()

    watch = keras.callbacks.LambdaCallback(on_epoch_end=collect)
    model.fit(dataset, epochs=3, validation_data=dataset, verbose=0, callbacks=[watch])
    assert walked == [0, 0, 0]
    # The graphs are there, and the collector has them back: else no deleted model were ever freed.
    assert len(graphs().keys() - before.keys()) >= 2
    policy = weakref.ref(model.policy)
    del model, watch
    gc.collect()
    assert policy() is None


def test_what_a_program_has_frozen_itself_stays_frozen(nothing_frozen):
    kept = [[]]
    gc.freeze()
    with frozen_graphs():
        later = [[]]
        freeze_graphs()
        assert any(found is later for found in gc.get_objects())
    assert not any(found is kept for found in gc.get_objects())


def test_the_outermost_of_several_runs_unfreezes(nothing_frozen):
    with frozen_graphs():
        with frozen_graphs():
            freeze_graphs()
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
    freeze_graphs()
    assert gc.get_freeze_count() == 0


def test_a_command_freezes_until_it_exits(nothing_frozen):
    prepare_keras()
    with frozen_graphs():
        pass
    assert gc.get_freeze_count() > 100_000  # TensorFlow alone
