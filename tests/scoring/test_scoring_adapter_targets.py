"""LoRA on every family: adapters are where they were asked for, and nothing else is trained."""

import re

import families
import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import dpo_keras
from dpo_keras.errors import InputError
from dpo_keras.scoring.lora import adapted_layers, adapter_variables
from dpo_keras.utils.keras_internals import layers_by_path

NEVER = "router|sparse_feedforward|embed|head$|vision|vit|q_?former"
# Other settings of layers that another family has.
SAME = {"llama3", "gemma2"}
TEXT_INPUTS = {"token_ids", "padding_mask", "position_ids"}


def adapted_paths(policy):
    backbone = getattr(policy, "backbone", policy)
    return [
        path for path, layer in layers_by_path(backbone).items() if layer in adapted_layers(policy)
    ]


def adapted_names(policy):
    return {path.rsplit("/")[-1] for path in adapted_paths(policy)}


def text_batch():
    ids = np.random.default_rng(0).integers(3, tiny.VOCABULARY, (2, 6)).astype("int32")
    positions = np.broadcast_to(np.arange(6, dtype="int32"), (2, 6))
    return {"token_ids": ids, "padding_mask": np.ones_like(ids), "position_ids": positions}


@pytest.mark.filterwarnings("ignore:targets 'all-linear'")
@pytest.mark.parametrize("family", [name for name in families.ALL_FAMILIES if name not in SAME])
def test_a_step_changes_every_adapter_of_every_family_and_nothing_else(family):
    policy = families.ALL_FAMILIES[family]()
    batch = {name: value for name, value in text_batch().items() if name in policy.input}
    # The assistant speaks through the model that it assists.
    readable = {*policy.input} <= TEXT_INPUTS and family != "gemma4_assistant"
    base = np.asarray(policy(batch)) if readable else None
    dpo_keras.enable_lora(policy, 2, targets="all-linear")
    adapters = adapter_variables(adapted_layers(policy))
    assert adapters and {v.path for v in policy.trainable_variables} == {v.path for v in adapters}
    assert not any(re.search(NEVER, path) for path in adapted_paths(policy))
    if not readable:
        return
    before = {id(variable): variable.numpy() for variable in policy.weights}
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(policy(batch)))
    trained = policy.trainable_variables
    gradients = tape.gradient(loss, [variable.value for variable in trained])
    for variable, gradient in zip(trained, gradients, strict=True):
        assert gradient is not None, variable.path
        variable.assign_sub(0.1 * gradient)
    moved = {v.path for v in policy.weights if np.abs(v.numpy() - before[id(v)]).max() > 0}
    # A moves with the second step: its gradient is B's multiple, and B starts at 0.
    assert moved == {v.path for v in adapters if v.name.endswith("_b")}
    for layer in adapted_layers(policy):
        layer.lora_enabled = False
    np.testing.assert_array_equal(np.asarray(policy(batch)), base)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", {"query", "value"}),
        ("bloom", {"query_dense", "value_dense"}),
        ("smollm3", {"q_proj", "v_proj"}),
        ("gemma3n", {"q_proj", "v_proj"}),
        ("gpt_neo_x", {"query_key_value"}),
        ("rwkv7", {"receptance", "value"}),
        ("gemma3_vision", {"query", "value"}),
    ],
)
def test_queries_and_values_are_adapted_by_default_under_any_familys_names(family, names):
    policy = families.ALL_FAMILIES[family]()
    dpo_keras.enable_lora(policy, 2)
    assert adapted_names(policy) == names


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("attention", {"query", "key", "value", "attention_output"}),
        ("o_proj", {"attention_output"}),
        (["q_proj", "gate_proj"], {"query", "feedforward_gate_dense"}),
        (
            ["feedforward_*", "key"],
            {"key"} | {f"feedforward_{x}_dense" for x in ("gate", "intermediate", "output")},
        ),
    ],
)
def test_targets_are_keywords_names_of_peft_and_patterns(targets, names):
    policy = tiny.llama()
    dpo_keras.enable_lora(policy, 2, targets=targets)
    assert adapted_names(policy) == names


