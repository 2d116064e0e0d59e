"""TCP connections from each worker to the chief: one sealed line of JSON per message."""

from __future__ import annotations

import hmac
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from dpo_keras.cluster.tf_config import Cluster
from dpo_keras.utils import JSON

Message = dict[str, JSON]
_LONGEST_LINE = 1 << 20
# Names of what TensorFlow raises when a peer is gone: this package does not import TensorFlow.
_PEER_ERRORS = {
    *("UnavailableError", "AbortedError", "CancelledError"),
    *("DeadlineExceededError", "FailedPreconditionError"),
}
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


class ClusterError(RuntimeError):
    """A worker is missing or was lost. The input is not at fault."""


def lost_peer(cluster: Cluster, error: BaseException | None) -> str | None:
    """Return the task whose heartbeats TensorFlow misses; None if the error has another cause."""
    if type(error).__name__ not in _PEER_ERRORS:
        return None
    found = re.search(r"unhealthy.*?/job:(\w+)/replica:0/task:(\d+)", str(error), re.DOTALL)
    silent = found and (found[1], int(found[2]))
    named = (str(task) for task in cluster.in_step if (task.type, task.index) == silent)
    return next(named, "a worker")


class MessageSeal:
    """Authenticate the messages of one direction of one connection.

    HMAC-SHA256 over a counter and the message, under a key that is derived from the secret and from
    a random number of each side. A message that is changed, sent again, left out, or taken from
    another connection or direction does not fit.

    Example:
        >>> sender, receiver = (MessageSeal(b"secret", "chief", b"random") for _ in range(2))
        >>> sealed = sender.seal(b"stop")
        >>> receiver.unseal(sealed), receiver.unseal(sealed)
        (b'stop', None)

    References:
        https://www.rfc-editor.org/rfc/rfc2104
    """

    def __init__(self, secret: bytes, sender: str, nonces: bytes):
        label = f"dpo-keras cluster, messages of the {sender}:".encode()
        self._key = hmac.digest(secret, label + nonces, "sha256")
        self._count = 0

    def seal(self, body: bytes) -> bytes:
        """Return a message with its authentication code in front."""
        return self._next_code(body) + b" " + body

    def unseal(self, line: bytes) -> bytes | None:
        """Return the message of a sealed line; None if it is not the one that is due."""
        code, _, body = line.partition(b" ")
        return body if hmac.compare_digest(code, self._next_code(body)) else None

    def _next_code(self, body: bytes) -> bytes:
        counter = self._count.to_bytes(8, "big")
        self._count += 1
        return hmac.new(self._key, counter + body, "sha256").hexdigest().encode()


def _is_count(value: JSON) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: JSON) -> bool:
    return isinstance(value, str)


def _are_texts(value: JSON) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


_FIELDS: dict[str, Callable[[JSON], bool]] = {
    **dict.fromkeys(("place", "vote", "votes", "left", "lost", "code"), _is_count),
    **dict.fromkeys(("missing", "why", "stop"), _is_text),
    **dict.fromkeys(("accepted", "welcome", "bye"), lambda value: value is True),
    **dict.fromkeys(("addresses", "refused"), _are_texts),
    "greeting": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "value": lambda value: True,
    "values": lambda value: isinstance(value, list),
}
_MESSAGES: tuple[set[str], ...] = (
    *({"place", "addresses", "greeting"}, {"accepted"}, {"welcome"}, {"refused"}, {"missing"}),
    *({"vote", "value"}, {"votes", "values"}),
    *({"bye"}, {"left", "code", "why"}, {"lost"}, {"stop"}),
)


def parse_message(body: bytes) -> Message:
    """Read a message; raise ValueError if it is not one of those that workers send."""
    try:
        message = json.loads(body)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(message, dict) or set(message) not in _MESSAGES:
        raise ValueError("no message of a worker")
    if not all(_FIELDS[name](value) for name, value in message.items()):
        raise ValueError("a field of another type")
    return message


class Link:
    """A connected TCP socket that carries sealed lines of JSON.

    Each side first sends a random number, and seals what follows under a key that is derived from
    the shared secret and both numbers (`MessageSeal`). Only sealed lines are parsed.

    A process that ends in any way closes its connections, and its peer reads the end at once. A
    machine that is gone closes nothing, so the kernel probes a silent connection and gives it up
    after about 30 seconds. No Python thread takes part in that, so a busy interpreter does no harm.

    Attributes:
        forged: whether a line came that does not fit the secret.
    """

    def __init__(self, connection: socket.socket, secret: bytes, is_chief: bool):
        self.socket, self.forged = connection, False
        self._secret, self._is_chief = secret, is_chief
        self._nonce = secrets.token_hex(32).encode()
        self._unread = bytearray()
        self._seals: tuple[MessageSeal, MessageSeal] | None = None  # of this side, of the peer
        self._sending = threading.Lock()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        with suppress(OSError):
            connection.sendall(self._nonce + b"\n")

    def send(self, **message: JSON) -> None:
        """Send a message. The reading side notices a peer that is gone."""
        with self._sending, suppress(OSError):
            if self._seals is not None:
                self.socket.sendall(self._seals[0].seal(json.dumps(message).encode()) + b"\n")

    def receive(self, seconds: float | None) -> Message | None:
        """Wait for a message; None if the connection ends, times out or carries something else.

        The first message is the peer's random number; nothing can be sent before.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            while (message := self.next_message()) is None:
                # The time is that of the whole message, or one byte now and then would extend it.
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self.socket.settimeout(left)
                self.read()
        except (OSError, ValueError):
            return None
        return message

    def read(self) -> None:
        """Read what the peer has sent; raise OSError or ValueError if it will send nothing more."""
        received = self.socket.recv(1 << 16)
        if not received:
            raise ConnectionError("the connection ended")
        self._unread += received

    def next_message(self) -> Message | None:
        """Take a message of what was read; None if it is not whole yet.

        Raises ValueError if it is not sealed with the secret, or no message of a worker.
        """
        line, end, rest = self._unread.partition(b"\n")
        if len(line) > _LONGEST_LINE:
            raise ValueError("the line is too long")
        if not end:
            return None
        self._unread = rest
        if self._seals is None:
            return self._begin(bytes(line))
        body = self._seals[1].unseal(bytes(line))
        if body is None:
            self.forged = True
            raise ValueError("the line is not sealed with the secret of this run")
        return parse_message(body)

    def _begin(self, nonce: bytes) -> Message:
        if not re.fullmatch(rb"[0-9a-f]{64}", nonce):
            raise ValueError("no random number of 32 bytes")
        both = self._nonce + nonce if self._is_chief else nonce + self._nonce
        chief, worker = (MessageSeal(self._secret, name, both) for name in ("chief", "worker"))
        self._seals = (chief, worker) if self._is_chief else (worker, chief)
        return {"nonce": nonce.decode()}

    def finish(self) -> None:
        """Close the sending side. What was sent still arrives."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()
