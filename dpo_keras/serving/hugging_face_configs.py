"""The config.json of each family: a KerasHub backbone's settings under Hugging Face's names.

Each function is what KerasHub calls `get_<family>_config`. Where KerasHub 0.32 has one, it is used,
and what is wrong or missing in it is mended here.
"""

from __future__ import annotations

import keras

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.keras_hub_exporters import exporter_config, layer_at

Config = dict[str, JSON]


def _decoder(backbone: keras.Model, architecture: str, model_type: str, **more: JSON) -> Config:
    """Return the settings that most decoders share; `more` wins."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": backbone.vocabulary_size,
        "hidden_size": backbone.hidden_dim,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": getattr(backbone, "num_query_heads", None),
        "num_key_value_heads": backbone.num_key_value_heads,
        "intermediate_size": backbone.intermediate_dim,
        "hidden_act": "silu",
        "rms_norm_eps": backbone.layer_norm_epsilon,
        "rope_theta": getattr(backbone, "rope_max_wavelength", None),
        "attention_dropout": getattr(backbone, "dropout", 0.0),
        "tie_word_embeddings": backbone.token_embedding.tie_weights,
        "use_cache": True,
        **more,
    }


def _linear_scaling(backbone: keras.Model, name: str = "rope_scaling_factor") -> Config:
    """Return the entry for positions that are divided by a factor; empty for a factor of 1."""
    factor = getattr(backbone, name, 1.0)
    return {} if factor == 1.0 else {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _windows(backbone: keras.Model, window: int | None) -> Config:
    """Return the entries of the Qwen families for a sliding window in every layer, or in none."""
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": backbone.num_layers if window is None else 0,
        "layer_types": [kind] * backbone.num_layers,
    }


def gpt2(backbone: keras.Model) -> Config:
    """GPT-2. KerasHub leaves out the architecture."""
    return {
        **exporter_config(backbone),
        "architectures": ["GPT2LMHeadModel"],
        "tie_word_embeddings": True,
    }


def llama(backbone: keras.Model) -> Config:
    """Llama and Llama 2."""
    config = _decoder(backbone, "LlamaForCausalLM", "llama")
    config |= {"attention_bias": False, "mlp_bias": False}
    config |= {"max_position_embeddings": 4096, "head_dim": _head_dim(backbone)}
    scaled = backbone.rope_frequency_adjustment_factor is not None
    return config | (_llama3_scaling(backbone) if scaled else _position_scaling(backbone))


def _llama3_scaling(backbone: keras.Model) -> Config:
    return {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": backbone.rope_frequency_adjustment_factor,
            "low_freq_factor": backbone.rope_low_freq_factor,
            "high_freq_factor": backbone.rope_high_freq_factor,
            "original_max_position_embeddings": backbone.rope_pretraining_sequence_length,
        }
    }


def _position_scaling(backbone: keras.Model) -> Config:
    return _linear_scaling(backbone, "rope_position_scaling_factor")


def llama3(backbone: keras.Model) -> Config:
    """Llama 3. KerasHub leaves out a linear scaling of positions."""
    config = exporter_config(backbone)
    return config if "rope_scaling" in config else config | _position_scaling(backbone)


def _head_dim(backbone: keras.Model) -> int:
    return int(getattr(backbone, "head_dim", 0) or backbone.hidden_dim // backbone.num_query_heads)


def mistral(backbone: keras.Model) -> Config:
    """Mistral. KerasHub derives the width of heads, which Mistral NeMo sets apart."""
    config = exporter_config(backbone) | _linear_scaling(backbone)
    return config | {"head_dim": _head_dim(backbone)}


def qwen(backbone: keras.Model) -> Config:
    """Qwen 2 and 2.5. KerasHub leaves out the architecture and the sliding window."""
    window = backbone.sliding_window_size if backbone.use_sliding_window_attention else None
    further = {**_linear_scaling(backbone), **_windows(backbone, window)}
    return {**exporter_config(backbone), "architectures": ["Qwen2ForCausalLM"], **further}


def qwen3(backbone: keras.Model) -> Config:
    """Qwen 3."""
    config = _decoder(backbone, "Qwen3ForCausalLM", "qwen3")
    config |= {"head_dim": backbone.head_dim, "attention_bias": False}
    config |= {"max_position_embeddings": 40960}
    return config | _linear_scaling(backbone) | _windows(backbone, backbone.sliding_window_size)


def qwen3_moe(backbone: keras.Model) -> Config:
    """Qwen 3 with experts."""
    config = _decoder(backbone, "Qwen3MoeForCausalLM", "qwen3_moe")
    window = backbone.sliding_window_size
    config |= _linear_scaling(backbone)
    return config | {
        "head_dim": _head_dim(backbone),
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": backbone.num_layers if window is None else 0,
        "moe_intermediate_size": backbone.moe_intermediate_dim,
        "num_experts": backbone.num_experts,
        "num_experts_per_tok": backbone.top_k,
        "norm_topk_prob": backbone.norm_top_k_prob,
        "decoder_sparse_step": backbone.decoder_sparse_step,
        "mlp_only_layers": list(backbone.mlp_only_layers),
        "router_aux_loss_coef": backbone.router_aux_loss_coefficient,
        "output_router_logits": False,
    }


def mixtral(backbone: keras.Model) -> Config:
    """Mixtral."""
    config = _decoder(backbone, "MixtralForCausalLM", "mixtral")
    return config | {
        "head_dim": _head_dim(backbone),
        "max_position_embeddings": 32768,
        "sliding_window": backbone.sliding_window,
        "num_local_experts": backbone.num_experts,
        "num_experts_per_tok": backbone.top_k,
        "router_aux_loss_coef": backbone.router_aux_loss_coef,
        "router_jitter_noise": backbone.router_jitter_noise,
        "output_router_logits": False,
        **_linear_scaling(backbone),
    }


def phi3(backbone: keras.Model) -> Config:
    """Phi-3; its `su` scaling of positions is called `longrope`, too."""
    config = _decoder(backbone, "Phi3ForCausalLM", "phi3")
    config |= {
        "max_position_embeddings": backbone.max_sequence_length,
        "original_max_position_embeddings": backbone.pretraining_sequence_length,
        "sliding_window": None,
        "pad_token_id": None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }
    if backbone.rope_scaling_type == "su":
        config["rope_scaling"] = {
            "type": "longrope",
            "rope_type": "longrope",
            "short_factor": list(backbone.rope_scaling_short_factor),
            "long_factor": list(backbone.rope_scaling_long_factor),
        }
    return config


def smollm3(backbone: keras.Model) -> Config:
    """SmolLM3; `no_rope_layers` is 1 where a layer has rotary positions, as in its checkpoints."""
    return _decoder(
        backbone,
        "SmolLM3ForCausalLM",
        "smollm3",
        num_attention_heads=backbone.num_attention_heads,
        rope_theta=backbone.rope_theta,
        attention_dropout=backbone.attention_dropout,
        max_position_embeddings=backbone.max_position_embeddings,
        attention_bias=backbone.attention_bias,
        mlp_bias=backbone.mlp_bias,
        no_rope_layers=[int(enabled) for enabled in backbone.rope_layer_enabled_list],
        # KerasHub's attention is full in every layer, whatever its `layer_types` say.
        layer_types=["full_attention"] * backbone.num_layers,
        use_sliding_window=False,
        sliding_window=None,
        pad_token_id=None,
    )


def gpt_oss(backbone: keras.Model) -> Config:
    """GPT-OSS, in the layout without MXFP4."""
    layers = range(backbone.num_layers)
    config = _decoder(backbone, "GptOssForCausalLM", "gpt_oss")
    return config | {
        "head_dim": _head_dim(backbone),
        "attention_bias": True,
        "max_position_embeddings": 131072,
        "initial_context_length": 4096,
        "num_local_experts": backbone.num_experts,
        "num_experts_per_tok": backbone.top_k,
        "output_router_logits": False,
        # KerasHub's window counts the tokens before the one that sees them.
        "sliding_window": backbone.sliding_window + 1,
        "layer_types": ["sliding_attention" if i % 2 else "full_attention" for i in layers],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": backbone.rope_scaling_factor,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    }


def gemma(backbone: keras.Model) -> Config:
    """Gemma and Gemma 2. KerasHub's exporter writes Gemma 2 as if it were Gemma."""
    config = _decoder(backbone, "GemmaForCausalLM", "gemma")
    config |= {
        "head_dim": backbone.head_dim,
        # KerasHub counts the gate's half.
        "intermediate_size": backbone.intermediate_dim // 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "attention_bias": False,
    }
    second = (backbone.use_post_ffw_norm, backbone.use_post_attention_norm)
    if second == (False, False):
        _check_first_gemma(backbone)
        return config
    if second != (True, True):
        rule = "must have both norms behind attention and feed-forward layers, or neither"
        raise InputError(InputProblem("model", f"{rule}: Hugging Face has no other Gemma"))
    sliding = backbone.use_sliding_window_attention
    kinds = ["sliding_attention" if sliding and i % 2 == 0 else "full_attention" for i in range(2)]
    return config | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": _query_scalar(backbone),
        "attn_logit_softcapping": backbone.attention_logit_soft_cap,
        "final_logit_softcapping": backbone.final_logit_soft_cap,
        "sliding_window": backbone.sliding_window_size,
        "layer_types": [kinds[i % 2] for i in range(backbone.num_layers)],
    }


