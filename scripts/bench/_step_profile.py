"""Where the time of a training step goes, by kind of operation, from TensorFlow's own profiler."""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import TypeAlias

Span: TypeAlias = tuple[int, int, str]
"""Start and end in picoseconds, and the name of what ran: `node:Kind`."""

PRODUCTS = ("MatMul", "BatchMatMul", "Einsum", "XlaDot", "Conv2D")
# XLA's kernels run under a name of their own, and may wait for threads.
_XLA = "CpuExecutable::ExecuteAsyncOnStream"
_OPERATION = re.compile(r"^(?P<node>[^:#]+):(?P<kind>_?[A-Z]\w+)(#|$)")
# They wait for other operations, which count themselves.
_CONTAINERS = ("While", "StatelessWhile", "If", "StatelessIf", "PartitionedCall", "IteratorGetNext")


def operation_spans(run: Callable[[], object]) -> list[Span]:
    """Run a function under the profiler; return a span for each operation that it executed."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        run()
        tf.profiler.experimental.stop()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(file.read_bytes())
    spans = []
    for plane in space.planes:
        for line in plane.lines:
            origin = line.timestamp_ns * 1000
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                if name == _XLA or _OPERATION.match(name):
                    begins = origin + event.offset_ps
                    spans.append((begins, begins + event.duration_ps, name))
    return spans


def kind_of(name: str) -> str:
    """Return the kind of operation that a span's name ends with; "XLA" for XLA's kernels."""
    match = _OPERATION.match(name)
    return "XLA" if match is None else match["kind"]


def is_product(kind: str) -> bool:
    """Tell whether a kind of operation multiplies matrices, as the arithmetic of a step counts."""
    return any(part in kind for part in PRODUCTS)


def shares(spans: Iterable[Span], label: Callable[[str], str] = kind_of) -> dict[str, float]:
    """Divide time among what ran: milliseconds for each label, the time that nothing ran as "".

    Where several operations run at once, each gets an equal part of that time.
    """
    spans = [span for span in spans if kind_of(span[2]) not in _CONTAINERS]
    changes = [(begin, 1, label(name)) for begin, _, name in spans]
    changes += [(end, -1, label(name)) for _, end, name in spans]
    found: dict[str, float] = collections.defaultdict(float)
    running: collections.Counter[str] = collections.Counter()
    before = min(span[0] for span in spans)
    for now, change, name in sorted(changes):
        passed, at_once = (now - before) / 1e9, running.total()
        if not at_once:
            found[""] += passed
        for active, count in running.items():
            found[active] += passed * count / at_once
        running[name] += change
        if not running[name]:
            del running[name]
        before = now
    return dict(found)


def table(spans: list[Span], steps: int) -> list[tuple[str, str, float, str, float]]:
    """Return `(kind, "product" or "", ms per step, share, calls per step)`, longest first."""
    found = shares(spans)
    calls = collections.Counter(kind_of(name) for _, _, name in spans)
    total = sum(found.values())
    rows = []
    for kind, milliseconds in sorted(found.items(), key=lambda item: -item[1]):
        counts = "product" if is_product(kind) else ""
        share = f"{milliseconds / total:.1%}"
        rows.append((kind or "(none)", counts, milliseconds / steps, share, calls[kind] / steps))
    return rows
