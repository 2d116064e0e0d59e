"""Losses that a policy's own layers add: those of the routers of a mixture of experts.

A router sends each token to a few of E experts. Its loss is the least where all are used alike:

    loss = coefficient * E * sum_e f_e p_e

with f_e the share of choices that fell on expert e and p_e the router's mean probability of it,
over the real tokens of a step: no padding, and a packed prompt once. Both are means over all
replicas, so the product is made behind the reduction; KerasHub's layers would make it before.
"""

from collections.abc import Callable

import keras
from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.layer_overrides import Call, Override
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_internals import RouterSettings, router_settings
from dpo_keras.utils.keras_internals import adds_losses, all_layers

CHOICES = ("keep", "drop")


def keeps_auxiliary_loss(policy: keras.Model, choice: str) -> bool:
    """Tell whether a policy adds losses of its own that training keeps.

    Raises:
        InputError: `choice` is none of `CHOICES`.
    """
    if choice not in CHOICES:
        raise InputError(InputProblem("auxiliary_loss", "must be 'keep' or 'drop'", choice))
    layers = all_layers(policy)
    return choice == "keep" and any(router_settings(v) or adds_losses(v) for v in layers)


def auxiliary_overrides(model: object, batch: Batch, collected: list[Tensor]) -> list[Override]:
    """Add to `collected` what each layer adds to the loss while a batch runs.

    Of a router that is `[2, E]`, the numbers of choices and the weighed sums of probabilities; of
    any other layer the scalars that it gives to `add_loss`.
    """
    real = _real_tokens(batch)
    overrides = []
    for layer in all_layers(model) if isinstance(model, keras.Model) else []:
        settings = router_settings(layer)
        if settings is not None:
            call = _with_statistics(layer.call, settings, real, collected)
            overrides.append(Override(layer, "call", call))
        elif adds_losses(layer):
            overrides.append(Override(layer, "add_loss", _collecting(collected)))
    return overrides


def _with_statistics(
    call: Call, settings: RouterSettings, real: Tensor, collected: list[Tensor]
) -> Call:
    def routed(*arguments: object, **options: object) -> tuple[Tensor, Tensor]:
        # KerasHub's own loss, made in training, counts padding in some families.
        states, logits = call(*arguments, **{**options, "training": False})
        collected.append(_router_statistics(logits, settings, real))
        return states, logits

    return routed


def _collecting(collected: list[Tensor]) -> Callable[[object], None]:
    def add_loss(loss: object) -> None:
        collected.extend(ops.sum(ops.cast(value, "float32")) for value in keras.tree.flatten(loss))

    return add_loss


def _real_tokens(batch: Batch) -> Tensor:
    """Return 1 for each token that is neither padding nor in a row without pairs: `[tokens]`."""
    rows = ops.cast(ops.any(batch["weight"] > 0, axis=-1), "float32")[:, None, None]
    return ops.reshape(rows * ops.cast(batch["padding_mask"], "float32"), (-1,))


def _router_statistics(logits: Tensor, settings: RouterSettings, real: Tensor) -> Tensor:
    probabilities = ops.softmax(ops.cast(logits, "float32"), axis=-1)
    _, chosen = ops.top_k(probabilities, k=settings.top_k)
    experts = settings.experts
    choices = ops.sum(ops.one_hot(chosen, experts, dtype="float32"), axis=1)
    weight = settings.coefficient * experts * settings.top_k
    return ops.stack(
        [
            ops.stop_gradient(ops.sum(real[:, None] * choices, axis=0)),
            weight * ops.sum(real[:, None] * probabilities, axis=0),
        ]
    )


def auxiliary_loss(
    collected: list[Tensor], all_reduce: Callable[[Tensor], Tensor], replicas: int
) -> Tensor:
    """Return this replica's share of the losses that layers added; the shares add up to them.

    Losses of layers that are no routers are averaged over replicas, as Keras does.
    """
    share = ops.zeros((), "float32")
    for value in collected:
        if len(value.shape) == 0:
            share = share + value / replicas
            continue
        choices = all_reduce(ops.stop_gradient(value[0]))
        # There are top_k choices for each token, which the weight of the probabilities undoes.
        total = ops.maximum(ops.sum(choices), 1.0)
        share = share + ops.sum(choices / total * value[1] / total)
    return share
