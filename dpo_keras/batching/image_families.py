"""How the preprocessor of each family reads images."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from dpo_keras.batching.image_patches import PatchPreprocessor
from dpo_keras.batching.image_preprocessing import ImagePreprocessor
from dpo_keras.errors import InputError, InputProblem


def image_preprocessor(preprocessor: object) -> ImagePreprocessor:
    """Return how a KerasHub preprocessor reads images.

    Raises:
        InputError: it reads none, or dpo_keras cannot train on what it makes of them.
    """
    names = {kind.__name__ for kind in type(preprocessor).__mro__}
    family: Any = preprocessor
    converter = getattr(preprocessor, "image_converter", None)
    own = type(preprocessor).__name__
    rule = None
    if converter is None:
        rule = f"need a preset with a vision encoder; {own} has no image converter"
    elif not names & _FAMILIES.keys():
        rule = f"are read for {', '.join(sorted(_FAMILIES))}, got {own}"
    if rule is not None:
        hint = "Leave the column out, or take another model."
        raise InputError(InputProblem("images", rule, hint=hint))
    assert converter is not None
    # Keras numbers the layers of a process by their names.
    settings = {name: value for name, value in converter.get_config().items() if name != "name"}
    make = next(_FAMILIES[name] for name in sorted(names & _FAMILIES.keys()))
    return make(family, f"{own} {json.dumps(settings, sort_keys=True, default=str)}")


def _gemma3(preprocessor: Any, key: str) -> ImagePreprocessor:
    placeholders = preprocessor.image_placeholder * preprocessor.num_vision_tokens_per_image
    start, end = preprocessor.start_of_image_token, preprocessor.end_of_image_token
    return ImagePreprocessor(
        expansion=f"\n\n{start}{placeholders}{end}\n\n",
        written=(start,),
        placeholder=preprocessor.tokenizer.image_placeholder_id,
        tokens=preprocessor.num_vision_tokens_per_image,
        limit=preprocessor.max_images_per_prompt,
        key=f"{key} {preprocessor.num_vision_tokens_per_image}",
        _convert=lambda image: {"images": _one(preprocessor.image_converter(image[None]))},
    )


def _gemma4(preprocessor: Any, key: str) -> ImagePreprocessor:
    mark = preprocessor.image_placeholder
    placeholders = mark * preprocessor.num_vision_tokens_per_image

    def convert(image: np.ndarray) -> dict[str, np.ndarray]:
        # Not __call__: KerasHub's own preprocessor calls `call` too.
        made = preprocessor.image_converter.call(image[None])
        return {name: _one(made[name]) for name in ("pixel_values", "pixel_position_ids")}

    return ImagePreprocessor(
        expansion=f"{preprocessor.start_of_image_token}{placeholders}"
        f"{preprocessor.end_of_image_token}",
        written=(mark,),
        placeholder=preprocessor.tokenizer.image_placeholder_id,
        tokens=preprocessor.num_vision_tokens_per_image,
        limit=preprocessor.max_images_per_prompt,
        key=f"{key} {preprocessor.num_vision_tokens_per_image}",
        _convert=convert,
    )


def _pali_gemma(preprocessor: Any, key: str) -> ImagePreprocessor:
    return ImagePreprocessor(
        expansion="",
        written=(),
        placeholder=None,
        tokens=0,
        limit=1,
        key=key,
        _convert=lambda image: {"images": _one(preprocessor.image_converter(image[None]))},
    )


_QWEN_MARKS = ("vision_start", "vision_end", "image")


def _qwen3_5(preprocessor: Any, key: str) -> ImagePreprocessor:
    tokenizer, converter = preprocessor.tokenizer, preprocessor.image_converter
    if preprocessor.image_token_id is None:
        rule = f"need a tokenizer with image tokens; this {type(tokenizer).__name__} has none"
        raise InputError(InputProblem("images", rule, hint="Make it with has_vision_tokens=True."))
    start, end, mark = (getattr(tokenizer, f"{n}_token") for n in _QWEN_MARKS)

    def convert(image: np.ndarray) -> dict[str, np.ndarray]:
        made = converter(image)
        return {name: np.asarray(made[name]) for name in ("patches", "grid_thw")}

    return PatchPreprocessor(
        expansion=f"{start}{mark}{end}",
        written=(f"{start}{mark}{end}", mark),
        placeholder=preprocessor.image_token_id,
        tokens=0,  # depend on the image
        limit=None,
        key=key,
        _convert=convert,
        mark=mark,
        converter=converter,
    )


_FAMILIES: dict[str, Callable[[Any, str], ImagePreprocessor]] = {
    "Gemma3CausalLMPreprocessor": _gemma3,
    "Gemma4CausalLMPreprocessor": _gemma4,
    "PaliGemmaCausalLMPreprocessor": _pali_gemma,
    "Qwen3_5CausalLMPreprocessor": _qwen3_5,
}


def _one(values: Any) -> np.ndarray:
    return np.asarray(values)[0]
