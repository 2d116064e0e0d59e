"""
Title: Direct Preference Optimization with KerasHub and LoRA
Author: dpo_keras
Date created: 2026/11/27
Last modified: 2026/11/27
Description: Train a language model on human preferences with LoRA adapters, and serve it.
Accelerator: None
"""

"""
## Introduction

Direct Preference Optimization (DPO,
[Rafailov et al., 2023](https://arxiv.org/abs/2305.18290)) trains a language model on comparisons: a
person saw two responses to a prompt and chose one. There is no reward model and no reinforcement
learning. The loss of a pair is

−log σ(β [log π(chosen) − log π_ref(chosen)] − β [log π(rejected) − log π_ref(rejected)])

where π is the policy that you train and π_ref is the reference: the model as it was before.

This example trains the policy with LoRA adapters. The reference is then free: it is the same model
with its adapters switched off. The example has five parts:

1. Read preference pairs.
2. Load a model.
3. Train it with `compile()` and `fit()`.
4. Measure it on held-out prompts, and read what it writes.
5. Export it as a SavedModel for TensorFlow Serving.

It runs on a CPU in about a minute, with a small model and bundled data. One marked line takes a
real model instead.
"""

"""
## Setup
"""

"""
Python 3.11 to 3.13 will do. In a terminal, make a virtual environment first:
`python3 -m venv env && source env/bin/activate`. Version 0.1.0 is not on a package index yet:
until it is, run `pip install .` in a clone of the repository instead.
"""

"""shell
pip install dpo-keras
"""

"""
TensorFlow prints a few notices when it is imported. They do no harm.
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import tensorflow as tf

import dpo_keras
from dpo_keras.app.config_sections import Scratch
from dpo_keras.app.models import build_policy
from dpo_keras.preferences import judge
from dpo_keras.training import make_optimizer, supervised_dataset

keras.utils.set_random_seed(0)

"""
## Preference pairs

`read_preferences` reads JSONL, CSV, Parquet, data frames and data sets of Hugging Face or
TensorFlow Datasets. A line of your own `pairs.jsonl` is `{"prompt": "…", "chosen": "…",
"rejected": "…"}`. Here the pairs are bundled support replies. `split` holds out whole prompts, so
that no prompt is on both sides.
"""

pairs = dpo_keras.read_preferences("builtin:support")
train, held_out = pairs.split(0.1, seed=0)
print(f"{len(train)} pairs for training, {len(held_out)} held out")
print("Prompt:  ", train[1].prompt)
print("Chosen:  ", train[1].chosen)
print("Rejected:", train[1].rejected)

"""
## A model

**The line to change for a real model is marked.** `dpo_keras.load_model` takes any causal language
model of KerasHub: the name of a preset, a directory, or `"hf://OWNER/MODEL"`.

Without a download, the example builds a GPT-2 with two layers and a tokenizer that is trained on
the pairs. Its weights are random, so it must learn to write first: `SupervisedModel` trains it on
the chosen replies. A real, instruction-tuned model already writes; leave the warm-up out.
"""

texts = [text for pair in train for text in (pair.prompt, pair.chosen, pair.rejected)]
tiny = Scratch(
    family="gpt2",
    vocabulary_size=600,
    num_layers=2,
    num_heads=4,
    hidden_dim=128,
    intermediate_dim=512,
    max_sequence_length=64,
)
policy = build_policy(tiny, texts)  # For a real model: policy = dpo_keras.load_model("gemma3_1b")

"""
`preference_dataset` tokenizes the pairs and packs them into rows that hold each prompt once,
followed by both responses. For a real model use a `max_length` that fits your texts, such as
1024.
"""

dataset = dpo_keras.preference_dataset(train, policy.preprocessor, batch_size=32, max_length=64)
validation = dpo_keras.preference_dataset(
    held_out, policy.preprocessor, batch_size=64, max_length=64, shuffle=False
)

warm_up = dpo_keras.SupervisedModel(policy)
optimizer = make_optimizer(5 * len(dataset), learning_rate=3e-3, warmup_fraction=0.05)
warm_up.compile(optimizer)
warm_up.fit(supervised_dataset(dataset), epochs=5, verbose=2)

"""
What does the policy write before it has seen a comparison? The bundled data come from a
generator, so `judge` can say whether a reply is good: courteous, right, and without promises.
Your own data have no such judge; look at samples, or let people compare them.
"""

prompts = list(dict.fromkeys(pair.prompt for pair in held_out))[:64]


def share_of_good_replies():
    replies = dpo_keras.generate_responses(
        policy, prompts, max_new_tokens=24, temperature=0.7, top_p=0.9, seed=0
    )
    good = [judge(prompt, reply).preferred for prompt, reply in zip(prompts, replies, strict=True)]
    print("Prompt:", prompts[0])
    print("Reply: ", replies[0])
    return sum(good) / len(good)


before = share_of_good_replies()
print(f"Good replies before: {before:.0%}")

"""
## Adapters and training

