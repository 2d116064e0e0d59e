"""Evaluation of a run's policy: before and after training, and on any pairs later."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_keras.app.config_rules import build_loss
from dpo_keras.app.config_sections import REFERENCES
from dpo_keras.app.console import Progress, Silent
from dpo_keras.app.models import check_length, load_model, load_reference
from dpo_keras.app.run_directory import RunDirectory, open_run, versions, writable
from dpo_keras.app.run_inputs import (
    Pairs,
    check_kind,
    compared,
    count_trained_on,
    read_pairs,
    tokenize,
)
from dpo_keras.app.training_stages import Context, layout_of
from dpo_keras.preferences import judge
from dpo_keras.preferences.pair import plain_text
from dpo_keras.preferences.quickstart_thumbs import THUMBS
from dpo_keras.preferences.reader import BUILTIN
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import make_directory, replaced

if TYPE_CHECKING:
    import keras

    from dpo_keras.batching import TokenizedPairs
    from dpo_keras.batching.image_preprocessing import PairImages
    from dpo_keras.evaluation import HeldOut, Report, Samples
    from dpo_keras.preferences import Record
    from dpo_keras.training import DPOModel


@dataclass(frozen=True)
class Measured:
    """One measurement of a policy: figures on held-out pairs, and responses to their prompts."""

    held_out: HeldOut
    samples: Samples | None

    def as_dict(self) -> dict[str, JSON]:
        """Return metrics and figures with their intervals, without the pairs and responses."""
        found: dict[str, JSON] = {"metrics": self.held_out.metrics}
        found["figures"] = {name: f.as_dict() for name, f in self.held_out.figures.items()}
        if self.samples is not None:
            found["responses"] = {name: f.as_dict() for name, f in self.samples.figures.items()}
        return found


class Examiner:
    """Measures a model on the same held-out pairs, and prompts of them, whenever it is asked."""

    def __init__(
        self,
        context: Context,
        model: DPOModel,
        tokenized: TokenizedPairs | None,
        pairs: Pairs | None,
    ):
        self.context = context
        self.model = model
        self.tokenized = tokenized
        self.chosen: list[Record] = []
        self._prompts: list[JSON] = []
        self._images: PairImages | None = None
        writes_text = not context.config.trains_reward
        if tokenized is not None and pairs is not None and writes_text:
            config = context.config
            count, answerable = config.evaluation.prompts, self._answerable(tokenized)
            rows = choose_rows(tokenized, pairs, count, config.seed, answerable)
            sources = range(len(pairs)) if tokenized.source is None else tokenized.source
            self.chosen = [pairs[int(sources[row])] for row in rows]
            if any(pair.images for pair in self.chosen):
                assert tokenized.images is not None
                self._images = tokenized.images[np.array(rows)]
            # A chat template places special tokens that no text can stand for: ids are exact. So
            # do images.
            self._prompts = (
                [plain_text(pair.prompt) for pair in self.chosen]
                if config.data.template is None and self._images is None
                else [tokenized.prompt[row].tolist() for row in rows]
            )

    def _answerable(self, tokenized: TokenizedPairs) -> np.ndarray:
        """Mark the prompts that are answered whole, with their images."""
        answerable = np.ones(len(tokenized), bool)
        config = self.context.config
        if tokenized.images is not None and config.evaluation.prompts:
            from dpo_keras.training.decoding import generates_from_images

            sees = generates_from_images(self.model.policy)
            room = config.data.max_length - config.evaluation.max_new_tokens
            for row, images in enumerate(tokenized.images.rows.tolist()):
                if images:
                    answerable[row] = sees and len(tokenized.prompt[row]) <= room
            left_out = int((~answerable).sum())
            if left_out:
                why = f"longer than {room} tokens" if sees else "it generates from text only"
                note = f"prompts with images not answered in samples: {left_out:,} ({why})"
                self.context.progress.note(note)
        return answerable

    def measure(self, name: str) -> Measured | None:
        """Measure, or load what the folder `name` has; None without pairs, or on mere workers.

        Workers on JAX take part in the measurement.
        """
        from dpo_keras.evaluation import Samples, evaluate_preferences, load_held_out
        from dpo_keras.utils.backends import process_count

        run, progress = self.context.run, self.context.progress
        together = process_count() > 1  # processes that share a mesh compute together
        if self.tokenized is None or not (run.writes or together):
            return None
        folder = run.path / name
        known = folder.is_dir()
        if together and self.context.watchdog is not None:
            hint = "Put the run directory on storage that all of them share."
            known = self.context.watchdog.agree(f"measurement in {folder}", known, hint)
        if known:
            stored = folder / "responses.json"
            samples = Samples.load(stored) if stored.is_file() else None
            return Measured(load_held_out(folder / "pairs.npz"), samples)
        progress.stage(f"Evaluation {name} preference training")
        held_out = evaluate_preferences(
            self.model,
            self.tokenized,
            batch_size=self.context.config.evaluation.batch_size,
            batching=self.context.layout.batching,
            on_batch=progress.advance,
        )
        accuracy = held_out.figures["reward_accuracy"]
        progress.note(f"{len(held_out):,} {held_out.item}s: reward accuracy {accuracy}")
        samples = self._sample(name) if self._prompts else None
        if not run.writes:
            return None
        with replaced(folder) as partial:
            partial.mkdir()
            held_out.save(partial / "pairs.npz")
            if samples is not None:
                samples.save(partial / "responses.json")
        return Measured(held_out, samples)

    def _sample(self, name: str) -> Samples:
        from dpo_keras.evaluation import sample_and_judge

        config, progress = self.context.config, self.context.progress
        progress.stage(f"Responses {name} preference training")
        samples = sample_and_judge(
            self.model.policy,
            self._prompts,
            ground_truth_of(config.data.path),
            questions=[plain_text(pair.prompt) for pair in self.chosen],
            max_new_tokens=config.evaluation.max_new_tokens,
            temperature=config.evaluation.temperature,
            top_p=config.evaluation.top_p,
            seed=config.seed,
            batch_size=config.evaluation.batch_size,
            max_length=config.data.max_length,
            on_batch=progress.advance,
            images=self._images,
        )
        good = samples.figures.get("preferred")
        judged = "" if good is None else f": {good} are good by the data's ground truth"
        progress.note(f"{len(samples):,} responses{judged}")
        return samples


def choose_rows(
    tokenized: TokenizedPairs, pairs: Pairs, count: int, seed: int, answerable: np.ndarray
) -> list[int]:
    """Draw at most `count` answerable rows with different prompts, to sample responses to."""
    prompts = pairs.prompt_hashes
    if tokenized.source is not None:
        prompts = prompts[tokenized.source]
    _, first_rows = np.unique(prompts, return_index=True)
    distinct = [row for row in sorted(first_rows.tolist()) if answerable[row]]
    return sorted(random.Random(seed).sample(distinct, min(count, len(distinct))))


def ground_truth_of(paths: Sequence[str] | None) -> Callable[[str, str], object] | None:
    """Return what says whether a response is good; None for data of which nothing knows it."""
    names = set(paths or ())
    generated = all(name in BUILTIN or name.startswith(THUMBS) for name in names)
    return judge if len(names) == 1 and generated else None


def report_training(
    context: Context,
    held_out: Pairs | None,
    before: Measured,
    after: Measured,
    outcome: Mapping[str, str],
) -> dict[str, JSON]:
    """Write the report of a training into the run, and return what a `RunResult` holds of it.

    `outcome` compares the run's time and memory with what it predicted of itself.
    """
    from dpo_keras.evaluation import side_by_side, write_report

    run, config = context.run, context.config
    context.progress.stage("Report")
    samples: list[dict[str, JSON]] = []
    if after.samples is not None:
        samples = side_by_side(before.samples, after.samples, len(after.samples))
        run.write("samples.jsonl", samples)
    report = write_report(
        run.path,
        after.held_out,
        before=before.held_out,
        samples_before=before.samples,
        samples_after=after.samples,
        metrics_jsonl=run.path / "metrics.jsonl",
        config_text=config.resolved(),
        pairs=held_out,
        title=config.name,
        details={**outcome, "data": ", ".join(config.data.path or ()), **versions()},
        samples_shown=config.evaluation.samples_shown,
    )
    for notice in report.notices:
        context.progress.note(notice)
    return {
        "before": before.as_dict(),
        "after": after.as_dict(),
        "samples": samples[: config.evaluation.samples_shown],
        **_said(report),
    }


def _said(report: Report) -> dict[str, JSON]:
    return {
        "report": {kind: str(path) for kind, path in report.paths.items()},
        "findings": [f"{finding.severity}: {finding.text}" for finding in report.findings],
    }


def load_trained(run: RunDirectory, policy: keras.Model | None = None) -> DPOModel:
    """Load a run's model, compiled: its policy with the reference, or its reward model."""
    from dpo_keras.training import DPOModel, RewardModel

    config = run.config()
    loss = build_loss(config.loss)
    if policy is None:
        policy = load_model(str(run.policy), config.model.dtype)
    if config.trains_reward:
        reward_model = RewardModel(policy)
        reward_model.load_head(run.reward_head)
        reward_model.compile(loss=loss)
        return reward_model
    reference: keras.Model | str = "none"
    if loss.needs_reference:
        path = config.reference
        if path in REFERENCES:
            path = str(run.reference) if run.reference.is_dir() else str(config.model.path)
        reference = load_reference(path, policy, config.model.dtype)
    model = DPOModel(policy, reference=reference)
    model.compile(loss=loss)
    return model


