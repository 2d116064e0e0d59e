"""Checks between network and store: host names, security headers, cross-site posts and rates."""

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 64 * 1024  # bytes
MAX_CALLERS = 10_000


class Refused(Exception):  # noqa: N818  # an answer to a request rather than a fault
    """A request is answered with an HTTP status, a sentence for the person, and seconds to wait."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        self.status, self.message, self.retry_after = status, message, retry_after
        super().__init__(message)

    def response(self) -> JSONResponse:
        """Return the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse({"error": self.message}, self.status, headers)


class GuardMiddleware:
    """Add security headers to every answer, and refuse unknown host names.

    A page of another site whose name was made to point here (DNS rebinding) sends that name.
    """

    def __init__(self, app: ASGIApp, policy: str, hosts: frozenset[str]):
        self.app = app
        self.hosts = hosts
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        app = self.app
        if host_name(Headers(scope=scope).get("host", "")) not in self.hosts:
            app = Refused(421, "this server does not answer to that host name.").response()
        await app(scope, receive, send_with_headers)


def host_name(host: str) -> str:
    """Return a Host header without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def check_origin(headers: Headers) -> None:
    """Refuse posts that a browser says came from another site, and posts that are not JSON."""
    origin = headers.get("origin")
    other_origin = origin and origin.partition("://")[2].lower() != headers["host"].lower()
    if other_origin or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused(403, "the request came from another site.")
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
