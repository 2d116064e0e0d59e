"""What can be done with a model: the cells of the table of `dpo_keras/scoring/README.md`.

A cell does the real thing through the public API, on a tiny model of the family. Where a model
cannot do it, `REASONS` has the error that says so.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from families import ALL_FAMILIES
from scoring_samples import random_pairs

import dpo_keras
from dpo_keras.batching import collate
from dpo_keras.scoring import ResponseScorer, check_packing

README = Path(__file__).parents[2] / "dpo_keras" / "scoring" / "README.md"
BEGIN = "<!-- table: made by `python scripts/model_table.py` -->\n"
END = "<!-- end of table -->"
BATCH = {
    k: tf.constant(v) for k, v in collate(random_pairs([(9, 7, 6), (3, 2, 5)]), [0, 1]).items()
}
DATASET = tf.data.Dataset.from_tensors(BATCH)


class Reason(NamedTuple):
    """Why a cell is not 'yes'."""

    shown: str  # in the table
    error: str  # a pattern of the InputError's message


class Family:
    """A family's model, and what several cells measure on it."""

    def __init__(self, name):
        self.name = name
        self.make = ALL_FAMILIES[name]
        self.policy = self.make()
        self.weights = [variable.numpy() for variable in self.policy.trainable_variables]

    def restored(self):
        for variable, value in zip(self.policy.trainable_variables, self.weights, strict=True):
            variable.assign(value)
        return self.policy

    def step(self, jit_compile=False, **options):
        """Take one step without a reference; returns the weights after it."""
        model = dpo_keras.DPOModel(self.restored(), reference="none", **options)
        fit(model, "simpo", run_eagerly=not jit_compile, jit_compile=jit_compile)
        return [variable.numpy() for variable in self.policy.trainable_variables]

    @functools.cached_property
    def plain_step(self):
        return self.step()


def fit(model, loss="sigmoid", epochs=1, run_eagerly=True, **options):
    """Train on the batch; returns the loss of each step."""
    model.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=run_eagerly, **options)
    return model.fit(DATASET, epochs=epochs, verbose=0).history["loss"]


def plain_inputs(policy):
    """The batch's texts as every input that the model declares; there are no images."""
    rows, sequences, length = BATCH["token_ids"].shape
    texts = (rows * sequences, length)
    known = {name: np.reshape(BATCH[name], texts) for name in ("token_ids", "padding_mask")}
    known["position_ids"] = np.broadcast_to(np.arange(length), texts)
    known["vision_mask"] = np.zeros(texts)
    response = np.zeros((rows, sequences * length))
    for row, slot in np.argwhere(BATCH["owner"].numpy() >= 0):
        response[row, BATCH["source"][row, slot] + 1] = 1
    known["response_mask"] = response.reshape(texts)
    inputs = {}
    for name, declared in policy.input.items():
        empty = (texts[0], *(0 if size is None else size for size in declared.shape[1:]))
        values = known.get(name, np.zeros(empty))
        inputs[name] = tf.cast(values, declared.dtype)
    return inputs


def plain_log_probs(policy):
    """Log-probs of the batch's responses from the model's own logits."""
    logits = policy(plain_inputs(policy), training=False)
    rows = BATCH["owner"].shape[0]
    values = tf.nn.log_softmax(tf.reshape(tf.cast(logits, "float32"), (rows, -1, logits.shape[-1])))
    logps = np.zeros((rows, 2))
    for row, slot in np.argwhere(BATCH["owner"].numpy() >= 0):
        source, target, owner = (BATCH[k][row, slot] for k in ("source", "target", "owner"))
        logps[row, owner] += values[row, source, target]
    return logps


def assert_same(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * max(np.abs(other).max(), 1.0))


def assert_loads(model, directory):
    """Saved and loaded, policy and reference score as before."""
    model.save(directory / "model.keras")
    loaded = keras.saving.load_model(directory / "model.keras")
    for logps in (lambda one: one.policy_logps(BATCH), lambda one: one.reference_logps(BATCH)):
        np.testing.assert_allclose(logps(loaded), logps(model), atol=1e-5)


# -- cells -------------------------------------------------------------------------------------


def text(family, directory):
    """Log-probs are those of the model's own logits, and a step of a graph trains."""
    policy = family.restored()
    model = dpo_keras.DPOModel(policy)
    found = model.policy_logps(BATCH)
    np.testing.assert_allclose(found, plain_log_probs(policy), atol=1e-4)
    (loss,) = fit(model, run_eagerly=False)
    assert math.isclose(loss, math.log(2), rel_tol=1e-5)
    after = model.policy_logps(BATCH)
    assert np.isfinite(after).all() and np.abs(after - found).max() > 1e-3
    np.testing.assert_allclose(model.reference_logps(BATCH), found, atol=1e-5)


def packed(family, directory):
    """Packed rows score as rows of one pair."""
    check_packing(ResponseScorer(family.restored()))


def lora(family, directory):
    """Adapters train, nothing else does, and without them the policy is what it was."""
    assert_adapters_train(family.make(), directory)


