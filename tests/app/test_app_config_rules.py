"""What lies outside the configuration's text: objectives, files, models, templates."""

from pathlib import Path

import pytest

from dpo_keras.app.config import Config, keys_of, load_config, parse_config
from dpo_keras.app.config_rules import KEYS, build_loss, keys_for_arguments, with_key
from dpo_keras.app.config_sections import Loss
from dpo_keras.errors import InputError, InputProblem

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
    assert "c.yaml, line 5: loss.beta must be a number > 0, got -0.1." in found
    assert "c.yaml, line 7: loss.bete is not a known key; did you mean loss.beta?" in found
    for start in (
        "c.yaml, line 6: loss.gamma",
        "c.yaml, line 8: loss.weights",
        "c.yaml, line 10: loss.penalties.insufficient_confidence",
        "c.yaml, line 11: loss.penalties.nll must have a weight >= 0, got -1",
    ):
        assert any(problem.startswith(start) for problem in found), (start, found)
    assert lines == sorted(lines, key=int)


def test_an_argument_of_the_library_is_named_as_its_key():
    cases = {
        "loss_type": "loss.type",
        "penalties.nll": "loss.penalties.nll",
        "gamma": "loss.gamma",
        "by": "data.split_by",
        "row_length": "training.row_length",
    }
    for argument, key in cases.items():
        problem = with_key(InputProblem(argument, "must be > 0", -1, "Try 1."), section="loss")
        assert problem == f"{key} must be > 0, got -1. Try 1."
        assert (problem.argument, problem.value) == (key, -1)
    assert with_key(InputProblem("", "Bad."), key="data.path") == "data.path: Bad."
    assert with_key(InputProblem("", "Bad.")) == "Bad."


def test_every_key_that_arguments_are_named_by_is_one_of_the_configuration():
    sections = keys_of(Config)
    for key in KEYS.values():
        section, _, name = key.rpartition(".")
        assert name in sections[section], key


def test_all_problems_of_a_block_are_renamed_and_told_apart():
    with pytest.raises(InputError) as error, keys_for_arguments("training pairs:"):
        raise InputError([InputProblem("template", "is needed"), "Nothing is left."])
    assert error.value.problems == [
        "training pairs: data.template is needed.",
        "training pairs: Nothing is left.",
    ]


def test_problems_of_the_objective_are_placed_by_their_arguments(gpt2_preset, monkeypatch):
    def refuse(*arguments, **options):
        return [
            InputProblem("penalties.nll", "does not apply", hint="See beta and loss_type."),
            InputProblem("loss_weights", "must have one weight", 2),
            InputProblem("", "These do not go together."),
        ]

    monkeypatch.setattr("dpo_keras.losses.options.check_arguments", refuse)
    text = "loss:\n  penalties:\n    nll: 1\n  weights: [1, 2]\n  beta: 3\n"
    assert problems(gpt2_preset, text, "loss.beta=4") == [
        "c.yaml, line 3: loss: These do not go together.",
        "c.yaml, line 5: loss.penalties.nll does not apply. See beta and loss_type.",
        "c.yaml, line 6: loss.weights must have one weight, got 2.",
    ]


def test_an_unknown_objective_is_answered_with_the_nearest(gpt2_preset):
    (problem,) = problems(gpt2_preset, "loss: {type: sigmiod}")
    assert problem.startswith("c.yaml, line 3: loss.type ") and "'sigmoid'?" in problem


def test_an_objective_by_its_name_in_a_paper_is_answered_with_the_name_here(gpt2_preset):
    for given, words in (("dpo", "Did you mean 'sigmoid'?"), ("cDPO", "'sigmoid' with label_smo")):
        (problem,) = problems(gpt2_preset, f"loss: {{type: {given}}}")
        assert problem.startswith("c.yaml, line 3: loss.type must be one of") and words in problem


def test_no_message_about_the_objective_names_an_argument_that_is_no_key(gpt2_preset):
    text = "loss: {type: [sigmoid, ipo], weights: [1], gamma: 1, penalties: {nl: 1}, length: 2}"
    found = problems(gpt2_preset, text) + problems(gpt2_preset, "loss: {type: sft, weights: [1]}")
    assert len(found) == 5 and not any("loss_" in problem for problem in found)


def test_the_beginning_of_the_data_is_read_and_what_is_wrong_is_named_by_its_key(
    gpt2_preset, tmp_path
):
    columns, messages = tmp_path / "columns.jsonl", tmp_path / "messages.jsonl"
    columns.write_text('{"question": "Hello", "best": "Hi!", "worst": "No."}\n' * 3)
    turns = '[{"role": "user", "content": "Hello"}]'
    answer = '[{"role": "assistant", "content": "%s"}]'
    messages.write_text(
        f'{{"prompt": {turns}, "chosen": {answer % "Hi"}, "rejected": {answer % "No"}}}\n'
    )
    found = problems(gpt2_preset, "", f"data.path={columns}")
    assert all("data.path" in problem and "columns.jsonl" in problem for problem in found)
    assert any("column 'chosen' is missing" in problem for problem in found)
    (problem,) = problems(gpt2_preset, "", f"data.path={messages}")
    assert "data.template is needed" in problem and "messages.jsonl holds messages" in problem
    text = f"model: {{path: {gpt2_preset}}}\ndata: {{path: {messages}, template: chatml}}\n"
    assert parse_config(text, outside=True).data.template == "chatml"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("optimizer: sgdd", "training.optimizer must be one of Adadelta, "),
        ("optimizer_options: {beta2: 0.9}", "training.optimizer_options.beta2 is not an argument"),
        ("schedule: cosin", "Did you mean 'cosine'?"),
        ("schedule: ExponentialDecay", "training.schedule_options.decay_rate is needed by Expon"),
        ("loggers: [mlflow]", "pip install 'dpo-keras[mlflow]'"),
    ],
)
def test_optimizers_schedules_and_loggers_are_checked_before_a_run(gpt2_preset, line, words):
    (problem,) = problems(gpt2_preset, f"training: {{{line}}}")
    assert words in problem and problem.startswith("c.yaml, line 3: training.")


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
        "did you mean 'frozen_copy'?",
    ):
        assert any(words in problem for problem in found), (words, found)
    assert any("data.template" in problem and "'chatlm'" in problem for problem in found)


def test_nothing_outside_is_looked_at_unless_asked(tmp_path):
    parse_config("model: {path: ./nowhere}\ndata: {path: ./nowhere}\nloss: {beta: -1}")


def test_the_objective_has_the_options_of_the_section():
    loss = build_loss(Loss(type=["sigmoid", "sft"], weights=[0.8, 0.2], beta=0.3, ld_alpha=0.5))
    assert loss.beta == 0.3 and loss.needs_reference
    assert set(loss.term_names()) >= {"preference_loss"}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_that_is_shipped_is_valid(name, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "Hello", "chosen": "Hi!", "rejected": "No."}\n')
    overrides = [f"data.path={data}"] if name == "hh_harmless.yaml" else []
    config = load_config(CONFIGS / name, overrides, outside=True)
    assert config.name == Path(name).stem
    assert parse_config(config.resolved()) == config


def test_the_configuration_for_hh_says_that_its_data_come_from_the_command_line():
    with pytest.raises(InputError, match="data.path is required.*on the command line data.path="):
        load_config(CONFIGS / "hh_harmless.yaml")
