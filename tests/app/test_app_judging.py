"""`dpo-keras feedback judge`, and the section `judge` of a configuration."""

import json
import re
import sys
from pathlib import Path

import pytest

from dpo_keras.app.cli import main
from dpo_keras.app.config_judge import JudgeSettings
from dpo_keras.app.judging import judge_settings
from dpo_keras.feedback import Candidates, Response, Settings, open_store, to_pairs
from dpo_keras.feedback.endpoint_judge import EndpointJudge
from dpo_keras.feedback.judges import Erring, judge_of
from dpo_keras.preferences import support_pairs

sys.path.append(str(Path(__file__).parents[1] / "feedback"))
from feedback_endpoint import Endpoint  # noqa: E402

ROOT = Path(__file__).parents[2]
TRUTH = "dpo_keras.preferences.quickstart_data:judge"


@pytest.fixture
def path(tmp_path):
    """A store of 20 bundled pairs."""
    store = open_store(tmp_path / "feedback.sqlite", Settings(overlap=1), create=True)
    given = [
        Candidates(p.prompt, (Response(p.chosen), Response(p.rejected))) for p in support_pairs(20)
    ]
    store.add(given)
    store.close()
    return str(tmp_path / "feedback.sqlite")


def run(capsys, *words):
    code = main(["feedback", "judge", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def exported(path):
    store = open_store(path)
    pairs = to_pairs(store).pairs
    store.close()
    return pairs


def test_a_function_judges_a_store_in_two_goes(path, capsys):
    code, out, _ = run(capsys, path, "--function", TRUTH, "--limit", 5, "--json")
    assert (code, json.loads(out)) == (0, {"judge": TRUTH, "judged": 5, "failed": []})
    code, out, _ = run(capsys, path, "--function", TRUTH)
    assert (code, out) == (0, f"{TRUTH} judged 15 pairs.\n")
    assert [p.chosen for p in exported(path)] == [p.chosen for p in support_pairs(20)]
    assert main(["feedback", "report", path, "--json"]) == 0
    (person,) = json.loads(capsys.readouterr().out)["people"]
    assert (person["name"], person["judge"], person["judged"]) == (TRUTH, True, 20)


def test_a_configuration_names_the_judge_and_overrides_win(path, tmp_path, capsys):
    file = tmp_path / "judge.yaml"
    file.write_text(f"judge:\n  type: function\n  function: {TRUTH}\n  name: truth\n")
    code, out, _ = run(capsys, path, "judge.error_rate=0.5", "--config", file)
    assert (code, out) == (0, "truth judged 20 pairs.\n")
    wrong = sum(
        p.chosen != q.chosen for p, q in zip(exported(path), support_pairs(20), strict=True)
    )
    assert 4 <= wrong <= 16


def test_an_endpoint_judges_and_says_what_it_could_not(path, capsys):
    refused = support_pairs(20)[3].prompt

    def reply(asked, turn):
        return (400, {}, "no") if asked["prompt"] == refused else '{"better": "tie"}'

    with Endpoint(reply) as endpoint:
        code, out, err = run(capsys, path, "--url", endpoint.url, "--model", "fake")
    assert (code, out) == (0, "fake judged 19 pairs; 1 could not be judged.\n")
    assert "400: no" in err


def test_an_endpoint_that_is_not_there_fails_the_run(path, capsys):
    words = ["judge.patience=0.1", "--url", "http://127.0.0.1:9/v1", "--model", "fake"]
    code, _, err = run(capsys, path, *words)
    assert code == 1 and "127.0.0.1:9/v1/chat/completions gave no answer" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "judge.type must not be people."),
        (["judge.type=oracle"], "judge.type must be one of people, function, reward or endpoint"),
        (["judge.type=function"], "judge.function is required with judge.type: function"),
        (["--function", "nowhere:f"], "judge.function must name a module that can be imported"),
        (
            ["--function", TRUTH, "--model", "m"],
            "judge.model has no effect without judge.type: end",
        ),
        (["--url", "http://x/v1"], "judge.model is required with judge.type: endpoint"),
        (
            ["--url", "http://x/v1", "--model", "m", "judge.api_key_variable=NO_SUCH_KEY"],
            "judge.api_key_variable must name an environment variable that holds the key",
        ),
        (["judge.erorr_rate=0.1"], "did you mean judge.error_rate?"),
    ],
)
def test_wrong_settings_are_errors_with_the_key(path, capsys, words, message):
    code, _, err = run(capsys, path, *words)
    assert code == 2
    assert message in " ".join(err.split())


def test_each_type_of_judge_takes_exactly_its_keys():
    assert judge_of(JudgeSettings()) is None
    function = judge_of(judge_settings(None, ["judge.type=function", f"judge.function={TRUTH}"]))
    assert function.name == TRUTH
    url = "http://127.0.0.1:9/v1"
    settings = JudgeSettings(type="endpoint", url=url, model="m", error_rate=0.1, attempts=7)
    judge = judge_of(settings)
    assert isinstance(judge, Erring) and isinstance(judge.inner, EndpointJudge)
    assert (judge.name, judge.inner.attempts) == ("m", 7)


def test_the_examples_of_the_guide_run(tmp_path, monkeypatch, capsys):
    guide = (ROOT / "dpo_keras" / "feedback" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(block, names)
    assert "shorter  judge" in capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(
        re.search(r"```yaml\n(judge:.*?)```", guide, re.DOTALL)[1]
    )
    assert judge_of(judge_settings("config.yaml")).name == "some-model"
    (tmp_path / "my_judges.py").write_text("def prefer(prompt, first, second): return 1\n")
    for line in re.findall(r"^dpo-keras (feedback judge .*--function.*)$", guide, re.MULTILINE):
        assert main(line.split()) == 0
