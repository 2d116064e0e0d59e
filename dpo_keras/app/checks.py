"""Rules on what lies outside the configuration's text: files, models, the objective."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_keras.app.faults import Fault
from dpo_keras.app.sections import REFERENCES, Data, Loss, Model, reference_hint
from dpo_keras.errors import InputError
from dpo_keras.preferences.manifest import MANIFEST, is_built
from dpo_keras.preferences.tfds_source import parse_name

if TYPE_CHECKING:
    from dpo_keras.losses import DPOLoss


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
    from dpo_keras.batching.templates import get_template

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
