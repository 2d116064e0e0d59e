"""
Title: Larger than one device with keras.distribution
Author: dpo_keras
Date created: 2026/11/27
Last modified: 2026/11/27
Description: Train with DPO on a mesh of JAX devices that split the weights and the batches.
Accelerator: None
"""

"""
## Introduction

A model that does not fit into the memory of one device has to be split. On JAX,
`keras.distribution` does that: each device holds a part of the weights, and XLA adds the
communication between them. `dpo_keras.distribution` makes such a mesh for a family of models. The
code of the training stays as it is.

This example trains the same tiny policy twice with Direct Preference Optimization (DPO), on one
device and on a mesh of eight. It compares the losses, shows how much of the weights each device
holds, and saves the policy. The eight devices are simulated on one CPU. On a machine with eight
accelerators, leave out the line that sets `XLA_FLAGS`.

Simulated devices share the cores of one CPU, so the mesh is slower here than one device.
"""

"""
## Setup

Choose the backend and the number of simulated devices before you import Keras.
"""

"""shell
pip install "dpo-keras[jax]"  # before its release, in a clone: pip install '.[jax]'
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import json
import shutil
from collections import Counter
from pathlib import Path

import keras

import dpo_keras
from dpo_keras.app.config_sections import Scratch
from dpo_keras.app.models import build_policy

run = Path("runs/larger_than_one_device")
shutil.rmtree(run, ignore_errors=True)
run.mkdir(parents=True)
print(keras.distribution.list_devices())

"""
## The data

Each bundled pair is a support question with a chosen and a rejected reply. `split` keeps all pairs
of a prompt on one side.
"""

train, held_out = dpo_keras.read_preferences("builtin:support").split(0.1, seed=0)
example = train[1]
print(example.prompt, f"chosen:   {example.chosen}", f"rejected: {example.rejected}", sep="\n")

"""
## The policy

The policy is a two-layer GPT-2 with random weights, and a tokenizer that is trained on the texts.
The marked line in the function `train_on` below makes it. To use a real model, change that line.
Then also:

* Lower the learning rate from 1e-3 to about 5e-6, or to about 1e-4 with
  `dpo_keras.enable_lora(policy, 8)`, whose adapters are split as their weights are.
* Lower `beta` from 1.0 to 0.1.
* Raise `max_length` to the length of your texts.

A real model can write already. The tiny one cannot, and would need a warm-up with
`dpo_keras.SupervisedModel` to learn it. This example does without, because it only asks which of
two replies the policy prefers.
"""

TINY = Scratch(
    vocabulary_size=600, num_layers=2, hidden_dim=128, intermediate_dim=512, max_sequence_length=64
)
texts = [text for pair in train for text in (pair.prompt, pair.chosen, pair.rejected)]

"""
## Training, with or without a mesh

`keras.distribution.set_distribution` goes before the policy is made. Everything after it is the
same on one device and on many: `DPOModel`, which compares the policy with a frozen reference,
`compile`, and `fit`. The reference and the state of the optimizer are split as the weights are.

The batches have `batch_size` pairs in one static shape (`buckets=1`), so XLA compiles one step.
`batch_size` has to be a multiple of the data axis.
"""

MAX_LENGTH, BATCH_SIZE, STEPS = 64, 32, 12


def batches(pairs, policy, **options):
    """Return batches of one static shape."""
    return dpo_keras.preference_dataset(
        pairs,
        policy.preprocessor,
        batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
        batching="buckets",
        buckets=1,
        **options,
    )


def train_on(distribution, name):
    """Train a new policy; return the model and the loss of each step."""
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    policy = build_policy(TINY, texts)  # For a real model: dpo_keras.load_model("gemma3_1b")
    model = dpo_keras.DPOModel(policy)
    model.compile(
        keras.optimizers.Adam(1e-3, global_clipnorm=1.0),
        loss=dpo_keras.DPOLoss("sigmoid", beta=1.0),
    )
    log = run / f"{name}.jsonl"
    callbacks = [
        dpo_keras.callbacks.RunLog(log),
        dpo_keras.callbacks.RunCheckpoint(run / name / "checkpoints"),
    ]
    dataset = batches(train, policy, epochs=None)
    model.fit(dataset, steps_per_epoch=STEPS, callbacks=callbacks, verbose=2)
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return model, [record["loss"] for record in records if "epoch" not in record]


single, losses_of_one_device = train_on(None, "one_device")

"""
The mesh has two axes. `data=2` splits the rows of a batch in two, and `model=4` splits the weights
in four. The first argument tells the family of the model, and so the layout of its weights. For a
model that is too large to load on one device, give the name of its preset, such as `"gemma3_1b"`,
in place of a model.
"""

mesh = dpo_keras.distribution(single.policy, data=2, model=4)
model, losses_of_mesh = train_on(mesh, "mesh")

"""
## The same losses

