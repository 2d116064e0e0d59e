"""Inputs for the tests: random outputs of a scorer, small or over the whole range."""

import numpy as np


def random_outputs(count, seed, *, spread=None, dtype="float64"):
    """Make a scorer's outputs with every optional key.

    `spread=None`: log-probs from -1 to -1e4 and lengths from 1 to 2000, half of the references
    near the policy and half anywhere, so that log-ratios of both signs and every size occur.
    A number: log-ratios of that standard deviation, and short responses.
    """
    random = np.random.default_rng(seed)
    if spread is None:
        policy = -(10 ** random.uniform(0, 4, (count, 2)))
        near = policy + random.normal(scale=5, size=(count, 2))
        anywhere = -(10 ** random.uniform(0, 4, (count, 2)))
        reference = np.where(np.arange(count)[:, None] % 2 == 0, near, anywhere)
        lengths = np.round(10 ** random.uniform(0, np.log10(2000), (count, 2)))
    else:
        lengths = random.integers(2, 20, (count, 2)).astype("float64")
        policy = -lengths * random.uniform(0.5, 3, (count, 2))
        reference = policy + random.normal(scale=spread, size=(count, 2))
    share = random.uniform(size=(count, 2))
    outputs = {
        "policy": policy,
        "reference": reference,
        "lengths": lengths,
        "policy_shared": share * policy,
        "reference_shared": share * reference,
        "margin": random.uniform(0, 2, count),
        "wpo_log_weight": random.normal(scale=0.5, size=(count, 2)),
    }
    outputs = {name: value.astype(dtype) for name, value in outputs.items()}
    preference = random.choice([1.0, 0.5, 0.75, 0.3, 0.0], count).astype(dtype)
    return preference, outputs


def exchange(preference, outputs):
    """Exchange the two responses of every pair, and the label with them."""
    swapped = {k: v[:, ::-1] if np.ndim(v) == 2 else v for k, v in outputs.items()}
    return 1.0 - preference, swapped
