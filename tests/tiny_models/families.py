"""One tiny random model of each KerasHub causal language model."""

import keras
import keras_hub
import tiny

HEADS = 4
GROUPED = {"num_query_heads": HEADS, "num_key_value_heads": 2}
WINDOW = 6  # shorter than the texts, so that it is felt
IMAGE_SIZE = 16
PATCH_SIZE = 4
MROPE = [2, 1, 1]  # sections of time, height and width


def _policy(name, backbone, **arguments):
    """Build the task around a backbone, with weights that make every part of it matter."""
    policy = getattr(keras_hub.models, f"{name}CausalLM")(
        backbone=backbone, preprocessor=None, **arguments
    )
    for variable in policy.trainable_variables:
        # Fresh weights are so small that a wrong mask would hardly be seen.
        scale = 4.0 if len(variable.shape) > 1 else 1.0
        noise = 0.02 * keras.random.normal(variable.shape)
        variable.assign(scale * variable + keras.ops.cast(noise, variable.dtype))
    return policy


def _make(name, *, sizes=tiny.SIZES, encoder=None, task=None, **settings):
    """Return a function that builds a model.

    Args:
        name: What the backbone's class is called by.
        sizes: Settings that most backbones share.
        encoder: Builds the backbone's vision encoder.
        task: Arguments of the task and, as `name`, what its class is called by.
        **settings: Settings of the backbone.

    Returns:
        A function of the seed and of more settings for the backbone, such as its dtype.
    """

    def make(seed=0, **more):
        keras.utils.set_random_seed(seed)
        all_settings = {**sizes, **settings, **more}
        if encoder is not None:
            all_settings["vision_encoder"] = encoder(more.get("dtype", "float32"))
        backbone = getattr(keras_hub.models, f"{name}Backbone")(**all_settings)
        return _policy(**{"name": name, "backbone": backbone, **(task or {})})

    return make


def _gemma3_encoder(dtype):
    from keras_hub.src.models.gemma3.gemma3_vision_encoder import Gemma3VisionEncoder

    return Gemma3VisionEncoder(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        pool_size=2,
        num_heads=2,
        num_layers=1,
        hidden_dim=16,
        intermediate_dim=32,
        output_dim=tiny.SIZES["hidden_dim"],
        dtype=dtype,
    )


def _gemma4_encoder(dtype):
    from keras_hub.src.models.gemma4.gemma4_vision_encoder import Gemma4VisionEncoder

    return Gemma4VisionEncoder(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        pool_size=2,
        num_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_layers=1,
        hidden_dim=16,
        intermediate_dim=32,
        output_dim=tiny.SIZES["hidden_dim"],
        dtype=dtype,
    )


def qwen3_5_encoder(dtype):
    from keras_hub.src.models.qwen3_5.qwen3_5_vision_encoder import Qwen3_5VisionEncoder

    return Qwen3_5VisionEncoder(
        depth=1,
        hidden_size=16,
        num_heads=2,
        intermediate_size=32,
        patch_size=PATCH_SIZE,
        temporal_patch_size=2,
        spatial_merge_size=2,
        out_hidden_size=tiny.SIZES["hidden_dim"],
        num_position_embeddings=16,
        dtype=dtype,
    )


def _make_blip2(query_tokens):
    """Return a function that builds BLIP-2 around OPT; without query tokens it reads text only."""

    def make(seed=0, dtype="float32"):
        from keras_hub.src.models.blip2.blip2_custom_opt import BLIP2CustomOPT

        keras.utils.set_random_seed(seed)
        language_model = BLIP2CustomOPT(
            **tiny.SIZES,
            num_heads=2,
            dropout=0.0,
            max_sequence_length=24,
            num_query_tokens=query_tokens,
            qformer_hidden_dim=16,
            dtype=dtype,
        )
        encoder, qformer = _blip2_encoders(query_tokens, dtype) if query_tokens else (None, None)
        backbone = keras_hub.models.BLIP2Backbone(
            vision_encoder=encoder, qformer=qformer, language_model=language_model, dtype=dtype
        )
        return _policy("BLIP2", backbone)

    return make


