"""The server of the annotation page: Starlette answers requests, uvicorn listens."""

import asyncio
import gc
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TypeAlias

import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dpo_keras.errors import InputError
from dpo_keras.feedback.annotation_api import Api, closed_page, content_security_policy, page
from dpo_keras.feedback.database import Database, Job, StoreError, T, sha256
from dpo_keras.feedback.judgements import Conflict
from dpo_keras.feedback.request_guard import (
    KEEP_ALIVE_SECONDS,
    LOOPBACK,
    Address,
    GuardedProtocol,
    GuardMiddleware,
    RateLimit,
    Refused,
    check_csrf_token,
    check_origin,
    csrf_token,
    json_body,
    warn_once,
)
from dpo_keras.feedback.store import Annotator, Store
from dpo_keras.preferences.images import media_type
from dpo_keras.utils import JSON

SESSION_DAYS = 30
QUIET_SECONDS = 5.0  # without a request, after which the log moves into the store's file
BUSY_SECONDS = 5.0  # after which it does so while requests come

Work: TypeAlias = Callable[[Annotator, JSON], dict[str, JSON]]
Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


def make_app(
    store: Store,
    *,
    guidelines: str = "",
    assess: Callable[[Store], Mapping[str, JSON]] | None = None,
    address: Address = Address(),  # noqa: B008  # it cannot be changed
    rate: float = 30.0,  # requests per second and session
    burst: float = 60.0,  # requests at once
    api: Api | None = None,
    name: str = "annotate",
    further: Callable[["Sessions"], list[Route]] = lambda _: [],
) -> Starlette:
    """Make the server's application; see `Api` for guidelines and `assess`.

    Another page has a `name`, an `api` of its own, and `further` routes.
    """
    api = api or Api(store, guidelines, assess)
    sessions = Sessions(store, address, RateLimit(rate, burst))
    routes = [
        Route("/", _page(name)),
        Route("/admin", _page("admin")),
        Route("/api/next", sessions.endpoint(api.next, finish=api.with_texts)),
        Route("/api/image", sessions.image_endpoint(api.image)),
        Route("/api/judgements", sessions.endpoint(api.submit), methods=["POST"]),
        Route("/api/rankings", sessions.endpoint(api.submit_ranking), methods=["POST"]),
        Route("/api/undo", sessions.endpoint(api.undo), methods=["POST"]),
        Route("/api/me", sessions.endpoint(lambda annotator, _: api.me(annotator))),
        Route("/api/admin", sessions.slow_endpoint(lambda annotator, _: api.overview(annotator))),
        Route("/api/session", sessions.sign_in, methods=["POST"]),
        Route("/api/logout", sessions.log_out, methods=["POST"]),
        *further(sessions),
    ]
    guard = Middleware(GuardMiddleware, policy=content_security_policy(), address=address)
    handlers = dict.fromkeys((404, 405, 500, Refused, InputError), _error)
    app = Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)
    app.router.redirect_slashes = False  # it does not know of a path before ours
    return app


