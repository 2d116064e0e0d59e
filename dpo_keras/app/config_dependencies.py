"""Which options a choice reads: one table, from which an option without effect is found.

Most keys are always read. Every other key has a line in `DEPENDENCIES`: what decides whether it is
read, and how that is said. A key set to other than its default that nothing reads is a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from dpo_keras.app.config_judge import JUDGE_KEYS
from dpo_keras.app.config_sections import REFERENCES, Data, Loss
from dpo_keras.errors import InputProblem
from dpo_keras.preferences.stored_preferences import is_built
from dpo_keras.utils import JSON

_MISSING = object()
OUR_SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Dependency:
    """An option that is read under a condition.

    Args:
        option: the key.
        choice: the key, or the section, that decides.
        reads: whether the option is read, by the value of the choice.
        needed: what the choice must be, in words that follow "has no effect without".
        idle: values of the option that ask for nothing, beside its default.
        outside: whether `reads` looks at files.
    """

    option: str
    choice: str
    reads: Callable[[JSON], bool]
    needed: str
    idle: tuple[JSON, ...] = ()
    outside: bool = False


def reads_reference(loss: Loss) -> bool | None:
    """Tell whether an objective compares with a reference; None where its names are unknown."""
    from dpo_keras.losses.options import OBJECTIVES, outputs_read
    from dpo_keras.losses.penalties import PENALTIES

    if not {*loss.type} <= OBJECTIVES.keys() or not loss.penalties.keys() <= PENALTIES.keys():
        return None
    objectives = [OBJECTIVES[name] for name in loss.type]
    return "reference" in outputs_read(objectives, loss.penalties, loss.model_extra)


def _takes_rated(loss: Loss) -> bool:
    """Tell whether an objective may take rated responses; unknown names are reported elsewhere."""
    from dpo_keras.losses.options import OBJECTIVES

    return any(name not in OBJECTIVES or OBJECTIVES[name].unpaired for name in loss.type)


def _paths(data: Data) -> list[str]:
    return [*(data.path or ()), *(data.held_out_path or ())]


def _have_records(data: Data) -> bool:
    """Tell whether any of the data are read record by record: neither built nor built in."""
    return any(not name.startswith("builtin:") and not is_built(name) for name in _paths(data))


def _are_files(data: Data) -> bool:
    """Tell whether any of the data are files, whose format is a question."""
    return any(
        not name.startswith(("tfds:", "builtin:")) and not is_built(name) for name in _paths(data)
    )


def _are_built(data: Data) -> bool:
    return any(map(is_built, _paths(data)))


def _are_tfds(data: Data) -> bool:
    return any(name.startswith("tfds:") for name in _paths(data))


def _one_of(*values: JSON) -> Callable[[JSON], bool]:
    return lambda value: value in values


def _is_null(value: JSON) -> bool:
    return value is None


def _is_above_0(value: JSON) -> bool:
    return bool(value > 0)


def _generates(signatures: list[str]) -> bool:
    return "generate" in signatures


def _are_of_policies(types: list[str]) -> bool:
    return types != ["reward"]


POLICIES = "an objective of policies (loss.type)"


def _is_no_person(judge: str) -> bool:
    return judge != "people"


GENERATE = "generate among export.signatures"
RECORDS = "data that are neither built in nor built by dpo-keras data build"
BUILT = "a directory of dpo-keras data build in data.path"
WARMUP = "a warmup section; preference training runs without dropout"

DEPENDENCIES: tuple[Dependency, ...] = (
    Dependency("model.scratch.dropout", "warmup", lambda warmup: warmup is not None, WARMUP),
    Dependency("model.scratch.dropout", "training.remat", _one_of(False), "training.remat: false"),
    *(
        Dependency(f"model.{name}", "model.lora_rank", bool, "adapters (model.lora_rank)")
        for name in ("lora_alpha", "lora_targets", "lora_scaling")
    ),
    Dependency("data.format", "data", _are_files, "a file in data.path", outside=True),
    Dependency("data.columns", "data", _have_records, RECORDS, outside=True),
    Dependency("data.on_error", "data", _have_records, RECORDS, outside=True),
    Dependency("data.feedback", "data", _have_records, RECORDS, outside=True),
    Dependency("data.unpair", "loss", _takes_rated, "an objective on rated responses (kto)"),
    Dependency("data.data_dir", "data", _are_tfds, "a tfds: name in data.path"),
    Dependency("data.tokens", "data", _are_built, BUILT, outside=True),
    Dependency(
        "data.min_prompt_tokens",
        "data.overlength",
        _one_of("truncate"),
        "data.overlength: truncate",
    ),
    Dependency("data.split_by", "data.held_out", bool, "a split (data.held_out above 0)"),
    Dependency(
        "reference",
        "loss",
        lambda loss: reads_reference(loss) is not False,
        "a loss that compares with a reference (dpo-keras losses lists them)",
        idle=("none",),
    ),
    Dependency(
        "data.rankings",
        "loss.type",
        lambda types: types != ["plackett_luce"],
        "an objective of pairs (loss.type); plackett_luce takes rankings as a whole",
    ),
    Dependency("loss.beta", "loss.type", _are_of_policies, POLICIES),
    *(
        Dependency(f"evaluation.{name}", "loss.type", _are_of_policies, POLICIES, idle=(0,))
        for name in ("prompts", "max_new_tokens", "temperature", "top_p", "samples_shown")
    ),
    Dependency(
        "training.buckets",
        "training.batching",
        _one_of("auto", "buckets"),
        "training.batching: auto or buckets",
    ),
    Dependency(
        "training.row_length",
        "training.batching",
        _one_of("auto", "packed"),
        "training.batching: auto or packed",
    ),
    Dependency(
        "training.strategy",
        "training.backend",
        _one_of("auto", "tensorflow"),
        "training.backend: tensorflow",
    ),
    Dependency("training.strategy", "training.mesh", _is_null, "training.mesh: null"),
    Dependency(
        "training.mesh", "training.backend", _one_of("auto", "jax"), "training.backend: jax"
    ),
    Dependency(
        "training.worker_timeout",
        "training.strategy",
        _one_of("auto", "multi_worker"),
        "training.strategy: auto or multi_worker",
    ),
    *(
        Dependency(f"{section}.{option}", f"{section}.{choice}", reads, f"{section}.{needed}")
        for section in ("warmup", "training")
        for option, choice, reads, needed in (
            ("epochs", "max_steps", _is_null, "max_steps: null"),
            (
                "schedule_options",
                "schedule",
                lambda schedule: schedule not in OUR_SCHEDULES,
                "schedule: one of Keras' schedules, such as PolynomialDecay",
            ),
            (
                "learning_rate",
                "schedule",
                lambda schedule: schedule.replace("_", "").lower() != "piecewiseconstantdecay",
                "schedule: one that has not all rates in schedule_options",
            ),
        )
    ),
    *(
        Dependency(
            f"{section}.top_p",
            f"{section}.temperature",
            _is_above_0,
            f"a temperature; at {section}.temperature: 0 the likeliest token is taken",
        )
        for section in ("evaluation", "export")
    ),
    *(
        Dependency(f"export.{name}", "export.signatures", _generates, GENERATE)
        for name in ("max_new_tokens", "temperature", "top_p")
    ),
    *(
        Dependency(f"judge.{name}", "judge.type", _one_of(type), f"judge.type: {type}")
        for type, names in JUDGE_KEYS.items()
        for name in names
    ),
    *(
        Dependency(f"judge.{name}", "judge.type", _is_no_person, "a judge.type other than people")
        for name in ("name", "error_rate")
    ),
    Dependency("judge.error_seed", "judge.error_rate", bool, "errors (judge.error_rate above 0)"),
)


def unread_options(
    sections: Mapping[str, JSON], *, outside: bool = False
) -> Iterator[InputProblem]:
    """Yield a problem for each option that is set and that nothing reads.

    Args:
        sections: values of the top-level keys; those that are missing are not looked at.
        outside: whether to ask the dependencies that look at files, or the others.
    """
    found: dict[str, InputProblem] = {}
    for dependency in DEPENDENCIES:
        value = _value(sections, dependency.option)
        choice = _value(sections, dependency.choice)
        if dependency.outside != outside or _MISSING in (value, choice):
            continue
        default = _default(sections, dependency.option)
        if value in (default, *dependency.idle) or dependency.reads(choice):
            continue
        unset = "null" if default is None else default or "its default"
        rule = f"has no effect without {dependency.needed}"
        hint = f"Leave it out, or set it to {unset}."
        shown = {} if isinstance(value, BaseModel) else {"value": value}
        problem = InputProblem(dependency.option, rule, **shown, hint=hint)
        found.setdefault(dependency.option, problem)
    yield from found.values()


def _value(sections: Mapping[str, JSON], key: str) -> JSON:
    """Return the value of a key or section; `_MISSING` where a section above it is null."""
    first, *rest = key.split(".")
    value = sections.get(first, _MISSING)
    for name in rest:
        if value is None or value is _MISSING:
            return _MISSING
        value = getattr(value, name)
    return value


def _default(sections: Mapping[str, JSON], key: str) -> JSON:
    section, _, name = key.rpartition(".")
    if not section:  # `reference`, the only such key at the top
        return REFERENCES[0]
    owner: BaseModel = _value(sections, section)
    return type(owner).model_fields[name].default
