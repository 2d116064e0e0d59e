"""
Title: Preference training of your own Keras model
Author: dpo_keras
Date created: 2026/11/27
Last modified: 2026/11/27
Description: Train a decoder written in plain Keras with DPO, then save, load, score and export it.
Accelerator: None
"""

"""
## Introduction

Direct Preference Optimization (DPO) trains a language model on pairs of responses of which people
chose one. dpo_keras takes any model of KerasHub for that, and any Keras model that keeps one
contract. This example is about the second kind. It

1. writes a small decoder in plain Keras,
2. gives it a tokenizer,
3. teaches it to write (supervised warm-up) and then to prefer (DPO),
4. measures it on held-out pairs,
5. saves it, loads it, scores texts with it and exports it for TensorFlow Serving.

The contract has two parts.

**The model** maps a dict of `token_ids` and `padding_mask`, both integers `[batch, length]`, to
logits `[batch, length, vocabulary]`. The logits at a place may depend on that place and on those
before it only: they predict the next token. The padding mask is 1 for tokens and 0 for padding.
Padding is always on the right.

**The tokenizer** is an object with `tokenize(texts)`, which returns one list of ids for each text,
without padding, and with the attributes `end_token_id` and `pad_token_id`. `start_token_id` is
optional. Generation also needs `detokenize(rows)`. Export needs a tokenizer of KerasHub, because it
has to run inside the TensorFlow graph.
"""

"""
## Setup
"""

"""shell
pip install dpo-keras  # before its release, in a clone: pip install '.'
"""

import json
import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import keras_hub
import tokenizers
from keras import layers, ops

import dpo_keras
from dpo_keras.evaluation import sample_and_judge
from dpo_keras.preferences import judge
from dpo_keras.training import make_optimizer, supervised_dataset

keras.utils.set_random_seed(0)
RUN = Path("runs/your_own_keras_model")
RUN.mkdir(parents=True, exist_ok=True)

"""
## Pairs

The bundled pairs are support replies from a generator with a known ground truth. A good reply is
courteous, answers the question and invents nothing. For your own pairs, pass the name of a JSONL
file in which each line has `prompt`, `chosen` and `rejected`.
"""

pairs = dpo_keras.read_preferences("builtin:support")
train, held_out = pairs.split(0.1, seed=0)  # No prompt is on both sides.
print(f"{len(train)} training pairs, {len(held_out)} held out")
print(train[1].prompt, f"\n  chosen: {train[1].chosen}\n  rejected: {train[1].rejected}")

"""
## The tokenizer

The `tokenizers` library learns a byte-level BPE vocabulary from the training texts, and KerasHub's
GPT-2 tokenizer runs it. It has the ids of the contract: `<|endoftext|>` starts a text, ends a
response and pads. If you have a tokenizer of your own, wrap it in a class with the methods and
attributes of the contract.
"""

