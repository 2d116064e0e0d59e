"""What a selection of pairs goes by, from runs: P(first is better), and embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_keras.app.console import Progress, Silent
from dpo_keras.app.run_directory import open_run
from dpo_keras.app.run_evaluation import load_trained
from dpo_keras.app.run_inputs import tokenize
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.selection import Pool, models_needed
from dpo_keras.preferences import Message, PreferencePair, Preferences

if TYPE_CHECKING:
    from dpo_keras.feedback import Candidates, Imported, Store

_EQUAL = 1e-6  # nats: margins of a policy that equals its reference


def check_selection(selection: str, policies: Sequence[str | Path]) -> None:
    """Check a selection: its name, the number of its policies, and that they are finished runs."""
    least = models_needed(selection)
    if len(policies) < least:
        rule = f"must name at least {least} for selection {selection!r}"
        raise InputError(InputProblem("policy", rule, len(policies), "Give --policy RUN."))
    if policies and not least:
        rule = "has no effect on selection 'random'"
        raise InputError(InputProblem("policy", rule, hint="Leave one of the two out."))
    for policy in policies:
        open_run(policy)


def add_most_useful(
    store: Store,
    path: Path,
    candidates: Sequence[Candidates],
    selection: str,
    policies: Sequence[Path],
    count: int | None,
    *,
    progress: Progress | None = None,
) -> Imported:
    """Add the most useful pairs of a candidates file to a store, best first, as `add_selected`.

    The same file, selection, count and policies add nothing a second time.
    """
    from dpo_keras.feedback.candidate_selection import add_selected

    check_selection(selection, policies)
    digest = hashlib.sha256(f"{selection} {count}".encode())
    for file in (path, *(policy / "result.json" for policy in policies)):
        digest.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return add_selected(
        store,
        candidates,
        selection,
        count,
        lambda pairs: pool_of(pairs, selection, policies, progress),
        key=digest.hexdigest(),
    )


def pool_of(
    pairs: Sequence[Candidates],
    selection: str,
    policies: Sequence[str | Path],
    progress: Progress | None = None,
) -> tuple[Pool, list[int]]:
    """Compute what a selection goes by under the policies of runs.

        P(first) = sigmoid(S(first) - S(second)),   S the score of the run's loss:
                   beta (log pi - log pi_ref) for DPO

    Where a policy equals its reference every P would be 1/2; then S = log pi / tokens.
    `uncertain` goes by the mean P of all policies, `disagreement` by each P, `diverse` by the
    difference of the responses' embeddings under the first policy.

    Args:
        pairs: candidates of two responses each.
        selection: as `select_pairs` takes.
        policies: directories of runs.
        progress: listens.

    Returns:
        The pool of the pairs that every policy can read, and their places.

    Raises:
        InputError: too few policies, or no run with a policy.
    """
    check_selection(selection, policies)
    progress = progress or Silent()
    given = Preferences(tuple(map(_as_pair, pairs)))
    used = policies[:1] if selection == "diverse" else policies
    columns, readable = [], np.ones(len(pairs), bool)
    for policy in used if pairs else []:
        progress.stage(f"Policy {policy}")
        values, places = _column(given, policy, selection == "diverse", progress)
        whole = np.zeros((len(pairs), *values.shape[1:]), np.float32)
        whole[places] = values
        columns.append(whole)
        readable &= np.isin(np.arange(len(pairs)), places)
    kept = np.flatnonzero(readable)
    if not columns:
        return Pool(), []
    if selection == "diverse":
        return Pool(embeddings=columns[0][kept]), kept.tolist()
    committee = np.stack(columns)[:, kept]
    return Pool(probabilities=committee.mean(axis=0), committee=committee), kept.tolist()


def _column(
    pairs: Preferences, policy: str | Path, embedded: bool, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Return P, or the difference of embeddings, of the pairs that a policy can read."""
    from dpo_keras.evaluation import evaluate_preferences
    from dpo_keras.scoring.response_embeddings import response_embeddings

    run = open_run(policy)
    config = run.config()
    model = load_trained(run)
    tokenized = tokenize(config.data, pairs, model.policy, "candidate", progress, run)
    places = np.arange(len(pairs)) if tokenized.source is None else tokenized.source
    if not len(tokenized):
        return np.zeros(0, np.float32), places[:0]
    size = config.evaluation.batch_size
    if embedded:
        states = response_embeddings(
            model.policy, tokenized, batch_size=size, on_batch=progress.advance
        )
        return states[:, 0] - states[:, 1], places
    found = evaluate_preferences(model, tokenized, batch_size=size, on_batch=progress.advance)
    margins = np.asarray(found.reward_margin, np.float64)
    if np.abs(margins).max() < _EQUAL:
        progress.note("The policy equals its reference: P goes by log-probs per token.")
        known = found.pairs
        per_token = known["chosen_logps"] / np.maximum(known["chosen_tokens"], 1)
        margins = per_token - known["rejected_logps"] / np.maximum(known["rejected_tokens"], 1)
    return (0.5 * (1 + np.tanh(margins / 2))).astype(np.float32), places  # sigmoid, no overflow


def _as_pair(candidates: Candidates) -> PreferencePair:
    """Return a pair of two responses as training reads it; which is chosen does not matter."""
    first, second = (response.text for response in candidates.responses)
    if isinstance(candidates.prompt, str):
        return PreferencePair(candidates.prompt, first, second, images=candidates.images)
    answers = (Message("assistant", first),), (Message("assistant", second),)
    return PreferencePair(candidates.prompt, *answers, images=candidates.images)
