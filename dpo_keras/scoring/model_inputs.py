"""The inputs that a model declares, for rows of text.

Most language models take token ids and a padding mask. Some take more: positions, an image before
every text, or places for images that a text does not have. What follows is what KerasHub's own
preprocessors make of a text without images, so that a preset with a vision encoder trains on texts.

A model that needs an image with every text (PaliGemma, BLIP-2) gets a blank one: zeros, which its
preprocessor makes of mid-grey.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeAlias

import keras
from keras import ops

from dpo_keras.batching.image_preprocessing import IMAGE_KEYS
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.layer_overrides import Call, Override, overridden_methods, window_overrides
from dpo_keras.scoring.patch_images import patch_overrides
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_families import (
    drafts_for_another_model,
    image_encoder,
    media_encoders,
    reversed_embedding,
)

Inputs: TypeAlias = dict[str, Tensor]

_IDS, _MASK = "token_ids", "padding_mask"
# What is as long as the token ids: 1 where a token stands for a part of an image or a sound.
_MEDIA_MASKS = {"vision_mask", "audio_mask"}
# Images, sounds and their places; dimension 1 counts them.
_MEDIA = {
    "audio_indices",
    "audio_mel",
    "audio_mel_mask",
    "image_grid_thw",
    "images",
    "input_features",
    "input_features_mask",
    "pixel_position_ids",
    "pixel_values",
    "vision_indices",
}
_KNOWN = {_IDS, _MASK, "position_ids", "response_mask", *_MEDIA_MASKS, *_MEDIA}
_IMAGE_DIMENSIONS = 4  # batch, height, width, channels: no dimension counts the images


class TextRows(NamedTuple):
    """Rows of text, each `[rows, length]`."""

    token_ids: Tensor
    padding_mask: Tensor
    positions: Tensor | None = None  # int32; None counts from the start of the row
    response: Tensor | None = None  # int32, 1 for tokens of a response; None for none


def check_inputs(model: object) -> None:
    """Check that `model_inputs` can give a model what it declares.

    Args:
        model: the model. A subclassed one shows its inputs only when it is called, and passes.

    Raises:
        InputError: a further input, or a model that has no log-probs of its own.
    """
    name = type(model).__name__
    if drafts_for_another_model(model):
        rule = (
            f"must have log-probs of its own; {name} drafts tokens from the hidden states of "
            "the model it belongs to"
        )
        raise InputError(InputProblem("policy", rule, hint="Train the model that it drafts for."))
    structure = getattr(model, "input", None) if getattr(model, "inputs", None) else None
    declared = declared_inputs(model)
    if structure is None or (declared.keys() >= {_IDS, _MASK} and declared.keys() <= _KNOWN):
        return
    names = sorted(declared) or [tensor.name for tensor in keras.tree.flatten(structure)]
    unknown = [name for name in names if name not in _KNOWN]
    rule = "must take a dict of 'token_ids' and 'padding_mask' and return logits; this "
    rule += f"{name} takes {names}"
    rule += f", and dpo_keras cannot make {', '.join(map(repr, unknown))}" if unknown else ""
    hint = (
        "Give a model of those two that makes the rest: keras.Model({'token_ids': ids, "
        "'padding_mask': mask}, policy(…)), where ids = keras.Input((None,), dtype='int32', "
        "name='token_ids'), mask likewise, and further inputs are computed from them."
    )
    raise InputError(InputProblem("policy", rule, hint=hint))


def declared_inputs(model: object) -> dict[str, keras.KerasTensor]:
    """Return a model's symbolic inputs by name; {} where it shows no dict of them."""
    structure = getattr(model, "input", None) if getattr(model, "inputs", None) else None
    return dict(structure) if isinstance(structure, dict) else {}


