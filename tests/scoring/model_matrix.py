"""What can be done with a model: the cells of the table of `dpo_keras/scoring/README.md`.

A cell does the real thing through the public API, on a tiny model of the family. Where a model
cannot do it, `model_reasons.REASONS` has the error that says so.
"""

import functools
import gc
import math

import keras
import keras_hub
import numpy as np
import tensorflow as tf
import tiny
import vision_tiny
from families import ALL_FAMILIES, IMAGE_SIZE, PATCH_SIZE
from safetensors.numpy import load_file
from scoring_samples import random_pairs

import dpo_keras
from dpo_keras.batching import collate
from dpo_keras.preferences import PreferencePair
from dpo_keras.scoring import ResponseScorer, check_packing

PAIRS = random_pairs([(9, 7, 6), (3, 2, 5)])
BATCH = {name: tf.constant(value) for name, value in collate(PAIRS, [0, 1]).items()}
TEXTS = ("<image>Hello", " I am fine", " don't worry.")
# A dense model, a mixture of experts, and one with a vision encoder. The suite runs their cells, so
# they are of one layer.
REPRESENTATIVES = ("llama", "mixtral", "gemma3_vision")
DATASET = tf.data.Dataset.from_tensors(BATCH)


class NothingToDoError(Exception):
    """What a cell is about is not in the model, so that there is nothing to refuse."""


class Family:
    """A family's model, and what several cells measure on it."""

    def __init__(self, name):
        self.name = name
        layers = {"num_layers": 1} if name in REPRESENTATIVES else {}
        self.make = functools.partial(ALL_FAMILIES[name], **layers)
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


def fit(model, loss="sigmoid", epochs=1, run_eagerly=True, learning_rate=0.1, **options):
    """Train on the batch; returns the loss of each step, that of routers left out."""
    optimizer = keras.optimizers.SGD(learning_rate)
    model.compile(optimizer, loss, run_eagerly=run_eagerly, **options)
    logs = model.fit(DATASET, epochs=epochs, verbose=0).history
    return np.subtract(logs["loss"], logs.get("auxiliary_loss", 0.0))


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
        if name == "pixel_values" and declared.shape[-1] is None:  # Gemma 4 has patches in rows
            empty = (*empty[:-1], 3 * PATCH_SIZE**2)
        values = known.get(name, np.zeros(empty))
        inputs[name] = tf.cast(values, declared.dtype)
    return inputs


def plain_logits(policy):
    if not isinstance(policy, keras_hub.models.Gemma3nCausalLM):
        return policy(plain_inputs(policy), training=False)
    # KerasHub 0.32 multiplies by the embeddings that the model had when it was built.
    states = policy.backbone(plain_inputs(policy), training=False)
    return states @ tf.transpose(policy.backbone.language_model.embed_tokens.embedding.embeddings)


def plain_log_probs(policy):
    """Log-probs of the batch's responses from the model's own logits."""
    logits = plain_logits(policy)
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
    gc.freeze()  # Keras searches for garbage after every kernel
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
        # Logits as small as those of fresh weights, so that rounding does not drown the step.
        variable.assign(value / 4 if value.ndim > 1 else value)
    assert "bfloat16" in {variable.dtype for variable in policy.trainable_variables}
    float32 = family.restored()
    for variable, value in zip(
        float32.trainable_variables, policy.trainable_variables, strict=True
    ):
        variable.assign(tf.cast(value, "float32"))
    model, expected = dpo_keras.DPOModel(policy), dpo_keras.DPOModel(float32)
    assert_same([model.policy_logps(BATCH)], [expected.policy_logps(BATCH)], tolerance=5e-2)
    losses = [fit(one, epochs=2, learning_rate=0.03) for one in (model, expected)]
    np.testing.assert_allclose(*losses, atol=3e-2)
    assert losses[0][1] < losses[0][0] - 1e-2


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


def _blip2_preprocessor():
    words = ("<s>", "<pad>", "</s>", "\u010a", "<image>", "a", "b", "ab")
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = keras_hub.tokenizers.BLIP2OPTTokenizer(vocabulary=vocabulary, merges=["a b"])
    converter = keras_hub.layers.BLIP2ImageConverter(image_size=(IMAGE_SIZE, IMAGE_SIZE))
    return keras_hub.models.BLIP2CausalLMPreprocessor(tokenizer, converter)


# Models with preprocessors that read images, and preprocessors of models whose images are not read.
SEEING = {
    "gemma3_vision": vision_tiny.gemma3,
    "gemma4_vision": vision_tiny.gemma4,
    "pali_gemma": vision_tiny.pali_gemma,
    "qwen3_5_vision": vision_tiny.qwen3_5,
}
READERS = {"blip2_vision": _blip2_preprocessor}


def images(family, directory):
    """A pair with an image trains, and another image is another score."""
    maker = SEEING.get(family.name)
    policy = family.policy if maker is None else maker()
    tokenizer = policy.preprocessor or READERS.get(family.name, tiny.Letters)()
    pairs = [PreferencePair(*TEXTS, images=[vision_tiny.png(seed)]) for seed in (1, 2)]
    options = {"batch_size": 2, "shuffle": False, "batching": "buckets"}
    data = dpo_keras.preference_dataset(pairs, tokenizer, **options)
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
    if not kept.has_auxiliary_loss:
        raise NothingToDoError("no layer adds a loss")
    kept.compile(keras.optimizers.SGD(0.1), "simpo", run_eagerly=True)
    logs = kept.fit(DATASET, verbose=0).history
    assert logs["auxiliary_loss"][0] > 0
    weights = [variable.numpy() for variable in family.policy.trainable_variables]
    dropped = family.step(auxiliary_loss="drop")
    assert max(np.abs(a - b).max() for a, b in zip(weights, dropped, strict=True)) > 0


def hugging_face(family, directory):
    """What is written for `transformers` is read back with the same log-probs."""
    policy = family.make(**HUGGING_FACE_KNOWS.get(family.name, {}))
    dpo_keras.save_pretrained(policy, directory / "out", format="transformers")
    if family.name in WRITTEN_ONLY:
        written = load_file(directory / "out" / "model.safetensors").values()
        values = [
            np.sort(np.concatenate([np.ravel(v) for v in found]))
            for found in (written, policy.get_weights())
        ]
        np.testing.assert_array_equal(*values)
        return
    read = type(policy).from_preset(str(directory / "out"), preprocessor=None, dtype="float32")
    expected = ResponseScorer(policy)(BATCH)["logps"]
    tolerance = TOLERANCE.get(family.name, 1e-4)
    np.testing.assert_allclose(ResponseScorer(read)(BATCH)["logps"], expected, atol=tolerance)


BOTH_NORMS = {"use_post_ffw_norm": True, "use_post_attention_norm": True}
# KerasHub reads GPT-2 with an MLP of four times the width, and Qwen without its window.
HUGGING_FACE_KNOWS = {
    "gpt2": {"intermediate_dim": 128},
    "qwen": {"use_sliding_window_attention": False},
    "gemma3": BOTH_NORMS,
    "gemma3_vision": BOTH_NORMS,
    "qwen3_5": {"sliding_window_size": 32768},
    "qwen3_5_vision": {"sliding_window_size": 32768},
}
# KerasHub reads no Phi-3, and of GPT-OSS only what is quantized to four bits.
# Of Gemma 3 it reads images, and of Qwen 3.5 texts, by other names than it writes.
WRITTEN_ONLY = ("phi3", "gpt_oss", "gemma3_vision", "qwen3_5")
TOLERANCE = {"mistral": 1e-2}  # KerasHub reads it in float16
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
