#!/usr/bin/env python
"""Make tests/fixtures/before_rebuild: files that the package wrote before it was rebuilt.

    python scripts/make_compatibility_fixture.py

Run once, with the code of commit 2861900. `tests/test_compatibility.py` loads the files with
today's code and compares what it finds with the values recorded beside them. Files made anew by
later code would prove nothing, so the script refuses where the folder is there.

| file | content |
|---|---|
| `losses.json` | inputs, configurations, values and gradients of all objectives |
| `models.zip`, `models.json` | `.keras` files; log-probs, metrics, what one more epoch makes |
| `reference_cache.npz` | what `cache_reference` kept of one of the models |
| `run.zip`, `run.json` | a finished run and a stopped one; their figures |
| `built/`, `built.json` | a directory of `build_preferences` with tokens; its pairs and tokens |
| `feedback.sqlite`, `feedback.json` | a round of two annotators; report and exported pairs |

The archives hold the files as they were written: HDF5 is mostly empty space.
"""

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import keras  # noqa: E402
import keras_hub  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tf_keras  # noqa: E402
from tiny import Letters, gpt2, llama, pairs  # noqa: E402

import dpo_keras  # noqa: E402
from dpo_keras import DPOLoss, DPOModel, SupervisedModel, legacy  # noqa: E402
from dpo_keras.app import runs  # noqa: E402
from dpo_keras.app.config import parse_config  # noqa: E402
from dpo_keras.cluster import RunStopped, StopRequest  # noqa: E402
from dpo_keras.feedback import Candidates, Response, Settings, assess, open_store  # noqa: E402
from dpo_keras.feedback import to_pairs as judged_pairs  # noqa: E402
from dpo_keras.losses import OBJECTIVES  # noqa: E402
from dpo_keras.training import make_optimizer, supervised_dataset  # noqa: E402

FIXTURE = ROOT / "tests" / "fixtures" / "before_rebuild"
LABELS = [1.0, 0.7, 0.5, 0.0, 1.0, 0.7]
WEIGHTS = [1.0, 2.0, 0.5, 1.0, 0.0, 3.0]
PER_RESPONSE = ("policy", "reference", "scores")
TEXTS = [["What is it?", "It is red."], ["When?", "At noon, sir."]]