def _query_scalar(backbone: keras.Model) -> int:
    """Return the number by whose root queries are divided.

    It is read off a layer: KerasHub's Gemma 2 does not hand the backbone's setting on.
    """
    if layer_at(backbone.transformer_layers[0], "attention.query_head_dim_normalize"):
        return int(backbone.head_dim)
    return int(backbone.hidden_dim // backbone.num_query_heads)


def _check_first_gemma(backbone: keras.Model) -> None:
    rules = {
        "attention_logit_soft_cap": backbone.attention_logit_soft_cap,
        "final_logit_soft_cap": backbone.final_logit_soft_cap,
        "use_sliding_window_attention": backbone.use_sliding_window_attention or None,
    }
    if found := [name for name, value in rules.items() if value is not None]:
        rule = f"has {', '.join(found)}, which Hugging Face's Gemma (the first) does not know"
        raise InputError(InputProblem("model", rule))


def gemma3(backbone: keras.Model) -> Config:
    """Gemma 3. KerasHub swaps the ids of start and end, and leaves out the logits' soft caps."""
    needed = ("use_query_key_norm", "use_post_ffw_norm", "use_post_attention_norm")
    if missing := [name for name in needed if not getattr(backbone, name)]:
        rule = f"must have {', '.join(f'{name}=True' for name in missing)}, as all of Hugging "
        raise InputError(InputProblem("model", f"{rule}Face's Gemma 3 models have"))
    config = exporter_config(backbone)
    text = config.get("text_config", config)
    text |= {
        "bos_token_id": 2,
        "eos_token_id": 1,
        "tie_word_embeddings": backbone.token_embedding.tie_weights,
        "attn_logit_softcapping": backbone.attention_logit_soft_cap,
        "final_logit_softcapping": backbone.final_logit_soft_cap,
        "query_pre_attn_scalar": _query_scalar(backbone),
        "use_bidirectional_attention": bool(backbone.use_bidirectional_attention),
    }
    text.pop("torch_dtype", None)
    if text is not config:
        text["model_type"] = "gemma3_text"
        config["tie_word_embeddings"] = text["tie_word_embeddings"]
    return config


def gemma4(backbone: keras.Model) -> Config:
    """Gemma 4. KerasHub names architectures that do not exist, and leaves out shared K and V."""
    config = exporter_config(backbone)
    text_only = "text_config" not in config
    names = ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration")
    shared = backbone.num_global_key_value_heads
    mended = {
        "tie_word_embeddings": backbone.token_embedding.tie_weights,
        "attention_k_eq_v": shared is not None,
        "num_global_key_value_heads": shared,  # with a number KerasHub reads K for V
    }
    (config if text_only else config["text_config"]).update(mended)
    tied = mended["tie_word_embeddings"]
    return {**config, "architectures": [names[not text_only]], "tie_word_embeddings": tied}


def qwen3_5(backbone: keras.Model) -> Config:
    """Qwen 3.5. KerasHub writes text models as vision models without a vision part."""
    window, longest = backbone.sliding_window_size, 32768  # KerasHub's own setting of all presets
    if window is not None and window < longest:
        rule = f"has a sliding window of {window} tokens, and Hugging Face's Qwen 3.5 has none"
        raise InputError(InputProblem("model", rule))
    config = exporter_config(backbone)
    config["text_config"] |= {"mtp_num_hidden_layers": 0}
    if "vision_config" in config:
        return config
    return {**config["text_config"], "architectures": ["Qwen3_5ForCausalLM"]}
