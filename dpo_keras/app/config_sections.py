"""What the sections of a configuration share: habits, and types of values."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dpo_keras.app.config_problems import Fault, raise_faults
from dpo_keras.app.yaml_document import guess_types
from dpo_keras.preferences.record_stream import Reading


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path | float | int) else value


def _one_or_all(values: list[Any] | None) -> Any:
    return values[0] if values and len(values) == 1 else values


OneOrMore = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(_as_list),
    PlainSerializer(_one_or_all, return_type=Any),
]

_SWITCH = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
AutoSwitch = Annotated[
    Literal["auto", True, False],
    BeforeValidator(lambda v: _SWITCH.get(v.lower(), v) if isinstance(v, str) else v),
]


def _strategy_of_keras_3(value: Any) -> Any:
    if value == "parameter_server":
        raise PydanticCustomError(
            "parameter_server",
            "must be a strategy that Keras 3 has (for parameter servers write a program with "
            "dpo_keras.legacy, which trains models of tf-keras)",
        )
    return value


Strategy = Annotated[
    Literal["auto", "one_device", "mirrored", "multi_worker", "tpu"],
    BeforeValidator(_strategy_of_keras_3),
]

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Common habits: no unknown keys, finite numbers, immutable, rules over several keys.

    A subclass yields its rules over several keys from `faults`.
    """

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, frozen=True, validate_default=True
    )

    def faults(self) -> Iterator[Fault]:
        """Yields every broken rule that no single key's type can state."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Any:
        raise_faults(self.faults())
        return self


class Scratch(Section):
    """A policy with random weights, and a byte-level BPE tokenizer trained on the training pairs.

    Args:
        family: architecture; each has its KerasHub classes.
        vocabulary_size: tokens, the 256 bytes and the special tokens among them.
        max_sequence_length: the longest text (prompt and response) in tokens.
    """

    family: Literal["gpt2", "llama"] = "gpt2"
    vocabulary_size: Annotated[int, Field(ge=300)] = 4096
    num_layers: Count = 4
    num_heads: Count = 4
    hidden_dim: Count = 256
    intermediate_dim: Count = 1024
    max_sequence_length: Annotated[int, Field(ge=8)] = 512
    dropout: Fraction = 0.0

    def faults(self) -> Iterator[Fault]:
        """Heads must share the width evenly; rotary positions need an even share."""
        if self.hidden_dim % self.num_heads:
            yield Fault(
                ("hidden_dim",),
                f"must be a multiple of num_heads ({self.num_heads}), got {self.hidden_dim}.",
            )
        elif self.family == "llama" and (self.hidden_dim // self.num_heads) % 2:
            yield Fault(
                ("hidden_dim",),
                f"divided by num_heads ({self.num_heads}) must be even for the llama family, "
                f"got {self.hidden_dim // self.num_heads}.",
            )


class Model(Section):
    """The policy: an existing one (`path`) or a new one (`scratch`).

    Args:
        path: a KerasHub preset name, or a directory in KerasHub or Hugging Face format, or a
            `.keras` file.
        scratch: sizes of a new model; not together with `path`.
        dtype: of weights and computation; `mixed_bfloat16` keeps weights in float32.
        lora_rank: train low-rank adapters only; null trains all weights.
    """

    path: str | None = None
    scratch: Scratch | None = None
    dtype: Literal["float32", "bfloat16", "mixed_bfloat16"] = "float32"
    lora_rank: Count | None = None

    def faults(self) -> Iterator[Fault]:
        """Exactly one of `path` and `scratch`."""
        if self.path is not None and self.scratch is not None:
            yield Fault(
                (), "must have either path or scratch, not both; set one of the two to null."
            )
        elif self.path is None and self.scratch is None:
            yield Fault(
                (),
                "must have path (a preset name, or a model directory) or scratch (the sizes of a "
                "new model).",
            )


class Data(Section):
    """The preference pairs and how they become tokens.

    Args:
        path: a file, a list of files, a directory that `dpo-keras data build` made (it is streamed
            and its tokens are kept on disk), `tfds:NAME/CONFIG:SPLIT`, or `builtin:support`.
        columns: our name of a column to the one that the data have, for instance
            `{prompt: question, chosen: answer_a}`.
        data_dir: where TensorFlow Datasets keeps its data.
        tokens: where the tokens of a built directory are kept; null: in it.
        format: how to read it; `auto` goes by the file's name and columns.
        on_error: `report` keeps the good lines, `fail` stops at bad ones (naming all).
        held_out: share of the pairs, by `split_by`, kept for evaluation; 0.1 unless
            `held_out_path` is given.
        held_out_path: files with the held-out pairs instead.
        split_by: what never stands on both sides of the split.
        template: chat template, by name, or a Jinja file, or a Hugging Face checkpoint directory;
            null takes prompts and responses as they are, which messages can not be.
        max_length: the longest prompt + response in tokens.
        overlength: what becomes of longer pairs.
        limit: read this many pairs at most.
    """

    path: OneOrMore | None = None
    columns: dict[str, str] | None = None
    data_dir: str | None = None
    tokens: str | None = None
    format: Literal["auto", "jsonl", "json", "csv", "parquet"] = "auto"
    on_error: Literal["report", "fail"] = "report"
    held_out: Fraction | None = None
    held_out_path: OneOrMore | None = None
    split_by: Literal["prompt", "annotator", "group"] = "prompt"
    template: str | None = None
    max_length: Annotated[int, Field(ge=4)] = 1024
    overlength: Literal["truncate", "drop", "error"] = "truncate"
    limit: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_held_out(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if values.get("held_out") is None and values.get("held_out_path") is None:
                return {**values, "held_out": 0.1}
        return values

    def faults(self) -> Iterator[Fault]:
        """`path` is required; the held-out pairs come from one place."""
        if self.path is None:
            yield Fault(
                ("path",),
                "is required: a file of preference pairs (JSONL, JSONL.gz, CSV or Parquet), a "
                "list of them, a directory of dpo-keras data build, tfds:NAME/CONFIG:SPLIT, or "
                "builtin:support; on the command line data.path=FILE.",
            )
        if self.held_out is not None and self.held_out_path is not None:
            yield Fault(
                ("held_out",),
                "must not be given together with data.held_out_path; set one of the two to null.",
            )
        for problem in Reading(self.format, self.columns).check():
            yield Fault(("columns",), f": {problem}")


class Loss(BaseModel):
    """The objective: the arguments of `dpo_keras.DPOLoss`, which checks them.

    Args:
        type: a name of `dpo-keras losses`, or a list of them.
        weights: one per type of a list.
        beta: how strongly the policy is held to the reference.
        label_smoothing: assumed share of flipped labels.
        penalties: weight by penalty name.

    Any other key is handed to the objective as its option.
    """

    # Options differ by objective, so unknown keys are DPOLoss's to refuse.
    model_config = ConfigDict(extra="allow", frozen=True, validate_default=True)

    type: OneOrMore = Field(default_factory=lambda: ["sigmoid"])
    weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    penalties: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _types_of_options(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: v if k in cls.model_fields else guess_types(v) for k, v in values.items()}

    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments for `dpo_keras.DPOLoss`."""
        return {
            "loss_type": self.type[0] if len(self.type) == 1 else list(self.type),
            "loss_weights": self.weights,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "penalties": dict(self.penalties) or None,
            **(self.model_extra or {}),
        }


