"""What can be done with a model: the cells of the table of `dpo_keras/scoring/README.md`.

A cell does the real thing through the public API, on a tiny model of the family. Where a model
cannot do it, `REASONS` has the error that says so.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
import tiny
import vision_tiny
from families import ALL_FAMILIES
from scoring_samples import random_pairs

import dpo_keras
from dpo_keras.batching import collate
from dpo_keras.preferences import PreferencePair
from dpo_keras.scoring import ResponseScorer, check_packing

README = Path(__file__).parents[2] / "dpo_keras" / "scoring" / "README.md"
BEGIN = "<!-- table: made by `python scripts/model_table.py` -->\n"
END = "<!-- end of table -->"
BATCH = {
    k: tf.constant(v) for k, v in collate(random_pairs([(9, 7, 6), (3, 2, 5)]), [0, 1]).items()
}
TEXTS = ("<image>Hello", " I am fine", " don't worry.")
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
    weights = [variable.numpy() for variable in policy.weights]
    fit(model)
    moved = [v for v, old in zip(policy.weights, weights, strict=True) if (v.numpy() != old).any()]
    assert moved and all("lora_" in variable.name for variable in moved)
    assert np.abs(model.policy_logps(BATCH) - before).max() > 1e-4
    np.testing.assert_allclose(model.reference_logps(BATCH), before, atol=1e-5)
    assert_loads(model, directory)


def int8(family, directory):
    """A quantized policy with adapters trains and loads."""
    assert_quantized_trains(family.make(), "int8", directory)


def int4(family, directory):
    """As int8."""
    assert_quantized_trains(family.make(), "int4", directory)


def assert_quantized_trains(policy, mode, directory):
    full = ResponseScorer(policy)(BATCH)["logps"]
    dpo_keras.quantize(policy, mode)
    assert np.abs(ResponseScorer(policy)(BATCH)["logps"] - full).max() > 0, "kernels are rounded"
    assert_adapters_train(policy, directory)


def bfloat16(family, directory):
    """A bfloat16 run follows the float32 run within rounding."""
    keras.config.set_dtype_policy("bfloat16")
    try:
        policy = family.make(dtype="bfloat16")
    finally:
        keras.config.set_dtype_policy("float32")
    for variable, value in zip(policy.trainable_variables, family.weights, strict=True):
        variable.assign(value)
    assert "bfloat16" in {variable.dtype for variable in policy.trainable_variables}
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
    policy = type(model.policy).from_preset(str(directory / "preset"), preprocessor=None)
    np.testing.assert_allclose(ResponseScorer(policy)(BATCH)["logps"], expected, atol=1e-5)


def images(family, directory):
    """A pair with an image trains, and another image is another score."""
    maker = getattr(vision_tiny, family.name.removesuffix("_vision"), None)
    policy = family.policy if maker is None else maker()
    tokenizer = policy.preprocessor or tiny.Letters()
    pairs = [
        PreferencePair(
            "<image>Hello", " I am fine", " don't worry.", images=[vision_tiny.png(seed)]
        )
        for seed in (1, 2)
    ]
    data = dpo_keras.preference_dataset(pairs, tokenizer, batch_size=2, shuffle=False)
    model = dpo_keras.DPOModel(policy)
    (batch,) = data
    found = np.asarray(model.policy_logps(batch))
    assert np.abs(found[0] - found[1]).min() > 1e-3
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    (loss,) = model.fit(data, verbose=0).history["loss"]
    assert math.isclose(loss, math.log(2), rel_tol=1e-5)
    assert np.abs(model.policy_logps(batch) - found).max() > 1e-3


def moe_loss(family, directory):
    """The losses of the routers count unless they are dropped, and then the step is another."""
    kept = dpo_keras.DPOModel(family.restored(), reference="none")
    assert kept.has_auxiliary_loss
    kept.compile(keras.optimizers.SGD(0.1), "simpo", run_eagerly=True)
    logs = kept.fit(DATASET, verbose=0).history
    assert logs["auxiliary_loss"][0] > 0
    weights = [variable.numpy() for variable in family.policy.trainable_variables]
    dropped = family.step(auxiliary_loss="drop")
    assert max(np.abs(a - b).max() for a, b in zip(weights, dropped, strict=True)) > 0


def hugging_face(family, directory):
    """What is written for `transformers` is read back with the same log-probs."""
    policy = family.make(**HUGGING_FACE_READS.get(family.name, {}))
    dpo_keras.save_pretrained(policy, directory / "out", format="transformers")
    read = type(policy).from_preset(str(directory / "out"), preprocessor=None, dtype="float32")
    expected = ResponseScorer(policy)(BATCH)["logps"]
    np.testing.assert_allclose(ResponseScorer(read)(BATCH)["logps"], expected, atol=1e-4)


# KerasHub reads GPT-2 with an MLP of four times the width, and Qwen without its window.
HUGGING_FACE_READS = {
    "gpt2": {"intermediate_dim": 128},
    "qwen": {"use_sliding_window_attention": False},
}
CELLS = {
    "text": text,
    "images": images,
    "packed": packed,
    "LoRA": lora,
    "int8": int8,
    "int4": int4,
    "bfloat16": bfloat16,
    "remat": remat,
    "jit": jit,
    "MoE loss": moe_loss,
    "save and load": save_load,
    "HF out": hugging_face,
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
