"""The server of the annotation page: Starlette answers requests, uvicorn listens."""

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeAlias
from urllib.parse import urlsplit

import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.annotation_api import Api, closed_page, content_security_policy, page
from dpo_keras.feedback.database import StoreError, sha256
from dpo_keras.feedback.judgements import Conflict
from dpo_keras.feedback.request_guard import (
    MAX_BODY,
    GuardMiddleware,
    RateLimit,
    Refused,
    check_csrf_token,
    check_origin,
    csrf_token,
)
from dpo_keras.feedback.store import Annotator, Store
from dpo_keras.utils import JSON

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
SESSION_DAYS = 30
BODY_SECONDS = 20.0

Work: TypeAlias = Callable[[Annotator, JSON], dict[str, JSON]]
Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


def make_app(
    store: Store,
    *,
    guidelines: str = "",
    assess: Callable[[Store], Mapping[str, JSON]] | None = None,
    hosts: Iterable[str] = (),  # names besides the loopback's by which the server is reached
    secure: bool = False,  # the page is reached by https, so cookies are sent by https only
    rate: float = 30.0,  # requests per second and session
    burst: float = 60.0,  # requests at once
) -> Starlette:
    """Make the server's application; see `Api` for guidelines and `assess`."""
    api = Api(store, guidelines, assess)
    sessions = _Sessions(store, secure, RateLimit(rate, burst), RateLimit(1.0, 20.0))
    routes = [
        Route("/", _page("annotate")),
        Route("/admin", _page("admin")),
        Route("/api/session", sessions.sign_in, methods=["POST"]),
        Route("/api/me", sessions.endpoint(lambda annotator, _: api.me(annotator))),
        Route("/api/next", sessions.endpoint(api.next)),
        Route("/api/admin", sessions.endpoint(lambda annotator, _: api.overview(annotator))),
        Route("/api/judgements", sessions.endpoint(api.submit), methods=["POST"]),
        Route("/api/undo", sessions.endpoint(api.undo), methods=["POST"]),
    ]
    allowed = LOOPBACK | {host.lower() for host in hosts}
    guard = Middleware(GuardMiddleware, policy=content_security_policy(), hosts=frozenset(allowed))
    handlers = dict.fromkeys((404, 405, 500, Refused, InputError), _error)
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)


class _Sessions:
    """Endpoints for signed-in people: who asks, may they, and what went wrong."""

    def __init__(self, store: Store, secure: bool, rates: RateLimit, failures: RateLimit):
        self.store, self.secure, self.rates, self.failures = store, secure, rates, failures
        # Cookies do not know ports: two rounds on one machine must not sign each other out.
        self.cookie = f"feedback_{store.id}"

    def endpoint(self, work: Work) -> Endpoint:
        """Make an endpoint whose work gets the annotator, and the query or the posted body."""

        async def endpoint(request: Request) -> Response:
            posted = request.method == "POST"
            body = await _json_body(request) if posted else dict(request.query_params)
            # One hop to a thread for all that touches the store: the loop never waits for the disk.
            return await anyio.to_thread.run_sync(self._answer, request, work, body)

        return endpoint

    def _answer(self, request: Request, work: Work, body: JSON) -> Response:
        secret = request.cookies.get(self.cookie, "")
        annotator = self.store.session(secret) if secret else None
        if annotator is None:
            self._count_failure(request)
            raise Refused(401, "you are not signed in; open your link again.")
        if not self.rates.allows(sha256(secret)):
            raise Refused(429, "too many requests; wait a second.", retry_after=1)
        if request.method == "POST":
            check_origin(request.headers)
            check_csrf_token(request.headers, secret)
        content = work(annotator, body)
        if request.url.path == "/api/me":
            content["csrf"] = csrf_token(secret)
        return JSONResponse(content)

    async def sign_in(self, request: Request) -> Response:
        """Exchange the token of a link for a cookie."""
        check_origin(request.headers)
        token = (await _json_body(request)).get("token")
        if not isinstance(token, str) or not 1 <= len(token) <= 200:
            raise Refused(400, "token must be text of 1 to 200 characters.")
        session = await anyio.to_thread.run_sync(self.store.start_session, token, SESSION_DAYS)
        if session is None:
            self._count_failure(request)
            raise Refused(401, "this link is not valid, or has expired; ask for a new one.")
        annotator, secret = session
        response = JSONResponse({"name": annotator.name, "admin": annotator.admin})
        response.set_cookie(
            self.cookie,
            secret,
            max_age=SESSION_DAYS * 86_400,
            httponly=True,
            samesite="strict",
            secure=self.secure,
        )
        return response

    def _count_failure(self, request: Request) -> None:
        if not self.failures.allows(request.client.host if request.client else ""):
            raise Refused(429, "too many failed attempts; wait a minute.", retry_after=60)


async def _json_body(request: Request) -> dict[str, JSON]:
    """Read a JSON object of a bounded size in a bounded time."""
    too_large = Refused(413, f"the request must be {MAX_BODY:,} bytes at most.")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > MAX_BODY:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > MAX_BODY:
                    raise too_large
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


def _page(name: str) -> Endpoint:
    body = page(name).body

    async def endpoint(request: Request) -> Response:
        return Response(body, media_type="text/html; charset=utf-8")

    return endpoint


async def _error(request: Request, error: Exception) -> Response:
    """Answer an error with a sentence for the person: JSON, or a page where a browser opens one."""
    answer = _refusal(error)
    if "text/html" not in request.headers.get("accept", ""):
        return answer.response()
    body = closed_page(answer.message[0].upper() + answer.message[1:])
    return Response(body, answer.status, media_type="text/html; charset=utf-8")


def _refusal(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, StoreError):
        return Refused(503, str(error), retry_after=5)
    if isinstance(error, InputError):
        return Refused(409 if isinstance(error, Conflict) else 400, str(error))
    if isinstance(error, HTTPException):
        return Refused(
            error.status_code, "there is nothing here; open the link that you were given."
        )
    return Refused(500, "the server failed; nothing was saved. Try again.")


def allowed_hosts(host: str, url: str | None) -> tuple[frozenset[str], bool]:
    """Return the names by which a server on `host` is reached, and whether by https."""
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(InputProblem("url", "must be like https://feedback.example.org", url))
        return frozenset({parts.hostname}), parts.scheme == "https"
    if host in ("0.0.0.0", "::"):
        raise InputError(
            f"host {host} listens on every address; say with --url how annotators reach it, for "
            "instance --url https://feedback.example.org."
        )
    return frozenset({host.lower()}), False


def bind(host: str, port: int) -> socket.socket:
    """Take an address for the server, port 0 any free one; nobody can connect before it listens."""
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
    """Serve until interrupted; `announce` is called once connections are accepted."""
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

    def end(*_: object) -> None:
        server.should_exit = True

    # Uvicorn takes signals once its loop runs. One that comes while it starts must end it as well,
    # and not raise KeyboardInterrupt at an arbitrary place.
    in_main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    before = {number: signal.signal(number, end) for number in signals}
    try:
        # From here on connections wait rather than fail, so that printed links work at once.
        listening.listen(512)
        announce()
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
