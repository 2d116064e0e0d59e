"""What `fit`, `evaluate` and `predict` take and show: batches, and one line of figures."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence

import keras

from dpo_keras.batching import TokenizedPairs
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import PreferencePair, Preferences, StoredPreferences
from dpo_keras.utils import JSON

# What is shown of the figures, the weightiest first, and what it is called in a line.
SHOWN = {
    "loss": "loss",
    "reward_accuracy": "accuracy",
    "val_loss": "val_loss",
    "val_reward_accuracy": "val_accuracy",
    "reward_margin": "margin",
    "val_reward_margin": "val_margin",
    "kl": "kl",
    "pairs_per_second": "pairs/s",
}
BAR = 52  # columns of Keras' progress bar without figures


def check_batches(given: object, argument: str = "x") -> None:
    """Refuse pairs where batches belong, and say how to make batches of them.

    Raises:
        InputError: preference pairs, records, a path, or batches without the tensors of `Batch`.
    """
    first = given[0] if isinstance(given, list | tuple) and given else given
    raw: tuple[type, ...] = (Preferences, StoredPreferences, PreferencePair, TokenizedPairs)
    raw += (str, os.PathLike)
    is_frame = type(given).__name__ in ("DataFrame", "Dataset") and hasattr(given, "columns")
    columns = getattr(given, "element_spec", None)
    if isinstance(first, raw) or is_frame or _is_record(first):
        rule = f"must be batches, got {type(given).__name__}"
    elif isinstance(columns, Mapping) and not {"token_ids", "owner"} <= columns.keys():
        rule = f"must be batches of tokens, got a dataset of {', '.join(map(str, columns))}"
    else:
        return
    hint = (
        "Make them of pairs, records or a file: dpo_keras.preference_dataset(pairs, "
        "policy.preprocessor, batch_size=8, max_length=512); a SupervisedModel takes "
        "dpo_keras.training.supervised_dataset(…) of that."
    )
    raise InputError(InputProblem(argument, rule, hint=hint))


def check_rows(dataset: object, devices: int, argument: str) -> None:
    """Refuse batches whose rows the devices of a mesh's data axis cannot share evenly."""
    columns = getattr(dataset, "element_spec", None)
    known = devices > 1 and isinstance(columns, Mapping)
    rows = columns["owner"].shape[0] if known else None  # type: ignore[index]
    if rows is not None and rows % devices:
        rule = f"must have a number of rows that {devices} devices can share"
        hint = f"Make batch_size a multiple of {devices}."
        raise InputError(InputProblem(argument, rule, rows, hint))


def check_counts(**counts: int | None) -> None:
    """Refuse counts of steps below 1; None asks for nothing."""
    wrong = {name: count for name, count in counts.items() if count is not None and count < 1}
    if wrong:
        raise InputError(
            [InputProblem(name, "must be >= 1", count) for name, count in wrong.items()]
        )


def check_groups(groups: int, *sides: TokenizedPairs | None) -> None:
    """Refuse pairs whose groups are not those of the loss; 0 groups ask for nothing."""
    for tokenized in sides if groups else ():
        if tokenized is None or tokenized.group is None or not len(tokenized):
            continue
        # In the graph a group beyond the last would just have no weight.
        if int(tokenized.group.max()) >= groups or int(tokenized.group.min()) < 0:
            raise InputError(
                f"group_robust has groups={groups}, and the pairs have "
                f"{len(tokenized.group_names)} ({', '.join(tokenized.group_names[:10])}) or pairs "
                "without a group. Every pair needs one of that many."
            )


def _is_record(value: object) -> bool:
    return isinstance(value, Mapping) and "chosen" in value


class ShortProgress(keras.callbacks.ProgbarLogger):
    """Show as many of the main figures as fit a line; `History` and callbacks get all of them."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Start the clock, and begin the bar."""
        self.began = time.perf_counter()
        super().on_epoch_begin(epoch, logs)

    def on_test_begin(self, logs: dict[str, JSON] | None = None) -> None:
        """Start the clock, outside of `fit`."""
        if not self._called_in_fit:
            self.began = time.perf_counter()
        super().on_test_begin(logs)

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Move the bar."""
        super().on_train_batch_end(batch, self._beside_bar(logs))

    def on_test_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Move the bar, outside of `fit`."""
        super().on_test_batch_end(batch, self._beside_bar(logs))

    def on_epoch_end(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Show the epoch."""
        if self.verbose == 2:
            self._print_line(logs)
        else:
            super().on_epoch_end(epoch, self._beside_bar(logs))

    def on_test_end(self, logs: dict[str, JSON] | None = None) -> None:
        """Show the evaluation, outside of `fit`."""
        if self.verbose == 2 and not self._called_in_fit:
            self._print_line(logs)
        else:
            super().on_test_end(self._beside_bar(logs))

    def _beside_bar(self, logs: dict[str, JSON] | None) -> dict[str, JSON]:
        room = max(shutil.get_terminal_size().columns - BAR, len(" - loss: 0.1234e-05"))
        return _fitting(logs or {}, room, beside=len(" - : 0.1234"))

    def _print_line(self, logs: dict[str, JSON] | None) -> None:
        seconds = time.perf_counter() - self.began
        line = f"{self.seen}/{self.target or self.seen}  {seconds:.0f}s"
        room = shutil.get_terminal_size().columns - len(line)
        shown = _fitting(logs or {}, room, beside=len("   0.123"))
        figures = "".join(f"  {name} {float(value):.3g}" for name, value in shown.items())
        print(line + figures, flush=True)


def _fitting(logs: Mapping[str, JSON], room: int, beside: int) -> dict[str, JSON]:
    """Return the figures that fit, by their short names; `beside` is the width of a value."""
    shown: dict[str, JSON] = {}
    known = [(SHOWN[name], logs[name]) for name in SHOWN if name in logs]
    for name, value in known or logs.items():
        room -= len(name) + beside
        if room < 0:
            break
        shown[name] = value
    return shown


def with_defaults(
    callbacks: object, defaults: Sequence[keras.callbacks.Callback]
) -> keras.callbacks.CallbackList | list[keras.callbacks.Callback]:
    """Return `defaults` before the callbacks given; a `CallbackList` of Keras has them already."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    given = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    given = [callback for callback in given if callback is not None]
    if any(isinstance(callback, keras.callbacks.ProgbarLogger) for callback in given):
        defaults = [one for one in defaults if not isinstance(one, ShortProgress)]
    return [*defaults, *given]
