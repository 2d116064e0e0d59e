"""Checks between network and store: connections, host names, headers, other sites, and rates."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol  # written for uvicorn 0.41 to 0.54

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON

MAX_BODY = 64 * 1024  # bytes
MAX_CALLERS = 10_000
MAX_CONNECTIONS = 500
MAX_CONNECTIONS_OF_ADDRESS = 100  # a proxy is one address, too
HEADER_SECONDS = 10.0  # from connecting to the end of the first request's headers
KEEP_ALIVE_SECONDS = 30.0  # from an answer to the end of the next request's headers
BODY_SECONDS = 20.0  # for a request's body
ANSWER_SECONDS = 120.0  # from there to the end of the answer
CHECK_SECONDS = 2.0  # between two looks at these
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

logger = logging.getLogger(__name__)
_told: set[str] = set()


def warn_once(message: str, value: str = "") -> None:
    """Tell whoever runs the server, once: strangers can cause it as often as they like."""
    if message not in _told:
        _told.add(message)
        logger.warning(message, *([value] if value else []))


@dataclass(frozen=True)
class Address:
    """How browsers reach the server."""

    hosts: frozenset[str] = frozenset()  # names besides the loopback's
    origin: str = ""  # scheme, name and port of the page, where `--url` tells them
    path: str = ""  # below which the page is, without a slash at its end

    @property
    def secure(self) -> bool:
        """Return whether the page is reached by https."""
        return self.origin.startswith("https://")

    def encrypted(self, host: str) -> bool:
        """Return whether nobody can listen, of a server that listens on `host`."""
        return self.secure or host in LOOPBACK


def address_of(host: str, url: str | None) -> Address:
    """Return how a server that listens on `host`, perhaps behind a proxy at `url`, is reached."""
    if url is not None:
        return _address_at(url)
    if host in ("0.0.0.0", "::"):
        raise InputError(
            f"host {host} listens on every address; say with --url how annotators reach it, for "
            "instance --url https://feedback.example.org."
        )
    return Address(frozenset({host.lower()}))


def _address_at(url: str) -> Address:
    rule = "must be like https://feedback.example.org or https://example.org/feedback"
    problem = InputError(InputProblem("url", rule, url))
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise problem from error
    known = parts.scheme in ("http", "https") and host
    if not known or "@" in parts.netloc or parts.query or parts.fragment:
        raise problem
    origin = f"{parts.scheme}://{parts.netloc}".lower()
    if port == {"http": 80, "https": 443}[parts.scheme]:  # browsers leave it out
        origin = origin.removesuffix(f":{port}")
    return Address(frozenset({host or ""}), origin, parts.path.rstrip("/"))


class Refused(Exception):  # noqa: N818  # an answer to a request rather than a fault
    """A request is answered with an HTTP status, a sentence for the person, and seconds to wait."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        self.status, self.message, self.retry_after = status, message, retry_after
        super().__init__(message)

    def response(self) -> JSONResponse:
        """Return the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse({"error": self.message}, self.status, headers)


class GuardedProtocol(H11Protocol):
    """A connection that may not keep the server waiting, nor others out.

    Where there are too many, the one that has kept the server waiting longest makes room.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count a new connection and start its deadline."""
        super().connection_made(transport)
        self._address = _network(self.client[0] if self.client else "")
        self._started = False  # a request has begun
        self._wait(HEADER_SECONDS)
        self._check_deadline()
        ours = [one for one in self.connections if isinstance(one, GuardedProtocol)]
        same = [one for one in ours if one._address == self._address]
        if len(same) > MAX_CONNECTIONS_OF_ADDRESS:
            _make_room(same)
        if len(self.connections) > MAX_CONNECTIONS:
            _make_room(ours)

    def data_received(self, data: bytes) -> None:
        """Pass data on; headers that are complete end the wait for them."""
        super().data_received(data)
        if not self._started and self.conn.their_state is not h11.IDLE:
            self._started = True
            self._wait(ANSWER_SECONDS)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._started = False
        self._wait(KEEP_ALIVE_SECONDS)
        super().on_response_complete()  # may take up a request that came early
        if self.conn.their_state is not h11.IDLE:
            self._started = True
            self._wait(ANSWER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the checks."""
        super().connection_lost(exc)
        self._check.cancel()

    def _wait(self, seconds: float) -> None:
        self.since = self.loop.time()
        self._deadline = self.since + seconds

    def _check_deadline(self) -> None:
        # One timer that looks again costs less than one timer a request.
        if self.loop.time() >= self._deadline:
            self.drop()
        self._check = self.loop.call_later(CHECK_SECONDS, self._check_deadline)

    def waits_for_client(self) -> bool:
        """Return whether a request, or the rest of one, is still to come."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def drop(self) -> None:
        """End the connection at once."""
        self.connections.discard(self)  # `connection_lost` comes later
        self.transport.abort()


def _network(host: str) -> str:
    """Return whose connections are counted together: an IPv6 user has a whole /64."""
    if ":" not in host or host.startswith("::ffff:"):  # the latter is an IPv4 address
        return host
    return str(ipaddress.ip_network((host.partition("%")[0], 64), strict=False))


def _make_room(connections: list[GuardedProtocol]) -> None:
    waiting = [one for one in connections if one.waits_for_client()]
    # The newest is among them; it goes where all others are being answered.
    min(waiting, key=lambda one: one.since).drop()


class GuardMiddleware:
    """Add security headers to every answer, and refuse unknown host names.

    A page of another site whose name was made to point here (DNS rebinding) sends that name.
    """

    def __init__(self, app: ASGIApp, policy: str, address: Address):
        self.app, self.address = app, address
        self.hosts = LOOPBACK | address.hosts
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
            "Cache-Control": "no-store",
        }
        if address.secure and not address.path:  # else the host is not ours alone
            headers["Strict-Transport-Security"] = "max-age=31536000"
        self.headers = [(name.lower().encode(), text.encode()) for name, text in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.headers]
            await send(message)

        app = self.app
        host = host_name(Headers(scope=scope).get("host", ""))
        path = self.address.path
        if host not in self.hosts:
            app = _unknown_host(host)
        elif path and scope["path"] == path:
            # The page asks relative to its address, which therefore ends in a slash.
            app = RedirectResponse(f"{path}/", 308)
        elif path and scope["path"].startswith(f"{path}/"):
            # Some proxies pass the path on as it is, others cut it.
            scope = {**scope, "path": scope["path"].removeprefix(path)}
        await app(scope, receive, send_with_headers)


def _unknown_host(host: str) -> ASGIApp:
    name = host[:100] if host.isascii() and host.isprintable() else ""
    warn_once(
        "A request came for the host %r, which the server does not know as its own. If that is how "
        "annotators reach it, start it with --url and that address.",
        name,
    )
    return Refused(
        421,
        "this server does not answer to that host name; whoever runs it gives the page's address "
        "with --url.",
    ).response()


def host_name(host: str) -> str:
    """Return a Host header without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def check_origin(headers: Headers, address: Address) -> None:
    """Refuse posts that a browser says came from another site, and posts that are not JSON."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused(403, "the request came from another site.")
    origin = headers.get("origin", "").lower()
    # A proxy may give its own name for this server in Host, so the page's address counts as well.
    if origin not in ("", address.origin) and (
        origin.partition("://")[2] != headers["host"].lower()
    ):
        warn_once(
            "A request came from a page at %r, which the server does not know as its own. If that "
            "is how annotators reach it, start it with --url and that address.",
            origin[:100],
        )
        raise Refused(
            403,
            "the request came from another site, or the page is not at the address that the "
            "server knows; whoever runs it gives that address with --url.",
        )
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the request must be JSON.")


def check_csrf_token(headers: Headers, secret: str) -> None:
    """Refuse posts without the token of their session."""
    given, expected = headers.get("x-csrf-token", ""), csrf_token(secret)
    if not hmac.compare_digest(given.encode(), expected.encode()):
        raise Refused(403, "the request did not come from the page; load the page again.")


def csrf_token(secret: str) -> str:
    """Make the token of a session, which the page sends along with every post."""
    return hmac.new(secret.encode(), b"csrf", hashlib.sha256).hexdigest()


class RateLimit:
    """A token bucket for each caller: `rate` requests per second, `burst` at once."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self.burst, self.clock = rate, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, caller: str) -> bool:
        """Take one request from a caller's bucket; return False where it is empty."""
        now = self.clock()
        left, filled = self._buckets.pop(caller, (self.burst, now))
        left = min(self.burst, left + (now - filled) * self.rate)
        allowed = left >= 1
        self._buckets[caller] = (left - 1 if allowed else left, now)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return allowed


async def json_body(request: Request) -> dict[str, JSON]:
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