def _idle_top_p(temperature: float, top_p: float) -> Iterator[Fault]:
    if top_p < 1 and temperature == 0:
        yield Fault(
            ("top_p",),
            f"has no effect at temperature 0, which takes the likeliest token, got {top_p}; give a "
            "temperature, or leave top_p.",
        )


class Evaluation(Section):
    """What is measured before and after the training.

    Args:
        prompts: how many held-out prompts the policy answers.
        samples_shown: how many of the answers are shown side by side.
        max_new_tokens: the longest answer in tokens.
        temperature: of sampling; 0 takes the likeliest token.
        batch_size: pairs, or prompts, at once.
    """

    prompts: Annotated[int, Field(ge=0)] = 64
    samples_shown: Annotated[int, Field(ge=0)] = 4
    max_new_tokens: Count = 64
    temperature: NotNegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: Count = 16

    def faults(self) -> Iterator[Fault]:
        """Sampling options need sampling."""
        yield from _idle_top_p(self.temperature, self.top_p)


Signature = Literal["score", "prefer", "generate"]


class Export(Section):
    """The SavedModel for TensorFlow Serving.

    Args:
        path: `<name>/<version>/`; null takes the next version under `saved_models/<name>/`.
        signatures: which to write; the first is `serving_default` too.
        max_new_tokens: the longest answer of the `generate` signature.
        temperature: of the `generate` signature; 0 takes the likeliest token.
        top_p: share of the probability that is sampled from.
    """

    path: str | None = None
    signatures: list[Signature] = Field(
        default_factory=lambda: list(get_args(Signature)), min_length=1
    )
    max_new_tokens: Count = 64
    temperature: NotNegative = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    def faults(self) -> Iterator[Fault]:
        """Sampling options need sampling."""
        yield from _idle_top_p(self.temperature, self.top_p)


REFERENCES = ("auto", "frozen_copy", "adapters_off", "cached", "none")


def reference_hint(value: str) -> str:
    """Names the kind of reference that a misspelt one is nearest to, or returns an empty string.

    Args:
        value: what was given.

    Example:
        >>> reference_hint("frozen-copy")
        "; did you mean 'frozen_copy'?"
    """
    close = difflib.get_close_matches(value, REFERENCES, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
