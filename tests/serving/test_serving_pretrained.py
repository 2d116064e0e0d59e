"""Policies written for other libraries: read back by KerasHub, PEFT's arithmetic, tokens, cards."""

import json

import families
import keras
import keras_hub
import numpy as np
import pytest
import serving_tiny
import tiny
import tokenizers
import yaml
from assembling import assemble
from safetensors.numpy import load_file

import dpo_keras
from dpo_keras.batching import TextEncoder, get_template
from dpo_keras.errors import InputError
from dpo_keras.serving import save_pretrained
from dpo_keras.serving.hugging_face_names import FAMILIES
from dpo_keras.serving.hugging_face_tokenizer import write_tokenizer

IDS = np.arange(3, 27, dtype="int32").reshape(2, 12)
BATCH = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
GEMMA3 = {"num_layers": 2, "use_post_ffw_norm": True, "use_post_attention_norm": True}
# KerasHub reads GPT-2 with an MLP of four times the width, whatever config.json says.
# It does not read that Qwen has a window.
SETTINGS = {
    "gemma3": GEMMA3,
    "gpt2": {"intermediate_dim": 128},
    "qwen": {"use_sliding_window_attention": False},
}
TARGETS = [
    *("query", "key", "value", "attention_output", "q_proj", "v_proj", "o_proj", "down_proj"),
    *("feedforward_gate_dense", "feedforward_output_dense", "ffw_gating", "ffw_linear"),
]


def plain(family, **settings):
    return families.ALL_FAMILIES[family](**SETTINGS.get(family, {}), **settings)


def adapted(family, **settings):
    """A policy whose adapters have moved, in attention and MLP."""
    policy = plain(family, **settings)
    policy.backbone.enable_lora(2, target_layer_names=TARGETS)
    random = np.random.default_rng(0)
    for variable in policy.trainable_variables:
        variable.trainable = "lora" in variable.name
        if variable.trainable:
            variable.assign(random.normal(size=variable.shape, scale=0.1).astype("float32"))
    return policy


def weights_of(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "tolerance"),
    # KerasHub reads Mistral in float16.
    [(name, 1e-4) for name in ("gpt2", "llama", "llama3", "gemma", "gemma2", "gemma3", "qwen")]
    + [(name, 1e-4) for name in ("qwen3", "qwen3_moe", "mixtral", "smollm3")]
    + [("mistral", 2e-1)],
)
def test_keras_hub_reads_back_the_hugging_face_directory_with_merged_adapters(
    tmp_path, family, tolerance
):
    policy = adapted(family)
    save_pretrained(policy, tmp_path / "out", "transformers")
    back = keras_hub.models.Backbone.from_preset(str(tmp_path / "out"))
    expected = np.asarray(policy.backbone(BATCH))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(back(BATCH)), expected, atol=tolerance * scale)
    base = np.asarray(plain(family).backbone(BATCH))
    assert np.abs(base - expected).max() > 10 * tolerance  # the adapters are felt


def test_a_quantized_policy_is_written_as_the_numbers_that_it_computes_with(tmp_path):
    policy = plain("llama")
    dpo_keras.quantize(policy, "int4", group_size=8)
    dpo_keras.enable_lora(policy, 2)
    for variable in policy.trainable_variables:
        variable.assign(keras.random.normal(variable.shape, stddev=0.1, seed=0))
    expected = np.asarray(policy.backbone(BATCH))
    save_pretrained(policy, tmp_path / "hf", "transformers")
    save_pretrained(policy, tmp_path / "preset", "keras_hub")
    for name in ("hf", "preset"):
        back = keras_hub.models.Backbone.from_preset(str(tmp_path / name))
        np.testing.assert_allclose(np.asarray(back(BATCH)), expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(policy.backbone(BATCH)), expected, atol=1e-6)
    save_pretrained(policy, tmp_path / "peft", "peft", source="some/base")
    card = (tmp_path / "peft" / "README.md").read_text(encoding="utf-8")
    assert "quantized to int4" in card


