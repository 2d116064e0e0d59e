"""Rounds of improvement: what each does, what it costs, and that none does anything twice."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import improve_judges
import numpy as np
import pytest
from app_runs import steps_of

from dpo_keras.app import improve as app_improve
from dpo_keras.app import improvement_stages
from dpo_keras.app.config import Config, parse_config
from dpo_keras.app.console import Silent
from dpo_keras.app.improve import improve
from dpo_keras.app.improvement import Improvement
from dpo_keras.app.improvement_report import FIGURES
from dpo_keras.app.models import load_model
from dpo_keras.cluster import StopRequest
from dpo_keras.errors import InputError
from dpo_keras.feedback import open_store
from dpo_keras.feedback.judgements import read_table
from dpo_keras.preferences import read_preferences
from dpo_keras.scoring import response_log_probs

ROOT = Path(__file__).parents[2]
ROUNDS, JUDGEMENTS, PROMPTS = 2, 6, 5


class Heard(Silent):
    """Keeps the stages of an improvement; ends it at the stage `until`, as a crash would."""

    def __init__(self, until=None, step=None):
        self.until, self.step, self.stages, self.notes = until, step, [], []

    def stage(self, title):
        self.stages.append(title)
        if title == self.until and self.step is None:
            raise CrashError

    def note(self, text):
        self.notes.append(text)

    def advance(self, done, total, **values):
        if self.stages and self.stages[-1] == self.until and done == self.step:
            raise CrashError


class CrashError(Exception):
    pass


@pytest.fixture(autouse=True)
def judge_is_well():
    improve_judges.CALLS.clear()
    improve_judges.FAIL_AT[0] = None


@pytest.fixture(scope="module")
def config(gpt2_preset):
    """Builds the configuration of an improvement of seconds, at a directory."""

    def build(output, **changes):
        content = {
            "output": str(output),
            "model": {"path": str(gpt2_preset)},
            "data": {"path": "builtin:support", "limit": 40, "held_out": 0.15, "max_length": 64},
            "training": {"batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 1},
            "evaluation": {"prompts": 3, "max_new_tokens": 6, "batch_size": 8},
            "improve": {"prompts_per_round": PROMPTS, "responses": 3, "judgements": JUDGEMENTS},
            "judge": {"type": "function", "function": "improve_judges:longer"},
        }
        for name, change in changes.items():
            old = content.get(name)
            content[name] = {**old, **change} if isinstance(old, dict) and change else change
        return Config(**content)

    return build


@pytest.fixture(scope="module")
def improved(config, tmp_path_factory):
    """An improvement that nothing disturbed."""
    return improve(config(tmp_path_factory.mktemp("improved") / "whole"), ROUNDS)


@pytest.fixture
def unmeasured(monkeypatch):
    """For what comes after the evaluation of round 0, which takes seconds."""
    found = {"figures": {one.name: {"value": None} for one in FIGURES}}
    found |= dict.fromkeys(("round", "judgements", "pairs"), 0)
    monkeypatch.setattr(app_improve, "measure", lambda *arguments: found)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def judged(directory):
    store = open_store(Path(directory) / "feedback.sqlite")
    table = read_table(store.database)
    store.close()
    return table


def content_of(directory, rounds):
    """What an improvement has made, in words and numbers."""
    folder, found = Path(directory), {}
    for number in range(1, rounds + 1):
        for name in ("candidates", "selected", "pairs"):
            found[number, name] = lines(folder / f"round-{number}" / f"{name}.jsonl")
        found[number, "figures"] = lines_of_round(folder, number)["figures"]
    return found


def lines_of_round(folder, number):
    return json.loads((Path(folder) / f"round-{number}" / "round.json").read_text())


def same_as(improved, directory, rounds=ROUNDS):
    assert content_of(directory, rounds) == content_of(improved.directory, rounds)
    for number in range(1, rounds + 1):
        one, other = (
            load_model(f"{folder}/round-{number}/run/policy")
            for folder in (improved.directory, directory)
        )
        for a, b in zip(one.weights, other.weights, strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)
    ours, theirs = judged(directory), judged(improved.directory)
    assert len(ours) == rounds * JUDGEMENTS
    np.testing.assert_array_equal(ours.first_on_left, theirs.first_on_left[: len(ours)])


def test_each_round_learns_from_judgements_of_the_policy_of_the_round_before(improved):
    result = improved
    folder = Path(result.directory)
    assert [one["round"] for one in result.rounds] == [0, 1, 2]
    train, held_out = read_preferences("builtin:support", limit=40).split(0.15, seed=0)
    seen = []
    for number in (1, 2):
        run = folder / f"round-{number}" / "run"
        prompts = {one["prompt"] for one in lines(folder / f"round-{number}" / "prompts.jsonl")}
        assert prompts <= {pair.prompt for pair in train} and len(prompts) == PROMPTS
        seen.append(prompts)
        candidates = lines(folder / f"round-{number}" / "candidates.jsonl")
        assert {maker["policy"] for one in candidates for maker in one["makers"]} == {
            f"round {number - 1}"
        }
        used = parse_config((run / "config.yaml").read_text(), stored=True)
        assert used.model.path == result.rounds[number - 1]["policy"]
        assert used.reference == result.rounds[0]["policy"]
        pairs = read_preferences(run.parent / "pairs.jsonl")
        assert all(len(pair.chosen) > len(pair.rejected) for pair in pairs)
        at_first = abs(steps_of(run)[0]["loss"] - np.log(2)) < 1e-4
        assert at_first == (number == 1), "round 2 does not begin as its reference"
    assert not seen[0] & seen[1], "no prompt comes again before all have come"
    assert not (seen[0] | seen[1]) & {pair.prompt for pair in held_out}


@pytest.mark.parametrize("reference", ["first", "previous", "moving"])
def test_the_reference_of_a_round(reference, config, tmp_path):
    sync = {"every": 2, "alpha": 0.5} if reference == "moving" else None
    settings = config(
        tmp_path / "run",
        reference="frozen_copy",
        improve={"reference": reference},
        training={"sync_reference": sync},
    )
    improvement = Improvement(settings, settings.improve, None, Silent(), StopRequest())
    rounds = [improvement.config_of(number) for number in (1, 2)]
    first = settings.model.path
    assert [one.model.path for one in rounds] == [first, f"{tmp_path}/run/round-1/run/policy"]
    # A frozen copy is one of the policy that the round's training begins with.
    assert {one.reference for one in rounds} == {first if reference == "first" else "frozen_copy"}
    assert all(one.training.sync_reference == settings.training.sync_reference for one in rounds)


def test_the_policy_of_a_finished_run_is_round_0_without_a_warm_up(improved, config, tmp_path):
    settings = config(
        tmp_path / "run",
        model={"path": None, "scratch": {"num_layers": 1}},
        warmup={"batch_size": 4, "learning_rate": 1e-3},
        improve={"start": f"{improved.directory}/round-1/run"},
    )
    heard = Heard("Round 1: candidates")
    with pytest.raises(CrashError):
        improve(settings, 1, progress=heard)
    assert "Supervised warm-up" not in heard.stages
    answers = [
        [one["response"] for one in json.loads((folder / "responses.json").read_text())["records"]]
        for folder in (tmp_path / "run/round-0/after", Path(improved.directory, "round-1/after"))
    ]
    assert answers[0] == answers[1]


def test_costs_are_counted_in_judgements(improved):
    result = improved
    table = judged(result.directory)
    assert [one["judgements"] for one in result.rounds] == [0, JUDGEMENTS, 2 * JUDGEMENTS]
    assert len(table) == 2 * JUDGEMENTS and table.annotators == ("improve_judges:longer",)
    kept = result.rounds[1]["pairs"]
    assert kept == JUDGEMENTS - result.rounds[1]["ties"]
    assert result.rounds[2]["pairs"] == kept + JUDGEMENTS - result.rounds[2]["ties"]


def test_figures_are_against_round_0(improved):
    result = improved
    first, *later = (one["figures"] for one in result.rounds)
    assert first["kl"]["value"] == 0.0 and first["wins"]["value"] is None
    assert first["reward_accuracy"]["value"] == 0.5, "equal policies tie on every pair"
    responses = [
        [one["response"] for one in json.loads(file.read_text())["records"]]
        for file in (
            Path(result.directory, f"round-{number}", "after", "responses.json")
            for number in range(ROUNDS + 1)
        )
    ]
    for figures, ours in zip(later, responses[1:], strict=True):
        won = [
            0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b)))
            for a, b in zip(ours, responses[0], strict=True)
        ]
        assert figures["wins"]["value"] == pytest.approx(np.mean(won))
        assert figures["wins"]["low"] < figures["wins"]["value"] <= figures["wins"]["high"]
        assert figures["kl"]["value"] != 0.0


def test_the_report_shows_every_round(improved):
    result = improved
    page = Path(result.report["html"]).read_text()
    assert page.count("<tr><td>0</td>") == page.count("<tr><td>2</td>") == 1
    assert "data:image/svg+xml" in page and "improve_judges:longer" in page
    report = json.loads(Path(result.report["json"]).read_text())
    assert report["rounds"] == json.loads(json.dumps(result.rounds))
    assert Path(result.report["plot"]).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_selections_go_by_the_policies_of_the_rounds_so_far(improved, config):
    records = lines(Path(improved.directory) / "round-2" / "candidates.jsonl")
    # Short prompts: how long ones are cut is not the question here.
    pairs = [{"prompt": o["prompt"][-30:], "responses": o["responses"][:2]} for o in records]
    policies = [load_model(one["policy"]) for one in improved.rounds]
    beta = 0.1
    logps = np.array(
        [
            [response_log_probs(policy, *zip(*asked, strict=True))[0] for policy in policies]
            for asked in (
                [(pair["prompt"], pair["responses"][side]) for pair in pairs] for side in (0, 1)
            )
        ]
    )
    margin = beta * ((logps[0] - logps[1])[1:] - (logps[0] - logps[1])[0])
    expected = 1 / (1 + np.exp(-margin))  # [policies of rounds 1 and 2, pairs]

    def pool(selection, number):
        settings = config(
            improved.directory, loss={"beta": beta}, feedback={"selection": selection}
        )
        improvement = Improvement(settings, settings.improve, None, Silent(), StopRequest())
        return improvement_stages._pool(improvement, improvement.round(number), pairs)

    how, found = pool("uncertain", 3)
    assert how == "uncertain"
    np.testing.assert_allclose(found.probabilities, expected[1], atol=1e-5)
    how, found = pool("disagreement", 3)
    np.testing.assert_allclose(found.committee, expected, atol=1e-5)
    assert pool("uncertain", 1)[0] == pool("disagreement", 2)[0] == "random"
    how, found = pool("diverse", 1)
    assert how == "diverse" and found.embeddings.shape == (len(pairs), 16)
    assert np.ptp(found.embeddings) > 0


@pytest.mark.slow
def test_an_improvement_that_crashes_in_every_stage_ends_as_an_undisturbed_one(
    improved, config, tmp_path
):
    whole = improved
    settings = config(tmp_path / "run")
    crashes = [
        ("Round 0: evaluation", None),
        ("Round 1: candidates", None),
        ("Round 1: selection", None),
        ("Round 1: judgements of improve_judges:longer", 3),  # verdicts
        ("Preference training", 2),  # steps
        ("Round 1: comparison with round 0", None),
        ("Round 2: selection", None),
        ("Round 2: training", None),
    ]
    stages, notes = [], []
    for title, step in crashes:
        heard = Heard(title, step)
        with pytest.raises(CrashError):
            improve(settings, ROUNDS, resume=bool(stages), progress=heard)
        stages.append(heard.stages)
        notes += heard.notes
    last = Heard()
    improve(settings, ROUNDS, resume=True, progress=last)
    stages.append(last.stages)
    for (title, _), now in zip(crashes, stages[1:], strict=True):
        again = [stage for stage in now if stage.startswith("Round")]
        if title == "Preference training":
            assert again[0] == "Round 1: training"
        else:
            # An evaluation is found done, all but the comparison that comes after it.
            assert title in again[:2], (title, again)
            assert title.replace("comparison with round 0", "evaluation") == again[0]
    same_as(whole, tmp_path / "run")
    verdicts = sum(one["comparisons"] for one in whole.rounds) + whole.rounds[-1]["judgements"]
    assert [note for note in notes if note.startswith("resumed after step")] == [
        "resumed after step 1 of 2."
    ]
    assert len(improve_judges.CALLS) == verdicts, "no pair is asked about twice"
    assert not list((tmp_path / "run").rglob("*.partial*"))


def test_a_judge_that_fails_keeps_its_verdicts_and_is_asked_for_the_rest_only(
    config, tmp_path, unmeasured
):
    settings = config(tmp_path / "run")
    improve_judges.FAIL_AT[0] = 4
    with pytest.raises(InputError, match=r"function: longer raised RuntimeError: the judge is ill"):
        improve(settings, 1)
    assert len(judged(tmp_path / "run")) == 3
    improve_judges.FAIL_AT[0] = None
    improve_judges.CALLS.clear()
    with pytest.raises(CrashError):
        improve(settings, 1, resume=True, progress=Heard("Round 1: training"))
    assert len(improve_judges.CALLS) == JUDGEMENTS - 3
    assert len(judged(tmp_path / "run")) == JUDGEMENTS


def test_people_are_waited_for(config, tmp_path, run, unmeasured):
    people = {"type": "people", "function": None}
    settings = config(tmp_path / "run", judge=people, improve={"responses": 2})
    path = tmp_path / "people.yaml"
    path.write_text(settings.resolved())
    code, out, _ = run("improve", path, "--rounds", 1)
    assert code == 0
    selected = tmp_path / "run" / "round-1" / "selected.jsonl"
    store = tmp_path / "run" / "feedback.sqlite"
    assert f"waiting: round 1 needs {PROMPTS} more judgements, of {PROMPTS}." in out
    assert f"dpo-keras annotate {selected} --store {store}" in out
    answer(store, 2)
    result = improve(settings, 1, resume=True)
    assert result.waiting["missing"] == PROMPTS - 2
    answer(store, PROMPTS - 2)
    with pytest.raises(CrashError):
        improve(settings, 1, resume=True, progress=Heard("Round 1: training"))
    assert len(lines(selected.with_name("pairs.jsonl"))) == PROMPTS - 2, (
        "skipped pairs are not owed"
    )


def answer(path, count):
    """Judge pairs as a person does on the page: all but the first by preferring the right one."""
    store = open_store(path)
    ann = store.add_annotator("ann")[0]
    for number, shown in enumerate(store.next(ann.id, count)):
        choice = "skip" if number == 0 else "right"
        store.submit(ann.id, shown.id, choice, key=f"{count}-{number}")
    store.close()


def test_more_rounds_may_be_added_but_no_key_changed(improved, config):
    result = improved
    settings = config(result.directory)
    heard = Heard("Round 3: candidates")
    with pytest.raises(CrashError):
        improve(settings, ROUNDS + 1, resume=True, progress=heard)
    assert [stage for stage in heard.stages if stage.startswith("Round")] == ["Round 3: candidates"]
    assert "rounds finished before: 0, 1, 2" in heard.notes
    with pytest.raises(InputError, match=r"improve\.judgements is 9, was 6 there"):
        improve(config(result.directory, improve={"judgements": 9}), ROUNDS, resume=True)
    with pytest.raises(InputError, match="holds a run already; go on with --resume"):
        improve(settings, ROUNDS)


def test_judgements_that_are_all_ties_end_with_what_to_do(config, tmp_path, unmeasured):
    settings = config(tmp_path / "run", judge={"function": "improve_judges:never"})
    with pytest.raises(InputError, match=r"^judge led to no pair to learn from: all 6 of round 1"):
        improve(settings, 1)
    assert len(judged(tmp_path / "run")) == JUDGEMENTS, "what was judged is kept"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"judge": None}, r"judge is required"),
        ({"improve": None}, r"improve is required"),
        ({"judge": {"function": "improve_judges:absent"}}, r"has no absent"),
        ({"data": {"held_out": 0.0}}, r"data\.held_out must be above 0"),
        ({"evaluation": {"prompts": 0}}, r"evaluation\.prompts must be >= 1"),
        ({"improve": {"reference": "moving"}}, r"improve\.reference must be moving where"),
        ({"improve": {"start": "nowhere"}}, r"improve\.start: nowhere is not the directory"),
        (
            {
                "model": {
                    "path": None,
                    "scratch": {"num_layers": 1},
                },
                "data": {"max_length": 64},
            },
            r"model\.scratch has random weights",
        ),
    ],
)
def test_what_cannot_be_improved_is_named_before_anything_is_made(
    changes, problem, config, tmp_path
):
    with pytest.raises(InputError, match=problem):
        improve(config(tmp_path / "run", **changes), 1)
    assert not (tmp_path / "run").exists()


def test_rounds_below_1_exit_with_2(config, tmp_path, run):
    path = tmp_path / "a.yaml"
    path.write_text(config(tmp_path / "run").resolved())
    code, _, err = run("improve", path, "--rounds", 0)
    assert code == 2 and "rounds must be >= 1, got 0" in err


def test_train_does_not_take_the_configuration_of_an_improvement(config, tmp_path, run):
    path = tmp_path / "a.yaml"
    path.write_text(config(tmp_path / "run").resolved())
    code, _, err = run("train", path)
    assert code == 2 and "improve is for dpo-keras improve only" in err


@pytest.mark.slow
def test_kill_9_while_the_judge_judges_and_while_the_policy_trains(improved, config, tmp_path):
    settings = config(tmp_path / "run")
    path = tmp_path / "a.yaml"
    path.write_text(settings.resolved())
    store = tmp_path / "run" / "feedback.sqlite"
    metrics = tmp_path / "run" / "round-1" / "run" / "metrics.jsonl"
    kill(path, lambda: store.exists() and verdicts(store) > 0)
    assert 0 < len(judged(store.parent)) < JUDGEMENTS
    kill(path, lambda: metrics.exists() and metrics.read_text().count("\n") >= 1)
    heard = Heard()
    improve(settings, 1, resume=True, progress=heard)
    assert next(s for s in heard.stages if s.startswith("Round")) == "Round 1: training"
    same_as(improved, tmp_path / "run", rounds=1)
    assert not list((tmp_path / "run").rglob("*.partial*"))


def verdicts(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        try:
            return connection.execute("SELECT count(*) FROM judgements").fetchone()[0]
        except sqlite3.OperationalError:  # the store is being made
            return 0


def kill(path, due):
    """Go on with an improvement in a process of its own, and end it by kill -9 once it is due."""
    arguments = ["improve", str(path), "--rounds", "1", "--resume"]
    folders = [str(ROOT), str(ROOT / "tests" / "app"), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_keras.app", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "SLOW_JUDGE": "0.3"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if due():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
