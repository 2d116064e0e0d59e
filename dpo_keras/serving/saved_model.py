"""What an export wrote, and how it compared."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import keras_hub
import tensorflow as tf

from dpo_keras.batching import ChatTemplate, get_template
from dpo_keras.errors import InputError
from dpo_keras.serving.answer_comparison import EMPTY, EXAMPLES, Comparison, Examples, calls
from dpo_keras.serving.graph_encoder import GraphEncoder, check_tokenization
from dpo_keras.serving.model_versions import staged, version_path
from dpo_keras.serving.signatures import INPUTS, Decoding, Server, missing_reference, trace
from dpo_keras.serving.verification import check_graph, run_standalone
from dpo_keras.serving.warmup import write_warmup_requests
from dpo_keras.version import __version__


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Args:
        path: the SavedModel, `<name>/<version>`.
        signatures: names of inputs and outputs of each signature.
        max_length: most tokens of prompt and response together.
        answers: what the exported model answered to the examples, by signature and output; empty
            where verification was skipped.
        differences: largest difference of each output to the model in Python (relative above 1),
            computed in a process without Keras; None where that was skipped.
        custom_operations: ops that the server needs beyond TensorFlow's own (tensorflow_text's,
            which TensorFlow Serving's binaries hold); None where verification was skipped.
        size_bytes: of all files.
        seconds: that the export took.
        notes: what was left out, and why.
    """

    path: Path
    signatures: Mapping[str, Mapping[str, list[str]]]
    max_length: int
    answers: Mapping[str, Mapping[str, list[Any]]]
    differences: Mapping[str, float] | None
    custom_operations: tuple[str, ...] | None
    size_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def model_name(self) -> str:
        """The name that it is served under."""
        return self.path.parent.name

    @property
    def version(self) -> int:
        """The version that a server shows it as."""
        return int(self.path.name)

    @property
    def verified(self) -> bool:
        """Whether it was run in a process without Keras and compared."""
        return self.differences is not None

    def summary(self) -> str:
        """Describes the export in a few lines.

        Returns:
            Text for a terminal.
        """
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

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values.

        Returns:
            Every field, and `model_name`, `version`, `verified`.
        """
        return {
            "path": str(self.path),
            "model_name": self.model_name,
            "version": self.version,
            "signatures": {name: dict(value) for name, value in self.signatures.items()},
            "max_length": self.max_length,
            "answers": {name: dict(value) for name, value in self.answers.items()},
            "verified": self.verified,
            "differences": None if self.differences is None else dict(self.differences),
            "custom_operations": None
            if self.custom_operations is None
            else list(self.custom_operations),
            "size_bytes": self.size_bytes,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


SIGNATURES = tuple(INPUTS)


def export(
    model: keras.Model,
    path: str | Path,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    signatures: Sequence[str] = SIGNATURES,
    temperature: float = 0.0,
    top_p: float = 1.0,
    template: str | Path | ChatTemplate | None = None,
    preprocessor: Any = None,
    examples: Examples = EXAMPLES,
    verify: bool = True,
    on_stage: Callable[[str], None] | None = None,
) -> ExportReport:
    """Writes a SavedModel whose signatures take strings and give strings and numbers.

    | signature | inputs, string `[batch]` | outputs, `[batch]` |
    |---|---|---|
    | `score`, `serving_default` | `prompt`, `response` | `log_prob`, `reward`, `tokens` (int32) |
    | `prefer` | `prompt`, `response_a`, `response_b` | `probability_a`, `probability_b`, `llr` |
    | `generate` | `prompt` | `text` (string), `tokens` (int32), `finished` (bool) |

    With S = beta (log pi - log pi_ref) (or whatever score the model's loss compares):
    `reward` = S(response), `llr` = S(a) - S(b), `probability_a` = sigmoid(llr). Where there is no
    reference to compute from new texts (a policy alone, `reference="cached"` or `"none"` with a
    loss that needs one), `reward` and `prefer` are left out, and the report says so.

    The tokenizer is in the graph and gives the ids that `tokenize_pairs` gives in training. No
    XLA, no Python. The model is verified in a fresh process that has TensorFlow and
    tensorflow_text, but no Keras. It is written beside `path` and renamed at the end: a version
    that a server can see is whole.

    Args:
        model: a compiled `DPOModel` (of `dpo_keras` or of `dpo_keras.legacy`), or a policy alone:
            a KerasHub causal language model, or any Keras or tf-keras model from
            `{"token_ids", "padding_mask"}` to logits.
        path: `<anywhere>/<name>/<version>`, version a whole number; without a number at the end,
            the next free version in that directory.
        max_length: most tokens of prompt and response together; longer prompts are cut from the
            left. By default the preprocessor's `sequence_length`.
        max_new_tokens: longest text of `generate`, in tokens. By default 64, or half of
            `max_length` where that is less.
        signatures: which to write.
        temperature: of `generate`. 0 always takes the likeliest token; above 0 each request draws
            afresh.
        top_p: share of the probability that is sampled from, with a temperature.
        template: the chat template that the model was trained with, as in `tokenize_pairs`: the
            served prompt is then one user turn, the response one assistant turn.
        preprocessor: by default the policy's own.
        examples: `(prompt, response_a, response_b)` texts for verification and for the warm-up
            requests.
        verify: False skips the fresh process (the graph is inspected all the same).
        on_stage: called with a few words before each stage.

    Returns:
        What was written and how it compared.

    Raises:
        InputError: an argument out of range, a tokenizer or template that cannot be served, or a
            version that exists.
        RuntimeError: the exported model fails or answers otherwise than the model in Python.
        OSError: it could not be written; nothing is left at `path`.
    """
    began = time.monotonic()
    stage = on_stage or (lambda name: None)
    policy = getattr(model, "policy", model)
    preprocessor = preprocessor or getattr(policy, "preprocessor", None)
    max_length = max_length or getattr(preprocessor, "sequence_length", None) or 1024
    if max_new_tokens is None:
        max_new_tokens = max(1, min(64, max_length // 2))
    decoding = Decoding(max_new_tokens, temperature, top_p)
    problems = _problems(policy, preprocessor, max_length, decoding)
    settled: list[Any] = []
    for settle in (
        lambda: version_path(path),
        lambda: get_template(template),
        lambda: _signatures(model, signatures),
    ):
        try:
            settled.append(settle())
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    target, chat, (names, notes) = settled

    stage("tokenizer")
    encoder = GraphEncoder(preprocessor, max_length, chat)
    check_tokenization(encoder, preprocessor, chat)
    tokenizer = getattr(preprocessor, "tokenizer", None) or preprocessor
    special = tuple(getattr(tokenizer, "special_token_ids", None) or ())
    server = Server(model, encoder, decoding, special)

    stage("tracing")
    keeper, functions = trace(server, names)
    given = {"serving_default": functions[names[0]], **functions}
    with staged(target) as partial:
        stage("writing")
        tf.saved_model.save(keeper, str(partial), signatures=given)
        write_warmup_requests(partial, target.parent.name, calls(names, examples))
        _write_settings(partial, encoder, decoding, chat, names)
        check_graph(partial)
        verified: dict[str, Any] = {}
        if verify:
            stage("verifying")
            verified = _verify(partial, server, names, examples, preprocessor, chat)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    return ExportReport(
        path=target,
        signatures={
            name: {"inputs": list(INPUTS[name]), "outputs": sorted(f.structured_outputs)}
            for name, f in functions.items()
        },
        max_length=max_length,
        answers=verified.get("answers", {}),
        differences=verified.get("differences"),
        custom_operations=verified.get("custom_operations"),
        size_bytes=size,
        seconds=time.monotonic() - began,
        notes=tuple(notes),
    )


def _signatures(model: Any, names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    unknown = [name for name in names if name not in INPUTS]
    if unknown or not names:
        raise InputError(f"signatures must be some of {', '.join(INPUTS)}, got {list(names)!r}.")
    reason = missing_reference(model)
    kept = tuple(name for name in INPUTS if name in names and not (reason and name == "prefer"))
    notes = []
    if reason and set(names) & {"score", "prefer"}:
        notes.append(f"No `prefer` signature and no `reward` output: {reason}.")
    if not kept:
        raise InputError(f"signatures leave nothing to export: {reason}.")
    return kept, notes


def _problems(policy: Any, preprocessor: Any, max_length: int, decoding: Decoding) -> list[str]:
    problems = []
    if not _is_model(policy):
        problems.append(f"model must be a DPOModel or a keras.Model, got {type(policy).__name__}.")
    if preprocessor is None:
        problems.append(
            "preprocessor is needed, because strings are tokenized in the graph, and the policy "
            "has none attached."
        )
    limit = getattr(getattr(policy, "backbone", policy), "max_sequence_length", None)
    if max_length < 4 or (limit is not None and max_length > limit):
        most = "" if limit is None else f" and at most the model's {limit} positions"
        problems.append(f"max_length must be at least 4{most}, got {max_length}.")
    if decoding.max_new_tokens < 1:
        problems.append(f"max_new_tokens must be >= 1, got {decoding.max_new_tokens}.")
    elif decoding.max_new_tokens > max_length - 2:
        problems.append(
            f"max_new_tokens must leave room for a prompt of 2 tokens within max_length="
            f"{max_length}, got {decoding.max_new_tokens}."
        )
    if not 0 <= decoding.temperature < float("inf"):
        problems.append(f"temperature must be >= 0, got {decoding.temperature}.")
    if not 0 < decoding.top_p <= 1:
        problems.append(f"top_p must be in (0, 1], got {decoding.top_p}.")
    elif decoding.top_p < 1 and decoding.temperature == 0:
        problems.append(
            f"top_p={decoding.top_p} has no effect at temperature=0, which always takes the "
            "likeliest token; give a temperature, or leave top_p."
        )
    return problems


def _is_model(policy: Any) -> bool:
    # By the name of the package: tf-keras is imported by those who use it, never here.
    families = {kind.__module__.partition(".")[0] for kind in type(policy).__mro__}
    return isinstance(policy, keras.Model) or (callable(policy) and "tf_keras" in families)


def _verify(
    path: Path,
    server: Server,
    names: Sequence[str],
    examples: Examples,
    preprocessor: Any,
    template: ChatTemplate | None,
) -> dict[str, Any]:
    found = run_standalone(path, [*calls(names, examples), *calls(names, EMPTY)])
    answers = dict(zip(names, found["outputs"], strict=False))
    blank = dict(zip(names, found["outputs"][len(names) :], strict=True))
    comparison = Comparison(server, preprocessor, template)
    differences: dict[str, float] = {}
    for name in names:
        differences |= comparison.check(name, answers[name], examples)
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
    """What was fixed at export, for whoever runs the server."""
    settings = {
        "signatures": list(names),
        "max_length": encoder.max_length,
        "max_new_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
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