class _Together:
    """Runs what waits for the store in one transaction, so that the disk confirms once for all.

    It runs in the event loop: the store answers before a thread would have been handed work.
    """

    def __init__(self, database: Database):
        self.database = database
        self._waiting: list[tuple[Job, asyncio.Future[None]]] = []
        self._quiet: asyncio.TimerHandle | None = None
        self._moved = 0.0

    async def run(self, work: Callable[[], T], *, durable: bool) -> T:
        """Run work with everything that other requests of this moment want."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._run_waiting, loop)
        job, done = Job(lambda _: work(), durable=durable), loop.create_future()
        self._waiting.append((job, done))
        await done
        if job.error is not None:
            raise job.error
        return job.result

    def _run_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, self._waiting = self._waiting, []
        self.database.run_together([job for job, _ in waiting])
        for _, done in waiting:
            if not done.done():  # its client may have gone
                done.set_result(None)
        if self._quiet is not None:
            self._quiet.cancel()
        self._quiet = loop.call_later(QUIET_SECONDS, self._move_log, loop, True)
        if loop.time() > self._moved + BUSY_SECONDS:
            self._move_log(loop, False)

    def _move_log(self, loop: asyncio.AbstractEventLoop, quiet: bool) -> None:
        self._moved = loop.time()
        loop.run_in_executor(None, partial(self.database.checkpoint, truncate=quiet))


class Sessions:
    """Endpoints for signed-in people: who asks, may they, and what went wrong."""

    def __init__(self, store: Store, address: Address, rates: RateLimit):
        self.store, self.address, self.rates = store, address, rates
        self.failures = RateLimit(1.0, 20.0)  # by address
        self.sign_ins = RateLimit(0.1, 10.0)  # by link
        self.together = _Together(store.database)
        # Cookies do not know ports: two rounds on one machine must not sign each other out. The
        # prefixes keep other hosts of a domain, and pages without https, from setting the cookie.
        prefix = ("__Secure-" if address.path else "__Host-") if address.secure else ""
        self.cookie = f"{prefix}feedback_{store.id}"

    def endpoint(
        self, work: Work, finish: Callable[[dict[str, JSON]], Awaitable[None]] | None = None
    ) -> Endpoint:
        """Make an endpoint whose work gets the annotator, and the query or the posted body.

        `finish` completes the answer after the transaction.
        """

        async def endpoint(request: Request) -> Response:
            posted = request.method == "POST"
            body = await json_body(request) if posted else dict(request.query_params)
            answer = partial(self._answer, request, work, body)
            # A lease that is lost in a power failure is given again.
            content = await self.together.run(answer, durable=posted)
            if finish is not None:
                await finish(content)
            return JSONResponse(content)

        return endpoint

    def slow_endpoint(self, work: Work) -> Endpoint:
        """Make an endpoint whose work only reads, and may take seconds."""

        async def endpoint(request: Request) -> Response:
            query = dict(request.query_params)
            content = await anyio.to_thread.run_sync(self._answer, request, work, query)
            return JSONResponse(content)

        return endpoint

    def image_endpoint(self, work: Callable[[Annotator, Mapping[str, str]], bytes]) -> Endpoint:
        """Make an endpoint that answers with an image."""

        def answer(request: Request) -> bytes:
            _, annotator = self.signed_in(request)
            return work(annotator, request.query_params)

        async def endpoint(request: Request) -> Response:
            content = await anyio.to_thread.run_sync(answer, request)
            return Response(content, media_type=media_type(content))

        return endpoint

    def _answer(self, request: Request, work: Work, body: JSON) -> dict[str, JSON]:
        secret, annotator = self.signed_in(request)
        content = work(annotator, body)
        if request.url.path.endswith("/api/me"):
            content["csrf"] = csrf_token(secret)
        return content

    def signed_in(self, request: Request) -> tuple[str, Annotator]:
        """Return the session's secret and whose it is; raise Refused where there is none."""
        secret = request.cookies.get(self.cookie, "")
        annotator = self.store.session(secret) if secret else None
        if annotator is None:
            self._count_failure(request)
            raise Refused(401, "you are not signed in; open your link again.")
        if not self.rates.allows(sha256(secret)):
            raise Refused(429, "too many requests; wait a second.", retry_after=1)
        if request.method == "POST":
            check_origin(request.headers, self.address)
            check_csrf_token(request.headers, secret)
        return secret, annotator

    async def sign_in(self, request: Request) -> Response:
        """Exchange the token of a link for a cookie."""
        check_origin(request.headers, self.address)
        token = (await json_body(request)).get("token")
        if not isinstance(token, str) or not 1 <= len(token) <= 200:
            raise Refused(400, "token must be text of 1 to 200 characters.")
        if not self.sign_ins.allows(sha256(token)):
            raise Refused(429, "this link was opened too often; wait a minute.", retry_after=60)
        session = await self.together.run(
            lambda: self.store.start_session(token, SESSION_DAYS), durable=True
        )
        if session is None:
            self._count_failure(request)
            raise Refused(401, "this link is not valid, or has expired; ask for a new one.")
        annotator, secret = session
        response = JSONResponse({"name": annotator.name, "admin": annotator.admin})
        self._set_cookie(response, secret, SESSION_DAYS * 86_400)
        return response

    async def log_out(self, request: Request) -> Response:
        """End the session of this browser."""
        secret, _ = await self.together.run(lambda: self.signed_in(request), durable=False)
        await self.together.run(lambda: self.store.end_session(secret), durable=True)
        response = JSONResponse({})
        self._set_cookie(response, "", 0)
        return response

    def _set_cookie(self, response: Response, secret: str, seconds: int) -> None:
        response.set_cookie(
            self.cookie,
            secret,
            max_age=seconds,
            path=self.address.path or "/",
            httponly=True,
            samesite="strict",
            secure=self.address.secure,
        )

    def _count_failure(self, request: Request) -> None:
        host = request.client.host if request.client else ""
        if self.address.origin and host in LOOPBACK:
            warn_once(
                "The proxy does not say whose requests it passes on, so that limits on wrong links "
                "count for all people together. In nginx: "
                "proxy_set_header X-Forwarded-For $remote_addr;"
            )
        if not self.failures.allows(host):
            raise Refused(429, "too many failed attempts; wait a minute.", retry_after=60)


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
        return Refused(error.status_code, "there is nothing here; open your link again.")
    return Refused(500, "the server failed; nothing was saved. Try again.")


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


def make_server(app: ASGIApp) -> uvicorn.Server:
    """Make the server that `run` runs."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=GuardedProtocol,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=int(KEEP_ALIVE_SECONDS),
            timeout_graceful_shutdown=5,
        )
    )


def run(
    app: ASGIApp, listening: socket.socket, announce: Callable[[], None] = lambda: None
) -> None:
    """Serve until interrupted; `announce` is called once connections are accepted."""
    server = make_server(app)

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
        # What was made until now stays; looking through it again and again would stop requests.
        gc.freeze()
        server.run(sockets=[listening])
    finally:
        gc.unfreeze()
        for number, handler in before.items():
            signal.signal(number, handler)
