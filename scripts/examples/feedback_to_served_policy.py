"""
Title: From human feedback to a served policy
Author: dpo_keras
Date created: 2026/11/27
Last modified: 2026/11/27
Description: Let people compare a policy's answers, train on their choices with DPO, and serve it.
Accelerator: None
"""

"""
## Introduction

Direct Preference Optimization (DPO) trains a language model on comparisons: people read two
responses to a prompt and choose the better one. This example runs the whole loop once:

1. Warm up a tiny policy on written replies, so that it can answer at all.
2. Let it answer each prompt several times.
3. Record which answers people prefer in a feedback store, and measure how well they agree.
4. Export the judgements as preference pairs, and train on them with `DPOModel`.
5. Count how many answers are good, before and after.
6. Export the policy as a SavedModel, and query it with TensorFlow alone.

The data are bundled support questions. Their generator knows which replies are good: a good reply
is courteous, answers the question, and invents nothing. This ground truth simulates the people,
with errors, and counts the good answers. With your own data, real people judge on a page.
"""

"""
## Setup
"""

"""shell
pip install "dpo-keras[feedback]"  # before its release, in a clone: pip install '.[feedback]'
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import json
import random
import shutil
from pathlib import Path

import keras
import tensorflow as tf

import dpo_keras
from dpo_keras.app.config_sections import Scratch
from dpo_keras.app.models import build_policy
from dpo_keras.feedback import Settings, assess, open_store, read_candidates, to_pairs
from dpo_keras.feedback.quality_report import text
from dpo_keras.preferences.quickstart_data import judge
from dpo_keras.training import make_optimizer, supervised_dataset

keras.utils.set_random_seed(0)
# A second run of this example deletes the files of the first. Keep those of real people.
run = Path("runs/feedback_to_served_policy")
shutil.rmtree(run, ignore_errors=True)
run.mkdir(parents=True)

"""
## The data

`split` keeps all pairs of a prompt on one side, so no held-out prompt is ever trained on.
"""

train, held_out = dpo_keras.read_preferences("builtin:support").split(0.1, seed=0)
example = next(pair for pair in held_out if judge(pair.prompt, pair.chosen).preferred)
print(example.prompt, f"chosen:   {example.chosen}", f"rejected: {example.rejected}", sep="\n")

"""
## The policy

The next code cell is the one place that names the model. `build_policy` makes a two-layer GPT-2
with random weights, and trains a tokenizer on the texts. It learns in seconds on a CPU.

To use a real model, change the marked line. Then also:

* Skip the warm-up below. An instruction-tuned model can answer already.
* Lower the learning rate of DPO from 1e-3 to about 5e-6, or to about 1e-4 with
  `dpo_keras.enable_lora(policy, 8)`.
* Lower `beta` from 1.0 to 0.1, and leave out the penalty `nll` at first.
* Raise `max_length` and `max_new_tokens` to the lengths of your texts.
"""

TINY = Scratch(
    vocabulary_size=600, num_layers=2, hidden_dim=128, intermediate_dim=512, max_sequence_length=64
)
LENGTH, NEW_TOKENS = 64, 24
texts = [text for pair in train for text in (pair.prompt, pair.chosen, pair.rejected)]

policy = build_policy(TINY, texts)  # For a real model: policy = dpo_keras.load_model("gemma3_1b")

"""
## Warm up

A policy with random weights writes noise, and no judgement of noise teaches it to write.
`SupervisedModel` trains on the chosen replies alone. Many answers remain wrong after it.
"""

batches = dpo_keras.preference_dataset(train, policy.preprocessor, batch_size=32, max_length=LENGTH)
warm_up = dpo_keras.SupervisedModel(policy)
warm_up.compile(make_optimizer(5 * len(batches), learning_rate=3e-3, warmup_fraction=0.05))
warm_up.fit(supervised_dataset(batches), epochs=5, verbose=2)

"""
Count how many of its answers to held-out prompts are good, before any feedback.
"""

held_out_prompts = list(dict.fromkeys(pair.prompt for pair in held_out))[:128]


def count_good_answers():
    """Return how many of the policy's answers to held-out prompts are good."""
    answers = dpo_keras.generate_responses(
        policy, held_out_prompts, max_new_tokens=NEW_TOKENS, temperature=0.7, top_p=0.9
    )
    return sum(judge(*pair).preferred for pair in zip(held_out_prompts, answers, strict=True))


good_before = count_good_answers()
print(f"good answers before: {good_before} of {len(held_out_prompts)}")

"""
## Candidates

The policy answers each of 400 training prompts three times, once for each seed.
"""

prompts = list(dict.fromkeys(pair.prompt for pair in train))[:400]
answers = dpo_keras.generate_responses(policy, prompts, max_new_tokens=NEW_TOKENS, seed=[0, 1, 2])
candidates = zip(prompts, answers, strict=True)
lines = [json.dumps({"prompt": one, "responses": responses}) for one, responses in candidates]
(run / "candidates.jsonl").write_text("\n".join(lines), encoding="utf-8")

"""
## Judgements

On your own machine, this command serves the page on which people choose, and prints a link for each
of them:

```shell
dpo-keras annotate runs/feedback_to_served_policy/candidates.jsonl \
  --store runs/feedback_to_served_policy/feedback.sqlite \
  -a ann -a bob -a cleo --overlap 3
```

People can also ask questions of their own. `dpo-keras arena RUN` serves a page on which two answers
grow while the policy writes, and keeps the choices in the same kind of store. `RUN` is a run's
directory, a model directory, a preset, or a SavedModel with a `temperature` above 0.

**This example has no people, so it simulates three.** Each one knows the ground truth, but answers
at random in a share of cases: 5 % for Ann, 10 % for Bob, 25 % for Cleo. They use the same calls as
the page: `next` hands out a pair, and `submit` records the choice on the disk. With `overlap=3`,
three people judge each pair. Two are enough to measure agreement.
"""

