"""A run's policy for other libraries: `dpo-keras export --format …` beside SavedModels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_keras.app.config import Config
from dpo_keras.app.console import Progress, Silent
from dpo_keras.app.models import load_model, load_policy
from dpo_keras.app.run_directory import RunDirectory, open_policy, writable
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import replaced

if TYPE_CHECKING:
    import keras

    from dpo_keras.serving import ModelFacts

FORMATS = ("saved_model", "keras_hub", "transformers", "peft")
_SHOWN = (
    *("loss", "reward_accuracy", "reward_margin", "kl", "chosen_logps", "rejected_logps"),
    *("chosen_tokens", "entropy"),
)


def check_format(format: str, force: bool, max_new_tokens: int | None) -> None:
    """Refuse an unknown format, and options that have no effect in one."""
    if format not in FORMATS:
        rule = f"must be one of {', '.join(FORMATS)}"
        raise InputError(InputProblem("--format", rule, format))
    if format == "saved_model" and force:
        rule = "has no effect on SavedModels, whose versions are never overwritten"
        raise InputError(InputProblem("--force", rule))
    if format != "saved_model" and max_new_tokens is not None:
        rule = f"has no effect on {format}; only SavedModels fix it"
        raise InputError(InputProblem("--max-new-tokens", rule))


def export_pretrained(
    run: str | Path,
    directory: str | Path,
    format: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, JSON]:
    """Write a run's policy with `save_pretrained`; all that the model card says is the run's.

    Return `{"path", "format", "files"}`, the files with their sizes in bytes.
    """
    from dpo_keras.serving.pretrained import check_directory, save_pretrained

    progress = progress or Silent()
    opened = open_policy(run)
    config = opened.config()
    check_directory(Path(directory), overwrite)
    progress.stage("Policy")
    policy = _policy(opened, config, format)
    progress.stage(f"Writing {format}")
    with writable("path", directory):
        target = save_pretrained(
            policy,
            directory,
            format,
            source=config.model.path,
            template=config.data.template,
            facts=facts_of_run(opened, config),
            overwrite=overwrite,
        )
    files = {file.name: file.stat().st_size for file in sorted(target.iterdir()) if file.is_file()}
    return {"path": str(target), "format": format, "files": files}


def _policy(run: RunDirectory, config: Config, format: str) -> keras.Model:
    """Load the trained policy: with its adapters for `peft`, else with all merged."""
    if format != "peft":
        return load_model(str(run.policy), config.model.dtype)
    if not run.adapters.is_file():
        rule = f"must be another one: {run.path} was trained without LoRA, and has no adapters"
        hint = "--format transformers writes the whole model."
        raise InputError(InputProblem("--format", rule, hint=hint))
    policy = load_policy(config.model)
    load_adapters(policy, run.adapters)
    return policy


def save_adapters(policy: keras.Model, path: Path) -> None:
    """Write what a policy with LoRA has trained, not merged; nothing for a policy without."""
    from dpo_keras.scoring.lora import adapted_layers

    if adapted_layers(policy):
        trained: dict[str, Any] = {
            str(i): np.asarray(v) for i, v in enumerate(policy.trainable_variables)
        }
        with replaced(path) as partial:
            np.savez(partial, **trained)


def load_adapters(policy: keras.Model, path: Path) -> None:
    """Read what `save_adapters` wrote into a policy with the same LoRA settings."""
    with np.load(path) as trained:
        for number, variable in enumerate(policy.trainable_variables):
            variable.assign(trained[str(number)])


def facts_of_run(run: RunDirectory, config: Config) -> ModelFacts:
    """Return what a model card says of a run."""
    from dpo_keras.serving.model_card import ModelFacts, plain

    result = run.read("result.json") or {}
    prints = run.read("data.json") or {}
    data = {"pairs from": plain(config.data.path or "")}
    data |= {f"{name} pairs": f"{count:,}" for name, count in result.get("pairs", {}).items()}
    hashes = {side: prints[side] for side in ("train", "held_out") if prints.get(side)}
    data |= {f"SHA-256 of the {side} tokens": f"`{value}`" for side, value in hashes.items()}
    if config.data.template is not None:
        data["chat template"] = Path(config.data.template).name
    loss = {
        key: value for key, value in config.loss.model_dump().items() if value not in (None, {})
    }
    training = config.training.model_dump(
        include={"epochs", "max_steps", "batch_size", "learning_rate", "optimizer", "schedule"},
        exclude_none=True,
    )
    settings = {"loss": loss, "reference": config.reference, "training": training}
    unread = {"path", "scratch"} | ({"lora_scaling"} if config.model.lora_rank is None else set())
    settings["model"] = config.model.model_dump(exclude=unread, exclude_none=True)
    return ModelFacts(
        data=data,
        objective={name: plain(value) for name, value in settings.items()},
        figures=_figures(result),
        versions=run.read("versions.json") or {},
    )


def _figures(result: dict[str, JSON]) -> dict[str, tuple[str, str]]:
    """Return the held-out figures before and after training, with their intervals."""
    before, after = (result.get(side) or {} for side in ("before", "after"))
    found: dict[str, tuple[str, str]] = {}
    for kind in ("figures", "responses"):
        first, second = (side.get(kind) or {} for side in (before, after))
        for name in second:
            if name in first and (kind == "responses" or name in _SHOWN):
                found[name] = (_estimate(first[name]), _estimate(second[name]))
    return found


def _estimate(figure: JSON) -> str:
    if not isinstance(figure, dict):
        return json.dumps(figure)
    if "low" not in figure:
        return f"{figure['value']:.4g}"
    return f"{figure['value']:.4g} ({figure['low']:.4g} to {figure['high']:.4g})"