def plain(value: Any) -> Any:
    """Turn arrays and tensors into lists and numbers, with all their digits."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray | np.generic | tf.Tensor | tf.Variable):
        return np.asarray(value).tolist()
    return value


def record(path: Path, content: dict[str, Any]) -> None:
    """Write JSON: lists of records with one record to a line, for differences that can be read."""
    lines = []
    for name, value in content.items():
        text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = (json.dumps(plain(one), ensure_ascii=False, allow_nan=False) for one in value)
            text = "[\n" + ",\n".join(rows) + "\n]"
        lines.append(f"{json.dumps(name)}: {text}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


# -- losses --------------------------------------------------------------------------------------


def scorer_outputs(seed: int, spread: float | None) -> dict[str, np.ndarray]:
    """Make what a scorer hands over: ordinary responses, or log-probs over the whole range."""
    chance, shape = np.random.default_rng(seed), (len(LABELS), 2)
    lengths = chance.integers(2, 20, shape).astype("float64")
    policy = -lengths * chance.uniform(0.5, 3, shape)
    if spread is None:
        lengths = np.round(10 ** chance.uniform(0, 3, shape))
        policy, spread = -(10 ** chance.uniform(0, 4, shape)), 200.0
    reference = policy + chance.normal(scale=spread, size=shape)
    share = chance.uniform(size=shape)
    return {
        "policy": policy,
        "reference": np.minimum(reference, -0.01),
        "lengths": lengths,
        "policy_shared": share * policy,
        "reference_shared": share * np.minimum(reference, -0.01),
        "margin": chance.uniform(0, 2, len(LABELS)),
        "wpo_log_weight": chance.normal(scale=0.5, size=shape),
        "group": np.array([0, 1, 2, 0, 1, 0], "int32"),
    }


# Values of each option that are not its default.
OPTIONS: list[dict[str, Any]] = [
    {"label_smoothing": 0.2},
    {"length_normalize": False},
    {"gamma": 0.7},
    {"discopop_tau": 0.3},
    {"cpo_alpha": 0.4},
    {"alphapo_alpha": 0.5},
    {"alphapo_alpha": 0.0},
    {"divergence": "forward_kl"},
    {"divergence": "js"},
    {"divergence": "alpha", "divergence_alpha": 0.3},
    {"ld_alpha": 0.3},
    {"margin": True},
    {"wpo": True},
    {"wpo": True, "wpo_max_weight": 0.8},
    {"shift_momentum": 0.9},
    {"group_robust": {"groups": 3, "eta": 0.1}},
]
PENALTIES: list[dict[str, float]] = [
    {"insufficient_confidence": 0.1},
    {"overconfidence": 0.3},
    {"kl_to_reference": 0.2},
    {"nll": 0.5},
]
MIXES: list[dict[str, Any]] = [
    {"loss_type": ["sigmoid", "sft"]},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["ipo", "aot"], "loss_weights": [2.0, 0.5], "penalties": {"nll": 0.1}},
    {
        "loss_type": ["sigmoid", "hinge", "apo_zero"],
        "penalties": {"overconfidence": 0.1, "kl_to_reference": 0.2},
        "margin": True,
        "wpo": True,
    },
    {
        "loss_type": "sigmoid",
        "label_smoothing": 0.1,
        "penalties": {"insufficient_confidence": 0.1, "nll": 0.2},
        "divergence": "alpha",
        "divergence_alpha": 0.5,
        "ld_alpha": 0.5,
        "margin": True,
        "wpo": True,
    },
]


def arguments() -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the inputs' name and the loss's arguments of every case, `dpo_positive` left out."""
    for name, objective in OBJECTIVES.items():
        usual = {"label_smoothing": 0.1} if name == "exo_pair" else {}
        for inputs, beta in (("ordinary", 0.3), ("wide", 0.1), ("wide", 2.0)):
            yield inputs, {"loss_type": name, "beta": beta, **usual}
        for options in OPTIONS:
            if options.keys() <= objective.options:
                yield "ordinary", {"loss_type": name, "beta": 0.3, **usual, **options}
        for penalty in PENALTIES:
            if all(objective.takes_penalty(one) for one in penalty):
                yield "ordinary", {"loss_type": name, "beta": 0.3, **usual, "penalties": penalty}
    for mix in MIXES:
        yield "ordinary", {"beta": 0.3, **mix}


def case(inputs: str, outputs: dict[str, np.ndarray], given: dict[str, Any]) -> dict[str, Any]:
    """Record one loss: values of each pair and their gradients, and what else is of interest."""
    loss = DPOLoss(**given, reduction=None)
    needed = {name: tf.constant(value) for name, value in outputs.items() if name in loss.needs}
    watched = [name for name in ("policy", "policy_shared") if name in needed]
    with tf.GradientTape() as tape:
        for name in watched:
            tape.watch(needed[name])
        values = loss(np.array(LABELS), needed)
    gradients = tape.gradient(values, [needed[name] for name in watched])
    found = {
        "inputs": inputs,
        "config": loss.get_config(),
        "values": values,
        "gradients": dict(zip(watched, gradients, strict=True)),
    }
    if loss.penalties:
        found["terms"] = loss.terms(np.array(LABELS), needed)
    elif inputs == "ordinary":
        found["scores"] = loss.scores(needed)
        found["weighted"] = loss(np.array(LABELS), needed, sample_weight=np.array(WEIGHTS))
    return found


