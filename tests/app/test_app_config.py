"""The configuration: types decide, defaults are filled, every problem is reported at once."""

import pytest

from dpo_keras.app.config import Config, load_config, parse_config
from dpo_keras.errors import InputError

MINIMAL = "model: {path: some_preset}\ndata: {path: pairs.jsonl}\n"


def problems(text, *overrides):
    with pytest.raises(InputError) as error:
        parse_config(text, overrides, source="c.yaml")
    return error.value.problems


def test_a_minimal_configuration_gets_every_default():
    config = parse_config(MINIMAL)
    assert config.output == "runs/run"
    assert config.data.held_out == 0.1
    assert config.loss.type == ["sigmoid"] and config.loss.beta == 0.1
    assert config.warmup is None and config.export is None
    assert config.training.keep_checkpoints == 2


def test_the_types_of_the_configuration_decide_not_yaml():
    config = parse_config(
        MINIMAL
        + "name: on\nseed: 0x10\n" * 0
        + "name: on\ntraining: {learning_rate: 1e-4, jit_compile: on, clip_norm: ~}\n"
    )
    assert config.name == "on"
    assert config.training.learning_rate == 1e-4
    assert config.training.jit_compile is True
    assert config.training.clip_norm is None


def test_options_of_the_objective_are_kept_with_guessed_types():
    config = parse_config(
        MINIMAL + "loss: {type: ipo, length_normalize: false, group_robust: {groups: 4, eta: 1e-2}}"
    )
    arguments = config.loss.arguments()
    assert arguments["loss_type"] == "ipo"
    assert arguments["length_normalize"] is False
    assert arguments["group_robust"] == {"groups": 4, "eta": 0.01}


def test_several_objectives_and_files_are_lists_and_one_may_stand_alone():
    config = parse_config(
        MINIMAL, ["data.path=[a, b]", "loss={type: [sigmoid, sft], weights: [1, 2]}"]
    )
    assert config.data.path == ["a", "b"]
    assert config.loss.arguments()["loss_type"] == ["sigmoid", "sft"]
    assert config.loss.arguments()["loss_weights"] == [1.0, 2.0]


def test_resolved_reads_back_as_the_same_configuration():
    text = (
        "name: 'null'\nmodel: {scratch: {family: llama}, dtype: mixed_bfloat16, lora_rank: 4}\n"
        "data: {path: [é.jsonl, 'on'], max_length: 100, held_out_path: h.csv}\nwarmup: {}\n"
        "loss: {type: [sigmoid, sft], weights: [1, 1e-3], penalties: {nll: 1e-9}, ld_alpha: 0.5}\n"
        "training: {jit_compile: off, learning_rate: 1e-12}\nexport: {path: x/1}\nseed: 7\n"
    )
    config = parse_config(text)
    assert parse_config(config.resolved()) == config
    assert "keep_checkpoints: 2" in config.resolved()


