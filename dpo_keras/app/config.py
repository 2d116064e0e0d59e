"""The configuration of a run: read, checked as a whole, and written with every default filled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from dpo_keras.app.config_problems import Fault, faults_of, render
from dpo_keras.app.config_rules import cross_faults
from dpo_keras.app.config_sections import (
    Data,
    Evaluation,
    Export,
    Loss,
    Model,
    Section,
)
from dpo_keras.app.training_sections import Training, Warmup
from dpo_keras.app.yaml_document import Document, read_document
from dpo_keras.errors import InputError


class Config(Section):
    """All that `dpo-keras train` needs to know.

    Args:
        name: names the run; letters, digits, `.`, `_` and `-`. A file's default is its stem.
        output: the run's directory; null: `runs/<name>`.
        seed: of the split, the shuffling, the initial weights and the sampling.
        model: the policy.
        data: the preference pairs.
        warmup: supervised training on the chosen responses first; null for none.
        reference: `auto`, `frozen_copy`, `adapters_off`, `cached`, `none`, or a model (as
            `model.path`).
        loss: the objective.
        training: preference training.
        evaluation: what is measured before and after.
        export: the SavedModel; null for none.

    Example:
        >>> config = Config(model={"path": "gpt2_base_en"}, data={"path": "pairs.jsonl"})
        >>> config.output, config.data.held_out, config.loss.type
        ('runs/run', 0.1, ['sigmoid'])
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    output: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: Model = Field(default_factory=dict, validate_default=True)
    data: Data = Field(default_factory=dict, validate_default=True)
    warmup: Warmup | None = None
    reference: Annotated[str, Field(min_length=1)] = "auto"
    loss: Loss = Field(default_factory=Loss)
    training: Training = Field(default_factory=Training)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    export: Export | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_take_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        for name in ("model", "data", "loss", "training", "evaluation"):
            if name in filled and filled[name] is None:
                filled[name] = {}
        if filled.get("output") is None and isinstance(filled.get("name", "run"), str):
            filled["output"] = f"runs/{filled.get('name', 'run')}"
        return filled

    def faults(self) -> Iterator[Fault]:
        """Rules over several sections."""
        return cross_faults({name: getattr(self, name) for name in type(self).model_fields})

    def resolved(self) -> str:
        """Returns YAML with every default filled, which reads back as an equal configuration."""
        return yaml.safe_dump(
            self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
        )

    def differences(self, other: Config) -> list[str]:
        """Names the keys in which two configurations differ, `output` aside.

        Args:
            other: for instance the configuration that a run was started with.

        Returns:
            One `section.key is A, was B` per difference, A being of this configuration.
        """
        found = _differences(self.model_dump(mode="json"), other.model_dump(mode="json"))
        return [text for text in found if not text.startswith("output ")]


def _differences(here: Any, there: Any, key: str = "") -> Iterator[str]:
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for name in sorted(here.keys() | there.keys()):
            inner = f"{key}.{name}" if key else name
            yield from _differences(here.get(name), there.get(name), inner)
    elif here != there:
        yield f"{key} is {_inline(here)}, was {_inline(there)}"


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _valid_parts(tree: Mapping[str, Any], failed: set[Any]) -> dict[str, Any]:
    """Validates alone each section that is not among the failed ones."""
    parts = {}
    for name, field in Config.model_fields.items():
        if name in failed:
            continue
        if tree.get(name) is None:
            parts[name] = field.get_default(call_default_factory=True)
        else:
            kind: Any = field.annotation
            parts[name] = TypeAdapter(kind).validate_python(tree[name])
        if isinstance(parts[name], dict):  # a required section whose absence is a fault itself
            del parts[name]
    return parts


def build_config(document: Document, *, outside: bool = False) -> Config:
    """Validates a document; reports everything that is wrong with it at once.

    Args:
        document: as `read_document` returns it, overrides applied.
        outside: check also what lies outside the text: that files and model directories are
            there, and that `dpo_keras.DPOLoss` takes `loss` (this imports Keras).

    Returns:
        The configuration.

    Raises:
        InputError: with one message per broken rule, each with place, key, rule and value.
    """
    problems = list(document.problems)
    if not document.readable:
        raise InputError(problems)
    faults: list[Fault] = []
    config = None
    parts: dict[str, Any] = {}
    try:
        config = Config.model_validate(document.tree)
        parts = {name: getattr(config, name) for name in Config.model_fields}
    except ValidationError as error:
        faults += faults_of(error, Config)
        failed = {item["loc"][0] for item in error.errors() if item["loc"]}
        if failed:
            parts = _valid_parts(document.tree, failed)
            faults += cross_faults(parts)
    if outside:
        from dpo_keras.app.config_rules import OUTSIDE_RULES

        faults += cross_faults(parts, OUTSIDE_RULES)
    problems += render(faults, document)
    if problems or config is None:
        raise InputError(problems)
    return config


def parse_config(
    text: str,
    overrides: Sequence[str] = (),
    *,
    source: str = "<configuration>",
    outside: bool = False,
) -> Config:
    r"""Reads a configuration from YAML text.

    Args:
        text: the YAML text.
        overrides: `section.key=value`, applied in order; the last one wins.
        source: name used in messages.
        outside: see `build_config`.

    Raises:
        InputError: everything that is wrong, together.

    Example:
        >>> text = "model: {path: gpt2_base_en}\ndata: {path: builtin:support}\n"
        >>> parse_config(text, ["training.learning_rate=1e-4"]).training.learning_rate
        0.0001
        >>> parse_config(text + "training: {epoch: 2, batch_size: 0}\n", source="a.yaml")
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: a.yaml, line 3: training.batch_size must be >= 1, got 0.
        a.yaml, line 3: training.epoch is not a known key; did you mean training.epochs?
    """
    document = read_document(text, source)
    for override in overrides:
        document.override(override)
    return build_config(document, outside=outside)


def config_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Reads a configuration file without judging it; `build_config` does that.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, applied in order; the last one wins.

    Raises:
        InputError: if the file can not be read, or is no YAML.
    """
    path = Path(path)
    document = read_document(read_text(path), str(path))
    if not document.readable:
        raise InputError(document.problems)
    if document.tree.get("name") is None:
        document.tree["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("-._") or "run"
    for override in overrides:
        document.override(override)
    return document


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, outside: bool = False
) -> Config:
    """Reads a configuration file.

    Args:
        path: the YAML file. Paths in it are relative to the current directory, so that a
            configuration and the command line mean the same by them.
        overrides: `section.key=value`, applied in order; the last one wins.
        outside: see `build_config`.

    Raises:
        InputError: everything that is wrong, together.
    """
    return build_config(config_document(path, overrides), outside=outside)


def read_text(path: Path) -> str:
    """Reads a file that the user named, as UTF-8.

    Args:
        path: the file.

    Raises:
        InputError: if it is missing, a directory, not readable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 text; byte {error.start} is not.") from error
    except OSError as error:
        raise InputError(f"{path}: can not be read: {error.strerror}.") from error


def given_text(path: Path, overrides: Sequence[str]) -> str:
    """Returns a configuration's text with the overrides it was run with, for the record.

    Args:
        path: the configuration's file.
        overrides: as on the command line.
    """
    lines = [f"# override: {override}\n" for override in overrides]
    return read_text(path).rstrip("\n") + "\n" + "".join(lines)
