"""What is measured of each round's policy: good replies, wins over round 0, accuracy, KL."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dpo_keras.app.config_rules import build_loss
from dpo_keras.app.improvement import Improvement, Round, forget_models
from dpo_keras.app.models import check_length, load_model
from dpo_keras.app.run_devices import devices_of
from dpo_keras.app.run_directory import RunDirectory
from dpo_keras.app.run_evaluation import Examiner, Measured
from dpo_keras.app.run_inputs import Pairs, tokenize
from dpo_keras.app.training_stages import Context
from dpo_keras.feedback import Candidates, Response, Settings, Store, open_store
from dpo_keras.feedback.judgements import TIE, read_table
from dpo_keras.feedback.judges import Judge, ask_judge
from dpo_keras.preferences import Record
from dpo_keras.utils import JSON
from dpo_keras.utils.intervals import Estimate, undefined

if TYPE_CHECKING:
    from dpo_keras.evaluation import Samples

RESULT = "round.json"  # the last file of a round


def measure(improvement: Improvement, this: Round, held_out: Pairs) -> dict[str, JSON]:
    """Measure a round's policy on the held-out pairs and prompts, or read what was measured."""
    run = RunDirectory(this.path)
    known = run.read(RESULT)
    if known is not None:
        return dict(known)
    measured, asked = _examine(improvement, this, run, held_out)
    assert measured.samples is not None
    figures = {
        "good": measured.samples.figures.get("preferred") or undefined("no ground truth"),
        "wins": undefined("round 0 has nothing to win over"),
        "reward_accuracy": measured.held_out.figures["reward_accuracy"],
        "kl": _kl(improvement, this.number, asked, measured.samples),
        "tokens": measured.samples.figures["tokens"],
    }
    compared = 0
    if this.number:
        figures["wins"], compared = _wins(improvement, this, asked, measured.samples)
    cost = run.read("cost.json") or {"asked": 0, "judgements": 0, "ties": 0, "pairs": 0}
    found = {
        "round": this.number,
        "figures": {name: figure.as_dict() for name, figure in figures.items()},
        **cost,
        "comparisons": compared,  # judgements that the wins took
        "policy": improvement.policy(this.number),
    }
    run.write(RESULT, found)
    forget_models()
    improvement.progress.note(
        f"round {this.number}: good replies {figures['good']}; wins {figures['wins']}"
    )
    return found


def _examine(
    improvement: Improvement, this: Round, run: RunDirectory, held_out: Pairs
) -> tuple[Measured, list[Record]]:
    """Measure held-out pairs and sample responses; return the pairs whose prompts they answer."""
    config, progress = improvement.config, improvement.progress
    devices = devices_of(config, "one_device")
    from dpo_keras.training import DPOModel

    progress.stage(f"Round {this.number}: evaluation")
    dtype, loss = config.model.dtype, build_loss(config.loss)
    policy = load_model(improvement.policy(this.number), dtype)
    check_length(policy, config.data.max_length)
    # Scores of every round are against the first policy, so that they can be compared.
    reference = load_model(improvement.policy(0), dtype) if loss.needs_reference else "none"
    model = DPOModel(policy, reference=reference)
    model.compile(loss=loss)
    context = Context(config, run, True, progress, devices, improvement.stop, None)
    context.settle_layout(policy, reference)
    tokenized = tokenize(config.data, held_out, policy, "held-out", progress, run)
    examiner = Examiner(context, model, tokenized, held_out)
    measured = examiner.measure("after")
    assert measured is not None
    return measured, examiner.chosen


def _kl(
    improvement: Improvement, number: int, asked: Sequence[Record], samples: Samples
) -> Estimate:
    """Estimate KL(policy || first policy) by the mean of log pi(y) - log pi_0(y) of its responses.

    At temperature 1 the estimate is unbiased; at a lower one it weighs the likelier responses more.
    """
    from dpo_keras.evaluation.statistics import mean

    if not number:
        return Estimate(0.0, count=len(asked))
    # Only the first column is of interest. The second differs from it, as a pair's must.
    texts = [record["response"] for record in samples.records]
    rows = [(_record(pair), (text, f"{text}.")) for pair, text in zip(asked, texts, strict=True)]
    own, first = (score_responses(improvement, n, rows)[:, 0] for n in (number, 0))
    ratio = own - first
    return mean(ratio[np.isfinite(ratio)], of="response")


