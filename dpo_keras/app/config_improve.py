"""The sections of a configuration that `dpo-keras improve` reads: rounds, and what is asked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dpo_keras.app.config_sections import Count, Positive, Section, key


class Improve(Section):
    """Rounds in which a policy learns from judgements of its own responses."""

    start: str | None = key(
        None, "directory of a run whose policy is improved; null: `model`, after its warm-up"
    )
    prompts: str | None = key(
        None, "a file of prompts, as `dpo-keras generate` takes it; null: the training prompts"
    )
    prompts_per_round: Count = key(256, "how many prompts the policy answers in a round")
    responses: Annotated[int, Field(ge=2, lt=2**31)] = key(2, "candidates for each of them")
    temperature: Positive = key(1.0, "of the candidates")
    judgements: Count = key(256, "pairs of candidates that are judged in a round, at most")
    reference: Literal["first", "previous", "moving"] = key(
        "first",
        "policy that a round's training is held to: that of round 0, that of the round before, or "
        "one that follows by `training.sync_reference`",
    )
    keep_earlier_pairs: bool = key(True, "whether a round trains on the earlier rounds' pairs too")
    poll_seconds: Positive = key(10.0, "between looks at the store, with people and --wait")


class Feedback(Section):
    """What people and judges are asked about."""

    selection: Literal["random", "uncertain", "disagreement", "diverse"] = key(
        "random", "which pairs are judged: see `dpo_keras.feedback.selection`"
    )
