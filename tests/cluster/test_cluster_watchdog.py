"""Workers that meet, agree, stop and end together. Threads stand for the processes."""

import contextlib
import queue
import socket
import time

import pytest
from cluster_workers import Worker, clusters, workers

from dpo_keras.cluster import ClusterError, RunStopped, Watchdog
from dpo_keras.cluster.watchdog import _LAG_PAUSE, _LAG_TRIES
from dpo_keras.errors import InputError


@pytest.fixture(autouse=True)
def shared_secret(monkeypatch):
    monkeypatch.setenv("DPO_KERAS_CLUSTER_SECRET", "s" * 32)


def test_workers_meet_in_any_order_and_say_goodbye():
    chief, *others = clusters(3)
    late = [Worker(cluster) for cluster in others]
    time.sleep(0.3)  # they have to try again until the chief is there
    everyone = [Worker(chief), *late]
    assert all(worker.met.wait(20) for worker in everyone)
    for worker in reversed(everyone):
        worker.leave()
    assert [worker.finish() for worker in everyone] == [None] * 3
    time.sleep(0.2)
    assert all(worker.ended.empty() for worker in everyone), "nobody was taken for lost"


def test_a_worker_that_does_not_come_is_named_by_everyone_in_time():
    first, second, third = clusters(3)
    there = [Worker(first, timeout=1.0), Worker(third, timeout=1.0)]
    for error in [worker.finish() for worker in there]:
        assert isinstance(error, ClusterError)
        assert f"{second.this} did not connect within 1 seconds" in str(error)
        assert "training.worker_timeout" in str(error)


def test_a_chief_that_does_not_come_is_named_in_time():
    first, second = clusters(2)
    error = Worker(second, timeout=0.5).finish()
    assert isinstance(error, ClusterError)
    assert f"{second.this} could not reach {first.this} within 0.5 seconds" in str(error)
    assert "Connection refused" in str(error)


def test_strangers_are_not_taken_for_workers():
    first, second = clusters(2)
    chief = Worker(first)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            stranger = socket.create_connection((first.this.host, first.this.port))
            break
    with stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        worker = Worker(second)
        assert worker.met.wait(20) and chief.met.wait(20)
    for one in (chief, worker):
        one.leave()
        assert one.finish() is None


def test_workers_started_differently_are_refused_and_told_why():
    first, second = clusters(2)
    both = [
        Worker(first, greeting={"the configuration": "1f"}),
        Worker(second, greeting={"the configuration": "2e"}),
    ]
    for worker in both:
        error = worker.finish()
        assert isinstance(error, InputError)
        assert f"{second.this} has the configuration 2e, but {first.this} has 1f" in str(error)


def test_a_port_in_use_is_named(monkeypatch):
    first, _ = clusters(2)
    monkeypatch.setattr("dpo_keras.cluster.meeting._check_port.__defaults__", (0.1,))
    with (
        socket.create_server((first.this.host, first.this.port)),
        pytest.raises(InputError, match=rf"port {first.this.port} of worker 0 .* in use"),
    ):
        Watchdog(first).meet(1.0)


def test_agreeing_waits_for_all_and_passes_where_all_have_the_same():
    passed = queue.Queue()

    def agree(value):
        return lambda watchdog: (watchdog.agree("step", value), passed.put(value))

    with workers(3) as everyone:
        for worker in everyone[:2]:
            worker.orders.put(agree(4))
        time.sleep(0.2)
        assert passed.empty(), "the third is not there yet"
        everyone[2].orders.put(agree(4))
        assert [passed.get(timeout=10) for _ in everyone] == [4, 4, 4]


def test_what_differs_is_refused_on_all_workers_with_each_ones_value():
    with workers(2) as everyone:
        for worker, step in zip(everyone, (4, 0), strict=True):
            worker.orders.put(lambda w, step=step: w.agree("newest checkpoint", step, "Share it."))
        for error in [worker.finish() for worker in everyone]:
            assert isinstance(error, InputError)
            one, other = (worker.cluster.this for worker in everyone)
            assert f"same newest checkpoint: {one} has 4, {other} has 0. Share it." in str(error)


