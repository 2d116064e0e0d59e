"""The server ends in good order, whenever it is asked to."""

import os
import signal
import socket

import pytest

from dpo_keras.feedback.annotation_server import bind, run


async def app(scope, receive, send):
    raise AssertionError("nobody asks")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_as_soon_as_the_server_is_announced_ends_it(number):
    """As from a program that reads the links and has enough of it at once."""
    listening = bind("127.0.0.1", 0)
    before = signal.getsignal(number)
    run(app, listening, announce=lambda: os.kill(os.getpid(), number))
    assert signal.getsignal(number) is before
    assert listening.fileno() == -1, "nobody waits at a closed door"


def test_connections_are_accepted_when_the_server_is_announced():
    listening = bind("127.0.0.1", 0)

    def announce():
        socket.create_connection(listening.getsockname(), timeout=5).close()
        os.kill(os.getpid(), signal.SIGINT)

    run(app, listening, announce)
