"""Two versions of a policy by people's choices: a test that may be looked at after each of them."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.judgements import FIRST, SECOND, Table, read_table
from dpo_keras.feedback.sequential_test import SequentialTest
from dpo_keras.feedback.store import Store, open_store
from dpo_keras.preferences.feedback_log import LogRecord, read_log_record
from dpo_keras.utils import JSON
from dpo_keras.utils.text import did_you_mean, shortened

_Key: TypeAlias = tuple[int, tuple[str, str]]  # a prompt, and the two versions compared on it

_TIE = "tie"
_SQLITE = b"SQLite format 3\0"
_LISTED = 20  # labels, and bad lines, that a message names


class Choice(NamedTuple):
    """What people said of a response of one version against one of another version."""

    versions: tuple[str, str]
    share: float  # of the votes, for the first of the two; a tie is half a vote


@dataclass
class Choices:
    """Choices in the order of time, and what could not become one."""

    choices: list[Choice] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # by reason

    def labels(self) -> list[str]:
        """Return the versions, sorted."""
        return sorted({label for choice in self.choices for label in choice.versions})


@dataclass(frozen=True)
class VersionComparison:
    """How often people choose one version rather than another, and whether that is decided."""

    version: str
    against: str
    count: int  # choices; each is independent of the others as far as the source tells
    wins: int  # for `version`
    ties: int
    losses: int
    share: float | None  # of wins, a tie being half of one; None without choices
    interval: tuple[float, float]  # of the chance to win, valid at all looks at once
    p_value: float  # anytime-valid
    log_e_value: float  # at this moment
    alpha: float  # chance of a false verdict, over all looks
    better: str | None  # None: not decided yet
    decided_after: int | None  # choices
    looks: tuple[int, ...] = field(repr=False)  # choices at which a plot shows
    intervals: tuple[tuple[float, float, float], ...] = field(repr=False)  # share, low, high

    @property
    def verdict(self) -> str:
        """Who is better, in words."""
        if self.better is None:
            return "not decided yet"
        return f"{self.better} is better, decided after {self.decided_after:,} choices"

    def as_dict(self) -> dict[str, JSON]:
        """Return every field but those of the plot, and the verdict, as JSON values."""
        names = [name for name in self.__dataclass_fields__ if name not in ("looks", "intervals")]
        found = {name: getattr(self, name) for name in names}
        return {**found, "interval": list(self.interval), "verdict": self.verdict}


def read_choices(path: str | os.PathLike[str], annotators: Sequence[str] = ()) -> Choices:
    """Read choices from a feedback store, or from a served policy's log (JSONL).

    Of a store, a prompt is one choice, since its judgements are not independent of each other: the
    mean vote of its pairs with two different makers. It counts once each of these pairs has all
    judgements (`overlap`), in the order of the log. Hidden checks and repeats do not count. `both
    bad` is a tie.

    Of a log, a request is one choice. The chosen response wins over those of other versions. Where
    nobody chose, a thumb up wins over a thumb down, and two equal ones tie. Of several lines with
    one `id` the first that has a choice counts.

    Args:
        path: the file.
        annotators: of a store, whose judgements count; by default everybody's.

    Raises:
        InputError: the file is neither, or lines of it break a rule; or an unknown annotator.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_store = file.read(len(_SQLITE)) == _SQLITE
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    if is_store:
        store = open_store(path)
        try:
            return choices_of_store(store, annotators)
        finally:
            store.close()
    if annotators:
        raise InputError(InputProblem("annotators", f"go with a store, and {path} is a log."))
    return choices_of_log(_log_records(path))


