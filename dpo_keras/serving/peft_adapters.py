"""LoRA adapters of a KerasHub policy in the format of Hugging Face's `peft`.

Keras multiplies a kernel of several axes, [inputs, heads, width] for queries, along its last axis
only: every head has its own A and all share one B. PEFT multiplies matrices. The same product as
two matrices has rank heads x r, with B repeated along a block diagonal; no number is rounded.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.lora import adapted_layers, adapter_variables
from dpo_keras.serving.hugging_face_names import Family, Weights, kernel_axes
from dpo_keras.utils import JSON
from dpo_keras.utils.keras_internals import all_layers


@dataclass(frozen=True)
class Adapter:
    """The adapter of one Hugging Face module: its weight changes by `alpha / rank * up @ down`."""

    down: np.ndarray  # [rank, inputs]
    up: np.ndarray  # [outputs, rank]
    alpha: float

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.down)

    def fitted(self) -> Adapter:
        """Return the same change with no more rank than the weight itself can have."""
        outputs, inputs = len(self.up), self.down.shape[1]
        if self.rank <= min(outputs, inputs):
            return self
        product = self.up @ self.down
        alpha = self.alpha / self.rank * min(outputs, inputs)
        down = product if outputs < inputs else np.eye(inputs, dtype=product.dtype)
        up = np.eye(outputs, dtype=product.dtype) if outputs < inputs else product
        return Adapter(down, up, alpha)


def peft_files(
    policy: keras.Model, family: Family, base: str | None
) -> tuple[dict[str, JSON], Weights]:
    """Return a policy's adapters as the content of adapter_config.json and its weights.

    Raises:
        InputError: there are no adapters, or some that PEFT cannot express.
    """
    adapted = adapted_layers(policy)
    if not adapted:
        rule = "has no LoRA adapters, which is all that format='peft' writes"
        raise InputError(InputProblem("model", rule, hint="Use format='transformers'."))
    adapters: dict[str, Adapter] = {}
    biases: Weights = {}
    known: set[int] = set()
    trained = _trained_beside(policy, adapted)
    for name, layers in family.block_layers(policy.backbone):
        if any(layer in adapted for layer in layers):
            adapters[name] = _joined(layers).fitted()
            known |= {id(layer) for layer in layers}
        parts = [getattr(layer, "bias", None) for layer in layers]
        if any(id(bias) in trained for bias in parts):
            biases[name] = np.concatenate([_array(bias).reshape(-1) for bias in parts])
            for bias in parts:
                trained.pop(id(bias), None)
    _check_expressible(policy, [layer for layer in adapted if id(layer) not in known], trained)
    weights = {f"{_PREFIX}{name}.lora_A.weight": found.down for name, found in adapters.items()}
    weights |= {f"{_PREFIX}{name}.lora_B.weight": found.up for name, found in adapters.items()}
    for name, bias in biases.items():
        base_layer = ".base_layer" if name in adapters else ""
        weights[f"{_PREFIX}{name}{base_layer}.bias"] = bias
    return _config(adapters, bool(biases), base, _modules(policy, family)), weights


_PREFIX = "base_model.model."


def _array(value: object) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(value)).astype("float32")


def _trained_beside(policy: keras.Model, adapted: list[keras.layers.Layer]) -> dict[int, str]:
    """Return the path of each trainable weight that is no adapter, by its identity."""
    own = {id(variable) for variable in adapter_variables(adapted)}
    return {id(v): v.path for v in policy.trainable_variables if id(v) not in own}


def _check_expressible(
    policy: keras.Model, left: list[keras.layers.Layer], trained: dict[int, str]
) -> None:
    """Refuse adapters and trained weights that have no place in PEFT's format."""
    hint = "Use format='transformers' or 'keras_hub', which write all weights, merged."
    if left:
        names = ", ".join(sorted({layer.path for layer in left})[:3])
        rule = f"has adapters that PEFT's format has no place for: {names}"
        raise InputError(InputProblem("model", rule, hint=hint))
    if trained:
        names = ", ".join(sorted(trained.values())[:3])
        rule = f"trains {len(trained)} weights beside its adapters ({names}): adapters are not all"
        raise InputError(InputProblem("model", rule, hint=hint))


