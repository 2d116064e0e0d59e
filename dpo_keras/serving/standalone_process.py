"""Ask an exported model in a process that has TensorFlow, but no Keras."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from dpo_keras.serving import standalone
from dpo_keras.serving.verification import Call, inspect_graph
from dpo_keras.utils import JSON


class StandaloneProcess:
    """A fresh process without Keras, for one question.

    It imports TensorFlow as soon as it is made, which takes seconds: make it before there is
    something to ask, and do other work until it has answered.
    """

    def __init__(self) -> None:
        # -I keeps the working directory and PYTHONPATH out of the process.
        self._process = subprocess.Popen(
            [sys.executable, "-I", standalone.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._listener = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        """Return the process."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process, whatever it is doing."""
        with self._process as process:
            process.kill()
            self._listener.shutdown()

    def ask(
        self, path: str | Path, calls: Sequence[Call], timeout: float = 900
    ) -> Future[dict[str, JSON]]:
        """Put the question; see `run_standalone`."""
        request = {
            "path": str(path),
            "calls": [{"signature": name, "inputs": dict(inputs)} for name, inputs in calls],
            "operations": list(inspect_graph(path).operations),
        }
        return self._listener.submit(self._answer, request, timeout)

    def _answer(self, request: dict[str, JSON], timeout: float) -> dict[str, JSON]:
        said, errors = self._process.communicate(json.dumps(request), timeout)
        if self._process.returncode:
            reason = "\n".join(errors.strip().splitlines()[-15:])
            raise RuntimeError(
                f"the exported model at {request['path']} does not run outside Keras (exit "
                f"{self._process.returncode}):\n{reason}"
            )
        answer: dict[str, JSON] = json.loads(said.strip().splitlines()[-1])
        return answer


def run_standalone(
    path: str | Path, calls: Sequence[Call], timeout: float = 900
) -> dict[str, JSON]:
    """Call signatures in a fresh process without Keras.

    Args:
        path: the SavedModel's directory.
        calls: signature and inputs, in order.
        timeout: seconds after which the process is stopped.

    Returns:
        `outputs` (a dict of lists per call), `signatures` (inputs and outputs of each),
        `custom_operations` (ops that TensorFlow alone does not have).

    Raises:
        RuntimeError: the process failed. The message holds the end of what it wrote.
    """
    with StandaloneProcess() as process:
        return process.ask(path, calls, timeout).result()
