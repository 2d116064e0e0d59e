"""The benchmarks start, and the arithmetic that they count is what packed trees need."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_keras.batching import Ragged, TokenizedPairs

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


@pytest.mark.parametrize(
    "name",
    ["against_trl", "forests", "roofline", "memory", "scaling", "start", "plan", "generation"],
)
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


def test_a_prompt_and_a_response_count_once_however_many_pairs_they_are_in(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    scaling = importlib.import_module("scaling")
    rows = [[5, 6], [7], [8, 9]]
    prompt, one, other = (Ragged.from_lists([row]) for row in rows)
    pair = TokenizedPairs(prompt, one, other, np.ones(1), np.ones(1))
    # 5 tokens in kernels of 12 * 4 * 4; 13 visible pairs (as above); 3 logits of 10.
    layer = 2 * 5 * 192 + 4 * 13 * 4
    assert scaling.operations(pair, 2, 4, 10) == 2 * layer + 2 * 3 * 4 * 10
    twice = pair.take(np.array([0, 0]))
    assert scaling.operations(twice, 2, 4, 10) == scaling.operations(pair, 2, 4, 10)
    ranked = scaling.ranked_pairs(prompts=2, responses=4, length=32, vocabulary=50)
    assert len(ranked) == 2 * 6 and ranked.prompt_hash.tolist() == [0] * 6 + [1] * 6


def test_the_exponent_is_the_slope_in_logarithms(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    common = importlib.import_module("_common")
    exponent, constant = common.slope([1, 2, 4], [3, 12, 48])
    assert (exponent, np.exp(constant)) == (pytest.approx(2), pytest.approx(3))


def test_labels_needed_are_read_off_the_mean_curve(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    script = importlib.import_module("labels_needed")
    records = [
        {"selection": name, "seed": seed, "labels": 10 * (place + 1), "accuracy": value + seed / 10}
        for name, values in {"random": (0.5, 0.7, 0.6, 0.8), "uncertain": (0.5, 0.8)}.items()
        for place, value in enumerate(values)
        for seed in (0, 1)
    ]
    labels, mean, spread = script.mean_curve(records, "random")
    assert labels.tolist() == [10, 20, 30, 40]
    np.testing.assert_allclose(mean, [0.55, 0.75, 0.65, 0.85])
    np.testing.assert_allclose(spread, 0.1 / np.sqrt(2))
    # 0.8 lies half-way from 0.75, which was reached at 20 and is kept at 30, to 0.85 at 40.
    assert script.labels_needed(labels, mean, 0.8) == pytest.approx(35)
    assert script.labels_needed(labels, mean, 0.55) == 10
    assert script.labels_needed(labels, mean, 0.9) is None
    assert script.labels_needed(*script.mean_curve(records, "uncertain")[:2], 0.8) == pytest.approx(
        18.333, abs=1e-3
    )
