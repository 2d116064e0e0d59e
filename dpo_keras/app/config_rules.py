"""Rules that no single section of a configuration can state.

`SECTION_RULES` are over several sections. `OUTSIDE_RULES` look at what lies outside the text:
files, models, chat templates, and the objective, whose arguments `DPOLoss` checks itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_keras.app.config_dependencies import OUR_SCHEDULES, reads_reference
from dpo_keras.app.config_sections import REFERENCES, Data, Loss, Model, Sampling, Training, Warmup
from dpo_keras.app.keras_backend import choose_backend, chosen_backend
from dpo_keras.app.model_sources import source_problem
from dpo_keras.cluster import read_tf_config
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import Record, read_preferences
from dpo_keras.preferences.record_stream import Reading
from dpo_keras.preferences.stored_preferences import MANIFEST, is_built
from dpo_keras.preferences.tfds_source import parse_name
from dpo_keras.utils import JSON
from dpo_keras.utils.deferred_imports import missing_package
from dpo_keras.utils.text import did_you_mean, nearest

if TYPE_CHECKING:
    from dpo_keras.losses import DPOLoss

FIRST_RECORDS = 20

# Rules yield problems, or raise an `InputError` of them.
Rule = Callable[..., Iterable[InputProblem]]

# The key of a configuration that sets an argument of the library's functions.
_SAME_NAMES = {
    "loss": ("beta", "label_smoothing", "penalties"),
    "data": (
        *("columns", "data_dir", "format", "on_error", "feedback"),
        *("template", "max_length", "overlength", "min_prompt_tokens"),
    ),
    "training": (
        *("batching", "row_length", "buckets", "batch_size", "steps_per_execution"),
        "auxiliary_loss",
    ),
}
KEYS: Mapping[str, str] = {
    **{name: f"{section}.{name}" for section, names in _SAME_NAMES.items() for name in names},
    "loss_type": "loss.type",
    "loss_weights": "loss.weights",
    "fraction": "data.held_out",
    "by": "data.split_by",
    "cache": "data.tokens",
}


def with_key(
    problem: InputProblem, section: str = "", key: str = "", paths: str = "data.path"
) -> InputProblem:
    """Return a problem of the library under the name that its argument has in a configuration.

    `section` is where arguments belong that `KEYS` does not list, `key` what a problem without an
    argument is about, and `paths` the key that named the data.
    """
    name, dot, part = problem.argument.partition(".")
    if name in ("path", "source"):
        return problem.renamed(f"{paths}{dot}{part}")
    if name:
        known = KEYS.get(name, f"{section}.{name}" if section else name)
        return problem.renamed(f"{known}{dot}{part}")
    return InputProblem(key, f": {problem}") if key else problem


@contextmanager
def keys_for_arguments(
    what: str = "", section: str = "", key: str = "", paths: str = "data.path"
) -> Iterator[None]:
    """Rename the arguments in a block's errors as `with_key`; put `what` before each message."""
    try:
        yield
    except InputError as error:
        problems = [with_key(problem, section, key, paths) for problem in error.problems]
        raise InputError([p.renamed(f"{what} {p.argument}".strip()) for p in problems]) from error


def broken_rules(
    sections: Mapping[str, JSON], rules: Iterable[tuple[tuple[str, ...], Rule]] | None = None
) -> Iterator[InputProblem]:
    """Yield what breaks one of the rules whose sections are all given; None: `SECTION_RULES`."""
    for names, rule in SECTION_RULES if rules is None else rules:
        if all(name in sections for name in names):
            try:
                yield from rule(*(sections[name] for name in names))
            except InputError as error:
                yield from error.problems


def _lengths_fit(model: Model, data: Data) -> Iterator[InputProblem]:
    if model.scratch is not None and data.max_length > model.scratch.max_sequence_length:
        rule = f"must be <= model.scratch.max_sequence_length ({model.scratch.max_sequence_length})"
        yield InputProblem("data.max_length", rule, data.max_length)