def steps_of(outputs: dict[str, np.ndarray], given: dict[str, Any]) -> dict[str, Any]:
    """Record two training steps of a loss that remembers: the step's loss, and its variables."""
    loss = DPOLoss(**given)
    steps = []
    for weights in (WEIGHTS, WEIGHTS[::-1]):
        terms = loss.terms(np.array(LABELS), outputs)
        step = loss.combine(terms, np.array(weights), outputs, training=True)
        steps.append({"loss": step, "state": [tf.constant(w) for w in loss.state.weights]})
    return {"inputs": "ordinary", "config": loss.get_config(), "steps": steps}


def make_losses() -> None:
    """Record the values of all objectives."""
    inputs = {"ordinary": scorer_outputs(1, 3.0), "wide": scorer_outputs(2, None)}
    positive = [
        {"loss_type": name, "beta": 0.3, "penalties": {"dpo_positive": 5.0}}
        for name, objective in OBJECTIVES.items()
        if objective.takes_penalty("dpo_positive")
    ]
    remembering = [
        {"loss_type": "sigmoid", "group_robust": {"groups": 3, "eta": 0.5}},
        {"loss_type": "bco_pair", "shift_momentum": 0.8},
        {
            "loss_type": ["bco_pair", "sft"],
            "shift_momentum": 0.5,
            "group_robust": {"groups": 3},
            "penalties": {"nll": 0.1},
        },
    ]
    record(
        FIXTURE / "losses.json",
        {
            "labels": LABELS,
            "weights": WEIGHTS,
            "inputs": inputs,
            "cases": [case(name, inputs[name], given) for name, given in arguments()],
            "dpo_positive": [case("ordinary", inputs["ordinary"], one) for one in positive],
            "remembering": [steps_of(inputs["ordinary"], one) for one in remembering],
        },
    )


# -- models --------------------------------------------------------------------------------------


def small(make: Any = gpt2, seed: int = 0, **sizes: Any) -> Any:
    """Build a policy of some thousand weights."""
    return make(seed, num_layers=1, hidden_dim=4, intermediate_dim=8, **sizes)


def figures(model: Any, dataset: tf.data.Dataset) -> dict[str, Any]:
    """Record what a model makes of each pair, its metrics, and how far its training is."""
    found: dict[str, Any] = {
        "metrics": model.evaluate(dataset, return_dict=True, verbose=0),
        "iterations": int(model.optimizer.iterations),
        "batches": [
            {name: value for name, value in model(batch).items() if name in PER_RESPONSE}
            for batch in dataset
        ],
    }
    state = getattr(model, "objective_state", None)
    if state is not None:
        found["state"] = [weight.numpy() for weight in state.weights]
    return found


def preference_models() -> dict[str, DPOModel]:
    """Compile one model for each way of having a reference, and for losses that remember."""
    adapted = small()
    adapted.backbone.enable_lora(2)
    models = {
        "frozen_copy": DPOModel(small(), "frozen_copy"),
        "adapters_off": DPOModel(adapted, "adapters_off"),
        "remembering": DPOModel(small(), "frozen_copy"),
        "other_model": DPOModel(
            small(llama, tie_word_embeddings=True), small(llama, 1, tie_word_embeddings=True)
        ),
        "no_reference": DPOModel(small(), "none", remat=True),
    }
    cautious = {"insufficient_confidence": 0.1}
    losses = {
        "frozen_copy": DPOLoss("sigmoid", beta=0.1, penalties=cautious),
        "adapters_off": DPOLoss(
            "sigmoid", label_smoothing=0.1, penalties={"kl_to_reference": 0.1, "nll": 0.2}
        ),
        "remembering": DPOLoss(
            "bco_pair", shift_momentum=0.9, group_robust={"groups": 2, "eta": 0.5}
        ),
        "other_model": DPOLoss(["sigmoid", "sft"], loss_weights=[1.0, 0.2], margin=True),
        "no_reference": DPOLoss("simpo", beta=2.0, gamma=0.5),
    }
    usual = {"learning_rate": 1e-2}
    optimizers = {
        "adapters_off": make_optimizer(9, schedule="cosine", warmup_fraction=0.3, **usual),
        "no_reference": make_optimizer(9, gradient_accumulation=2, **usual),
    }
    for name, model in models.items():
        model.compile(optimizers.get(name, keras.optimizers.Adam(1e-2)), losses[name])
    return models


