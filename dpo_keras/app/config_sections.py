"""The sections of a configuration: every key with its type, its default and its meaning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from dpo_keras.app.yaml_document import guess_types
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON


def _as_list(value: JSON) -> JSON:
    return [value] if isinstance(value, str | Path | float | int) else value


def _one_or_all(values: list[JSON] | None) -> JSON:
    return values[0] if values and len(values) == 1 else values


def _as_switch(value: JSON) -> JSON:
    words = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _strategy_of_keras_3(value: JSON) -> JSON:
    if value == "parameter_server":
        raise InputError(
            "must be a strategy that Keras 3 has. For parameter servers, write a program with "
            "dpo_keras.legacy, which trains models of tf-keras; got parameter_server."
        )
    return value


OneOrMore = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(_as_list),
    PlainSerializer(_one_or_all, return_type=JSON),
]
AutoSwitch = Annotated[Literal["auto", True, False], BeforeValidator(_as_switch)]
Strategy = Annotated[
    Literal["auto", "one_device", "mirrored", "multi_worker", "tpu"],
    BeforeValidator(_strategy_of_keras_3),
]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
TopP = Annotated[float, Field(gt=0, le=1)]
Arguments = Annotated[dict[str, JSON], BeforeValidator(guess_types)]
Quantization = Literal["int8", "int4", "gptq"]
Logger = Literal["mlflow", "wandb"]
Loggers = Annotated[list[Logger], BeforeValidator(_as_list)]


def key(default: JSON, meaning: str) -> JSON:
    """Declare a key of a section. README.md lists the meanings."""
    return Field(default, description=meaning)


class Section(BaseModel):
    """Base of all sections: no unknown keys, finite numbers, immutable, rules over several keys."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, frozen=True, validate_default=True
    )

    def _broken_rules(self) -> Iterator[InputProblem]:
        """Yield what breaks a rule that no single key's type can state."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = list(self._broken_rules())
        if problems:
            raise InputError(problems)  # `config` takes it out of pydantic's
        return self


class Scratch(Section):
    """A policy with random weights, and a byte-level BPE tokenizer made of the training pairs."""

    family: Literal["gpt2", "llama"] = key("gpt2", "architecture; each has its KerasHub classes")
    vocabulary_size: Annotated[int, Field(ge=300, lt=2**31)] = key(
        4096, "the most tokens, the 256 bytes and the special tokens among them"
    )
    num_layers: Count = key(4, "transformer blocks")
    num_heads: Count = key(4, "attention heads of a block")
    hidden_dim: Count = key(256, "width of the hidden states")
    intermediate_dim: Count = key(1024, "width of the feed-forward layers")
    max_sequence_length: Annotated[int, Field(ge=8, lt=2**31)] = key(
        512, "the longest text (prompt and response) in tokens"
    )
    dropout: Fraction = key(0.0, "share of values dropped in the warm-up")

    def _broken_rules(self) -> Iterator[InputProblem]:
        width, left = divmod(self.hidden_dim, self.num_heads)
        if left:
            rule = f"must be a multiple of num_heads ({self.num_heads})"
            yield InputProblem("hidden_dim", rule, self.hidden_dim)
        elif self.family == "llama" and width % 2:  # rotary positions turn pairs of values
            rule = f"divided by num_heads ({self.num_heads}) must be even for the llama family"
            yield InputProblem("hidden_dim", rule, width)


class Model(Section):
    """The policy: an existing one (`path`) or a new one (`scratch`)."""

    path: str | None = key(
        None, "a KerasHub preset, a directory of KerasHub or Hugging Face, or a `.keras` file"
    )
    scratch: Scratch | None = key(None, "sizes of a new model; not together with `path`")
    dtype: Literal["float32", "bfloat16", "mixed_bfloat16", "float16", "mixed_float16"] = key(
        "float32",
        "of weights and computation; `mixed_…` keeps weights in float32, and the others lose small "
        "updates of weights that are trained in full",
    )
    quantization: Quantization | None = key(
        None, "keeps the kernels under the adapters in 8 or 4 bits; needs `lora_rank`"
    )
    lora_rank: Count | None = key(None, "rank of the adapters to train; null trains all weights")
    lora_alpha: Positive | None = key(None, "the adapters' scale is alpha / rank; null: rank")
    lora_targets: OneOrMore | None = key(
        None,
        "layers that get adapters: `attention`, `all-linear`, or names or patterns; null: the "
        "query and value projections",
    )
    lora_scaling: Literal["standard", "rank_stabilized"] = key(
        "standard", "`rank_stabilized`: the scale is alpha / sqrt(rank)"
    )

    def _broken_rules(self) -> Iterator[InputProblem]:
        if self.path is not None and self.scratch is not None:
            rule = "must have either path or scratch, not both; set one of the two to null."
            yield InputProblem("", rule)
        elif self.path is None and self.scratch is None:
            rule = "must have path (a preset name, or a model directory) or scratch (the sizes of a"
            yield InputProblem("", f"{rule} new model).")
        if self.quantization is not None and self.lora_rank is None:
            rule = "needs adapters, since quantized kernels do not train"
            hint = "Set model.lora_rank, such as 8, or quantization to null."
            yield InputProblem("quantization", rule, self.quantization, hint)


class Data(Section):
    """The preference pairs, and how they become tokens."""

    path: OneOrMore | None = key(
        None,
        "a file, a list of files, a directory that `dpo-keras data build` made (it is streamed "
        "and its tokens are kept on disk), `tfds:NAME/CONFIG:SPLIT`, `builtin:support`, or rated "
        "replies, `builtin:support-thumbs:NOISE`",
    )
    columns: dict[str, str] | None = key(
        None, "our name of a column to the data's, such as `{prompt: question, chosen: best}`"
    )
    data_dir: str | None = key(None, "where TensorFlow Datasets keeps its data")
    tokens: str | None = key(None, "where the tokens of a built directory are kept; null: in it")
    format: Literal["auto", "jsonl", "json", "csv", "parquet"] = key(
        "auto", "of the files; `auto` goes by the file's name and columns"
    )
    on_error: Literal["report", "fail"] = key(
        "report", "`report` keeps the good lines, `fail` stops at bad ones and names all of them"
    )
    feedback: Literal["choices", "thumbs"] | None = key(
        None, "what to take of a feedback log that has both choices and thumbs"
    )
    unpair: bool = key(
        False, "rate the responses of pairs: chosen good, rejected bad; for `loss.type: kto`"
    )
    allow_truncated: bool = key(
        False,
        "whether to train on what is left of a file that is cut off; otherwise it is an error",
    )
    held_out: Fraction | None = key(
        None, "share of the pairs kept for evaluation, by `split_by`; 0.1 without `held_out_path`"
    )
    held_out_path: OneOrMore | None = key(None, "files with the held-out pairs instead")
    split_by: Literal["prompt", "annotator", "group"] = key(
        "prompt", "what the split keeps together"
    )
    template: str | None = key(
        None,
        "chat template: a name, a Jinja file, or a Hugging Face checkpoint directory. null "
        "takes prompts and responses as they are, and refuses messages",
    )
    max_length: Annotated[int, Field(ge=4, lt=2**31)] = key(
        1024, "the longest prompt + response in tokens"
    )
    overlength: Literal["truncate", "drop", "error"] = key(
        "truncate", "what happens to longer pairs"
    )
    min_prompt_tokens: Count | None = key(
        None, "prompt tokens that truncation leaves at least; null: a quarter of `max_length`"
    )
    rankings: Literal["all_pairs", "best_against_rest"] = key(
        "all_pairs", "the pairs that an objective of pairs makes of rankings"
    )
    limit: Count | None = key(None, "read this many pairs at most")

    @model_validator(mode="before")
    @classmethod
    def _default_held_out(cls, values: JSON) -> JSON:
        given = isinstance(values, dict) and (values.get("held_out"), values.get("held_out_path"))
        return {**values, "held_out": 0.1} if given == (None, None) else values

    def _broken_rules(self) -> Iterator[InputProblem]:
        if self.path is None:
            yield InputProblem(
                "path",
                "is required: a file of preference pairs (JSONL, JSONL.gz, CSV or Parquet), a "
                "list of them, a directory of dpo-keras data build, tfds:NAME/CONFIG:SPLIT, or "
                "builtin:support; on the command line data.path=FILE.",
            )
        least = self.min_prompt_tokens
        if least is not None and least > self.max_length - 2:
            rule = f"must be <= {self.max_length - 2}, data.max_length - 2: responses need room"
            yield InputProblem("min_prompt_tokens", rule, least)
        if self.held_out is not None and self.held_out_path is not None:
            rule = "must not be given together with data.held_out_path; set one of the two to null."
            yield InputProblem("held_out", rule)


class Loss(BaseModel):
    """The objective: the arguments of `dpo_keras.DPOLoss`, which checks them.

    Any other key is handed to the objective as its option; `dpo-keras losses` lists them.
    """

    # Options differ by objective, so unknown keys are DPOLoss's to refuse.
    model_config = ConfigDict(extra="allow", frozen=True, validate_default=True)

    type: OneOrMore = key(["sigmoid"], "a name of `dpo-keras losses`, or a list of them")
    weights: list[float] | None = key(None, "one per type of a list")
    beta: float = key(0.1, "how strongly the policy is held to the reference")
    label_smoothing: float = key(0.0, "assumed share of flipped labels")
    penalties: dict[str, float] = key({}, "weight by penalty name")

    @model_validator(mode="before")
    @classmethod
    def _types_of_options(cls, values: JSON) -> JSON:
        if not isinstance(values, dict):
            return values
        return {k: v if k in cls.model_fields else guess_types(v) for k, v in values.items()}

    def arguments(self) -> dict[str, JSON]:
        """Return the keyword arguments of `dpo_keras.DPOLoss`."""
        return {
            "loss_type": self.type[0] if len(self.type) == 1 else list(self.type),
            "loss_weights": self.weights,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "penalties": dict(self.penalties) or None,
            **(self.model_extra or {}),
        }


class Optimization(Section):
    """What any training needs."""

    epochs: Count = key(1, "passes over the training pairs")
    max_steps: Count | None = key(None, "end after this many steps; null: after the epochs")
    batch_size: Count = key(8, "pairs per step, over all replicas")
    optimizer: str = key("adamw", "any of Keras' optimizers by its name")
    optimizer_options: Arguments = key({}, "its further arguments, such as `{beta_2: 0.98}`")
    learning_rate: Positive = key(5e-6, "of the optimizer, at its highest")
    schedule: str = key(
        "constant", "of the rate after its rise: constant, linear, cosine, or one of Keras' by name"
    )
    schedule_options: Arguments = key(
        {}, "arguments of one of Keras' schedules, such as `{decay_rate: 0.9}`"
    )
    warmup_fraction: Fraction = key(0.0, "share of the steps in which the rate rises from 0")
    weight_decay: NotNegative = key(0.0, "of the optimizer")
    clip_norm: Positive | None = key(1.0, "bound on the norm of the whole gradient; null for none")

    def optimizer_arguments(self) -> dict[str, JSON]:
        """Return the keyword arguments of `dpo_keras.training.make_optimizer`."""
        names = ["optimizer", "optimizer_options", "learning_rate", "schedule", "schedule_options"]
        names += ["warmup_fraction", "weight_decay", "clip_norm"]
        return {name: getattr(self, name) for name in names}


class Warmup(Optimization):
    """Supervised warm-up on the chosen responses, before preference training."""

    batch_size: Count = key(16, "texts per step, over all replicas")
    learning_rate: Positive = key(2e-5, "of the optimizer, at its highest")


class ReferenceSync(Section):
    """A reference that follows the policy: TR-DPO (arXiv 2404.09656)."""

    every: Count = key(512, "steps between updates of the reference")
    alpha: TopP = key(0.6, "share of the policy in the new reference; 1 replaces it")


class Mesh(Section):
    """Devices on JAX, along two axes: rows of batches are split along one, weights along both."""

    data: Count = key(1, "devices along which the rows of a batch are split")
    model: Count = key(1, "devices along which each weight is split")
    fsdp: bool = key(False, "split weights along `data`, too (fully sharded data parallel)")


class Training(Optimization):
    """Preference training."""

    gradient_accumulation: Count = key(1, "steps per update of the weights")
    jit_compile: AutoSwitch = key("auto", "XLA; `auto` leaves it to Keras")
    steps_per_execution: Count = key(1, "steps run in one call, for small models")
    backend: Literal["auto", "tensorflow", "jax"] = key(
        "auto",
        "of Keras; `auto` is jax where there is a mesh, else what the environment variable "
        "KERAS_BACKEND names, else tensorflow",
    )
    strategy: Strategy = key("auto", "how replicas are made on TensorFlow")
    mesh: Mesh | None = key(
        None, "devices on JAX; null: batches are split over all GPUs or TPUs, if there are several"
    )
    worker_timeout: Positive = key(300.0, "seconds to wait at the start for workers of TF_CONFIG")
    evaluate_every: Count | None = key(None, "steps between evaluations; null: once per epoch")
    checkpoint_every: Count | None = key(None, "steps between checkpoints; null: once per epoch")
    log_every: Count = key(1, "steps between records in `metrics.jsonl` and in `loggers`")
    loggers: Loggers = key([], "`mlflow`, `wandb`: report the training there too")
    keep_checkpoints: Count = key(2, "how many of the newest are kept")
    batching: Literal["auto", "packed", "buckets"] = key(
        "auto",
        "`packed` puts several pairs into a row, each prompt once; `buckets` works with any "
        "model; `auto` packs where the model allows it, and says why where it does not",
    )
    row_length: Count | None = key(None, "tokens per packed row; null chooses, about 1,024")
    buckets: Count = key(4, "number of lengths of batches that are not packed; XLA compiles each")
    remat: bool = key(
        False,
        "recompute activations in the backward pass instead of keeping them: less memory for "
        "about a quarter more time; the warm-up then runs without dropout",
    )
    auxiliary_loss: Literal["keep", "drop"] = key(
        "keep",
        "`keep` adds the losses that balance the experts of a mixture of experts, each with the "
        "weight of its model; `drop` leaves them out",
    )
    sync_reference: ReferenceSync | None = key(None, "how the reference moves; null: it does not")


class Sampling(Section):
    """How responses are sampled."""

    max_new_tokens: Count = key(64, "the longest response in tokens")
    temperature: NotNegative = key(1.0, "0 takes the likeliest token")
    top_p: TopP = key(1.0, "share of the probability that is sampled from")


class Evaluation(Sampling):
    """What is measured before and after the training."""

    prompts: Natural = key(64, "how many held-out prompts the policy answers")
    samples_shown: Natural = key(4, "how many of the answers are shown side by side")
    batch_size: Count = key(16, "pairs, or prompts, at once")


Signature = Literal["score", "prefer", "generate"]


class Export(Sampling):
    """The SavedModel for TensorFlow Serving; the sampling keys are of its `generate` signature."""

    path: str | None = key(None, "`<name>/<version>/`; null: the next in `saved_models/<name>/`")
    signatures: Annotated[list[Signature], Field(min_length=1)] = key(
        list(get_args(Signature)), "which to write; the first is `serving_default` too"
    )
    temperature: NotNegative = key(0.0, "0 takes the likeliest token")


REFERENCES = ("auto", "frozen_copy", "adapters_off", "cached", "none")
