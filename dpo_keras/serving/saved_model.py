"""Export of a policy: a numbered SavedModel, written whole or not at all, and verified."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import keras
import keras_hub
import tensorflow as tf

from dpo_keras.batching import ChatTemplate, get_template
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.serving.graph_encoder import GraphEncoder, check_tokenization
from dpo_keras.serving.model_versions import staged, version_path, write_warmup_requests
from dpo_keras.serving.signatures import (
    INPUTS,
    SIGNATURES,
    Decoding,
    ServedModel,
    missing_reference,
    trace,
)
from dpo_keras.serving.standalone_process import StandaloneProcess
from dpo_keras.serving.tensorflow_process import export_on_tensorflow
from dpo_keras.serving.verification import (
    EMPTY,
    EXAMPLES,
    Comparison,
    Examples,
    calls,
    check_graph,
)
from dpo_keras.utils import JSON
from dpo_keras.utils.backends import uses_jax
from dpo_keras.version import __version__

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Args:
        path: the SavedModel, `<name>/<version>`.
        signatures: names of inputs and outputs of each signature.
        max_length: the longest prompt and response together, in tokens.
        size_bytes: size of all files.
        seconds: duration of the export.
        notes: what was left out, and why.
        answers: what the exported model answered to the examples in a process without Keras, by
            signature and output; empty where verification was skipped.
        differences: largest difference of each output to the model in Python, relative above 1;
            None where verification was skipped.
        custom_operations: ops that the server needs beyond TensorFlow's own (tensorflow_text's,
            which TensorFlow Serving's binaries hold); None where verification was skipped.
    """

    path: Path
    signatures: Mapping[str, Mapping[str, list[str]]]
    max_length: int
    size_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    answers: Mapping[str, Mapping[str, list[JSON]]] = dataclasses.field(default_factory=dict)
    differences: Mapping[str, float] | None = None
    custom_operations: tuple[str, ...] | None = None

    @property
    def model_name(self) -> str:
        """The name that the model is served under."""
        return self.path.parent.name

    @property
    def version(self) -> int:
        """The version number that a server shows."""
        return int(self.path.name)

    @property
    def verified(self) -> bool:
        """Whether the export ran in a process without Keras and gave the right answers."""
        return self.differences is not None

    def summary(self) -> str:
        """Describe the export in a few lines, for a terminal."""
        lines = [
            f"{self.path}: {self.size_bytes / 2**20:.1f} MiB, {self.seconds:.0f} s, sequences of "
            f"at most {self.max_length} tokens."
        ]
        lines += [
            f"  {name}({', '.join(signature['inputs'])}) -> {', '.join(signature['outputs'])}"
            for name, signature in self.signatures.items()
        ]
        if self.differences is None:
            lines.append("Not verified.")
        else:
            worst = max(self.differences.values(), default=0.0)
            lines.append(
                "Verified in a process without Keras; largest difference to the model in Python "
                f"{worst:.1e}."
            )
        if self.custom_operations:
            lines.append(f"Needs tensorflow_text's {', '.join(self.custom_operations)}.")
        return "\n".join([*lines, *self.notes])

    def as_dict(self) -> dict[str, JSON]:
        """Return every field, and `model_name`, `version`, `verified`, as plain JSON values."""
        values = dataclasses.asdict(self)
        for name in ("custom_operations", "notes"):
            values[name] = None if values[name] is None else list(values[name])
        return {
            **values,
            "path": str(self.path),
            "model_name": self.model_name,
            "version": self.version,
            "verified": self.verified,
        }