def legacy_model() -> legacy.DPOModel:
    """Compile a model of tf-keras."""
    tf_keras.utils.set_random_seed(0)
    layers = tf_keras.layers
    policy = tf_keras.Sequential(
        [
            tf_keras.Input((None,), dtype="int32", name="token_ids"),
            layers.Embedding(97, 4),
            layers.GRU(4, return_sequences=True),
            layers.Dense(97),
        ]
    )
    model = legacy.DPOModel(policy)
    loss = DPOLoss("bco_pair", shift_momentum=0.9, penalties={"insufficient_confidence": 0.1})
    model.compile(tf_keras.optimizers.Adam(1e-2), loss)
    return model


def make_models() -> None:
    """Train models for three steps, save them, and record them and what one more epoch makes."""
    numbers = np.random.default_rng(0).uniform(0.5, 1, (9, 3)).round(2).tolist()
    records = [
        {**pair, "group": "ab"[row % 2], "preference": p, "weight": w, "margin": m}
        for row, (pair, (p, w, m)) in enumerate(zip(pairs(9), numbers, strict=True))
    ]
    read = dpo_keras.read_preferences(records)
    tokenized = dpo_keras.tokenize_pairs(read, Letters(), max_length=48)
    options = {"batch_size": 3, "buckets": 1, "shuffle": False, "batching": "buckets"}
    dataset = dpo_keras.preference_dataset(tokenized, **options)
    supervised = SupervisedModel(small(dropout=0.0))
    supervised.compile(keras.optimizers.Adam(1e-2))
    models = {**preference_models(), "supervised": supervised, "legacy": legacy_model()}
    recorded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        dpo_keras.write_preferences(read, f"{folder}/pairs.jsonl")
        for name, model in models.items():
            data = supervised_dataset(dataset) if name == "supervised" else dataset
            model.fit(data, verbose=0)
            model.save(f"{folder}/{name}.keras")
            saved = figures(model, data)
            if name == "frozen_copy":
                cache = FIXTURE / "reference_cache.npz"
                cached = dpo_keras.cache_reference(model.policy, tokenized, cache, batch_size=4)
                saved["cached"] = cached.reference
            recorded[name] = {"saved": saved}
            if name != "supervised":  # loads without its optimizer
                model.fit(data, verbose=0)
                recorded[name]["after"] = figures(model, data)
        shutil.make_archive(str(FIXTURE / "models"), "zip", folder)
    record(FIXTURE / "models.json", recorded)


# -- runs ----------------------------------------------------------------------------------------

CONFIG = """\
name: tiny
model:
  scratch:
    vocabulary_size: 300
    num_layers: 1
    num_heads: 2
    hidden_dim: 4
    intermediate_dim: 8
    max_sequence_length: 96
data: {path: pairs.jsonl, held_out: 0.2, max_length: 96}
warmup: {batch_size: 8, learning_rate: 1.0e-3}
loss: {beta: 0.2, label_smoothing: 0.05, penalties: {insufficient_confidence: 0.1}}
training:
  batch_size: 4
  learning_rate: 1.0e-2
  schedule: cosine
  warmup_fraction: 0.3
  gradient_accumulation: 2
  buckets: 1
  checkpoint_every: 2
  keep_checkpoints: 1
evaluation: {prompts: 2, max_new_tokens: 8, batch_size: 8}
"""


