"""What a training may be beside the plain case, made alike on every backend."""

import tempfile

import keras
import numpy as np
import tiny
import vision_tiny
from backends_training import StepLosses, policy_of, weights_of

import dpo_keras
from dpo_keras.losses import OBJECTIVES, available
from dpo_keras.preferences import PreferencePair, read_preferences
from dpo_keras.preferences.ranked_responses import RankedResponses

STEPS = 4
REQUIRED = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}
OBJECTIVES_OF_PAIRS = {
    name: {"loss_type": name, **REQUIRED.get(name, {})}
    for name in available()
    if OBJECTIVES[name].of_policies and not OBJECTIVES[name].unpaired and name != "plackett_luce"
} | {
    "length desensitised": {"loss_type": "sigmoid", "ld_alpha": 0.3},
    "WPO": {"loss_type": "sigmoid", "wpo": True},
    "Jensen-Shannon": {"loss_type": "sigmoid", "divergence": "js"},
    "DPOP": {"loss_type": "sigmoid", "dpo_positive": 5.0, "penalties": {"kl_to_reference": 0.1}},
    "running shift": {"loss_type": "bco_pair", "shift_momentum": 0.9},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}


def embedding_policy():
    """The smallest causal policy: each token predicts the next by itself."""
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    mask = keras.Input((None,), dtype="int32", name="padding_mask")
    states = keras.layers.Embedding(tiny.VOCABULARY, 8)(token_ids)
    logits = keras.layers.Dense(tiny.VOCABULARY)(states)
    return filled(keras.Model({"token_ids": token_ids, "padding_mask": mask}, logits))


def filled(model):
    random = np.random.default_rng(0)
    for weight in model.weights:
        if not weight.name.endswith(("_min", "_max")):  # bounds of Gemma 4's clipping
            weight.assign(random.normal(size=weight.shape).astype("float32") * 0.3)
    return model


def steps(model, data, **options):
    """The losses, and the norms of the gradients, of some steps; then the weights."""
    log, norms = StepLosses(), []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: norms.append(float(model.step_logs["grad_norm"]))
    )
    model.fit(data, steps_per_epoch=STEPS, verbose=0, callbacks=[log, watch], **options)
    return {
        "losses": np.array(log.losses),
        "norms": np.array(norms),
        **{f"weight {n}": weight for n, weight in enumerate(weights_of(model.policy))},
    }


def compiled(policy, loss="sigmoid", reference="auto", optimizer=None, **options):
    loss = loss if isinstance(loss, dpo_keras.DPOLoss) else dpo_keras.DPOLoss(loss)
    model = dpo_keras.DPOModel(policy, reference if loss.needs_reference else "none", **options)
    model.compile(optimizer or keras.optimizers.SGD(0.05), loss=loss)
    return model


def tokens_of(records, max_length=24):
    return dpo_keras.tokenize_pairs(records, tiny.Letters(), max_length=max_length)


def batches(records, layout="packed", **options):
    given = {"seed": 1, "epochs": None, "batch_size": 4, "batching": layout, **options}
    given |= {"buckets": 1} if layout == "buckets" else {"replicas": 2}
    return dpo_keras.preference_dataset(records, **given)


def objective(name):
    records = [{**pair, "margin": 0.1 * n} for n, pair in enumerate(tiny.pairs(7))]
    loss = dpo_keras.DPOLoss(**OBJECTIVES_OF_PAIRS[name])
    return steps(compiled(embedding_policy(), loss), batches(tokens_of(records), "buckets"))


def quantized(mode):
    policy = policy_of("llama", hidden_dim=32)
    dpo_keras.quantize(policy, mode)
    dpo_keras.enable_lora(policy, 4)
    random = np.random.default_rng(1)
    for weight in policy.trainable_weights:
        weight.assign(random.normal(size=weight.shape).astype("float32") * 0.1)
    return steps(compiled(policy), batches(tokens_of(tiny.pairs(12))))


def cached():
    policy = policy_of("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        tokens = dpo_keras.cache_reference(policy, tokens_of(tiny.pairs(12)), f"{folder}/cache.npz")
    return steps(compiled(policy, reference="cached"), batches(tokens))


def experts():
    policy = policy_of("qwen3_moe")
    return steps(compiled(policy, auxiliary_loss="keep"), batches(tokens_of(tiny.pairs(12))))


def thumbs():
    rated = tokens_of(read_preferences(tiny.pairs(11)).unpaired())
    loss = dpo_keras.DPOLoss("kto", beta=0.5, undesirable_weight=1.3, penalties={"nll": 0.1})
    return steps(compiled(policy_of("gpt2"), loss), batches(rated))


def rankings():
    random = np.random.default_rng(1)
    found = []
    for number in range(8):
        letter = chr(97 + number)
        size = int(random.integers(2, 5))
        words = [letter * (5 - place) + chr(65 + place) * (1 + place) for place in range(size)]
        found.append(RankedResponses(letter * 4, tuple(words), tuple(range(1, size + 1))))
    return steps(compiled(policy_of("gpt2"), "plackett_luce"), batches(tokens_of(found, 32)))


def reward():
    model = dpo_keras.RewardModel(policy_of("gpt2"))
    filled(model.head)
    model.compile(keras.optimizers.SGD(0.05))
    return steps(model, batches(tokens_of(tiny.pairs(12))))


def images(family):
    policy = filled(getattr(vision_tiny, family)())
    records = [
        PreferencePair(f"What is {n}?", "It is red.", "No idea.", images=[vision_tiny.png(n)])
        for n in range(4)
    ]
    tokens = dpo_keras.tokenize_pairs(records, policy.preprocessor)
    return steps(compiled(policy), batches(tokens, "buckets"))


def half_precision():
    """Computed in float16, whose optimizer scales losses."""
    policy = policy_of("gpt2", dtype="mixed_float16")
    inner = keras.optimizers.SGD(0.05)
    optimizer = keras.optimizers.LossScaleOptimizer(
        inner, initial_scale=2.0**18, dynamic_growth_steps=2
    )
    model = compiled(policy, optimizer=optimizer)
    found = steps(model, batches(tokens_of(tiny.pairs(12))))
    return {**found, "scale": np.array(float(model.optimizer.dynamic_scale))}


def assert_same(found, expected, atol):
    """Compare what two trainings returned; losses and norms relative to the largest."""
    for name in found:
        ours, theirs, scale = found[name], expected[name], 1.0
        if name == "norms":
            # An overflow of float16 is infinite or not a number, as the sums happen to be taken.
            ours, theirs = (np.where(np.isinf(norms), np.nan, norms) for norms in (ours, theirs))
        if name in ("losses", "norms"):
            scale = max(np.nanmax(np.abs(theirs)), 1.0)
        np.testing.assert_allclose(ours, theirs, atol=atol * scale, rtol=0, err_msg=name)


VARIANTS = {
    "int8": lambda: quantized("int8"),
    "int4": lambda: quantized("int4"),
    "cached": cached,
    "experts": experts,
    "thumbs": thumbs,
    "rankings": rankings,
    "reward": reward,
    "float16": half_precision,
    "images of gemma3": lambda: images("gemma3"),
    "images of gemma4": lambda: images("gemma4"),
    "images of qwen3_5": lambda: images("qwen3_5"),
    **{f"objective {name}": lambda name=name: objective(name) for name in OBJECTIVES_OF_PAIRS},
}