`enable_lora` freezes the model and adds trainable low-rank matrices. They go to the query and value
projections by default; `targets="all-linear"` adapts every linear layer, which a model as small as
this one needs.

`reference="auto"` sees fresh adapters, and takes the model without them as the reference. The first
loss must then be log 2 = 0.693 plus the penalties, because policy and reference are equal; every
`fit` checks that.

`nll` is a penalty that keeps the chosen responses likely
([arXiv 2404.19733](https://arxiv.org/abs/2404.19733)). Its weight is high because the small model
still learns to write. For a real model start from `DPOLoss("sigmoid", beta=0.1)` and a learning
rate of `5e-6` (`1e-4` with LoRA).
"""

dpo_keras.enable_lora(policy, 16, targets="all-linear")
model = dpo_keras.DPOModel(policy, reference="auto")
model.compile(
    make_optimizer(3 * len(dataset), learning_rate=2e-3, schedule="cosine", warmup_fraction=0.1),
    loss=dpo_keras.DPOLoss("sigmoid", beta=1.0, penalties={"nll": 10.0}),
)
history = model.fit(dataset, validation_data=validation, epochs=3, verbose=2)

"""
## Held-out pairs and samples

`reward_accuracy` is the share of held-out pairs whose chosen response has the higher implicit
reward β (log π − log π_ref). It was 0.5 before the training, by construction. `reward_margin` is
the mean difference of the two rewards.
"""

figures = model.evaluate(validation, return_dict=True, verbose=0)
for name in ("reward_accuracy", "reward_margin", "kl"):
    print(f"{name}: {figures[name]:.3f}")

after = share_of_good_replies()
print(f"Good replies: {before:.0%} before, {after:.0%} after")

"""
## Export

`export` writes a SavedModel with strings in and strings out: the tokenizer is in the graph, and the
adapters are merged. It is verified in a process that has neither Keras nor `dpo_keras` before it
appears under its number. Each call writes the next version.
"""

report = dpo_keras.export(model, "saved_models/support")
print(report.summary())

"""
TensorFlow alone loads it. `prefer` compares two responses, and `generate` answers a prompt.
"""

import tensorflow_text  # noqa: F401 (its ops are in the graph)

served = tf.saved_model.load(str(report.path))
pair = held_out[0]
compared = served.signatures["prefer"](
    prompt=tf.constant([pair.prompt]),
    response_a=tf.constant([pair.chosen]),
    response_b=tf.constant([pair.rejected]),
)
print("P(chosen is better):", float(compared["probability_a"][0]))
answered = served.signatures["generate"](prompt=tf.constant([pair.prompt]))
print("Answer:", answered["text"][0].numpy().decode())

"""
Serve it with TensorFlow Serving:

```
docker run --rm -p 8501:8501 -v "$PWD/saved_models/support:/models/support" \
  -e MODEL_NAME=support tensorflow/serving
```

## Where to go on

* [From human feedback to a served policy](feedback_to_served_policy.py): collect the comparisons.
* [Choosing an objective](choosing_an_objective.py): noise, length bias, ties, thumbs, rankings.
* [Larger than one device](larger_than_one_device.py): split the policy over several devices.
* [Guide to references and LoRA](../../dpo_keras/scoring/README.md), and QLoRA.
* [Guide to serving](../../dpo_keras/serving/README.md), and files for `transformers`.
"""
