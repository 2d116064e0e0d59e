"""Runs with `loss.type: reward`: trained, reloaded, refused as policies, asked as judges."""

import math

import pytest
from app_runs import settings

from dpo_keras.app import runs
from dpo_keras.app.reward_judge import RewardJudge
from dpo_keras.app.run_directory import RunDirectory
from dpo_keras.app.run_evaluation import load_trained
from dpo_keras.errors import InputError
from dpo_keras.feedback.judges import Comparison

REWARD = {"loss": {"type": "reward"}, "evaluation": None}


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("reward") / "run"
    config = settings(output, **REWARD, warmup=None, training={"max_steps": 4})
    return config, runs.train(config)


def test_a_reloaded_reward_model_measures_what_the_run_did(reward_run):
    config, result = reward_run
    again = runs.evaluate(config.output, "builtin:support", limit=50)
    assert result.before["metrics"]["loss"] != result.after["metrics"]["loss"]
    assert result.after["metrics"].keys().isdisjoint({"chosen_logps", "entropy"})
    model = load_trained(RunDirectory(config.output))
    assert again["pairs"] == 50
    assert model.preference_loss.loss_type == "reward"


def test_a_judge_prefers_by_the_sigmoid_of_the_difference(reward_run):
    config, _ = reward_run
    judge = RewardJudge(config.output)
    texts = ["It is red.", "Stop wasting my time.", "It costs 40 euros."]
    prompts = ["The lamp is red. What colour is it?"] * 3
    rewards = judge.model.rewards(prompts, texts)
    asked = [Comparison(prompts[0], texts[a], texts[b]) for a, b in ((0, 1), (1, 0), (2, 0))]
    found = dict(judge.judge(asked))
    for place, (a, b) in enumerate(((0, 1), (1, 0), (2, 0))):
        expected = 1 / (1 + math.exp(rewards[b] - rewards[a]))
        assert found[place].preference == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_is_no_policy(reward_run, run, tmp_path):
    config, _ = reward_run
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What colour is it?\n")
    for command in (
        ["generate", config.output, prompts],
        ["export", config.output, tmp_path / "x"],
    ):
        code, _, err = run(*command)
        assert code == 2
        assert "must be the run of a policy; it has trained a reward model" in err


def test_a_policy_is_no_reward_model(tmp_path, gpt2):
    output = tmp_path / "run"
    config = settings(output, warmup=None, training={"max_steps": 1}, data={"held_out": 0.0})
    runs.train(config)
    with pytest.raises(InputError, match=r"judge.path must be a run of a reward model"):
        RewardJudge(output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"type": "reward", "beta": 0.5}}, "loss.beta has no effect without"),
        ({**REWARD, "evaluation": {"prompts": 3}}, "evaluation.prompts has no effect without"),
        (
            {**REWARD, "export": {"max_new_tokens": 8}},
            "export must be null for loss.type: reward",
        ),
    ],
)
def test_what_a_reward_model_cannot_have_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path / "run", **changes)
