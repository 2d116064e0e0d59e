"""Checks an exported model: nothing in it that a server cannot run, and the numbers are right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorflow.core.protobuf import saved_model_pb2

from dpo_keras.errors import InputError
from dpo_keras.serving import standalone

Call = tuple[str, Mapping[str, Sequence[str]]]

_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")
_GROWING = ("LookupTableInsert", "LookupTableInsertV2")


@dataclass(frozen=True)
class GraphFindings:
    """What a SavedModel's graph holds.

    Args:
        operations: the names of all ops in it, sorted.
        faults: one sentence for each thing that a server could not run, or should not.
    """

    operations: tuple[str, ...]
    faults: tuple[str, ...]


def inspect_graph(path: str | Path) -> GraphFindings:
    """Reads a SavedModel's graph, without running it.

    A model that loads in Python may still fail in a server: functions marked `_XlaMustCompile`
    need XLA, which TensorFlow Serving leaves out (tensorflow/serving#2214), Python functions need
    Python. And a table that takes in new words grows as long as the server runs.

    Args:
        path: the SavedModel's directory.

    Returns:
        The ops and the faults.

    Raises:
        InputError: no SavedModel there.
    """
    file = Path(path) / "saved_model.pb"
    if not file.is_file():
        raise InputError(f"path must be the directory of a SavedModel, {file} does not exist.")
    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    operations: set[str] = set()
    faults = []
    for graph in (meta.graph_def for meta in saved.meta_graphs):
        nodes = list(graph.node)
        for function in graph.library.function:
            nodes += function.node_def
            if function.attr["_XlaMustCompile"].b:
                faults.append(f"function {function.signature.name} must be compiled by XLA")
        operations |= {node.op for node in nodes}
        faults += [
            f"node {node.name} ({node.op}) must be compiled by XLA"
            for node in nodes
            if "_XlaMustCompile" in node.attr and node.attr["_XlaMustCompile"].b
        ]
    for operation in sorted(operations):
        if operation in _PYTHON:
            faults.append(f"op {operation} calls Python")
        elif operation.startswith("Xla"):
            faults.append(f"op {operation} needs XLA")
        elif operation in _GROWING:
            faults.append(f"op {operation} fills a table that grows with every new word served")
    return GraphFindings(tuple(sorted(operations)), tuple(faults))


def run_standalone(path: str | Path, calls: Sequence[Call], timeout: float = 900) -> dict[str, Any]:
    """Calls signatures in a fresh process without Keras.

    Args:
        path: the SavedModel's directory.
        calls: signature and inputs, in order.
        timeout: seconds until the process is given up.

    Returns:
        `outputs` (a dict of lists per call), `signatures` (inputs and outputs of each),
        `custom_operations` (ops that TensorFlow alone does not have).

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    request = {
        "path": str(path),
        "calls": [{"signature": name, "inputs": dict(inputs)} for name, inputs in calls],
        "operations": list(inspect_graph(path).operations),
    }
    # -I: neither the working directory nor PYTHONPATH may lend the process anything.
    done = subprocess.run(
        [sys.executable, "-I", standalone.__file__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise RuntimeError(
            f"the exported model at {path} does not run outside Keras (exit {done.returncode}):\n"
            f"{said}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def check_graph(path: str | Path) -> GraphFindings:
    """As `inspect_graph`, and refuses a graph with faults.

    Args:
        path: the SavedModel's directory.

    Returns:
        The findings, without faults.

    Raises:
        RuntimeError: naming every fault.
    """
    found = inspect_graph(path)
    if found.faults:
        shown = "\n".join(f"  {fault}" for fault in found.faults[:20])
        raise RuntimeError(
            f"the exported graph cannot be served, {len(found.faults)} faults:\n{shown}\n"
            "Take jit_compile, tf.py_function and numpy_function out of the policy's layers."
        )
    return found


def largest_difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference, relative where values are above 1; infinite where texts differ.

    Args:
        found: numbers or texts.
        expected: as many.

    Returns:
        max |found - expected| / max(1, |expected|).

    Example:
        >>> largest_difference([1.0, 200.0], [1.0, 201.0]) < 0.005
        True
        >>> largest_difference(["a"], ["b"])
        inf
    """
    if len(found) != len(expected):
        return float("inf")
    if any(isinstance(value, str) for value in [*found, *expected]):
        return 0.0 if list(found) == list(expected) else float("inf")
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    gaps = np.abs(a - b) / np.maximum(1.0, np.abs(b))
    # NaN must not pass for a small difference.
    return float(np.where(np.isfinite(gaps), gaps, np.inf).max(initial=0.0))
