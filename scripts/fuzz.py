"""Damage inputs at random, from a seed; look for tracebacks and silent changes of what is trained.

    python scripts/fuzz.py                          # 1,000 mutations over all kinds of input
    python scripts/fuzz.py --kinds csv http -n 200  # of these kinds only
    python scripts/fuzz.py --only csv:17 --debug    # one mutation again, with its traceback

Whatever the mutation, an input must be refused with an `InputError` (HTTP: a status of 4xx), or be
reported with a message, or mean to the program what it says. What it says is read a second time
here, by other code: `fuzzing/` states for each kind of input what must hold.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from fuzzing.accidents import mutate
from fuzzing.folders import Built, Checkpoints, Tokens
from fuzzing.http_requests import Requests
from fuzzing.kind import Finding, Kind
from fuzzing.text_files import (
    CandidatesFile,
    Configuration,
    PreferenceFile,
    csv_records,
    json_lines,
)

from dpo_keras.errors import InputError

KINDS: dict[str, Callable[[Path], Kind]] = {
    "jsonl": lambda folder: PreferenceFile(folder, "jsonl", json_lines),
    "csv": lambda folder: PreferenceFile(folder, "csv", csv_records),
    "jsonl.gz": lambda folder: PreferenceFile(folder, "jsonl.gz", None),
    "csv.gz": lambda folder: PreferenceFile(folder, "csv.gz", None),
    "parquet": lambda folder: PreferenceFile(folder, "parquet", None),
    "built": Built,
    "tokens": Tokens,
    "yaml": Configuration,
    "checkpoint": Checkpoints,
    "candidates": lambda folder: CandidatesFile(folder, ""),
    "candidates.gz": lambda folder: CandidatesFile(folder, ".gz"),
    "http": Requests,
}


def attempt(kind: Kind, number: int, seed: int) -> str:
    """Make one mutation of a kind; return how the program met it, or raise `Finding`."""
    chance = random.Random(f"{seed}/{kind.name}/{number}")
    try:
        return kind.attempt(chance, lambda content: mutate(content, chance))
    except InputError as error:
        for problem in error.problems:
            if not problem.strip():
                raise Finding("an error without a word") from error
            try:
                problem.encode()
            except UnicodeEncodeError as unprintable:
                raise Finding("a message that cannot be printed") from unprintable
        return "refused"
    except Finding:
        raise
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:200]}") from error


def fuzz(
    names: list[str], mutations: int, seed: int, folder: Path, debug: bool = False
) -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """Make mutations of kinds in turn; return how many of each kind ended how, and all findings."""
    outcomes: dict[str, collections.Counter[str]] = {}
    findings: list[str] = []
    for place, name in enumerate(names):
        (folder / name).mkdir()
        kind, outcomes[name] = KINDS[name](folder / name), collections.Counter()
        for number in range(mutations // len(names) + (place < mutations % len(names))):
            try:
                outcomes[name][attempt(kind, number, seed)] += 1
            except Finding as finding:
                outcomes[name]["FOUND"] += 1
                findings.append(f"{name}:{number} {finding}")
                if debug:
                    traceback.print_exc()
        kind.close()
    return outcomes, findings


def main() -> int:
    """Run the fuzzer from the command line; the exit code is 1 where something was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", metavar="KIND:NUMBER", help="this mutation alone")
    parser.add_argument("--debug", action="store_true", help="show the traceback of each finding")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if given.only:
            name, _, number = given.only.partition(":")
            kind = KINDS[name](Path(temporary))
            try:
                print(attempt(kind, int(number), given.seed))
            finally:
                kind.close()
            return 0
        outcomes, findings = fuzz(
            given.kinds, given.mutations, given.seed, Path(temporary), given.debug
        )
    columns = ("refused", "reported", "as it says", "unchanged", "FOUND")
    print(f"{'kind':<14}" + "".join(f"{name:>12}" for name in columns))
    for name, counts in outcomes.items():
        print(f"{name:<14}" + "".join(f"{counts[column]:>12}" for column in columns))
    print(*findings, sep="\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
