"""What a run measures before and after training: held-out pairs, and responses to prompts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_keras.app.run_inputs import Pairs, choose_rows
from dpo_keras.app.training_stages import Context
from dpo_keras.preferences import judge
from dpo_keras.preferences.pair import plain_text

if TYPE_CHECKING:
    from dpo_keras.batching import TokenizedPairs
    from dpo_keras.evaluation import HeldOut, Samples
    from dpo_keras.preferences import PreferencePair
    from dpo_keras.training import DPOModel

# Data whose generator can say whether a response is good: path to judge of (prompt, response).
JUDGES: Mapping[str, Callable[[str, str], Any]] = {"builtin:support": judge}


def judge_of(paths: Sequence[str] | None) -> Callable[[str, str], Any] | None:
    """Finds who can judge responses to prompts of these data; None where nobody can.

    Args:
        paths: of the data.

    Example:
        >>> judge_of(["pairs.jsonl"]) is None
        True
    """
    names = set(paths or ())
    return JUDGES.get(names.pop()) if len(names) == 1 else None


@dataclass(frozen=True)
class Measured:
    """One measurement of a policy.

    Args:
        held_out: its figures on the held-out pairs.
        samples: its responses to held-out prompts; None where none were asked for.
    """

    held_out: HeldOut
    samples: Samples | None

    def as_dict(self) -> dict[str, Any]:
        """Returns metrics and figures with their intervals, without the pairs and responses."""
        plain = {name: figure.as_dict() for name, figure in self.held_out.figures.items()}
        content: dict[str, Any] = {"metrics": self.held_out.metrics, "figures": plain}
        if self.samples is not None:
            content["responses"] = {
                name: figure.as_dict() for name, figure in self.samples.figures.items()
            }
        return content


class Examiner:
    """Measures a model on the same held-out pairs and prompts whenever it is asked.

    Args:
        context: the run.
        model: a compiled `DPOModel`; measured as it is at each call.
        tokenized: the held-out pairs, or None.
        pairs: what they were made of.
    """

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
        self._questions: list[str] = []
        self._prompts: list[Any] = []
        self.chosen: list[PreferencePair] = []
        if tokenized is not None and pairs is not None:
            self._choose(tokenized, pairs)

    def _choose(self, tokenized: TokenizedPairs, pairs: Pairs) -> None:
        config = self.context.config
        rows = choose_rows(tokenized, pairs, config.evaluation.prompts, config.seed)
        sources = range(len(pairs)) if tokenized.source is None else tokenized.source
        self.chosen = [pairs[int(sources[row])] for row in rows]
        self._questions = [plain_text(pair.prompt) for pair in self.chosen]
        # Chat templates place special tokens that no text can stand for: ids are exact.
        self._prompts = (
            self._questions
            if config.data.template is None
            else [tokenized.prompt[row].tolist() for row in rows]
        )

    def measure(self, name: str) -> Measured | None:
        """Measures, or reads the measurement of this name that the run has already.

        Args:
            name: `before` or `after`: the folder of the run that keeps it.

        Returns:
            The measurement; None without held-out pairs, and on workers that write nothing.
        """
        from dpo_keras.evaluation import HeldOut, Samples, evaluate_preferences, sample_and_judge

        run, progress = self.context.run, self.context.progress
        if self.tokenized is None or not run.writes:
            return None
        folder = run.path / name
        if folder.is_dir():
            stored = folder / "responses.json"
            return Measured(
                HeldOut.load(folder / "pairs.npz"),
                Samples.load(stored) if stored.is_file() else None,
            )
        settings = self.context.config.evaluation
        progress.stage(f"Evaluation {name} preference training")
        held_out = evaluate_preferences(
            self.model,
            self.tokenized,
            batch_size=settings.batch_size,
            batching=self.context.layout.batching,
            on_batch=progress.advance,
        )
        accuracy = held_out.figures["reward_accuracy"]
        progress.note(f"{len(held_out):,} pairs: reward accuracy {accuracy}")
        samples = None
        if self._prompts:
            progress.stage(f"Responses {name} preference training")
            samples = sample_and_judge(
                self.model.policy,
                self._prompts,
                judge_of(self.context.config.data.path),
                questions=self._questions,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=self.context.config.seed,
                batch_size=settings.batch_size,
                max_length=self.context.config.data.max_length,
                on_batch=progress.advance,
            )
            good = samples.figures.get("preferred")
            judged = "" if good is None else f": {good} are good by the data's ground truth"
            progress.note(f"{len(samples):,} responses{judged}")
        measured = Measured(held_out, samples)
        self._keep(measured, name)
        return measured

    def _keep(self, measured: Measured, name: str) -> None:
        folder = self.context.run.path / name
        partial = folder.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        measured.held_out.save(partial / "pairs.npz")
        if measured.samples is not None:
            measured.samples.save(partial / "responses.json")
        os.replace(partial, folder)
