"""The configuration of a run: read, checked as a whole, and written with every default filled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails

from dpo_keras.app.config_dependencies import unread_options
from dpo_keras.app.config_improve import Feedback, Improve
from dpo_keras.app.config_judge import JudgeSettings
from dpo_keras.app.config_rules import OUTSIDE_RULES, broken_rules, config_warnings
from dpo_keras.app.config_sections import (
    Data,
    Evaluation,
    Export,
    Loss,
    Model,
    Section,
    Training,
    Warmup,
    key,
)
from dpo_keras.app.yaml_document import Document, dotted, read_document
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.text import did_you_mean, nearest, shortened

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_FROM_DOCUMENT = {"from": "document"}
_BUILTIN = Path(__file__).parents[1] / "configs"  # a link to configs/; a wheel has the files


class Config(Section):
    """All that `dpo-keras train` needs to know."""

    name: Annotated[str, Field(pattern=NAME)] = key(
        "run", "of the run: letters, digits, `.`, `_` and `-`; a file's default is its stem"
    )
    output: str | None = key(None, "the run's directory; null: `runs/<name>`")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = key(
        0, "of the split, the shuffling, the initial weights and the sampling"
    )
    model: Model = key({}, "the policy")
    data: Data = key({}, "the preference pairs")
    warmup: Warmup | None = key(None, "supervised training on the chosen responses; null for none")
    reference: Annotated[str, Field(min_length=1)] = key(
        "auto",
        "`auto`, `frozen_copy`, `adapters_off`, `cached`, `none`, or a model (as `model.path`)",
    )
    loss: Loss = key({}, "the objective")
    training: Training = key({}, "preference training")
    evaluation: Evaluation = key({}, "what is measured before and after")
    export: Export | None = key(None, "the SavedModel; null for none")
    improve: Improve | None = key(None, "rounds of `dpo-keras improve`; null for none")
    feedback: Feedback = key({}, "which pairs are judged")
    judge: JudgeSettings | None = key(None, "who compares responses; null: nobody is asked")

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_take_defaults(cls, values: JSON) -> JSON:
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        for name in ("model", "data", "loss", "training", "evaluation", "feedback"):
            if name in filled and filled[name] is None:
                filled[name] = {}
        if filled.get("output") is None and isinstance(filled.get("name", "run"), str):
            filled["output"] = f"runs/{filled.get('name', 'run')}"
        return filled

    def _broken_rules(self) -> Iterator[InputProblem]:
        return broken_rules(self.sections())

    @model_validator(mode="after")
    def _check_that_all_is_read(self, info: ValidationInfo) -> Self:
        # `build_config` asks by itself, beside the problems of sections that are not valid.
        problems = [] if info.context == _FROM_DOCUMENT else list(unread_options(self.sections()))
        if problems:
            raise InputError(problems)
        return self

    @property
    def trains_reward(self) -> bool:
        """Whether the run trains a reward model in place of a policy."""
        return self.loss.type == ["reward"]

    def sections(self) -> dict[str, JSON]:
        """Return the values of the top-level keys: models for sections, not dicts."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def resolved(self) -> str:
        """Return YAML with every default filled, which reads back as an equal configuration."""
        return yaml.safe_dump(
            self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
        )

    def warnings(self) -> list[str]:
        """Name what is allowed and most likely a mistake."""
        return list(config_warnings(self.warmup, self.training))

    def differences(self, other: Config) -> list[str]:
        """Name the keys in which two configurations differ: `key is A, was B`.

        `output` and `training.mesh` may: a run goes on elsewhere, and on other devices.
        """
        ours, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        for settings in (ours, theirs):
            del settings["output"], settings["training"]["mesh"]
        return list(_differences(ours, theirs))


def _differences(here: JSON, there: JSON, where: str = "") -> Iterator[str]:
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for name in sorted(here.keys() | there.keys()):
            inner = f"{where}.{name}" if where else name
            yield from _differences(here.get(name), there.get(name), inner)
    elif here != there:
        yield f"{where} is {_inline(here)}, was {_inline(there)}"


