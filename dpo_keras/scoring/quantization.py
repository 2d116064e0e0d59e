"""Quantize a policy's kernels, to train adapters on top of them: QLoRA (arXiv 2305.14314)."""

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import keras
import numpy as np
from keras import ops

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.lora import adapted_layers
from dpo_keras.utils.keras_hub_internals import ROUTERS, transformer_blocks
from dpo_keras.utils.keras_internals import all_layers, layers_by_path
from dpo_keras.utils.keras_quantization import (
    DENSE,
    copy_in_floating_point,
    float_dtype,
    quantization_mode,
    quantizes_inputs,
    store_gptq_as_int4,
    takes_gptq,
)

Mode = Literal["int8", "int4", "gptq"]
MODES = get_args(Mode)


def quantize(
    policy: keras.Model,
    mode: Mode,
    texts: Iterable[str] | None = None,
    *,
    group_size: int = 128,
    samples: int = 128,
    sequence_length: int = 512,
) -> None:
    """Quantize the kernels of a policy's transformer blocks in place.

    The token embedding, the head, norms and biases stay as they are. A kernel is kept in 8 or 4
    bits, and is multiplied as numbers of the policy's own dtype, one layer at a time; what it is
    multiplied with is not rounded. Quantized kernels do not train: add LoRA afterwards.

    Args:
        policy: a KerasHub causal language model, before LoRA.
        mode: `"int8"` (a scale for each output), `"int4"` (a scale and a zero point for each
            `group_size` inputs of an output), or `"gptq"` (the same, with values chosen so that
            outputs on `texts` change least, arXiv 2210.17323).
        texts: what "gptq" calibrates on, such as the training pairs' chosen responses. They are
            cut by the policy's own tokenizer.
        group_size: inputs that share a scale, of "int4" and "gptq".
        samples: sequences that "gptq" calibrates on; few texts are repeated.
        sequence_length: tokens of each of those sequences.

    Raises:
        InputError: an unknown mode, a model without transformer blocks of dense layers, a policy
            with adapters or quantized already, or "gptq" without texts.

    Example:
        >>> import keras_hub, dpo_keras
        >>> policy = keras_hub.models.LlamaCausalLM(keras_hub.models.LlamaBackbone(
        ...     vocabulary_size=64, num_layers=1, num_query_heads=2, num_key_value_heads=1,
        ...     hidden_dim=8, intermediate_dim=16))
        >>> dpo_keras.quantize(policy, "int4")
        >>> policy.backbone.enable_lora(4)
        >>> dpo_keras.DPOModel(policy).reference.mode
        'adapters_off'

    References:
        Dettmers et al., QLoRA, arXiv 2305.14314.
    """
    layers = _checked_layers(policy, mode, texts, group_size)
    if mode == "gptq":
        assert texts is not None
        _calibrate(policy, layers, texts, group_size, samples, sequence_length)
        layers = [layer for layer in layers if not takes_gptq(layer)]
    if mode == "int8":
        # By default Keras rounds inputs as well, where its gradient and packed rows are not exact.
        config = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
    else:
        config = keras.quantizers.Int4QuantizationConfig(block_size=group_size)
    for layer in layers:
        layer.quantize(config.mode, config=config)
    # Functions that were traced before have the old kernels in them.
    for name in ("generate_function", "train_function", "test_function", "predict_function"):
        setattr(policy, name, None)


def _checked_layers(
    policy: keras.Model, mode: str, texts: Iterable[str] | None, group_size: int
) -> list[keras.layers.Layer]:
    """Return the layers to quantize, or raise InputError."""
    if mode not in MODES:
        raise InputError(InputProblem("mode", f"must be one of {', '.join(MODES)}", mode))
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise InputError(InputProblem("group_size", "must be >= 1", group_size))
    if adapted_layers(policy):
        hint = "Call dpo_keras.quantize first, then policy.backbone.enable_lora."
        raise InputError(InputProblem("policy", "has LoRA adapters already", hint=hint))
    if any(quantization_mode(layer) is not None for layer in all_layers(policy)):
        hint = "Load it again to quantize it in another way."
        raise InputError(InputProblem("policy", "is quantized already", hint=hint))
    # Rounded scores would send tokens to other experts.
    routers = {id(layer) for path, layer in layers_by_path(policy).items() if ROUTERS.search(path)}
    found = [
        layer
        for block in transformer_blocks(getattr(policy, "backbone", None))
        for layer in all_layers(block)
        if type(layer) in DENSE and layer.built and id(layer) not in routers
    ]
    if not found:
        rule = f"must have transformer blocks of dense layers; {type(policy).__name__} shows none"
        raise InputError(InputProblem("policy", rule))
    _check_can_be_saved(policy, found)
    if mode == "gptq" and texts is None:
        hint = "Give some hundred texts of the kind that the policy will read and write."
        raise InputError(InputProblem("texts", "are needed by gptq", hint=hint))
    if mode != "gptq" and texts is not None:
        raise InputError(InputProblem("texts", f"have no effect with {mode}", hint="Leave it out."))
    return list(dict.fromkeys(found))


