"""A disk that loses power: of a folder, only what was synced is left, as POSIX allows."""

import os
from pathlib import Path


class UnsyncedDisk:
    """Records what `os.fsync` was called on; `after_power_failure` is what is left then.

    A file keeps the content that it was synced with, none if it never was. A directory keeps the
    names that it had when it was synced. What is there at the beginning is on the disk. New names
    may also come to the disk earlier than they must: `moments` has that case of each rename.
    """

    def __init__(self, folder, monkeypatch):
        self.folder = Path(folder)
        self.contents, self.names = {}, {}  # by inode
        self.moments = []  # what would be left after each call
        self._held = []  # open, so that no inode is used for another file
        for path in [self.folder, *self.folder.rglob("*")]:
            self._keep(os.open(path, os.O_RDONLY))
        fsync, replace = os.fsync, os.replace

        def recorded(handle):
            fsync(handle)
            self._keep(os.dup(handle))
            self.moments.append(self.after_power_failure())

        def replaced(source, target):
            replace(source, target)
            self.moments.append(self._with_all_names())

        monkeypatch.setattr(os, "fsync", recorded)
        monkeypatch.setattr(os, "replace", replaced)

    def _keep(self, handle):
        self._held.append(handle)
        number = os.fstat(handle).st_ino
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if not path.is_dir():
            self.contents[number] = path.read_bytes()
            return
        self.names[number] = {}
        for inner in path.iterdir():
            self._held.append(os.open(inner, os.O_PATH))
            self.names[number][inner.name] = (os.fstat(self._held[-1]).st_ino, inner.is_dir())

    def after_power_failure(self):
        """The content by path; a directory's is None."""
        found = {}

        def walk(number, prefix):
            for name, (inner, is_folder) in self.names.get(number, {}).items():
                found[prefix + name] = None if is_folder else self.contents.get(inner, b"")
                if is_folder:
                    walk(inner, f"{prefix}{name}/")

        walk(self.folder.stat().st_ino, "")
        return found

    def _with_all_names(self):
        paths = {str(path.relative_to(self.folder)): path for path in self.folder.rglob("*")}
        return {
            name: None if path.is_dir() else self.contents.get(path.stat().st_ino, b"")
            for name, path in paths.items()
        }

    def restore(self, folder):
        """Write what is left after a power failure to another folder."""
        for name, content in self.after_power_failure().items():
            path = Path(folder) / name
            path.mkdir(parents=True) if content is None else path.write_bytes(content)
