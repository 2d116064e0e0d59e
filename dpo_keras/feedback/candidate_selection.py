"""Of many candidates, the pairs that go to a store: those from which a judgement teaches most."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.candidates import Candidates, Imported, add_candidates, prompt_content
from dpo_keras.feedback.database import sha256
from dpo_keras.feedback.selection import Pool, select_pairs
from dpo_keras.feedback.store import Store

Pools = Callable[[Sequence[Candidates]], tuple[Pool, Sequence[int]]]
"""From pairs to what is known of some of them, and the places of these."""


def single_pairs(candidates: Iterable[Candidates]) -> tuple[list[Candidates], list[Candidates]]:
    """Split candidates into pairs, each of them candidates with two responses.

    Returns:
        Pairs to choose from, and hidden checks (`gold`), among which there is no choice.

    Example:
        >>> from dpo_keras.feedback import Response
        >>> texts = tuple(map(Response, "abc"))
        >>> pairs, checks = single_pairs([Candidates("Hi", texts, gold=2)])
        >>> [[response.text for response in pair.responses] for pair in pairs]
        [['a', 'b']]
        >>> [pair.gold for pair in checks]
        [1, 1]
    """
    pairs: list[Candidates] = []
    checks: list[Candidates] = []
    for one in candidates:
        better = None if one.gold is None else one.responses[one.gold].text.strip()
        for pair in one.pairs():
            texts = [response.text.strip() for response in pair]
            gold = texts.index(better) if better in texts else None
            made = Candidates(one.prompt, pair, one.id, one.group, gold, one.images)
            (pairs if gold is None else checks).append(made)
    return pairs, checks


def add_selected(
    store: Store,
    candidates: Sequence[Candidates],
    selection: str,
    count: int | None,
    pools: Pools,
    *,
    seed: int = 0,
    key: str = "",
) -> Imported:
    """Add the most useful pairs that the store does not have yet, to be shown best first.

    They come before the pairs that were there. All hidden checks are added.

    Args:
        store: the store.
        candidates: what to choose from.
        selection: as `select_pairs` takes.
        count: pairs to add; None: all of them.
        pools: finds what the selection goes by, for the pairs that are new.
        seed: as `select_pairs` takes.
        key: names this selection. A second call with the same key adds nothing and calls no
            `pools`, so that a server that starts again goes on with the pairs that it had.

    Returns:
        What was added.
    """
    done = _done(store)
    if key and key in done:
        return Imported()
    pairs, checks = single_pairs(candidates)
    known = _known(store)
    new = [pair for pair in pairs if _identity(pair) not in known]
    pool, places = (Pool(), range(len(new))) if selection == "random" else pools(new)
    if len(pairs) and not len(places):
        rule = "hold no pair that is new to the store and that the policy can read."
        raise InputError(
            InputProblem("candidates", rule, hint="Give others, or a smaller --count.")
        )
    wanted = len(places) if count is None else count
    chosen = [new[places[row]] for row in select_pairs(selection, wanted, pool, len(places), seed)]
    with store.database.writing() as connection:
        row = connection.execute("SELECT min(shuffle) FROM pairs WHERE gold IS NULL").fetchone()
        first = (0.0 if row[0] is None else row[0]) - len(chosen)
        ordered = add_candidates(connection, itertools.count(first).__next__, chosen)
        others = add_candidates(connection, store.chance.random, checks)
        if key:
            text = json.dumps([*done, key])
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('selections', ?)", (text,))
    counts = sum((one.left_out() for one in candidates), Counter[str]())
    before = len(pairs) - len(new) + others.known
    return Imported(ordered.pairs + others.pairs, before, others.gold, **counts)


def _done(store: Store) -> list[str]:
    rows = store.database.rows("SELECT value FROM meta WHERE key = 'selections'")
    return json.loads(rows[0]["value"]) if rows else []


def _identity(pair: Candidates) -> tuple[str, frozenset[str]]:
    texts = frozenset(sha256(response.text) for response in pair.responses)
    return sha256(prompt_content(pair)), texts


def _known(store: Store) -> set[tuple[str, frozenset[str]]]:
    """Return the pairs of a store by the hashes of their texts."""
    rows = store.database.rows(
        "SELECT q.hash AS prompt, a.hash AS first, b.hash AS second FROM pairs p "
        "JOIN prompts q ON q.id = p.prompt JOIN responses a ON a.id = p.first "
        "JOIN responses b ON b.id = p.second"
    )
    return {(row["prompt"], frozenset((row["first"], row["second"]))) for row in rows}
