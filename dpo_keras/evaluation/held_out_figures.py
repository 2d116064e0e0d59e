"""Held-out figures from per-pair columns: accuracy, margins, calibration, by group and length."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.evaluation.calibration import Calibration, calibrate
from dpo_keras.evaluation.statistics import Measurement, PerItem, average, mean, percentiles, share
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import replaced
from dpo_keras.utils.intervals import Estimate, undefined

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
NEEDED_COLUMNS = (
    *("source", "prompt", "group", "preference", "weight", "chosen_tokens", "rejected_tokens"),
    *("chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps", "loss"),
)
_ABOUT_PAIRS = {"source", "prompt", "group", "preference", "weight", "rated"}
_NO_GROUP = "(no group)"


class HeldOut:
    """Figures of a policy on held-out pairs: a pure function of one row per pair.

    Intervals are 95 %, and robust to several pairs on one prompt (see `evaluation.statistics`).

    Args:
        pairs: columns `[N]`: `source` (place among the pairs given), `prompt` (number, equal for
            equal prompts), `group` (-1 for none), `preference`, `weight`, `chosen_tokens`,
            `rejected_tokens`, `chosen_reward`, `rejected_reward`, `chosen_logps`,
            `rejected_logps`, `loss`. Any other column is averaged too.
        group_names: the names that `group` numbers.
        entropy: mean entropy of the policy per response token, in nats; None if unknown.
        note: a warning about P(chosen), or "".
        fingerprint: identifies the tokenized pairs.

    Raises:
        InputError: a column is missing, or the columns differ in length.

    Example:
        >>> columns = {name: np.zeros(4) for name in NEEDED_COLUMNS}
        >>> columns |= {"prompt": np.arange(4), "preference": np.ones(4), "weight": np.ones(4)}
        >>> columns |= {"group": np.array([0, 0, 1, 1])}
        >>> columns |= {"chosen_reward": np.array([2.0, 1.0, 0.0, -1.0])}
        >>> held_out = HeldOut(columns, group_names=("colour", "price"))
        >>> held_out.metrics["reward_accuracy"], held_out.metrics["reward_margin"]
        (0.625, 0.5)
        >>> held_out.groups["price"]["reward_accuracy"].value
        0.25
    """

    item = "pair"
    """What a row is."""

    def __init__(
        self,
        pairs: Mapping[str, ArrayLike],
        *,
        group_names: Sequence[str] = (),
        entropy: float | None = None,
        note: str = "",
        fingerprint: str = "",
    ):
        self.pairs = {name: np.asarray(column) for name, column in pairs.items()}
        missing = [name for name in NEEDED_COLUMNS if name not in self.pairs]
        lengths = {name: len(column) for name, column in self.pairs.items()}
        if missing or len(set(lengths.values())) != 1:
            rule = (
                f"must hold the columns {', '.join(NEEDED_COLUMNS)}, all of one length; "
                f"missing: {', '.join(missing) or 'none'}, lengths: {lengths}"
            )
            raise InputError(InputProblem("pairs", rule))
        self.group_names = tuple(group_names)
        self.entropy = entropy
        self.note = note
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs["weight"])

    @cached_property
    def reward_margin(self) -> np.ndarray:
        """S(chosen) - S(rejected) of each pair, the log-likelihood ratio, float64 `[N]`."""
        return self.pairs["chosen_reward"].astype(np.float64) - self.pairs["rejected_reward"]

    @cached_property
    def right(self) -> np.ndarray:
        """1 if the policy prefers what people prefer, 0 if not, 0.5 if the scores tie, `[N]`."""
        side = np.sign(self.pairs["preference"] - 0.5)
        return 0.5 * (1.0 + np.sign(self.reward_margin) * side)

    @cached_property
    def decided(self) -> np.ndarray:
        """Weights, with 0 for pairs on which people tie (preference exactly 0.5), `[N]`."""
        return np.where(self.pairs["preference"] != 0.5, self.pairs["weight"], 0.0)

    @cached_property
    def figures(self) -> dict[str, Estimate]:
        """The figures that `DPOModel` logs and the means of all other columns, with intervals."""
        return self._figures(np.ones(len(self), bool))

    @property
    def metrics(self) -> dict[str, float | None]:
        """The values alone, as `model.evaluate(…, return_dict=True)` returns them."""
        return {name: figure.value for name, figure in self.figures.items()}

    def _figures(self, rows: np.ndarray) -> dict[str, Estimate]:
        weight, prompt = self.pairs["weight"][rows], self.pairs["prompt"][rows]
        columns = {k: v for k, v in self.pairs.items() if k not in _ABOUT_PAIRS}
        columns["reward_margin"] = self.reward_margin
        first = ("loss", "preference_loss", "reward_accuracy", "reward_margin")
        found = {name: mean(column[rows], weight, prompt) for name, column in columns.items()}
        found["reward_accuracy"] = self._accuracy(rows, "no pair has a preference other than 0.5")
        if "kl" not in found:
            found["kl"] = undefined("the loss has no reference")
        if self.entropy is not None and rows.all():
            # A mean over tokens, not pairs: there are no per-pair values for an interval.
            known = math.isfinite(self.entropy)
            found["entropy"] = Estimate(self.entropy) if known else undefined("it is not finite")
        return {name: found[name] for name in (*first, *found) if name in found}

    def _accuracy(self, rows: np.ndarray, absent: str) -> Estimate:
        rows = rows & (self.decided > 0)
        return share(
            self.right[rows], self.decided[rows], self.pairs["prompt"][rows], absent=absent
        )

    @cached_property
    def groups(self) -> dict[str, dict[str, Estimate]]:
        """Loss, accuracy and margin of each group; empty if no pair has a group."""
        numbers = self.pairs["group"].astype(np.int64)
        wanted = ("loss", "reward_accuracy", "reward_margin")
        found = {}
        if (numbers >= 0).any():
            names = {-1: _NO_GROUP, **dict(enumerate(self.group_names))}
            for number in np.unique(numbers).tolist():
                figures = self._figures(numbers == number)
                found[names.get(number, str(number))] = {key: figures[key] for key in wanted}
        return found

    @cached_property
    def by_length(self) -> dict[str, Estimate]:
        """Reward accuracy by which response has more tokens.

        `length_controlled` is the mean of `chosen_longer` and `chosen_shorter`. A policy that
        looks at length alone has 0.5 there, for any length bias in the data.
        """
        # "Chosen" is the response that people prefer, so that swapped labels count correctly.
        side = np.sign(self.pairs["preference"] - 0.5)
        longer = side * np.sign(
            self.pairs["chosen_tokens"].astype(np.int64) - self.pairs["rejected_tokens"]
        )
        found = {
            name: self._accuracy(longer == sign, f"in no pair is the preferred response {what}")
            for name, sign, what in (
                ("chosen_longer", 1, "longer"),
                ("chosen_shorter", -1, "shorter"),
                ("equal", 0, "as long as the other"),
            )
        }
        found["length_controlled"] = average(found["chosen_longer"], found["chosen_shorter"])
        return found

    @cached_property
    def percentiles(self) -> dict[str, dict[str, float]]:
        """Percentiles of `reward_margin`; empty if the figure is undefined."""
        if self.figures["reward_margin"].value is None:
            return {}
        return {"reward_margin": percentiles(self.reward_margin, self.pairs["weight"], PERCENTILES)}

    @cached_property
    def calibration(self) -> Calibration:
        """Calibration of P(chosen) = softmax(scores)."""
        columns = (self.pairs[name] for name in ("preference", "weight", "prompt"))
        return calibrate(self.reward_margin, *columns, note=self.note)

    def difference_from(self, other: Measurement) -> str:
        """Return why the two cannot be compared pair by pair, or ""."""
        columns = ("source", "prompt", "preference", "weight", "chosen_tokens", "rejected_tokens")
        same = (
            isinstance(other, HeldOut)
            and self.fingerprint == other.fingerprint
            and all(np.array_equal(self.pairs[name], other.pairs[name]) for name in columns)
        )
        return "" if same else "before and after are of different pairs"

    def per_item(self, name: str) -> PerItem | None:
        """Return what a figure was computed from, or None if it is not a mean over pairs."""
        weight, prompt = self.pairs["weight"], self.pairs["prompt"]
        if name == "reward_accuracy":
            return PerItem(self.right, self.decided, prompt, True)
        column = self.reward_margin if name == "reward_margin" else self.pairs.get(name)
        return None if column is None else PerItem(column, weight, prompt, False)

    def as_dict(self) -> dict[str, JSON]:
        """Return all figures, ready for JSON, without the rows."""

        def plain(figures: Mapping[str, Estimate]) -> dict[str, JSON]:
            return {name: figure.as_dict() for name, figure in figures.items()}

        return {
            "pairs": len(self),
            "prompts": self.prompt_count,
            "figures": plain(self.figures),
            "percentiles": self.percentiles,
            "groups": {name: plain(figures) for name, figures in self.groups.items()},
            "by_length": plain(self.by_length),
            "calibration": self.calibration.as_dict(),
            "fingerprint": self.fingerprint,
        }

    @property
    def prompt_count(self) -> int:
        """Number of different prompts."""
        return len(np.unique(self.pairs["prompt"]))

    def summary(self) -> str:
        """Return a few lines for a terminal."""
        names = ("reward_accuracy", "loss", "reward_margin", "chosen_logps", "rejected_logps", "kl")
        lines = {name: self.figures[name] for name in names if name in self.figures}
        lines["length-controlled accuracy"] = self.by_length["length_controlled"]
        lines["expected calibration error"] = self.calibration.expected_calibration_error
        width = max(map(len, lines))
        head = f"{len(self):,} pairs on {self.prompt_count:,} prompts"
        rows = [f"{name.replace('_', ' '):{width}}  {figure}" for name, figure in lines.items()]
        return "\n".join([head, *rows])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a .npz file, from which `load` computes the same figures."""
        names = ("entropy", "note", "fingerprint")
        about = {"group_names": list(self.group_names), **{n: getattr(self, n) for n in names}}
        with replaced(path) as partial, partial.open("wb") as file:
            columns: dict[str, Any] = {**self.pairs, "about": np.array(json.dumps(about))}
            np.savez_compressed(file, **columns)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeldOut:
        """Read what `save` wrote; raise InputError if there is no such file, or it is another."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                columns = {name: stored[name] for name in stored.files}
            about = json.loads(str(columns.pop("about")))
            return cls(columns, **about)
        except FileNotFoundError:
            raise InputError(f"There is no file {os.fspath(path)}.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{os.fspath(path)} does not hold measured pairs (HeldOut.save): {error}"
            ) from error
