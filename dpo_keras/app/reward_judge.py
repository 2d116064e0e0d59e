"""A judge that is a reward model: the run of a configuration with `loss.type: reward`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dpo_keras.app.run_directory import open_run
from dpo_keras.app.run_evaluation import load_trained
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback import judges
from dpo_keras.feedback.judges import Comparison, Judge, Verdict
from dpo_keras.utils import JSON


class RewardJudge(Judge):
    """Prefer by the Bradley-Terry model: P(first is better) = sigmoid(r(first) - r(second)).

    Args:
        path: the directory of a run that has trained a reward model.
        name: of the annotator; None: the run's.

    Raises:
        InputError: no such run, or it has trained a policy.
    """

    def __init__(self, path: str | Path, name: str | None = None):
        directory = open_run(path)
        self.config = directory.config()
        if not self.config.trains_reward:
            rule = f"must be a run of a reward model (loss.type: reward); {path} trained a policy"
            raise InputError(InputProblem("judge.path", rule))
        super().__init__(name or self.config.name)
        self.model = load_trained(directory)

    def judge(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """Yield the verdict on every comparison.

        Raises:
            InputError: naming the comparisons that have no tokens to score.
        """
        from dpo_keras.batching import tokenize_pairs
        from dpo_keras.scoring import score_pairs

        data = self.config.data
        tokenized = tokenize_pairs(
            [_record(one) for one in comparisons],
            self.model.policy.preprocessor,
            max_length=data.max_length,
            template=data.template,
        )
        rewards = score_pairs(
            self.model.policy,
            tokenized,
            batch_size=self.config.evaluation.batch_size,
            scorer=self.model.scorer,
        ).astype(np.float64)
        preferences = 1.0 / (1.0 + np.exp(rewards[:, 1] - rewards[:, 0]))
        places = range(len(comparisons)) if tokenized.source is None else tokenized.source
        yield from ((int(n), Verdict(float(p))) for n, p in zip(places, preferences, strict=True))
        if tokenized.report.dropped:
            raise InputError([f"judge: {dropped}." for dropped in tokenized.report.dropped])


def judge_of(settings: judges.JudgeSettings) -> Judge | None:
    """Make the judge that a configuration describes; None where people judge."""
    return judges.judge_of(settings, reward=RewardJudge)


def _record(comparison: Comparison) -> dict[str, JSON]:
    sides: dict[str, JSON] = {"chosen": comparison.first, "rejected": comparison.second}
    if not isinstance(comparison.prompt, str):
        sides = {k: [{"role": "assistant", "content": text}] for k, text in sides.items()}
    return {"prompt": comparison.prompt, **sides}