def test_all_problems_come_together_each_with_its_line_in_order():
    text = (
        "model:\n"
        "  path: x\n"
        "  scratch: {hidden_dim: 30, num_heads: 4}\n"
        "data:\n"
        "  held_out: 1.0\n"
        "training:\n"
        "  epoch: 3\n"
        "  batch_size: many\n"
        "  learning_rate: -1e-4\n"
        "  strategy: miror\n"
        "loss: {penalties: [nll]}\n"
        "export: yes\n"
    )
    assert problems(text, "seed=-1", "training.epochs=1.5") == [
        "c.yaml, line 3: model.scratch.hidden_dim must be a multiple of num_heads (4), got 30.",
        "c.yaml, line 5: data.held_out must be < 1, got 1.0.",
        "c.yaml, line 7: training.epoch is not a known key; did you mean training.epochs?",
        "c.yaml, line 8: training.batch_size must be a whole number, got many.",
        "c.yaml, line 9: training.learning_rate must be > 0, got -1e-4.",
        "c.yaml, line 10: training.strategy must be one of auto, one_device, mirrored, "
        "multi_worker or tpu, got miror; did you mean 'mirrored'?",
        "c.yaml, line 11: loss.penalties must be a mapping, such as {name: 0.1}, got ['nll'].",
        "c.yaml, line 12: export must be a section: keys with values, got yes.",
        "override 'seed=-1': seed must be >= 0, got -1.",
        "override 'training.epochs=1.5': training.epochs must be a whole number, got 1.5.",
    ]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("trainning: {}", "trainning is not a known key; did you mean training?"),
        ("beta: 0.2", "beta is not a known key; did you mean loss.beta?"),
        ("training: {beta: 0.2}", "training.beta is not a known key; did you mean loss.beta?"),
        (
            "training: {lr: 1}",
            "training.lr is not a known key; did you mean training.learning_rate?",
        ),
        (
            "lr: 1",
            "lr is not a known key; did you mean warmup.learning_rate or training.learning_rate?",
        ),
        ("num_train_epochs: 3", "did you mean warmup.epochs or training.epochs?"),
        ("training: {max_grad_norm: 1}", "did you mean training.clip_norm?"),
        ("training: {zzz: 1}", "training.zzz is not a known key; the keys here are epochs,"),
        ("evaluation: {promts: 1}", "did you mean evaluation.prompts?"),
        ("model: {scratch: {layers: 2}}", "did you mean model.scratch.num_layers?"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_right_one(line, hint):
    assert any(
        hint in problem for problem in problems(MINIMAL.replace("model:", "warmup: {}\nx:") + line)
    )


def test_rules_over_sections_are_reported_beside_faults_of_other_sections():
    text = (
        "model: {scratch: {max_sequence_length: 64}}\n"
        "data: {path: x, max_length: 65}\n"
        "evaluation: {max_new_tokens: 65}\n"
        "reference: adapters_off\n"
        "training: {epochs: 0}\n"
    )
    found = problems(text)
    assert [problem.split(": ")[1].split()[0] for problem in found] == [
        "data.max_length",
        "evaluation.max_new_tokens",
        "reference",
        "training.epochs",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {path: x}", "model must have path"),
        ("model: {path: x}", "data.path is required"),
        ("model: {path: x, scratch: {}}\ndata: {path: x}", "not both"),
        (MINIMAL + "data.x: 1", "data.x is not a known key"),
        ("model: {path: x}\ndata: {path: x, held_out: 0.1, held_out_path: y}", "held_out_path"),
        (
            "model: {path: x}\ndata: {path: x, max_length: 64, min_prompt_tokens: 63}",
            "data.min_prompt_tokens must be <= 62",
        ),
        (
            "model: {path: x}\ndata: {path: x, overlength: drop, min_prompt_tokens: 9}",
            "data.min_prompt_tokens has no effect without data.overlength: truncate",
        ),
        ("model: {path: x}\ndata: {path: []}", "data.path must have at least 1"),
        (MINIMAL + "name: a/b", "name"),
        (MINIMAL + "reference:", "reference must be text, got nothing"),
    ],
)
def test_rules_over_several_keys(text, words):
    assert any(words in problem for problem in problems(text))


def test_a_section_left_empty_takes_its_defaults():
    config = parse_config(MINIMAL + "training:\nevaluation:\nloss:\nwarmup:\n")
    assert config.training.epochs == 1 and config.warmup is None


def test_held_out_zero_is_a_choice_and_a_path_replaces_the_share():
    assert parse_config(MINIMAL, ["data.held_out=0"]).data.held_out == 0
    assert parse_config(MINIMAL, ["data.held_out_path=h"]).data.held_out is None


def test_two_configurations_differ_in_named_keys_wherever_their_output_lies():
    one = parse_config(MINIMAL)
    other = parse_config(MINIMAL, ["loss.beta=0.2", "output=elsewhere", "warmup={}"])
    differences = one.differences(other)
    assert "loss.beta is 0.1, was 0.2" in differences
    assert not any("output" in difference for difference in differences)
    assert any(difference.startswith("warmup") for difference in differences)
    assert one.differences(one) == []


