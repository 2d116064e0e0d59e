"""What is done with a run that has trained a policy: evaluate it, export it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_keras.app.config_rules import build_loss
from dpo_keras.app.config_sections import REFERENCES, Export
from dpo_keras.app.models import check_length, load_model, load_reference
from dpo_keras.app.progress import Progress, Silent
from dpo_keras.app.run_directory import RunDirectory, open_run, versions
from dpo_keras.app.run_inputs import read_pairs, tokenize
from dpo_keras.app.run_measurements import Measured
from dpo_keras.app.training_stages import layout_of

if TYPE_CHECKING:
    from dpo_keras.app.config import Config
    from dpo_keras.preferences import PreferencePair
    from dpo_keras.training import DPOModel


def load_trained(run: RunDirectory, policy: Any = None) -> DPOModel:
    """Loads a run's trained policy with the reference that it was trained against.

    Args:
        run: a run that has trained a policy.
        policy: the policy, where it is in memory already.

    Returns:
        A compiled model; its reference is the model that training started from, or the one that
        the configuration names.

    Raises:
        InputError: if a model is not there any more.
    """
    from dpo_keras.training import DPOModel

    config = run.config()
    loss = build_loss(config.loss)
    if policy is None:
        policy = load_model(str(run.policy), config.model.dtype)
    reference: Any = "none"
    if loss.needs_reference:
        reference = load_reference(_reference_path(run, config), policy, config.model.dtype)
    model = DPOModel(policy, reference=reference)
    model.compile(loss=loss)
    return model


def _reference_path(run: RunDirectory, config: Config) -> str:
    if config.reference not in REFERENCES:
        return config.reference
    return str(run.reference) if run.reference.is_dir() else str(config.model.path)


def evaluate(
    run: str | Path,
    file: str | Path,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a run's policy on preference pairs, and writes a report into the run.

    Args:
        run: the run's directory.
        file: the pairs, as `data.path` takes them.
        limit: read this many pairs at most.
        progress: hears what happens; None: nobody.

    Returns:
        `{"run", "file", "pairs", "dropped", "metrics", "figures", "report", "findings"}`.

    Raises:
        InputError: if this is no run with a policy, or the pairs can not be read.
    """
    from dpo_keras.evaluation import evaluate_preferences, write_report

    progress = progress or Silent()
    directory = open_run(run)
    config = directory.config()
    progress.stage("Data")
    pairs = read_pairs(
        [str(file)], config.data.model_copy(update={"format": "auto"}), progress, limit
    )
    progress.stage("Policy and reference")
    model = load_trained(directory)
    check_length(model.policy, config.data.max_length)
    tokenized = tokenize(config, pairs, model.policy, "evaluation", progress, directory)
    progress.stage("Evaluation")
    other = getattr(model.reference, "model", "none")
    held_out = evaluate_preferences(
        model,
        tokenized,
        batch_size=config.evaluation.batch_size,
        batching=layout_of(config, model.policy, other, progress).batching,
        on_batch=progress.advance,
    )
    name = Path(str(file).removeprefix("builtin:")).name.split(".")[0]
    report = write_report(
        directory.path / "evaluations" / name,
        held_out,
        config_text=config.resolved(),
        pairs=pairs,
        title=f"{config.name} on {name}",
        details={"run": str(directory.path), "data": str(file), **versions()},
    )
    return {
        "run": str(directory.path),
        "file": str(file),
        "pairs": len(tokenized),
        "dropped": pairs.report.dropped + tokenized.report.pairs - tokenized.report.kept,
        **Measured(held_out, None).as_dict(),
        "report": {kind: str(path) for kind, path in report.paths.items()},
        "findings": [f"{finding.severity}: {finding.text}" for finding in report.findings],
    }


def export_run(
    run: str | Path,
    path: str | Path,
    *,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a run's policy as a SavedModel, verified by loading it without Keras.

    Args:
        run: the run's directory.
        path: `<name>/<version>`, or `<name>` for its next version.
        max_new_tokens: the longest answer of the `generate` signature; None: as configured.
        progress: hears what happens; None: nobody.

    Returns:
        What was written, how it compared, and what it answered.

    Raises:
        InputError: if this is no run with a policy, or the version exists.
        RuntimeError: if the exported model does not answer as the model in Python does.
    """
    directory = open_run(run)
    config = directory.config()
    settings = (config.export or Export()).model_copy(update={"path": str(path)})
    if max_new_tokens is not None:
        settings = settings.model_copy(update={"max_new_tokens": max_new_tokens})
    progress = progress or Silent()
    progress.stage("Policy and reference")
    return _export(config, settings, load_trained(directory), (), progress)


def export_trained(
    run: RunDirectory, model: DPOModel, pairs: Sequence[PreferencePair], progress: Progress
) -> dict[str, Any]:
    """Exports the model that a run has just trained, as its configuration says.

    Args:
        run: the run; its policy is saved.
        model: the trained model.
        pairs: held-out pairs, of which the exported model answers one.
        progress: hears what happens.

    Returns:
        As `export_run`.
    """
    config = run.config()
    assert config.export is not None
    if model.reference.mode == "cached":
        # The served model meets new texts, for which nothing is cached.
        model = load_trained(run, model.policy)
    path = config.export.path or f"saved_models/{config.name}"
    settings = config.export.model_copy(update={"path": path})
    return _export(config, settings, model, pairs, progress)


def _export(
    config: Config,
    settings: Export,
    model: DPOModel,
    pairs: Sequence[PreferencePair],
    progress: Progress,
) -> dict[str, Any]:
    from dpo_keras.serving import export

    progress.stage("Export")
    report = export(
        model,
        str(settings.path),
        max_length=config.data.max_length,
        max_new_tokens=settings.max_new_tokens,
        signatures=settings.signatures,
        temperature=settings.temperature,
        top_p=settings.top_p,
        template=config.data.template,
        on_stage=progress.note,
    )
    progress.note(report.summary())
    progress.stage("One request to the exported model")
    answer = _ask(report.path, list(report.signatures), pairs)
    return {**report.as_dict(), "answer": answer}


def _ask(path: Path, signatures: Sequence[str], pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """Puts one request to each signature, in a process without Keras."""
    from dpo_keras.serving import EXAMPLES, run_standalone
    from dpo_keras.serving.verification import calls

    texts = [
        (pair.prompt, pair.chosen, pair.rejected)
        for pair in pairs
        if isinstance(pair.prompt, str)
        and isinstance(pair.chosen, str)
        and isinstance(pair.rejected, str)
    ]
    requests = calls(signatures, texts[:1] or EXAMPLES[:1])
    outputs = run_standalone(path, requests)["outputs"]
    return {
        name: {
            "request": {key: value[0] for key, value in inputs.items()},
            "response": {key: value[0] for key, value in found.items()},
        }
        for (name, inputs), found in zip(requests, outputs, strict=True)
    }
