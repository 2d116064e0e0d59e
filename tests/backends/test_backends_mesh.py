"""One device, rows split, weights split, and both: the same training."""

import keras
import numpy as np
import pytest
from backends_training import batches, compiled_model, policy_of, trained, weights_of
from backends_variants import VARIANTS, assert_same
from families import ALL_FAMILIES

import dpo_keras
from dpo_keras.scoring.scorer import ResponseScorer
from dpo_keras.training.mesh import LAYOUTS
from dpo_keras.utils.backends import ValuesInPlace

MESHES = {
    "data": {"data": 8},
    "model": {"data": 2, "model": 4},
    "fsdp": {"data": 8, "fsdp": True},
    "both": {"data": 2, "model": 4, "fsdp": True},
}
IN_SUITE = [("llama", "buckets", False)]
ELSEWHERE = [
    *((name, "buckets", False) for name in ("gpt2", "gemma3", "qwen3", "mistral", "phi3")),
    *(
        (name, "packed", True)
        for name in ("llama", "gemma", "gemma3", "gemma4", "qwen", "qwen3_moe")
    ),
    *((name, "buckets", False) for name in ("qwen_moe", "qwen3_moe", "mixtral", "gemma4_moe")),
]
FAMILY = {
    **dict.fromkeys(("cached", "thumbs", "rankings", "reward", "float16"), "gpt2"),
    **dict.fromkeys(("int8", "int4"), "llama"),
    "experts": "qwen3_moe",
    "images of gemma3": "gemma3",
    "images of gemma4": "gemma4",
}  # of variants whose weights are split; of the others rows are


def on_mesh(family, mesh):
    kind = type(ALL_FAMILIES[family]().backbone)
    keras.distribution.set_distribution(dpo_keras.distribution(kind, **mesh))


def shares(variable):
    """What each device holds of a variable."""
    return [
        shard.data.nbytes / variable.value.nbytes for shard in variable.value.addressable_shards
    ]


@pytest.mark.parametrize(
    ("family", "layout", "adapters"),
    [*IN_SUITE, *(pytest.param(*case, marks=pytest.mark.table) for case in ELSEWHERE)],
)
def test_one_device_and_every_mesh_end_with_the_same_weights(family, layout, adapters):
    losses, _, expected = trained(policy_of(family, adapters), layout)
    for mesh in MESHES.values():
        on_mesh(family, mesh)
        found, model, weights = trained(policy_of(family, adapters), layout)
        np.testing.assert_allclose(found, losses, atol=1e-5, rtol=0)
        for variable, weight, other in zip(model.policy.weights, weights, expected, strict=True):
            atol = 1e-4 if has_no_gradient(family, variable) else 1e-5
            np.testing.assert_allclose(weight, other, atol=atol, rtol=0, err_msg=variable.path)
        if "model" in mesh:
            check_memory(model, mesh)
        keras.distribution.set_distribution(None)


@pytest.mark.parametrize(
    "name",
    [name if name == "int8" else pytest.param(name, marks=pytest.mark.table) for name in VARIANTS],
)
def test_further_kinds_of_training_are_on_a_mesh_as_on_one_device(name):
    """Quantized kernels, experts, ratings, rankings, rewards, images, float16, every objective."""
    expected = VARIANTS[name]()
    kind = ALL_FAMILIES[FAMILY[name]]().backbone if name in FAMILY else None
    mesh = {"data": 2} if kind is None else MESHES["both"]
    keras.distribution.set_distribution(dpo_keras.distribution(kind, **mesh))
    # Sums over devices in half precision round to 1 of 2048, too.
    assert_same(VARIANTS[name](), expected, atol=4e-3 if name == "float16" else 1e-5)


def has_no_gradient(family, variable):
    """Whether a gradient is 0 but for its rounding, of which Adam makes steps all the same.

    The bias of keys, without rotation, adds the same number to all logits of a softmax.
    """
    return family == "gpt2" and variable.path.endswith("attention/key/bias")


def check_memory(model, mesh):
    """Each device holds a share of what is split, the optimizer's state and copies included."""
    split = [v for v in [*model.variables, *model.optimizer.variables] if min(shares(v)) < 1]
    along_model = [v for v in split if "model" in v.value.sharding.spec]
    held = sum(max(shares(v)) * v.value.nbytes for v in along_model)
    whole = sum(v.value.nbytes for v in along_model)
    assert held <= 1.1 * whole / mesh["model"]
    # What stays whole on each device is small: norms, biases, and what no axis divides.
    everything = sum(v.value.nbytes for v in model.policy.variables)
    policy = {id(v) for v in model.policy.variables}
    assert sum(v.value.nbytes for v in split if id(v) in policy) > 0.5 * everything


