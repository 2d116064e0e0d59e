"""An option that nothing reads is a problem, for every choice; and every key is accounted for."""

import itertools

import pytest
from tiny import gpt2

from dpo_keras.app.config import Config, keys_of, parse_config
from dpo_keras.app.config_dependencies import DEPENDENCIES, OUR_SCHEDULES, unread_options
from dpo_keras.app.config_sections import REFERENCES
from dpo_keras.errors import InputError
from dpo_keras.losses import OBJECTIVES, DPOLoss
from dpo_keras.losses.options import takers_of
from dpo_keras.training import choose_layout, make_optimizer

# Keys that every run reads, or every run that has their section.
ALWAYS_READ = {
    "": {"name", "output", "seed", "model", "data", "warmup", "loss", "training", "evaluation"}
    | {"export", "judge", "improve", "feedback"},
    "model": {"path", "scratch", "dtype", "quantization", "lora_rank"},
    "model.scratch": {"family", "vocabulary_size", "num_layers", "num_heads", "hidden_dim"}
    | {"intermediate_dim", "max_sequence_length"},
    "data": {"path", "held_out", "held_out_path", "template", "max_length", "overlength", "limit"}
    | {"allow_truncated"},
    "loss": {"type", "weights", "label_smoothing", "penalties"},  # DPOLoss checks them
    "warmup": {"max_steps", "batch_size", "optimizer", "optimizer_options", "schedule"}
    | {"warmup_fraction", "weight_decay", "clip_norm"},
    "training": {"max_steps", "batch_size", "optimizer", "optimizer_options", "schedule"}
    | {"warmup_fraction", "weight_decay", "clip_norm", "gradient_accumulation", "jit_compile"}
    | {"steps_per_execution", "backend", "evaluate_every", "checkpoint_every", "log_every"}
    | {"loggers", "keep_checkpoints", "batching", "remat", "sync_reference"}
    | {"auxiliary_loss"},
    "training.mesh": {"data", "model", "fsdp"},
    "training.sync_reference": {"every", "alpha"},
    "evaluation": {"batch_size"},
    "export": {"path", "signatures"},
    "improve": {"start", "prompts", "prompts_per_round", "responses", "temperature", "judgements"}
    | {"reference", "keep_earlier_pairs", "poll_seconds"},
    "feedback": {"selection"},
    "judge": {"type"},
}
DROPOUT = {"dropout": 0.1, "max_sequence_length": 1024}


def config(**sections):
    text = {
        "model": {"path": "some_preset", "lora_rank": 4},
        "data": {"path": "pairs.jsonl"},
        **sections,
    }
    return Config.model_validate(text, context={"from": "document"})


def unread(**sections):
    return {problem.argument for problem in unread_options(config(**sections).sections())}


def test_every_key_is_always_read_or_has_a_line_in_the_table():
    conditional = {dependency.option for dependency in DEPENDENCIES}
    for section, names in keys_of(Config).items():
        for name in names:
            key = f"{section}.{name}" if section else name
            always = name in ALWAYS_READ[section]
            assert always != (key in conditional), f"{key}: say when it is read, in one of the two"


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=lambda one: f"{one.option}-{one.choice}")
def test_the_table_names_keys_that_there_are(dependency):
    sections = {"": [], **keys_of(Config)}
    for key in (dependency.option, dependency.choice):
        section, _, name = key.rpartition(".")
        assert key in sections or name in sections[section], key


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("penalties", [{}, {"kl_to_reference": 0.1}, {"nll": 0.1}])
def test_a_reference_is_an_error_exactly_where_the_objective_reads_none(name, penalties):
    smoothing = 0.1 if name == "exo_pair" else 0.0
    penalties = {penalty: w for penalty, w in penalties.items() if name in takers_of(penalty)}
    loss = {"type": name, "penalties": penalties, "label_smoothing": smoothing}
    needed = DPOLoss(name, penalties=penalties, label_smoothing=smoothing).needs_reference
    for reference in (*REFERENCES, "some_model"):
        idle = reference in ("auto", "none")
        expected = set() if needed or idle else {"reference"}
        assert unread(loss=loss, reference=reference) == expected, reference


