"""LoRA as people configure it: which layers get adapters, of which rank and scale.

KerasHub calls the same projection by another name in each family. The names here are those of
Hugging Face's Llama, which PEFT's users type: `q_proj`, `o_proj`, `gate_proj`.
"""

import fnmatch
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import keras

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.lora import adapted_layers, adapter_variables
from dpo_keras.utils.keras_hub_internals import expert_kernels, remember_adapters
from dpo_keras.utils.keras_internals import layers_by_path
from dpo_keras.utils.text import did_you_mean

PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "q_proj": ("query", "query_dense", "q_proj", "receptance"),
    "k_proj": ("key", "key_dense", "k_proj"),
    "v_proj": ("value", "value_dense", "v_proj"),
    "qkv_proj": ("query_key_value", "in_proj_qkv"),
    "z_proj": ("in_proj_z",),  # the output gate of Qwen 3.5's linear attention
    "o_proj": ("attention_output", "output_dense", "o_proj", "output_layer", "out_proj"),
    "gate_proj": ("feedforward_gate_dense", "ffw_gating", "gate_proj"),
    "up_proj": (
        *("feedforward_intermediate_dense", "ffw_gating_2", "mlp_intermediate_dense", "up_proj"),
        *("dense_h_to_4h", "dense_k"),
    ),
    "down_proj": (
        *("feedforward_output_dense", "ffw_linear", "mlp_output_dense", "down_proj"),
        *("dense_4h_to_h", "dense_v"),
    ),
}
"""The names that KerasHub's families give to each projection of a transformer block."""