def _inline(value: JSON) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def config_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a configuration with overrides, without checking it; `build_config` does that.

    `builtin:NAME` is one of those that come with the package, such as `builtin:quickstart`.
    """
    path = Path(path)
    document = read_document(read_text(path), str(path))
    if not document.readable:
        raise InputError(document.problems)
    if document.tree.get("name") is None:
        document.tree["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("-._") or "run"
    for override in overrides:
        document.override(override)
    return document


def build_config(document: Document, *, outside: bool = False, stored: bool = False) -> Config:
    """Report all that is wrong with a document at once.

    `outside` adds `OUTSIDE_RULES`. A `stored` configuration was checked by the version that wrote
    it, which may have accepted an option without effect.
    """
    if not document.readable:
        raise InputError(document.problems)
    found: list[InputProblem] = []
    config = None
    try:
        config = Config.model_validate(document.tree, context=_FROM_DOCUMENT)
        sections = config.sections()
    except ValidationError as error:
        found += explained(error)
        failed = {item["loc"][0] for item in error.errors() if item["loc"]}
        sections = _valid_sections(document.tree, failed)
        # Rules over several sections are among pydantic's errors only where each section is valid.
        found += broken_rules(sections) if failed else ()
    if not stored:
        found += unread_options(sections)
    if outside:
        found += broken_rules(sections, OUTSIDE_RULES)
        found += unread_options(sections, outside=True)
    if document.problems or found or config is None:
        raise InputError([*document.problems, *placed(found, document)])
    return config


def _valid_sections(tree: Mapping[str, JSON], failed: set[JSON]) -> dict[str, JSON]:
    sections = {}
    for name, field in Config.model_fields.items():
        if name not in failed:
            value = field.default if tree.get(name) is None else tree[name]
            sections[name] = TypeAdapter(field.rebuild_annotation()).validate_python(value)
    return sections


def parse_config(
    text: str,
    overrides: Sequence[str] = (),
    *,
    source: str = "<configuration>",
    outside: bool = False,
    stored: bool = False,
) -> Config:
    """Read a configuration from YAML text, as `load_config` from a file; see `build_config`."""
    document = read_document(text, source)
    for override in overrides:
        document.override(override)
    return build_config(document, outside=outside, stored=stored)


# Paths are relative to the current directory: a file and the command line mean the same by them.
def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, outside: bool = False
) -> Config:
    """Read a configuration file, with `section.key=value` overrides; the last one wins."""
    return build_config(config_document(path, overrides), outside=outside)


def _file(path: Path) -> Path:
    """Return the file of a configuration, which the package has if it is `builtin:NAME`."""
    name = str(path).removeprefix("builtin:")
    if name == str(path):
        return path
    known = {each.stem: each for each in sorted(_BUILTIN.glob("*.yaml"))}
    if name not in known:
        must = f"must be builtin: and one of {', '.join(known)}"
        raise InputError(InputProblem("CONFIG", must, str(path), did_you_mean(name, known)))
    return known[name]


def read_text(path: Path) -> str:
    """Read a file that the user named, as UTF-8; what can not be read is an `InputError`."""
    try:
        return _file(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 text; byte {error.start} is not.") from error
    except OSError as error:
        raise InputError(f"{path}: can not be read: {error.strerror}.") from error


def given_text(path: Path, overrides: Sequence[str]) -> str:
    """Return a configuration's text with the overrides it was run with, for the record."""
    lines = [f"# override: {override}\n" for override in overrides]
    return read_text(path).rstrip("\n") + "\n" + "".join(lines)


_RULES: Mapping[str, str] = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "must be a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
    **dict.fromkeys(("model_type", "model_attributes_type"), "must be a section: keys with values"),
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "list_type": "must be a list, such as [a, b]",
    "dict_type": "must be a mapping, such as {{name: 0.1}}",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "literal_error": "must be one of {expected}",
    "too_short": "must have at least {min_length} item(s)",
    "int_parsing_size": "must be a whole number of fewer digits",
    "string_unicode": "must be text of Unicode characters",
    "string_pattern_mismatch": "must be letters, digits, '.', '_' and '-', the first a letter or a "
    "digit",  # NAME, the only pattern
}
# What other trainers call a key.
_OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("lr", "learning_rates", "max_learning_rate"), "learning_rate"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), "epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size", "bs"), "batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), "gradient_accumulation"),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "clipnorm", "global_clipnorm"), "clip_norm"),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "warmup_fraction"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "lr_schedule"), "schedule"),
    **dict.fromkeys(("lr_scheduler_kwargs", "schedule_args"), "schedule_options"),
    **dict.fromkeys(("optim", "optimizer_name"), "optimizer"),
    **dict.fromkeys(("optim_args", "optimizer_args"), "optimizer_options"),
    **dict.fromkeys(("logging_steps", "log_freq"), "log_every"),
    **dict.fromkeys(("eval_steps", "validation_freq"), "evaluate_every"),
    **dict.fromkeys(("save_steps", "save_freq"), "checkpoint_every"),
    **dict.fromkeys(("report_to", "trackers"), "loggers"),
    **dict.fromkeys(("save_total_limit", "max_to_keep"), "keep_checkpoints"),
    **dict.fromkeys(("max_seq_length", "max_sequence_len"), "max_length"),
    **dict.fromkeys(("gradient_checkpointing", "rematerialization"), "remat"),
    **dict.fromkeys(("output_dir", "run_dir"), "output"),
    **dict.fromkeys(("loss_type", "objective"), "type"),
    **dict.fromkeys(("ref_model", "reference_model"), "reference"),
    **dict.fromkeys(("lora_r", "lora"), "lora_rank"),
    **dict.fromkeys(("target_modules", "lora_target", "lora_target_modules"), "lora_targets"),
    "use_rslora": "lora_scaling",
    **dict.fromkeys(("packing", "padding_free"), "batching"),
    "truncation_mode": "overlength",
    "chat_template": "template",
}


