"""Helpers that several stages share, each written once, and aliases for types.

Nothing here knows of preferences.
"""

from typing import Any, TypeAlias

Tensor: TypeAlias = Any
"""A tensor of the active Keras backend, or anything `keras.ops.convert_to_tensor` takes.

Backends share no base class, so the alias documents what it cannot check.
"""

JSON: TypeAlias = Any
"""A value that `json` reads and writes: mappings, lists, text, numbers, booleans, None."""
