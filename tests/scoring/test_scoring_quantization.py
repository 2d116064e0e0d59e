"""Quantized policies: scored exactly, adapted, saved with their scales, written as numbers."""

import contextlib
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from families import FAMILIES
from tiny import Letters, full_logits_log_probs, pairs

from dpo_keras import DPOLoss, DPOModel, InputError, SupervisedModel, quantize
from dpo_keras.batching import preference_dataset, tokenize_pairs
from dpo_keras.scoring import ResponseScorer, check_packing, dequantized
from dpo_keras.scoring.lora import low_rank_overrides
from dpo_keras.utils.keras_internals import all_layers
from dpo_keras.utils.keras_quantization import store_gptq_as_int4, takes_gptq

TEXTS = [pair["prompt"] + pair["chosen"] for pair in pairs(11)]


class Preprocessor:
    tokenizer = Letters()


@pytest.fixture(scope="module")
def batch():
    tokenized = tokenize_pairs(pairs(4), Letters(), max_length=24)
    return next(iter(preference_dataset(tokenized, batch_size=4, buckets=1, shuffle=False)))


def logps(policy, batch):
    return np.array(ResponseScorer(policy)(batch)["logps"])


def small(family):
    """GPTQ takes seconds for each few columns of a kernel."""
    sizes = {"hidden_dim": 8, "intermediate_dim": 8} if family == "opt" else {}
    return FAMILIES[family](num_layers=1, **sizes)


def quantized(family, mode, group_size=4):
    policy = small(family)
    if mode != "gptq":
        quantize(policy, mode, group_size=group_size)
        return policy
    policy.preprocessor = Preprocessor()
    quantize(policy, mode, TEXTS, group_size=group_size, samples=4, sequence_length=16)
    policy.preprocessor = None
    return policy


def trained(policy, batch):
    """Adapters that have learned something, in a model that can be saved."""
    policy.backbone.enable_lora(4)
    model = DPOModel(policy)
    model.compile(keras.optimizers.Adam(1e-2), DPOLoss("sigmoid"), run_eagerly=True)
    model.train_on_batch(batch)
    return model


def both_logps(model, batch):
    return np.array(model.policy_logps(batch)), np.array(model.reference_logps(batch))


@pytest.mark.parametrize(
    ("family", "mode"), [("gpt2", "int8"), ("gemma2", "int4"), ("opt", "gptq")]
)
def test_a_quantized_policy_is_trained_on_the_chunked_head_and_saved_as_it_is(
    family, mode, batch, tmp_path
):
    before = logps(small(family), batch)
    policy = quantized(family, mode)
    start = logps(policy, batch)
    # Quantized, but still the same model.
    assert 1e-4 < np.abs(start - before).max() < np.abs(before).max() / 2
    scorer = ResponseScorer(policy)
    assert scorer.parts is not None
    np.testing.assert_allclose(start, full_logits_log_probs(policy, batch), atol=1e-4)

    model = trained(policy, batch)
    assert model.reference.mode == "adapters_off"
    policy_logps, reference_logps = both_logps(model, batch)
    np.testing.assert_allclose(reference_logps, start, atol=1e-5)
    assert np.abs(policy_logps - start).max() > 1e-3

    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(both_logps(loaded, batch), both_logps(model, batch), atol=1e-5)
    for weight in model.policy.weights:
        weight.assign(keras.ops.zeros_like(weight))
    model.load_weights(tmp_path / "model.weights.h5")
    found = both_logps(model, batch)
    np.testing.assert_allclose(found, (policy_logps, reference_logps), atol=1e-5)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_policy_in_floating_point_has_the_numbers_of_the_quantized_one(mode, batch):
    model = trained(quantized("gpt2", mode), batch)
    copy = dequantized(model.policy)
    assert {variable.dtype for variable in copy.weights} == {"float32"}
    np.testing.assert_allclose(logps(copy, batch), logps(model.policy, batch), atol=1e-4)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize(
    ("family", "mode"), [("gpt2", "int4"), ("llama", "int8"), ("gemma2", "int4"), ("llama", "int4")]
)
def test_heads_that_keras_quantizes_are_chunked_with_their_own_numbers(family, mode, batch):
    policy = small(family)
    policy.quantize(mode)
    assert policy.backbone.token_embedding.quantization_mode == mode
    assert ResponseScorer(policy).parts is not None
    found = logps(policy, batch)
    # Inputs that lie between two steps may be rounded to either.
    np.testing.assert_allclose(found, full_logits_log_probs(policy, batch), atol=0.01)


def test_gradients_pass_a_quantized_head_whose_inputs_are_rounded(batch):
    policy = small("gpt2")
    policy.backbone.token_embedding.quantize("int8")
    with pytest.warns(UserWarning, match="rounds its inputs"):
        numbers = dequantized(policy)
    expected, found = (gradient_of_last_norm(model, batch) for model in (numbers, policy))
    # Keras lets none through but that of the scale.
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def gradient_of_last_norm(policy, batch):
    norm = policy.backbone.get_layer("layer_norm").gamma
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(ResponseScorer(policy)(batch)["logps"])
    return np.array(tape.gradient(value, norm.value))


def test_quantized_policies_are_packed():
    policy = quantized("llama", "int8")
    policy.backbone.enable_lora(2)
    check_packing(ResponseScorer(policy))


def test_every_quantized_kernel_is_multiplied_by_our_product():
    policy = quantized("llama", "int4")
    layers = [layer for layer in all_layers(policy) if layer.quantization_mode]
    assert len(layers) == 7  # query, key, value, output, and three of the MLP
    assert [override.owner for override in low_rank_overrides(policy)] == layers