def assert_adapters_train(policy, directory):
    dpo_keras.enable_lora(policy, rank=2)
    model = dpo_keras.DPOModel(policy)
    assert model.reference.mode == "adapters_off"
    before = model.policy_logps(BATCH)
    weights = {variable.path: variable.numpy() for variable in policy.weights}
    fit(model)
    moved = {v.path for v in policy.weights if (v.numpy() != weights[v.path]).any()}
    assert moved and all("lora_kernel" in path or "lora_emb" in path for path in moved)
    assert np.abs(model.policy_logps(BATCH) - before).max() > 1e-4
    np.testing.assert_allclose(model.reference_logps(BATCH), before, atol=1e-5)
    assert_loads(model, directory)


def int8(family, directory):
    """A quantized policy with adapters trains and loads."""
    assert_adapters_train(dpo_keras.quantize(family.make(), "int8"), directory)


def int4(family, directory):
    assert_adapters_train(dpo_keras.quantize(family.make(), "int4"), directory)


def bfloat16(family, directory):
    """A bfloat16 run follows the float32 run within rounding."""
    policy = family.make(dtype="bfloat16")
    for variable, value in zip(policy.trainable_variables, family.weights, strict=True):
        variable.assign(value)
    assert {v.dtype for v in policy.backbone.token_embedding.weights} == {"bfloat16"}
    model, expected = dpo_keras.DPOModel(policy), dpo_keras.DPOModel(family.restored())
    np.testing.assert_allclose(model.policy_logps(BATCH), expected.policy_logps(BATCH), rtol=5e-2)
    np.testing.assert_allclose(fit(model, epochs=2), fit(expected, epochs=2), atol=5e-2)


def remat(family, directory):
    """A step that recomputes the blocks is the same step."""
    assert_same(family.step(remat=True), family.plain_step)


def jit(family, directory):
    """A step that XLA compiles is the same step."""
    assert_same(family.step(jit_compile=True), family.plain_step, tolerance=1e-4)


def save_load(family, directory):
    """`.keras`, weights and presets give back the same log-probs."""
    model = dpo_keras.DPOModel(family.restored())
    fit(model)
    assert_loads(model, directory)
    expected = model.policy_logps(BATCH)
    model.save_weights(directory / "model.weights.h5")
    other = dpo_keras.DPOModel(family.make(seed=1))
    other.load_weights(directory / "model.weights.h5")
    np.testing.assert_allclose(other.policy_logps(BATCH), expected, atol=1e-5)
    model.policy.save_to_preset(directory / "preset")
    policy = keras_hub.models.CausalLM.from_preset(str(directory / "preset"), preprocessor=None)
    np.testing.assert_allclose(ResponseScorer(policy)(BATCH)["logps"], expected, atol=1e-5)


CELLS = {
    "text": text,
    "packed": packed,
    "LoRA": lora,
    "int8": int8,
    "int4": int4,
    "bfloat16": bfloat16,
    "remat": remat,
    "jit": jit,
    "save and load": save_load,
}
# In which cells which families give a reason.
GROUPS = {}
REASONS = {
    (family, cell): reason
    for cell, groups in GROUPS.items()
    for families, reason in groups.items()
    for family in families.split()
}
TITLES = {
    "gpt2": "GPT-2",
    "opt": "OPT",
    "llama": "Llama 2",
    "llama3": "Llama 3",
    "mistral": "Mistral",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "qwen": "Qwen 2.5",
    "qwen3": "Qwen 3",
    "phi3": "Phi-3",
    "gpt_neo_x": "GPT-NeoX",
    "bloom": "Bloom",
    "falcon": "Falcon",
    "smollm3": "SmolLM3",
    "gemma3n": "Gemma 3n",
    "gemma4": "Gemma 4",
    "mixtral": "Mixtral",
    "qwen_moe": "Qwen-MoE",
    "qwen3_moe": "Qwen 3-MoE",
    "gpt_oss": "GPT-OSS",
    "gemma4_moe": "Gemma 4, mixture of experts",
    "qwen3_5": "Qwen 3.5",
    "qwen3_5_moe": "Qwen 3.5-MoE",
    "rwkv7": "RWKV-7",
    "gemma3_vision": "Gemma 3 with images",
    "gemma4_vision": "Gemma 4 with images",
    "qwen3_5_vision": "Qwen 3.5 with images",
    "pali_gemma": "PaliGemma",
    "blip2": "BLIP-2, text only",
    "blip2_vision": "BLIP-2",
    "gemma4_assistant": "Gemma 4 Assistant",
}


def table():
    """The table as it stands in the README."""
    lines = [f"| model | {' | '.join(CELLS)} |", "|---" * (1 + len(CELLS)) + "|"]
    for family in ALL_FAMILIES:
        reasons = [REASONS.get((family, cell)) for cell in CELLS]
        shown = ["yes" if reason is None else reason.shown for reason in reasons]
        lines.append(f"| {TITLES[family]} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def write_table():
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest[rest.index(END) :]
    README.write_text(before + BEGIN + table() + after, encoding="utf-8")
