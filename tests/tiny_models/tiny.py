"""Tiny models and batches that several stages' tests share."""

import keras
import keras_hub
import numpy as np
import tensorflow as tf

VOCABULARY = 97
SIZES = {"vocabulary_size": VOCABULARY, "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 64}


class Letters:
    """A tokenizer of one token per character, ids 3 to 96."""

    start_token_id, end_token_id, pad_token_id = 1, 2, 0

    def tokenize(self, texts):
        return [[3 + (ord(letter) - 32) % 94 for letter in text] for text in texts]

    def detokenize(self, rows):
        return ["".join(chr(32 + token - 3) for token in row) for row in rows]


def gpt2(seed=0, **sizes):
    keras.utils.set_random_seed(seed)
    settings = {**SIZES, "num_heads": 2, "max_sequence_length": 96, "dropout": 0.1, **sizes}
    return keras_hub.models.GPT2CausalLM(keras_hub.models.GPT2Backbone(**settings))


def llama(seed=0, **sizes):
    keras.utils.set_random_seed(seed)
    settings = {**SIZES, "num_query_heads": 2, "num_key_value_heads": 1, **sizes}
    return keras_hub.models.LlamaCausalLM(keras_hub.models.LlamaBackbone(**settings))


def gemma3(seed=0, **sizes):
    keras.utils.set_random_seed(seed)
    settings = {
        **SIZES,
        "image_size": 16,
        "num_query_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "final_logit_soft_cap": 5.0,
        **sizes,
    }
    backbone = keras_hub.models.Gemma3Backbone(**settings)
    return keras_hub.models.Gemma3CausalLM(preprocessor=None, backbone=backbone)


def plain_model(seed=0):
    """A model of the user's own: token ids and mask to logits, nothing of KerasHub."""
    keras.utils.set_random_seed(seed)
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
    states = keras.layers.Embedding(VOCABULARY, 16)(token_ids)
    states = states * keras.ops.cast(padding_mask, "float32")[..., None]
    states = keras.layers.GRU(16, return_sequences=True)(states)
    logits = keras.layers.Dense(VOCABULARY)(states)
    inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
    return keras.Model(inputs, logits)


def pairs(count=11, seed=0):
    """Pairs of which the better response repeats the prompt's letter."""
    random = np.random.default_rng(seed)
    records = []
    for number in range(count):
        letter = chr(97 + number % 26)
        prompt = letter * int(random.integers(2, 9))
        chosen = letter * int(random.integers(1, 7))
        rejected = "".join(chr(65 + k) for k in random.integers(0, 26, random.integers(1, 7)))
        records.append({"prompt": f"{number}{prompt}", "chosen": chosen, "rejected": rejected})
    return records


def full_logits_log_probs(policy, batch, further=lambda token_ids: {}):
    """Response log-probs in plain NumPy from the model's full logits, float64.

    `further` makes what the model takes beside ids and mask, from token ids `[N, length]`.
    """
    rows, sequences, length = batch["token_ids"].shape
    flat = {
        k: tf.reshape(batch[k], (rows * sequences, length)) for k in ("token_ids", "padding_mask")
    }
    flat.update(further(flat["token_ids"]))
    logits = np.asarray(keras.ops.convert_to_numpy(policy(flat, training=False)), np.float64)
    logits = logits.reshape(rows, sequences * length, -1)
    logps = np.zeros((rows, 2))
    for row in range(rows):
        for slot, owner in enumerate(np.asarray(batch["owner"])[row]):
            if owner >= 0:
                z = logits[row, batch["source"][row, slot]]
                top = z.max()
                logp = z[batch["target"][row, slot]] - top - np.log(np.exp(z - top).sum())
                logps[row, owner] += logp
    return logps
