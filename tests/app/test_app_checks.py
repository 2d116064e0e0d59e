"""What lies outside the configuration's text: objectives, files, models, templates."""

from pathlib import Path

import pytest

from dpo_keras.app.config import load_config, parse_config
from dpo_keras.app.config_rules import build_loss
from dpo_keras.app.config_sections import Loss
from dpo_keras.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"


def problems(gpt2_preset, extra, *overrides):
    text = f"model: {{path: {gpt2_preset}}}\ndata: {{path: 'builtin:support'}}\n{extra}"
    with pytest.raises(InputError) as error:
        parse_config(text, overrides, source="c.yaml", outside=True)
    return error.value.problems


def test_every_fault_of_the_objective_is_on_its_own_line(gpt2_preset):
    text = (
        "loss:\n"
        "  type: ipo\n"
        "  beta: -0.1\n"
        "  gamma: 0.5\n"
        "  bete: 3\n"
        "  weights: [1.0]\n"
        "  penalties:\n"
        "    insufficient_confidence: 0.1\n"
        "    nll: -1\n"
    )
    found = problems(gpt2_preset, text)
    lines = [problem.split(":")[0].removeprefix("c.yaml, line ") for problem in found]
    assert "c.yaml, line 5: loss.beta: beta must be a number > 0, got -0.1." in found
    assert "c.yaml, line 7: loss.bete is not a known key; did you mean loss.beta?" in found
    assert any("loss.gamma" in p and "has no effect with loss.type ipo" in p for p in found)
    assert any("does not apply to loss.type ipo" in p for p in found if "line 10" in p)
    assert any("must be >= 0, got -1" in p for p in found if "line 11" in p)
    assert lines == sorted(lines, key=int)


def test_an_unknown_objective_is_answered_with_the_nearest(gpt2_preset):
    (problem,) = problems(gpt2_preset, "loss: {type: sigmiod}")
    assert problem.startswith("c.yaml, line 3: loss.type:") and "'sigmoid'?" in problem


def test_a_loss_that_compares_needs_a_reference_and_others_do_not(gpt2_preset):
    (problem,) = problems(gpt2_preset, "reference: none")
    assert "loss.type sigmoid needs a reference" in problem
    text = f"model: {{path: {gpt2_preset}}}\ndata: {{path: 'builtin:support'}}\n"
    parse_config(text + "reference: none\nloss: {type: simpo, beta: 2}", outside=True)


def test_missing_files_models_and_templates_are_reported_together(gpt2_preset, tmp_path):
    found = problems(
        gpt2_preset,
        "reference: frozencopy\n",
        f"data.path=[nowhere.jsonl, {tmp_path}]",
        "model.path=./nowhere",
        "data.template=chatlm",
    )
    assert len(found) == 5
    for words in (
        "data.path names nowhere.jsonl, which does not exist",
        "which is a directory",
        "model.path ./nowhere does not exist",
        "data.template: template 'chatlm'",
        "did you mean 'frozen_copy'?",
    ):
        assert any(words in problem for problem in found), (words, found)


def test_nothing_outside_is_looked_at_unless_asked(tmp_path):
    parse_config("model: {path: ./nowhere}\ndata: {path: ./nowhere}\nloss: {beta: -1}")


def test_the_objective_has_the_options_of_the_section():
    loss = build_loss(Loss(type=["sigmoid", "sft"], weights=[0.8, 0.2], beta=0.3, ld_alpha=0.5))
    assert loss.beta == 0.3 and loss.needs_reference
    assert set(loss.term_names()) >= {"preference_loss"}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_that_is_shipped_is_valid(name, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("")
    overrides = [f"data.path={data}"] if name == "hh_harmless.yaml" else []
    config = load_config(CONFIGS / name, overrides, outside=True)
    assert config.name == Path(name).stem
    assert parse_config(config.resolved()) == config


def test_the_configuration_for_hh_says_that_its_data_come_from_the_command_line():
    with pytest.raises(InputError, match="data.path is required.*on the command line data.path="):
        load_config(CONFIGS / "hh_harmless.yaml")
