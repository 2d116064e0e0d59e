"""What the package wrote before it was rebuilt still loads, and means what it meant.

The files were made once, with the code of commit 2861900, by `make_compatibility_fixture.py` in
scripts/, which lists them. Only public names are used here: modules may move, files may not break.
"""

import json
import random
import shutil
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tiny import Letters

import dpo_keras
from dpo_keras import DPOLoss, InputError, StoredPreferences
from dpo_keras.app import runs
from dpo_keras.app.config import load_config
from dpo_keras.evaluation import HeldOut, Samples
from dpo_keras.feedback import Settings, assess, open_store
from dpo_keras.feedback import to_pairs as judged_pairs
from dpo_keras.losses import available
from dpo_keras.training import supervised_dataset

FIXTURE = Path(__file__).parent / "fixtures" / "before_rebuild"


def recorded(name):
    return json.loads((FIXTURE / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A copy of all files, archives unpacked: what is read here may be written to."""
    folder = tmp_path_factory.mktemp("before")
    shutil.copytree(FIXTURE, folder, dirs_exist_ok=True)
    for archive in FIXTURE.glob("*.zip"):
        shutil.unpack_archive(archive, folder / archive.stem)
    return folder


def contents(folder):
    """Every file, with when it was written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def assert_close(found, expected, rtol, atol=0.0, name=""):
    """Compare all that was recorded; what is new beside it is no fault, nor are other words."""
    if isinstance(expected, dict):
        for key in expected.keys() - {"findings", "reason"}:
            assert_close(found[key], expected[key], rtol, atol, f"{name}/{key}")
    elif isinstance(expected, list) and any(isinstance(one, dict | list) for one in expected):
        assert len(found) == len(expected), name
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, rtol, atol, f"{name}/{place}")
    elif expected is None or isinstance(expected, str | bool):
        assert found == expected, name
    elif isinstance(expected, list) and any(isinstance(one, str | None) for one in expected):
        assert list(found) == expected, name
    else:
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=name)


# -- losses --------------------------------------------------------------------------------------

LOSSES = recorded("losses")
LABELS, WEIGHTS = np.array(LOSSES["labels"]), np.array(LOSSES["weights"])
OUTPUTS = {
    name: {key: np.array(value) for key, value in inputs.items()}
    for name, inputs in LOSSES["inputs"].items()
}


def names_of(case):
    names = case["config"]["loss_type"]
    return names if isinstance(names, str) else "+".join(names)


def cases_by_name():
    found = {}
    for case in LOSSES["cases"]:
        found.setdefault(names_of(case), []).append(case)
    return found


CASES = cases_by_name()


def assert_same_loss(case):
    loss = DPOLoss.from_config(case["config"])
    assert_close(loss.get_config(), case["config"], 0)
    outputs = {name: tf.constant(value) for name, value in OUTPUTS[case["inputs"]].items()}
    watched = {name: outputs[name] for name in case["gradients"]}
    with tf.GradientTape() as tape:
        tape.watch(watched)
        values = loss(LABELS, outputs)
    found = {"values": values, "gradients": tape.gradient(values, watched)}
    if "terms" in case:
        found["terms"] = loss.terms(LABELS, outputs)
    if "scores" in case:
        found["scores"] = loss.scores(outputs)
        found["weighted"] = loss(LABELS, outputs, sample_weight=WEIGHTS)
    expected = {name: case[name] for name in case.keys() - {"inputs", "config"}}
    # Where a gradient is 0 but for rounding, nothing is relative to it.
    assert_close(found, expected, rtol=1e-6, atol=1e-13, name=str(case["config"]))


def test_every_objective_is_recorded_and_still_there():
    single = {name for name in CASES if "+" not in name}
    assert len(single) == 20 and single <= available().keys()


@pytest.mark.parametrize("name", CASES)
def test_losses_have_the_values_and_gradients_they_had(name):
    for case in CASES[name]:
        assert_same_loss(case)


@pytest.mark.parametrize("case", LOSSES["dpo_positive"], ids=names_of)
def test_dpo_positive_as_a_penalty_is_what_it_was_or_is_refused_by_name(case):
    try:
        assert_same_loss(case)
    except InputError as error:
        assert "dpo_positive" in str(error)