store = open_store(
    run / "feedback.sqlite", Settings(overlap=3), create=True, chance=random.Random(0)
)
imported = store.add(read_candidates(run / "candidates.jsonl"))
print(f"{imported.pairs} pairs to judge; {imported.identical} identical answers left out")

chance = random.Random(0)


def choose(shown, error_rate):
    """Choose as a simulated person: by the ground truth, or at random."""
    if chance.random() < error_rate:
        return chance.choice(["left", "right", "tie"])
    left, right = (float(judge(shown.prompt, reply)) for reply in (shown.left, shown.right))
    if left == right:
        return "tie"
    return "left" if left > right else "right"


for name, error_rate in {"ann": 0.05, "bob": 0.10, "cleo": 0.25}.items():
    person, _ = store.add_annotator(name)
    while batch := store.next(person.id, 50):
        for shown in batch:
            store.submit(person.id, shown.id, choose(shown, error_rate), key=f"{name}-{shown.id}")

"""
## Agreement

`assess` measures the round. Krippendorff's alpha is 1 where people agree completely, and 0 where
they agree no more than by chance. The accuracy of each person is estimated from the judgements
alone (Dawid and Skene 1979). `dpo-keras feedback report STORE -o report.html` writes the same
figures as a page.
"""

print(text(assess(store)))

"""
## Pairs for training

`to_pairs` makes one preference pair of all judgements of a pair. With `label="majority"` most votes
decide, and `ties="drop"` leaves out the pairs that show no preference.
`dpo-keras feedback export STORE pairs.jsonl --label majority --ties drop` does the same.
"""

exported = to_pairs(store, label="majority", ties="drop")
store.close()
dpo_keras.write_preferences(exported.pairs, run / "pairs.jsonl")
judged = dpo_keras.read_preferences(run / "pairs.jsonl")
print(f"{len(judged)} pairs to train on; left out: {exported.dropped}")

"""
## Train with DPO

`DPOModel` keeps a frozen copy of the warm policy as the reference. `beta` scales the difference
between the log-probabilities (logps) of policy and reference. The penalty `nll` keeps the chosen
answers likely, so that the tiny model does not forget how to write.
"""

batches = dpo_keras.preference_dataset(
    judged, policy.preprocessor, batch_size=64, max_length=LENGTH
)
model = dpo_keras.DPOModel(policy)
model.compile(
    make_optimizer(4 * len(batches), learning_rate=1e-3, warmup_fraction=0.1),
    loss=dpo_keras.DPOLoss("sigmoid", beta=1.0, penalties={"nll": 1.0}),
)
model.fit(batches, epochs=4, verbose=2)

"""
## Before and after

The prompts are held out, and the ground truth counts. The training saw only the judgements.
"""

print(f"good answers before: {good_before}, after: {count_good_answers()}")

"""
## Export

`export` writes a SavedModel that takes and returns strings. The tokenizer is part of the graph. A
process without Keras compares its answers with the model in Python before the version appears. A
path without a number takes the next free version.
"""

report = dpo_keras.export(
    model,
    "saved_models/feedback_to_served_policy",
    max_new_tokens=NEW_TOKENS,
    examples=[(example.prompt, example.chosen, example.rejected)],
)
print(report.summary())

"""
Load it with TensorFlow alone, and query its three signatures. `score` returns the logps of a
response and its reward, `prefer` the probability that each of two responses is the better one, and
`generate` an answer.
"""

served = tf.saved_model.load(str(report.path)).signatures
prompt, chosen, rejected = (
    tf.constant([one]) for one in (example.prompt, example.chosen, example.rejected)
)
scored = served["score"](prompt=prompt, response=chosen)
print(f"logps {scored['log_prob'][0]:.2f}, reward {scored['reward'][0]:.2f}")
preferred = served["prefer"](prompt=prompt, response_a=chosen, response_b=rejected)
print(f"P(chosen is better) {preferred['probability_a'][0]:.3f}")
print(f"answer: {served['generate'](prompt=prompt)['text'][0].numpy().decode()}")

"""
## Serve

TensorFlow Serving answers the same signatures over REST. Write a request to a file.
"""

request = {"signature_name": "generate", "instances": [{"prompt": example.prompt}]}
(run / "request.json").write_text(json.dumps(request), encoding="utf-8")

"""
Start the server with the directory of the model; it serves the newest version. Then send the
request. These commands were not run here, because no TensorFlow Serving binary was at hand.

```shell
docker run --rm -p 8501:8501 -e MODEL_NAME=support \
  -v "$PWD/saved_models/feedback_to_served_policy:/models/support" tensorflow/serving
curl -d @runs/feedback_to_served_policy/request.json localhost:8501/v1/models/support:predict
```

## Where to go on

* [Guide to feedback](../../dpo_keras/feedback/README.md): the page, the arena, and judges.
* [Guide to serving](../../dpo_keras/serving/README.md): signatures, options and verification.
* [Guide to training](../../dpo_keras/training/README.md): `DPOModel`, callbacks and checkpoints.
* [Rounds of improvement](../../dpo_keras/app/README.md#rounds-of-improvement): this loop, repeated.
"""
