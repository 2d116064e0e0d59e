"""Requests to the server of the annotation page, byte by byte, without a network."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

from dpo_keras.feedback import Candidates, Response, Settings, open_store
from dpo_keras.feedback.annotation_server import make_app
from fuzzing.kind import Finding, Kind, Mutate, Row, odd_value, strict_json


class Requests(Kind):
    """Requests to the server of the annotation page, byte by byte, without a network."""

    name = "http"

    def __init__(self, folder: Path):

        super().__init__(folder)
        self.store = open_store(folder / "f.sqlite", Settings(overlap=50), create=True)
        self.store.add(
            Candidates(f"Question {n}?", (Response(f"one {n}"), Response(f"two {n}")))
            for n in range(300)
        )
        self.app = make_app(self.store, rate=1e9, burst=1e9)
        _, self.token = self.store.add_annotator("ann")
        self.headers = [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            (b"origin", b"http://127.0.0.1"),
        ]
        _, headers, _ = self.send(
            b"POST", b"/api/session", json.dumps({"token": self.token}).encode()
        )
        cookie = dict(headers)[b"set-cookie"].split(b";")[0]
        self.headers.append((b"cookie", cookie))
        csrf = json.loads(self.send(b"GET", b"/api/me", b"")[2])["csrf"]
        self.headers.append((b"x-csrf-token", csrf.encode()))

    def send(
        self,
        method: bytes,
        target: bytes,
        body: bytes,
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Send one request to the application; return status, headers and body."""
        path, _, query = target.partition(b"?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method.decode("latin-1"),
            "path": path.decode("utf-8", "replace"),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": [(b"content-length", str(len(body)).encode()), *(headers or self.headers)],
            "client": ("127.0.0.1", 5000),
            "server": ("127.0.0.1", 80),
        }
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def keep(message: Any) -> None:
            sent.append(message)

        asyncio.run(self.app(scope, receive, keep))
        answer = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], sent[0]["headers"], answer

    def attempt(self, chance: random.Random, mutate: Mutate) -> str:
        """Damage it, and compare what is read with what it says."""
        shown = json.loads(self.send(b"GET", b"/api/next", b"")[2])["presentations"][0]["id"]
        judgement = {
            "presentation": shown,
            "choice": chance.choice(("left", "right", "tie", "skip")),
            "key": f"k{chance.random()}",
            "seconds": 2.5,
            "reason": "é",
        }
        request = chance.choice(
            [(b"POST", b"/api/judgements", json.dumps(judgement).encode())] * 4
            + [
                (b"POST", b"/api/undo", json.dumps({"presentation": shown, "key": "u"}).encode()),
                (b"POST", b"/api/session", json.dumps({"token": self.token}).encode()),
                (b"GET", b"/api/next?count=2&known=1,2", b""),
                (b"GET", b"/api/me", b""),
                (b"GET", b"/api/admin", b""),
                (b"GET", b"/", b""),
                (b"GET", b"/admin", b""),
            ]
        )
        parts, headers = list(request), list(self.headers)
        victim = chance.choice(("body", "body", "body", "target", "method", "header"))
        if victim == "header":
            number = chance.randrange(len(headers))
            headers[number] = (headers[number][0], mutate(headers[number][1]))
        elif (
            victim == "body" and judgement and chance.random() < 0.5 and b"presentation" in parts[2]
        ):
            parts[2] = odd_value(parts[2], chance)
        else:
            place = {"method": 0, "target": 1, "body": 2}[victim]
            parts[place] = mutate(parts[place])
        before = self._judgements()
        status, _, answer = self.send(*parts, headers)
        added = self._judgements()[len(before) :]
        if status >= 500:
            raise Finding(f"status {status} for {victim} {parts}"[:300])
        if status >= 400:
            if added or not answer:
                raise Finding(f"status {status} with {len(added)} new judgements for {parts}"[:300])
            return "refused"
        if len(added) > 1 or (added and not self._means(parts[2], added[0])):
            raise Finding(f"recorded {added} for {parts}"[:300])
        return "as it says" if added else "unchanged"

    def _judgements(self) -> list[Row]:
        rows = self.store.database.rows
        return [
            tuple(row) for row in rows("SELECT presentation, verdict FROM judgements ORDER BY id")
        ]

    @staticmethod
    def _means(body: bytes, added: Row) -> bool:
        said = strict_json(body.decode())
        if "choice" not in said:
            return added[1] == "undo"
        verdict = {"left": "prefer", "right": "prefer"}.get(said["choice"], said["choice"])
        return added == (said["presentation"], verdict)

    def close(self) -> None:
        """Close the store."""
        self.store.close()
