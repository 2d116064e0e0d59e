"""Rules over several sections of a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_keras.app.faults import Fault
from dpo_keras.app.sections import Data, Evaluation, Export, Model
from dpo_keras.app.training_sections import Training, Warmup


def _lengths_fit(model: Model, data: Data) -> Iterator[Fault]:
    if model.scratch is not None and data.max_length > model.scratch.max_sequence_length:
        yield Fault(
            ("data", "max_length"),
            f"must be <= model.scratch.max_sequence_length ({model.scratch.max_sequence_length}), "
            f"got {data.max_length}.",
        )


def _answers_fit(data: Data, evaluation: Evaluation) -> Iterator[Fault]:
    if evaluation.max_new_tokens >= data.max_length:
        yield Fault(
            ("evaluation", "max_new_tokens"),
            f"must be < data.max_length ({data.max_length}), for the prompt needs room too, got "
            f"{evaluation.max_new_tokens}.",
        )


def _exported_answers_fit(data: Data, export: Export | None) -> Iterator[Fault]:
    if export is not None and export.max_new_tokens >= data.max_length:
        yield Fault(
            ("export", "max_new_tokens"),
            f"must be < data.max_length ({data.max_length}), for the prompt needs room too, got "
            f"{export.max_new_tokens}.",
        )


def _adapters_need_lora(model: Model, reference: str) -> Iterator[Fault]:
    if reference == "adapters_off" and model.lora_rank is None:
        yield Fault(
            ("reference",),
            "can be adapters_off only with adapters; give model.lora_rank, or choose auto.",
        )


def _adapters_hold_the_warm_up(
    model: Model, warmup: Warmup | None, reference: str
) -> Iterator[Fault]:
    if reference == "adapters_off" and warmup is not None and model.lora_rank is not None:
        yield Fault(
            ("reference",),
            "can not be adapters_off after a warm-up with model.lora_rank: the adapters hold what "
            "the warm-up taught; choose auto (a frozen copy of the adapters), or warmup=null.",
        )


def _only_a_copy_moves(training: Training, reference: str) -> Iterator[Fault]:
    if training.sync_reference is not None and reference != "frozen_copy":
        yield Fault(
            ("training", "sync_reference"),
            f"needs reference: frozen_copy, the only one that can move; got {reference}.",
        )


CROSS_RULES = (
    (("model", "data"), _lengths_fit),
    (("data", "evaluation"), _answers_fit),
    (("data", "export"), _exported_answers_fit),
    (("model", "reference"), _adapters_need_lora),
    (("model", "warmup", "reference"), _adapters_hold_the_warm_up),
    (("training", "reference"), _only_a_copy_moves),
)


def cross_faults(parts: Mapping[str, Any], rules: Any = CROSS_RULES) -> Iterator[Fault]:
    """Yields the faults of every rule whose sections are all there.

    Args:
        parts: the sections that are valid in themselves.
        rules: pairs of (names of sections, function of those sections that yields faults).
    """
    for names, rule in rules:
        if all(name in parts for name in names):
            yield from rule(*(parts[name] for name in names))
