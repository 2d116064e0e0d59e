"""Candidates, a clock, and the bookkeeping that must hold after anything: shared by the tests."""

import sqlite3
from collections import Counter
from pathlib import Path

from dpo_keras.feedback import Candidates, Response


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


def candidates(count, **options):
    return [
        Candidates(
            f"Question {number}?",
            (Response(f"one {number}", "a"), Response(f"two {number}", "b")),
            id=f"q{number}",
            **options,
        )
        for number in range(count)
    ]


def store_of_version_1(path):
    """Write a store of an earlier release; two people have judged two pairs."""
    with sqlite3.connect(path) as connection:
        dump = Path(__file__).with_name("store_of_version_1.sql").read_text(encoding="utf-8")
        connection.executescript(dump)
        connection.execute("PRAGMA user_version = 1")
        connection.execute("PRAGMA application_id = 1146113862")
    connection.close()
    return path


def judge_all(store, annotator, choose, count=1, limit=10_000):
    """One person's whole work: `choose(presentation)` gives the choice."""
    done = 0
    for turn in range(limit):
        shown = store.next(annotator, count)
        if not shown:
            break
        store.submit(
            annotator, shown[0].id, choose(shown[0]), key=f"{annotator}-{turn}-{shown[0].id}"
        )
        done += 1
    return done


def prefers(word):
    """Chooses the response that begins with a word, whichever side it is on."""
    return lambda shown: "left" if shown.left.startswith(word) else "right"


def check_books(store):
    """What holds at any time, whatever was done, by whomever, and however it ended."""
    rows = store.database.rows
    integrity = rows("PRAGMA integrity_check")[0][0]
    assert integrity == "ok", integrity
    assert rows("PRAGMA foreign_key_check") == []
    used = Counter()
    for row in rows(
        "SELECT pair FROM presentations p JOIN annotators a ON a.id = p.annotator "
        "WHERE state IN ('leased', 'judged') AND repeat = 0 AND NOT judge"
    ):
        used[row["pair"]] += 1
    for row in rows("SELECT id, taken, gold FROM pairs"):
        assert row["taken"] == used[row["id"]], f"pair {row['id']}"
        if row["gold"] is None:
            assert row["taken"] <= store.settings.overlap
    last = {}
    for row in rows("SELECT presentation, verdict FROM judgements ORDER BY id"):
        last[row["presentation"]] = row["verdict"]
    for row in rows("SELECT id, state FROM presentations"):
        verdict = last.get(row["id"])
        if row["state"] == "judged":
            assert verdict in ("prefer", "tie", "both_bad")
        elif row["state"] == "skipped":
            assert verdict == "skip"
        else:
            assert verdict in (None, "undo")
    current = {row["presentation"] for row in rows("SELECT presentation FROM current")}
    assert current == {p for p, verdict in last.items() if verdict != "undo"}


def count(store):
    """How many judgements there are."""
    return store.database.rows("SELECT count(*) FROM judgements")[0][0]
