"""The bundled support-desk replies with a thumb each, some of them wrong."""

from __future__ import annotations

import random

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.collection import RatedResponses
from dpo_keras.preferences.quickstart_data import judge, support_pairs
from dpo_keras.preferences.rated_response import RatedResponse
from dpo_keras.preferences.read_report import ReadReport

THUMBS = "builtin:support-thumbs"


def support_thumbs(count: int = 8000, seed: int = 0, noise: float = 0.0) -> RatedResponses:
    """Generate support-desk replies with a thumb each: unpaired feedback with known ground truth.

    The replies are those of `support_pairs`, chosen and rejected in turn. A thumb is up where
    `judge` prefers the reply, and turned around at the rate of `noise`.

    Args:
        count: number of replies, >= 1.
        seed: seed of the generator.
        noise: share of wrong thumbs, in [0, 0.5).

    Returns:
        `RatedResponses` with string prompts and responses.

    Raises:
        InputError: an argument is out of range.

    Example:
        >>> rated = support_thumbs(100, noise=0.1)
        >>> rated.ratings
        (35, 65)
    """
    if not 0 <= noise < 0.5:
        raise InputError(InputProblem("noise", "must be in [0, 0.5)", noise))
    rng = random.Random(seed)
    replies = [
        (pair, response)
        for pair in support_pairs(-(-count // 2), seed)
        for response in (str(pair.chosen), str(pair.rejected))
    ]
    rated = [
        RatedResponse(
            pair.prompt,
            response,
            judge(str(pair.prompt), response).preferred != (rng.random() < noise),
            group=pair.group,
            id=f"thumb-{number}",
        )
        for number, (pair, response) in enumerate(replies[:count])
    ]
    return RatedResponses(rated, ReadReport(sources=[THUMBS], read=count, kept=count))


def support_thumbs_of(name: str) -> RatedResponses:
    """Return the thumbs that a source names: "builtin:support-thumbs", ":NOISE" after it or not."""
    noise = name.removeprefix(THUMBS).removeprefix(":") or "0"
    try:
        return support_thumbs(noise=float(noise))
    except (ValueError, InputError) as error:
        must = f"must be {THUMBS}, or {THUMBS}:NOISE with a share of wrong thumbs in [0, 0.5)"
        raise InputError(InputProblem("source", must, name)) from error