def _check_can_be_saved(policy: keras.Model, layers: list[keras.layers.Layer]) -> None:
    """Refuse a model whose configuration does not say which layer is quantized."""
    name = type(policy.backbone).__name__
    reason = None
    if len({layer.path for layer in layers}) < len({id(layer) for layer in layers}):
        reason = f"KerasHub gives layers of {name} one path"
    elif hasattr(policy.backbone, "qformer"):
        reason = f"KerasHub leaves the dtypes of its layers out of {name}'s configuration"
    if reason is not None:
        rule = f"cannot be saved once it is quantized: {reason}"
        raise InputError(InputProblem("policy", rule, hint="Train it without quantization."))


def _calibrate(
    policy: keras.Model,
    layers: list[keras.layers.Layer],
    texts: Iterable[str],
    group_size: int,
    samples: int,
    sequence_length: int,
) -> None:
    """Quantize by GPTQ what Keras calibrates right, and keep it in the layout of int4."""
    tokenizer = getattr(getattr(policy, "preprocessor", None), "tokenizer", None)
    if tokenizer is None:
        hint = "Load the policy with its preprocessor."
        raise InputError(InputProblem("policy", "needs a tokenizer for gptq", hint=hint))
    texts = [text for text in texts if text]
    if not texts:
        raise InputError(InputProblem("texts", "must hold at least one that is not empty"))
    longest = getattr(policy.backbone, "max_sequence_length", None)
    calibrated = [layer for layer in layers if takes_gptq(layer)]
    structure = policy.get_quantization_layer_structure("gptq")
    if structure is None or not calibrated:
        rule = f"has no layers that Keras calibrates: {type(policy).__name__}"
        raise InputError(InputProblem("policy", rule, hint="Use mode='int4'."))
    windows = iter(_windows(tokenizer, texts, samples, min(sequence_length, longest or 2**31)))
    # Keras 3.15 draws windows by the hash of a string, which is another in each process: its own
    # choice (of nothing but zeros) is put aside for ours.
    before = [
        lambda _: ops.convert_to_tensor(next(windows), "int32"),
        *structure["pre_block_layers"],
    ]
    config = keras.quantizers.GPTQConfig(
        dataset=[np.zeros(2, "int32")],
        tokenizer=tokenizer,
        weight_bits=4,
        group_size=group_size,
        num_samples=samples,
        sequence_length=2,
        quantization_layer_structure={**structure, "pre_block_layers": before},
    )
    chosen = {id(layer) for layer in calibrated}
    options: dict[str, Any] = {"filters": lambda layer: id(layer) in chosen}
    with contextlib.redirect_stdout(io.StringIO()):  # Keras' own progress bar
        policy.backbone.quantize("gptq", config=config, **options)
    for layer in calibrated:
        store_gptq_as_int4(layer)


def _windows(
    tokenizer: Any, texts: Sequence[str], samples: int, length: int
) -> Iterator[np.ndarray]:
    """Yield `[1, length]` tokens, `samples` times, at equal distances in the joined texts."""
    rows = [np.asarray(ops.convert_to_numpy(tokenizer.tokenize([text])[0])) for text in texts]
    tokens = np.concatenate(rows).astype("int32").reshape(-1)
    tokens = np.tile(tokens, -(-length // tokens.size))
    for start in np.linspace(0, tokens.size - length, samples).astype(int):
        yield tokens[None, start : start + length]


def dequantized(policy: keras.Model) -> keras.Model:
    """Return a policy of the same numbers in floating point, adapters merged.

    Keras rounds a quantized kernel anew where it merges adapters, and the policy becomes another.
    A policy without quantized layers is returned as it is.
    """
    layers = all_layers(policy)
    if not any(map(quantization_mode, layers)):
        return policy
    config = keras.saving.serialize_keras_object(policy.backbone)["config"]
    if any(quantizes_inputs(layer) for layer in layers):
        warnings.warn(
            "the quantized policy rounds its inputs, too, which a model in floating point does "
            "not: its log-probs differ by that rounding.",
            UserWarning,
            stacklevel=2,
        )
    config["dtype"] = float_dtype(policy.backbone)
    backbone = type(policy.backbone).from_config(config)
    copy = type(policy)(backbone=backbone, preprocessor=policy.preprocessor)
    for layer, target in zip(all_layers(policy.backbone), all_layers(backbone), strict=True):
        copy_in_floating_point(layer, target)
    return copy
