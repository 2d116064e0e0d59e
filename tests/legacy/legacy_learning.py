"""A set of pairs that a tiny policy learns, and the training of it."""

import tf_keras
from legacy_tiny import transformer
from tiny import Letters, pairs

import dpo_keras
from dpo_keras import legacy
from dpo_keras.evaluation import evaluate_preferences

BATCH, STEPS, EPOCHS = 8, 15, 2


def sides():
    """Better responses are written in small letters; a tenth of the held-out pairs is reversed."""
    train, held_out = pairs(120, seed=0), pairs(100, seed=1)
    for pair in held_out[::10]:
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    return [dpo_keras.tokenize_pairs(side, Letters(), max_length=24) for side in (train, held_out)]


def compiled():
    model = legacy.DPOModel(transformer(tf_keras, layers=1))
    model.compile(tf_keras.optimizers.Adam(3e-3), dpo_keras.DPOLoss(beta=0.5))
    return model


def learn(data, model=None):
    model = model or compiled()
    history = model.fit(data, steps_per_epoch=STEPS, epochs=EPOCHS, verbose=0)
    return model, history.history


def accuracy(model):
    held_out = evaluate_preferences(model, sides()[1], batch_size=50)
    return float(held_out.figures["reward_accuracy"].value)