def test_a_file_names_its_run_and_says_where_it_can_not_be_read(tmp_path):
    path = tmp_path / "my run.yaml"
    path.write_text(MINIMAL)
    assert load_config(path).name == "my-run"
    assert load_config(path, ["name=b"]).output == "runs/b"
    for name, content in [("missing.yaml", None), ("latin.yaml", b"name: \xe9")]:
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            load_config(tmp_path / name)
    with pytest.raises(InputError, match="directory"):
        load_config(tmp_path)


def test_python_users_build_the_same_configuration_from_keywords():
    config = Config(model={"path": "some_preset"}, data={"path": "pairs.jsonl"})
    assert config == parse_config(MINIMAL)
    with pytest.raises(ValueError, match="greater than 0"):
        Config(model={"path": "x"}, data={"path": "x"}, training={"learning_rate": 0})


def test_only_a_frozen_copy_can_follow_the_policy():
    text = MINIMAL + "reference: auto\ntraining: {sync_reference: {every: 8, alpha: 2}}\n"
    assert any("training.sync_reference.alpha" in problem for problem in problems(text))
    (problem,) = problems(MINIMAL + "training: {sync_reference: {every: 8}}\n")
    assert "needs reference: frozen_copy" in problem
    config = parse_config(
        MINIMAL + "reference: frozen_copy\ntraining: {sync_reference: {every: 8}}\n"
    )
    assert config.training.sync_reference.alpha == 0.6


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("loss: {type: orpo}\nreference: cached", "reference has no effect without a loss that"),
        ("training: {batching: packed, buckets: 2}", "training.buckets has no effect without "),
        ("training: {batching: buckets, row_length: 64}", "training.row_length has no effect"),
        ("training: {max_steps: 9, epochs: 2}", "training.epochs has no effect without training."),
        ("training: {strategy: mirrored, worker_timeout: 9}", "without training.strategy: auto or"),
        ("training: {backend: jax, strategy: mirrored}", "training.strategy has no effect"),
        ("training: {backend: tensorflow, mesh: {data: 2}}", "training.mesh has no effect without"),
        (
            "evaluation: {temperature: 0, top_p: 0.9}",
            "evaluation.top_p has no effect without",
        ),
        ("export: {signatures: [score], max_new_tokens: 9}", "without generate among export.sign"),
    ],
)
def test_an_option_that_nothing_reads_is_an_error_that_says_what_would_read_it(line, words):
    (problem,) = problems(MINIMAL + line)
    assert words in problem and "Leave it out, or set it to " in problem
    with pytest.raises(ValueError, match="has no effect"):  # from Python as well
        Config(**parse_config(MINIMAL + line, stored=True).model_dump(mode="json"))


def test_a_name_that_cannot_be_one_is_explained_in_words():
    (problem,) = problems(MINIMAL + "name: 'my run!'")
    assert problem == (
        "c.yaml, line 3: name must be letters, digits, '.', '_' and '-', the first a letter or a "
        "digit, got my run!."
    )


def test_numbers_that_no_computer_holds_are_refused():
    huge = "1" * 400
    for line, words in (
        (f"training: {{epochs: {huge}}}", "training.epochs must be < 2147483648, got 1111"),
        (f"training: {{learning_rate: {huge}}}", "training.learning_rate must be a finite number"),
        (f"seed: {'1' * 5000}", "seed must be a whole number"),
    ):
        (problem,) = problems(MINIMAL + line)
        assert words in problem and len(problem) < 200


def test_a_stored_configuration_of_an_earlier_version_still_reads():
    text = MINIMAL + "loss: {type: orpo}\nreference: cached\n"
    assert parse_config(text, stored=True).reference == "cached"


def test_a_rate_that_destroys_the_policy_is_warned_about():
    config = parse_config(MINIMAL, ["training.learning_rate=1e10"])
    (warning,) = config.warnings()
    assert "training.learning_rate is 1e+10" in warning and "Usual are" in warning
    assert parse_config(MINIMAL, ["training.learning_rate=1e-2"]).warnings() == []
