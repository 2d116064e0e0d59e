"""Whoever reaches the meeting port without the secret changes nothing. Threads are processes."""

import contextlib
import json
import os
import socket
import threading
import time

import pytest
from cluster_workers import Worker, clusters

from dpo_keras.cluster import ClusterError, Watchdog
from dpo_keras.cluster.meeting import _listener
from dpo_keras.cluster.worker_links import Link, MessageSeal, parse_message
from dpo_keras.errors import InputError

SECRET = "s" * 32


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("DPO_KERAS_CLUSTER_SECRET", SECRET)


def reach(task):
    """Connects as a stranger does, once somebody listens there."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection((task.host, task.port), 5)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def meet_and_leave(chief, second):
    worker = Worker(second)
    for one in (chief, worker):
        assert one.met.wait(20), one.error
    for one in (chief, worker):
        one.leave()
        assert one.finish() is None


HELLO = {"place": 1, "addresses": ["another cluster"], "greeting": {}}
FORGED = {
    "unsealed": lambda body: body,
    "another secret": MessageSeal(b"another", "worker", b"").seal,
    "no code": lambda body: b" " + body,
    "nested": lambda body: b"[" * 100_000,
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_hello_changes_nothing(kind, secret):
    first, second = clusters(2)
    chief = Worker(first)
    with reach(first.this) as stranger:
        line = FORGED[kind](json.dumps(HELLO).encode())
        stranger.sendall(b"0" * 64 + b"\n" + line + b"\n")
        meet_and_leave(chief, second)


def test_what_a_worker_said_can_not_be_said_again(secret):
    """The random number of the chief is another on each connection."""
    first, second = clusters(2)
    said = b""
    with _listener(first.this) as listener:
        worker = Worker(second)
        with listener.accept()[0] as connection:
            connection.sendall(b"0" * 64 + b"\n")
            while said.count(b"\n") < 2:
                said += connection.recv(1 << 16)
    assert b"addresses" in said, "the nonce and the sealed hello"
    chief = Worker(first)
    with reach(first.this) as stranger:
        stranger.sendall(said)
        for one in (chief, worker):
            assert one.met.wait(20), one.error
        assert len(chief.watchdog._links) == 1 and stranger.recv(1000).count(b"\n") == 1
    for one in (chief, worker):
        one.leave()
        assert one.finish() is None


def test_a_sealed_line_counts_once_and_only_in_its_direction():
    sender, receiver = (MessageSeal(b"k", "worker", b"n") for _ in range(2))
    first, second = sender.seal(b"bye"), sender.seal(b"bye")
    assert first != second
    assert receiver.unseal(first) == b"bye" and receiver.unseal(first) is None
    assert MessageSeal(b"k", "chief", b"n").unseal(first) is None
    assert MessageSeal(b"k", "worker", b"m").unseal(first) is None


def test_a_false_chief_can_not_end_a_worker_with_its_words(secret):
    first, second = clusters(2)
    with _listener(first.this) as listener:
        worker = Worker(second, timeout=0.6)

        def refuse():
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as connection:
                        body = json.dumps({"refused": ["Delete everything."]}).encode()
                        connection.sendall(b"0" * 64 + b"\n" + body + b"\n")
                        connection.recv(1 << 16)

        threading.Thread(target=refuse, daemon=True).start()
        error = worker.finish()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
    assert isinstance(error, ClusterError) and "Delete" not in str(error)
    assert "did not show the secret that DPO_KERAS_CLUSTER_SECRET has here" in str(error)


def test_a_client_of_one_byte_now_and_then_does_not_outlive_the_timeout(secret):
    first, _ = clusters(2)
    started = time.monotonic()
    chief = Worker(first, timeout=0.8)
    with reach(first.this) as stranger:
        while chief.thread.is_alive() and time.monotonic() - started < 10:
            with contextlib.suppress(OSError):
                stranger.sendall(b"0")
            time.sleep(0.05)
    assert isinstance(chief.finish(), ClusterError) and time.monotonic() - started < 3


def test_a_whole_message_has_the_time_and_not_each_byte_of_it():
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        link = Link(server.accept()[0], b"secret", is_chief=True)

    def send_slowly():
        for _ in range(20):
            theirs.sendall(b"0")
            time.sleep(0.05)

    drip = threading.Thread(target=send_slowly)
    drip.start()
    started = time.monotonic()
    assert link.receive(0.2) is None and time.monotonic() - started < 0.7
    drip.join()
    theirs.close()
    link.close()


def test_silent_connections_keep_no_worker_waiting(secret):
    first, second = clusters(2)
    chief = Worker(first)
    with contextlib.ExitStack() as stack:
        for _ in range(80):
            stack.enter_context(reach(first.this))
        started = time.monotonic()
        meet_and_leave(chief, second)
        assert time.monotonic() - started < 4, "less than the time that one of them has"


def test_a_silent_connection_is_closed_after_its_time(secret, monkeypatch):
    monkeypatch.setattr("dpo_keras.cluster.meeting._HELLO_SECONDS", 0.2)
    chief = Worker(clusters(2)[0], timeout=1.0)
    with reach(chief.cluster.this) as stranger:
        assert len(stranger.recv(65)) == 65, "the random number"
        assert stranger.recv(1) == b"" and chief.thread.is_alive()
    chief.finish()


def test_the_oldest_silent_connection_makes_room(secret, monkeypatch):
    monkeypatch.setattr("dpo_keras.cluster.meeting._MOST_STRANGERS", 1)
    chief = Worker(clusters(2)[0], timeout=1.0)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(reach(chief.cluster.this)) for _ in range(4)]
        assert {len(stranger.recv(65)) for stranger in strangers} == {65}
        assert strangers[0].recv(1) == b"", "three have room: one, and one for each worker"
        strangers[1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            strangers[1].recv(1)
    chief.finish()


def test_a_line_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("dpo_keras.cluster.worker_links._LONGEST_LINE", 100)
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        link = Link(server.accept()[0], b"secret", is_chief=True)
    with theirs:
        theirs.sendall(b"0" * 102)
        started = time.monotonic()
        assert link.receive(5.0) is None and time.monotonic() - started < 1
    link.close()


def test_another_secret_is_named_by_both(monkeypatch):
    first, second = clusters(2)
    monkeypatch.setenv("DPO_KERAS_CLUSTER_SECRET", SECRET)
    chief = Worker(first, timeout=1.0)
    reach(first.this).close()  # it has read its secret
    monkeypatch.setenv("DPO_KERAS_CLUSTER_SECRET", "another" * 10)
    worker = Worker(second, timeout=0.5)
    assert "did not show the secret that DPO_KERAS_CLUSTER_SECRET" in str(worker.finish())
    assert "Connections from 127.0.0.1 had another secret than" in str(chief.finish())


def test_the_chief_writes_a_secret_that_only_its_user_reads_and_takes_it_away(tmp_path):
    first, second = clusters(2)
    run = tmp_path / "run"
    worker = Worker(second, run_directory=run)
    chief = Worker(first, run_directory=run)
    for one in (chief, worker):
        assert one.met.wait(20), one.error
    assert not run.exists(), "no directory is in the way of the run"
    for one in (chief, worker):
        one.leave()
        assert one.finish() is None


def test_the_file_of_the_secret_has_mode_0600_and_is_new_each_time(tmp_path):
    (tmp_path / ".cluster_secret").write_text("of a chief that was killed")
    (tmp_path / ".cluster_secret").chmod(0o644)
    first, _ = clusters(2)
    chief = Worker(first, timeout=0.3, run_directory=tmp_path)
    reach(first.this).close()
    file = tmp_path / ".cluster_secret"
    assert file.stat().st_mode & 0o777 == 0o600 and len(file.read_text()) == 64
    assert isinstance(chief.finish(), ClusterError) and not file.exists()


def test_a_chief_that_can_not_write_the_file_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"\.cluster_secret can not be written \(Not a dir"):
        Watchdog(clusters(2)[0]).meet(1.0, run_directory=tmp_path / "file" / "run")


def test_a_file_system_without_modes_is_no_place_for_the_secret(tmp_path, monkeypatch):
    real = os.open
    monkeypatch.setattr(
        "os.open", lambda path, flags, *mode, **more: real(path, flags, 0o644, **more)
    )
    with pytest.raises(InputError, match="can be read by others"):
        Watchdog(clusters(2)[0]).meet(1.0, run_directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_workers_of_several_users_are_told(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(InputError, match="is another user's: run all workers as one user"):
        Watchdog(clusters(2)[1]).meet(1.0, run_directory=tmp_path)


def test_a_worker_without_the_secret_says_where_it_looks(tmp_path):
    _, second = clusters(2)
    error = Worker(second, timeout=0.3, run_directory=tmp_path).finish()
    assert f"no {tmp_path / '.cluster_secret'} yet: the chief writes it" in str(error)


@pytest.mark.parametrize("index", [0, 1])
def test_without_a_secret_nobody_meets(index):
    with pytest.raises(InputError, match="set DPO_KERAS_CLUSTER_SECRET to the same value on all"):
        Watchdog(clusters(2)[index]).meet(timeout=1.0)


def test_a_short_secret_is_refused(monkeypatch):
    monkeypatch.setenv("DPO_KERAS_CLUSTER_SECRET", "password")
    with pytest.raises(InputError, match=r"at least 32 characters, .* got 8\. Make one"):
        Watchdog(clusters(2)[0]).meet(timeout=1.0)


def test_the_chief_listens_where_tf_config_says():
    first, _ = clusters(2)
    with _listener(first.this) as listener:
        assert listener.getsockname() == ("127.0.0.1", first.this.port)


@pytest.mark.parametrize(
    "message",
    [
        *("[]", "1", "{}", "nonsense", "[" * 100_000),
        *('{"hello": true}', '{"bye": 1}', '{"bye": true, "lost": 1}', '{"stop": ["SIGTERM"]}'),
        '{"place": true, "addresses": [], "greeting": {}}',
        '{"place": -1, "addresses": [], "greeting": {}}',
        '{"place": 1, "addresses": "a:1", "greeting": {}}',
        '{"place": 1, "addresses": [], "greeting": []}',
        '{"place": 1, "addresses": [], "greeting": {"configuration": 7}}',
        *('{"vote": "1", "value": 2}', '{"votes": 1, "values": 4}', '{"refused": "no"}'),
        '{"left": 1, "code": "0", "why": "so"}',
    ],
)
def test_only_messages_of_the_schema_are_read(message):
    with pytest.raises(ValueError):
        parse_message(message.encode())


@pytest.mark.parametrize(
    "message",
    [
        {"lost": 0},  # only the chief says who was lost
        {"votes": 1, "values": [1, 2]},
        {"left": 0, "code": 0, "why": "ends the chief with success"},
        {"left": 1, "code": 0, "why": "ends the chief with success"},
        {"left": 0, "code": 2, "why": "speaks for another"},
        {"place": 1, "addresses": [], "greeting": {}},
    ],
)
def test_a_worker_that_says_what_only_others_may_is_taken_for_lost(message, secret):
    first, second = clusters(2)
    chief, worker = Worker(first), Worker(second)
    assert chief.met.wait(20) and worker.met.wait(20)
    worker.watchdog._links[0].send(**message)
    text, code = chief.ended.get(timeout=10)
    assert code == 1 and f"{second.this} was lost" in text
    for one in (chief, worker):
        one.leave()
        one.finish()
