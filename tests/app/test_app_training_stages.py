"""How a run's batches are laid out, and that what is refused is named by its key."""

from types import SimpleNamespace

import pytest
from tiny import Letters, gpt2, pairs, plain_model

from dpo_keras.app.config import Config
from dpo_keras.app.console import Silent
from dpo_keras.app.training_stages import check_steps, layout_of, steps_per_epoch
from dpo_keras.batching import tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.training import Layout


def config(**training):
    return Config(model={"path": "x"}, data={"path": "y"}, training={"batch_size": 4, **training})


class Heard(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_auto_packs_and_falls_back_with_one_line_for_policy_or_reference():
    policy, progress = gpt2(num_layers=1), Heard()
    packed = layout_of(config(row_length=96), policy, "frozen_copy", progress, replicas=2)
    assert packed == Layout("packed", 4, 96, 2) and not progress.notes
    assert layout_of(config(), policy, plain_model(), progress) == Layout("buckets", 4)
    (line,) = progress.notes
    assert line.startswith("batching: buckets instead of packed rows, because")


def test_what_is_refused_is_named_by_its_key():
    with pytest.raises(InputError, match=r"training\.batching cannot be 'packed'"):
        layout_of(config(batching="packed"), plain_model(), "none", Silent())
    tokenized = tokenize_pairs(pairs(11), Letters(), max_length=48)
    context = SimpleNamespace(
        config=config(row_length=8), layout=Layout("packed", row_length=8), progress=Silent()
    )
    with pytest.raises(InputError, match=r"training\.row_length must hold the longest pair"):
        check_steps(context, tokenized)


def test_steps_are_those_of_the_layout():
    tokenized = tokenize_pairs(pairs(11), Letters(), max_length=48)
    settings = config()
    for layout in (Layout("buckets"), Layout("packed", row_length=64)):
        context = SimpleNamespace(config=settings, layout=layout)
        steps = steps_per_epoch(context, settings.training, tokenized)
        stream = layout.dataset(tokenized, 4, seed=settings.seed)
        assert steps == int(stream.cardinality()) == sum(1 for _ in stream)
