"""Type aliases for values that no type checker can describe."""

from typing import Any, TypeAlias

Tensor: TypeAlias = Any
"""A tensor of the active Keras backend, or anything `keras.ops.convert_to_tensor` takes.

Backends share no base class, so the alias documents what it cannot check.
"""

JSON: TypeAlias = Any
"""A value that `json` reads and writes: mappings, lists, text, numbers, booleans, None."""
