"""A lock that one process holds, on one machine or on storage that several machines share.

The operating system keeps it (`flock`) and frees it however the process ends. The file tells who
holds it. That text decides where the system cannot: not every network file system has such locks,
or honours them between machines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

from dpo_keras.utils import JSON

_BEAT = 15.0  # seconds between signs of life
_SILENCE = 120.0  # seconds without one, after which a process on another machine counts as gone
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockedError(Exception):
    """The lock is held; the message names its holder.

    Attributes:
        hint: what to do if the holder is gone, where that cannot be known here; else empty.
    """

    def __init__(self, holder: dict[str, JSON], hint: str):
        self.hint = hint
        known = "process" in holder
        since = f"since {holder.get('since')}"
        super().__init__(
            f"process {holder['process']} on {holder.get('host')} {since}"
            if known
            else "another process"
        )


class FileLock:
    """A lock at `path`, whose folder exists. The file is there only while the lock is held.

    A killed process leaves the file but not the lock.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._handle: int | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock; raise a `LockedError` if another process may hold it."""
        handle, held_by_system = self._open()
        holder = _read(handle)
        elsewhere = holder.get("host", "") != socket.gethostname()
        alive, hint = held_by_system is False, ""
        if held_by_system is None and not elsewhere:
            alive = _runs(holder)
        if elsewhere and holder:
            silent = _server_time(self.path.parent) - os.fstat(handle).st_mtime
            alive = alive or silent < _SILENCE
            hint = f"It gave a sign of life {max(silent, 0):.0f} seconds ago; if that process is "
            hint += f"gone, remove {self.path}."
        if alive:
            os.close(handle)
            raise LockedError(holder, hint)
        self._handle = handle
        self._beats = threading.Thread(target=self._beat, args=(handle,), daemon=True)
        self._beats.start()
        try:
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps(_this_process()).encode(), 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back, and remove the file."""
        if self._handle is None:
            return
        self._released.set()
        self._beats.join()
        if _same_file(self.path, self._handle):  # nobody has removed ours, and made another
            self.path.unlink()
        os.close(self._handle)
        self._handle = None

    def _open(self) -> tuple[int, bool | None]:
        """Open the file and try to lock it; None tells that this file system has no locks."""
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            held: bool | None = True
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return handle, False
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(handle)
                    raise
                held = None
            if _same_file(self.path, handle):
                return handle, held
            os.close(handle)  # its holder removed it in the meantime

    def _beat(self, handle: int) -> None:
        while not self._released.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(handle)


def _same_file(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _read(handle: int) -> dict[str, JSON]:
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
    except ValueError:  # empty, or not written to its end
        return {}
    return holder if isinstance(holder, dict) else {}


def _this_process() -> dict[str, JSON]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _runs(holder: dict[str, JSON]) -> bool:
    """Tell whether a process of this machine still runs; its number may be another's by now."""
    started = _start_of(holder.get("process", 0))
    return started is not None and started == holder.get("started")


def _start_of(process: int) -> str | None:
    """Return when a process started: which boot of the machine, and ticks since; None if gone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The name, in brackets, may hold anything.
        fields = (
            Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return f"{boot} {fields[19]}"


def _server_time(folder: Path) -> float:
    """Return the time of the machine that keeps a folder: clocks differ."""
    with tempfile.TemporaryFile(dir=folder) as fresh:
        return os.fstat(fresh.fileno()).st_mtime