def test_gptq_calibrates_on_the_same_windows_in_every_process(monkeypatch):
    policy = small("opt")
    policy.preprocessor = Preprocessor()
    seen = []

    def calibrate(mode, config, filters):
        # Keras draws windows by the hash of a string, which differs by process.
        first = config.quantization_layer_structure["pre_block_layers"][0]
        seen.extend(np.array(first(None)) for _ in range(config.num_samples))
        assert filters(policy.backbone.transformer_layers[0]._feedforward_intermediate_dense)
        raise InterruptedError

    monkeypatch.setitem(policy.backbone.__dict__, "quantize", calibrate)
    with pytest.raises(InterruptedError):
        quantize(policy, "gptq", ["abcdefgh", "ijklmnop"], samples=3, sequence_length=8)
    ids = np.array(Letters().tokenize(["abcdefghijklmnop"]))
    np.testing.assert_array_equal(np.concatenate(seen), [ids[0, k : k + 8] for k in (0, 4, 8)])


@pytest.mark.parametrize(
    "layer",
    [keras.layers.Dense(5), keras.layers.EinsumDense("ab,bcd->acd", (3, 5), bias_axes="cd")],
)
def test_gptq_in_the_layout_of_int4_has_the_same_numbers(layer):
    random, inputs = np.random.default_rng(0), np.eye(6, dtype="float32")
    layer.build((2, 6))
    config = keras.quantizers.GPTQConfig(None, None, group_size=4)
    layer.quantize("gptq", config=config)
    layer.is_gptq_calibrated = True
    layer.kernel_scale.assign(random.normal(size=layer.kernel_scale.shape))
    layer.kernel_zero.assign(random.integers(0, 16, layer.kernel_zero.shape))
    layer.quantized_kernel.assign(random.integers(0, 256, layer.quantized_kernel.shape))
    layer.g_idx.assign([0, 1, 0, 0, 1, 0])
    expected = np.array(layer(inputs))
    store_gptq_as_int4(layer)
    assert layer.quantization_mode == "int4"
    np.testing.assert_allclose(np.array(layer(inputs)), expected, atol=1e-6)
    layer.enable_lora(2)
    np.testing.assert_allclose(np.array(layer(inputs)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("equation", "shape", "takes"),
    [
        ("abc,cde->abde", (6, 2, 3), True),
        ("abcd,cde->abe", (2, 3, 6), True),
        ("abc,dce->abde", (2, 6, 3), False),  # Gemma: heads in front of the inputs
    ],
)
def test_kernels_whose_inputs_keras_misreads_are_not_calibrated(equation, shape, takes):
    layer = SimpleNamespace(equation=equation, kernel=np.zeros(shape))
    assert takes_gptq(layer) == takes


def test_bfloat16_policies_are_quantized_and_keep_their_dtype(batch, tmp_path):
    policy = FAMILIES["llama"](num_layers=1, dtype="bfloat16")
    quantize(policy, "int4")
    model = trained(policy, batch)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.policy.backbone.token_embedding.embeddings.dtype == "bfloat16"
    np.testing.assert_allclose(both_logps(loaded, batch), both_logps(model, batch), atol=1e-5)


def test_a_supervised_model_keeps_its_adapters(batch, tmp_path):
    policy = quantized("gpt2", "int8")
    policy.backbone.enable_lora(2)
    model = SupervisedModel(policy)
    model.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    model.train_on_batch(batch)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    found = logps(loaded.policy, batch), logps(model.policy, batch)
    np.testing.assert_allclose(*found, atol=1e-5)
    assert loaded.policy.backbone.trainable_variables


def test_a_file_without_scales_is_refused(batch):
    model = trained(quantized("gpt2", "int8"), batch)
    store = {}
    model.policy_adapters.save_own_variables(store)
    kept = {key: value for key, value in store.items() if "scale" not in key}
    with pytest.raises(InputError, match=r"policy .*kernel_scale"):
        model.policy_adapters.load_own_variables(kept)


def test_training_without_adapters_on_quantized_kernels_is_warned_of(batch):
    policy = quantized("gpt2", "int8")
    dataset = tf.data.Dataset.from_tensors(batch)
    for adapters in (False, True):
        if adapters:
            policy.backbone.enable_lora(2)
        model = DPOModel(policy)
        model.compile(keras.optimizers.SGD(1e-2), run_eagerly=True)
        warned = pytest.warns(UserWarning, match=r"quantized and has no adapters.*enable_lora")
        with contextlib.nullcontext() if adapters else warned:
            model.fit(dataset, verbose=0)


def test_what_cannot_be_quantized_is_refused():
    policy = small("gpt2")
    for arguments, message in (
        ({"mode": "int2"}, "mode must be one of int8, int4, gptq"),
        ({"mode": "gptq"}, "texts are needed"),
        ({"mode": "gptq", "texts": TEXTS}, "needs a tokenizer"),
        ({"mode": "int8", "texts": TEXTS}, "texts have no effect"),
        ({"mode": "int4", "group_size": 0}, "group_size must be >= 1"),
    ):
        with pytest.raises(InputError, match=message):
            quantize(policy, **arguments)
    quantize(policy, "int8")
    with pytest.raises(InputError, match="quantized already"):
        quantize(policy, "int4")
    adapted = small("gpt2")
    adapted.backbone.enable_lora(2)
    with pytest.raises(InputError, match="has LoRA adapters already"):
        quantize(adapted, "int8")