def _responses_fit(
    data: Data, evaluation: Sampling, export: Sampling | None, loss: Loss
) -> Iterator[InputProblem]:
    writes = None if loss.type == ["reward"] else evaluation
    for name, sampling in (("evaluation", writes), ("export", export)):
        if sampling is not None and sampling.max_new_tokens >= data.max_length:
            rule = f"must be < data.max_length ({data.max_length}): the prompt needs room too"
            yield InputProblem(f"{name}.max_new_tokens", rule, sampling.max_new_tokens)


def _columns_are_known(data: Data) -> Iterator[InputProblem]:
    for problem in Reading(data.format, data.columns).check():
        yield with_key(InputError(problem).problems[0], key="data.columns")


def _adapters_need_lora(
    model: Model, warmup: Warmup | None, reference: str
) -> Iterator[InputProblem]:
    if reference != "adapters_off":
        return
    if model.lora_rank is None:
        rule = "can be adapters_off only with adapters; give model.lora_rank, or choose auto."
        yield InputProblem("reference", rule)
    elif warmup is not None:
        yield InputProblem(
            "reference",
            "can not be adapters_off after a warm-up with model.lora_rank: the adapters hold what "
            "the warm-up taught; choose auto (a frozen copy of the adapters), or warmup=null.",
        )


def _only_a_copy_moves(training: Training, reference: str) -> Iterator[InputProblem]:
    if training.sync_reference is not None and reference != "frozen_copy":
        rule = f"needs reference: frozen_copy, the only one that can move; got {reference}."
        yield InputProblem("training.sync_reference", rule)


def _reward_models_stay_here(loss: Loss, export: Sampling | None) -> Iterator[InputProblem]:
    if loss.type == ["reward"] and export is not None:
        rule = "must be null for loss.type: reward; a reward model is no policy to be served."
        yield InputProblem("export", rule)


SECTION_RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("data",), _columns_are_known),
    (("model", "data"), _lengths_fit),
    (("data", "evaluation", "export", "loss"), _responses_fit),
    (("model", "warmup", "reference"), _adapters_need_lora),
    (("training", "reference"), _only_a_copy_moves),
    (("loss", "export"), _reward_models_stay_here),
)


def build_loss(loss: Loss) -> DPOLoss:
    """Make the objective that a configuration names."""
    from dpo_keras.losses import DPOLoss

    return DPOLoss(**loss.arguments())


def _loss_is_accepted(loss: Loss) -> Iterator[InputProblem]:
    from dpo_keras.losses.options import OPTIONS, check_arguments

    known = [*type(loss).model_fields, *OPTIONS]
    unknown = [name for name in loss.model_extra or {} if name not in OPTIONS]
    for name in unknown:
        near = nearest(name, known)
        hint = f"did you mean loss.{near}?" if near else f"known are {', '.join(known)}."
        yield InputProblem(f"loss.{name}", f"is not a known key; {hint}")
    arguments = loss.arguments()
    for problem in check_arguments(
        arguments["loss_type"],
        loss.beta,
        loss.label_smoothing,
        penalties=list(loss.penalties.items()),
        loss_weights=loss.weights,
        reduction=None,
        options={name: v for name, v in (loss.model_extra or {}).items() if name not in unknown},
    ):
        yield with_key(problem, section="loss", key="loss")


def _loss_has_its_reference(loss: Loss, reference: str) -> Iterator[InputProblem]:
    if reference == "none" and reads_reference(loss):
        rule = f"must not be none, for loss.type {'+'.join(loss.type)} needs a reference; choose"
        rule += " auto, or a loss without one (dpo-keras losses lists them)."
        yield InputProblem("reference", rule)


def _files_exist(data: Data) -> Iterator[InputProblem]:
    for key in ("path", "held_out_path"):
        for name in getattr(data, key) or ():
            yield from _file_problems(name, f"data.{key}")


def _file_problems(name: str, key: str) -> Iterator[InputProblem]:
    if name.startswith("tfds:"):
        with keys_for_arguments(key=key, paths=key):
            parse_name(name)
    elif name.startswith("builtin:") or Path(name).is_file() or is_built(name):
        return
    elif Path(name).is_dir():
        yield InputProblem(
            key,
            f"names {name}, which is a directory and has no {MANIFEST}; give a file, or what "
            "dpo-keras data build made.",
        )
    else:
        yield InputProblem(key, f"names {name}, which does not exist; give a file.")


