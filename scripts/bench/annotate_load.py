"""Load of the annotation page: many annotators at once, over real HTTP, also with kill -9.

    python scripts/bench/annotate_load.py --annotators 50 --minutes 30 --kills 5

The server is a process of its own, as `dpo-keras annotate` starts it. Annotators are coroutines of
this process, each with a connection of its own. Each answers a pair as soon as it has arrived and
`--reading` seconds have passed, which is faster than anybody reads; with `--reading 0` the next
request follows an answer at once. Afterwards the store is compared with what the server confirmed.
Server and annotators share the machine's cores, so the times are those of a busy machine.
Everything stays on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from array import array
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from dpo_keras.feedback import open_store
from dpo_keras.feedback.annotation_server import bind


class Connection:
    """HTTP with as little work as possible, since the server shares the cores."""

    def __init__(self, port: int):
        self.port = port
        self.headers: dict[str, str] = {}
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, path: str, body: object) -> tuple[int, dict]:
        """Send one request and return status and answer; raise OSError if the server went away."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        reader, writer = self._streams
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}", "", ""]
        try:
            writer.write("\r\n".join(lines).encode() + content)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
            answer = await reader.readexactly(int(fields["content-length"]))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            raise ConnectionError(str(error)) from error
        if "set-cookie" in fields:
            cookie = next(line for line in head.split("\r\n") if line.lower().startswith("set-c"))
            self.headers["Cookie"] = cookie.partition(": ")[2].partition(";")[0]
        return int(head.split(" ", 2)[1]), json.loads(answer)

    def close(self) -> None:
        """Forget the connection; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


class Annotator:
    """Somebody who fetches and judges, and remembers what was confirmed."""

    def __init__(self, token: str, port: int, reading: float, log: Log):
        self.token, self.reading, self.log = token, reading, log
        self.connection = Connection(port)
        self.confirmed: list[int] = []
        self.again = self.retries = 0  # answers to repetitions; attempts without an answer

    async def request(self, kind: str, method: str, path: str, body: object = None) -> dict:
        """One request, tried again until the server is back; only answered ones are timed."""
        first = time.perf_counter()
        while True:
            began = time.perf_counter()
            try:
                status, answer = await self.connection.request(method, path, body)
            except OSError:
                status = 0
            if status not in (0, 429, 503):
                break
            self.retries += 1
            await asyncio.sleep(0.05)
        if status != 200:
            raise RuntimeError(f"{status}: {answer}")
        now = time.perf_counter()
        self.log.note(kind, now - began, now - first)
        return answer

    async def work(self) -> None:
        """Sign in and judge until nothing is left, or the time is up."""
        await self.request("session", "POST", "/api/session", {"token": self.token})
        me = await self.request("me", "GET", "/api/me")
        self.connection.headers["X-CSRF-Token"] = me["csrf"]
        known: list[int] = []
        while not self.log.over():
            path = f"/api/next?count=3&known={','.join(map(str, known))}"
            answer = await self.request("next", "GET", path)
            held = [one["id"] for one in answer["presentations"]]
            if not held:
                if not answer["waiting"]:
                    return
                await asyncio.sleep(0.1)
                continue
            await asyncio.sleep(self.reading)
            choice = random.choice(["left", "right", "tie"])  # noqa: S311
            body = {"presentation": held[0], "choice": choice, "key": uuid.uuid4().hex}
            receipt = await self.request("judgement", "POST", "/api/judgements", body)
            self.confirmed.append(receipt["judgement"])
            self.again += receipt["again"]
            known = held[1:]


class Log:
    """Times of all requests, and what the server takes of the machine."""

    def __init__(self, seconds: float):
        self.began, self.seconds = time.perf_counter(), seconds
        self.times: dict[str, array] = defaultdict(lambda: array("d"))
        self.minutes: dict[int, array] = defaultdict(lambda: array("d"))
        self.longest_wait = 0.0  # from the first attempt, while the server was away
        self.samples: list[dict[str, float]] = []

    def note(self, kind: str, taken: float, waited: float) -> None:
        """Note one answered request."""
        self.times[kind].append(taken)
        if kind in ("next", "judgement"):
            self.minutes[int(self.elapsed() // 60)].append(taken)
        self.longest_wait = max(self.longest_wait, waited)

    def elapsed(self) -> float:
        """Return the seconds since the beginning."""
        return time.perf_counter() - self.began

    def over(self) -> bool:
        """Return whether the time is up."""
        return self.elapsed() > self.seconds

    def sample(self, process: int) -> None:
        """Note the server's descriptors, memory, threads and processor time."""
        proc = Path("/proc", str(process))
        try:
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            ticks = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
            files = len(list((proc / "fd").iterdir()))
        except OSError:
            return  # it was killed at this moment
        self.samples.append({
            "second": round(self.elapsed()), "descriptors": files,
            "megabytes": round(int(status["VmRSS"].split()[0]) / 1024, 1),
            "threads": int(status["Threads"]),
            "cpu_seconds": round(sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), 1),
        })  # fmt: skip

    def report(self) -> dict[str, object]:
        """Return percentiles in milliseconds, all and by minute."""
        both = {kind: np.array(self.times[kind]) for kind in ("next", "judgement")}
        both["all"] = np.concatenate(list(both.values()))
        return {
            "milliseconds": {
                kind: {
                    f"p{q:g}": round(1000 * float(np.percentile(values, q)), 1)
                    for q in (50, 95, 99, 99.9, 100)
                }
                for kind, values in both.items()
            },
            "requests": len(both["all"]),
            "over_100_ms": int((both["all"] >= 0.1).sum()),
            "p99_by_minute": [
                round(1000 * float(np.percentile(values, 99)), 1)
                for _, values in sorted(self.minutes.items())
            ],
            "longest_wait_over_restarts": round(self.longest_wait, 2),
        }


