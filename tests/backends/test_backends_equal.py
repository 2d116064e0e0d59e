"""The same pairs, weights and seeds give the same training on TensorFlow and on JAX."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from backends_training import STEPS, logits_of, policy_of, responses_of, trained
from backends_variants import VARIANTS, assert_same
from families import ALL_FAMILIES

FAMILIES = ("gpt2", "llama", "gemma3", "qwen3")
ELSEWHERE = {"pali_gemma", "blip2", "gemma4_assistant"}  # of images alone, or without logits
OF_TEXT = [name for name in ALL_FAMILIES if name not in ELSEWHERE and "vision" not in name]
WITH_WINDOWS = {"mistral", "gemma3", "qwen", "qwen3", "qwen3_moe", "qwen_moe"}
GENERATING = {"gpt2", "qwen_moe"}
CASES = ["gpt2:packed:lora", "llama:buckets:full", "gemma3:packed:full", "qwen3:buckets:lora"]
KINDS = ("buckets:full", "buckets:lora", "packed:full", "packed:lora")
VARIANTS_IN_SUITE = {"int8", "float16", "images of gemma3"}
KERNELS = "ignore:The 'rwkv_ops' package is not installed:UserWarning"  # RWKV-7's, of GPUs
FURTHER = {f"{name}:{kind}" for name in FAMILIES for kind in KINDS} - {*CASES}


def cases(kind, names, in_suite):
    """All cases of a kind, of which the suite runs some and the table the others."""
    return [
        pytest.param(f"{name}:{kind}:", marks=[] if name in in_suite else pytest.mark.table)
        for name in names
    ]


def on_tensorflow(path, cases):
    program = Path(__file__).with_name("backends_training.py")
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    subprocess.run([sys.executable, program, path, *cases], env=environment, check=True)
    return np.load(path)


@pytest.fixture(scope="module")
def tensorflow(request, tmp_path_factory):
    chosen = {
        item.callspec.params["case"]
        for item in request.session.items
        if "case" in getattr(getattr(item, "callspec", None), "params", {})
    }
    path = tmp_path_factory.mktemp("tensorflow") / "trained.npz"
    return on_tensorflow(path, sorted(chosen))


@pytest.mark.parametrize("case", cases("logits", OF_TEXT, WITH_WINDOWS))
@pytest.mark.filterwarnings(KERNELS)
def test_logits_of_every_family_are_those_of_tensorflow(case, tensorflow):
    """KerasHub takes another path through attention on JAX, and forgets windows on it."""
    expected = tensorflow[case]
    found = logits_of(case.split(":")[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", cases("responses", OF_TEXT, GENERATING))
@pytest.mark.filterwarnings(KERNELS)
def test_responses_of_every_family_are_those_of_tensorflow(case, tensorflow):
    """Windows must not be forgotten in front of the cache of keys and values either."""
    np.testing.assert_array_equal(responses_of(case.split(":")[0]), tensorflow[case])


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.table) for case in sorted(FURTHER))]
)
def test_twenty_steps_are_those_of_tensorflow(case, tensorflow):
    assert keras.backend.backend() == "jax"
    family, layout, adapters = case.split(":")
    losses, _, weights = trained(policy_of(family, adapters == "lora"), layout)
    assert len(losses) == STEPS and losses[-1] < losses[0]
    np.testing.assert_allclose(losses, tensorflow[f"{case}/losses"], atol=1e-5, rtol=0)
    moved = 0.0
    fresh = policy_of(family, adapters == "lora").weights
    for number, (weight, before) in enumerate(zip(weights, fresh, strict=True)):
        theirs = tensorflow[f"{case}/{number}"]
        np.testing.assert_allclose(weight, theirs, atol=1e-4, rtol=0)
        moved = max(moved, np.abs(weight - keras.ops.convert_to_numpy(before)).max())
    assert moved > 1e-3  # it is a training that is compared


@pytest.mark.parametrize("case", cases("variant", VARIANTS, VARIANTS_IN_SUITE))
def test_further_kinds_of_training_are_those_of_tensorflow(case, tensorflow):
    """Quantized kernels, experts, ratings, rankings, rewards, images, float16, every objective."""
    # In half precision each step rounds to 1 of 2048.
    atol = 1e-3 if case.startswith("float16") else 1e-4
    found = VARIANTS[case.split(":")[0]]()
    assert_same(found, {name: tensorflow[f"{case}/{name}"] for name in found}, atol)