def choices_of_store(store: Store, annotators: Sequence[str] = ()) -> Choices:
    """Return a store's choices; see `read_choices`."""
    table = read_table(store.database)
    for name in annotators:
        if name not in table.annotators:
            rule = f"must name annotators of the store ({', '.join(table.annotators)})"
            hint = did_you_mean(name, table.annotators)
            raise InputError(InputProblem("annotators", rule, name, hint))
    needed = store.settings.overlap
    if annotators:
        needed = min(needed, len(set(annotators)))
        table = table.keep(np.isin(table.annotator, list(map(table.annotators.index, annotators))))
    table = table.work()
    asked, alike = _pairs_of_versions(store, table)
    # The pairs of a prompt by their two versions: all must be judged before the prompt counts.
    waiting: dict[_Key, set[int]] = defaultdict(set)
    shares: dict[_Key, list[float]] = defaultdict(list)
    for pair, key in asked.items():
        waiting[key].add(pair)
    votes: dict[int, list[float]] = defaultdict(list)
    found = Choices()
    for pair, label in zip(table.pair.tolist(), table.label.tolist(), strict=True):
        if pair not in asked or len(votes[pair]) == needed:
            continue
        key = asked[pair]
        vote = {FIRST: 1.0, SECOND: 0.0}.get(label, 0.5)
        votes[pair].append(vote if table.makers[pair] == key[1] else 1 - vote)
        if len(votes[pair]) < needed:
            continue
        waiting[key].discard(pair)
        shares[key].append(float(np.mean(votes[pair])))
        if not waiting[key]:
            found.choices.append(Choice(key[1], float(np.mean(shares[key]))))
    begun = sum(
        bool(pairs) and (bool(pairs & votes.keys()) or key in shares)
        for key, pairs in waiting.items()
    )
    counts = {
        "pairs without two versions": len(alike & set(table.pair.tolist())),
        "prompts that wait for further judgements": begun,
    }
    found.left_out = +Counter(counts)
    return found


def _pairs_of_versions(store: Store, table: Table) -> tuple[dict[int, _Key], set[int]]:
    """Return the pairs that compare two versions, and those that do not; no hidden checks."""
    rows = store.database.rows("SELECT id FROM pairs WHERE gold IS NOT NULL")
    checks = {row["id"] for row in rows}
    asked, alike = {}, set()
    for pair, (first, second) in enumerate(table.makers):
        if int(table.pairs[pair]) in checks:
            continue
        if first is None or second is None or first == second:
            alike.add(pair)
        else:
            versions = (min(first, second), max(first, second))
            asked[pair] = int(table.prompts[pair]), versions
    return asked, alike


def choices_of_log(records: Iterable[LogRecord]) -> Choices:
    """Return the choices of a served policy's log; see `read_choices`."""
    found, seen = Choices(), set()
    for record in records:
        if record.id is not None and record.id in seen:
            found.left_out["further lines of a request"] += 1
            continue
        choices = list(_choices_of(record))
        if not choices:
            found.left_out["requests without a choice between two versions"] += 1
            continue
        seen.add(record.id)
        found.choices += choices
    return found


def _choices_of(record: LogRecord) -> Iterator[Choice]:
    """Yield a choice for each two versions that a record compares."""
    values = _values(record)
    if values is None or len(record.versions) != len(values):
        return
    by_version: dict[str, list[float]] = defaultdict(list)
    for version, value in zip(record.versions, values, strict=True):
        by_version[version].append(value)
    names = sorted(by_version)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            ones, others = by_version[first], by_version[second]
            if record.choice is not None and record.choice != _TIE and max(ones + others) == 0:
                continue  # a third version was chosen, which says nothing of these two
            shares = [0.5 + np.sign(one - other) / 2 for one in ones for other in others]
            yield Choice((first, second), float(np.mean(shares)))


def _values(record: LogRecord) -> list[float] | None:
    """Return how good each response was found; None where nobody compared them."""
    if record.choice is not None:
        return [float(place == record.choice) for place in range(len(record.responses))]
    if len(record.thumbs) < 2 or None in record.thumbs:
        return None
    return [float(bool(thumb)) for thumb in record.thumbs]