@pytest.mark.parametrize("family", ["gpt2", "gemma", "phi3", "smollm3", "gpt_oss", "qwen"])
def test_peft_adapters_make_the_merged_weights_of_the_base_weights(tmp_path, family):
    policy = adapted(family)
    save_pretrained(policy, tmp_path / "merged", "transformers")
    save_pretrained(policy, tmp_path / "adapters", "peft", source="base/model")
    for layer in policy.backbone._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            layer.lora_enabled = False
    save_pretrained(policy, tmp_path / "base", "transformers")
    merged, base = weights_of(tmp_path / "merged"), weights_of(tmp_path / "base")
    files = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    made = set()
    for name in sorted(files):
        if not name.endswith("lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        down, up = files[name], files[name.replace("lora_A", "lora_B")]
        key = next(
            k
            for k in (module, module.split(".")[-1])
            if k in config["rank_pattern"] or k == module.split(".")[-1]
        )
        assert config["rank_pattern"].get(key, config["r"]) == len(down)
        alpha = config["alpha_pattern"].get(key, config["lora_alpha"])
        change = alpha / len(down) * up @ down
        weight = f"{module}.weight"
        change = change.T if config["fan_in_fan_out"] else change
        np.testing.assert_allclose(base[weight] + change, merged[weight], atol=1e-5)
        made.add(weight)
    assert made == changed
    assert config["base_model_name_or_path"] == "base/model" and config["bias"] == "none"


def test_biases_that_were_trained_beside_adapters_are_written_too(tmp_path):
    policy = families.ALL_FAMILIES["qwen"]()
    policy.backbone.enable_lora(2)
    for variable in policy.trainable_variables:  # KerasHub leaves the adapted layers' biases
        variable.assign(variable + 0.1)
    save_pretrained(policy, tmp_path / "out", "peft")
    files = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    layer = policy.backbone.transformer_layers[0]._self_attention_layer._query_dense
    written = files["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"]
    np.testing.assert_array_equal(written, np.asarray(layer.bias).reshape(-1))
    assert config["bias"] == "all"


def test_adapters_without_a_place_in_peft_are_refused_by_name(tmp_path):
    policy = tiny.gpt2()
    policy.backbone.enable_lora(2, target_layer_names=["token_embedding"])
    with pytest.raises(InputError, match="token_embedding"):
        save_pretrained(policy, tmp_path / "out", "peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["keras_hub", "transformers", "peft"])
def test_writing_changes_no_bit_of_the_policy(tmp_path, format):
    policy = adapted("qwen3", dtype="mixed_bfloat16")
    before = [np.asarray(weight) for weight in policy.weights]
    save_pretrained(policy, tmp_path / "out", format)
    for weight, value in zip(policy.weights, before, strict=True):
        np.testing.assert_array_equal(np.asarray(weight), value)
    assert any(
        layer.lora_enabled
        for layer in policy.backbone._flatten_layers()
        if hasattr(layer, "lora_enabled")
    )


def test_adapters_are_merged_in_the_precision_of_the_weights(tmp_path):
    policy = adapted("qwen3", dtype="mixed_bfloat16")
    layer = policy.backbone.transformer_layers[0]._self_attention_layer._output_dense
    change = np.asarray(layer.lora_kernel_a) @ np.asarray(layer.lora_kernel_b)
    exact = (np.asarray(layer._kernel) + change).reshape(-1, 32).T
    save_pretrained(policy, tmp_path / "out")
    written = weights_of(tmp_path / "out")["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_allclose(written, exact, atol=1e-6)  # bfloat16 would be off by 1e-3


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    save_pretrained(families.ALL_FAMILIES["llama"](dtype="bfloat16"), tmp_path / "out")
    assert {value.dtype.name for value in weights_of(tmp_path / "out").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_large_models_are_written_in_shards_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_keras.serving.pretrained.SHARD_BYTES", 30_000)
    policy = families.ALL_FAMILIES["qwen3"]()
    save_pretrained(policy, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    back = keras_hub.models.Backbone.from_preset(str(tmp_path / "out"))
    np.testing.assert_allclose(
        np.asarray(back(BATCH)), np.asarray(policy.backbone(BATCH)), atol=1e-4
    )


@pytest.mark.parametrize(
    ("make", "arguments", "said"),
    [
        (tiny.gpt2, {"format": "onnx"}, "keras_hub, transformers, peft"),
        (tiny.gpt2, {"format": "peft"}, "no LoRA adapters"),
        (families.ALL_FAMILIES["bloom"], {}, f"These have one: {', '.join(FAMILIES)}"),
        (tiny.plain_model, {}, "KerasHub causal language model"),
        (tiny.gemma3, {}, "use_post_ffw_norm=True"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, make, arguments, said):
    with pytest.raises(InputError, match=said):
        save_pretrained(make(), tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_directory_is_not_replaced_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="overwrite=True"):
        save_pretrained(tiny.gpt2(), tmp_path / "out")
    save_pretrained(tiny.gpt2(), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()


# -- tokens --------------------------------------------------------------------------------


def test_the_written_tokenizer_gives_the_ids_of_the_training(tmp_path, gpt2):
    save_pretrained(gpt2, tmp_path / "out")
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ours = TextEncoder(gpt2.preprocessor).prompts(serving_tiny.CORPUS).tolist()
    assert [written.encode(text).ids for text in serving_tiny.CORPUS] == ours
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"


def test_chat_template_and_ends_are_those_of_the_training(tmp_path):
    preprocessor = serving_tiny.qwen()
    policy = families.ALL_FAMILIES["qwen"](vocabulary_size=preprocessor.tokenizer.vocabulary_size())
    save_pretrained(policy, tmp_path / "out", preprocessor=preprocessor, template="chatml")
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert template == get_template("chatml").source  # Qwen has no start token
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    names = [preprocessor.tokenizer.id_to_token(number) for number in ends]
    assert names == ["<|im_end|>", "<|endoftext|>"]


def test_a_template_without_a_start_token_gets_it(tmp_path, gemma3):
    write_tokenizer(gemma3.preprocessor, tmp_path, get_template("gemma"), None)
    source = (tmp_path / "chat_template.jinja").read_text()
    text = get_template(tmp_path / "chat_template.jinja").render(
        [{"role": "user", "content": "Hi"}], bos_token="<bos>"
    )
    assert source.startswith("{{ bos_token }}") and text.startswith("<bos><start_of_turn>user")


def test_sentence_pieces_are_written_as_they_are(tmp_path, llama):
    tokenizer = llama.preprocessor.tokenizer
    save_pretrained(llama, tmp_path / "out")
    proto = (tmp_path / "out" / "tokenizer.model").read_bytes()
    again = keras_hub.models.LlamaTokenizer(proto)
    assert list(again(serving_tiny.CORPUS[:4])) == list(tokenizer(serving_tiny.CORPUS[:4]))
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizer" and settings["legacy"]
    assert settings["bos_token"] == "<s>" and settings["add_bos_token"]


def test_files_of_the_source_are_copied(tmp_path, gpt2):
    source = tmp_path / "source"
    save_pretrained(gpt2, source)
    own = json.loads((source / "tokenizer_config.json").read_text()) | {"mine": 7}
    (source / "tokenizer_config.json").write_text(json.dumps(own))
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 99}
    (source / "config.json").write_text(json.dumps(config))
    save_pretrained(gpt2, tmp_path / "out", source=source)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["mine"] == 7
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 99
    )


def test_keras_hub_loads_the_whole_directory_and_answers_the_same(tmp_path):
    tokenizer = keras_hub.models.GPT2Tokenizer(*serving_tiny.bpe())
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 128}
    gpt2 = assemble("GPT2", tokenizer, {}, max_sequence_length=64, **sizes)
    save_pretrained(gpt2, tmp_path / "out")
    back = keras_hub.models.CausalLM.from_preset(str(tmp_path / "out"))
    ours, _ = dpo_keras.response_log_probs(gpt2, ["Hello, how"], [" are you?"])
    theirs, _ = dpo_keras.response_log_probs(back, ["Hello, how"], [" are you?"])
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


# -- the card ------------------------------------------------------------------------------


def test_the_model_card_tells_base_objective_and_how_to_load(tmp_path, gpt2):
    model = dpo_keras.DPOModel(gpt2, reference="frozen_copy")
    model.compile("sgd", loss=dpo_keras.DPOLoss("ipo", beta=0.25))
    save_pretrained(model, tmp_path / "support", source="somebody/base")
    card = (tmp_path / "support" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and front["base_model"] == "somebody/base"
    assert "dpo" in front["tags"]
    assert "| loss_type | ipo |" in card and "| beta | 0.25 |" in card
    assert "| reference | frozen_copy |" in card
    assert 'AutoModelForCausalLM.from_pretrained("support")' in card
    assert f"keras {keras.__version__}" in card
