"""The secret that the workers of one run share: from the environment or the run directory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpo_keras.errors import InputError

SECRET_VARIABLE = "DPO_KERAS_CLUSTER_SECRET"
SECRET_FILE = ".cluster_secret"
_SHORTEST = 32  # characters: 128 bits in hexadecimal
_MAKE_ONE = f"export {SECRET_VARIABLE}=$(openssl rand -hex 32)"


@contextmanager
def chief_secret(directory: str | os.PathLike[str] | None) -> Iterator[bytes]:
    """Yield the run's secret: of the environment, or a new one in a file of the run directory.

    The file has mode 0600 and is removed at the end, since every meeting has a secret of its own.
    """
    given = _environment_secret()
    if given is not None:
        yield given
        return
    path = _file(directory)
    made_directory = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    secret = secrets.token_hex(32)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise InputError(
                    f"{path} can be read by others: its file system has no modes. Set the secret "
                    f"on all workers instead: {_MAKE_ONE}"
                )
            file.write(secret)
        yield secret.encode()
    finally:
        path.unlink(missing_ok=True)
        if made_directory:
            with suppress(OSError):  # a run has begun in it
                path.parent.rmdir()


def worker_secret(directory: str | os.PathLike[str] | None) -> bytes | None:
    """Return the run's secret; None while the chief has not written its file."""
    given = _environment_secret()
    if given is not None:
        return given
    try:
        return _file(directory).read_bytes() or None
    except OSError:
        return None


def where_secret(directory: str | os.PathLike[str] | None) -> str:
    """Return where this process looks for the secret, for messages."""
    return SECRET_VARIABLE if _environment_secret() is not None else str(_file(directory))


def _environment_secret() -> bytes | None:
    secret = os.environ.get(SECRET_VARIABLE)
    if secret is None:
        return None
    if len(secret.strip()) < _SHORTEST:
        raise InputError(
            f"{SECRET_VARIABLE} must have at least {_SHORTEST} characters, the same on all "
            f"workers, got {len(secret.strip())}. Make one: {_MAKE_ONE}"
        )
    return secret.strip().encode()


def _file(directory: str | os.PathLike[str] | None) -> Path:
    if directory is None:
        raise InputError(
            f"the workers of TF_CONFIG need a secret that they share: set {SECRET_VARIABLE} to the "
            f"same value on all of them. Make one: {_MAKE_ONE}"
        )
    return Path(directory) / SECRET_FILE
