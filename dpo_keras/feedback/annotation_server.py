"""Where the server listens, by which names it is reached, and how it ends: uvicorn."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dpo_keras.errors import InputError
from dpo_keras.feedback.annotation_api import Api, caller, page, policy
from dpo_keras.feedback.annotators import Annotator
from dpo_keras.feedback.database import StoreError
from dpo_keras.feedback.judgements import Conflict
from dpo_keras.feedback.request_guard import (
    MOST_BYTES,
    Headered,
    Rates,
    Refused,
    check_origin,
    check_same_site,
    csrf,
)
from dpo_keras.feedback.store import Store


def bind(host: str, port: int) -> socket.socket:
    """Takes an address for the server; nobody can connect before it listens.

    Args:
        host: an address of this machine.
        port: 0 takes any free one.

    Raises:
        InputError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where the protocol is named; on, it costs 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise InputError(
            f"{host} port {port} cannot be listened on ({error.strerror}); give another with "
            "--port, 0 takes any free one."
        ) from error
    return listening


def run(
    app: ASGIApp, listening: socket.socket, announce: Callable[[], None] = lambda: None
) -> None:
    """Serves until interrupted.

    Args:
        app: from `make_app`.
        listening: from `bind`.
        announce: tells people, or the program that waits for it, that the server is there: called
            when connections are accepted and an interruption ends the server in good order.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=30,
        limit_concurrency=500,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)

    def end(*_: Any) -> None:
        server.should_exit = True

    # Uvicorn takes signals once its loop runs; one that comes while it starts must end it as well,
    # and not raise KeyboardInterrupt wherever Python happens to be.
    ours = (signal.SIGINT, signal.SIGTERM)
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, end) for number in ours if in_main}
    try:
        # From here on connections wait rather than fail, so that printed links work at once.
        listening.listen(512)
        announce()
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def allowed_hosts(host: str, url: str | None) -> tuple[frozenset[str], bool]:
    """The names that a server is reached by, and whether by https.

    Args:
        host: the address it listens on.
        url: how people reach it, where that differs.

    Raises:
        InputError: it listens on all addresses, and no url says by which name it is reached.
    """
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url must be like https://feedback.example.org, got {url!r}.")
        return frozenset({parts.hostname}), parts.scheme == "https"
    if host in ("0.0.0.0", "::"):  # noqa: S104
        raise InputError(
            f"host {host} listens on every address; say with --url how annotators reach it, for "
            "instance --url https://feedback.example.org."
        )
    return frozenset({host.lower()}), False


__all__ = ["allowed_hosts", "bind", "make_app", "run"]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
SESSION_DAYS = 30
BODY_SECONDS = 20.0

Work = Callable[[Api, Annotator, Any], dict[str, Any]]


def make_app(
    store: Store,
    *,
    guidelines: str = "",
    assess: Callable[[Store], Mapping[str, Any]] | None = None,
    hosts: Iterable[str] = (),
    secure: bool = False,
    rate: float = 30.0,
    burst: float = 60.0,
) -> Starlette:
    """Makes the server's application.

    Args:
        store: the round.
        guidelines: Markdown that the page shows.
        assess: makes the administrator's figures of agreement from the store.
        hosts: names besides the loopback's that the server is reached by.
        secure: the page is reached by https, so that cookies are sent by https only.
        rate: requests per second and session.
        burst: requests at once.
    """
    service = _Service(Api(store, guidelines, assess), secure, Rates(rate, burst), Rates(1.0, 20.0))
    routes = [
        Route("/", _page("annotate")),
        Route("/admin", _page("admin")),
        Route("/api/session", service.sign_in, methods=["POST"]),
        Route("/api/me", service.reading(lambda api, person, _: api.me(person))),
        Route("/api/next", service.reading(_next)),
        Route("/api/admin", service.reading(_overview)),
        Route(
            "/api/judgements",
            service.writing(lambda api, person, body: api.submit(person, body)),
            methods=["POST"],
        ),
        Route(
            "/api/undo",
            service.writing(lambda api, person, body: api.undo(person, body)),
            methods=["POST"],
        ),
    ]
    allowed = LOOPBACK | {host.lower() for host in hosts}
    return Starlette(
        routes=routes,
        middleware=[Middleware(Headered, policy=policy(), hosts=frozenset(allowed))],
        exception_handlers={404: _missing, 405: _missing, 500: _failed},
    )


class _Service:
    """Requests in, answers out: who asks, may they, and what went wrong."""

    def __init__(self, api: Api, secure: bool, rates: Rates, failures: Rates):
        self.api, self.secure, self.rates, self.failures = api, secure, rates, failures
        # Cookies do not know ports: two rounds on one machine must not sign each other out.
        self.cookie = f"feedback_{api.store.id}"

    def reading(self, work: Work) -> Callable[[Request], Any]:
        """An endpoint that only answers."""

        async def endpoint(request: Request) -> Response:
            return await self._answer(request, work, dict(request.query_params), writes=False)

        return endpoint

    def writing(self, work: Work) -> Callable[[Request], Any]:
        """An endpoint that takes JSON from the page and changes the store."""

        async def endpoint(request: Request) -> Response:
            try:
                body = await _json(request)
            except Refused as refused:
                return refused.response()
            return await self._answer(request, work, body, writes=True)

        return endpoint

    async def _answer(self, request: Request, work: Work, body: Any, *, writes: bool) -> Response:
        # One hop to a thread for all that touches the store: the loop never waits for the disk.
        return await anyio.to_thread.run_sync(self._work, request, work, body, writes)

    def _work(self, request: Request, work: Work, body: Any, writes: bool) -> Response:
        try:
            secret = request.cookies.get(self.cookie, "")
            person = self.api.store.session(secret) if secret else None
            if person is None:
                self._count_failure(request)
                raise Refused(401, "you are not signed in; open your link again.")
            if not self.rates.allows(caller(secret)):
                raise Refused(429, "too many requests; wait a second.", retry_after=1)
            if writes:
                check_same_site(request.headers, secret)
            content = work(self.api, person, body)
            if request.url.path == "/api/me":
                content["csrf"] = csrf(secret)
            return JSONResponse(content)
        except Exception as error:
            return _error(error)

    async def sign_in(self, request: Request) -> Response:
        """Turns the token of a link into a cookie."""
        try:
            check_origin(request.headers)
            body = await _json(request)
            token = body.get("token")
            if not isinstance(token, str) or not 1 <= len(token) <= 200:
                raise Refused(400, "token must be text of 1 to 200 characters.")
            found = await anyio.to_thread.run_sync(
                self.api.store.start_session, token, SESSION_DAYS
            )
            if found is None:
                self._count_failure(request)
                raise Refused(401, "this link is not valid, or has expired; ask for a new one.")
        except Exception as error:
            return _error(error)
        response = JSONResponse({"name": found[0].name, "admin": found[0].admin})
        response.set_cookie(
            self.cookie,
            found[1],
            max_age=SESSION_DAYS * 86_400,
            httponly=True,
            samesite="strict",
            secure=self.secure,
        )
        return response

    def _count_failure(self, request: Request) -> None:
        peer = request.client.host if request.client else ""
        if not self.failures.allows(peer):
            raise Refused(429, "too many failed attempts; wait a minute.", retry_after=60)


def _next(api: Api, person: Annotator, query: Mapping[str, str]) -> dict[str, Any]:
    words = [query.get("count", "1"), *query.get("known", "").split(",")]
    if any(
        len(word) > 18 or not (word.isascii() and word.isdigit() or word == "") for word in words
    ):
        raise Refused(400, "count and known must be whole numbers.")
    known = frozenset(int(word) for word in words[1:11] if word)
    return api.next(person, int(words[0] or 1), known)


def _overview(api: Api, person: Annotator, _: Any) -> dict[str, Any]:
    if not person.admin:
        raise Refused(403, "this page is the administrator's; open the administrator's link.")
    return api.overview()


async def _json(request: Request) -> dict[str, Any]:
    """Reads a JSON object of a bounded size in a bounded time."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > MOST_BYTES:
        raise Refused(413, f"the request must be {MOST_BYTES:,} bytes at most.")
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > MOST_BYTES:
                    raise Refused(413, f"the request must be {MOST_BYTES:,} bytes at most.")
        body = json.loads(content)
    except TimeoutError as error:
        raise Refused(408, "the request took too long.") from error
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the request is not JSON.") from error
    except ClientDisconnect as error:
        raise Refused(400, "the request broke off.") from error
    if not isinstance(body, dict):
        raise Refused(400, "the request must be a JSON object.")
    return body


def _error(error: Exception) -> Response:
    if isinstance(error, Refused):
        return error.response()
    if isinstance(error, Conflict):
        return Refused(409, str(error)).response()
    if isinstance(error, StoreError):
        return Refused(503, str(error), retry_after=5).response()
    if isinstance(error, InputError):
        return Refused(400, str(error)).response()
    raise error


def _page(name: str) -> Callable[[Request], Any]:
    made = page(name)

    async def endpoint(request: Request) -> Response:
        return Response(made.body, media_type="text/html; charset=utf-8")

    return endpoint


async def _missing(request: Request, error: Exception) -> Response:
    return Refused(getattr(error, "status_code", 404), "there is nothing here.").response()


async def _failed(request: Request, error: Exception) -> Response:
    return Refused(500, "the server failed; nothing was saved. Try again.").response()
