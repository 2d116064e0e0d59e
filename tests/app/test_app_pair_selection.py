"""Selection by the policies of runs: P and embeddings are those of the scorer; the command line."""

import json
import shutil

import numpy as np
import pytest
from app_runs import settings
from app_tiny import SIZES
from test_app_feedback_commands import start, stop, write_candidates

from dpo_keras.app import runs
from dpo_keras.app.cli import main
from dpo_keras.app.pair_selection import add_most_useful, pool_of
from dpo_keras.app.run_directory import open_run
from dpo_keras.app.run_evaluation import load_trained
from dpo_keras.errors import InputError
from dpo_keras.feedback import open_store, read_candidates
from dpo_keras.feedback.candidate_selection import single_pairs
from dpo_keras.scoring import response_log_probs

COUNT = 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, and one whose policy equals its reference."""
    folder = tmp_path_factory.mktemp("runs")
    training = {"learning_rate": 1e-2, "max_steps": 3}
    # Room for every pair: one that is cut has other log-probs than its responses alone.
    data = {"held_out": 0.0, "limit": 24, "max_length": 192}
    model = {"scratch": {**SIZES, "num_layers": 1, "max_sequence_length": 192}}
    runs.train(settings(folder / "one", training=training, data=data, model=model))
    shutil.copytree(folder / "one", folder / "two")
    shutil.rmtree(folder / "two" / "policy")
    shutil.copytree(folder / "two" / "reference", folder / "two" / "policy")
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = write_candidates(tmp_path_factory.mktemp("c") / "candidates.jsonl", COUNT)
    return single_pairs(read_candidates(path))[0]


@pytest.fixture(scope="module")
def alone(trained, pairs):
    """What `uncertain` goes by under the first run, and the places of the pairs."""
    return pool_of(pairs, "uncertain", trained[:1])


def log_probs(model, pairs, preprocessor):
    """Log-probs and lengths of both responses of each pair, `[2, N]`."""
    sides = [
        response_log_probs(
            model,
            [pair.prompt for pair in pairs],
            [pair.responses[side].text for pair in pairs],
            preprocessor=preprocessor,
        )
        for side in (0, 1)
    ]
    return np.array([logps for logps, _ in sides]), np.array([lengths for _, lengths in sides])


def test_p_is_the_softmax_of_the_implicit_rewards(trained, pairs, alone):
    pool, places = alone
    run = open_run(trained[0])
    model = load_trained(run)
    policy, reference = (
        log_probs(one, pairs, model.policy.preprocessor)[0]
        for one in (model.policy, model.reference.model)
    )
    rewards = run.config().loss.beta * (policy - reference)
    assert places == list(range(COUNT)) and np.ptp(pool.probabilities) > 1e-3
    expected = 1 / (1 + np.exp(rewards[1] - rewards[0]))
    np.testing.assert_allclose(pool.probabilities, expected, atol=1e-4)


def test_a_policy_that_equals_its_reference_goes_by_log_probs_per_token(trained, pairs):
    pool, _ = pool_of(pairs, "uncertain", trained[1:])
    policy = load_trained(open_run(trained[1])).policy
    logps, lengths = log_probs(policy, pairs, policy.preprocessor)
    means = logps / lengths
    expected = 1 / (1 + np.exp(means[1] - means[0]))
    np.testing.assert_allclose(pool.probabilities, expected, atol=1e-4)


def test_a_committee_has_a_row_for_each_policy(trained, pairs, alone):
    pool, _ = pool_of(pairs, "disagreement", trained)
    np.testing.assert_allclose(pool.committee[0], alone[0].probabilities, atol=1e-6)
    assert np.abs(pool.committee[1] - pool.committee[0]).max() > 1e-3
    np.testing.assert_allclose(pool.probabilities, pool.committee.mean(axis=0))


def test_embeddings_change_sign_with_the_order_of_a_pair(trained, pairs):
    swapped = [type(p)(p.prompt, p.responses[::-1], p.id, p.group) for p in pairs]
    one, _ = pool_of(pairs, "diverse", trained[:1])
    other, _ = pool_of(swapped, "diverse", trained[:1])
    assert one.embeddings.shape == (COUNT, 16)
    np.testing.assert_allclose(one.embeddings, -other.embeddings, atol=1e-5)


@pytest.mark.parametrize(
    ("selection", "count", "says"),
    [
        ("uncertain", 0, "policy must name at least 1 for selection 'uncertain', got 0."),
        ("disagreement", 1, "policy must name at least 2"),
        ("random", 1, "policy has no effect on selection 'random'"),
        ("likely", 1, "selection must be one of random, uncertain"),
    ],
)
def test_selections_without_the_policies_that_they_need(trained, pairs, selection, count, says):
    with pytest.raises(InputError) as caught:
        pool_of(pairs, selection, trained[:count])
    assert says in str(caught.value)


def test_annotate_adds_the_most_uncertain_pairs_once(trained, pairs, alone, tmp_path):
    write_candidates(tmp_path / "candidates.jsonl", COUNT)
    server, _ = start(tmp_path, "--policy", str(trained[0]), "--count", "3", "--overlap", "1")
    assert stop(server) == 0
    store, path = open_store(tmp_path / "feedback.sqlite"), tmp_path / "candidates.jsonl"
    again = add_most_useful(store, path, read_candidates(path), "uncertain", trained[:1], 3)
    assert again.pairs == 0
    shown = store.next(store.judge_annotator("ann"), COUNT)
    nearest = np.argsort(np.abs(alone[0].probabilities - 0.5))[:3]
    assert [one.prompt for one in shown] == [pairs[row].prompt for row in nearest]
    store.close()


def test_annotate_refuses_a_selection_before_it_makes_a_store(tmp_path, capsys):
    path = write_candidates(tmp_path / "candidates.jsonl", 2)
    command = ["annotate", str(path), "--store", str(tmp_path / "f.sqlite"), "--selection"]
    assert main([*command, "uncertian"]) == 2
    assert "did you mean 'uncertain'?" in capsys.readouterr().err
    assert main([*command, "uncertain", "--policy", str(tmp_path)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err
    assert not (tmp_path / "f.sqlite").exists()


def test_compare_prints_a_verdict_and_draws(tmp_path, capsys):
    line = {"prompt": "Hi", "responses": ["a", "b"], "versions": ["7", "8"], "choice": 1}
    log, plot = tmp_path / "served.jsonl", tmp_path / "versions.png"
    log.write_text(f"{json.dumps(line)}\n" * 20)
    assert main(["compare", str(log), "--plot", str(plot)]) == 0
    assert "8 against 7: 8 is better, decided after 8 choices." in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(log), "--plot", str(plot)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["compare", str(log), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert (found["better"], found["wins"], found["count"]) == ("8", 20, 20)
    assert main(["compare", str(log), "-v", "7", "-v", "9"]) == 2
    assert "versions must be among those compared (7, 8), got '9'" in capsys.readouterr().err
