"""The sections of a configuration that say how weights are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dpo_keras.app.config_problems import Fault
from dpo_keras.app.config_sections import (
    AutoSwitch,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Section,
    Strategy,
)


class Optimization(Section):
    """What any training needs.

    Args:
        batch_size: pairs (texts in the warm-up) per step, over all replicas.
        schedule: of the learning rate after its linear rise.
        warmup_fraction: share of the steps in which the learning rate rises from 0.
        clip_norm: bound on the norm of the whole gradient; null for none.
    """

    epochs: Count = 1
    batch_size: Count = 8
    learning_rate: Positive = 5e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_fraction: Fraction = 0.0
    weight_decay: NotNegative = 0.0
    clip_norm: Positive | None = 1.0


class Warmup(Optimization):
    """Supervised warm-up on the chosen responses, before preference training."""

    batch_size: Count = 16
    learning_rate: Positive = 2e-5


class ReferenceSync(Section):
    """A reference that follows the policy: TR-DPO (arXiv 2404.09656).

    Args:
        every: steps between updates of the reference.
        alpha: share of the policy in the new reference; 1 replaces it.
    """

    every: Count = 512
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6


class Training(Optimization):
    """Preference training.

    Args:
        gradient_accumulation: steps per update of the weights.
        jit_compile: XLA; `auto` leaves it to Keras.
        steps_per_execution: steps run in one call, for small models.
        strategy: how replicas are made.
        worker_timeout: seconds to wait at the start for the workers that TF_CONFIG names.
        evaluate_every: steps between evaluations on the held-out pairs; null: once per epoch.
        checkpoint_every: steps between checkpoints; null: once per epoch.
        keep_checkpoints: how many of the newest are kept.
        batching: `packed` puts several pairs into a row, each prompt once; `buckets` works with any
            model; `auto` packs where the model can be run so, and says why where not.
        row_length: tokens per packed row; null chooses, about 1,024.
        buckets: how many lengths batches come in that are not packed; each is a shape that XLA
            compiles.
        remat: recompute activations in the backward pass instead of keeping them: less memory for
            about a quarter more time; the warm-up then runs without dropout.
        sync_reference: how the reference follows the policy; null: it stays.
    """

    gradient_accumulation: Count = 1
    jit_compile: AutoSwitch = "auto"
    steps_per_execution: Count = 1
    strategy: Strategy = "auto"
    worker_timeout: Positive = 300.0
    evaluate_every: Count | None = None
    checkpoint_every: Count | None = None
    keep_checkpoints: Count = 2
    batching: Literal["auto", "packed", "buckets"] = "auto"
    row_length: Count | None = None
    buckets: Count = 4
    remat: bool = False
    sync_reference: ReferenceSync | None = None

    def faults(self) -> Iterator[Fault]:
        """Only packed batches have rows of their own length."""
        if self.batching == "buckets" and self.row_length is not None:
            yield Fault(
                ("row_length",),
                f"has no effect with batching: buckets, got {self.row_length}; set it to null, or "
                "choose batching: auto or packed.",
            )
