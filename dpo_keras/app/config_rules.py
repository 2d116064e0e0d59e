"""Rules over several sections of a configuration."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_keras.app.config_problems import Fault
from dpo_keras.app.config_sections import (
    REFERENCES,
    Data,
    Evaluation,
    Export,
    Loss,
    Model,
    reference_hint,
)
from dpo_keras.app.training_sections import Training, Warmup
from dpo_keras.errors import InputError
from dpo_keras.preferences.stored_preferences import MANIFEST, is_built
from dpo_keras.preferences.tfds_source import parse_name

if TYPE_CHECKING:
    from dpo_keras.losses import DPOLoss


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


def build_loss(loss: Loss) -> DPOLoss:
    """Makes the objective that a configuration names.

    Args:
        loss: the section.

    Raises:
        InputError: as `dpo_keras.DPOLoss` raises it.
    """
    from dpo_keras.losses import DPOLoss

    return DPOLoss(**loss.arguments())


def _loss_is_one(loss: Loss) -> Iterator[Fault]:
    from dpo_keras.losses import DPOLoss
    from dpo_keras.losses.options import OPTIONS

    options = loss.model_extra or {}
    known = [*type(loss).model_fields, *OPTIONS]
    unknown = [name for name in options if name not in OPTIONS]
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean loss.{close[0]}?" if close else f"known are {', '.join(known)}."
        yield Fault(("loss", name), f"is not a known key; {hint}")
    arguments = {name: v for name, v in loss.arguments().items() if name not in unknown}
    try:
        DPOLoss(**arguments)
    except InputError as error:
        for problem in error.problems:
            text = problem.replace("loss_type", "loss.type").replace("loss_weights", "loss.weights")
            yield Fault(("loss", *_key_named_in(problem, loss)), f": {text}")


def _key_named_in(problem: str, loss: Loss) -> tuple[str, ...]:
    """Finds the key that a sentence of `DPOLoss` is about, for its line."""
    if "enalty" in problem:
        return ("penalties", *(name for name in loss.penalties if repr(name) in problem))
    keys = {"loss_type": "type", "loss_weights": "weights"}
    keys |= {name: name for name in [*type(loss).model_fields, *(loss.model_extra or {})]}
    return next(((keys[word],) for word in re.findall(r"\w+", problem) if word in keys), ())


def _loss_has_its_reference(loss: Loss, reference: str) -> Iterator[Fault]:
    if reference != "none":
        return
    try:
        needs = build_loss(loss).needs_reference
    except InputError:
        return
    if needs:
        yield Fault(
            ("reference",),
            f"must not be none, for loss.type {'+'.join(loss.type)} needs a reference; choose "
            "auto, or a loss without one (dpo-keras losses lists them).",
        )


def _files_are_there(data: Data) -> Iterator[Fault]:
    for key in ("path", "held_out_path"):
        for name in getattr(data, key) or ():
            for problem in _source_problems(name):
                yield Fault(("data", key), problem)


def _source_problems(name: str) -> list[str]:
    if name.startswith("tfds:"):
        try:
            parse_name(name)
        except InputError as error:
            return [f": {problem}" for problem in error.problems]
    if name.startswith(("builtin:", "tfds:")) or Path(name).is_file() or is_built(name):
        return []
    if Path(name).is_dir():
        return [f"names {name}, which is a directory and has no {MANIFEST}; give a file, or what "
                "dpo-keras data build made."]  # fmt: skip
    return [f"names {name}, which does not exist; give a file."]


def _model_is_there(model: Model) -> Iterator[Fault]:
    from dpo_keras.app.model_sources import source_problems

    if model.path is not None:
        for problem in source_problems(model.path):
            yield Fault(("model", "path"), problem)


def _reference_is_there(reference: str) -> Iterator[Fault]:
    from dpo_keras.app.model_sources import source_problems

    if reference not in REFERENCES:
        for problem in source_problems(reference):
            kinds = ", ".join(REFERENCES)
            hint = reference_hint(reference) or ";"
            yield Fault(("reference",), f"must be one of {kinds}, or a model{hint} {problem}")


def _template_is_one(data: Data) -> Iterator[Fault]:
    from dpo_keras.batching.chat_templates import get_template

    try:
        get_template(data.template)
    except InputError as error:
        for problem in error.problems:
            yield Fault(("data", "template"), f": {problem}")


OUTSIDE_RULES: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("data",), _files_are_there),
    (("data",), _template_is_one),
    (("model",), _model_is_there),
    (("reference",), _reference_is_there),
    (("loss",), _loss_is_one),
    (("loss", "reference"), _loss_has_its_reference),
)
