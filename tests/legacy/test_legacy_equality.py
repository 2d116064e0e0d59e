"""One transformer, written in Keras 3 and in tf-keras: the same numbers from both."""

import keras
import numpy as np
import pytest
import serving_tiny
import tensorflow as tf
import tf_keras
from legacy_tiny import copy_weights, transformer

import dpo_keras
from dpo_keras import legacy
from dpo_keras.batching import preference_dataset
from dpo_keras.evaluation import evaluate_preferences
from dpo_keras.losses import DPOLoss
from dpo_keras.training import supervised_dataset

pytestmark = pytest.mark.slow

FLAVOURS = {keras: dpo_keras, tf_keras: legacy}


class Steps(keras.callbacks.Callback):
    """What was measured in each step."""

    def __init__(self):
        super().__init__()
        self.found = []

    def on_train_batch_end(self, batch, logs=None):
        self.found.append({name: float(value) for name, value in self.model.step_logs.items()})


def both(**settings):
    models = {library: transformer(library, **settings) for library in FLAVOURS}
    copy_weights(models[keras], models[tf_keras])
    return models


def train(library, policy, data, loss, steps=10, **options):
    if loss is None:
        model = FLAVOURS[library].SupervisedModel(policy, dropout=False)
        losses = {}
    else:
        model = FLAVOURS[library].DPOModel(policy)
        losses = {"loss": DPOLoss(**loss)}
    optimizer = library.optimizers.AdamW(3e-3, weight_decay=0.01, global_clipnorm=0.5)
    model.compile(optimizer, **losses, **options)
    seen = Steps()
    history = model.fit(data, steps_per_epoch=steps, callbacks=[seen], verbose=0).history
    return model, seen.found, history


def assert_same_steps(one, other, tolerance):
    assert len(one) == len(other) == 10
    for step, (mine, its) in enumerate(zip(one, other, strict=True)):
        # "stop" is a worker's wish to end the run, which rides on Keras 3's sums.
        assert its.keys() == mine.keys() - {"stop"}
        for name, value in its.items():
            assert value == pytest.approx(mine[name], rel=1e-4, abs=tolerance), (step, name)


LOSSES = {
    "sigmoid with penalties": {"penalties": {"insufficient_confidence": 0.1, "nll": 0.1}},
    "all that keeps state": {
        "loss_type": "bco_pair",
        "shift_momentum": 0.9,
        "group_robust": {"groups": 2, "eta": 0.5},
    },
    "supervised": None,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_ten_steps_have_the_same_losses(loss, tokenized):
    data = preference_dataset(tokenized, batch_size=4, batching="buckets", buckets=1, epochs=None)
    data = supervised_dataset(data) if loss is None else data
    models = both(layers=1)
    results = {library: train(library, models[library], data, loss) for library in FLAVOURS}
    (_, mine, logs), (_, its, other_logs) = results[keras], results[tf_keras]
    np.testing.assert_allclose(
        [step["loss"] for step in mine], [step["loss"] for step in its], rtol=0, atol=1e-5
    )
    assert_same_steps(mine, its, tolerance=1e-4)
    assert logs.keys() == other_logs.keys()
    assert mine[0]["loss"] != pytest.approx(mine[-1]["loss"], rel=1e-2)
    for layer in models[keras].layers:
        theirs = models[tf_keras].get_layer(layer.name) if layer.weights else None
        for one, other in zip(layer.weights, theirs.weights if theirs else [], strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-4, err_msg=layer.name)


def test_held_out_figures_are_the_same(tokenized):
    figures = []
    for library, policy in both(layers=1).items():
        model = FLAVOURS[library].DPOModel(policy)
        model.compile("sgd", DPOLoss(beta=0.3))
        for weight in policy.trainable_variables:
            weight.assign(1.1 * weight)
        figures.append(evaluate_preferences(model, tokenized).metrics)
    assert figures[0].keys() == figures[1].keys()
    for name, value in figures[0].items():
        assert figures[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


EXAMPLES = (
    ("Hello, how are you?", "I am fine, thanks.", "No."),
    ("It's 12345  o'clock", "don't worry", "naïve café 東京 🙂"),
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The tf-keras model exported, the Keras 3 one in memory, both moved off the reference."""
    preprocessor = serving_tiny.gpt2().preprocessor
    models = both(layers=1, vocabulary=len(serving_tiny.bpe()[0]))
    made = {}
    for library, policy in models.items():
        made[library] = FLAVOURS[library].DPOModel(policy)
        made[library].compile("sgd", DPOLoss(beta=0.3))
        for weight in policy.trainable_variables:
            weight.assign(1.1 * weight)
    report = dpo_keras.export(
        made[tf_keras],
        tmp_path_factory.mktemp("served") / "support" / "1",
        preprocessor=preprocessor,
        max_length=48,
        max_new_tokens=4,
        examples=EXAMPLES,
    )
    return report, made[keras], preprocessor


def test_the_export_has_the_same_signatures_and_scores(exported):
    report, model, preprocessor = exported
    assert report.verified and set(report.signatures) == {"score", "prefer", "generate"}
    prompts, chosen, rejected = zip(*EXAMPLES, strict=True)
    logps, lengths = dpo_keras.response_log_probs(
        model.policy, prompts, chosen, preprocessor=preprocessor
    )
    np.testing.assert_allclose(report.answers["score"]["log_prob"], logps, rtol=1e-4, atol=1e-4)
    assert report.answers["score"]["tokens"] == lengths.tolist()
    tokens = dpo_keras.tokenize_pairs(
        [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in EXAMPLES],
        preprocessor,
    )
    (batch,) = preference_dataset(tokens, batch_size=2, buckets=1, shuffle=False)
    found = model(batch)
    for name, value in {
        "probability_a": found["probabilities"][:, 0],
        "probability_b": found["probabilities"][:, 1],
        "llr": found["llr"],
    }.items():
        np.testing.assert_allclose(report.answers["prefer"][name], value, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        report.answers["score"]["reward"], found["scores"][:, 0], rtol=1e-4, atol=1e-4
    )
    served = tf.saved_model.load(str(report.path)).signatures["generate"](
        prompt=tf.constant(prompts)
    )
    assert served["text"].shape == (2,)
