"""The secret that the workers of one run share: from the environment or the run directory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpo_keras.errors import InputError

_VARIABLE = "DPO_KERAS_CLUSTER_SECRET"
_FILE = ".cluster_secret"
_SHORTEST = 32  # characters: 128 bits in hexadecimal
_MAKE_ONE = f"export {_VARIABLE}=$(openssl rand -hex 32)"


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
    secret = secrets.token_hex(32)
    try:
        _write_file(path, secret)
        yield secret.encode()
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            if made_directory:
                path.parent.rmdir()  # fails if a run has begun in it


def _write_file(path: Path, secret: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            readable = os.fstat(handle).st_mode & 0o077
            file.write("" if readable else secret)
    except OSError as error:
        raise InputError(
            f"{path} can not be written ({error.strerror}), and the workers need the secret in it. "
            f"Give another output, or set the secret on all workers: {_MAKE_ONE}"
        ) from error
    if readable:
        raise InputError(
            f"{path} can be read by others, since its file system keeps no modes. Set the secret "
            f"on all workers instead: {_MAKE_ONE}"
        )


def worker_secret(directory: str | os.PathLike[str] | None) -> bytes | None:
    """Return the run's secret; None while the chief has not written its file."""
    given = _environment_secret()
    if given is not None:
        return given
    path = _file(directory)
    try:
        return path.read_bytes() or None
    except PermissionError as error:
        raise InputError(
            f"{path} is another user's: run all workers as one user, or set the secret on all of "
            f"them: {_MAKE_ONE}"
        ) from error
    except OSError:
        return None


def where_secret(directory: str | os.PathLike[str] | None) -> str:
    """Return where this process looks for the secret, for messages."""
    return _VARIABLE if _environment_secret() is not None else str(_file(directory))


def _environment_secret() -> bytes | None:
    secret = os.environ.get(_VARIABLE)
    if secret is None:
        return None
    if len(secret.strip()) < _SHORTEST:
        raise InputError(
            f"{_VARIABLE} must have at least {_SHORTEST} characters, the same on all "
            f"workers, got {len(secret.strip())}. Make one: {_MAKE_ONE}"
        )
    return secret.strip().encode()


def _file(directory: str | os.PathLike[str] | None) -> Path:
    if directory is None:
        raise InputError(
            f"the workers of TF_CONFIG need a secret that they share: set {_VARIABLE} to the "
            f"same value on all of them. Make one: {_MAKE_ONE}"
        )
    return Path(directory) / _FILE
