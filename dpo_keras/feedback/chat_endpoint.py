"""An OpenAI-compatible chat endpoint: requests with retries, waits and limits."""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from types import ModuleType
from typing import TYPE_CHECKING

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.text import shortened, visible

if TYPE_CHECKING:
    import httpx2

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before a question is asked again
_AGAIN = {408, 409, 425, 429}  # and 500 to 599
_REFUSED = {401, 402, 403, 404, 405}  # which every other question would meet too


class EndpointError(Exception):
    """The endpoint cannot be used now; the message says what to do. Answers so far are kept."""


class QuestionError(Exception):
    """The endpoint does not take this question; it may take others."""


class ChatEndpoint:
    """Asks a chat endpoint from several threads.

    A request that fails (no connection, a timeout, 429, 5xx) is made again after a wait that
    doubles, with jitter, or that the endpoint asks for by `Retry-After`.

    Args:
        url: what `/chat/completions` follows, such as `https://api.openai.com/v1`.
        api_key_variable: the environment variable that holds the key; None sends none.
        timeout: seconds to wait for a connection, and for each part of an answer.
        patience: seconds for which a question is asked again before the endpoint counts as gone.
        requests_per_minute: the most; None: any number.

    Raises:
        InputError: naming what breaks a rule. No message holds the key.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_variable: str | None = None,
        timeout: float = 60.0,
        patience: float = 300.0,
        requests_per_minute: float | None = None,
    ):
        self.url = _address(url)
        self.patience = patience
        self._key = None if api_key_variable is None else _key(api_key_variable)
        self._turns = _Turns(requests_per_minute)
        self._stopped = threading.Event()
        self._timeout = timeout
        self._client: httpx2.Client | None = None

    def open(self) -> None:
        """Begin to take questions."""
        httpx = _httpx()
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(headers=headers, timeout=self._timeout, limits=limits)
        self._stopped.clear()

    def stop(self) -> None:
        """End all waiting: what is asked from now on raises EndpointError."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections, on which no thread may be waiting."""
        if self._client is not None:
            self._client.close()
        self._client = None

    def ask(self, body: Mapping[str, JSON]) -> str:
        """Send a request body and return the text of the first choice, empty where it has none.

        Raises:
            EndpointError: there was no answer within the patience, or the key is refused.
            QuestionError: the endpoint refused this body.
        """
        if self._client is None:
            raise EndpointError("the endpoint is not open")
        transport_error = _httpx().TransportError
        content = json.dumps(body).encode()
        began, failures = 0.0, 0
        while True:
            self._wait(self._turns.next())
            asked = None
            try:
                response = self._client.post(self.url, content=content)
            except transport_error as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                text = _text(response)
                if text is not None:
                    return text
                trouble = f"{response.status_code}: {self._words(response)}"
                self._check(response.status_code, trouble)
                asked = retry_after(response.headers, time.time())
            failures += 1
            began = began or time.monotonic()
            wait = asked if asked is not None else backoff(failures)
            if asked is not None:
                self._turns.pause(asked)  # the others, too
            if time.monotonic() - began + wait > self.patience:
                raise EndpointError(
                    f"{self.url} gave no answer for {time.monotonic() - began:.0f} seconds "
                    f"({shortened(trouble, 200)}), and the next try would be in {wait:.0f}. "
                    "Judgements so far are kept; the same command goes on."
                )
            self._wait(wait)

    def _check(self, status: int, trouble: str) -> None:
        if status in _AGAIN or status >= 500 or status == 200:  # 200 with something else than JSON
            return
        if status in _REFUSED or status < 400:
            raise EndpointError(
                f"{self.url} refuses requests ({trouble}). Look at the address, the model and the "
                "key. Judgements so far are kept."
            )
        raise QuestionError(f"{self.url} refused it ({trouble})")

    def _words(self, response: httpx2.Response) -> str:
        """Return the beginning of an error's text, without the key that it may repeat."""
        words = " ".join(response.text.split())
        return visible(shortened(words.replace(self._key, "***") if self._key else words, 200))

    def _wait(self, seconds: float) -> None:
        if self._stopped.wait(seconds) if seconds > 0 else self._stopped.is_set():
            raise EndpointError("stopped")


def backoff(failures: int, chance: Callable[[], float] = random.random) -> float:
    """Return the seconds to wait after so many failures: twice as long each time, with jitter.

    Example:
        >>> [backoff(failures, lambda: 1.0) for failures in (1, 2, 3, 100)]
        [0.5, 1.0, 2.0, 60.0]
    """
    # Half of it is random, so that clients that failed together do not come back together.
    longest = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(failures - 1, 30))
    return longest * (0.5 + 0.5 * chance())


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that `Retry-After` asks to wait: a number, or a date; None without it.

    Example:
        >>> retry_after({"retry-after": "2"}, 0.0)
        2.0
        >>> retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, 15.0)
        45.0
    """
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


class _Turns:
    """When the next request may be made, shared by the threads that make them."""

    def __init__(self, requests_per_minute: float | None):
        self._between = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def next(self) -> float:
        """Take a turn and return the seconds until it comes."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._between
            return turn - now

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _text(response: httpx2.Response) -> str | None:
    """Return the text of an answer; None where the response is none."""
    if response.status_code != 200:
        return None
    try:
        message = response.json()["choices"][0]["message"]
        text = message.get("content")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return text if isinstance(text, str) else ""


def _httpx() -> ModuleType:
    try:
        import httpx2
    except ImportError as error:
        raise InputError("an endpoint needs httpx2: pip install 'dpo-keras[judges]'.") from error
    return httpx2


def _address(url: str) -> str:
    httpx = _httpx()
    try:
        parsed: httpx2.URL | None = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = None
    if parsed is None or parsed.scheme not in ("http", "https") or not parsed.host:
        rule = "must be an address such as https://api.openai.com/v1"
        raise InputError(InputProblem("url", rule, url))
    if parsed.userinfo:
        rule = "must not hold a name or a password"
        raise InputError(InputProblem("url", rule, hint="Use judge.api_key_variable."))
    return str(parsed.copy_with(path=parsed.path.rstrip("/") + "/chat/completions"))


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        rule = "must name an environment variable that holds the key"
        hint = f"{variable} {'is not set' if not key else 'holds something else'}."
        raise InputError(InputProblem("api_key_variable", rule, variable, hint))
    return key
