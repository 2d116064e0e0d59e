"""Judges: whoever, or whatever, says which of two responses is better.

A judge is an annotator of the store. Its verdicts are judgements like a person's, so that
agreement, position bias and length bias are measured alike.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.assignment import Presentation
from dpo_keras.feedback.comparisons import (
    Answers,
    Comparison,
    Judge,
    NoVerdict,
    Verdict,
    prompt_words,
)
from dpo_keras.feedback.database import sha256
from dpo_keras.feedback.endpoint_judge import EndpointJudge
from dpo_keras.feedback.function_judge import FunctionJudge
from dpo_keras.feedback.judgements import MAX_REASON
from dpo_keras.feedback.store import Store
from dpo_keras.utils import JSON
from dpo_keras.utils.text import shortened

__all__ = [
    "Answers", "Comparison", "Erring", "Judge", "JudgeSettings", "NoVerdict", "StoredAnswers",
    "Verdict", "ask_judge", "judge_of", "unjudged",
]  # fmt: skip

AT_ONCE = 64  # presentations that a judge holds


class Erring(Judge):
    """Another judge that is wrong about some pairs, to measure what errors do to training.

    Args:
        judge: whose verdicts are turned round.
        error_rate: share of the pairs, in [0, 1). A pair's hash decides, whichever order it has.
        seed: chooses other pairs.
    """

    def __init__(self, judge: Judge, error_rate: float, seed: int = 0):
        super().__init__(judge.name)
        if not 0 <= error_rate < 1:
            raise InputError(InputProblem("error_rate", "must be in [0, 1)", error_rate))
        self.inner, self.error_rate, self.seed = judge, error_rate, seed

    def judge(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict | NoVerdict]]:
        """Yield the verdicts of the other judge, some turned round."""
        for place, verdict in self.inner.judge(comparisons):
            if isinstance(verdict, Verdict) and self._errs(comparisons[place]):
                yield place, replace(verdict, preference=1 - verdict.preference)
            else:
                yield place, verdict

    def use_answers(self, answers: Answers) -> None:
        """Hand them to the other judge."""
        self.inner.use_answers(answers)

    def _errs(self, asked: Comparison) -> bool:
        pair = sorted([asked.first, asked.second])
        return int(sha256(repr((self.seed, asked.prompt, pair)))[:13], 16) < self.error_rate * 2**52


def ask_judge(
    store: Store,
    judge: Judge,
    limit: int | None = None,
    on_verdict: Callable[[int], object] | None = None,
    on_failure: Callable[[InputProblem], object] | None = None,
) -> int:
    """Let a judge judge each pair of a store that it has not judged; return how many it judged now.

    Each verdict is on the disk before it counts. A call after a crash goes on where the last one
    stopped. People's places (`Settings.overlap`) stay free. Pairs that people have judged come
    first, so that a few judgements show the agreement.

    Args:
        store: whose pairs are judged.
        judge: who judges.
        limit: the most pairs to ask about; None: all.
        on_verdict: called with the number judged so far.
        on_failure: called with each pair that the judge could not judge; None: they are raised
            together, after the others were judged. The next call asks about them again.

    Raises:
        InputError: the judge cannot go on, or could not judge some pairs. Its other judgements are
            in the store.

    Example:
        >>> import tempfile
        >>> from dpo_keras.feedback import Candidates, Response, open_store
        >>> from dpo_keras.feedback.function_judge import FunctionJudge
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = open_store(f"{folder.name}/feedback.sqlite", create=True)
        >>> _ = store.add([Candidates("2 + 2 =", (Response(" 4"), Response(" 5")))])
        >>> ask_judge(store, FunctionJudge(lambda prompt, response: response == " 4", "sums"))
        1
        >>> store.close(); folder.cleanup()
    """
    annotator = store.judge_annotator(judge.name)
    judge.use_answers(StoredAnswers(store))
    done = 0
    failed: dict[int, InputProblem] = {}  # by presentation
    while (room := AT_ONCE if limit is None else min(AT_ONCE, limit - done - len(failed))) > 0:
        held = store.next(annotator, room + len(failed))
        shown = [one for one in held if one.id not in failed][:room]
        if not shown:
            break
        before = done
        asked = [Comparison(s.prompt, s.left, s.right, s.images) for s in shown]
        for place, verdict in judge.judge(asked):
            if isinstance(verdict, NoVerdict):
                problem = _failure(shown[place], verdict)
                failed[shown[place].id] = problem
                if on_failure is not None:
                    on_failure(problem)
                continue
            _submit(store, annotator, shown[place], verdict)
            done += 1
            if on_verdict is not None:
                on_verdict(done)
        if done == before:
            break  # it fails on all of them
    if failed and (on_failure is None or not done):
        raise InputError(failed.values())
    return done


class StoredAnswers(Answers):
    """The answers of a store; each is on the disk before it is used."""

    def __init__(self, store: Store):
        self._store = store

    def answer(self, question: str) -> str | None:
        """Return a known answer, else None."""
        query = "SELECT content FROM answers WHERE hash = ?"
        rows = self._store.database.rows(query, (question,))
        return rows[0]["content"] if rows else None

    def keep_answer(self, question: str, content: str) -> None:
        """Keep an answer before it is used."""
        with self._store.database.writing() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)",
                (question, content, self._store.clock()),
            )


def unjudged(store: Store, name: str) -> int:
    """Count the pairs that a judge has not judged."""
    query = (
        "SELECT (SELECT count(*) FROM pairs) - (SELECT count(*) FROM presentations p "
        "JOIN annotators a ON a.id = p.annotator WHERE a.name = ? AND p.state = 'judged')"
    )
    return int(store.database.rows(query, (name,))[0][0])


class JudgeSettings(Protocol):
    """What `judge_of` reads, as the section `judge` of a configuration has it."""

    @property
    def type(self) -> str:
        """One of "function", "endpoint" and "people"."""

    @property
    def error_rate(self) -> float:
        """See `Erring`."""

    @property
    def error_seed(self) -> int:
        """See `Erring`."""

    def arguments(self) -> dict[str, JSON]:
        """Return the keyword arguments of the judge."""


_MAKERS: dict[str, Callable[..., Judge]] = {
    "function": FunctionJudge.named,
    "endpoint": EndpointJudge,
}


def judge_of(settings: JudgeSettings) -> Judge | None:
    """Make the judge that a configuration describes; None where people judge.

    Raises:
        InputError: such as an unknown function.
    """
    if settings.type == "people":
        return None
    judge = _MAKERS[settings.type](**settings.arguments())
    if not settings.error_rate:
        return judge
    return Erring(judge, settings.error_rate, settings.error_seed)


def _submit(store: Store, annotator: int, shown: Presentation, verdict: Verdict) -> None:
    preference = float(verdict.preference)
    reason = None
    if verdict.reason is not None:
        readable = verdict.reason.encode("utf-8", "replace").decode()  # no half of a character
        reason = shortened(readable, MAX_REASON)
    left = preference > 0.5
    store.submit(
        annotator,
        shown.id,
        "tie" if preference == 0.5 else "left" if left else "right",
        key=f"judge-{uuid.uuid4().hex}",
        reason=reason,
        preference=None if preference == 0.5 else max(preference, 1 - preference),
    )


def _failure(shown: Presentation, verdict: NoVerdict) -> InputProblem:
    rule = f": the responses to {prompt_words(shown.prompt)} were not compared"
    return InputProblem("judge", f"{rule}: {verdict.reason}")
