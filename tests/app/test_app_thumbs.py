"""A run on thumbs, from the recipe to its report, and what it refuses."""

import json
from pathlib import Path

import pytest
from app_runs import settings

from dpo_keras.app import runs
from dpo_keras.app.config import load_config
from dpo_keras.errors import InputError

THUMBS = "builtin:support-thumbs:0.1"
RECIPE = Path(__file__).parents[2] / "configs" / "thumbs.yaml"
SMALL = [
    *("data.limit=60", "data.held_out=0.2", "warmup.epochs=1", "training.epochs=1"),
    *("evaluation.prompts=3", "model.scratch.num_layers=1", "model.scratch.hidden_dim=16"),
    *("model.scratch.intermediate_dim=16", "export=null"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("thumbs") / "run"
    config = load_config(RECIPE, [f"output={output}", *SMALL], outside=True)
    return runs.train(config)


def test_the_recipe_trains_measures_and_reports(trained):
    assert trained.pairs["train"] + trained.pairs["held_out"] == 60
    assert trained.before["metrics"]["preference_loss"] == pytest.approx(0.5, abs=1e-5)
    assert trained.before["metrics"]["reward_accuracy"] == 0.5
    assert trained.after["metrics"]["reward_margin"] is not None
    assert "chosen_reward" not in trained.after["figures"]
    assert trained.after["responses"]["preferred"]["count"] == 3
    report = Path(trained.report["markdown"]).read_text()
    assert "Held-out responses" in report and "Reference point" in report
    assert "Calibration" not in report and "by length" not in report and "rated " in report
    assert "Held-out responses" in Path(trained.report["html"]).read_text()
    logged = (Path(trained.directory) / "metrics.jsonl").read_text().splitlines()
    assert {"desirable_reward", "reference_point", "reward_margin"} <= json.loads(logged[0]).keys()


def test_a_finished_run_is_evaluated_on_other_thumbs(trained, tmp_path, run):
    lines = [
        {"prompt": "The box is red.", "completion": text, "label": good}
        for text, good in ((" It is red.", True), (" Go away.", False))
    ]
    lines += [{**line, "prompt": "The bag is blue."} for line in lines]
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = run("evaluate", trained.directory, path, "--json")
    assert code == 0 and json.loads(out)["pairs"] == 4
    pair = {"prompt": "The box is red.", "chosen": "a", "rejected": "b"}
    path.write_text(json.dumps(pair) + "\n")
    code, _, err = run("evaluate", trained.directory, path)
    assert code == 2 and "takes rated responses" in err


def test_pairs_train_kto_once_they_are_unpaired(tmp_path):
    config = settings(tmp_path / "run", loss={"type": "kto"}, data={"unpair": True}, warmup=None)
    assert runs.train(config).pairs["train"] == 80


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {"type": "kto"}}, "kto takes rated responses .* Set data.unpair: true"),
        ({"data": {"path": THUMBS}}, "sigmoid takes pairs, and the data are rated responses"),
        (
            {"loss": {"type": "kto"}, "data": {"path": THUMBS, "unpair": True}},
            "data.unpair has no effect: the data are rated responses already",
        ),
    ],
)
def test_data_of_the_other_kind_are_refused_with_the_way_out(changes, words, tmp_path):
    with pytest.raises(InputError, match=words):
        runs.train(settings(tmp_path / "run", **changes))


def test_unpair_has_no_effect_without_an_objective_on_rated_responses():
    with pytest.raises(InputError, match=r"data.unpair has no effect without .* \(kto\), got True"):
        load_config(RECIPE, ["loss.type=sigmoid", "data.path=builtin:support", "data.unpair=true"])


def test_inspect_shows_thumbs_and_asks_about_a_log_of_both(tmp_path, run):
    code, out, _ = run("data", "inspect", THUMBS, "--limit", "100", "--json")
    assert code == 0
    found = json.loads(out)["audit"]
    assert found["desirable"] + found["undesirable"] == found["responses"] == 100
    code, out, _ = run("data", "inspect", THUMBS, "--limit", "100")
    assert code == 0 and "Rated responses" in out and "undesirable" in out
    log = tmp_path / "log.jsonl"
    line = {"prompt": "q", "responses": ["a", "b"], "choice": 0, "thumbs": [True, False]}
    log.write_text(json.dumps(line) + "\n")
    code, _, err = run("data", "inspect", log)
    assert code == 2 and "--feedback" in err
    code, out, _ = run("data", "inspect", log, "--feedback", "thumbs", "--json")
    assert code == 0 and json.loads(out)["audit"]["responses"] == 2