class StopsAt:
    """A `Progress` that asks the run to stop behind a step of preference training."""

    def __init__(self, step: int):
        self.step, self.request, self.title = step, StopRequest(), ""

    def stage(self, title: str) -> None:
        """Note which stage it is."""
        self.title = title

    def note(self, text: str) -> None:
        """Pass over it."""

    def advance(self, done: int, total: int | None, **values: Any) -> None:
        """Ask, at the step."""
        if self.title == "Preference training" and done == self.step:
            self.request.request("the fixture")


def make_runs() -> None:
    """Leave a finished run and one that was stopped in the middle; all their paths are relative."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        dpo_keras.write_preferences(
            dpo_keras.read_preferences("builtin:support", limit=30), "pairs.jsonl"
        )
        Path("config.yaml").write_text(CONFIG, encoding="utf-8")
        finished = runs.train(parse_config(CONFIG, ["output=finished"]), given=CONFIG)
        stops, stopped_at = StopsAt(2), None
        try:
            config = parse_config(CONFIG, ["output=stopped", "evaluation.prompts=0"])
            runs.train(config, given=CONFIG, progress=stops, stop=stops.request)
        except RunStopped as stop:
            stopped_at = stop.step
        policy = keras_hub.models.CausalLM.from_preset("finished/policy")
        prompts, responses = map(list, zip(*TEXTS, strict=True))
        greedy = {"max_new_tokens": 8, "temperature": 0.0, "max_length": 96}
        recorded = {
            "steps": finished.steps,
            "stopped_at": stopped_at,
            "before": finished.before,
            "after": finished.after,
            "texts": TEXTS,
            "log_probs": dpo_keras.response_log_probs(policy, prompts, responses)[0],
            "greedy": dpo_keras.generate_responses(policy, prompts, **greedy),
            "evaluated": runs.evaluate("finished", "pairs.jsonl")["metrics"],
            "served": runs.export_run("finished", "served/1")["answer"],
        }
        record(FIXTURE / "run.json", recorded)
        for left in ("served", "finished/checkpoints", "finished/evaluations"):
            shutil.rmtree(left)  # large, or read by nobody
        for run in (Path("finished"), Path("stopped")):
            shutil.rmtree(run / "tensorboard")
            for drawn in (*run.glob("report.*"), *run.glob("*.png")):
                drawn.unlink()
            versions = json.loads((run / "versions.json").read_text())
            versions["platform"] = "Linux"  # not the machine's own
            (run / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
        shutil.make_archive(str(FIXTURE / "run"), "zip", folder)


# -- data, feedback ------------------------------------------------------------------------------


def turns(*contents: str) -> list[dict[str, str]]:
    """Make a conversation of text, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def make_built() -> None:
    """Build a directory of pairs with every column, in text and in messages, and its tokens."""
    chance = np.random.default_rng(3)
    records: list[dict[str, Any]] = []
    for number, pair in enumerate(pairs(36, seed=3)):
        one: dict[str, Any] = {**pair, "id": f"pair-{number}"}
        if number % 3 == 0:
            one["prompt"] = turns("Hi", "Hello!", pair["prompt"])
            for name in ("chosen", "rejected"):
                one[name] = [{"role": "assistant", "content": pair[name]}]
        if number % 4 == 1:
            one |= {"preference": float(chance.uniform(0.5, 1)), "weight": float(chance.uniform())}
        if number % 5 == 2:
            one |= {"annotator": "ann", "group": "ab"[number % 2], "margin": number / 7}
        if number % 6 == 3:
            one |= {"swapped": True}
        if number == 7:
            one["chosen"] = "Grüße, 你好 🙂 " * 9
        records.append(one)
    built = dpo_keras.build_preferences(records, FIXTURE / "built", shard_bytes=2500)
    rules: dict[str, Any] = {"max_length": 120, "template": "chatml"}
    tokens = dpo_keras.tokenize_pairs(built, Letters(), **rules)
    train, held_out = built.split(0.25, seed=1)
    for lock in (FIXTURE / "built").rglob("lock"):
        lock.unlink()
    record(
        FIXTURE / "built.json",
        {
            "pairs": [pair.as_dict() for pair in built],
            "rules": rules,
            "tokens": [
                {name: getattr(tokens, name)[row] for name in ("prompt", "chosen", "rejected")}
                for row in range(len(tokens))
            ],
            "columns": {name: getattr(tokens, name) for name in ("preference", "weight", "margin")},
            "groups": [
                tokens.group_names[number] if number >= 0 else None for number in tokens.group
            ],
            "fingerprint": tokens.fingerprint,
            "held_out": [pair.id for pair in held_out],
            "held_out_fingerprint": dpo_keras.tokenize_pairs(
                held_out, Letters(), **rules
            ).fingerprint,
            "train": [pair.id for pair in train],
        },
    )


