"""Keep Python's garbage collector off objects that live as long as a run.

A traced graph is some hundred thousand Python objects. A step does not touch them, so the system
may put their memory aside. A full collection walks over all objects, in mid-run, and waits for what
was put aside. Frozen objects are not walked over. They still die when their last reference goes;
those that refer to each other in a circle do once they are no longer frozen.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class _Freezing:
    """Whether graphs are frozen at the moment: for how many runs, and whether we may."""

    runs = 0
    allowed = False

    @classmethod
    def begin(cls) -> None:
        if cls.runs == 0:
            # A program that freezes objects itself would lose its own at `gc.unfreeze`.
            cls.allowed = gc.get_freeze_count() == 0
        cls.runs += 1

    @classmethod
    def end(cls) -> None:
        cls.runs -= 1
        if cls.runs == 0 and cls.allowed:
            gc.unfreeze()


@contextmanager
def frozen_graphs() -> Iterator[None]:
    """Let `freeze_graphs` freeze until the block ends, or the outermost of several.

    A program that has frozen objects before (`gc.freeze`) keeps charge of it: nothing changes.
    """
    _Freezing.begin()
    try:
        yield
    finally:
        _Freezing.end()


def freeze_until_exit() -> None:
    """Freeze what is alive and what `freeze_graphs` adds until the process ends."""
    _Freezing.begin()
    freeze_graphs()


def freeze_graphs(collect: bool = True) -> None:
    """Freeze what is alive, after a collection, where `frozen_graphs` allows it."""
    if _Freezing.runs and _Freezing.allowed:
        if collect:
            gc.collect()
        gc.freeze()