def model_inputs(
    model: object, text: TextRows, given: Mapping[str, Tensor] | None = None
) -> Inputs:
    """Return what a model declares, for rows of text: the argument of its call.

    Args:
        model: a model that passes `check_inputs`.
        text: the rows.
        given: inputs by name that take the place of what would be made, such as images.

    Returns:
        The inputs by name: token ids and mask, and
        `position_ids`: the rows' positions;
        `response_mask`: 1 for tokens of the response, which alone do not look ahead;
        masks of image and audio tokens: zeros;
        images, audio and their places: none, or one blank image where each text must have one.
    """
    declared = declared_inputs(model)
    inputs = {_IDS: text.token_ids, _MASK: text.padding_mask}
    for name, symbolic in declared.items():
        if name not in inputs:
            inputs[name] = _made(name, symbolic, text)
    return {**inputs, **{name: value for name, value in (given or {}).items() if name in declared}}


def _made(name: str, symbolic: keras.KerasTensor, text: TextRows) -> Tensor:
    token_ids = text.token_ids
    if name == "position_ids":
        if text.positions is not None:
            return text.positions
        # Not ops.arange: the length may be unknown while tracing.
        return ops.cumsum(ops.ones_like(token_ids, dtype="int32"), axis=1) - 1
    if name == "response_mask" and text.response is not None:
        return text.response
    if name == "response_mask" or name in _MEDIA_MASKS:
        return ops.zeros_like(token_ids, dtype=symbolic.dtype)
    shape = [size or 1 for size in symbolic.shape[1:]]
    if not needs_image(name, symbolic):
        shape[0] = 0
    return ops.zeros((ops.shape(token_ids)[0], *shape), symbolic.dtype)


def needs_image(name: str, symbolic: keras.KerasTensor) -> bool:
    """Tell whether an input is one image for each row, which cannot be left out."""
    return name == "images" and len(symbolic.shape) == _IMAGE_DIMENSIONS


def blank_images(model: object, token_ids: Tensor) -> Inputs:
    """Return the blank images of a model that needs one for each row; {} for any other model."""
    text = TextRows(token_ids, token_ids)
    images = [pair for pair in declared_inputs(model).items() if needs_image(*pair)]
    return {name: _made(name, symbolic, text) for name, symbolic in images}


def text_overrides(model: keras.Model, given: Mapping[str, Tensor] | None = None) -> list[Override]:
    """Leave out a model's encoders of images and sounds while rows of text run through it.

    No images then cost no time, and the weights of the encoders have no gradient. With a gradient
    of zeros, weight decay would shrink them.

    Args:
        model: a KerasHub backbone, or a model with one.
        given: the images and sounds that the rows have.
    """
    overrides = []
    for encoder, interleave, inputs in media_encoders(getattr(model, "backbone", model)):
        if not inputs & set(given or ()):
            overrides.append(Override(encoder, "call", _no_embeddings))
            overrides.append(Override(interleave, "call", _text_alone))
    return overrides


def _no_embeddings(*_: object, **__: object) -> Tensor:
    return ops.zeros((0,))


def _text_alone(*_: object, text_embeddings: Tensor, **__: object) -> Tensor:
    return text_embeddings


def check_images(model: object, names: Collection[str]) -> None:
    """Check that a model takes the images of batches with these keys.

    Raises:
        InputError: it reads no images, or other ones.
    """
    given, declared = set(IMAGE_KEYS) & set(names), declared_inputs(model)
    if "image_grid_thw" in given:
        given.discard("vision_mask")  # `patch_overrides` reads it
    if not given <= declared.keys():
        rule = (
            f"need a policy with a vision encoder, and {type(model).__name__} takes "
            f"{sorted(declared)}"
        )
        hint = "Load a preset that has one, or leave the column out."
        raise InputError(InputProblem("images", rule, hint=hint))


def image_inputs(model: object, batch: Mapping[str, Tensor]) -> Inputs:
    """Return the images of a batch as a model takes them: places for each sequence, images once.

    `image_overrides` gives both sequences of a row the states of its images.

    Raises:
        InputError: the model reads no images.
    """
    check_images(model, batch)
    given = {name: ops.convert_to_tensor(batch[name]) for name in IMAGE_KEYS if name in batch}
    sequences = batch[_IDS].shape[1]
    return {
        name: ops.repeat(value, sequences, axis=0) if name.startswith("vision_") else value
        for name, value in given.items()
    }