def test_a_file_system_that_lags_behind_is_read_again(monkeypatch):
    monkeypatch.setattr("dpo_keras.cluster.watchdog._LAG_PAUSE", 0.01)
    seen, agreed = iter([0, 4]), queue.Queue()
    with workers(2) as (first, second):
        first.orders.put(lambda w: agreed.put(w.agree("step", 4, again=lambda: 4)))
        second.orders.put(lambda w: agreed.put(w.agree("step", 0, again=lambda: next(seen))))
        assert [agreed.get(timeout=10) for _ in range(2)] == [4, 4]
    assert list(seen) == [], "it was read twice: the first time it lagged still"


def test_the_time_for_that_is_longer_than_nfs_takes():
    """60 seconds: acdirmax of nfs(5)."""
    assert _LAG_PAUSE * _LAG_TRIES == 90


def test_storage_that_is_not_shared_is_refused_with_the_time_that_it_was_given(monkeypatch):
    monkeypatch.setattr("dpo_keras.cluster.watchdog._LAG_PAUSE", 0.001)
    monkeypatch.setattr("dpo_keras.cluster.watchdog._LAG_TRIES", 20)
    with workers(2) as everyone:
        for worker, step in zip(everyone, (4, 0), strict=True):
            worker.orders.put(lambda w, step=step: w.agree("step", step, again=lambda: step))
        for error in [worker.finish() for worker in everyone]:
            assert isinstance(error, InputError) and "same step, 0.02 seconds long:" in str(error)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_lost_worker_ends_all_others_with_its_name_and_how_to_resume(victim):
    with workers(3) as everyone:
        everyone[victim].die()
        for worker in everyone:
            if worker is not everyone[victim]:
                text, code = worker.ended.get(timeout=10)
                assert code == 1 and f"{everyone[victim].cluster.this} was lost" in text
                assert "--resume" in text


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("data.path is wrong."), 2, "refused its input: data.path is wrong."),
        (RuntimeError("loss is nan\nmore"), 1, "failed (RuntimeError: loss is nan)"),
        (RunStopped("SIGTERM", None), 75, "was stopped by SIGTERM"),
    ],
)
def test_a_worker_that_gives_up_ends_the_others_with_its_reason_and_code(
    error, code, words, monkeypatch
):
    monkeypatch.setattr("dpo_keras.cluster.watchdog._GRACE", 0.1)
    with workers(3) as everyone:
        everyone[1].leave(error)
        for worker in (everyone[0], everyone[2]):
            text, found = worker.ended.get(timeout=10)
            assert found == code and f"{everyone[1].cluster.this} {words}" in text


class UnavailableError(Exception):
    """Named like TensorFlow's, which is known by its name."""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "Graph execution error:\nCollective ops is aborted by: Error reported from "
            "/job:worker/task:1: The following tasks are unhealthy (stopped sending heartbeats):\n"
            "/job:worker/replica:0/task:1\nThe tasks have crashed.",
            "worker 1 (127.0.0.1:",
        ),
        ("Collective ops is aborted by: Socket closed", "a worker does not"),
    ],
)
def test_a_worker_that_hangs_is_named_as_far_as_tensorflow_knows_it(text, name, monkeypatch):
    monkeypatch.setattr("dpo_keras.cluster.watchdog._SILENCE", 0.1)
    with workers(2) as everyone:
        everyone[0].leave(UnavailableError(text))
        error = everyone[0].finish()
    assert isinstance(error, ClusterError)
    assert str(error).startswith(name) and "does not answer any more" in str(error)
    assert "--resume" in str(error)


def test_a_request_to_stop_reaches_every_worker():
    with workers(3) as everyone:
        everyone[1].stop.announce("SIGTERM")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not (
            everyone[0].stop.requested and everyone[2].stop.requested
        ):
            time.sleep(0.01)
        assert everyone[0].stop.reason == f"SIGTERM at {everyone[1].cluster.this}"
        assert everyone[2].stop.reason == everyone[0].stop.reason
