"""Which policy people prefer: Bradley-Terry strengths, and cycles among responses."""

from __future__ import annotations

from typing import Any

import choix
import numpy as np
from scipy.sparse.csgraph import connected_components

from dpo_keras.feedback.estimate import Estimate
from dpo_keras.feedback.judgement_table import FIRST, SECOND, TIE, Table


def policy_strengths(table: Table, resamples: int = 500) -> dict[str, Any]:
    """Bradley-Terry strengths of the makers of responses; a tie is half a win for each.

        P(i beats j) = exp(s_i) / (exp(s_i) + exp(s_j)),   sum s = 0

    Args:
        table: judgements without checks and repeats.
        resamples: bootstrap samples of prompts for the intervals.

    Returns:
        `policies` (name to `Estimate`), `wins` (`[k, k]` row beats column), `names`.
    """
    names = sorted({name for both in table.makers for name in both if name is not None})
    index = {name: number for number, name in enumerate(names)}
    made = np.array([[index.get(n, -1) if n else -1 for n in both] for both in table.makers])
    made = made.reshape(-1, 2)
    sides = made[table.pair] if len(made) else np.zeros((0, 2), int)
    known = (sides >= 0).all(1) & (sides[:, 0] != sides[:, 1])
    first, second = sides[known].T if known.any() else np.zeros((2, 0), int)
    label = table.label[known]
    half = np.where(label == FIRST, 1.0, np.where(label == SECOND, 0.0, 0.5))
    prompt_of = table.prompts[table.pair[known]]
    prompts, prompt = np.unique(prompt_of, return_inverse=True)
    # Wins by prompt, so that a resample of prompts is a sum.
    wins = np.zeros((len(prompts), len(names), len(names)))
    np.add.at(wins, (prompt, first, second), half)
    np.add.at(wins, (prompt, second, first), 1 - half)
    whole = wins.sum(0)
    reason = _why_undefined(names, whole)
    if reason is not None:
        found = {name: Estimate(None, reason=reason) for name in names}
        return {"names": names, "wins": whole.tolist(), "policies": found}
    values = _strengths(whole)
    assert values is not None
    draws = [_strengths(wins[rows].sum(0)) for rows in _resampled(len(prompts), resamples)]
    fitted = [draw for draw in draws if draw is not None]
    low = high = [None] * len(names)
    if len(prompts) > 1 and len(fitted) >= 0.9 * len(draws):
        low, high = np.quantile(fitted, [0.025, 0.975], axis=0).tolist()
    games = whole.sum(1) + whole.sum(0)
    found = {
        name: Estimate(float(values[n]), low[n], high[n], count=int(games[n]))
        for name, n in index.items()
    }
    return {"names": names, "wins": whole.tolist(), "policies": found}


def _resampled(units: int, resamples: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, units, units) for _ in range(resamples)]


def _why_undefined(names: list[str], wins: np.ndarray) -> str | None:
    if len(names) < 2:
        return "the candidates name fewer than two makers"
    if not wins.sum():
        return "no two makers were compared"
    if not _connected(wins):
        return (
            "one or more policies won (or lost) every comparison with the rest, or were never "
            "compared with them, so that no finite strength fits"
        )
    return None


def _connected(wins: np.ndarray) -> bool:
    return connected_components(wins > 0, directed=True, connection="strong")[0] == 1


def _strengths(wins: np.ndarray) -> np.ndarray | None:
    if not _connected(wins):
        return None
    values = choix.ilsr_pairwise_dense(wins)
    return values - values.mean()


def cycles(table: Table) -> Estimate:
    """Share of prompts on which the majority goes in a circle: A beats B, B beats C, C beats A.

    Args:
        table: judgements without checks and repeats.
    """
    counts = table.counts()
    found = asked = 0
    for prompt in np.unique(table.prompts):
        mine = np.flatnonzero((table.prompts == prompt) & (counts.sum(1) > 0))
        responses, places = np.unique(table.responses[mine], return_inverse=True)
        if len(responses) < 3 or len(mine) < 3:
            continue
        asked += 1
        places = places.reshape(-1, 2)
        graph = np.zeros((len(responses), len(responses)))
        for (one, other), (a, b) in zip(places, counts[mine][:, :TIE], strict=True):
            if a != b:
                graph[(one, other) if a > b else (other, one)] = 1
        # A circle is a strong component of more than one response.
        parts = connected_components(graph, directed=True, connection="strong")[0]
        found += parts < len(responses)
    if not asked:
        return Estimate(None, reason="no prompt has three responses that were compared")
    return Estimate(found / asked, count=asked)
