"""The stages of a round of `dpo-keras improve`, each of which ends in a file that is whole."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_keras.app import runs
from dpo_keras.app.candidate_generation import generate, read_prompts
from dpo_keras.app.improvement import (
    STORE,
    Improvement,
    Round,
    forget_models,
    read_lines,
    write_lines,
)
from dpo_keras.app.improvement_evaluation import ask, score_responses
from dpo_keras.app.models import save_policy
from dpo_keras.app.run_devices import devices_of
from dpo_keras.app.run_directory import start_run
from dpo_keras.app.run_inputs import Pairs, Sides
from dpo_keras.app.training_stages import Context, warm_up_policy
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback import Candidates, Settings, Store, open_store, read_candidates
from dpo_keras.feedback.judgements import read_table
from dpo_keras.preferences import PreferencePair, Record, write_preferences
from dpo_keras.preferences.pair import plain_text
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import write_text

if TYPE_CHECKING:
    from dpo_keras.feedback.selection import Pool

_SEEDS_OF_A_ROUND = 10_000  # candidates of different rounds are drawn with different seeds


def warm_up(improvement: Improvement) -> None:
    """Make the policy of round 0 by the configuration's warm-up, if it has one."""
    config, progress = improvement.config_of_warm_up(), improvement.progress
    run = improvement.round(0).run
    if config.warmup is None or run.policy.is_dir():
        return
    resume = run.begun
    run = start_run(config, resume, None, True)
    devices = devices_of(config)
    import keras

    keras.utils.set_random_seed(config.seed)
    context = Context(config, run, resume, progress, devices, improvement.stop, None)
    prepared = runs.prepare(context)
    warm_up_policy(context, prepared.policy, prepared.pairs)
    save_policy(prepared.policy, run.policy)
    forget_models()


def prompt_records(improvement: Improvement, sides: Sides) -> list[dict[str, JSON]]:
    """Return the prompts that rounds may answer, none of them held out, in a random order."""
    given = improvement.settings.prompts
    if given is None:
        _, rows = np.unique(sides.train.prompt_hashes, return_index=True)
        records = [_prompt_record(sides.train[int(row)]) for row in sorted(rows.tolist())]
    else:
        records = read_prompts(Path(given))
        held_out = _prompts_of(sides.held_out)
        kept = [record for record in records if _as_key(record["prompt"]) not in held_out]
        if len(kept) < len(records):
            left = len(records) - len(kept)
            improvement.progress.note(f"{left:,} prompts are left out: they are held out.")
        if not kept:
            raise InputError(InputProblem("improve.prompts", "holds held-out prompts only", given))
        records = kept
    random.Random(improvement.config.seed).shuffle(records)
    return records


def _prompt_record(pair: Record) -> dict[str, JSON]:
    record: dict[str, JSON] = {"prompt": pair.as_dict()["prompt"]}
    if pair.images:
        record["images"] = [image.as_text() for image in pair.images]
    return record


def _prompts_of(pairs: Pairs | None) -> set[str]:
    return {_as_key(pair.as_dict()["prompt"]) for pair in pairs or ()}


def _as_key(prompt: JSON) -> str:
    return json.dumps(prompt, sort_keys=True)


def draw_candidates(improvement: Improvement, this: Round, prompts: list[dict[str, JSON]]) -> None:
    """Let the policy of the round before answer the round's prompts several times."""
    if this.file("candidates.jsonl").is_file():
        return
    settings, config = improvement.settings, improvement.config_of(this.number)
    improvement.progress.stage(f"Round {this.number}: candidates")
    # Rounds take turns through the prompts: none comes again before all have come.
    first = (this.number - 1) * settings.prompts_per_round
    count = min(settings.prompts_per_round, len(prompts))
    places = [(first + n) % len(prompts) for n in range(count)]
    write_lines(this.file("prompts.jsonl"), [prompts[place] for place in places])
    found = generate(
        config.model_copy(update={"name": f"round {this.number - 1}"}),
        this.file("prompts.jsonl"),
        responses=settings.responses,
        temperature=settings.temperature,
        seed=(improvement.config.seed + _SEEDS_OF_A_ROUND * this.number) % 2**31,
        progress=improvement.progress,
    )
    for record in found:
        for maker in record["makers"]:
            maker["policy"] = f"round {this.number - 1}"
    write_lines(this.file("candidates.jsonl"), found)
    forget_models()


def select(improvement: Improvement, this: Round) -> None:
    """Choose which of the candidates' pairs are judged."""
    if this.file("selected.jsonl").is_file():
        return
    from dpo_keras.feedback.selection import select_pairs

    improvement.progress.stage(f"Round {this.number}: selection")
    records = read_lines(this.file("candidates.jsonl"))
    pairs = [
        {**record, **{name: [record[name][n] for n in both] for name in ("responses", "makers")}}
        for record in records
        for both in combinations(range(len(record["responses"])), 2)
    ]
    count = min(improvement.settings.judgements, len(pairs))
    how, pool = _pool(improvement, this, pairs)
    chosen = select_pairs(how, count, pool, len(pairs), improvement.config.seed + this.number)
    improvement.progress.note(f"{count:,} of {len(pairs):,} pairs, by {how} choice")
    write_lines(this.file("selected.jsonl"), [pairs[int(place)] for place in chosen])
    if how != "random":
        forget_models()


