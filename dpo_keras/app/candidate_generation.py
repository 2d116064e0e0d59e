"""Candidate responses for people to compare: two or more for each prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dpo_keras.app.config import Config, load_config, read_text
from dpo_keras.app.console import Progress, Silent, check_output
from dpo_keras.app.models import load_model
from dpo_keras.app.run_directory import open_policy
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.candidates import record_images
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import write_text

if TYPE_CHECKING:
    import keras

    from dpo_keras.batching.image_preprocessing import PairImages

REDRAWS = 3


class Inputs(NamedTuple):
    """What `generate_responses` takes: texts, or ids of rendered conversations; and images."""

    prompts: Sequence[JSON]
    images: PairImages | None

    def at(self, places: Sequence[int]) -> Inputs:
        """Return the inputs of some places."""
        images = None if self.images is None else self.images[np.array(places)]
        return Inputs([self.prompts[place] for place in places], images)


class Candidate(NamedTuple):
    """A response, and what made it: policy, sampling settings and seed."""

    text: str
    maker: dict[str, JSON]


@dataclass(frozen=True)
class Maker:
    """A policy (its name as given, and the path of its model), and how it samples responses."""

    name: str
    path: str
    config: Config
    options: dict[str, JSON]  # max_new_tokens, temperature, top_p

    def respond(
        self, policy: keras.Model, inputs: Inputs, seeds: Sequence[int], progress: Progress
    ) -> list[list[Candidate]]:
        """Sample a response to each prompt with each seed."""
        from dpo_keras.training import generate_responses

        texts = generate_responses(
            policy,
            inputs.prompts,
            images=inputs.images,
            seed=seeds,
            batch_size=self.config.evaluation.batch_size,
            max_length=self.config.data.max_length,
            on_batch=progress.advance,
            **self.options,
        )
        settings = [{"policy": self.name, **self.options, "seed": seed} for seed in seeds]
        return [list(map(Candidate, responses, settings)) for responses in texts]


def generate(  # noqa: PLR0913 (keyword options, one for each of the command's)
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
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, JSON]]:
    """Sample several responses to each prompt: `{"prompt", "responses", "makers"}` of each.

    A maker is the policy (a run or a configuration), the settings and the seed of its response;
    candidate n is sampled with seed + n. All policies and temperatures take turns. Empty responses,
    and those that equal another one of their prompt, are drawn again three times, then left out, as
    are prompts left without two responses. None stands for what the configuration says. An `output`
    that exists is an error, unless it may be overwritten.
    """
    check_output(output, overwrite)
    progress = progress or Silent()
    records = read_prompts(Path(prompts), limit)
    makers = list(_makers([config, *compare], overrides, max_new_tokens, temperature, top_p))
    _check_number(responses, makers)
    first_seed = makers[0].config.seed if seed is None else seed
    drawn: list[dict[int, Candidate]] = [{} for _ in records]
    left_out: Counter[str] = Counter()
    policy = loaded = None
    for turn, maker in enumerate(makers):
        wanted = (maker.path, maker.config.model.dtype)
        if loaded != wanted:
            policy = None  # frees the last one before the next
            progress.stage("Policy" if len(makers) == 1 else f"Policy {maker.name}")
            policy, loaded = load_model(*wanted), wanted
        inputs = model_inputs(records, maker.config.data.template, policy)
        numbers = range(turn, responses, len(makers))
        progress.stage(f"Candidates {', '.join(str(n + 1) for n in numbers)} of {responses}")
        draws = 1 if maker.options["temperature"] == 0 else REDRAWS + 1
        seeds = [
            {number: first_seed + number + responses * draw for number in numbers}
            for draw in range(draws)
        ]
        left_out += _draw(maker, policy, inputs, seeds, drawn, progress)
    candidates = []
    for record, found in zip(records, drawn, strict=True):
        if len(found) >= min(2, responses):
            texts, settings = zip(*(found[number] for number in sorted(found)), strict=True)
            candidates.append({**record, "responses": list(texts), "makers": list(settings)})
    left_out["prompts without two different responses"] = len(records) - len(candidates)
    if counts := [f"{count:,} {what}" for what, count in left_out.items() if count]:
        progress.note(f"left out after {REDRAWS} further draws: {', '.join(counts)}")
    if not candidates:
        raise InputError(
            "no prompt has two different responses that are not empty; raise --temperature or "
            "--max-new-tokens."
        )
    if output is not None:
        folder = Path(output).absolute().parent
        lines = [json.dumps(_as_text(line, folder), ensure_ascii=False) for line in candidates]
        write_text(output, "".join(line + "\n" for line in lines))
    return [_as_text(line) for line in candidates]


def _as_text(record: dict[str, JSON], folder: Path | None = None) -> dict[str, JSON]:
    """Return a record with its images as paths, those in the folder relative to it."""
    if "images" not in record:
        return record
    return {**record, "images": [image.as_text(folder) for image in record["images"]]}


def _check_number(responses: int, makers: Sequence[Maker]) -> None:
    if responses < len(makers):
        rule = f"must be at least {len(makers)}, one for each policy and temperature"
        raise InputError(InputProblem("responses", rule, responses))
    repeated = {number % len(makers) for number in range(len(makers), responses)}
    if any(makers[number].options["temperature"] == 0 for number in repeated):
        rule = "must be > 0 for several responses: at 0 all are the same."
        raise InputError(InputProblem("temperature", rule))


def _draw(
    maker: Maker,
    policy: keras.Model,
    inputs: Inputs,
    seeds: Sequence[dict[int, int]],
    drawn: list[dict[int, Candidate]],
    progress: Progress,
) -> Counter[str]:
    """Add a maker's candidates of every prompt to `drawn`; count what the last draws left out.

    `seeds` holds the seed of each candidate's number, for the first draw and for each after it.
    """
    left = {number: list(range(len(inputs.prompts))) for number in seeds[0]}
    why: Counter[str] = Counter()
    for draw in seeds:
        # Prompts that all miss the same candidates are read once for all of those.
        missing: dict[tuple[int, ...], list[int]] = {}
        for place in range(len(inputs.prompts)):
            numbers = tuple(number for number in left if place in left[number])
            if numbers:
                missing.setdefault(numbers, []).append(place)
        again: dict[int, list[int]] = {number: [] for number in left}
        why = Counter()
        for numbers, places in missing.items():
            found = maker.respond(
                policy, inputs.at(places), [draw[number] for number in numbers], progress
            )
            for place, candidates in zip(places, found, strict=True):
                for number, candidate in zip(numbers, candidates, strict=True):
                    fault = _fault(candidate, drawn[place].values())
                    if fault:
                        again[number].append(place)
                        why[fault] += 1
                    else:
                        drawn[place][number] = candidate
        left = again
    return why


def _fault(candidate: Candidate, others: Iterable[Candidate]) -> str:
    text = candidate.text.strip()
    if not text:
        return "empty"
    return "identical" if any(text == other.text.strip() for other in others) else ""


def _makers(
    configs: Sequence[str | Path | Config],
    overrides: Sequence[str],
    max_new_tokens: int | None,
    temperature: float | Sequence[float] | None,
    top_p: float | None,
) -> Iterator[Maker]:
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
            yield Maker(name, path, settings, options)


def _model_of(config: str | Path | Config, overrides: Sequence[str]) -> tuple[Config, str]:
    if not isinstance(config, Config) and Path(config).is_dir():
        if overrides:
            raise InputError("a run has its configuration; overrides go with a configuration file.")
        run = open_policy(config)
        return run.config(), str(run.policy)
    settings = config if isinstance(config, Config) else load_config(config, overrides)
    if settings.model.path is None:
        raise InputError(
            "model.scratch has no weights to write with; give the directory of a run that trained "
            "it, or model.path."
        )
    return settings, settings.model.path


def read_prompts(path: Path, limit: int | None = None) -> list[dict[str, JSON]]:
    """Read records of `prompt`, `id` and `images` from JSONL, or a prompt from each line."""
    lines = [(n, line) for n, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    if path.suffix not in (".jsonl", ".json"):
        records = [{"prompt": line} for _, line in lines]
    else:
        records, problems = [], []
        for number, line in lines:
            try:
                records.append(_prompt_record(line, path.parent))
            except ValueError as error:
                problems.append(f"{path} line {number}: {error}.")
        if problems:
            raise InputError(problems)
    if not records:
        raise InputError(f"{path}: there is no prompt in it.")
    return records[:limit]


def _prompt_record(line: str, folder: Path) -> dict[str, JSON]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not _is_prompt(prompt):
        raise ValueError(f"prompt must be text, or a list of role/content messages, got {prompt!r}")
    found = {name: record[name] for name in ("id", "prompt") if name in record}
    problems: list[InputProblem] = []
    text = prompt if isinstance(prompt, str) else None
    images = record_images(record, text, str(folder), problems)
    if problems:
        raise ValueError("; ".join(map(str, problems)))
    if images:
        found["images"] = images
    return found


def _is_prompt(prompt: JSON) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    if not isinstance(prompt, list) or not prompt:
        return False
    turns = [turn if isinstance(turn, dict) else {} for turn in prompt]
    return all(isinstance(turn.get(key), str) for turn in turns for key in ("role", "content"))


def model_inputs(
    records: Sequence[dict[str, JSON]], template: str | None, policy: keras.Model
) -> Inputs:
    """Return the prompts, as training reads them, and their images."""
    from dpo_keras.batching import tokenize_pairs

    prompts = [record["prompt"] for record in records]
    if template is None and not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(
            "prompts: messages need a chat template to become text; give data.template."
        )
    if template is None and not any("images" in record for record in records):
        return Inputs(prompts, None)
    # Pairs with placeholder responses take the same path as training pairs.
    pairs = []
    for record in records:
        pair: dict[str, JSON] = {**record, "chosen": "a", "rejected": "b"}
        if not isinstance(record["prompt"], str):
            for side in ("chosen", "rejected"):
                pair[side] = [{"role": "assistant", "content": pair[side]}]
        pairs.append(pair)
    tokenized = tokenize_pairs(pairs, policy.preprocessor, max_length=2**20, template=template)
    if tokenized.report.dropped:  # the rest would answer the wrong prompts
        raise InputError([f"prompts: {dropped}." for dropped in tokenized.report.dropped])
    return Inputs(tokenized.prompt.tolist(), tokenized.images)