QUERY_VALUE = ("q_proj", "v_proj", "qkv_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "z_proj", "o_proj")
KEYWORDS: Mapping[str, tuple[str, ...]] = {"attention": ATTENTION, "all-linear": (*PROJECTIONS,)}

# Layers that read images or sound share the names of a language model's.
_OTHER_SENSES = re.compile(r"vision|_vit(_\d+)?/|image|audio|q_?former")

Layers = Mapping[str, keras.layers.Layer]


def enable_lora(
    policy: keras.Model,
    rank: int = 8,
    alpha: float | None = None,
    targets: str | Sequence[str] | None = None,
    scaling: Literal["standard", "rank_stabilized"] = "standard",
    bias: Literal["none", "lora_only"] = "none",
) -> None:
    """Add LoRA adapters to a policy, in place, and freeze everything else.

    An adapted layer multiplies by W + s A B, where A and B have `rank` columns and rows and B
    starts at zero. `reference="auto"` is then the base model, at no cost.

    Args:
        policy: a KerasHub causal language model, or any Keras model with `Dense` or `EinsumDense`
            layers, built.
        rank: of the adapters.
        alpha: the scale s is alpha / rank; None means alpha = rank.
        targets: the layers to adapt. None: the query and value projections, as KerasHub does.
            `"attention"`: query, key, value and output. `"all-linear"`: attention and
            feed-forward layers, never the head, the embeddings or a router of experts. Or names
            or `fnmatch` patterns of layers or of their paths in the backbone: `"query"`,
            `["q_proj", "gate_proj"]` (PEFT's names for the same layers),
            `"transformer_layer_1*/query"`.
        scaling: `"rank_stabilized"` makes the scale alpha / sqrt(rank).
        bias: `"lora_only"` trains the biases of adapted layers too.

    Raises:
        InputError: an argument that is out of range, a target that no layer has, or a policy that
            has adapters already.

    Example:
        >>> import keras_hub, dpo_keras
        >>> backbone = keras_hub.models.GPT2Backbone(
        ...     vocabulary_size=64, num_layers=1, num_heads=2, hidden_dim=8,
        ...     intermediate_dim=16, max_sequence_length=32)
        >>> policy = keras_hub.models.GPT2CausalLM(backbone)
        >>> dpo_keras.enable_lora(policy, rank=2, targets="attention")
        >>> len(policy.trainable_variables)  # A and B of query, key, value and output
        8

    References:
        Hu et al., LoRA, arXiv 2106.09685; Kalajdzievski, rank-stabilized LoRA, arXiv 2312.03732.
    """
    _check_arguments(rank, alpha, scaling, bias)
    if adapted_layers(policy):
        rule = "has LoRA adapters already"
        hint = "Enable them once, on a policy without adapters."
        raise InputError(InputProblem("policy", rule, hint=hint))
    root = getattr(policy, "backbone", policy)
    chosen = _matching_layers(root, targets)
    alpha = float(rank if alpha is None else alpha)
    if scaling == "rank_stabilized":  # Keras divides by the rank
        alpha *= math.sqrt(rank)
    try:
        for layer in chosen:
            layer.enable_lora(rank, lora_alpha=alpha)
    except (ValueError, NotImplementedError) as error:
        rule = f"cannot get adapters on {layer.name!r}: {error}"
        raise InputError(InputProblem("policy", rule)) from error
    _freeze_all_but_adapters(policy, chosen, bias)
    remember_adapters(root, chosen, rank)


def _check_arguments(rank: object, alpha: object, scaling: str, bias: str) -> None:
    problems = []
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        problems.append(InputProblem("rank", "must be a whole number >= 1", rank))
    if alpha is not None and not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
        problems.append(InputProblem("alpha", "must be > 0 and finite, or None", alpha))
    for name, value, allowed in (
        ("scaling", scaling, ("standard", "rank_stabilized")),
        ("bias", bias, ("none", "lora_only")),
    ):
        if value not in allowed:
            problems.append(InputProblem(name, f"must be one of {', '.join(allowed)}", value))
    if problems:
        raise InputError(problems)


def _matching_layers(
    root: keras.Model, targets: str | Sequence[str] | None
) -> list[keras.layers.Layer]:
    """Return the layers that targets name, in the order of the architecture."""
    layers = {path: layer for path, layer in layers_by_path(root).items() if _takes_lora(layer)}
    patterns = [targets] if isinstance(targets, str) else targets
    if patterns is None:
        found = _projections(layers, QUERY_VALUE)
        if not found:
            rule = f"must be given: no layer of {root.name} is known as a query or value projection"
            raise InputError(InputProblem("targets", rule, hint=_names(layers)))
        return list(found.values())
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        rule = 'must be "attention", "all-linear", or names or patterns of layers'
        raise InputError(InputProblem("targets", rule, targets))
    if "all-linear" in patterns and (experts := expert_kernels(root)):
        warnings.warn(
            f"targets 'all-linear': the experts of {root.name} get no adapters, since KerasHub "
            f"keeps them in one kernel per layer ({experts[0]}); every other projection gets them.",
            stacklevel=3,
        )
    found = {pattern: _matches(layers, pattern) for pattern in patterns}
    if missing := [pattern for pattern, matched in found.items() if not matched]:
        raise InputError([_nothing_matches(root, layers, pattern) for pattern in missing])
    wanted = {path for matched in found.values() for path in matched}
    return [layer for path, layer in layers.items() if path in wanted]


def _takes_lora(layer: keras.layers.Layer) -> bool:
    return layer.built and isinstance(layer, keras.layers.Dense | keras.layers.EinsumDense)


def _matches(layers: Layers, pattern: str) -> Layers:
    """Return the layers that one target names: a keyword, PEFT's name, or a pattern."""
    roles = KEYWORDS.get(pattern) or ((pattern,) if pattern in PROJECTIONS else ())
    named = {
        path: layer
        for path, layer in layers.items()
        if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(layer.name, pattern)
    }
    return {**named, **_projections(layers, roles)}


def _projections(layers: Layers, roles: Iterable[str]) -> Layers:
    """Return the projections of the language model's own blocks."""
    names = {name for role in roles for name in PROJECTIONS[role]}
    return {
        path: layer
        for path, layer in layers.items()
        if layer.name in names and "/" in path and not _OTHER_SENSES.search(path)
    }


def _nothing_matches(root: keras.Model, layers: Layers, pattern: str) -> InputProblem:
    rule = f"must match layers of {root.name} that take adapters (Dense, EinsumDense)"
    if any(fnmatch.fnmatchcase(kernel, f"*{pattern}*") for kernel in expert_kernels(root)):
        rule = "must not name experts: KerasHub keeps them in one kernel, which takes no adapters"
    known = [*KEYWORDS, *PROJECTIONS, *{layer.name for layer in layers.values()}]
    guess = did_you_mean(pattern, known).capitalize()
    hint = f"{guess} {_names(layers)}".strip()
    return InputProblem("targets", rule, pattern, hint)


def _names(layers: Layers) -> str:
    names = dict.fromkeys(layer.name for layer in layers.values())
    return f"Layers are {', '.join(names) or 'none'}."


def _freeze_all_but_adapters(
    policy: keras.Model, layers: list[keras.layers.Layer], bias: str
) -> None:
    # KerasHub's own `enable_lora` leaves the biases of adapted layers to be trained.
    policy.trainable = True
    trained = {id(variable) for variable in adapter_variables(layers)}
    if bias == "lora_only":
        trained |= {id(layer.bias) for layer in layers if layer.bias is not None}
    for variable in policy.variables:
        if id(variable) not in trained:
            variable.trainable = False