@pytest.mark.parametrize("case", LOSSES["remembering"], ids=names_of)
def test_losses_that_remember_take_the_steps_they_took(case):
    loss, outputs = DPOLoss.from_config(case["config"]), OUTPUTS[case["inputs"]]
    for weights, expected in zip((WEIGHTS, WEIGHTS[::-1]), case["steps"], strict=True):
        terms = loss.terms(LABELS, outputs)
        step = float(loss.combine(terms, weights, outputs, training=True))
        assert step == pytest.approx(expected["loss"], rel=1e-6)
        assert_close([weight.numpy() for weight in loss.state.weights], expected["state"], 1e-6)


# -- models --------------------------------------------------------------------------------------

MODELS = recorded("models")


@pytest.fixture(scope="module")
def tokenized(before):
    pairs = dpo_keras.read_preferences(before / "models" / "pairs.jsonl")
    return dpo_keras.tokenize_pairs(pairs, Letters(), max_length=48)


@pytest.fixture(scope="module")
def dataset(tokenized):
    options = {"batch_size": 3, "buckets": 1, "shuffle": False, "batching": "buckets"}
    return dpo_keras.preference_dataset(tokenized, **options)


def load_model(before, name, **options):
    library = keras
    if name == "legacy":
        library = tf_keras
        assert dpo_keras.legacy.DPOModel  # importing a class makes its name known to Keras
    else:
        assert dpo_keras.DPOModel and dpo_keras.SupervisedModel
    return library.saving.load_model(before / "models" / f"{name}.keras", **options)


def assert_figures(model, dataset, expected, tolerance):
    metrics = model.evaluate(dataset, return_dict=True, verbose=0)
    assert_close(metrics, expected["metrics"], tolerance, tolerance)
    batches = [model(batch) for batch in dataset]
    assert_close(batches, expected["batches"], tolerance, tolerance)
    if "state" in expected:
        state = [weight.numpy() for weight in model.objective_state.weights]
        assert_close(state, expected["state"], tolerance, tolerance)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "supervised"])
def test_saved_models_are_what_they_were_and_go_on_as_they_did(name, before, dataset):
    model, expected = load_model(before, name), MODELS[name]
    model.run_eagerly = True  # nothing here is worth a trace
    assert int(model.optimizer.iterations) == expected["saved"]["iterations"]
    assert_figures(model, dataset, expected["saved"], 1e-5)
    # The optimizer's moments, its schedule, and gradients that wait to be applied.
    model.fit(dataset, verbose=0)
    assert int(model.optimizer.iterations) == expected["after"]["iterations"]
    assert_figures(model, dataset, expected["after"], 1e-4)


def test_a_saved_supervised_model_is_what_it_was(before, dataset):
    # How it was compiled was not saved with it.
    model = load_model(before, "supervised", compile=False)
    model.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    assert_figures(model, supervised_dataset(dataset), MODELS["supervised"]["saved"], 1e-5)


def test_a_cached_reference_is_accepted_for_the_model_and_pairs_it_was_made_of(before, tokenized):
    path = before / "reference_cache.npz"
    there = path.read_bytes()

    def refuse(done, count):
        raise AssertionError("the reference is computed anew")

    policy = load_model(before, "frozen_copy").policy
    found = dpo_keras.cache_reference(policy, tokenized, path, on_batch=refuse)
    assert_close(found.reference, MODELS["frozen_copy"]["saved"]["cached"], 0)
    other = load_model(before, "remembering").policy
    with pytest.raises(InputError, match="weights"):
        dpo_keras.cache_reference(other, tokenized, path)
    assert path.read_bytes() == there


# -- runs ----------------------------------------------------------------------------------------

RUN = recorded("run")


@pytest.fixture
def at_runs(before, monkeypatch):
    """Go where the runs were started: their paths are relative."""
    monkeypatch.chdir(before / "run")


def lines_of(path):
    return Path(path).read_text(encoding="utf-8").splitlines()


def steps_of(run):
    records = map(json.loads, lines_of(f"{run}/metrics.jsonl"))
    return [record for record in records if "epoch" not in record]