def _blip2_encoders(query_tokens, dtype):
    from keras_hub.src.models.blip2.blip2_qformer import BLIP2QFormer
    from keras_hub.src.models.blip2.blip2_vision_encoder import BLIP2VisionEncoder

    shared = {"num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32, "dtype": dtype}
    encoder = BLIP2VisionEncoder(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        num_layers=1,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        **shared,
    )
    qformer = BLIP2QFormer(
        num_query_tokens=query_tokens,
        num_layers=1,
        vision_dim=16,
        cross_attention_frequency=2,
        dropout=0.0,
        layer_norm_epsilon=1e-5,
        **shared,
    )
    return encoder, qformer


GEMMA = {**GROUPED, "head_dim": 16}
GEMMA2 = {
    **GEMMA,
    "query_head_dim_normalize": False,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "final_logit_soft_cap": 30.0,
    "attention_logit_soft_cap": 5.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": WINDOW,
}
GEMMA3 = {
    **GEMMA,
    "image_size": IMAGE_SIZE,
    "num_layers": 6,
    "use_query_key_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": WINDOW,
}
GEMMA3N = {
    "text_vocab_size": tiny.VOCABULARY,
    "text_hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": [64, 64],
    "hidden_activation": "gelu_approximate",
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
    "rope_theta": 10000.0,
    "max_position_embeddings": 24,
    "vocab_size_per_layer_input": tiny.VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
    "laurel_rank": 4,
}
GEMMA4 = {
    **GEMMA,
    "image_size": IMAGE_SIZE,
    "sliding_window_size": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "global_head_dim": 32,
    "final_logit_soft_cap": 30.0,
}
# As in the models for phones: the last layers reuse keys and values, every layer reads the token.
GEMMA4_SMALL = {
    **GEMMA4,
    "num_layers": 4,
    "layer_types": 2 * ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
}
LLAMA3 = {
    **GROUPED,
    "rope_frequency_adjustment_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 32,
}
QWEN_MOE = {
    **GROUPED,
    "moe_intermediate_dim": 32,
    "num_experts": 4,
    "top_k": 2,
    "norm_top_k_prob": True,
    "sliding_window_size": WINDOW,
}
SHARED_EXPERT = {"shared_expert_intermediate_dim": 32, "use_sliding_window_attention": True}
QWEN3_5 = {
    **GROUPED,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 0.5,
    "sliding_window_size": WINDOW,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
QWEN3_5_MOE = {
    **{size: value for size, value in tiny.SIZES.items() if size != "intermediate_dim"},
    **QWEN3_5,
    "moe_intermediate_dim": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "top_k": 2,
}
PALI_GEMMA = {
    **GEMMA,
    "image_size": IMAGE_SIZE,
    "vit_patch_size": PATCH_SIZE,
    "vit_num_heads": 2,
    "vit_hidden_dim": 16,
    "vit_num_layers": 1,
    "vit_intermediate_dim": 32,
}
RWKV7 = {
    "vocabulary_size": tiny.VOCABULARY,
    "num_layers": 2,
    "hidden_size": 32,
    "intermediate_dim": 64,
    "head_size": 16,
    "gate_lora": 8,
    "mv_lora": 8,
    "aaa_lora": 8,
    "decay_lora": 8,
}
SMOLLM3 = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, False],
    "layer_types": ["attention", "attention"],
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 24,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}
ASSISTANT = {
    "name": "Gemma4Assistant",
    "backbone_hidden_size": 32,
    "num_centroids": 1,
    "centroid_intermediate_top_k": 1,
    "use_ordered_embeddings": True,
}

# Every causal language model of KerasHub that reads text.
ALL_FAMILIES = {
    "gpt2": _make("GPT2", num_heads=2, max_sequence_length=24),
    "opt": _make("OPT", num_heads=2, max_sequence_length=24),
    "llama": _make("Llama", **GROUPED),
    "llama3": _make("Llama3", **LLAMA3),
    "mistral": _make("Mistral", **GROUPED, sliding_window=WINDOW),
    "gemma": _make("Gemma", **GEMMA),
    "gemma2": _make("Gemma", **GEMMA2),
    "gemma3": _make("Gemma3", **GEMMA3),
    "qwen": _make("Qwen", **GROUPED, use_sliding_window_attention=True, sliding_window_size=WINDOW),
    "qwen3": _make("Qwen3", **GROUPED, head_dim=16, sliding_window_size=WINDOW),
    "phi3": _make("Phi3", **GROUPED),
    "gpt_neo_x": _make("GPTNeoX", num_heads=2, max_sequence_length=24),
    "bloom": _make("Bloom", num_heads=HEADS),
    "falcon": _make("Falcon", num_attention_heads=HEADS),
    "smollm3": _make("SmolLM3", **SMOLLM3),
    "gemma3n": _make("Gemma3n", sizes=GEMMA3N),
    "gemma4": _make("Gemma4", **GEMMA4_SMALL),
    "mixtral": _make("Mixtral", **GROUPED, num_experts=4, top_k=2, sliding_window=WINDOW),
    "qwen_moe": _make("QwenMoe", **QWEN_MOE, **SHARED_EXPERT),
    "qwen3_moe": _make("Qwen3Moe", **QWEN_MOE, head_dim=16),
    "gpt_oss": _make("GptOss", **GROUPED, num_experts=4, top_k=2, sliding_window=WINDOW),
    "gemma4_moe": _make(
        "Gemma4",
        **GEMMA4,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=4,
        expert_intermediate_dim=32,
        num_experts_per_token=2,
    ),
    "qwen3_5": _make("Qwen3_5", **QWEN3_5),
    "qwen3_5_moe": _make("Qwen3_5Moe", sizes=QWEN3_5_MOE),
    "rwkv7": _make("RWKV7", sizes=RWKV7),
    "gemma3_vision": _make("Gemma3", encoder=_gemma3_encoder, **{**GEMMA3, "num_layers": 2}),
    "gemma4_vision": _make("Gemma4", encoder=_gemma4_encoder, **GEMMA4),
    "qwen3_5_vision": _make("Qwen3_5", encoder=qwen3_5_encoder, **QWEN3_5, mrope_section=MROPE),
    "pali_gemma": _make("PaliGemma", **PALI_GEMMA),
    "blip2": _make_blip2(query_tokens=0),
    "blip2_vision": _make_blip2(query_tokens=4),
    "gemma4_assistant": _make("Gemma4", task=ASSISTANT, **GEMMA4, num_kv_shared_layers=2),
}

# The families that are packed.
PACKED = (
    "gpt2",
    "opt",
    "llama",
    "llama3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    "qwen",
    "qwen3",
    "phi3",
    "gpt_neo_x",
    "gemma4",
    "gemma4_moe",
    "gemma4_vision",
    "gemma3_vision",
    "bloom",
    "falcon",
    "smollm3",
    "mixtral",
    "qwen_moe",
    "qwen3_moe",
    "gpt_oss",
)
FAMILIES = {name: ALL_FAMILIES[name] for name in PACKED}