Both trainings begin with the same weights and see the same batches. Their losses differ by the
rounding of sums alone.
"""

print("step  one device  mesh")
for step, (one, other) in enumerate(zip(losses_of_one_device, losses_of_mesh, strict=True), 1):
    print(f"{step:4}  {one:10.6f}  {other:.6f}")
    assert abs(one - other) < 1e-4

"""
## The memory of each device

Each variable is a JAX array, and its shards tell which device holds which part. With `model=4` each
device holds a little more than a quarter of the weights: norms, some biases and the table of
positions stay whole on each device. Both halves of the data axis hold the same weights. With
`fsdp=True` they are split along the data axis, too.
"""


def show_shares(title, variables):
    """Print what part of the variables each device holds."""
    held = Counter()
    for variable in variables:
        for shard in variable.value.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    whole = sum(variable.value.nbytes for variable in variables)
    shares = "  ".join(f"{held[device] / whole:.0%}" for device in sorted(held))
    print(f"{title}: {whole / 2**20:.1f} MiB, of which each device holds {shares}")


show_shares("policy, on one device", single.policy.variables)
show_shares("policy, on the mesh", model.policy.variables)
show_shares("optimizer, on the mesh", model.optimizer.variables)

"""
## What it learnt

Before the training, policy and reference are equal, and the accuracy on any pairs is 0.5. Evaluate
the model on held-out pairs, on the mesh. `chosen_logps` and `rejected_logps` are the mean
log-probabilities of the replies.
"""

held_out_batches = batches(held_out, model.policy, shuffle=False)
figures = model.evaluate(held_out_batches, return_dict=True, verbose=0)
for name in ("loss", "reward_accuracy", "reward_margin", "chosen_logps", "rejected_logps"):
    print(f"{name}: {figures[name]:.3f}")

"""
## Save

`RunCheckpoint` saved the whole training at the end of the epoch: each device wrote its own part.
`dpo_keras.training.load_checkpoint(model, directory)` reads it on the same mesh or on another one.
`save_pretrained` writes the policy alone, as a KerasHub preset.
"""

print(sorted(str(path) for path in (run / "mesh" / "checkpoints").iterdir()))
dpo_keras.save_pretrained(model, run / "policy", format="keras_hub")

"""
## Serve

A SavedModel needs TensorFlow. `export` takes care of that: it saves the model, and starts a process
that runs on TensorFlow, writes the SavedModel, and compares its answers with the model's. The whole
model has to fit into the memory of that process.

```python
report = dpo_keras.export(model, "saved_models/larger_than_one_device")
print(report.summary())
```

Another machine can export the preset later. A preset has no reference, so that SavedModel has no
signature `prefer` and no rewards:

```shell
KERAS_BACKEND=tensorflow python -c '
import dpo_keras
policy = dpo_keras.load_model("runs/larger_than_one_device/policy")
print(dpo_keras.export(policy, "saved_models/larger_than_one_device").summary())'
```

## Where to go on

* [Guide to training](../../dpo_keras/training/README.md): meshes, the families that have a layout,
  checkpoints, and several processes.
* [Guide to clusters](../../dpo_keras/cluster/README.md): the processes of one training.
* [Guide to serving](../../dpo_keras/serving/README.md): what `export` writes, and how to serve it.
* [Guide to the command line](../../dpo_keras/app/README.md): `training.backend: jax` and
  `training.mesh` in a configuration.
"""
