"""KerasHub's attention, position, norm and embedding layers: what is read off them."""

import keras
import keras_hub
import pytest
from families import FAMILIES, WINDOW

from dpo_keras.utils import keras_hub_attention as attention
from dpo_keras.utils import keras_hub_internals as internals
from dpo_keras.utils.keras_internals import all_layers

NAMES = {  # what is read off each kind of attention layer, beside the method itself
    "gpt2": ["_dropout", "_inverse_sqrt_key_dim"],
    "llama": ["_inv_norm_factor"],
    "gpt_neo_x": ["dropout", "_inv_norm_factor"],
    "mistral": ["_sliding_window", "_inv_norm_factor"],
    "qwen": ["use_sliding_window_attention", "sliding_window_size", "_inv_norm_factor"],
    "qwen3": ["sliding_window_size", "_inv_norm_factor"],
    "gemma2": ["query_head_dim_normalize", "head_dim", "logit_soft_cap", "sliding_window_size"],
    "gemma3": ["query_head_dim_normalize", "head_dim", "dropout", "use_sliding_window_attention"],
    "mixtral": ["sliding_window", "_inv_norm_factor"],
    "gpt_oss": ["sliding_window", "sinks", "_inv_norm_factor"],
    "bloom": ["inv_norm_factor", "_alibi_layer", "num_heads", "_query_dense", "_output_dense"],
    "falcon": ["inv_norm_factor", "num_heads", "query_dense", "value_dense"],
}
FOUND = {  # scale, soft cap and window of the first attention layer
    "gpt2": (16**-0.5, None, None),
    "llama": (8**-0.5, None, None),
    "gpt_neo_x": (16**-0.5, None, None),
    "mistral": (8**-0.5, None, WINDOW),
    "qwen": (8**-0.5, None, WINDOW),
    "qwen3": (16**-0.5, None, WINDOW),
    "gemma2": (16**-0.5, 5.0, WINDOW),
    "gemma3": (16**-0.5, None, WINDOW),
    "mixtral": (8**-0.5, None, WINDOW),
    "gpt_oss": (8**-0.5, None, None),
    "bloom": (8**-0.5, None, None),
    "falcon": (8**-0.5, None, None),
}


class Without:
    """A layer of another release: as the original, but for one name."""

    def __init__(self, original, name):
        self._original, self._name = original, name

    def __getattr__(self, name):
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._original, name)


def without(layer, name):
    return type(type(layer).__name__, (Without,), {})(layer, name)


def first(family, chosen):
    return next(layer for layer in all_layers(FAMILIES[family]().backbone) if chosen(layer))


@pytest.mark.parametrize("family", NAMES)
def test_attention_settings_are_read_and_missing_names_are_told(family):
    layer = first(family, attention.is_attention)
    settings = attention.attention_settings(layer)
    scale, soft_cap, window = FOUND[family]
    assert settings.scale == pytest.approx(scale)
    assert (settings.soft_cap, settings.window) == (soft_cap, window)
    assert settings.returns_weights == (family == "gpt2")
    method = [attention.ATTENTION_METHOD] if settings.projections is None else []
    for name in [*method, *NAMES[family]]:
        message = rf"Keras(Hub)? [\d.]+ has no {type(layer).__name__}\.{name}, .* Install keras"
        with pytest.raises(RuntimeError, match=message):
            attention.attention_settings(without(layer, name))


def test_gemma_may_scale_by_the_width_of_the_model():
    layer = first("gemma2", attention.is_attention)
    layer.query_head_dim_normalize = False  # KerasHub 0.32 loses this setting of the backbone
    assert attention.attention_settings(layer).scale == pytest.approx(8**-0.5)
    with pytest.raises(RuntimeError, match=r"KerasHub [\d.]+ has no \w+\.num_query_heads"):
        attention.attention_settings(without(layer, "num_query_heads"))


def test_layers_of_other_kinds_have_no_settings():
    layer = keras.layers.Dense(2)
    assert attention.attention_settings(layer) is None
    assert internals.norm_settings(layer) is None
    assert not attention.is_position(layer)
    assert internals.transformer_blocks(layer) == []


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_positions_norms_and_blocks_are_found(family):
    backbone = FAMILIES[family]().backbone
    assert len(internals.transformer_blocks(backbone)) == backbone.num_layers
    assert any(attention.is_position(layer) for layer in all_layers(backbone))
    norm = first(family, lambda layer: internals.norm_settings(layer) is not None)
    assert internals.norm_settings(norm)["epsilon"] == norm.epsilon
    with pytest.raises(RuntimeError, match=r"KerasHub [\d.]+ has no \w+\.epsilon"):
        internals.norm_settings(without(norm, "epsilon"))


def test_a_reversible_embedding_tells_how_it_projects():
    layer = keras_hub.layers.ReversibleEmbedding(8, 4, tie_weights=False, logit_soft_cap=30.0)
    assert internals.reversible_settings(layer) == (False, 30.0, None)
    with pytest.raises(RuntimeError, match=r"Keras [\d.]+ has no ReversibleEmbedding\.logit_so"):
        internals.reversible_settings(without(layer, "logit_soft_cap"))


def test_tied_embeddings_are_told():
    assert internals.ties_embeddings(FAMILIES["gpt2"]().backbone) is True
    assert internals.ties_embeddings(FAMILIES["llama"]().backbone) is False
    assert internals.ties_embeddings(None) is None


def test_presets_are_known_without_importing_keras_hub():
    listed = internals.listed_presets()
    assert {"gpt2_base_en", "gemma3_1b", "qwen3_0.6b_en"} <= listed
    assert listed <= set(keras_hub.models.CausalLM.presets)
