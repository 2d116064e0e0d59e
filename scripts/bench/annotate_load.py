"""Load of the annotation page: many annotators at once, over real HTTP, also with kill -9.

    python scripts/bench/annotate_load.py --annotators 20 --pairs 2000 --overlap 2 --kills 3

The server is a process of its own, as `dpo-keras annotate` starts it; annotators are threads of
this one, each with a connection of its own, who judge as fast as they are let. Afterwards the
store is compared with what the server confirmed. Both share the machine's cores, so the times are
those of a busy machine. Everything stays on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import numpy as np

from dpo_keras.feedback import open_store
from dpo_keras.feedback.annotation_server import bind


class Annotator:
    """Somebody who fetches and judges, and remembers what was confirmed."""

    def __init__(self, name: str, token: str, port: int, think: float, deadline: float):
        self.name, self.token, self.port = name, token, port
        self.think, self.deadline = think, deadline
        self.times: dict[str, list[float]] = {"next": [], "judgement": []}
        self.confirmed: list[int] = []
        self.retries = 0
        self.error: BaseException | None = None
        self._headers = {"Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None
        self._random = random.Random(name)

    def request(self, kind: str, method: str, path: str, body: object = None) -> dict:
        """One request, tried again until the server is back; only answered ones are timed."""
        content = None if body is None else json.dumps(body)
        while True:
            if time.monotonic() > self.deadline:
                raise TimeoutError("the benchmark took too long")
            try:
                if self._connection is None:
                    self._connection = http.client.HTTPConnection(
                        "127.0.0.1", self.port, timeout=20
                    )
                began = time.perf_counter()
                self._connection.request(method, path, content, self._headers)
                response = self._connection.getresponse()
                answer = json.loads(response.read())
                taken = time.perf_counter() - began
            except (OSError, http.client.HTTPException, ValueError):
                self._connection = None
                self.retries += 1
                time.sleep(0.05)
                continue
            if response.status in (429, 503):
                self.retries += 1
                time.sleep(0.05)
                continue
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {answer}")
            if response.headers["set-cookie"]:
                self._headers["Cookie"] = response.headers["set-cookie"].partition(";")[0]
            self.times.setdefault(kind, []).append(taken)
            return answer

    def run(self) -> None:
        """Signs in and judges until nothing is left."""
        try:
            self._work()
        except BaseException as error:  # told by the main thread
            self.error = error

    def _work(self) -> None:
        self.request("session", "POST", "/api/session", {"token": self.token})
        self._headers["X-CSRF-Token"] = self.request("me", "GET", "/api/me")["csrf"]
        known: set[int] = set()
        while True:
            path = f"/api/next?count=3&known={','.join(map(str, sorted(known)))}"
            answer = self.request("next", "GET", path)
            held = [one["id"] for one in answer["presentations"]]
            if not held:
                if not answer["waiting"]:
                    return
                time.sleep(0.1)
                continue
            body = {
                "presentation": held[0],
                "choice": self._random.choice(["left", "right", "tie"]),
                "key": uuid.uuid4().hex,
                "seconds": 1.0,
            }
            self.confirmed.append(
                self.request("judgement", "POST", "/api/judgements", body)["judgement"]
            )
            known = set(held[1:])
            time.sleep(self._random.random() * 2 * self.think)


def start(folder: Path, port: int, options: argparse.Namespace) -> tuple[subprocess.Popen, list]:
    """Start the server and return it with the links that it printed."""
    command = [
        sys.executable, "-m", "dpo_keras.app", "annotate", str(folder / "candidates.jsonl"),
        "--store", str(folder / "feedback.sqlite"), "--overlap", str(options.overlap),
        "--port", str(port), "--repeat-share", "0", "--json",
    ]  # fmt: skip
    for number in range(options.annotators):
        command += ["--annotator", f"person {number}"]
    log = (folder / "server.log").open("a")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    text = ""
    for line in server.stdout:
        text += line
        if line == "}\n":
            break
    if not text:
        raise RuntimeError((folder / "server.log").read_text())
    return server, json.loads(text)["links"]


def free_port() -> int:
    """Return a port that the server keeps over restarts."""
    listening = bind("127.0.0.1", 0)
    port = listening.getsockname()[1]
    listening.close()
    return port


def write_candidates(path: Path, pairs: int) -> None:
    """Prompts with two responses of a few hundred words."""
    chance = random.Random(0)
    words = [uuid.UUID(int=chance.getrandbits(128)).hex[:6] for _ in range(500)]
    with path.open("w") as file:
        for number in range(pairs):
            responses = [" ".join(chance.choices(words, k=chance.randint(50, 300))) for _ in "ab"]
            record = {"prompt": f"Prompt {number}", "responses": responses, "makers": ["a", "b"]}
            file.write(json.dumps(record) + "\n")


def check(folder: Path, confirmed: list[int], pairs: int, overlap: int) -> dict[str, object]:
    """Compare the store with what was confirmed."""
    store = open_store(folder / "feedback.sqlite")
    rows = store.database.rows
    there = {row[0] for row in rows("SELECT id FROM judgements")}
    per_pair = [row[0] for row in rows(
        "SELECT count(*) FROM current c JOIN presentations p ON p.id = c.presentation GROUP BY pair"
    )]  # fmt: skip
    twice = rows(
        "SELECT 1 FROM current c JOIN presentations p ON p.id = c.presentation "
        "GROUP BY pair, annotator HAVING count(*) > 1"
    )
    left = rows("SELECT sum(first_on_left) FROM presentations")[0][0]
    found = {
        "confirmed": len(confirmed),
        "confirmed_and_missing": len(set(confirmed) - there),
        "stored": len(there),
        "pairs_with_exactly_the_overlap": sum(count == overlap for count in per_pair),
        "pairs": pairs,
        "judged_twice_by_one_person": len(twice),
        "first_on_left": f"{left} of {rows('SELECT count(*) FROM presentations')[0][0]}",
        "integrity": rows("PRAGMA integrity_check")[0][0],
    }
    store.close()
    return found


def main() -> int:
    """Run the benchmark and print its figures as JSON; return 1 if something was lost or slow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotators", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--overlap", type=int, default=2)
    parser.add_argument("--kills", type=int, default=0, help="kill -9 the server so many times")
    parser.add_argument("--think", type=float, default=0.1, help="mean seconds between judgements")
    parser.add_argument("--limit", type=float, default=300, help="seconds the whole may take")
    options = parser.parse_args()
    wanted = options.pairs * options.overlap
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_candidates(folder / "candidates.jsonl", options.pairs)
        port = free_port()
        server, links = start(folder, port, options)
        began = time.monotonic()
        people = [
            Annotator(one["name"], one["link"].partition("#")[2], port, options.think,
                      began + options.limit)
            for one in links if not one["admin"]
        ]  # fmt: skip
        threads = [threading.Thread(target=person.run) for person in people]
        try:
            for thread in threads:
                thread.start()
            for kill in range(options.kills):
                target = wanted * (kill + 1) // (options.kills + 1)
                while sum(len(p.confirmed) for p in people) < target:
                    if not any(thread.is_alive() for thread in threads):
                        break
                    time.sleep(0.01)
                os.kill(server.pid, signal.SIGKILL)
                server.wait()
                server, _ = start(folder, port, options)
            for thread in threads:
                thread.join(options.limit)
            seconds = time.monotonic() - began
        finally:
            server.terminate()
            server.wait(20)
        errors = [repr(person.error) for person in people if person.error is not None]
        confirmed = [entry for person in people for entry in person.confirmed]
        found = check(folder, confirmed, options.pairs, options.overlap)
    times = {
        kind: np.array([t for person in people for t in person.times[kind]]) * 1000
        for kind in ("next", "judgement")
    }
    every = np.concatenate(list(times.values()))
    latency = {
        kind: {f"p{q}": round(float(np.percentile(values, q)), 1) for q in (50, 95, 99, 100)}
        for kind, values in {**times, "all": every}.items()
    }
    good = (
        not errors
        and found["confirmed_and_missing"] == found["judged_twice_by_one_person"] == 0
        and found["pairs_with_exactly_the_overlap"] == options.pairs
    )
    report = {
        "annotators": options.annotators, "kills": options.kills, "seconds": round(seconds, 1),
        "judgements_per_second": round(len(confirmed) / seconds, 1), "requests": len(every),
        "retries": sum(person.retries for person in people), "milliseconds": latency,
        "under_100_ms": latency["all"]["p99"] < 100, **found, "errors": errors[:5],
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