def test_adapters_state_and_copies_are_split_as_their_weights_are():
    on_mesh("llama", {"data": 2, "model": 4})
    policy = policy_of("llama", adapters=True)
    model = compiled_model(policy)
    layer = policy.backbone.transformer_layers[0]._self_attention_layer._query_dense
    kernel = layer._kernel.value.sharding.spec
    assert "model" in kernel
    assert tuple(layer.lora_kernel_a.value.sharding.spec)[: len(kernel) - 1] == kernel[:-1]
    states = [v for v in model.optimizer.variables if "lora_kernel_a" in v.path]
    assert states and all(min(shares(v)) == min(shares(layer.lora_kernel_a)) for v in states)
    keras.distribution.set_distribution(None)

    on_mesh("llama", {"data": 2, "model": 4})
    policy = policy_of("llama")
    model = compiled_model(policy, reference="frozen_copy")
    for source, copy in zip(policy.trainable_variables, model.reference.copies, strict=True):
        assert copy.value.sharding == source.value.sharding
        np.testing.assert_array_equal(copy, source)


def test_an_axis_that_does_not_divide_the_heads_goes_to_another_dimension():
    on_mesh("llama", {"model": 4})
    policy = policy_of("llama")  # 2 heads of keys, 97 tokens
    key = policy.backbone.transformer_layers[0]._self_attention_layer._key_dense.kernel
    assert key.shape[1] == 2 and min(shares(key)) == 0.25
    assert min(shares(policy.backbone.token_embedding.embeddings)) == 0.25


def test_each_device_scores_its_own_rows_alone():
    """The head sorts the places of tokens; over all rows, each device would compute all of them."""
    import jax

    on_mesh("gpt2", {"data": 8})
    scorer = ResponseScorer(policy_of("gpt2"))
    batch = {name: values.numpy() for name, values in next(iter(batches(8))).items()}
    current = keras.distribution.distribution()
    given = {
        name: jax.device_put(values, current.get_data_layout(values.shape).backend_layout)
        for name, values in batch.items()
    }

    def logps(values, batch):
        with ValuesInPlace(zip(scorer.variables, values, strict=True)):
            return scorer(batch)["logps"]

    compiled = jax.jit(logps).lower([v.value for v in scorer.variables], given).compile()
    text = compiled.as_text()
    assert "all-gather" not in text and "all-reduce" not in text
    found = compiled([v.value for v in scorer.variables], given)
    assert {shard.data.shape for shard in found.addressable_shards} == {(1, 2)}


def test_any_distribution_of_keras_will_do():
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*feedforward_intermediate_dense.kernel"] = (None, "model")
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    model = compiled_model(policy_of("gpt2"))
    assert model.replicas == 2
    model.fit(batches(8), verbose=0)
    kernel = model.policy.backbone.transformer_layers[0]._feedforward_intermediate_dense.kernel
    assert min(shares(kernel)) == 0.25


def test_every_layout_map_names_a_class_of_keras_hub():
    import keras_hub

    assert all(hasattr(keras_hub.models, name) for name in LAYOUTS)


class TestWrongMeshes:
    def test_more_devices_than_there_are(self):
        with pytest.raises(dpo_keras.InputError, match=r"needs 4 \* 4 devices, and there are 8"):
            dpo_keras.distribution(ALL_FAMILIES["gpt2"](), data=4, model=4)

    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
    def test_counts_that_are_none(self, value):
        with pytest.raises(dpo_keras.InputError, match=r"mesh\.data must be an integer >= 1"):
            dpo_keras.distribution(data=value)

    @pytest.mark.parametrize(
        ("family", "named"), [("bloom", "BloomBackbone"), (None, "this model")]
    )
    def test_a_family_without_layout_map(self, family, named):
        backbone = None if family is None else ALL_FAMILIES[family]().backbone
        with pytest.raises(dpo_keras.InputError, match=rf"no layout map of {named}.*Gemma3"):
            dpo_keras.distribution(backbone, model=2)

    def test_an_axis_that_divides_nothing(self):
        on_mesh("gpt2", {"model": 7})
        with pytest.raises(dpo_keras.InputError, match=r"mesh\.model divides no weight"):
            compiled_model(policy_of("gpt2"))

    def test_rows_that_devices_cannot_share(self):
        on_mesh("gpt2", {"data": 8})
        model = compiled_model(policy_of("gpt2"))
        before = weights_of(model.policy)
        with pytest.raises(dpo_keras.InputError, match="batch_size a multiple of 8"):
            model.fit(batches(12, batch_size=4), verbose=0)
        assert all(map(np.array_equal, before, weights_of(model.policy)))
