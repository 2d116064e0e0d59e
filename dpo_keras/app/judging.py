"""Judges on the stores of feedback: what `dpo-keras feedback judge` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from dpo_keras.app.config import config_document, explained, placed
from dpo_keras.app.config_dependencies import unread_options
from dpo_keras.app.config_judge import JudgeSettings
from dpo_keras.app.config_rules import keys_for_arguments
from dpo_keras.app.console import Progress, Silent
from dpo_keras.app.yaml_document import read_document
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback import open_store
from dpo_keras.feedback.judges import ask_judge, judge_of, unjudged
from dpo_keras.utils import JSON


def judge_store(
    store: str | Path,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, JSON]:
    """Let the judge of a configuration judge the pairs of a store that it has not judged.

    Args:
        store: the SQLite file of a round.
        config: a YAML file with a section `judge`; what else it holds is not read.
        overrides: such as `judge.function=module:function`.
        limit: the most pairs to ask about.
        progress: progress listener. None disables reporting.

    Returns:
        `judge` (its name), `judged` (pairs), and `failed` (messages on pairs that it could not
        judge, which the next call asks about again).

    Raises:
        InputError: the configuration is wrong, or the judge cannot go on. Its judgements so far are
            in the store.
    """
    progress = progress or Silent()
    settings = judge_settings(config, overrides)
    if limit is not None and limit < 1:
        raise InputError(InputProblem("limit", "must be >= 1", limit))
    with keys_for_arguments(section="judge"):
        judge = judge_of(settings)
    if judge is None:
        hint = "`dpo-keras annotate` serves people their page."
        raise InputError(InputProblem("judge.type", "must not be people", hint=hint))
    round = open_store(store)
    failed: list[InputProblem] = []
    try:
        total = unjudged(round, judge.name)
        total = total if limit is None else min(total, limit)
        progress.stage(f"Judgements of {judge.name}")
        judged = ask_judge(
            round, judge, limit, lambda done: progress.advance(done, total), failed.append
        )
    finally:
        round.close()
    return {"judge": judge.name, "judged": judged, "failed": list(map(str, failed))}


def judge_settings(
    config: str | Path | None = None, overrides: Sequence[str] = ()
) -> JudgeSettings:
    """Read the section `judge` of a configuration file with overrides, and no other section."""
    document = read_document("{}", "") if config is None else config_document(config)
    for override in overrides:
        document.override(override)
    found = list(document.problems)
    try:
        settings = JudgeSettings.model_validate(document.tree.get("judge") or {})
        found += placed(list(unread_options({"judge": settings})), document)
    except ValidationError as error:
        problems = [problem.renamed(f"judge.{problem.argument}") for problem in explained(error)]
        found += placed(problems, document)
    if found:
        raise InputError(found)
    return settings
