"""Workers of a cluster for the tests. Threads stand for the processes."""

import contextlib
import queue
import socket
import threading

from dpo_keras.cluster import Cluster, StopRequest, Task, Watchdog


def clusters(count):
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        ports = [one.getsockname()[1] for one in free]
    tasks = tuple(Task("worker", i, f"127.0.0.1:{port}") for i, port in enumerate(ports))
    return [Cluster(tasks, task) for task in tasks]


class Worker:
    """A worker in a thread: meets, does what it is told to, and keeps how it ended."""

    def __init__(self, cluster, timeout=20.0, greeting=None, run_directory=None):
        self.cluster, self.meeting = cluster, (timeout, greeting or {}, run_directory)
        self.ended, self.stop, self.error = queue.Queue(), StopRequest(), None
        self.met, self.orders = threading.Event(), queue.Queue()
        self.watchdog = Watchdog(
            cluster, self.stop, lambda text, code: self.ended.put((text, code))
        )
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        try:
            with self.watchdog.meet(*self.meeting):
                self.met.set()
                while (order := self.orders.get()) is not None:
                    order(self.watchdog)
        except BaseException as error:
            self.error = error

    def die(self):
        """What the kernel does for a process that is killed."""
        self.watchdog._tell = lambda *given, **message: None  # a dead process tells nobody anything
        for link in list(self.watchdog._links.values()):
            # The kernel closes all at once. Here the first may already have made others close.
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_RDWR)

    def leave(self, error=None):
        def raise_it(_):
            raise error

        self.orders.put(None if error is None else raise_it)

    def finish(self):
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.error


@contextlib.contextmanager
def workers(count, **options):
    started = [Worker(cluster, **options) for cluster in clusters(count)]
    assert all(worker.met.wait(20) for worker in started)
    yield started
    for worker in started:
        worker.leave()
