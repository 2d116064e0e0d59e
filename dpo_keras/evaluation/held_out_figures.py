"""From per-pair columns to figures: accuracy, margins, calibration, by group and by length."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dpo_keras.errors import InputError
from dpo_keras.evaluation.calibration import Calibration, calibrate
from dpo_keras.evaluation.statistics import mean, percentiles, share
from dpo_keras.utils.intervals import Estimate, undefined

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_NEEDED = (
    *("source", "prompt", "group", "preference", "weight", "chosen_tokens", "rejected_tokens"),
    *("chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps", "loss"),
)
_ABOUT_PAIRS = {"source", "prompt", "group", "preference", "weight"}
_NO_GROUP = "(no group)"


class HeldOut:
    """What a policy makes of preference pairs: a pure function of one row per pair.

    Intervals are 95 %, and robust to several pairs sharing a prompt (see `evaluation.figures`).

    Args:
        pairs: columns `[N]`: `source` (place among the pairs given), `prompt` (number, equal for
            equal prompts), `group` (-1 for none), `preference`, `weight`, `chosen_tokens`,
            `rejected_tokens`, `chosen_reward`, `rejected_reward`, `chosen_logps`,
            `rejected_logps`, `loss`; further ones are averaged too.
        group_names: the names that `group` numbers.
        entropy: of the policy, mean over response tokens, in nats; None if it was not measured.
        note: what to mind about P(chosen), or "".
        fingerprint: says which tokenized pairs these are.

    Raises:
        InputError: a column is missing, or they differ in length.

    Example:
        >>> columns = {name: np.zeros(4) for name in _NEEDED}
        >>> columns |= {"prompt": np.arange(4), "preference": np.ones(4), "weight": np.ones(4)}
        >>> columns |= {"group": np.array([0, 0, 1, 1])}
        >>> columns |= {"chosen_reward": np.array([2.0, 1.0, 0.0, -1.0])}
        >>> held_out = HeldOut(columns, group_names=("colour", "price"))
        >>> held_out.metrics["reward_accuracy"], held_out.metrics["reward_margin"]
        (0.625, 0.5)
        >>> held_out.groups["price"]["reward_accuracy"].value
        0.25
    """

    def __init__(
        self,
        pairs: Mapping[str, Any],
        *,
        group_names: Sequence[str] = (),
        entropy: float | None = None,
        note: str = "",
        fingerprint: str = "",
    ):
        self.pairs = {name: np.asarray(column) for name, column in pairs.items()}
        missing = [name for name in _NEEDED if name not in self.pairs]
        lengths = {name: len(column) for name, column in self.pairs.items()}
        if missing or len(set(lengths.values())) != 1:
            raise InputError(
                f"pairs must hold the columns {', '.join(_NEEDED)}, all of one length; "
                f"missing: {', '.join(missing) or 'none'}, lengths: {lengths}."
            )
        self.group_names = tuple(group_names)
        self.entropy = entropy
        self.note = note
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs["weight"])

    # -- per pair --------------------------------------------------------------------------

    @cached_property
    def reward_margin(self) -> np.ndarray:
        """S(chosen) - S(rejected) of each pair, float64 `[N]`: the log-likelihood ratio."""
        return self.pairs["chosen_reward"].astype(np.float64) - self.pairs["rejected_reward"]

    @cached_property
    def right(self) -> np.ndarray:
        """1 where the policy prefers what people prefer, 0 where not, 0.5 where scores tie."""
        side = np.sign(self.pairs["preference"] - 0.5)
        return 0.5 * (1.0 + np.sign(self.reward_margin) * side)

    @cached_property
    def decided(self) -> np.ndarray:
        """Weights with those of ties among people (preference exactly 0.5) set to 0."""
        return np.where(self.pairs["preference"] != 0.5, self.pairs["weight"], 0.0)

    # -- figures ---------------------------------------------------------------------------

    @cached_property
    def figures(self) -> dict[str, Estimate]:
        """The logged names of `DPOModel` and the means of all other columns, with intervals."""
        return self._figures(np.ones(len(self), bool))

    @property
    def metrics(self) -> dict[str, float | None]:
        """The values alone; `model.evaluate(…, return_dict=True)` gives the same."""
        return {name: figure.value for name, figure in self.figures.items()}

    def _figures(self, rows: np.ndarray) -> dict[str, Estimate]:
        weight, prompt = self.pairs["weight"][rows], self.pairs["prompt"][rows]
        columns = {
            **{k: v for k, v in self.pairs.items() if k not in _ABOUT_PAIRS},
            "reward_margin": self.reward_margin,
        }
        first = ("loss", "preference_loss", "reward_accuracy", "reward_margin")
        found = {name: mean(column[rows], weight, prompt) for name, column in columns.items()}
        found["reward_accuracy"] = self._accuracy(rows, "no pair has a preference other than 0.5")
        if "kl" not in found:
            found["kl"] = undefined("the loss has no reference")
        if self.entropy is not None and rows.all():
            # Measured over tokens, not pairs: there is nothing to take an interval from.
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
        """Loss, accuracy and margin of each group; empty where no pair has one."""
        numbers = self.pairs["group"].astype(np.int64)
        wanted = ("loss", "reward_accuracy", "reward_margin")
        found = {}
        if (numbers >= 0).any():
            for number in np.unique(numbers):
                figures = self._figures(numbers == number)
                found[self._group_name(int(number))] = {key: figures[key] for key in wanted}
        return found

    def _group_name(self, number: int) -> str:
        if number < 0:
            return _NO_GROUP
        return self.group_names[number] if number < len(self.group_names) else str(number)

    @cached_property
    def by_length(self) -> dict[str, Estimate]:
        """Reward accuracy by which response is longer, in tokens.

        `length_controlled` is the mean of `chosen_longer` and `chosen_shorter`: whoever goes by
        length alone has 0.5 there, whatever the data's own bias.
        """
        # Longer than the other is what people prefer, so soft and swapped labels count as well.
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
        one, other = found["chosen_longer"], found["chosen_shorter"]
        found["length_controlled"] = _middle(one, other)
        return found

    @cached_property
    def percentiles(self) -> dict[str, dict[str, float]]:
        """Percentiles of `reward_margin`; empty where the figure is undefined."""
        if self.figures["reward_margin"].value is None:
            return {}
        return {"reward_margin": percentiles(self.reward_margin, self.pairs["weight"], PERCENTILES)}

    @cached_property
    def calibration(self) -> Calibration:
        """Whether P(chosen) = softmax(scores) means what it says."""
        return calibrate(
            self.reward_margin,
            self.pairs["preference"],
            self.pairs["weight"],
            self.pairs["prompt"],
            note=self.note,
        )

    # -- out -------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON; the rows themselves are in `pairs`."""

        def plain(figures: Mapping[str, Estimate]) -> dict[str, Any]:
            return {name: figure.as_dict() for name, figure in figures.items()}

        return {
            "pairs": len(self),
            "prompts": len(np.unique(self.pairs["prompt"])),
            "figures": plain(self.figures),
            "percentiles": self.percentiles,
            "groups": {name: plain(figures) for name, figures in self.groups.items()},
            "by_length": plain(self.by_length),
            "calibration": self.calibration.as_dict(),
            "fingerprint": self.fingerprint,
        }

    def summary(self) -> str:
        """A few lines for a terminal."""
        names = ("reward_accuracy", "loss", "reward_margin", "chosen_logps", "rejected_logps", "kl")
        lines = {name: self.figures[name] for name in names if name in self.figures}
        lines["length-controlled accuracy"] = self.by_length["length_controlled"]
        lines["expected calibration error"] = self.calibration.expected_calibration_error
        width = max(map(len, lines))
        head = f"{len(self):,} pairs on {len(np.unique(self.pairs['prompt'])):,} prompts"
        rows = [f"{name.replace('_', ' '):{width}}  {figure}" for name, figure in lines.items()]
        return "\n".join([head, *rows])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows, from which `load` makes the same figures.

        Args:
            path: a file ending in .npz.
        """
        about = {
            "group_names": list(self.group_names),
            "entropy": self.entropy,
            "note": self.note,
            "fingerprint": self.fingerprint,
        }
        with pathlib.Path(path).open("wb") as file:
            columns: dict[str, Any] = {**self.pairs, "about": np.array(json.dumps(about))}
            np.savez_compressed(file, **columns)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeldOut:
        """Reads what `save` wrote.

        Args:
            path: the file.

        Raises:
            InputError: it is no such file.
        """
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


def _middle(one: Estimate, other: Estimate) -> Estimate:
    """Mean of two independent figures."""
    count = one.count + other.count
    for figure in (one, other):
        if figure.value is None or figure.low is None or figure.high is None:
            return undefined(figure.reason or "a share has no interval", count)
    assert one.value is not None and one.low is not None and one.high is not None
    assert other.value is not None and other.low is not None and other.high is not None
    value = (one.value + other.value) / 2
    # Square and add, as for differences (Zou and Donner 2008): keeps the bounds within [0, 1].
    low = value - 0.5 * np.hypot(one.value - one.low, other.value - other.low)
    high = value + 0.5 * np.hypot(one.high - one.value, other.high - other.value)
    return Estimate(value, float(low), float(high), count)