class Server:
    """`dpo-keras annotate` in a process of its own, which is killed and started again."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.options = folder, options
        listening = bind("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        listening.close()

    def start(self) -> list[dict]:
        """Start it, wait until it serves, and return the links that it printed."""
        command = [
            sys.executable, "-m", "dpo_keras.app", "annotate",
            str(self.folder / "candidates.jsonl"),
            "--store", str(self.folder / "feedback.sqlite"), "--port", str(self.port), "--json",
            "--overlap", str(self.options.overlap), "--repeat-share", "0",
        ]  # fmt: skip
        for number in range(self.options.annotators):
            command += ["--annotator", f"person {number}"]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        text = ""
        for line in self.process.stdout:
            text += line
            if line == "}\n":
                return json.loads(text)["links"]
        raise RuntimeError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        """End it as a power failure would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


def write_candidates(path: Path, pairs: int) -> None:
    """Prompts with two responses of 400 to 1,200 characters, with a list and code in them."""
    chance = random.Random(0)
    words = [uuid.UUID(int=chance.getrandbits(128)).hex[:6] for _ in range(500)]

    def some(low: int, high: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(low, high)))

    with path.open("w") as file:
        for number in range(pairs):
            responses = [
                f"{some(30, 90)}\n\n- **{some(1, 3)}**: {some(5, 20)}\n- {some(5, 20)}\n\n"
                f"```\n{some(5, 20)}\n```\n{some(10, 30)}"
                for _ in "ab"
            ]
            record = {"prompt": f"Prompt {number}", "responses": responses, "makers": ["a", "b"]}
            file.write(json.dumps(record) + "\n")


def check(folder: Path, people: list[Annotator], overlap: int) -> dict[str, Any]:
    """Compare the store with what was confirmed."""
    confirmed = [entry for person in people for entry in person.confirmed]
    log_left = (folder / "feedback.sqlite-wal").exists()
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
    found = {
        "confirmed": len(confirmed),
        "confirmed_and_missing": len(set(confirmed) - there),
        "confirmed_twice": len(confirmed) - len(set(confirmed)),
        "stored": len(there),
        "pairs_with_exactly_the_overlap": sum(count == overlap for count in per_pair),
        "pairs_with_more": sum(count > overlap for count in per_pair),
        "judged_twice_by_one_person": len(twice),
        "integrity": rows("PRAGMA integrity_check")[0][0],
        "log_left_beside_the_store": log_left,
    }
    store.close()
    return found


async def simulate(server: Server, people: list[Annotator], log: Log, kills: int) -> list[float]:
    """Let people judge, and kill the server at even intervals; return the seconds it was away."""
    working = asyncio.gather(*(person.work() for person in people))
    away: list[float] = []
    sampled = 0.0
    while not working.done():
        await asyncio.wait([working], timeout=0.05)
        if log.elapsed() >= sampled:
            log.sample(server.process.pid)
            sampled = log.elapsed() + max(1.0, log.seconds / 60)
        if len(away) < kills and log.elapsed() > log.seconds * (len(away) + 1) / (kills + 1):
            log.sample(server.process.pid)
            began = time.perf_counter()
            server.kill()
            await asyncio.to_thread(server.start)
            away.append(round(time.perf_counter() - began, 2))
    await working
    log.sample(server.process.pid)
    return away


def main() -> int:
    """Run the benchmark and print its figures as JSON; return 1 if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--overlap", type=int, default=10)
    parser.add_argument("--kills", type=int, default=0, help="kill -9 the server so many times")
    parser.add_argument("--reading", type=float, default=0.3, help="least seconds before an answer")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, or until all is done")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_candidates(folder / "candidates.jsonl", options.pairs)
        server = Server(folder, options)
        links = server.start()
        log = Log(options.minutes * 60)
        people = [
            Annotator(one["link"].partition("#")[2], server.port, options.reading, log)
            for one in links if not one["admin"]
        ]  # fmt: skip
        try:
            away = asyncio.run(simulate(server, people, log, options.kills))
            seconds = log.elapsed()
        finally:
            server.stop()
        found = check(folder, people, options.overlap)
        errors = (folder / "server.log").read_text()
    report = {
        "annotators": options.annotators, "reading_seconds": options.reading,
        "seconds": round(seconds, 1), "seconds_away_after_kill_9": away,
        "judgements_per_second": round(found["confirmed"] / seconds, 1),
        "retries": sum(person.retries for person in people),
        "answers_to_repetitions": sum(person.again for person in people),
        **log.report(), **found, "server": log.samples, "server_said": errors[-2000:],
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    lost = ("confirmed_and_missing", "confirmed_twice", "judged_twice_by_one_person")
    good = not any(found[name] for name in (*lost, "pairs_with_more"))
    return 0 if good and len(away) == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
