"""Other behaviour for a model's layers, for as long as a block of code runs.

KerasHub's backbones hand neither positions nor masks to their layers. What a layer should do
otherwise is put in its instance dictionary, in front of its class, and taken out again. While a
function is traced this decides what is in the graph; it changes no weight and no configuration.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

Swap = tuple[Any, str, Any]


@contextlib.contextmanager
def swapped(swaps: Iterable[Swap]) -> Iterator[None]:
    """Puts attributes in place of an object's own, and takes them out again at the end.

    Args:
        swaps: (object, name of the attribute, what it should be).

    Example:
        >>> class Layer:
        ...     def call(self): return "its own"
        >>> layer = Layer()
        >>> with swapped([(layer, "call", lambda: "another")]):
        ...     layer.call()
        'another'
        >>> layer.call(), vars(layer)
        ('its own', {})
    """
    missing = object()
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for owner, name, value in swaps:
            # Not setattr: Keras layers track what is set, and refuse some of it once built.
            attributes: dict[str, Any] = owner.__dict__
            before.append((attributes, name, attributes.get(name, missing)))
            attributes[name] = value
        yield
    finally:
        for attributes, name, value in reversed(before):
            if value is missing:
                attributes.pop(name, None)
            else:
                attributes[name] = value