def _joined(layers: list[keras.layers.Layer]) -> Adapter:
    """Return the adapter of one module, whose outputs are those of several layers, in order."""
    parts = [_factors(layer) for layer in layers]
    scales = {part.alpha / part.rank for part in parts if part.rank}
    down = np.concatenate([part.down for part in parts])
    up = np.zeros((sum(len(part.up) for part in parts), len(down)), down.dtype)
    row = column = 0
    for part in parts:
        # Different scales go into B; one scale stays what the configuration says.
        factor = part.alpha / part.rank if part.rank and len(scales) > 1 else 1.0
        up[row : row + len(part.up), column : column + part.rank] = factor * part.up
        row, column = row + len(part.up), column + part.rank
    scale = scales.pop() if len(scales) == 1 else 1.0
    return Adapter(down, up, scale * len(down))


def _factors(layer: keras.layers.Layer) -> Adapter:
    """Return a layer's adapter as two matrices, exactly; of rank 0 without LoRA."""
    inputs, outputs = kernel_axes(layer)
    if not getattr(layer, "lora_enabled", False):
        shape = layer.kernel.shape
        sizes = [math.prod(shape[axis] for axis in axes) for axes in (inputs, outputs)]
        return Adapter(np.zeros((0, sizes[0]), "float32"), np.zeros((sizes[1], 0), "float32"), 0.0)
    first, second = _array(layer.lora_kernel_a), _array(layer.lora_kernel_b)
    rank, last = len(second), first.ndim - 1
    if last in outputs:
        heads = outputs[:-1]
        repeats = math.prod(first.shape[axis] for axis in heads)
        down = first.transpose([*heads, last, *inputs]).reshape(repeats * rank, -1)
        up = np.kron(np.eye(repeats, dtype="float32"), second.T)
    else:
        heads = inputs[:-1]
        repeats = math.prod(first.shape[axis] for axis in heads)
        down = np.kron(np.eye(repeats, dtype="float32"), second)
        up = first.transpose([*outputs, *heads, last]).reshape(-1, repeats * rank)
    return Adapter(down, up, layer.lora_alpha / layer.lora_rank * repeats * rank)


def _modules(policy: keras.Model, family: Family) -> Counter[str]:
    """Count the modules of each last name, `q_proj`, in the whole model."""
    names = (name.rpartition(".")[2] for name, _ in family.block_layers(policy.backbone))
    dense = len(all_layers(policy.backbone)) if _sees(policy.backbone) else 0
    return Counter({name: count + dense for name, count in Counter(names).items()})


def _sees(backbone: keras.Model) -> bool:
    """Tell whether there are encoders, whose modules may have the same last names."""
    return any(getattr(backbone, f"{kind}_encoder", None) for kind in ("vision", "audio"))


def _config(
    adapters: dict[str, Adapter], biases: bool, base: str | None, modules: Counter[str]
) -> dict[str, JSON]:
    """Return the content of adapter_config.json, with short names where they are exact."""
    last = {name: name.rpartition(".")[2] for name in adapters}
    settings: dict[str, set[tuple[int, float]]] = {}
    for name, adapter in adapters.items():
        settings.setdefault(last[name], set()).add((adapter.rank, adapter.alpha))
    adapted = Counter(last.values())
    whole = {short for short, count in adapted.items() if count == modules[short]}
    short = {name: last[name] if last[name] in whole else name for name in adapters}
    key = {name: last[name] if len(settings[last[name]]) == 1 else name for name in adapters}
    rank = Counter(adapter.rank for adapter in adapters.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in adapters.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {key[n]: a.rank for n, a in adapters.items() if a.rank != rank},
        "alpha_pattern": {key[n]: a.alpha for n, a in adapters.items() if a.alpha != alpha},
        "target_modules": sorted(set(short.values())),
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "use_rslora": False,  # alpha above is the one that was trained with, whatever its rule
        "fan_in_fan_out": any(name.startswith("transformer.h.") for name in adapters),  # GPT-2
        "inference_mode": True,
    }
