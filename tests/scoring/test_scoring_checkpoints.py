"""A Llama checkpoint in Hugging Face format, scored as NumPy scores it from the same file."""

import json

import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dpo_keras.batching import TextEncoder, batch_from_strings
from dpo_keras.scoring import ResponseScorer, response_log_probs

LAYERS, HEADS, KEY_HEADS, WIDTH, INNER, THETA = 2, 4, 2, 32, 48, 1e4
EPSILON = 1e-6  # KerasHub 0.32 has this whatever the checkpoint's rms_norm_eps says
PROMPTS = ["the quick brown fox", "a dog. ", "12 + 3 =\n\n"]
RESPONSES = [" jumped over the lazy dog", "the", " 15, quick"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"]
    special += ["<|end_header_id|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(PROMPTS + RESPONSES, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    words = {"bos_token": special[0], "eos_token": special[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    vocabulary = bpe.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "rope_theta": THETA,
        "rms_norm_eps": EPSILON,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    head = WIDTH // HEADS
    shapes = {"model.embed_tokens": (vocabulary, WIDTH), "lm_head": (vocabulary, WIDTH)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        shapes |= {
            name + "self_attn.q_proj": (HEADS * head, WIDTH),
            name + "self_attn.k_proj": (KEY_HEADS * head, WIDTH),
            name + "self_attn.v_proj": (KEY_HEADS * head, WIDTH),
            name + "self_attn.o_proj": (WIDTH, HEADS * head),
            name + "mlp.gate_proj": (INNER, WIDTH),
            name + "mlp.up_proj": (INNER, WIDTH),
            name + "mlp.down_proj": (WIDTH, INNER),
            name + "input_layernorm": (WIDTH,),
            name + "post_attention_layernorm": (WIDTH,),
        }
    shapes["model.norm"] = (WIDTH,)
    weights = {
        f"{name}.weight": random.normal(1.0 if len(shape) == 1 else 0.0, 0.2, shape).astype("f4")
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
    return folder, {name[: -len(".weight")]: w.astype("f8") for name, w in weights.items()}


def norm(states, scale):
    return states / np.sqrt((states**2).mean(-1, keepdims=True) + EPSILON) * scale


def rotate(states):
    """Rotary positions as Hugging Face lays them out: the two halves of a head are the pairs."""
    half = states.shape[-1] // 2
    angle = np.arange(len(states))[:, None] * THETA ** (-np.arange(half) / half)
    angle = np.concatenate([angle, angle], axis=-1)[:, None]
    turned = np.concatenate([-states[..., half:], states[..., :half]], axis=-1)
    return states * np.cos(angle) + turned * np.sin(angle)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def llama(weights, ids):
    """Touvron et al., arXiv 2302.13971, in float64."""
    states, length = weights["model.embed_tokens"][ids], len(ids)
    future = np.triu(np.full((length, length), -np.inf), 1)
    for layer in range(LAYERS):
        w = {name.split(".", 3)[3]: v for name, v in weights.items() if f"layers.{layer}." in name}
        inside = norm(states, w["input_layernorm"])
        query, key, value = (
            (inside @ w[f"self_attn.{name}_proj"].T).reshape(length, -1, WIDTH // HEADS)
            for name in "qkv"
        )
        query, key = rotate(query), np.repeat(rotate(key), HEADS // KEY_HEADS, axis=1)
        value = np.repeat(value, HEADS // KEY_HEADS, axis=1)
        scores = np.einsum("thd,shd->hts", query, key) / np.sqrt(WIDTH // HEADS) + future
        mixed = np.einsum("hts,shd->thd", np.exp(log_softmax(scores)), value)
        states = states + mixed.reshape(length, -1) @ w["self_attn.o_proj"].T
        inside = norm(states, w["post_attention_layernorm"])
        gate = inside @ w["mlp.gate_proj"].T
        inner = gate / (1 + np.exp(-gate)) * (inside @ w["mlp.up_proj"].T)
        states = states + inner @ w["mlp.down_proj"].T
    return log_softmax(norm(states, weights["model.norm"]) @ weights["lm_head"].T)


@pytest.fixture(scope="module")
def policy(checkpoint):
    return keras_hub.models.CausalLM.from_preset(str(checkpoint[0]))


def test_log_probs_are_those_of_a_forward_pass_in_numpy(policy, checkpoint):
    encoder = TextEncoder(policy.preprocessor)
    logps, lengths = response_log_probs(policy, PROMPTS, RESPONSES)
    for number in range(3):
        (prompt,) = encoder.prompts(PROMPTS[number : number + 1]).tolist()
        (response,) = encoder.responses(RESPONSES[number : number + 1]).tolist()
        assert prompt[0] == encoder.start and response[-1] == encoder.end
        ids = prompt + response
        table = llama(checkpoint[1], ids)
        places = range(len(prompt), len(ids))
        expected = sum(table[place - 1, ids[place]] for place in places)
        assert lengths[number] == len(response)
        np.testing.assert_allclose(logps[number], expected, atol=1e-4)


def test_gradients_through_the_chunked_head_are_those_of_full_logits(policy):
    batch = batch_from_strings(policy.preprocessor, PROMPTS, RESPONSES)
    batch = {name: tf.constant(value) for name, value in batch.items()}
    gradients = []
    for scorer in (ResponseScorer(policy, chunk=8), ResponseScorer(policy, plain=True)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(scorer(batch)["logps"])
        found = tape.gradient(loss, policy.trainable_variables)
        gradients.append([tf.convert_to_tensor(gradient) for gradient in found])
    for chunked, full in zip(*gradients, strict=True):
        np.testing.assert_allclose(chunked, full, atol=1e-5)
