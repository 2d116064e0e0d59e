"""Access to what a library keeps private, with a clear error once the library moves."""

from __future__ import annotations

import importlib.metadata
from typing import Any, NamedTuple


class Library(NamedTuple):
    """A library and the release whose private API this package was written for."""

    name: str
    package: str
    written_for: str


KERAS = Library("Keras", "keras", "3.15")
KERAS_HUB = Library("KerasHub", "keras-hub", "0.32")
TENSORFLOW = Library("TensorFlow", "tensorflow", "2.21")


def private(owner: object, name: str, library: Library) -> Any:
    """Return an attribute that a library does not promise to keep.

    Args:
        owner: an object, a class or a module of the library.
        name: the attribute.
        library: the library.

    Raises:
        RuntimeError: the installed release has no such attribute. Names the library, its release,
            the attribute, and the release to install.

    Example:
        >>> private("text", "_words", KERAS)
        Traceback (most recent call last):
        ...
        RuntimeError: Keras ... has no str._words, which dpo_keras uses. Install keras 3.15, ...
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        kind = getattr(owner, "__name__", type(owner).__name__)
        found = importlib.metadata.version(library.package)
        raise RuntimeError(
            f"{library.name} {found} has no {kind}.{name}, which dpo_keras uses. Install "
            f"{library.package} {library.written_for}, which dpo_keras was written for, or change "
            "dpo_keras.utils to the new name."
        ) from error
