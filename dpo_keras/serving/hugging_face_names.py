"""Hugging Face's names for the weights of KerasHub's families, as small tables.

A table maps the modules of a Hugging Face block to the layers of a KerasHub block. With it go the
weights of families that KerasHub 0.32 has no exporter for (or a wrong one), and the LoRA adapters
of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import keras
import numpy as np
from keras import ops

from dpo_keras.serving import hugging_face_configs as configs
from dpo_keras.utils.keras_hub_exporters import exporter_weights, has_layer_at, layer_at
from dpo_keras.utils.keras_hub_internals import transformer_blocks

Weights = dict[str, np.ndarray]
Paths = str | tuple[str, ...]
"""Where a layer is in a block; several where Hugging Face has them in one."""


@dataclass(frozen=True)
class Family:
    """How to write one kind of KerasHub backbone for Hugging Face's `transformers`.

    Args:
        config: Return the content of config.json.
        dense: Dense layers of a block, by the names of Hugging Face's modules.
        norms: The other layers of a block; None where KerasHub's exporter writes the weights.
        blocks: Hugging Face's name for the list of blocks.
        experts: Return weights of a block that belong to no layer, by their names in the block.
    """

    config: Callable[[keras.Model], configs.Config]
    dense: Mapping[str, Paths]
    norms: Mapping[str, str] | None = None
    blocks: str = "model.layers"
    experts: Callable[[keras.layers.Layer], Weights] | None = field(default=None)

    def block_layers(self, backbone: keras.Model) -> Iterator[tuple[str, list[keras.layers.Layer]]]:
        """Yield each Hugging Face module of the blocks with the KerasHub layers that make it."""
        for number, block in enumerate(transformer_blocks(backbone)):
            for name, paths in {**self.dense, **(self.norms or {})}.items():
                places = [paths] if isinstance(paths, str) else paths
                if has_layer_at(block, places[0]):
                    prefix = f"{self._blocks_of(backbone)}.{number}.{name}"
                    yield prefix, [layer_at(block, place) for place in places]

    def _blocks_of(self, backbone: keras.Model) -> str:
        seeing = getattr(backbone, "vision_encoder", None) is not None
        hearing = getattr(backbone, "audio_encoder", None) is not None
        return (
            self.blocks.replace("model.", "model.language_model.")
            if seeing or hearing
            else self.blocks
        )

    def weights(self, backbone: keras.Model) -> Weights:
        """Return all weights by Hugging Face's names. LoRA must be merged (`merged_adapters`)."""
        if self.norms is None:
            weights = {name: _array(value) for name, value in exporter_weights(backbone).items()}
            return _mended(weights, backbone)
        embedding = backbone.token_embedding
        weights = {"model.embed_tokens.weight": _array(embedding.embeddings)}
        for name, layers in self.block_layers(backbone):
            weights |= {f"{name}.{kind}": value for kind, value in _parameters(layers).items()}
        if self.experts is not None:
            for number, block in enumerate(transformer_blocks(backbone)):
                found = self.experts(block)
                weights |= {f"{self.blocks}.{number}.{name}": v for name, v in found.items()}
        final = getattr(backbone, "layer_norm", None) or backbone.norm
        weights["model.norm.weight"] = _array(final.scale)
        if not embedding.tie_weights:
            weights["lm_head.weight"] = _array(embedding.reverse_embeddings).T
        return weights


def _mended(weights: Weights, backbone: keras.Model) -> Weights:
    """Leave out tied heads, which KerasHub writes twice, and name text-only Qwen 3.5 as such."""
    if backbone.token_embedding.tie_weights:
        weights.pop("lm_head.weight", None)
    if type(backbone).__name__ == "Qwen3_5Backbone" and backbone.vision_encoder is None:
        return {name.replace("language_model.", ""): value for name, value in weights.items()}
    return weights


def _array(value: object) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(value))


