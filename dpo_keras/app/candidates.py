"""Candidate responses for people to compare: two or more for each prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_keras.app.config import Config, load_config, read_text
from dpo_keras.app.models import load_model
from dpo_keras.app.progress import Progress, Silent
from dpo_keras.app.run_directory import open_run
from dpo_keras.app.stages import respond
from dpo_keras.errors import InputError


def generate(
    config: str | Path | Config,
    prompts: str | Path,
    overrides: Sequence[str] = (),
    *,
    responses: int = 2,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    limit: int | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Samples several responses to each prompt.

    Args:
        config: a run's directory (its trained policy writes), or a configuration with
            `model.path` (that model writes).
        prompts: a file: JSONL with a `prompt` column (and perhaps `id`), or text with a prompt a
            line.
        overrides: `section.key=value`, for a configuration.
        responses: per prompt.
        max_new_tokens: the longest response; None: the evaluation section's.
        temperature: None: the evaluation section's.
        top_p: None: the evaluation section's.
        seed: None: the configuration's. Candidate n of a prompt is sampled with seed + n.
        limit: use this many prompts at most.
        output: write the candidates here too, as JSONL.
        progress: hears what happens; None: nobody.

    Returns:
        `{"prompt", "responses"}` per prompt, and `"id"` where the prompt has one.

    Raises:
        InputError: if there is no model to write with, or no prompt.
    """
    progress = progress or Silent()
    records = read_prompts(Path(prompts), limit)
    settings, path = _model_of(config, overrides)
    progress.stage("Policy")
    policy = load_model(path, settings.model.dtype)
    inputs = [_model_input(record["prompt"], settings, policy) for record in records]
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }
    changes: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
    if responses > 1 and changes.get("temperature", settings.evaluation.temperature) == 0:
        raise InputError("temperature must be > 0 for several responses: at 0 all are the same.")
    first = settings.seed if seed is None else seed
    columns = []
    for number in range(responses):
        progress.stage(f"Candidate {number + 1} of {responses}")
        columns.append(respond(settings, policy, inputs, progress, seed=first + number, **changes))
    candidates = [
        {**record, "responses": list(row)}
        for record, row in zip(records, zip(*columns, strict=True), strict=True)
    ]
    if output is not None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in candidates)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text, encoding="utf-8")
    return candidates


def _model_of(config: str | Path | Config, overrides: Sequence[str]) -> tuple[Config, str]:
    if not isinstance(config, Config) and Path(config).is_dir():
        if overrides:
            raise InputError("a run has its configuration; overrides go with a configuration file.")
        run = open_run(config)
        return run.config(), str(run.policy)
    settings = config if isinstance(config, Config) else load_config(config, overrides)
    if settings.model.path is None:
        raise InputError(
            "model.scratch has no weights to write with; give the directory of a run that trained "
            "it, or model.path."
        )
    return settings, settings.model.path


def read_prompts(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Reads prompts, and reports every line that is none.

    Args:
        path: JSONL (`.jsonl`, `.json`) with a `prompt` column, or text with a prompt a line.
        limit: read this many at most.

    Returns:
        `{"prompt"}` per prompt, `"id"` where there is one; a prompt is text, or a list of
        role/content mappings.

    Raises:
        InputError: naming every bad line, or if there is no prompt.
    """
    text = read_text(path)
    if path.suffix in (".jsonl", ".json"):
        found = list(_records(text))
    else:
        found = [{"prompt": line} for line in text.splitlines() if line.strip()]
    problems = [f"{path} {record['problem']}" for record in found if "problem" in record]
    if problems:
        raise InputError(problems)
    if not found:
        raise InputError(f"{path}: there is no prompt in it.")
    return found[:limit]


def _records(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            yield {"problem": f"line {number}: is not JSON: {error}."}
            continue
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if _is_prompt(prompt):
            yield {name: record[name] for name in ("id", "prompt") if name in record}
        else:
            yield {
                "problem": f"line {number}: prompt must be text, or a list of role/content "
                f"messages, got {prompt!r}."
            }


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in prompt
        )
    )


def _model_input(prompt: Any, config: Config, policy: Any) -> Any:
    """Returns what `generate_responses` takes: text, or the ids of a rendered conversation."""
    if config.data.template is None:
        if isinstance(prompt, str):
            return prompt
        raise InputError(
            "prompts: messages need a chat template to become text; give data.template."
        )
    return prompt_ids(prompt, config.data.template, policy)


def prompt_ids(prompt: Any, template: str, policy: Any) -> list[int]:
    """Renders a prompt with a chat template, as token ids.

    Args:
        prompt: text, or role/content mappings.
        template: name or path of the template.
        policy: a CausalLM, for its tokenizer.
    """
    from dpo_keras.batching import tokenize_pairs
    from dpo_keras.preferences import Message, PreferencePair

    # A pair with placeholder responses goes the very way that training pairs go.
    pair = (
        PreferencePair(prompt, "a", "b")
        if isinstance(prompt, str)
        else PreferencePair(
            tuple(Message(turn["role"], turn["content"]) for turn in prompt),
            (Message("assistant", "a"),),
            (Message("assistant", "b"),),
        )
    )
    tokenized = tokenize_pairs([pair], policy.preprocessor, max_length=2**20, template=template)
    return tokenized.prompt[0].tolist()