def evaluate(
    run: str | Path,
    file: str | Path,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, JSON]:
    """Measure a run's policy on preference pairs (as `data.path`), and write a report into the run.

    Return `{"run", "file", "pairs", "dropped", "trained_on", "metrics", "figures", "report",
    "findings"}`; `trained_on` counts the pairs whose prompts the run trained on.
    """
    from dpo_keras.evaluation import evaluate_preferences, write_report

    progress = progress or Silent()
    directory = open_run(run)
    config = directory.config()
    name = Path(str(file).removeprefix("builtin:")).name.split(".")[0]
    folder = directory.path / "evaluations" / name
    progress.stage("Data")
    any_format = config.data.model_copy(update={"format": "auto"})
    pairs = read_pairs([str(file)], any_format, progress, limit)
    check_kind(config, pairs)
    pairs = compared(pairs, config, measured=True)
    trained_on = count_trained_on(directory, pairs)
    with writable("run", folder):
        make_directory(folder)
    progress.stage("Policy and reference")
    model = load_trained(directory)
    check_length(model.policy, config.data.max_length)
    tokenized = tokenize(config.data, pairs, model.policy, "evaluation", progress, directory)
    progress.stage("Evaluation")
    reference = getattr(model.reference, "model", "none")
    images = tokenized.images is not None
    layout = layout_of(config, model.policy, reference, progress, images=images)
    held_out = evaluate_preferences(
        model,
        tokenized,
        batch_size=config.evaluation.batch_size,
        batching=layout.batching,
        on_batch=progress.advance,
    )
    report = write_report(
        folder,
        held_out,
        config_text=config.resolved(),
        pairs=pairs,
        title=f"{config.name} on {name}",
        details={"run": str(directory.path), "data": str(file), **versions()},
        trained_on=trained_on,
    )
    return {
        "run": str(directory.path),
        "file": str(file),
        "pairs": len(tokenized),
        "dropped": pairs.report.dropped + tokenized.report.pairs - tokenized.report.kept,
        "trained_on": trained_on,
        **Measured(held_out, None).as_dict(),
        **_said(report),
    }