def kernel_axes(layer: keras.layers.Layer) -> tuple[list[int], list[int]]:
    """Return which axes of a dense layer's kernel are its inputs, and which its outputs."""
    if not isinstance(layer, keras.layers.EinsumDense):
        return [0], [1]
    inputs, kernel = layer.equation.split("->")[0].split(",")
    axes = range(len(kernel))
    return [i for i in axes if kernel[i] in inputs], [i for i in axes if kernel[i] not in inputs]


def _parameters(layers: list[keras.layers.Layer]) -> Weights:
    """Return weight and bias of one Hugging Face module, in PyTorch's layout."""
    if not isinstance(layers[0], keras.layers.Dense | keras.layers.EinsumDense):
        return {"weight": _array(layers[0].scale)}
    found = {"weight": np.concatenate([_matrix(layer) for layer in layers])}
    if layers[0].bias is not None:
        found["bias"] = np.concatenate([_array(layer.bias).reshape(-1) for layer in layers])
    return found


def _matrix(layer: keras.layers.Layer) -> np.ndarray:
    """Return a dense layer's kernel as PyTorch has it, [outputs, inputs]."""
    inputs, outputs = kernel_axes(layer)
    kernel = _array(layer.kernel)
    width = int(np.prod([kernel.shape[axis] for axis in inputs]))
    return kernel.transpose(outputs + inputs).reshape(-1, width)


# -- experts: Hugging Face numbers them, except for GPT-OSS --------------------------------------


def _mixtral_experts(block: keras.layers.Layer) -> Weights:
    bank = "_sparse_moe_block.expert_bank._expert_feedforward_"
    names = {"w1": "gate_dense", "w3": "intermediate_dense", "w2": "output_dense"}
    kernels = {name: _array(layer_at(block, bank + path)) for name, path in names.items()}
    return {
        f"block_sparse_moe.experts.{expert}.{name}.weight": kernel.T
        for name, stacked in kernels.items()
        for expert, kernel in enumerate(stacked)
    }


def _qwen3_experts(block: keras.layers.Layer) -> Weights:
    bank = "mlp.expert_bank._expert_feedforward_"
    if not has_layer_at(block, "mlp.expert_bank"):  # a layer without experts
        return {}
    gate, up = np.split(_array(layer_at(block, f"{bank}gate_dense")), 2, axis=-1)
    down = _array(layer_at(block, f"{bank}output_dense"))
    return {
        f"mlp.experts.{expert}.{name}_proj.weight": kernel.T
        for name, stacked in {"gate": gate, "up": up, "down": down}.items()
        for expert, kernel in enumerate(stacked)
    }


def _gpt_oss_experts(block: keras.layers.Layer) -> Weights:
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    experts = layer_at(block, "sparse_moe_block.experts")
    found = {f"mlp.experts.{name}": _array(layer_at(experts, name)) for name in names}
    return found | {"self_attn.sinks": _array(layer_at(block, "self_attention_layer.sinks"))}


# -- the tables ----------------------------------------------------------------------------------


def _attention(layer: str, underscore: str = "_") -> dict[str, str]:
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    return {f"self_attn.{ours}": f"{layer}.{underscore}{k}_dense" for ours, k in names.items()}