def _wins(
    improvement: Improvement, this: Round, asked: Sequence[Record], samples: Samples
) -> tuple[Estimate, int]:
    """Let the judge compare the responses with round 0's; equal ones tie and cost nothing.

    People are not asked: their judgements are for training.
    """
    from dpo_keras.evaluation import Samples as SamplesOf
    from dpo_keras.evaluation.statistics import share

    if improvement.judge is None:
        return undefined("people judge, and are not asked about held-out prompts"), 0
    first = SamplesOf.load(improvement.round(0).file("after") / "responses.json")
    labels = ("round 0", f"round {this.number}")
    given = [
        Candidates(
            pair.prompt,
            tuple(
                Response(record["response"], label)
                for record, label in zip(both, labels, strict=True)
            ),
            images=pair.images,
        )
        for pair, *both in zip(asked, first.records, samples.records, strict=True)
    ]
    improvement.progress.stage(f"Round {this.number}: comparison with round 0")
    chance = random.Random(f"{improvement.config.seed} {this.number} wins")
    settings = Settings(overlap=1, gold_share=0.0, repeat_share=0.0)
    store = open_store(this.file("wins.sqlite"), settings, create=True, chance=chance)
    try:
        store.add(given)
        ask(store, improvement.judge, len(given), improvement.progress.advance)
        table = read_table(store.database)
    finally:
        store.close()
    won = [
        0.5 if label >= TIE else float(table.makers[pair][label] == labels[1])
        for pair, label in zip(table.pair, table.label, strict=True)
    ]
    # Of two empty responses neither wins; an empty one loses to any other.
    unjudged = [one for one in given if len(one.usable()) < 2]
    won += [_by_emptiness(*(response.text for response in one.responses)) for one in unjudged]
    return share(won, of="response"), len(table)


def _by_emptiness(first: str, ours: str) -> float:
    return 0.5 + 0.5 * (bool(ours.strip()) - bool(first.strip()))


def ask(
    store: Store, judge: Judge, count: int, on_verdict: Callable[[int, int], object] | None = None
) -> None:
    """Let a judge judge all pairs of a store, whose sides are drawn before it begins."""
    store.next(store.judge_annotator(judge.name), count)
    ask_judge(store, judge, on_verdict=lambda done: on_verdict and on_verdict(done, count))


def score_responses(
    improvement: Improvement,
    number: int,
    asked: Sequence[tuple[dict[str, JSON], Sequence[str]]],
    score: Callable[..., np.ndarray] | None = None,
) -> np.ndarray:
    """Score two responses to each prompt under a round's policy: `[N, 2, …]`.

    `score` takes a model, tokenized pairs and `batch_size`; None: the log-probs of `score_pairs`.
    Rows in which a response is empty are NaN.
    """
    from dpo_keras.batching import tokenize_pairs
    from dpo_keras.scoring import score_pairs

    data, dtype = improvement.config.data, improvement.config.model.dtype
    usable = [n for n, (_, texts) in enumerate(asked) if all(text.strip() for text in texts)]
    if not usable:
        return np.full((len(asked), 2), np.nan)
    model = load_model(improvement.policy(number), dtype)
    tokenized = tokenize_pairs(
        [_as_pair(*asked[n]) for n in usable],
        model.preprocessor,
        max_length=data.max_length,
        template=data.template,
    )
    kept = range(len(usable)) if tokenized.source is None else tokenized.source
    batch_size = improvement.config.evaluation.batch_size
    found = (score or score_pairs)(model, tokenized, batch_size=batch_size)
    scores = np.full((len(asked), *found.shape[1:]), np.nan)
    scores[np.array(usable)[np.asarray(kept)]] = found
    return scores


def _as_pair(record: dict[str, JSON], responses: Sequence[str]) -> dict[str, JSON]:
    texts: Sequence[JSON] = responses
    if not isinstance(record["prompt"], str):
        texts = [[{"role": "assistant", "content": text}] for text in responses]
    pair = {"prompt": record["prompt"], "chosen": texts[0], "rejected": texts[1]}
    return pair | ({"images": record["images"]} if "images" in record else {})


def _record(pair: Record) -> dict[str, JSON]:
    record: dict[str, JSON] = {"prompt": pair.as_dict()["prompt"]}
    return record | ({"images": list(pair.images)} if pair.images else {})