def make_feedback() -> None:
    """Leave a round of two annotators that is not at its end: one pair is still leased."""
    path = FIXTURE / "feedback.sqlite"
    now = iter(range(1_000_000, 2_000_000))
    store = open_store(
        path,
        Settings(overlap=2, gold_share=0.2, repeat_share=0.1, repeat_distance=3),
        create=True,
        clock=lambda: float(next(now)),
        chance=random.Random(0),
    )
    makers = ("small temperature=0.7", "large temperature=0.7", "large temperature=1")
    store.add(
        Candidates(
            f"Question {number}?",
            tuple(
                Response(f"{word} answer to {number}." * length, maker, {"policy": maker})
                for word, length, maker in zip(
                    ("Good", "Fair", "Poor"), (1, 2, 1), makers, strict=True
                )
            )[: 2 + number % 2],
            id=f"q{number}",
            group="odd" if number % 2 else None,
            gold=0 if number in (2, 6) else None,
        )
        for number in range(12)
    )
    rank = {"Good": 0, "Fair": 1, "Poor": 2}
    for name, group, often_wrong in (("ann", "staff", 9), ("bob", None, 4)):
        person = store.add_annotator(name, group)[0].id
        for turn in range(1, 21):
            shown = store.next(person)[0]
            left, right = (rank[text[:4]] for text in (shown.left, shown.right))
            choice = "left" if (left < right) != (turn % often_wrong == 0) else "right"
            choice = {5: "tie", 11: "both_bad", 13: "skip"}.get(turn, choice)
            strength = 1 + turn % 3 if choice in ("left", "right") and turn % 2 else None
            store.submit(
                person,
                shown.id,
                choice,
                key=f"{name}-{turn}",
                strength=strength,
                reason="It says so." if turn == 3 else None,
                seconds=2.0 + turn / 4,
            )
            if turn == 7:
                store.undo(person, shown.id, key=f"{name}-undo-{turn}")
        waiting = store.next(person)[0]
    options = [
        {"label": label, "weights": weights, "both_bad": both_bad}
        for label in ("each", "majority", "vote_share", "dawid_skene")
        for weights, both_bad in (("none", "drop"), ("quality", "half"))
    ]
    record(
        FIXTURE / "feedback.json",
        {
            "resamples": 50,
            "report": assess(store, resamples=50).as_dict(),
            "progress": [store.progress().judged, store.progress().wanted],
            "annotators": [
                {"id": one.id, "name": one.name, "group": one.group, "done": store.done_by(one.id)}
                for one in store.annotators()
            ],
            "waiting": [waiting.id, waiting.prompt, waiting.left, waiting.right],
            "exported": [
                {"options": one, "pairs": [p.as_dict() for p in judged_pairs(store, **one).pairs]}
                for one in options
            ],
        },
    )
    store.close()


def main() -> None:
    """Make everything."""
    if FIXTURE.exists():
        sys.exit(f"{FIXTURE} is there already; it is made once, by the code before the rebuild.")
    FIXTURE.mkdir(parents=True)
    make_losses()
    make_models()
    make_built()
    make_feedback()
    make_runs()


if __name__ == "__main__":
    main()
