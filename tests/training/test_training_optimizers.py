"""Optimizers and schedules by name: any of Keras', with their arguments, checked beforehand."""

import keras
import numpy as np
import pytest

from dpo_keras.errors import InputError
from dpo_keras.training import make_optimizer

WRAPPERS = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
KINDS = [
    name
    for name, kind in vars(keras.optimizers).items()
    if isinstance(kind, type) and issubclass(kind, keras.optimizers.Optimizer)
]


@pytest.mark.parametrize("name", sorted({*KINDS} - WRAPPERS))
def test_every_optimizer_of_keras_is_made_by_its_name_and_takes_a_step(name):
    optimizer = make_optimizer(10, optimizer=name.lower(), learning_rate=0.1)
    assert type(optimizer).__name__ == name and optimizer.global_clipnorm == 1.0
    weight = keras.Variable(np.ones((2, 2), "float32"), name="kernel")
    optimizer.build([weight])
    optimizer.apply([keras.ops.ones((2, 2))], [weight])
    assert np.abs(np.asarray(weight) - 1).max() > 1e-6


def test_the_arguments_of_an_optimizer_reach_it_beside_ours():
    optimizer = make_optimizer(
        10,
        optimizer="SGD",
        optimizer_options={"momentum": 0.9, "nesterov": True},
        weight_decay=0.1,
        clip_norm=None,
        gradient_accumulation=4,
    )
    assert (optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == (0.9, True, 0.1)
    assert optimizer.global_clipnorm is None and optimizer.gradient_accumulation_steps == 4


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ExponentialDecay", {"decay_rate": 0.25}, [1, 0.5, 0.25]),
        ("exponential_decay", {"decay_rate": 0.5, "decay_steps": 50}, [1, 0.5, 0.25]),
        ("PolynomialDecay", {"end_learning_rate": 0.5}, [1, 0.75, 0.5]),
        ("CosineDecay", {"alpha": 0.1}, [1, 0.55, 0.1]),
        ("PiecewiseConstantDecay", {"boundaries": [25], "values": [0.2, 0.1]}, [0.2, 0.1, 0.1]),
    ],
)
def test_a_schedule_of_keras_falls_over_the_steps_of_the_run(name, options, expected):
    optimizer = make_optimizer(100, learning_rate=1.0, schedule=name, schedule_options=options)
    rates = [float(optimizer._learning_rate(step)) for step in (0, 50, 100)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_a_schedule_of_keras_follows_the_rise():
    options = {"decay_rate": 0.25}
    optimizer = make_optimizer(
        100,
        learning_rate=1.0,
        schedule="ExponentialDecay",
        schedule_options=options,
        warmup_fraction=0.2,
    )
    rates = [float(optimizer._learning_rate(step)) for step in (9, 19, 20, 60, 100)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 0.5, 0.25], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adamwx"}, "optimizer must be one of .* Did you mean 'AdamW'?"),
        ({"optimizer_options": {"beta2": 0.9}}, "optimizer_options.beta2 .* mean 'beta_2'?"),
        ({"optimizer_options": {"learning_rate": 1}}, "is set already. Give learning_rate"),
        ({"optimizer_options": {"clipnorm": 1.0}}, "clipnorm cannot go with clip_norm"),
        ({"optimizer_options": {"beta_1": "high"}}, "beta_1 must be a finite number, got 'high'"),
        ({"optimizer_options": {"amsgrad": 1}}, "amsgrad must be true or false, got 1"),
        ({"optimizer_options": {"use_ema": True, "ema_momentum": 2}}, "AdamW refuses"),
        ({"schedule": "linear", "schedule_options": {"power": 2}}, "has no effect with schedule="),
        ({"schedule": "ExponentialDecay"}, "schedule_options.decay_rate is needed by Exponential"),
        ({"schedule": "CosineDecay", "schedule_options": {"alfa": 1}}, "Did you mean 'alpha'?"),
    ],
)
def test_what_an_optimizer_or_a_schedule_refuses_is_said_before_training(options, words):
    with pytest.raises(InputError, match=words):
        make_optimizer(10, **options)