LLAMA_MLP = {
    "mlp.gate_proj": "_feedforward_gate_dense",
    "mlp.up_proj": "_feedforward_intermediate_dense",
    "mlp.down_proj": "_feedforward_output_dense",
}
LLAMA = {**_attention("_self_attention_layer"), **LLAMA_MLP}
LLAMA_NORMS = {
    "input_layernorm": "_self_attention_layernorm",
    "post_attention_layernorm": "_feedforward_layernorm",
}
QWEN3_NORMS = {
    **LLAMA_NORMS,
    "self_attn.q_norm": "_self_attention_layer._query_dense_layer_norm",
    "self_attn.k_norm": "_self_attention_layer._key_dense_layer_norm",
}
SAME_NORMS = {name: name for name in ("input_layernorm", "post_attention_layernorm")}
GEMMA = {
    **_attention("attention", ""),
    "mlp.gate_proj": "gating_ffw",
    "mlp.up_proj": "gating_ffw_2",
    "mlp.down_proj": "ffw_linear",
}
GEMMA4 = {
    **GEMMA,
    "per_layer_input_gate": "per_layer_input_gate",
    "per_layer_projection": "per_layer_up_proj",
    "router.proj": "moe_router.proj",
}
QWEN3_5 = {
    **LLAMA,
    **{
        f"linear_attn.in_proj_{part}": f"_linear_attn.in_proj_{part}"
        for part in ("qkv", "z", "b", "a")
    },
    "linear_attn.out_proj": "_linear_attn.out_proj",
}
PHI3: dict[str, Paths] = {
    "self_attn.qkv_proj": ("attention.query_dense", "attention.key_dense", "attention.value_dense"),
    "self_attn.o_proj": "attention.output_dense",
    "mlp.gate_up_proj": ("feedforward_gate_dense", "feedforward_intermediate_dense"),
    "mlp.down_proj": "feedforward_output_dense",
}
PHI3_NORMS = {
    "input_layernorm": "pre_attention_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}
SMOLLM3 = {
    **{
        f"self_attn.{name}": f"self_attn.{name}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    },
    **{f"mlp.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
MIXTRAL = {
    **_attention("_self_attention_layer", ""),
    "block_sparse_moe.gate": "_sparse_moe_block._sparse_feedforward_gate_dense",
}
QWEN3_MOE = {**LLAMA, "mlp.gate": "mlp._sparse_feedforward_gate_dense"}
GPT_OSS = {
    **_attention("self_attention_layer", ""),
    "mlp.router": "sparse_moe_block.router.router_dense",
}
GPT2: dict[str, Paths] = {
    "attn.c_attn": tuple(
        f"_self_attention_layer._{part}_dense" for part in ("query", "key", "value")
    ),
    "attn.c_proj": "_self_attention_layer._output_dense",
    "mlp.c_fc": "_feedforward_intermediate_dense",
    "mlp.c_proj": "_feedforward_output_dense",
}


def _gemma(backbone: keras.Model) -> Family:
    norms = {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": "pre_ffw_norm"}
    if backbone.use_post_ffw_norm:  # Gemma 2
        norms |= {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "pre_ffw_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    return Family(configs.gemma, GEMMA, norms)


_FAMILIES: dict[str, Family | Callable[[keras.Model], Family]] = {
    # KerasHub writes the weights of these,
    "GPT2Backbone": Family(configs.gpt2, GPT2, blocks="transformer.h"),
    "Llama3Backbone": Family(configs.llama3, LLAMA),
    "MistralBackbone": Family(configs.mistral, LLAMA),
    "QwenBackbone": Family(configs.qwen, LLAMA),
    "Qwen3_5Backbone": Family(configs.qwen3_5, QWEN3_5),
    "Gemma3Backbone": Family(configs.gemma3, GEMMA),
    "Gemma4Backbone": Family(configs.gemma4, GEMMA4),
    # and the tables above the weights of those.
    "GemmaBackbone": _gemma,
    "LlamaBackbone": Family(configs.llama, LLAMA, LLAMA_NORMS),
    "Qwen3Backbone": Family(configs.qwen3, LLAMA, QWEN3_NORMS),
    "Phi3Backbone": Family(configs.phi3, PHI3, PHI3_NORMS),
    "SmolLM3Backbone": Family(configs.smollm3, SMOLLM3, SAME_NORMS),
    "MixtralBackbone": Family(configs.mixtral, MIXTRAL, LLAMA_NORMS, experts=_mixtral_experts),
    "Qwen3MoeBackbone": Family(configs.qwen3_moe, QWEN3_MOE, QWEN3_NORMS, experts=_qwen3_experts),
    "GptOssBackbone": Family(configs.gpt_oss, GPT_OSS, SAME_NORMS, experts=_gpt_oss_experts),
}
FAMILIES = tuple(sorted(name.removesuffix("Backbone") for name in _FAMILIES))
"""What can be written, by the names of KerasHub's classes."""


def family_of(backbone: keras.Model) -> Family | None:
    """Return how a backbone is written for Hugging Face; None for a family that is not known."""
    found = _FAMILIES.get(type(backbone).__name__)
    return found if found is None or isinstance(found, Family) else found(backbone)
