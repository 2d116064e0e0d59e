"""Candidate responses for people to compare: two or more for each prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_keras.app.config import Config, load_config, read_text
from dpo_keras.app.models import load_model
from dpo_keras.app.progress import Progress, Silent
from dpo_keras.app.run_directory import open_run
from dpo_keras.app.training_stages import respond
from dpo_keras.errors import InputError

REDRAWS = 3


@dataclass(frozen=True)
class Maker:
    """A policy and a setting that responses are sampled with.

    Args:
        name: of the policy, as it was given.
        config: the configuration that its prompts are rendered by.
        path: the model.
        options: of `dpo_keras.generate_responses`: max_new_tokens, temperature, top_p.
    """

    name: str
    config: Config
    path: str
    options: dict[str, Any]

    def setting(self, seed: int) -> dict[str, Any]:
        """What the candidates file says of a response.

        Args:
            seed: it was sampled with.
        """
        return {"policy": self.name, **self.options, "seed": seed}


def generate(
    config: str | Path | Config,
    prompts: str | Path,
    overrides: Sequence[str] = (),
    *,
    responses: int = 2,
    compare: Sequence[str | Path | Config] = (),
    max_new_tokens: int | None = None,
    temperature: float | Sequence[float] | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    limit: int | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Samples several responses to each prompt.

    Empty responses, and those that equal another one of their prompt, are drawn again three
    times, then left out; so are prompts left without two responses. `progress` hears how many.

    Args:
        config: a run's directory (its trained policy writes), or a configuration with
            `model.path` (that model writes).
        prompts: a file: JSONL with a `prompt` column (and perhaps `id`), or text with a prompt a
            line.
        overrides: `section.key=value`, for a configuration.
        responses: per prompt.
        compare: further runs or configurations; all policies and temperatures take turns.
        max_new_tokens: the longest response; None: the evaluation section's.
        temperature: one, or several to compare; None: the evaluation section's.
        top_p: None: the evaluation section's.
        seed: None: the configuration's. Candidate n of a prompt is sampled with seed + n.
        limit: use this many prompts at most.
        output: write the candidates here too, as JSONL.
        progress: hears what happens; None: nobody.

    Returns:
        `{"prompt", "responses", "makers"}` per prompt, and `"id"` where the prompt has one; a
        maker is the policy, the setting and the seed of its response.

    Raises:
        InputError: if there is no model to write with, or no prompt.
    """
    progress = progress or Silent()
    records = read_prompts(Path(prompts), limit)
    makers = _makers([config, *compare], overrides, max_new_tokens, temperature, top_p)
    if responses < len(makers):
        raise InputError(
            f"responses must be at least {len(makers)}, one for each policy and temperature, got "
            f"{responses}."
        )
    first = makers[0].config.seed if seed is None else seed
    repeated = {number % len(makers) for number in range(len(makers), responses)}
    if any(makers[number].options["temperature"] == 0 for number in repeated):
        raise InputError("temperature must be > 0 for several responses: at 0 all are the same.")
    drawn: list[dict[int, tuple[str, dict[str, Any]]]] = [{} for _ in records]
    counts = {"empty": 0, "identical": 0}
    policy: Any = None
    loaded: tuple[str, Any] | None = None
    for place, maker in enumerate(makers):
        wanted = (maker.path, maker.config.model.dtype)
        if loaded != wanted:
            policy = None  # frees the last one before the next
            progress.stage("Policy" if len(makers) == 1 else f"Policy {maker.name}")
            policy, loaded = load_model(*wanted), wanted
        inputs = [_model_input(record["prompt"], maker.config, policy) for record in records]
        for number in range(place, responses, len(makers)):
            progress.stage(f"Candidate {number + 1} of {responses}")
            seeds = [first + number + responses * turn for turn in range(REDRAWS + 1)]
            if maker.options["temperature"] == 0:
                seeds = seeds[:1]
            _draw(maker, policy, inputs, seeds, number, drawn, counts, progress)
    candidates = []
    for record, found in zip(records, drawn, strict=True):
        if len(found) >= min(2, responses):
            texts, settings = zip(*(found[number] for number in sorted(found)), strict=True)
            candidates.append({**record, "responses": list(texts), "makers": list(settings)})
    if alone := len(records) - len(candidates):
        counts["prompts without two different responses"] = alone
    if left_out := [f"{count:,} {what}" for what, count in counts.items() if count]:
        progress.note(f"left out after {REDRAWS} further draws: {', '.join(left_out)}")
    if not candidates:
        raise InputError(
            "no prompt has two different responses that are not empty; raise --temperature or "
            "--max-new-tokens."
        )
    if output is not None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in candidates)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text, encoding="utf-8")
    return candidates


def _draw(
    maker: Maker,
    policy: Any,
    inputs: Sequence[Any],
    seeds: Sequence[int],
    number: int,
    drawn: list[dict[int, tuple[str, dict[str, Any]]]],
    counts: dict[str, int],
    progress: Progress,
) -> None:
    """Samples candidate `number` of every prompt; what is empty or there already, once more."""
    left = list(range(len(inputs)))
    for seed in seeds:
        texts = respond(
            maker.config, policy, [inputs[n] for n in left], progress, seed=seed, **maker.options
        )
        again = []
        for n, text in zip(left, texts, strict=True):
            why = _fault(text, [one for one, _ in drawn[n].values()])
            if why:
                again.append((n, why))
            else:
                drawn[n][number] = (text, maker.setting(seed))
        left = [n for n, _ in again]
        if not left:
            return
    for _, why in again:
        counts[why] += 1


def _fault(text: str, others: Sequence[str]) -> str:
    if not text.strip():
        return "empty"
    return "identical" if text.strip() in (one.strip() for one in others) else ""


def _makers(
    configs: Sequence[str | Path | Config],
    overrides: Sequence[str],
    max_new_tokens: int | None,
    temperature: float | Sequence[float] | None,
    top_p: float | None,
) -> list[Maker]:
    makers = []
    for place, config in enumerate(configs):
        settings, path = _model_of(config, overrides if place == 0 else ())
        usual = settings.evaluation
        one = usual.temperature if temperature is None else temperature
        name = path if isinstance(config, Config) or not Path(config).is_dir() else str(config)
        for value in one if isinstance(one, Sequence) else [one]:
            options = {
                "max_new_tokens": max_new_tokens or usual.max_new_tokens,
                "temperature": value,
                "top_p": usual.top_p if top_p is None else top_p,
            }
            makers.append(Maker(name, settings, path, options))
    return makers


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