def log_probs(path, texts=RUN["texts"]):
    prompts, responses = map(list, zip(*texts, strict=True))
    policy = keras_hub.models.CausalLM.from_preset(path)
    return dpo_keras.response_log_probs(policy, prompts, responses)[0]


class Hears:
    """A `Progress` that keeps the steps of training, the only ones with a loss."""

    def __init__(self):
        self.steps = []

    def stage(self, title):
        pass

    def note(self, text):
        pass

    def advance(self, done, total, **values):
        self.steps += [done] if "loss" in values else []


@pytest.mark.slow
def test_a_stopped_run_goes_on_behind_its_last_step_and_ends_as_the_other(at_runs):
    warmup, training = lines_of("stopped/metrics.warmup.jsonl"), lines_of("stopped/metrics.jsonl")
    assert json.loads(training[-1])["step"] == RUN["stopped_at"] == 3
    heard = Hears()
    result = runs.train(load_config("stopped/config.yaml"), resume=True, progress=heard)
    assert heard.steps == [4, 5, 6]  # neither the warm-up nor the first steps once more
    assert lines_of("stopped/metrics.warmup.jsonl") == warmup
    log = lines_of("stopped/metrics.jsonl")
    assert log[: len(training)] == training
    steps, others = steps_of("stopped"), steps_of("finished")
    assert [step["step"] for step in steps] == list(range(1, RUN["steps"] + 1))
    assert result.steps == RUN["steps"]
    for one, other in zip(steps, others, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    # The other one wrote responses, too.
    for found, expected in ((result.before, RUN["before"]), (result.after, RUN["after"])):
        assert_close(found["metrics"], expected["metrics"], 1e-4, 1e-5)
    assert_close(result.before["figures"], RUN["before"]["figures"], 1e-4, 1e-5)
    # Two held-out pairs share their prompt. Cut to the room of either pair's responses, it counted
    # as two prompts when the other run was measured, so intervals were others.
    assert HeldOut.load("stopped/after/pairs.npz").pairs["prompt"].tolist() == [0, 1, 1, 2, 3, 4]
    for name, figure in RUN["after"]["figures"].items():
        value = {key: figure[key] for key in figure.keys() - {"low", "high"}}
        assert_close(result.after["figures"][name], value, 1e-4, 1e-5, name)
    assert_close(log_probs("stopped/policy"), RUN["log_probs"], 1e-5)


def test_a_finished_run_gives_its_result_and_its_measurements(at_runs):
    result = runs.train(load_config("finished/config.yaml"), resume=True)
    assert result.steps == RUN["steps"]
    assert_close(result.as_dict(), {"before": RUN["before"], "after": RUN["after"]}, 0)
    shown = [json.loads(line) for line in lines_of("finished/samples.jsonl")]
    for name in ("before", "after"):
        held_out = HeldOut.load(f"finished/{name}/pairs.npz")
        assert_close(held_out.metrics, RUN[name]["metrics"], 1e-6)
        samples = Samples.load(f"finished/{name}/responses.json")
        assert_close(
            {k: v.as_dict() for k, v in samples.figures.items()}, RUN[name]["responses"], 0
        )
        assert [one["response"] for one in samples.records] == [row[name] for row in shown]


def test_a_finished_run_is_evaluated_against_its_own_reference(at_runs):
    found = runs.evaluate("finished", "pairs.jsonl")
    assert found["pairs"] == 30
    assert_close(found["metrics"], RUN["evaluated"], 1e-5, 1e-6)


def test_a_finished_runs_policy_answers_as_it_did(at_runs):
    assert_close(log_probs("finished/policy"), RUN["log_probs"], 1e-5)
    prompts = [prompt for prompt, _ in RUN["texts"]]
    Path("prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    found = runs.generate("finished", "prompts.txt", responses=1, temperature=0.0)
    assert [one["prompt"] for one in found] == prompts
    assert [one["responses"] for one in found] == [[text] for text in RUN["greedy"]]


def test_a_finished_runs_policy_and_reference_prefer_what_their_export_preferred(at_runs):
    # Not exported again, which takes many seconds: what an export reads is what is read here.
    request, response = RUN["served"]["prefer"].values()
    texts = [[request["prompt"], request[name]] for name in ("response_a", "response_b")]
    ratios = log_probs("finished/policy", texts) - log_probs("finished/reference", texts)
    beta = load_config("finished/config.yaml").loss.beta
    assert beta * (ratios[0] - ratios[1]) == pytest.approx(response["llr"], abs=1e-5)


# -- data ----------------------------------------------------------------------------------------


def test_stored_pairs_are_read_back_and_split_as_they_were(before):
    expected, built = recorded("built"), StoredPreferences.open(before / "built")
    built.verify()
    assert [pair.as_dict() for pair in built] == expected["pairs"]
    assert built[35].as_dict() == expected["pairs"][35]
    train, held_out = built.split(0.25, seed=1)
    assert [pair.id for pair in train] == expected["train"]
    assert [pair.id for pair in held_out] == expected["held_out"]


def test_tokens_of_stored_pairs_are_used_and_not_made_anew(before):
    expected, there = recorded("built"), contents(before / "built")
    built = StoredPreferences.open(before / "built")
    rules = {**expected["rules"], "min_prompt_tokens": 1}  # the rule of that time
    tokens = dpo_keras.tokenize_pairs(built, Letters(), **rules)
    assert len(tokens) == len(expected["tokens"]) == 36
    for row, parts in enumerate(expected["tokens"]):
        assert {name: getattr(tokens, name)[row].tolist() for name in parts} == parts
    for name, column in expected["columns"].items():
        np.testing.assert_allclose(getattr(tokens, name), column, rtol=1e-6)
    names = [*tokens.group_names, None]  # -1 is none
    assert [names[number] for number in tokens.group] == expected["groups"]
    assert tokens.fingerprint == expected["fingerprint"]
    assert (tokens.report.truncated_prompts, tokens.report.truncated_responses) == (13, 1)
    assert "made by an earlier version, without checksums" in tokens.report.warnings[-1]
    held_out = built.split(0.25, seed=1)[1]
    tokens = dpo_keras.tokenize_pairs(held_out, Letters(), **rules)
    assert tokens.fingerprint == expected["held_out_fingerprint"]
    assert contents(before / "built") == there


def test_tokens_whose_prompts_were_cut_away_are_made_anew_beside_them(before, tmp_path):
    expected = recorded("built")
    shutil.copytree(before / "built" / "tokens", tmp_path, dirs_exist_ok=True)
    (there,) = tmp_path.iterdir()
    built = StoredPreferences.open(before / "built")
    tokens = dpo_keras.tokenize_pairs(built, Letters(), **expected["rules"], cache=tmp_path)
    then, now = [len(row["prompt"]) for row in expected["tokens"]], tokens.prompt.lengths.tolist()
    assert then[7] == 2 and now[7] == 30  # a quarter of max_length
    assert then[:7] + then[8:] == now[:7] + now[8:]
    assert len(list(tmp_path.iterdir())) == 2 and there.exists()


# -- feedback ------------------------------------------------------------------------------------


def test_a_round_of_feedback_is_reported_exported_and_gone_on_with(before):
    expected = recorded("feedback")
    store = open_store(
        before / "feedback.sqlite", clock=lambda: 1_000_500.0, chance=random.Random(1)
    )
    assert store.settings == Settings(
        overlap=2, gold_share=0.2, repeat_share=0.1, repeat_distance=3
    )
    report = assess(store, resamples=expected["resamples"]).as_dict()
    assert_close(report, expected["report"], 1e-6)
    people = [
        {"id": one.id, "name": one.name, "group": one.group, "done": store.done_by(one.id)}
        for one in store.annotators()
    ]
    assert people == expected["annotators"] and [one["name"] for one in people] == ["ann", "bob"]
    for case in expected["exported"]:
        pairs = [pair.as_dict() for pair in judged_pairs(store, **case["options"]).pairs]
        assert_close(pairs, case["pairs"], 1e-9)
    progress = store.progress()
    assert [progress.judged, progress.wanted] == expected["progress"]
    bob = people[1]["id"]
    shown = store.next(bob)[0]
    assert [shown.id, shown.prompt, shown.left, shown.right] == expected["waiting"]
    store.submit(bob, shown.id, "left", key="today")
    assert store.progress().judged == expected["progress"][0] + 1
    store.close()
