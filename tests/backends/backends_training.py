"""Trainings that are the same on every backend: weights, pairs and their order come from NumPy.

`python backends_training.py OUT.npz CASE …` takes them on the backend of KERAS_BACKEND.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).parent.parent
    sys.path[:0] = [str(here), str(here / "tiny_models")]

import keras
import numpy as np
import tiny
from families import ALL_FAMILIES

import dpo_keras
from dpo_keras.scoring.model_inputs import TextRows, full_logits

STEPS = 20
# XLA compiles each layer: these families need no more of them to show all that they do.
LAYERS = {"gpt2": 1, "llama": 1, "qwen3": 1, "gemma3": 2}


def policy_of(family, adapters=False, **sizes):
    """A tiny policy whose weights do not depend on the backend's random numbers."""
    if family in LAYERS:
        sizes = {"num_layers": LAYERS[family], **sizes}
    policy = ALL_FAMILIES[family](**sizes)
    if adapters:
        dpo_keras.enable_lora(policy, 4)
    random = np.random.default_rng(0)
    for weight in policy.weights:
        values = random.normal(size=weight.shape) * (0.3 if len(weight.shape) > 1 else 0.05)
        if weight.name in ("scale", "gamma") and "gemma" not in family:
            values = values + 1.0
        if weight.name.endswith("_b"):  # of fresh adapters
            values = values * 0.0
        weight.assign(values.astype("float32"))
    return policy


class StepLosses(keras.callbacks.Callback):
    """Keeps the loss of every step."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(self.model.step_logs["loss"]))


def batches(count=80, layout="buckets", batch_size=8, **options):
    given = {"max_length": 24, "seed": 1, **options}
    given |= {"buckets": 1} if layout == "buckets" else {"replicas": 8}
    return dpo_keras.preference_dataset(
        tiny.pairs(count), tiny.Letters(), batch_size=batch_size, batching=layout, **given
    )


def compiled_model(policy, optimizer=None, **options):
    model = dpo_keras.DPOModel(policy, **options)
    optimizer = optimizer or keras.optimizers.AdamW(1e-3, global_clipnorm=1.0)
    penalties = {"insufficient_confidence": 0.1}
    model.compile(optimizer, loss=dpo_keras.DPOLoss("sigmoid", penalties=penalties))
    return model


def trained(policy, layout="buckets", **options):
    """20 steps; returns their losses, the model, and the policy's weights."""
    model, log = compiled_model(policy, **options), StepLosses()
    data = batches(layout=layout, epochs=None)
    model.fit(data, steps_per_epoch=STEPS, verbose=0, callbacks=[log])
    return np.array(log.losses), model, weights_of(policy)


def logits_of(family):
    """Logits of two rows of text, the second shorter; places of padding left out."""
    ids = np.arange(22, dtype="int32").reshape(2, 11) % 90 + 3
    mask = np.ones((2, 11), "int32")
    mask[1, 7:] = 0
    text = TextRows(*map(keras.ops.convert_to_tensor, (ids, mask)))
    logits = keras.ops.convert_to_numpy(full_logits(policy_of(family), text))
    return np.concatenate([logits[0], logits[1, :7]])


def responses_of(family):
    """Greedy, drawn and nucleus responses; two to each of three prompts, in two batches."""
    policy = policy_of(family)
    options = {"max_new_tokens": 8, "preprocessor": tiny.Letters(), "batch_size": 2, "seed": [1, 2]}
    return np.array(
        [
            dpo_keras.generate_responses(
                policy, ["abc", "x", "hello"], temperature=temperature, top_p=top_p, **options
            )
            for temperature, top_p in ((0, 1.0), (1.0, 1.0), (1.0, 0.9))
        ]
    )


def weights_of(model):
    return [np.asarray(keras.ops.convert_to_numpy(weight)) for weight in model.weights]


ALONE = {"logits": logits_of, "responses": responses_of}


def main(out, *cases):
    found = {}
    for case in cases:
        family, layout, adapters = case.split(":")
        if layout in ALONE:
            found[case] = ALONE[layout](family)
            continue
        if layout == "variant":
            from backends_variants import VARIANTS

            made = VARIANTS[family]()
            found |= {f"{case}/{name}": values for name, values in made.items()}
            continue
        losses, _, weights = trained(policy_of(family, adapters == "lora"), layout)
        found[f"{case}/losses"] = losses
        found |= {f"{case}/{number}": weight for number, weight in enumerate(weights)}
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
