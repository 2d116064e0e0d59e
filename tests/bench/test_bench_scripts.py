"""The benchmarks start, and the arithmetic that they count is what packed trees need."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "scripts/bench"


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("roofline")


# Two trees of (prompt, chosen, rejected) = (2, 1, 2) and (1, 1, 1), the second with empty places.
BATCH = {
    "padding_mask": np.array([[[1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0]]]),
    "reach": np.array([[[5, 4, 1, 2, 1]], [[3, 1, 1, 1, 1]]]),
    "owner": np.array([[0, 1, 1], [0, 1, -1]]),
    "weight": np.ones((2, 1)),
}


@pytest.mark.parametrize("name", ["against_trl", "forests", "roofline", "memory", "scaling"])
def test_every_benchmark_starts_and_can_write_json(name):
    command = [sys.executable, str(BENCH / f"{name}.py"), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "--json" in said


def test_work_is_counted_off_the_batch(roofline):
    # Of the first tree by hand, the prompt's 1 + 2, chosen 3, rejected 3 + 4; of the other 1, 2, 2.
    assert roofline.Work.of(BATCH) == roofline.Work(2, tokens=8, scored=5, visible=13 + 5)


def test_a_step_is_three_forward_passes_and_one_for_the_reference(roofline):
    shape = roofline.Shape(layers=2, width=4, kernels=100, vocabulary=10)
    # 8 tokens, 5 of them responses', 18 visible pairs.
    forward = 2 * 8 * 100 + 4 * 18 * 4 * 2 + 2 * 5 * 4 * 10
    work = roofline.Work.of(BATCH)
    assert roofline.forward_flops(work, shape) == forward
    assert roofline.step_flops(work, shape, reference=False) == 3 * forward
    assert roofline.step_flops(work, shape, reference=True) == 4 * forward