def test_layout_options_are_errors_exactly_where_the_library_refuses_them():
    policy = gpt2(num_layers=1)
    for batching, buckets, row_length in itertools.product(
        ("auto", "packed", "buckets"), (None, 2), (None, 64)
    ):
        options = {"buckets": buckets, "row_length": row_length}
        given = {name: value for name, value in options.items() if value is not None}
        refused = set()
        try:
            choose_layout([policy], batching, note=lambda line: None, **given)
        except InputError as error:
            refused = {f"training.{problem.argument}" for problem in error.problems}
        assert unread(training={"batching": batching, **given}) == refused, (batching, given)


def test_schedule_options_are_errors_exactly_where_the_library_refuses_them():
    for schedule in (*OUR_SCHEDULES, "CosineDecay", "polynomial_decay"):
        options = {"schedule": schedule, "schedule_options": {"name": "x"}}
        refused = set()
        try:
            make_optimizer(10, **options)
        except InputError as error:
            refused = {f"training.{problem.argument}" for problem in error.problems}
        assert unread(training=options) == refused, schedule


@pytest.mark.parametrize("section", ["training", "warmup"])
def test_every_other_choice_decides_alone(section):
    for max_steps, epochs in itertools.product((None, 5), (1, 3)):
        expected = {f"{section}.epochs"} if max_steps and epochs > 1 else set()
        assert unread(**{section: {"max_steps": max_steps, "epochs": epochs}}) == expected


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"data": {"path": "x", "held_out": 0, "split_by": "group"}}, "data.split_by"),
        ({"data": {"path": "x", "held_out_path": "h", "split_by": "group"}}, "data.split_by"),
        ({"data": {"path": "x", "held_out_path": "h"}, "evaluation": {"prompts": 5}}, None),
        ({"evaluation": {"prompts": 0, "samples_shown": 2}}, None),
        ({"model": {"scratch": DROPOUT}}, "model.scratch.dropout"),
        ({"model": {"scratch": DROPOUT}, "warmup": {}}, None),
        (
            {"model": {"scratch": DROPOUT}, "warmup": {}, "training": {"remat": True}},
            "model.scratch.dropout",
        ),
        ({"model": {"path": "x", "lora_alpha": 8.0}}, "model.lora_alpha"),
        ({"model": {"path": "x", "lora_targets": "attention"}}, "model.lora_targets"),
        ({"model": {"path": "x", "lora_scaling": "rank_stabilized"}}, "model.lora_scaling"),
        ({"model": {"path": "x", "lora_rank": 4, "lora_alpha": 8.0}}, None),
        ({"data": {"path": "x", "data_dir": "d"}}, "data.data_dir"),
        ({"data": {"path": "tfds:a:train", "data_dir": "d"}}, None),
        ({"export": {"top_p": 0.5}}, "export.top_p"),
        ({"export": {"top_p": 0.5, "temperature": 1}}, None),
        ({"warmup": None, "export": None}, None),
    ],
)
def test_what_an_absent_part_of_a_run_would_read_is_an_error(sections, expected):
    assert unread(**sections) == ({expected} if expected else set())


def test_what_the_data_decide_is_asked_only_where_files_are_looked_at(tmp_path):
    text = "model: {scratch: {}}\ndata: {path: 'builtin:support', max_length: 512, format: csv}"
    parse_config(text)
    with pytest.raises(InputError, match="data.format has no effect without a file"):
        parse_config(text, outside=True)
    with pytest.raises(InputError, match="data.tokens has no effect without a directory of dpo"):
        parse_config(text, ["data.format=auto", "data.tokens=x"], outside=True)