def _first_records_are_pairs(data: Data) -> Iterator[InputProblem]:
    """Read the beginning of each file: wrong columns and formats are found before a run begins."""
    for key in ("path", "held_out_path"):
        for name in getattr(data, key) or ():
            if Path(name).is_file():
                with keys_for_arguments(key=f"data.{key}", paths=f"data.{key}"):
                    pairs = read_preferences(
                        name,
                        limit=FIRST_RECORDS,
                        format=data.format,
                        on_error=data.on_error,
                        columns=data.columns,
                        feedback=data.feedback,
                    )
                yield from _messages_have_a_template(data, name, pairs)


def _messages_have_a_template(
    data: Data, name: str, pairs: Iterable[Record]
) -> Iterator[InputProblem]:
    texts = (text for pair in pairs for text in (pair.prompt, *pair.responses))
    if data.template is None and not all(isinstance(text, str) for text in texts):
        rule = f"is needed: {name} holds messages, which a chat template makes text of. Give the"
        yield InputProblem("data.template", f"{rule} model's own directory, or a template's name.")


def _model_exists(model: Model) -> Iterator[InputProblem]:
    if model.path is not None and (problem := source_problem(model.path)):
        yield InputProblem("model.path", problem)


def _reference_exists(reference: str) -> Iterator[InputProblem]:
    if reference not in REFERENCES and (problem := source_problem(reference)):
        hint = did_you_mean(reference, REFERENCES)
        kinds = f"must be one of {', '.join(REFERENCES)}, or a model; {hint}".strip()
        yield InputProblem("reference", f"{kinds} {problem}")


def _template_exists(data: Data) -> Iterable[InputProblem]:
    from dpo_keras.batching.chat_templates import get_template

    with keys_for_arguments(key="data.template"):
        get_template(data.template)
    return ()


def _optimizer_is_accepted(section: Warmup | Training | None, name: str) -> Iterator[InputProblem]:
    if section is None or (
        section.optimizer == "adamw"
        and not section.optimizer_options
        and section.schedule in OUR_SCHEDULES
    ):
        return  # Keras, which knows all others, takes seconds to import
    if chosen_backend() == "jax" and read_tf_config() is not None:
        return  # it has variables, and JAX must know of all processes before there are any
    from dpo_keras.training.optimizers import make_optimizer

    with keys_for_arguments(section=name):
        make_optimizer(100, **section.optimizer_arguments())
    yield from ()


def _loggers_are_installed(training: Training) -> Iterator[InputProblem]:
    for name in training.loggers:
        if problem := missing_package(name, extra=name):
            yield InputProblem("training.loggers", problem)


def _backend_is_there(training: Training) -> Iterable[InputProblem]:
    choose_backend(training.backend, training.mesh is not None)
    return ()


OUTSIDE_RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("training",), _backend_is_there),  # first: others import Keras
    (("data",), _files_exist),
    (("data",), _first_records_are_pairs),
    (("data",), _template_exists),
    (("model",), _model_exists),
    (("reference",), _reference_exists),
    (("loss",), _loss_is_accepted),
    (("loss", "reference"), _loss_has_its_reference),
    (("warmup",), lambda section: _optimizer_is_accepted(section, "warmup")),
    (("training",), lambda section: _optimizer_is_accepted(section, "training")),
    (("training",), _loggers_are_installed),
)

HIGHEST_RATE = 0.1


def config_warnings(warmup: Warmup | None, training: Training) -> Iterator[str]:
    """Yield what is allowed and most likely a mistake."""
    for name, section in (("warmup", warmup), ("training", training)):
        if section is not None and section.learning_rate > HIGHEST_RATE:
            yield (
                f"{name}.learning_rate is {section.learning_rate:g}; above {HIGHEST_RATE} a policy "
                "loses what it has learnt. Usual are 1e-7 to 1e-4, with adapters or from scratch "
                "up to 1e-3."
            )
