"""Held-out figures of rated responses: what has a meaning without pairs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from dpo_keras.evaluation.calibration import Calibration, calibrate
from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.evaluation.statistics import PerItem, mean
from dpo_keras.utils.intervals import Estimate, undefined


def held_out_of(columns: Mapping[str, np.ndarray], **about: Any) -> HeldOut:
    """Make the figures of pairs, or of rated responses where the columns have `rated`."""
    return (RatedHeldOut if "rated" in columns else HeldOut)(columns, **about)


def load_held_out(path: str | os.PathLike[str]) -> HeldOut:
    """Read what `HeldOut.save` wrote, of pairs or of rated responses."""
    held_out = HeldOut.load(path)
    return RatedHeldOut.load(path) if "rated" in held_out.pairs else held_out


class RatedHeldOut(HeldOut):
    """Figures of a policy on held-out rated responses: a pure function of one row per response.

    The columns are those of `HeldOut`: "chosen" is the response, "rejected" the mismatched one, and
    `preference` P(the response is good). A response is judged by its reward less the reference
    point, the mean reward of the mismatched ones (0 where that is negative).
    """

    item = "response"

    @cached_property
    def baseline(self) -> float:
        """The reference point βz, over all rows."""
        weight = self.pairs["weight"].astype(np.float64)
        rewards = self.pairs["rejected_reward"].astype(np.float64)
        return max(0.0, float((weight @ rewards) / max(weight.sum(), 1e-12)))

    @cached_property
    def reward_margin(self) -> np.ndarray:
        """Reward of each response less the reference point, float64 `[N]`."""
        return self.pairs["chosen_reward"].astype(np.float64) - self.baseline

    def _figures(self, rows: np.ndarray) -> dict[str, Estimate]:
        found = super()._figures(rows)
        kept = {name: figure for name, figure in found.items() if not name.startswith(_PAIRS)}
        for name in ("reward", "logps"):
            for side in ("desirable", "undesirable"):
                values, weight, prompt, _ = self._side(f"{side}_{name}")
                kept[f"{side}_{name}"] = mean(values[rows], weight[rows], prompt[rows])
        kept["reward_margin"] = _difference(kept["desirable_reward"], kept["undesirable_reward"])
        if "rejected_reference_logps" in self.pairs:
            ratio = self.pairs["rejected_logps"] - self.pairs["rejected_reference_logps"]
            point = mean(ratio[rows], self.pairs["weight"][rows])
            kept["reference_point"] = point
            if point.value is not None:
                kept["reference_point"] = Estimate(max(0.0, point.value))
        return kept

    def _side(self, name: str) -> PerItem:
        side, _, column = name.partition("_")
        good = self.pairs["preference"]
        weight = self.pairs["weight"] * (good if side == "desirable" else 1.0 - good)
        return PerItem(self.pairs[f"chosen_{column}"], weight, self.pairs["prompt"], False)

    @property
    def by_length(self) -> dict[str, Estimate]:
        """Nothing: there is no second response that is longer or shorter."""
        return {}

    @cached_property
    def calibration(self) -> Calibration:
        """Undefined: the scores state no probabilities of pairs."""
        columns = (self.pairs[name] for name in ("preference", "prompt"))
        preference, prompt = columns
        return calibrate(self.reward_margin, preference, np.zeros(len(self)), prompt)

    def per_item(self, name: str) -> PerItem | None:
        """Return what a figure was computed from, or None if it is not a mean over responses."""
        if name.startswith(("desirable_", "undesirable_")):
            return self._side(name)
        return None if name in ("reward_margin", "reference_point") else super().per_item(name)

    def summary(self) -> str:
        """Return a few lines for a terminal."""
        names = ("reward_accuracy", "loss", "reward_margin", "desirable_logps", "kl")
        width = max(map(len, names))
        head = f"{len(self):,} rated responses on {self.prompt_count:,} prompts"
        rows = [f"{n.replace('_', ' '):{width}}  {self.figures[n]}" for n in names]
        return "\n".join([head, *rows])


_PAIRS = ("chosen_", "rejected_", "rated")


def _difference(one: Estimate, other: Estimate) -> Estimate:
    """Return the difference of two means over different items."""
    if one.value is None or other.value is None:
        return undefined(one.reason or other.reason or "it was not measured")
    value = one.value - other.value
    if one.high is None or other.high is None:
        return Estimate(value, count=one.count + other.count)
    reach = math.hypot(one.high - one.value, other.high - other.value)
    return Estimate(value, value - reach, value + reach, one.count + other.count)
