"""
Title: Choosing an objective: noise, length bias, ties, thumbs, rankings
Author: dpo_keras
Date created: 2026/11/27
Last modified: 2026/11/27
Description: One policy, five kinds of feedback, and the objective that each of them asks for.
Accelerator: None
"""

"""
## Introduction

Which loss to take depends on what people told you. This example makes one policy write, then trains
it from the same weights on five kinds of feedback:

| feedback | objectives |
|---|---|
| labels of which some are wrong | `sigmoid`, `sigmoid` with label smoothing (cDPO), `robust` |
| pairs in which the longer reply wins too often | `sigmoid`, `simpo` |
| ties | `sigmoid` with `preference=0.5` |
| thumbs up and down, no pairs | `kto` |
| rankings of several replies | `plackett_luce` |

Every training has the same number of steps and is measured on the same held-out pairs. For the
formulas and costs of all objectives, see the [guide to losses](../../dpo_keras/losses/README.md).
"""

"""
## Setup
"""

"""shell
pip install dpo-keras  # before its release, in a clone: pip install '.'
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import dataclasses
import functools
import random

import keras
import numpy as np

import dpo_keras
from dpo_keras.app.config_sections import Scratch
from dpo_keras.app.models import build_policy
from dpo_keras.evaluation import evaluate_preferences
from dpo_keras.preferences import Preferences, audit, judge, support_thumbs
from dpo_keras.training import make_optimizer, supervised_dataset

SEED = 0
COUNT = 1024  # Judged pairs, or thumbs, of each training.
MAX_LENGTH = 64

keras.utils.set_random_seed(SEED)
rng = random.Random(SEED)

"""
## Pairs

The bundled pairs are support replies from a generator with a known ground truth: a reply is good if
it is courteous, answers the question and invents nothing. `judge` checks a reply by these rules.
The held-out pairs keep their clean labels, whatever a training is told.
"""

train, held_out = dpo_keras.read_preferences("builtin:support").split(0.2, seed=0)
sample = rng.sample(list(train), COUNT)
texts = [text for pair in train for text in (pair.prompt, *pair.responses)]

"""
## The policy

The marked line makes a tiny model with random weights. For a real model, change that line. Then

* leave out the warm-up: the model writes already;
* take a learning rate from 1e-6 to 5e-5, `beta` from 0.05 to 0.5 (`simpo`: 2 to 2.5), and no
  penalty or a small one. The values here suit a tiny model;
* set `MAX_LENGTH` to what prompt and response need, such as 1024.
"""

TINY = Scratch(
    **{"family": "gpt2", "vocabulary_size": 600, "max_sequence_length": MAX_LENGTH},
    **{"num_layers": 2, "num_heads": 4, "hidden_dim": 64, "intermediate_dim": 256},
)
policy = build_policy(TINY, texts)  # For a real model: policy = dpo_keras.load_model("gemma3_1b")

"""
All batches are buckets of the same two lengths, so that trainings with the same loss share one
traced step. Leave `batching` out, and the library packs rows, which is faster for long texts.
"""


def batches(records, batch_size=32):
    return dpo_keras.preference_dataset(
        records,
        policy.preprocessor,
        batch_size=batch_size,
        max_length=MAX_LENGTH,
        seed=SEED,
        batching="buckets",
        buckets=(48, MAX_LENGTH),
    )


WARM_UP_EPOCHS = 2
warm_up = dpo_keras.SupervisedModel(policy)
steps = WARM_UP_EPOCHS * len(batches(train))
warm_up.compile(make_optimizer(steps, learning_rate=3e-3, warmup_fraction=0.05))
warm_up.fit(supervised_dataset(batches(train)), epochs=WARM_UP_EPOCHS, verbose=2)
warm = policy.get_weights()

"""
## One training

Each training begins at the policy of the warm-up, which is its reference as well. `trainer`
compiles a model for a loss once, and `run` sets weights and optimizer back before it trains. In a
project that trains once, `compile` and `fit` are enough. The penalty `nll` keeps the chosen replies
likely in every training.
"""


@functools.cache
def trainer(loss_type, beta=1.0, **options):
    policy.set_weights(warm)
    model = dpo_keras.DPOModel(policy)
    optimizer = make_optimizer(
        COUNT // 32, learning_rate=2e-3, schedule="cosine", warmup_fraction=0.1
    )
    loss = dpo_keras.DPOLoss(loss_type, beta=beta, penalties={"nll": 1.0}, **options)
    model.compile(optimizer, loss)
    return model, [keras.ops.convert_to_numpy(value) for value in optimizer.variables]


def run(label, records, loss_type="sigmoid", batch_size=32, **options):
    model, fresh = trainer(loss_type, **options)
    policy.set_weights(warm)
    for variable, value in zip(model.optimizer.variables, fresh, strict=True):
        variable.assign(value)
    model.fit(batches(records, batch_size), verbose=0)
    measure(label)


"""
## One ruler

Objectives have scores of different kinds, so one ruler measures all of them: DPO's implicit reward,
the log-ratio log π/π_ref of a reply, whatever loss trained π. The margin of a pair is the log-ratio
of its better reply less that of the other one. The table has

* **accuracy**: the share of held-out pairs with a margin above 0, with its 95 % interval;
* **shorter, longer**: the same where the better reply is the shorter or the longer one, by more
  than three tokens;
