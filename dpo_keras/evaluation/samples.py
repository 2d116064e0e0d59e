"""Samples: a policy's responses to held-out prompts, judged and counted."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dpo_keras.batching import TextEncoder
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.evaluation.statistics import Measurement, PerItem, mean, share
from dpo_keras.training import generate_responses
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import write_text
from dpo_keras.utils.intervals import Estimate, undefined

Judge = Callable[[str, str], object]


class Samples:
    """Responses to prompts, with their figures.

    Args:
        records: `{"prompt", "response", "tokens", "ended"}` each, and `verdict`
            (`{"preferred": bool, …}`) if they were judged.
        figures: what was counted.
        options: the sampling options.
    """

    def __init__(
        self,
        records: Sequence[dict[str, JSON]],
        figures: dict[str, Estimate],
        options: dict[str, JSON] | None = None,
    ):
        self.records = list(records)
        self.figures = dict(figures)
        self.options = dict(options or {})

    def __len__(self) -> int:
        """Return the number of responses."""
        return len(self.records)

    @property
    def prompts(self) -> list[str]:
        """The prompts, in order."""
        return [record["prompt"] for record in self.records]

    def difference_from(self, other: Measurement) -> str:
        """Return why the two cannot be compared prompt by prompt, or ""."""
        same = isinstance(other, Samples) and self.prompts == other.prompts
        return "" if same else "before and after answer different prompts"

    def values(self, name: str) -> np.ndarray | None:
        """Return "tokens", "ended", "empty" or a verdict's field of each response; else None."""
        if name == "empty":
            return np.array([not r["response"].strip() for r in self.records], np.float64)
        found = [{**r, **r.get("verdict", {})}.get(name) for r in self.records]
        if not found or not all(isinstance(value, bool | int | float) for value in found):
            return None
        return np.array(found, np.float64)

    def per_item(self, name: str) -> PerItem | None:
        """Return what a figure was computed from, or None if it is not a mean over responses."""
        values, ones = self.values(name), np.ones(len(self))
        number: dict[str, int] = {}
        clusters = np.array([number.setdefault(p, len(number)) for p in self.prompts], np.int64)
        return None if values is None else PerItem(values, ones, clusters, name != "tokens")

    def as_dict(self) -> dict[str, JSON]:
        """Return figures, options and records, ready for JSON."""
        figures = {name: figure.as_dict() for name, figure in self.figures.items()}
        return {"figures": figures, "options": self.options, "records": self.records}

    def summary(self) -> str:
        """Return a few lines for a terminal."""
        names = [name.replace("_", " ") for name in self.figures]
        width = max(map(len, names), default=0)
        lines = zip(names, self.figures.values(), strict=True)
        return "\n".join(
            [f"{len(self)} responses", *(f"{name:{width}}  {figure}" for name, figure in lines)]
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write records and figures as JSON."""
        text = json.dumps(self.as_dict(), ensure_ascii=False, indent=1, allow_nan=False)
        write_text(path, text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Samples:
        """Read what `save` wrote; raise InputError if there is no such file, or it is another."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            figures = {name: Estimate.from_dict(f) for name, f in stored["figures"].items()}
            return cls(stored["records"], figures, stored["options"])
        except FileNotFoundError:
            raise InputError(f"There is no file {os.fspath(path)}.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{os.fspath(path)} does not hold samples (Samples.save): {error!r}"
            ) from error


def sample_and_judge(  # noqa: PLR0913 - public: all options of generation
    policy: keras.Model,
    prompts: Sequence[Any],
    judge: Judge | None = None,
    *,
    questions: Sequence[str] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
    preprocessor: Any = None,
    on_batch: Callable[[int, int], None] | None = None,
    images: Any = None,
) -> Samples:
    """Sample a policy's responses, judge them and count.

    Args:
        policy: a KerasHub causal language model, or a Keras model of token ids and mask.
        prompts: N prompts in any form that `generate_responses` takes, chat template applied.
        judge: such as `dpo_keras.preferences.judge`: `(question, response)` -> bool, or an object
            with a bool `preferred`. Other bool fields of a dataclass are counted too.
        questions: N prompts as plain text, for the judge and for display. Default: `prompts`.
        max_new_tokens: longest response, in tokens.
        temperature: of sampling; 0 takes the most probable token.
        top_p: share of the probability to sample from.
        seed: of sampling.
        batch_size: sequences that are decoded at a time.
        max_length: longest prompt and response together, in tokens.
        preprocessor: `policy.preprocessor` by default.
        on_batch: called with (prompts done, N) now and then.
        images: of the prompts, as `generate_responses` takes them.

    Returns:
        Records and figures. Figures: `preferred` and the verdict's other fields (shares) if there
        is a judge; `tokens` (mean length of a response); `distinct_1`, `distinct_2` (distinct
        n-grams of tokens / all n-grams; arXiv 1510.03055); `distinct_responses`; `empty`; `ended`
        (share of responses with an end token, not cut at `max_new_tokens`).

    Raises:
        InputError: as `generate_responses`; or `questions` are not N strings.

    Example:
        >>> import keras, keras_hub
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     tokenize = staticmethod(lambda texts: [[ord(c) - 90 for c in t] for t in texts])
        ...     detokenize = staticmethod(lambda rows: ["".join(chr(90 + i) for i in rows[0])])
        >>> ids = {name: keras.Input((None,), name=name) for name in ("token_ids", "padding_mask")}
        >>> always_c = keras.layers.Lambda(lambda x: keras.ops.one_hot(0 * x + 9, 64) * 99)
        >>> policy = keras.Model(ids, always_c(ids["token_ids"]))
        >>> samples = sample_and_judge(policy, ["a"], lambda prompt, response: "c" in response,
        ...                            max_new_tokens=3, preprocessor=Letters())
        >>> samples.records
        [{'prompt': 'a', 'response': 'ccc', 'tokens': 3, 'ended': False,
          'verdict': {'preferred': True}}]
        >>> samples.figures["distinct_1"].value == 1 / 3
        True
    """
    questions = list(prompts if questions is None else questions)
    if len(questions) != len(prompts) or not all(isinstance(text, str) for text in questions):
        counts = f"{len(questions)} for {len(prompts)} prompts"
        rule = f"must be strings, one for each prompt; got {counts}"
        hint = "Where prompts are token ids, give both."
        raise InputError(InputProblem("questions", rule, hint=hint))
    options: dict[str, JSON] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    options |= {"top_p": top_p, "seed": seed}
    responses, ended = generate_responses(
        policy,
        prompts,
        **options,
        return_ended=True,
        batch_size=batch_size,
        max_length=max_length,
        preprocessor=preprocessor,
        on_batch=on_batch,
        images=images,
    )
    encoder = TextEncoder(preprocessor or policy.preprocessor)
    rows = encoder.responses(list(responses)).tolist() if responses else []
    tokens = [row[:-1] if row and row[-1] in encoder.ends else row for row in rows]
    records: list[dict[str, JSON]] = []
    for question, response, ids, whole in zip(questions, responses, tokens, ended, strict=True):
        record = {"prompt": question, "response": response, "tokens": len(ids), "ended": whole}
        if judge is not None:
            record["verdict"] = _verdict(judge(question, response))
        records.append(record)
    samples = Samples(records, {}, options)
    samples.figures = _figures(samples, tokens)
    return samples


def side_by_side(before: Samples | None, after: Samples, count: int = 8) -> list[dict[str, JSON]]:
    """Return the first responses of two policies to the same prompts: the first, not the best.

    Args:
        before: samples of the policy before training. None omits them, and so do other prompts.
        after: samples of the policy after training.
        count: number of prompts.

    Returns:
        `{"prompt", "before", "after", "before_preferred", "after_preferred"}` each; the last two
        are None without a judge.

    Example:
        >>> samples = Samples([{"prompt": "Hi", "response": "Hello!", "tokens": 2}], {})
        >>> side_by_side(None, samples)
        [{'prompt': 'Hi', 'after': 'Hello!', 'after_preferred': None}]
    """
    if before is not None and after.difference_from(before):
        before = None
    rows = []
    for number, record in enumerate(after.records[:count]):
        row: dict[str, JSON] = {"prompt": record["prompt"]}
        for name, samples in (("before", before), ("after", after)):
            if samples is not None:
                found = samples.records[number]
                row[name] = found["response"]
                row[f"{name}_preferred"] = found.get("verdict", {}).get("preferred")
        rows.append(row)
    return rows


def _verdict(found: object) -> dict[str, bool]:
    if isinstance(found, bool | np.bool_):
        return {"preferred": bool(found)}
    if not hasattr(found, "preferred"):
        rule = "must return a bool or an object with a bool `preferred`"
        raise InputError(InputProblem("judge", rule, type(found).__name__))
    fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
    others = {field.name: getattr(found, field.name) for field in fields}
    kept = {name: bool(v) for name, v in others.items() if isinstance(v, bool | np.bool_)}
    return {"preferred": bool(found.preferred), **kept}


def _figures(samples: Samples, tokens: list[list[int]]) -> dict[str, Estimate]:
    texts = [record["response"] for record in samples.records]
    verdict = samples.records[0].get("verdict", {}) if samples.records else ()

    def measured(name: str) -> Estimate:
        found = samples.per_item(name)
        if found is None:
            return undefined("there is no response")
        kind = share if found.share else mean
        return kind(found.values, found.weight, found.clusters, of="response")

    return {
        **{name: measured(name) for name in verdict},
        "tokens": measured("tokens"),
        "distinct_1": _distinct(tokens, 1),
        "distinct_2": _distinct(tokens, 2),
        "distinct_responses": _ratio(len(set(texts)), len(texts), "there is no response"),
        "empty": measured("empty"),
        "ended": measured("ended"),
    }


def _distinct(tokens: list[list[int]], size: int) -> Estimate:
    grams = [tuple(ids[i : i + size]) for ids in tokens for i in range(len(ids) - size + 1)]
    return _ratio(len(set(grams)), len(grams), f"no response has {size} tokens")


def _ratio(part: int, whole: int, absent: str) -> Estimate:
    return Estimate(part / whole, count=whole) if whole else undefined(absent)