def image_overrides(model: object, batch: Mapping[str, Tensor]) -> list[Override]:
    """Encode the images of each row once, and repeat their states for each of its sequences."""
    if "image_grid_thw" in batch:
        return patch_overrides(model, batch)
    encoder = image_encoder(getattr(model, "backbone", model))
    sequences = batch[_IDS].shape[1]
    if encoder is None or not any(name in batch for name in IMAGE_KEYS):
        return []
    encode = encoder.call
    rows = ops.shape(batch[_IDS])[0]

    def repeated(*inputs: Tensor, **options: object) -> Tensor:
        states = encode(*inputs, **options)
        by_row = ops.reshape(states, (rows, -1, *states.shape[1:]))
        both = ops.repeat(by_row, sequences, axis=0)
        return ops.reshape(both, (-1, *states.shape[1:]))

    overrides = [Override(encoder, "call", repeated)]
    for found, interleave, _ in media_encoders(getattr(model, "backbone", model)):
        if found is encoder:
            overrides.append(Override(interleave, "call", _rows_apart(interleave.call)))
    return overrides


def _rows_apart(interleave: Call) -> Call:
    """Guard the layer that puts images among tokens against a fault of `keras.ops.add`.

    On TensorFlow, Keras 3.15 takes a column `[n, 1]` for a bias over the last dimension of an
    `[n, n]` tensor. KerasHub adds such a column to the places of images: where there are as many
    sequences as image tokens, images would land in other sequences.
    """

    def guarded(
        *, image_embeddings: Tensor, text_embeddings: Tensor, vision_indices: Tensor
    ) -> Tensor:
        count, tokens = vision_indices.shape
        values = image_embeddings, text_embeddings, vision_indices
        names = "image_embeddings", "text_embeddings", "vision_indices"
        if count != tokens or count == 1:
            return interleave(**dict(zip(names, values, strict=True)))
        cuts = image_embeddings.shape[0] // count, 1, 1
        parts = [
            [value[:cut] for value, cut in zip(values, cuts, strict=True)],
            [value[cut:] for value, cut in zip(values, cuts, strict=True)],
        ]
        apart = [interleave(**dict(zip(names, part, strict=True))) for part in parts]
        return ops.concatenate(apart, axis=0)

    return guarded


def full_logits(model: keras.Model, text: TextRows) -> Tensor:
    """Compute a model's logits `[rows, length, vocabulary]` of rows of text, in inference."""
    head = reversed_embedding(model)
    body = model if head is None else model.backbone
    with overridden_methods([*text_overrides(model), *window_overrides(model)]):
        states = body(model_inputs(body, text), training=False)
    if head is None:
        return states
    logits = ops.matmul(states, ops.transpose(head.embedding.embeddings))
    return logits if head.soft_cap is None else head.soft_cap * ops.tanh(logits / head.soft_cap)


def response_mask(source: Tensor, owner: Tensor, padding_mask: Tensor) -> Tensor:
    """Mark the tokens of responses in sequences that hold one prompt and one response each.

    Args:
        source: int32 `[rows, slots]`, as in `Batch`.
        owner: int32 `[rows, slots]`, as in `Batch`.
        padding_mask: int32 `[rows, sequences, length]`.

    Returns:
        int32 `[rows * sequences, length]`, 1 for each token behind the first predicting place.
    """
    _, sequences, length = ops.shape(padding_mask)
    column = ops.arange(sequences, dtype="int32")[None, :, None]
    mine = ops.logical_and(owner[:, None] >= 0, source[:, None] // length == column)
    first = ops.min(ops.where(mine, source[:, None] % length, length), axis=-1)
    place = ops.arange(length, dtype="int32")
    behind = ops.cast(place[None, None] > first[..., None], "int32")
    return ops.reshape(behind * ops.cast(padding_mask, "int32"), (-1, length))
