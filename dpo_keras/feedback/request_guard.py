"""What stands between network and store: headers, hosts, sizes, rates, and cross-site posts."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 64 * 1024
_MANY = 10_000


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: for the person, a full sentence.
        retry_after: seconds to wait, where waiting helps.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        self.status = status
        self.message = message
        self.retry_after = retry_after
        super().__init__(message)

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse({"error": self.message}, self.status, headers)


class Headered:
    """Adds the security headers to every answer, and refuses hosts that are not ours.

    A page of another site whose name was made to point here (DNS rebinding) sends that name.

    Args:
        app: what answers.
        policy: the Content-Security-Policy.
        hosts: names that this server is reached by, without ports.
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
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def headered(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers[name] = value
            await send(message)

        if host_name(Headers(scope=scope).get("host", "")) not in self.hosts:
            refused = Refused(421, "this server does not answer to that host name.")
            await refused.response()(scope, receive, headered)
            return
        await self.app(scope, receive, headered)


def host_name(host: str) -> str:
    """A Host header without its port.

    Args:
        host: the header.

    Example:
        >>> host_name("LocalHost:8000"), host_name("[::1]:8000")
        ('localhost', '::1')
    """
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def check_same_site(headers: Headers, secret: str) -> None:
    """Refuses posts that did not come from our own page.

    Args:
        headers: of the request.
        secret: of the session.

    Raises:
        Refused: 403.
    """
    check_origin(headers)
    if not hmac.compare_digest(headers.get("x-csrf-token", "").encode(), csrf(secret).encode()):
        raise Refused(403, "the request did not come from the page; load the page again.")


def check_origin(headers: Headers) -> None:
    """Refuses posts that a browser says came from elsewhere, and posts that are not JSON.

    Args:
        headers: of the request.

    Raises:
        Refused: 403 or 415.
    """
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != headers["host"].lower():
        raise Refused(403, "the request came from another site.")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused(403, "the request came from another site.")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the request must be JSON.")


def csrf(secret: str) -> str:
    """The token that the page sends along with every post; it cannot be made without the session.

    Args:
        secret: of the session.
    """
    return hmac.new(secret.encode(), b"csrf", hashlib.sha256).hexdigest()


class Rates:
    """A bucket of requests for each caller, filled at a steady rate.

    Args:
        rate: requests per second.
        burst: requests at once.
        clock: seconds.

    Example:
        >>> now = [0.0]
        >>> rates = Rates(rate=1, burst=2, clock=lambda: now[0])
        >>> [rates.allows("ann") for _ in range(3)]
        [True, True, False]
        >>> now[0] = 1.0
        >>> rates.allows("ann"), rates.allows("ann"), rates.allows("bob")
        (True, False, True)
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self.burst, self.clock = rate, burst, clock
        self._left: OrderedDict[Any, tuple[float, float]] = OrderedDict()

    def allows(self, caller: Any) -> bool:
        """Takes one request from a caller's bucket; False where it is empty.

        Args:
            caller: whoever is counted.
        """
        now = self.clock()
        left, then = self._left.pop(caller, (self.burst, now))
        left = min(self.burst, left + (now - then) * self.rate)
        allowed = left >= 1
        self._left[caller] = (left - 1 if allowed else left, now)
        if len(self._left) > _MANY:
            self._left.popitem(last=False)
        return allowed
