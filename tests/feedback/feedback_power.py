"""A disk that forgets what it was not told to keep: SQLite's file system, its syncs recorded."""

import _sqlite3
import contextlib
import ctypes
import os
import sys
from pathlib import Path

from feedback_rounds import candidates, check_books, count

from dpo_keras.feedback import Settings, database, open_store

SYNC = 4  # the place of xSync in sqlite3_io_methods, whose layout is SQLite's stable interface
METHODS = 18


class _Methods(ctypes.Structure):
    _fields_ = [("version", ctypes.c_int), ("calls", ctypes.c_void_p * METHODS)]


class _File(ctypes.Structure):
    _fields_ = [("methods", ctypes.POINTER(_Methods))]


# SQLite keeps the pointer to a file's name, so it is passed on as it came.
_OPEN = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(_File), ctypes.c_int,
    ctypes.c_void_p,
)  # fmt: skip
_SYNC = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


class _FileSystem(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_int), ("file_size", ctypes.c_int), ("longest_path", ctypes.c_int),
        ("next", ctypes.c_void_p), ("name", ctypes.c_char_p), ("data", ctypes.c_void_p),
        ("open", ctypes.c_void_p),
    ]  # fmt: skip


_KEPT = []  # SQLite calls them as long as files are open, which they may be after a failed test


@contextlib.contextmanager
def recorded_syncs():
    """Yield the content of each file of SQLite as it was at its last sync, by path.

    Files that are opened within the block are recorded until they are closed.
    """
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))  # None: it is part of Python
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_FileSystem)
    system = library.sqlite3_vfs_find(None).contents
    true_open, opened = _OPEN(system.open), system.open
    synced, paths = {}, {}

    def record(true_sync, file, flags):
        result = true_sync(file, flags)
        synced[paths[file]] = Path(paths[file]).read_bytes()
        return result

    def replaced_open(vfs, name, file, flags, out_flags):
        result = true_open(vfs, name, file, flags, out_flags)
        address = ctypes.addressof(file.contents)
        if result == 0 and name and file.contents.methods:
            paths[address] = os.fsdecode(ctypes.string_at(name))
            methods = _Methods.from_buffer_copy(file.contents.methods.contents)
            true_sync = _SYNC(methods.calls[SYNC])
            sync = _SYNC(lambda file, flags: record(true_sync, file, flags))
            methods.calls[SYNC] = ctypes.cast(sync, ctypes.c_void_p).value
            file.contents.methods = ctypes.pointer(methods)
            _KEPT.append((methods, sync))
        return result

    replacement = _OPEN(replaced_open)
    _KEPT.append(replacement)
    system.open = ctypes.cast(replacement, ctypes.c_void_p)
    try:
        yield synced
    finally:
        system.open = opened


def after_power_failure(synced, path, folder):
    """Write what the disk was told to keep of a database, at this moment, to another folder."""
    folder.mkdir()
    for name in (path.name, f"{path.name}-wal"):
        if (content := synced.get(str(path.with_name(name)))) is not None:
            (folder / name).write_bytes(content)
    return folder / path.name


def judge_and_lose_power(folder):
    """The disk keeps of each file what it held when it was last synced, and nothing after."""
    path = folder / "feedback.sqlite"
    with recorded_syncs() as synced:
        store = open_store(path, Settings(), create=True)
        store.add(candidates(2))
        ann = store.add_annotator("ann")[0].id
        for turn in range(2):
            store.submit(ann, store.next(ann)[0].id, "left", key=f"k{turn}")
            found = open_store(after_power_failure(synced, path, folder / f"after {turn}"))
            assert count(found) == turn + 1
            check_books(found)
            found.close()
        # What nobody was promised may be lost: otherwise the test would see nothing.
        job = database.Job(lambda connection: store.undo(ann, 1, key="u"), durable=False)
        store.database.run_together([job])
        assert job.error is None and count(store) == 3
        found = open_store(after_power_failure(synced, path, folder / "undone"))
        assert count(found) == 2
        found.close()
        store.close()


if __name__ == "__main__":
    judge_and_lose_power(Path(sys.argv[1]))
