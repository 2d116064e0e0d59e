"""A run on rankings, from the recipe to its report; as pairs; stopped and resumed; refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from app_runs import settings, steps_of
from tiny import Letters

from dpo_keras.app import runs
from dpo_keras.app.config import load_config
from dpo_keras.app.console import Silent
from dpo_keras.app.models import load_model
from dpo_keras.app.run_inputs import compared, read_sides
from dpo_keras.app.run_work import _bucketed_work
from dpo_keras.batching import tokenize_pairs
from dpo_keras.cluster import RunStopped, StopRequest
from dpo_keras.errors import InputError
from dpo_keras.preferences import RankedResponses
from dpo_keras.training import Layout

RECIPE = Path(__file__).parents[2] / "configs" / "rankings.yaml"
SMALL = [
    *("data.limit=30", "data.held_out=0.2", "warmup.epochs=1", "training.epochs=2"),
    *("training.batch_size=8", "training.checkpoint_every=2", "evaluation.prompts=3"),
    *("model.scratch.num_layers=1", "model.scratch.hidden_dim=16"),
    *("model.scratch.intermediate_dim=16", "export=null"),
]


def recipe(output, *changes):
    return load_config(RECIPE, [f"output={output}", *SMALL, *changes], outside=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return runs.train(recipe(tmp_path_factory.mktemp("rankings") / "run"))


def test_the_recipe_trains_on_whole_rankings_and_measures_their_pairs(trained):
    rankings, pairs = trained.pairs["train"], trained.pairs["held_out"]
    assert rankings + pairs / 6 == 30
    first = steps_of(trained.directory)[0]
    assert first["preference_loss"] == pytest.approx(np.log(24), abs=1e-4)  # 4! equal orders
    assert trained.before["metrics"]["preference_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert trained.before["metrics"]["reward_accuracy"] == 0.5
    assert trained.after["responses"]["preferred"]["count"] == 3


class Stops(Silent):
    """Asks a run to stop after some step of preference training."""

    def __init__(self, stop, after):
        self.stop, self.after, self.title, self.notes = stop, after, "", []

    def stage(self, title):
        self.title = title

    def note(self, text):
        self.notes.append(text)

    def advance(self, done, total=None, **figures):
        if self.title == "Preference training" and done == self.after:
            self.stop.request("test")


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_weights_of_an_undisturbed_one(trained, tmp_path):
    config, stop = recipe(tmp_path / "run"), StopRequest()
    with pytest.raises(RunStopped):
        runs.train(config, progress=Stops(stop, 3), stop=stop)
    heard = Stops(stop, None)
    resumed = runs.train(config, resume=True, progress=heard)
    assert f"resumed after step 3 of {trained.steps}." in heard.notes
    assert resumed.steps == trained.steps > 3
    policies = (load_model(run.directory + "/policy") for run in (trained, resumed))
    for one, other in zip(*(policy.weights for policy in policies), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_the_work_of_buckets_is_counted_with_all_responses():
    rankings = [
        RankedResponses("ask", ("best", "good one", "bad"), (1, 2, 3)),
        RankedResponses("why so", ("no", "yes"), (2, 1)),
    ]
    tokenized = tokenize_pairs(rankings, Letters(), max_length=32)
    layout = Layout(buckets=1)
    work = _bucketed_work(layout, tokenized, 2, seed=0, steps=1, alone=False)
    (batch,) = layout.dataset(tokenized, 2)
    assert work.places == batch["token_ids"].numpy().size
    assert work.epoch_tokens == work.tokens_of(0, 1) == batch["padding_mask"].numpy().sum()


@pytest.mark.parametrize(("expansion", "each"), [("all_pairs", 6), ("best_against_rest", 3)])
def test_an_objective_of_pairs_takes_the_pairs_that_are_asked_for(tmp_path, expansion, each):
    config = recipe(tmp_path / "run", "loss.type=sigmoid", f"data.rankings={expansion}")
    train, held_out, _ = read_sides(config, Silent())
    prompts = len({pair.prompt for pair in train})
    assert len(train) == each * prompts
    assert sum(pair.weight for pair in train) == pytest.approx(prompts)
    assert len(held_out) == 6 * (30 - prompts)


def test_pairs_under_plackett_luce_are_left_as_they_are(tmp_path):
    config = settings(tmp_path / "run", loss={"type": ["plackett_luce"]})
    train, _, _ = read_sides(config, Silent())
    assert compared(train, config) is train


def test_ties_are_refused_with_what_to_do(tmp_path, run):
    path = tmp_path / "tied.jsonl"
    lines = [
        {"prompt": f"Say {word}.", "responses": ["a", "b", "c"], "scores": [2, 1, 1]}
        for word in ("this", "that", "it")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="rankings without ties.*another loss.type"):
        runs.train(recipe(tmp_path / "run", f"data.path={path}", "data.held_out=0"))


def test_the_command_line_inspects_and_plans_rankings(tmp_path, run):
    code, out, _ = run("data", "inspect", "builtin:support-rankings", "--limit", 10, "--json")
    found = json.loads(out)
    assert code == 0 and found["report"]["kept"] == 10 and found["audit"]["pairs"] == 60
    code, _, err = run("validate", RECIPE, "data.rankings=best_against_rest")
    assert code == 2 and "data.rankings has no effect without an objective of pairs" in err
