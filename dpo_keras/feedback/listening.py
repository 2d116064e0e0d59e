"""Where the server listens, by which names it is reached, and how it ends: uvicorn."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp

from dpo_keras.errors import InputError


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