def export(  # noqa: PLR0913 - public API, options by keyword
    model: keras.Model,
    path: str | Path,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    signatures: Sequence[str] = SIGNATURES,
    temperature: float = 0.0,
    top_p: float = 1.0,
    template: str | Path | ChatTemplate | None = None,
    preprocessor: object | None = None,
    examples: Examples = EXAMPLES,
    verify: bool = True,
    on_stage: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write a SavedModel whose signatures take strings and give strings and numbers.

    | signature | inputs, string `[batch]` | outputs, `[batch]` |
    |---|---|---|
    | `score`, `serving_default` | `prompt`, `response` | `log_prob`, `reward`, `tokens` (int32) |
    | `prefer` | `prompt`, `response_a`, `response_b` | `probability_a`, `probability_b`, `llr` |
    | `generate` | `prompt` | `text` (string), `tokens` (int32), `finished` (bool) |

    With S = beta (log pi - log pi_ref) (or whatever score the model's loss compares):
    `reward` = S(response), `llr` = S(a) - S(b), `probability_a` = sigmoid(llr). Where no reference
    can be computed from new texts (a policy alone, `reference="cached"` or `"none"` with a loss
    that needs one), `reward` and `prefer` are left out, and the report says so.

    The tokenizer is in the graph and gives the ids that `tokenize_pairs` gives in training. The
    graph holds no XLA and no Python. It is verified in a fresh process that has TensorFlow and
    tensorflow_text, but no Keras. The files are written beside `path` and renamed at the end: a
    version that a server can see is whole.

    Args:
        model: a compiled `DPOModel` (of `dpo_keras` or of `dpo_keras.legacy`), or a policy alone:
            a KerasHub causal language model, or any Keras or tf-keras model from
            `{"token_ids", "padding_mask"}` to logits.
        path: `<anywhere>/<name>/<version>`, where the version is a whole number. Without a number
            at the end, the next free version in that directory.
        max_length: the longest prompt and response together, in tokens; longer prompts are cut from
            the left. By default the preprocessor's `sequence_length`.
        max_new_tokens: the longest text of `generate`, in tokens. By default 64, or half of
            `max_length` where that is less.
        signatures: names of the signatures to write.
        temperature: temperature of `generate`. 0 always takes the most likely token; above 0 each
            request samples anew.
        top_p: share of the probability to sample from, with a temperature.
        template: the chat template that the model was trained with, as in `tokenize_pairs`. The
            served prompt is then one user turn, the response one assistant turn.
        preprocessor: what tokenizes; by default the policy's own.
        examples: `(prompt, response_a, response_b)` texts for verification and for the warm-up
            requests.
        verify: False skips the fresh process. The graph is inspected all the same.
        on_stage: called with a few words before each stage.

    Returns:
        What was written and how it compared.

    Raises:
        InputError: an argument is out of range, a tokenizer or template cannot be served, or the
            version exists.
        RuntimeError: the exported model fails or answers otherwise than the model in Python.
        OSError: the files could not be written; nothing is left at `path`.
    """
    if uses_jax():
        options: dict[str, Any] = {
            **{"max_length": max_length, "max_new_tokens": max_new_tokens, "template": template},
            **{"temperature": temperature, "top_p": top_p, "preprocessor": preprocessor},
            **{"examples": examples, "signatures": signatures, "verify": verify},
        }
        return export_on_tensorflow(model, path, options, on_stage)
    began = time.monotonic()
    stage = on_stage or (lambda name: None)
    policy = getattr(model, "policy", model)
    preprocessor = preprocessor or getattr(policy, "preprocessor", None)
    max_length = max_length or getattr(preprocessor, "sequence_length", None) or 1024
    if max_new_tokens is None:
        max_new_tokens = max(1, min(64, max_length // 2))
    decoding = Decoding(max_new_tokens, temperature, top_p)
    problems = _model_problems(policy, preprocessor, max_length) + decoding.problems(max_length)
    target = _valid(lambda: version_path(path), problems)
    chat = _valid(lambda: get_template(template), problems)
    kept = _valid(lambda: _kept_signatures(model, signatures), problems)
    if problems or target is None or kept is None:
        raise InputError(problems)
    names, notes = kept

    # It imports TensorFlow while this process traces and writes.
    with StandaloneProcess() if verify else contextlib.nullcontext() as process:
        stage("tokenizer")
        encoder = GraphEncoder(preprocessor, max_length, chat)
        check_tokenization(encoder, preprocessor, chat)
        tokenizer = getattr(preprocessor, "tokenizer", None) or preprocessor
        special = tuple(getattr(tokenizer, "special_token_ids", None) or ())
        served = ServedModel(model, encoder, decoding, special)
        stage("tracing")
        keeper, functions = trace(served, names)
        verified: dict[str, JSON] = {}
        with staged(target) as partial:
            stage("writing")
            default = {"serving_default": functions[names[0]]}
            tf.saved_model.save(keeper, str(partial), signatures={**default, **functions})
            write_warmup_requests(partial, target.parent.name, calls(names, examples))
            _write_settings(partial, encoder, decoding, chat, names)
            check_graph(partial)
            if process is not None:
                stage("verifying")
                comparison = Comparison(served, preprocessor, chat)
                verified = _verify(process, partial, comparison, names, examples)
            size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    return ExportReport(
        path=target,
        signatures={
            name: {"inputs": list(INPUTS[name]), "outputs": sorted(f.structured_outputs)}
            for name, f in functions.items()
        },
        max_length=max_length,
        size_bytes=size,
        seconds=time.monotonic() - began,
        notes=notes,
        **verified,
    )


def _valid(compute: Callable[[], Value], problems: list[InputProblem]) -> Value | None:
    """Return what `compute` returns, or add to `problems` what it finds wrong."""
    try:
        return compute()
    except InputError as error:
        problems += error.problems
        return None


def _model_problems(
    policy: keras.Model, preprocessor: object | None, max_length: int
) -> list[InputProblem]:
    problems = []
    # By the name of the package, because nothing but dpo_keras.legacy imports tf-keras.
    packages = {kind.__module__.partition(".")[0] for kind in type(policy).__mro__}
    if not isinstance(policy, keras.Model) and not (callable(policy) and "tf_keras" in packages):
        rule = f"must be a DPOModel or a keras.Model, got {type(policy).__name__}"
        problems.append(InputProblem("model", rule))
    if preprocessor is None:
        rule = "is needed to tokenize in the graph: the policy has none attached"
        problems.append(InputProblem("preprocessor", rule))
    limit = getattr(getattr(policy, "backbone", policy), "max_sequence_length", None)
    if max_length < 4 or (limit is not None and max_length > limit):
        most = "" if limit is None else f" and at most the model's {limit} positions"
        problems.append(InputProblem("max_length", f"must be at least 4{most}", max_length))
    return problems


def _kept_signatures(
    model: keras.Model, names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the signatures that can be served, and notes on what is left out."""
    if not names or not set(names) <= set(INPUTS):
        rule = f"must be some of {', '.join(INPUTS)}"
        raise InputError(InputProblem("signatures", rule, list(names)))
    reason = missing_reference(model)
    kept = tuple(name for name in INPUTS if name in names and not (reason and name == "prefer"))
    if not kept:
        raise InputError(InputProblem("signatures", f"leave nothing to export: {reason}"))
    if reason and set(names) & {"score", "prefer"}:
        return kept, (f"No `prefer` signature and no `reward` output: {reason}.",)
    return kept, ()


def _verify(
    process: StandaloneProcess,
    path: Path,
    comparison: Comparison,
    names: Sequence[str],
    examples: Examples,
) -> dict[str, JSON]:
    """Compare both processes' answers; each computes its own while the other does."""
    answered = process.ask(path, [*calls(names, examples), *calls(names, EMPTY)])
    expected = {name: comparison.expected(name, examples) for name in names}
    found = answered.result()
    answers = dict(zip(names, found["outputs"], strict=False))
    blank = dict(zip(names, found["outputs"][len(names) :], strict=True))
    differences: dict[str, float] = {}
    for name in names:
        differences |= comparison.check(name, answers[name], expected[name])
        comparison.check_finite(name, blank[name])
    custom = tuple(found["custom_operations"])
    return {"answers": answers, "differences": differences, "custom_operations": custom}


def _write_settings(
    partial: Path,
    encoder: GraphEncoder,
    decoding: Decoding,
    template: ChatTemplate | None,
    names: Sequence[str],
) -> None:
    """Write down what was fixed at export, for those who run the server."""
    settings = {
        "signatures": list(names),
        "max_length": encoder.max_length,
        **dataclasses.asdict(decoding),
        "template": template.name if template else None,
        "versions": {
            "dpo_keras": __version__,
            "keras": keras.__version__,
            "keras_hub": keras_hub.__version__,
            "tensorflow": tf.__version__,
        },
    }
    file = partial / "assets.extra" / "dpo_keras.json"
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