def _pool(
    improvement: Improvement, this: Round, pairs: Sequence[dict[str, JSON]]
) -> tuple[str, Pool]:
    """Return the selection, and what it goes by; at random before there is anything to go by."""
    from dpo_keras.feedback.selection import Pool

    how = improvement.config.feedback.selection
    asked = [(pair, pair["responses"]) for pair in pairs]
    if how == "diverse":
        from dpo_keras.scoring.response_embeddings import response_embeddings

        states = score_responses(improvement, this.number - 1, asked, response_embeddings)
        return how, Pool(embeddings=states[:, 0] - states[:, 1])
    # P(first is better) is that of the scores against the first policy: 0.5 for that policy itself.
    trained = range(1, this.number)
    needed = {"random": 0, "uncertain": 1, "disagreement": 2}[how]
    if len(trained) < needed:
        improvement.progress.note(f"too early for {how}: {len(trained)} policies were trained")
    if needed == 0 or len(trained) < needed:
        return "random", Pool()
    first = score_responses(improvement, 0, asked)
    committee = []
    for number in trained[-1:] if how == "uncertain" else trained:
        rewards = improvement.config.loss.beta * (
            score_responses(improvement, number, asked) - first
        )
        committee.append(1 / (1 + np.exp(np.clip(rewards[:, 1] - rewards[:, 0], -50, 50))))
    return how, Pool(probabilities=committee[-1], committee=np.array(committee))


def judge(improvement: Improvement, this: Round) -> tuple[int, int]:
    """Judge the selected pairs; return how many judgements people still owe, and of how many."""
    if this.file("pairs.jsonl").is_file():
        return 0, 0
    selected = read_candidates(this.file("selected.jsonl"))
    file = improvement.path / STORE
    # Sides are drawn at once in one transaction, and alike after a crash.
    chance = random.Random(f"{improvement.config.seed} {this.number}")
    settings = None if file.exists() else Settings(overlap=1, gold_share=0.0, repeat_share=0.0)
    store = open_store(file, settings, create=True, chance=chance)
    try:
        store.add(selected)
        if improvement.judge is not None:
            improvement.progress.stage(
                f"Round {this.number}: judgements of {improvement.judge.name}"
            )
            ask(store, improvement.judge, len(selected), improvement.progress.advance)
        elif missing := _missing(store):
            return missing, len(selected)
        _export(improvement, this, store, selected)
    finally:
        store.close()
    return 0, 0


def _missing(store: Store) -> int:
    """Count the pairs that nobody has judged, or skipped."""
    return int(
        store.database.rows(
            "SELECT count(*) FROM pairs WHERE NOT EXISTS (SELECT 1 FROM presentations p "
            "WHERE p.pair = pairs.id AND p.state IN ('judged', 'skipped'))"
        )[0][0]
    )


def _export(
    improvement: Improvement, this: Round, store: Store, selected: Sequence[Candidates]
) -> None:
    """Write the pairs to train on, and what they cost."""
    from dpo_keras.feedback.pair_export import to_pairs

    found = to_pairs(store).pairs
    asked = {_pair_key(one.prompt, *(r.text for r in one.responses)) for one in selected}
    new = [pair for pair in found if _key_of(pair) in asked]
    taken = found if improvement.settings.keep_earlier_pairs else new
    pairs = [pair for pair in taken if pair.preference != 0.5]
    cost = {
        "asked": len(selected),
        "judgements": len(read_table(store.database).work()),  # of this round and of earlier ones
        "ties": sum(pair.preference == 0.5 for pair in new),
        "pairs": len(pairs),
    }
    improvement.progress.note(
        f"{cost['judgements']:,} judgements so far; {len(pairs):,} pairs to train on; "
        f"{cost['ties']:,} of this round's {len(new):,} are ties"
    )
    if not pairs:
        rule = f"led to no pair to learn from: all {len(new):,} of round {this.number} are ties"
        hint = "Take another judge, or raise improve.temperature, in a new improvement."
        raise InputError(InputProblem("judge", rule, hint=hint))
    write_text(this.file("cost.json"), json.dumps(cost) + "\n")
    write_preferences(pairs, this.file("pairs.jsonl"))


def _key_of(pair: PreferencePair) -> tuple[str, frozenset[str]]:
    return _pair_key(pair.prompt, plain_text(pair.chosen), plain_text(pair.rejected))


def _pair_key(prompt: object, *responses: str) -> tuple[str, frozenset[str]]:
    return repr(prompt), frozenset(responses)


def train(improvement: Improvement, this: Round) -> None:
    """Train the round's policy on the judged pairs, from where an earlier process left it."""
    if this.run.finished:
        return
    config = improvement.config_of(this.number)
    improvement.progress.stage(f"Round {this.number}: training")
    resume = this.run.begun
    runs.train(config, resume=resume, progress=improvement.progress, stop=improvement.stop)
    forget_models()