* **ties**: the mean size of the margin, in nats, where both replies have the same manners.
"""


def same_manners(pair):
    first, second = (judge(pair.prompt, reply).courteous for reply in pair.responses)
    return first == second


measured = dpo_keras.tokenize_pairs(held_out, policy.preprocessor, max_length=MAX_LENGTH)
tied = np.array([same_manners(pair) for pair in held_out])
table = []


def measure(label):
    found = evaluate_preferences(trainer("sigmoid")[0], measured, batch_size=64)
    right = found.reward_margin > 0
    longer_by = found.pairs["chosen_tokens"] - found.pairs["rejected_tokens"]
    shorter, longer = right[longer_by < -3].mean(), right[longer_by > 3].mean()
    ties = np.abs(found.reward_margin[tied]).mean()
    accuracy = str(found.figures["reward_accuracy"])
    table.append(f"{label:30}{accuracy:26}{shorter:8.3f}{longer:8.3f}{ties:7.2f}")
    print(f"{label}: accuracy {accuracy}", flush=True)


run("pairs, clean: sigmoid", sample)

"""
## Noisy labels

One label in five is turned around. Label smoothing tells the loss the rate of wrong labels. With
`sigmoid` (cDPO) the margins then end at log((1 - ε)/ε) instead of growing for ever. `robust`
estimates the loss of the clean labels: its mean is right, and a batch's value varies more. It
pushes margins further, so its probabilities are too certain after a long training.

Which one orders held-out pairs best depends on how long and how hard you train: in the measurements
of the [guide to losses](../../dpo_keras/losses/README.md#noisy-labels) neither correction always
beats plain `sigmoid`. Compare on clean held-out pairs of your own.
"""

NOISE = 0.2


def turned(pair):
    return dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)


noisy = [turned(pair) if rng.random() < NOISE else pair for pair in sample]
run("20 % flipped: sigmoid", noisy)
run("20 % flipped: cDPO", noisy, label_smoothing=NOISE)
run("20 % flipped: robust", noisy, "robust", label_smoothing=NOISE)

"""
## Length bias

In nine of ten pairs the longer reply won. `audit` shows that before any training: look at
`longer_wins` of your own pairs first. In the table, compare the columns "shorter" and "longer" with
those of the clean pairs.

`sigmoid` sums log-ratios over tokens, so that a long reply can earn reward by its length.
`simpo` takes means over tokens and no reference; `sigmoid_norm` is DPO on means. Both take length
out of the *score*. They do not take the bias out of the *labels*: where people prefer long replies,
every objective learns what goes along with length. Then mend the data, too.
"""

longer_won = [pair for pair in train if len(pair.chosen) > len(pair.rejected) + 8]
shorter_won = [pair for pair in train if len(pair.chosen) < len(pair.rejected) - 8]
biased = rng.sample(longer_won, min(len(longer_won), COUNT * 9 // 10))
biased += rng.sample(shorter_won, len(biased) // 9)
print("The longer reply wins:", audit(Preferences(biased)).longer_wins)
run("longer wins: sigmoid", biased)
run("longer wins: simpo", biased, "simpo", beta=2.5)

"""
## Ties

People who look at manners alone are undecided where both replies are courteous, or both rude. A tie
is a label like any other: `preference=0.5`. Its optimum is P = ½, so the loss draws the margin of
such pairs to 0. Without ties nothing holds these margins, and they go where the rest takes them.
Compare the column "ties". The accuracy counts these pairs by the ground truth, which these people
do not tell.
"""

with_ties = [
    dataclasses.replace(pair, preference=0.5) if same_manners(pair) else pair for pair in sample
]
run("ties as 0.5: sigmoid", with_ties)
run("ties dropped: sigmoid", [pair for pair in with_ties if pair.preference > 0.5])

"""
## Thumbs

`kto` learns from single replies with a thumb up or down. One thumb in ten is wrong here. In a file,
each line has `prompt`, `response` and `desirable`. If you have pairs, keep them: `unpaired()` makes
thumbs of them, and loses which two replies were compared. Replies to held-out prompts are left out,
as `split` did for the pairs.
"""

held_out_prompts = {pair.prompt for pair in held_out}


def apart(records):
    return [record for record in records if record.prompt not in held_out_prompts]


thumbs = rng.sample(apart(support_thumbs(8000, noise=0.1)), COUNT)
run("thumbs, 10 % wrong: kto", thumbs, "kto")

"""
## Rankings

`plackett_luce` takes whole orders: the likelihood that the best of four replies is chosen first,
then the best of the remaining three, and so on. A batch of 16 rankings of four replies has as many
replies as a batch of 32 pairs. In a file, each line has `prompt`, `responses` and `ranking`;
rankings with ties have `scores`, and become pairs by `as_pairs()`.
"""

rankings = rng.sample(apart(dpo_keras.read_preferences("builtin:support-rankings")), COUNT // 2)
run("rankings: plackett_luce", rankings, "plackett_luce", batch_size=16)

"""
## Summary

The figures are of one seed and short trainings of a tiny model. Differences within the intervals
mean nothing: change `SEED` and run the example again before you believe one. Do not compare across
situations either, since a thumb, a pair and a ranking tell different amounts. The table measures
how the policy *ranks* given replies. For what it *writes*, sample replies and let people or a judge
look at them.
"""

print(f"\n{'training':30}{'accuracy':26}{'shorter':>8}{'longer':>8}{'ties':>7}")
print("\n".join(table))

"""
## Where to go on

- [Guide to losses: which objective for which situation](../../dpo_keras/losses/README.md)
- [Guide to preferences: thumbs, rankings, logs](../../dpo_keras/preferences/README.md)
- [Guide to evaluation](../../dpo_keras/evaluation/README.md)
- [Runs on thumbs](../../configs/thumbs.yaml) and [on rankings](../../configs/rankings.yaml)
- [The benchmark of label noise](../bench/label_noise.py), with five seeds
- [Preference training of your own Keras model](your_own_keras_model.py)
"""