def _log_records(path: Path) -> list[LogRecord]:
    problems: list[InputProblem] = []
    records = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is neither a feedback store nor text (UTF-8).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}:"
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise InputError(InputProblem("", f"must be an object, got {shortened(line, 60)}"))
            records.append(read_log_record(record))
        except InputError as error:
            problems += [InputProblem("", f"{place} {problem}") for problem in error.problems]
        except ValueError as error:
            problems.append(InputProblem("", f"{place} is not JSON: {error}."))
    if problems:
        raise InputError(problems)
    return records


def compare_versions(
    choices: Choices, versions: Sequence[str] = (), *, alpha: float = 0.05, looks: int = 300
) -> list[VersionComparison]:
    """Compare versions by people's choices; each version is compared with the first.

    The chance to win is tested against 1/2 by `SequentialTest`: the verdict and the interval hold
    however often somebody looks, and whenever somebody stops. With more than two versions each of
    the k comparisons gets alpha / k.

    The test supposes that a choice has the same expectation whatever came before it. It counts a
    prompt (a request) once, but it cannot see that one person, who may like one style, made many of
    the choices: a verdict is on the people and prompts that were asked, in their shares.

    Args:
        choices: from `read_choices`.
        versions: two or more labels, the first of them the baseline; by default all, sorted.
        alpha: chance of any false verdict, over all looks and comparisons.
        looks: most points of a plot over time.

    Returns:
        A comparison of each further version with the first.

    Raises:
        InputError: no choices, fewer than two versions, or an unknown label.

    Example:
        >>> found = Choices([Choice(("new", "old"), 1.0)] * 12)
        >>> compare_versions(found, ["old", "new"])[0].verdict
        'new is better, decided after 8 choices'
    """
    known = choices.labels()
    if not known:
        why = "; ".join(f"{count:,} {reason}" for reason, count in choices.left_out.items())
        rule = f"hold no choice between two versions ({why or 'nothing is there'})."
        hint = "Candidates need makers, and lines of a log need versions and a choice."
        raise InputError(InputProblem("choices", rule, hint=hint))
    versions = list(versions) or known
    listed = ", ".join(known[:_LISTED]) + (", ..." if len(known) > _LISTED else "")
    problems = [
        InputProblem(
            "versions", f"must be among those compared ({listed})", one, did_you_mean(one, known)
        )
        for one in versions
        if one not in known
    ]
    if len(set(versions)) < len(versions) or len(versions) < 2:
        rule = f"must be two or more different labels (there are {listed})"
        problems.append(InputProblem("versions", rule, versions))
    if problems:
        raise InputError(problems)
    share = alpha / (len(versions) - 1)
    return [_compare(choices, one, versions[0], share, looks) for one in versions[1:]]


def _compare(
    choices: Choices, version: str, against: str, alpha: float, looks: int
) -> VersionComparison:
    own = {(version, against): False, (against, version): True}
    values = [
        1 - choice.share if own[choice.versions] else choice.share
        for choice in choices.choices
        if choice.versions in own
    ]
    test = SequentialTest(alpha)
    shown = set(np.unique(np.linspace(1, max(len(values), 1), looks).astype(int)).tolist())
    path = []
    for number, value in enumerate(values, start=1):
        test.add(value)
        if number in shown:
            path.append((number, (test.wins / number, *test.interval)))
    better = None
    if test.decided_after is not None:
        better = version if test.first_wins else against
    return VersionComparison(
        version,
        against,
        count=len(values),
        wins=sum(value > 0.5 for value in values),
        ties=sum(value == 0.5 for value in values),
        losses=sum(value < 0.5 for value in values),
        share=test.wins / test.count if test.count else None,
        interval=test.interval,
        p_value=test.p_value,
        log_e_value=test.log_e,
        alpha=alpha,
        better=better,
        decided_after=test.decided_after,
        looks=tuple(number for number, _ in path),
        intervals=tuple(ends for _, ends in path),
    )
