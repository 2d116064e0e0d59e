"""One tiny random model of each KerasHub family that is packed."""

import keras
import keras_hub
import tiny

GROUPED = {"num_query_heads": 4, "num_key_value_heads": 2}
WINDOW = 6  # shorter than the texts, so that it is felt


def _make(name, **settings):
    def make(seed=0):
        keras.utils.set_random_seed(seed)
        sizes = {**tiny.SIZES, **settings}
        backbone = getattr(keras_hub.models, f"{name}Backbone")(**sizes)
        arguments = {"preprocessor": None} if name == "Gemma3" else {}
        policy = getattr(keras_hub.models, f"{name}CausalLM")(backbone=backbone, **arguments)
        for variable in policy.trainable_variables:
            # Fresh weights are so small that a wrong mask would hardly be seen.
            scale = 4.0 if len(variable.shape) > 1 else 1.0
            variable.assign(scale * variable + 0.02 * keras.random.normal(variable.shape))
        return policy

    return make


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
    "image_size": 16,
    "num_layers": 6,
    "use_query_key_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": WINDOW,
}
LLAMA3 = {
    **GROUPED,
    "rope_frequency_adjustment_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 32,
}
FAMILIES = {
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
}