def test_a_pattern_of_paths_chooses_single_blocks():
    policy = tiny.llama()
    dpo_keras.enable_lora(policy, 2, targets=["transformer_layer_1/*/query"])
    assert adapted_paths(policy) == ["transformer_layer_1/self_attention/query"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "quuery"}, r"must match layers of .*, got 'quuery'. Did you mean 'query'\?"),
        ({"targets": ["query", "experts*"]}, r"Layers are .*feedforward_gate_dense"),
        ({"targets": "token_embedding"}, "targets must match"),
        ({"targets": []}, "targets must be"),
        ({"rank": 0}, "rank must be a whole number >= 1, got 0"),
        ({"alpha": -1.0}, "alpha must be > 0"),
        ({"scaling": "rslora"}, "scaling must be one of standard, rank_stabilized"),
        ({"bias": "all"}, "bias must be one of none, lora_only"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_anything_changes(arguments, message):
    policy = tiny.llama(num_layers=1)
    trainable = len(policy.trainable_variables)
    with pytest.raises(InputError, match=message):
        dpo_keras.enable_lora(policy, **arguments)
    assert not adapted_layers(policy) and len(policy.trainable_variables) == trainable


def test_adapters_are_enabled_once():
    policy = tiny.llama(num_layers=1)
    policy.backbone.enable_lora(2)
    with pytest.raises(InputError, match="policy has LoRA adapters already"):
        dpo_keras.enable_lora(policy)


def test_experts_take_no_adapters_and_that_is_said():
    for targets in ("all-linear", "*experts*"):
        policy = families.ALL_FAMILIES["mixtral"]()
        if targets == "all-linear":
            with pytest.warns(UserWarning, match="experts of mixtral_backbone.* get no adapters"):
                dpo_keras.enable_lora(policy, 2, targets=targets)
            assert adapted_names(policy) == {"query", "key", "value", "attention_output"}
        else:
            with pytest.raises(InputError, match="one kernel, which takes no adapters"):
                dpo_keras.enable_lora(policy, 2, targets=targets)


def test_every_kind_of_scale():
    for arguments, scale in (
        ({}, 1.0),
        ({"alpha": 16}, 4.0),
        ({"alpha": 16, "scaling": "rank_stabilized"}, 8.0),
        ({"scaling": "rank_stabilized"}, 2.0),
    ):
        policy = tiny.llama(num_layers=1)
        dpo_keras.enable_lora(policy, 4, **arguments)
        layer = adapted_layers(policy)[0]
        layer.lora_kernel_b.assign(keras.random.normal(layer.lora_kernel_b.shape))
        product = layer.lora_kernel_a.numpy() @ layer.lora_kernel_b.numpy()
        merged = layer.kernel.numpy() - layer._kernel.numpy()
        np.testing.assert_allclose(merged, scale * product, rtol=1e-4, atol=1e-5)


def test_biases_of_adapted_layers_are_trained_on_request():
    policy = tiny.gpt2(num_layers=1)
    dpo_keras.enable_lora(policy, 2, bias="lora_only")
    names = [variable.path.split("/")[-2:] for variable in policy.trainable_variables]
    assert sorted(names) == [
        [layer, name]
        for layer in ("query", "value")
        for name in ("bias", "lora_kernel_a", "lora_kernel_b")
    ]


def test_any_keras_model_takes_adapters_by_the_names_of_its_layers():
    policy = tiny.plain_model()
    with pytest.raises(InputError, match="targets must be given: no layer .* Layers are dense"):
        dpo_keras.enable_lora(policy)
    name = next(layer.name for layer in policy.layers if isinstance(layer, keras.layers.Dense))
    dpo_keras.enable_lora(policy, 2, targets=name)
    assert len(policy.trainable_variables) == 2
