"""Modules and names that are imported when they are first used.

TensorFlow takes seconds to import. `dpo-keras validate` needs the names of objectives and of chat
templates, which stand beside code that computes with it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any


class Deferred:
    """Stand in for a module and import it at the first use of an attribute.

    Example:
        >>> ops = Deferred("keras.ops")
        >>> float(ops.sum([1.0, 2.0]))
        3.0
    """

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        """Return the module's attribute as it is now."""
        return getattr(importlib.import_module(self._name), attribute)


ops: Any = Deferred("keras.ops")


def deferred_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package, which imports a name from its module in `homes`."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get


def missing_package(name: str, extra: str) -> str:
    """Say which command installs a package; an empty string where it is installed.

    Example:
        >>> missing_package("numpy", extra="plots")
        ''
    """
    if importlib.util.find_spec(name) is not None:
        return ""
    return f"needs the package {name}, which is not installed: pip install 'dpo-keras[{extra}]'."
