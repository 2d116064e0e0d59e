"""Per-pair columns with everything that a test does not speak about at rest."""

import numpy as np

from dpo_keras.evaluation import HeldOut, Samples
from dpo_keras.evaluation.statistics import mean, share
from dpo_keras.utils.intervals import Estimate


def columns(margin, **others):
    """Columns of pairs with the given margins, each on a prompt of its own, all of weight 1."""
    margin = np.asarray(margin, np.float64)
    count = len(margin)
    zeros, numbers = np.zeros(count), np.arange(count)
    found = {
        "source": numbers,
        "prompt": numbers,
        "group": np.full(count, -1),
        "preference": np.ones(count),
        "weight": np.ones(count),
        "chosen_tokens": np.full(count, 5),
        "rejected_tokens": np.full(count, 5),
        "chosen_reward": margin,
        "rejected_reward": zeros,
        "chosen_logps": zeros,
        "rejected_logps": zeros,
        "loss": np.log1p(np.exp(-np.clip(margin, -500, 500))),
    }
    return {**found, **{name: np.asarray(value) for name, value in others.items()}}


def held_out(margin, *, group_names=(), note="", fingerprint="", entropy=None, **others):
    return HeldOut(
        columns(margin, **others),
        group_names=group_names,
        note=note,
        fingerprint=fingerprint,
        entropy=entropy,
    )


def samples(preferred, responses=None, tokens=None, ended=None, prompts=None):
    """Judged samples; the figures that are about records alone."""
    count = len(preferred)
    responses = responses or [f"response {i}" for i in range(count)]
    tokens = [5] * count if tokens is None else tokens
    ended = [True] * count if ended is None else ended
    records = [
        {
            "prompt": f"prompt {i}" if prompts is None else prompts[i],
            "response": responses[i],
            "tokens": int(tokens[i]),
            "ended": bool(ended[i]),
            "verdict": {"preferred": bool(preferred[i])},
        }
        for i in range(count)
    ]
    figures = {
        "preferred": share(preferred),
        "tokens": mean(tokens),
        "ended": share(ended),
        "distinct_responses": Estimate(len(set(responses)) / count, count=count),
    }
    return Samples(records, figures)
