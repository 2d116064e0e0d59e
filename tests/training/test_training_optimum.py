"""A small transformer trained on every pair of enumerable strings reaches DPO's closed form.

The path is the user's: a file of pairs, `read_preferences`, a KerasHub tokenizer, `DPOModel.fit`.
What it should reach is worked out here in NumPy, from a full enumeration of the responses.
"""

import itertools
import json
import re

import keras
import keras_hub
import numpy as np
import pytest
from assembling import assemble

from dpo_keras.batching import preference_dataset
from dpo_keras.losses import DPOLoss
from dpo_keras.preferences import read_preferences
from dpo_keras.training import DPOModel

BETA = 0.5
STEPS = 400
TOKENS = ("<|endoftext|>", "a", "b", "ab", "?", ".")
PROMPTS = ("?", ".")
RESPONSES = ["".join(s) for n in range(1, 4) for s in itertools.product("ab", repeat=n)]


def rewards():
    """`[prompts, responses]`, of no structure, so that nothing short of π* will do."""
    return np.random.default_rng(5).normal(0.0, 0.5, (len(PROMPTS), len(RESPONSES)))


def policy():
    """One layer of width 32, its random weights enlarged so that it has clear preferences."""
    keras.utils.set_random_seed(3)
    tokenizer = keras_hub.models.GPT2Tokenizer(
        vocabulary={token: place for place, token in enumerate(TOKENS)}, merges=["a b"]
    )
    policy = assemble(
        "GPT2",
        tokenizer,
        {"sequence_length": 8},
        num_layers=1,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=128,
        max_sequence_length=8,
        dropout=0.0,
    )
    for weight in policy.backbone.trainable_variables:
        if weight.name in ("embeddings", "kernel"):
            weight.assign(weight * 3.0)
    return policy


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def response_distribution(policy):
    """π(y | x) of every response, its end token included, `[prompts, responses]`.

    A preference between two responses says nothing about strings that are in no pair, so the
    mass that the policy gives to those is divided out. Written without the package's own scoring.
    """
    ids, end = {token: place for place, token in enumerate(TOKENS)}, 0
    rows, mask, targets = (np.zeros((len(PROMPTS), len(RESPONSES), 8), int) for _ in range(3))
    for p, prompt in enumerate(PROMPTS):
        for r, response in enumerate(RESPONSES):
            sequence = [end, ids[prompt], *(ids[t] for t in re.findall("ab|a|b", response)), end]
            rows[p, r, : len(sequence)] = sequence
            mask[p, r, : len(sequence)] = 1
            targets[p, r, 1 : len(sequence) - 1] = 1  # from the prompt's last token on
    inputs = {"token_ids": rows.reshape(-1, 8), "padding_mask": mask.reshape(-1, 8)}
    logits = keras.ops.convert_to_numpy(policy(inputs, training=False))
    logps = log_softmax(logits.reshape(*rows.shape, -1))[:, :, :-1]
    logps = np.take_along_axis(logps, rows[:, :, 1:, None], axis=-1)[..., 0]
    return np.exp(log_softmax((logps * targets[:, :, :-1]).sum(axis=-1)))


def total_variation(one, other):
    return 0.5 * np.abs(one - other).sum(axis=-1)


@pytest.fixture
def preference_file(tmp_path):
    """Every pair of responses to each prompt, with the share of votes that its rewards entail."""
    path = tmp_path / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for prompt, reward in zip(PROMPTS, rewards(), strict=True):
            for first, second in itertools.combinations(range(len(RESPONSES)), 2):
                record = {
                    "prompt": prompt,
                    "chosen": RESPONSES[first],
                    "rejected": RESPONSES[second],
                    "preference": 1 / (1 + np.exp(reward[second] - reward[first])),
                }
                print(json.dumps(record), file=lines)
    return path


@pytest.mark.slow
def test_a_transformer_reaches_the_optimum_of_dpo_from_file_to_fit(preference_file):
    pairs = read_preferences(preference_file)
    assert len(pairs) == len(PROMPTS) * len(RESPONSES) * (len(RESPONSES) - 1) // 2
    model = DPOModel(policy())
    reference = response_distribution(model.policy)
    optimum = np.exp(log_softmax(np.log(reference) + rewards() / BETA))
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, STEPS, alpha=1e-3)
    model.compile(keras.optimizers.Adam(schedule), DPOLoss(beta=BETA), jit_compile=True)
    data = preference_dataset(
        pairs, model.policy.preprocessor, batch_size=len(pairs), buckets=1, shuffle=False
    ).cache()
    model.fit(data.repeat(STEPS), verbose=0)

    # 2 % is what was asked for; the optimum is inside the model's reach, so it comes far nearer.
    trained = response_distribution(model.policy)
    assert total_variation(reference, optimum).min() > 0.2
    assert total_variation(trained, optimum).max() <= 0.001
    # No loss is below the entropy of the votes, and the optimum has exactly that.
    votes = np.array([pair.preference for pair in pairs])
    floor = -np.mean(votes * np.log(votes) + (1 - votes) * np.log(1 - votes))
    loss = model.evaluate(data, return_dict=True, verbose=0)["preference_loss"]
    assert loss == pytest.approx(floor, abs=1e-5)