def placed(problems: list[InputProblem], document: Document) -> list[InputProblem]:
    """Put the place before each key; in the order of the file, overrides last."""
    found = [(document.place(problem.argument), problem) for problem in problems]
    found.sort(key=lambda pair: pair[0].line if pair[0].line is not None else 10**9)
    return [problem.renamed(f"{place}: {problem.argument}") for place, problem in found]


def explained(error: ValidationError) -> Iterator[InputProblem]:
    """Yield each of pydantic's errors as a problem whose argument is the key: `loss.beta`."""
    for item in error.errors(include_url=False):
        key = dotted(item["loc"])
        context = item.get("ctx", {})
        raised = context.get("error")
        if isinstance(raised, InputError):  # by the rules of a section
            for problem in raised.problems:
                parts = (*item["loc"], problem.argument) if problem.argument else item["loc"]
                yield problem.renamed(dotted(parts))
        elif item["type"] == "extra_forbidden":
            yield InputProblem(key, f"is not a known key; {_known_key(item['loc'])}")
        elif item["type"] == "missing":
            yield InputProblem(key, "is required")
        else:
            yield InputProblem(key, _broken_rule(item))


def _broken_rule(item: ErrorDetails) -> str:
    # pydantic lists allowed values as Python writes them; a file has them bare and in lower case.
    context = {
        name: value.replace("'", "").replace("True", "true").replace("False", "false")
        if isinstance(value, str)
        else f"{value:g}"
        if isinstance(value, float)
        else value
        for name, value in item.get("ctx", {}).items()
    }
    rule = _RULES[item["type"]].format(**context) if item["type"] in _RULES else item["msg"]
    value = item["input"]
    hint = ""
    if item["type"] == "literal_error" and isinstance(value, str):
        hint = did_you_mean(value, context["expected"].replace(" or ", ", ").split(", "))
    # Numbers are text until a field converts them, so quotes would only puzzle.
    bare = isinstance(value, str) and value and value.isascii()
    text = "nothing" if value is None else shortened(str(value) if bare else repr(value))
    return f"{rule}, got {text}{'; ' + hint if hint else '.'}"


def keys_of(model: type[BaseModel], section: str = "") -> dict[str, list[str]]:
    """List the keys of a model and of the sections in it, by the dotted name of the section."""
    found = {section: list(model.model_fields)}
    for name, info in model.model_fields.items():
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= keys_of(part, f"{section}.{name}" if section else name)
    return found


def _known_key(location: tuple[str | int, ...]) -> str:
    """Suggest the right key for an unknown one: here, then in other sections."""
    *parents, given = location
    key = _OTHER_NAMES.get(str(given), given)
    section, sections = dotted(parents), keys_of(Config)
    everywhere = [
        (name, dotted(filter(None, (where, name))))
        for where, names in sections.items()
        for name in names
    ]
    here = {name: dotted(filter(None, (section, name))) for name in sections.get(section, [])}
    same = [full for name, full in everywhere if name == key]
    if key in here:
        return f"did you mean {here[key]}?"
    if near := nearest(key, here, 0.75):
        return f"did you mean {here[near]}?"
    if same:
        return f"did you mean {' or '.join(same)}?"
    if near := nearest(key, here):
        return f"did you mean {here[near]}?"
    if near := nearest(key, dict(everywhere), 0.8):
        return f"did you mean {dict(everywhere)[near]}?"
    return f"the keys here are {', '.join(here)}."