texts = [text for pair in train for text in (pair.prompt, *pair.responses)]
learned = tokenizers.ByteLevelBPETokenizer()
learned.train_from_iterator(
    texts, vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False
)
merges = json.loads(learned.to_str())["model"]["merges"]
tokenizer = keras_hub.tokenizers.GPT2Tokenizer(
    learned.get_vocab(), [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
)
ids = tokenizer.tokenize("Glad to help!")
print(f"{tokenizer.vocabulary_size()} tokens; {ids} -> {tokenizer.detokenize(ids)!r}")

"""
## The model

Two blocks of causal self-attention. Nothing here knows of dpo_keras. Keras' own operations and
layers keep it serializable. A layer of your own needs `register_keras_serializable()`.
"""

MAX_LENGTH = 64  # Of prompt and response together, in tokens.


def decoder(vocabulary_size, width=128, heads=4, blocks=2):
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
    places = ops.cumsum(ops.ones_like(token_ids), axis=1) - 1
    states = layers.Embedding(vocabulary_size, width)(token_ids)
    states = states + layers.Embedding(MAX_LENGTH, width)(places)
    seen = ops.cast(padding_mask, "bool")[:, None, :]
    for _ in range(blocks):
        normed = layers.LayerNormalization()(states)
        attention = layers.MultiHeadAttention(heads, width // heads)
        states = states + attention(normed, normed, attention_mask=seen, use_causal_mask=True)
        normed = layers.LayerNormalization()(states)
        wide = layers.Dense(4 * width, activation="gelu")(normed)
        states = states + layers.Dense(width)(wide)
    logits = layers.Dense(vocabulary_size)(layers.LayerNormalization()(states))
    return keras.Model({"token_ids": token_ids, "padding_mask": padding_mask}, logits)


"""
The next line is the one to change: put your own model there, with weights that you have trained
already. Then

* leave out the warm-up, because your model writes already;
* take a learning rate from 1e-6 to 5e-5 and `beta=0.1`, instead of 1e-3 and 1.0, which suit a
  tiny model with random weights;
* set `MAX_LENGTH` to what prompt and response need, and `batch_size` to what your memory holds.
"""

policy = decoder(tokenizer.vocabulary_size())  # Your own model goes here.
print(f"{policy.count_params():,} parameters")

"""
## Batches

`batching="buckets"` puts one pair into a row and works with every model. The other layout, packed
rows, needs a causal language model of KerasHub; the last section says why.

`preference_dataset` tokenizes prompt and response apart, joins the ids and adds the end token.
Where a model of KerasHub brings a preprocessor, you pass the tokenizer.
"""


def batches(pairs, batch_size, **options):
    options |= {"batch_size": batch_size, "max_length": MAX_LENGTH, "batching": "buckets"}
    return dpo_keras.preference_dataset(pairs, tokenizer, **options)


def answers():
    """Answer held-out prompts, and judge the answers by the generator's ground truth."""
    return sample_and_judge(
        policy,
        [pair.prompt for pair in held_out[:128]],
        judge,
        preprocessor=tokenizer,
        max_length=MAX_LENGTH,
        max_new_tokens=24,
        temperature=0.7,
        top_p=0.9,
        batch_size=128,
    )


"""
## Warm-up

`SupervisedModel` trains the policy on the chosen responses, by the negative log-likelihood of
their tokens.
"""

WARM_UP_EPOCHS, EPOCHS = 2, 1

warm_up = dpo_keras.SupervisedModel(policy)
steps = WARM_UP_EPOCHS * len(batches(train, 32))
warm_up.compile(make_optimizer(steps, learning_rate=3e-3, warmup_fraction=0.05))
warm_up.fit(supervised_dataset(batches(train, 32)), epochs=WARM_UP_EPOCHS, verbose=2)
before = answers()

"""
## DPO

`DPOModel` keeps a frozen copy of the policy as the reference and compares the two. With c and r for
the log-ratios log π/π_ref of the chosen and of the rejected response, the loss of a pair is
-log σ(β(c - r)). The penalty `nll` keeps the chosen responses likely, so that the policy does not
forget how to write.

At the start policy and reference are equal: every margin is 0, and the accuracy is 0.5.
"""

model = dpo_keras.DPOModel(policy, reference="frozen_copy")
model.compile(
    make_optimizer(
        EPOCHS * len(batches(train, 64)),
        learning_rate=1e-3,
        schedule="cosine",
        warmup_fraction=0.1,
    ),
    loss=dpo_keras.DPOLoss("sigmoid", beta=1.0, penalties={"nll": 3.0}),
)
measured = batches(held_out, 64, shuffle=False)
start = model.evaluate(measured, verbose=0, return_dict=True)
model.fit(
    batches(train, 64),
    epochs=EPOCHS,
    verbose=2,
    callbacks=[dpo_keras.callbacks.RunLog(RUN / "metrics.jsonl")],
)

"""
## Evaluation

The figures are of held-out pairs and prompts, before and after DPO.
"""

end = model.evaluate(measured, verbose=0, return_dict=True)
after = answers()
print(f"{'held out':24}{'before':>8}{'after':>8}")
for name in ("reward_accuracy", "reward_margin", "chosen_probability"):
    print(f"{name:24}{start[name]:8.3f}{end[name]:8.3f}")
good = (answered.figures["preferred"].value for answered in (before, after))
print(f"{'good answers':24}{next(good):8.3f}{next(good):8.3f}")
print("An answer:", after.records[0]["response"])

"""
## Save and load

`model.save` writes policy, reference, optimizer and loss into one file. `policy.save` writes the
policy alone, which loads without dpo_keras. The tokenizer is in neither file: save its vocabulary
beside them.
"""

tokenizer.save_assets(RUN)
model.save(RUN / "model.keras")
policy.save(RUN / "policy.keras")
loaded = keras.saving.load_model(RUN / "model.keras")

"""
`response_log_probs` scores any text: the log-probability of a response after a prompt, in nats, its
end token included. The loaded policy gives the same numbers.
"""

pair = held_out[0]
two = [pair.prompt] * 2, [pair.chosen, pair.rejected]
for name, scored in (("trained", policy), ("loaded", loaded.policy)):
    logps, lengths = dpo_keras.response_log_probs(scored, *two, preprocessor=tokenizer)
    print(f"{name:8} chosen {logps[0]:.3f}, rejected {logps[1]:.3f} nats ({lengths} tokens)")

"""
## Export

`export` writes a SavedModel with strings in and out, and checks it in a process without Keras. Each
run writes the next version. The tokenizer has to be one of KerasHub. With a tokenizer of your own,
serve `policy.export(…)` of Keras, which takes token ids, and tokenize in the client.

`save_pretrained`, which writes files for `transformers`, knows the families of KerasHub only.
"""

report = dpo_keras.export(
    model,
    "saved_models/your_own_keras_model",
    preprocessor=tokenizer,
    max_length=MAX_LENGTH,
    max_new_tokens=24,
    examples=[(pair.prompt, pair.chosen, pair.rejected)],
)
print(report.summary())
print("prefer:", report.answers["prefer"])
print("generate:", report.answers["generate"])

"""
## What a backbone buys

A model of your own returns logits, so dpo_keras computes the logits of every place and takes what
it needs. Of a causal language model of KerasHub it takes backbone and head apart. That gives

* **a chunked head**: the head is applied to the places that predict response tokens alone, in
  chunks, and the logits of a whole batch never exist. With a large vocabulary that is most of the
  memory of a step.
* **packed rows**: several pairs share a row, and a prompt is there once for both responses. That
  needs attention masks and positions that dpo_keras can set.
* **LoRA, quantization, gradient checkpointing** by layers that dpo_keras knows.
* **generation with a key-value cache**: other models compute the whole text for each new token.
* **`save_pretrained`** for Hugging Face's `transformers`.

## Where to go on

- [What each model family can do](../../dpo_keras/scoring/README.md#what-each-family-can-do)
- [Guide to batching: tokenizers, templates, layouts](../../dpo_keras/batching/README.md)
- [Guide to training: callbacks, checkpoints, devices](../../dpo_keras/training/README.md)
- [Guide to losses: which objective for which situation](../../dpo_keras/losses/README.md)
- [Guide to serving](../../dpo_keras/serving/README.md)
- [Choosing an objective](choosing_an_objective.py)
"""
