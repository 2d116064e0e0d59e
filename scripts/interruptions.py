#!/usr/bin/env python
"""Interrupt a run in each of its phases, resume it, and compare its end with an undisturbed run's.

    python scripts/interruptions.py [--kinds SIGKILL SIGTERM SIGINT disk]

One run per kind of interruption is interrupted once in every phase, a moment after its beginning or
after some of its steps, and resumed each time with the same command and `--resume`. `disk` fills
the disk until the process has ended, in that phase or in the next that writes; the run lies on a
small tmpfs, which only root may mount. Exits with 1 if a process ended otherwise than it should, if
a signal missed its phase, or if the end is another one than the undisturbed run's.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import h5py
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
PHASES = (
    *("Supervised warm-up", "Reference log-probs of the pairs (train)"),
    *("Evaluation before preference training", "Responses before preference training"),
    *("Preference training", "Evaluation after preference training"),
    *("Responses after preference training", "Report", "Export"),
    "One request to the exported model",
)
MOMENT = 0.3  # seconds after the beginning of a phase
STEPS = 5  # after which phases that log steps are interrupted
LOGS = {"Supervised warm-up": "metrics.warmup.jsonl", "Preference training": "metrics.jsonl"}
EXITS = {"SIGKILL": -9, "SIGTERM": 75, "SIGINT": 75, "disk": 1}  # codes, by interruption
CONFIG = """
seed: 5
model:
  scratch: {vocabulary_size: 300, num_layers: 1, num_heads: 2, hidden_dim: 16,
            intermediate_dim: 64, max_sequence_length: 96}
data: {path: builtin:support, limit: 60, held_out: 0.14, max_length: 64}
warmup: {batch_size: 8, epochs: 2, learning_rate: 1e-3}
reference: cached
training: {batch_size: 8, epochs: 3, learning_rate: 1e-3, buckets: 1, checkpoint_every: 2}
evaluation: {prompts: 2, max_new_tokens: 8, batch_size: 8}
export: {signatures: [score], max_new_tokens: 8}
"""


Act = Callable[["subprocess.Popen[str]"], None]


@dataclass
class Process:
    """One process of a run: how it ended, and what it had said."""

    exit: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def phase(self) -> str:
        """The last phase that began."""
        return next((line for line in reversed(self.lines) if line in PHASES), "before the first")

    @property
    def error(self) -> str:
        """What it said at its end."""
        return next((line for line in self.lines if line.startswith("error:")), "")[7:]

    @property
    def resumed(self) -> str:
        """The steps that it went on from, of warm-up and training."""
        found = [line.split()[3] for line in self.lines if line.startswith("resumed after step")]
        return " and ".join(found) or "-"


def train(folder: pathlib.Path, phase: str | None = None, act: Act | None = None) -> Process:
    """Train or resume in `folder`; `act` is what happens to the process in `phase`."""
    config = folder / "interrupted.yaml"
    if not config.exists():
        config.write_text(CONFIG, encoding="utf-8")
    places = [f"output={folder / 'run'}", f"export.path={folder / 'exported' / '1'}"]
    command = [sys.executable, "-m", "dpo_keras.app", "train", str(config), *places]
    resume = ["--resume"] if (folder / "run").exists() else []
    found = Process()
    with subprocess.Popen(
        [*command, *resume], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        acting = None
        for line in map(str.strip, process.stderr):
            found.lines.append(line)
            if act is not None and line == phase:
                log = folder / "run" / LOGS.get(phase, "none")
                acting = threading.Thread(target=wait_and_act, args=(process, phase, log, act))
                acting.start()
    if acting is not None:
        acting.join()
    found.exit = process.returncode
    return found


def wait_and_act(process: subprocess.Popen[str], phase: str, log: pathlib.Path, act: Act) -> None:
    """Wait until a phase has come to where it is interrupted."""
    if phase in LOGS:
        while process.poll() is None and not (
            log.exists() and len(log.read_bytes().splitlines()) >= STEPS
        ):
            time.sleep(0.001)
    else:
        time.sleep(MOMENT)
    act(process)


def act_of(kind: str, folder: pathlib.Path) -> Act:
    """Return what happens to a process: a signal, or a disk that stays full until it has ended."""
    if kind != "disk":
        return lambda process: process.send_signal(signal.Signals[kind])

    def fill(process: subprocess.Popen[str]) -> None:
        ballast = folder / "ballast"
        with ballast.open("ab", buffering=0) as file:
            while process.poll() is None:
                for size in (65536, 4096):
                    try:
                        while True:
                            file.write(bytes(size))
                    except OSError:
                        continue
                time.sleep(0.02)
        ballast.unlink()

    return fill


def weights_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Read the trained policy's weights."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(folder / "run" / "policy" / "model.weights.h5", "r") as file:
        file.visititems(
            lambda name, item: found.update({name: item[()]} if hasattr(item, "shape") else {})
        )
    return found


def end_of(folder: pathlib.Path, undisturbed: pathlib.Path) -> tuple[float, bool]:
    """Return the largest difference of weights, and whether the logs have the same records."""
    ours, theirs = weights_of(folder), weights_of(undisturbed)
    assert ours.keys() == theirs.keys() and theirs
    difference = max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)
    records = [
        [
            (record["step"], record.get("epoch"))
            for record in map(json.loads, (place / "run" / "metrics.jsonl").open())
        ]
        for place in (folder, undisturbed)
    ]
    return difference, records[0] == records[1]


@contextmanager
def small_disk(kind: str) -> Iterator[pathlib.Path]:
    """Yield a folder for a run; for `disk` on a file system of 32 MiB of its own."""
    with tempfile.TemporaryDirectory(prefix="interruptions-") as name:
        if kind != "disk":
            yield pathlib.Path(name)
            return
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", name], check=True)
        try:
            yield pathlib.Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


def interrupt(kind: str, undisturbed: pathlib.Path) -> bool:
    """Interrupt a run once in each phase; print a row for each, and return whether all held."""
    held = True
    with small_disk(kind) as folder:
        for phase in PHASES:
            process = train(folder, phase, act_of(kind, folder))
            here = process.phase == phase
            good = process.exit == EXITS[kind] and (here or kind == "disk")
            held &= good
            said = process.error.replace(str(folder), "DIR")[:100]
            cells = (kind, phase, process.exit, process.resumed, said)
            wrong = ("" if here else f"(in {process.phase})") + ("" if good else " **wrong**")
            print("|", " | ".join(map(str, cells)), wrong, "|", flush=True)
        last = train(folder)
        difference, same_steps = end_of(folder, undisturbed)
        good = last.exit == 0 and difference <= 1e-6 and same_steps
        end = f"largest difference of a weight {difference:.1e}; same records: {same_steps}"
        print(f"| {kind} | none | {last.exit} | {last.resumed} | {end} |", flush=True)
    return held and good


def main() -> int:
    """Run the undisturbed run, then one of each kind."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=EXITS, default=list(EXITS))
    kinds = parser.parse_args().kinds
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with tempfile.TemporaryDirectory(prefix="undisturbed-") as name:
        undisturbed = pathlib.Path(name)
        process = train(undisturbed)
        if process.exit:
            print(*process.lines, sep="\n", file=sys.stderr)
            return 1
        print("| interruption | in | exit | resumed after step | said |")
        print("|---|---|---|---|---|", flush=True)
        held = [interrupt(kind, undisturbed) for kind in kinds]  # all, also after a bad one
        return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
