"""Qwen 3.5's images in a graph: encoder, places among the tokens, and positions.

KerasHub computes all of it in Python from the sizes of the images, and gives positions in images to
its layers in generation only. These compute the same from tensors. The images of a row are one
sequence of patches, behind which there may be padding; a square of patches becomes one token.
"""

from collections.abc import Mapping

import keras
from keras import ops

from dpo_keras.scoring.layer_overrides import Call, Override
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_families import patch_encoder, rotary_attention_layers


def patch_overrides(model: keras.Model, batch: Mapping[str, Tensor]) -> list[Override]:
    """Encode the images of each row once, and place them in each of its sequences.

    Args:
        model: a KerasHub backbone, or a model with one; one without such an encoder has none.
        batch: with `pixel_values`, `image_grid_thw` and `vision_mask`, see `Batch`.
    """
    found = patch_encoder(getattr(model, "backbone", model))
    if found is None:
        return []
    encoder, sequences = found.encoder, batch["token_ids"].shape[1]
    mask, grid = (ops.convert_to_tensor(batch[n]) for n in ("vision_mask", "image_grid_thw"))
    positions = rotary_positions(mask, grid, encoder.spatial_merge_size)
    positions = ops.repeat(positions, sequences, axis=0)
    overrides = [
        Override(encoder, "call", _encoder(encoder)),
        Override(found.interleave, "call", _interleave(mask, sequences)),
    ]
    overrides += [Override(b.attn, "call", _vision_attention(b.attn)) for b in encoder.blocks]
    overrides += [
        Override(layer, "call", _placed(layer.call, positions))
        for layer in rotary_attention_layers(model)
    ]
    return overrides


def rotary_positions(mask: Tensor, grid: Tensor, merge: int) -> Tensor:
    """Return the positions of M-RoPE (Wang et al., arXiv 2409.12191).

    A token of text has the same position on every axis. The tokens of an image begin at the
    position b that a token of text would have: (b, b + row, b + column). Text goes on behind the
    larger of the image's sides.

    Args:
        mask: int32 `[rows, length]`, 1 for tokens of images.
        grid: int32 `[rows, images, 3]`, as in `Batch`.
        merge: patches along a side of a token's square.

    Returns:
        int32 `[rows, 4, length]`: text, time, height and width.
    """
    down, across = grid[..., 1] // merge, grid[..., 2] // merge
    seen = ops.cumsum(mask, axis=1) - mask  # tokens of images before each token
    inside, local = _image_of(seen, down * across)
    ended = seen[..., None] >= ops.cumsum(down * across, axis=1)[:, None]
    sides = ops.sum(ops.where(ended, ops.maximum(down, across)[:, None], 0), axis=-1)
    place = ops.cumsum(ops.ones_like(mask), axis=1) - 1
    base = place - seen + sides
    columns = ops.maximum(_own(inside, across), 1)
    height, width = base + mask * (local // columns), base + mask * (local % columns)
    return ops.stack([base, base, height, width], axis=1)


def _image_of(places: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Find the image that each place of a row is in, given the sizes `[rows, images]`.

    Returns:
        Bool `[rows, places, images]`, all False behind the last image; and each place's number in
        its image, 0 there.
    """
    ends = ops.cumsum(sizes, axis=1)[:, None]
    starts = ends - sizes[:, None]
    inside = ops.logical_and(places[..., None] >= starts, places[..., None] < ends)
    return inside, ops.sum(ops.where(inside, places[..., None] - starts, 0), axis=-1)


def _own(inside: Tensor, values: Tensor) -> Tensor:
    """Return for each place the value `[rows, images]` of its image; 0 behind the last."""
    return ops.sum(ops.where(inside, values[:, None], 0), axis=-1)


def _placed(call: Call, positions: Tensor) -> Call:
    def placed(*arguments: object, **options: object) -> Tensor:
        return call(*arguments, **{**options, "position_ids": positions})

    return placed


def _interleave(mask: Tensor, sequences: int) -> Call:
    def interleave(*, image_embeddings: Tensor, text_embeddings: Tensor, **_: object) -> Tensor:
        rows, tokens, width = ops.shape(image_embeddings)
        number = ops.maximum(ops.cumsum(mask, axis=1) - 1, 0)
        first = ops.arange(rows, dtype="int32")[:, None] * tokens
        flat = ops.reshape(image_embeddings, (-1, width))
        states = ops.repeat(ops.take(flat, first + number, axis=0), sequences, axis=0)
        return ops.where(
            ops.repeat(mask, sequences, axis=0)[..., None] == 1, states, text_embeddings
        )

    return interleave


def _encoder(encoder: keras.Model) -> Call:
    """Return the encoder's `call` for rows of images, each `[rows, patches, …]`."""

    def encode(pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        rows, patches, *patch = ops.shape(pixel_values)
        merge, width = encoder.spatial_merge_size, encoder.hidden_size
        states = encoder.patch_embed(ops.reshape(pixel_values, (-1, *patch)))
        states = ops.reshape(states, (rows, patches, width))

        down, across = grid_thw[..., 1], grid_thw[..., 2]
        places = ops.broadcast_to(ops.arange(patches, dtype="int32")[None], (rows, patches))
        inside, local = _image_of(places, down * across)
        height, columns = (ops.maximum(_own(inside, sides), merge) for sides in (down, across))
        # Patches follow each other square by square.
        square, rest = local // merge**2, local % merge**2
        row = square // (columns // merge) * merge + rest // merge
        column = square % (columns // merge) * merge + rest % merge

        states += _learned_positions(encoder, (row, height), (column, columns))
        rotary = _rotary(encoder, row, column)
        image = ops.sum(ops.cast(inside, "int32") * _numbers(inside), axis=-1)  # 0 for padding
        for block in encoder.blocks:
            states = block(states, rotary, image)
        merged = encoder.merger(ops.reshape(states, (-1, width)))
        return ops.reshape(merged, (rows, -1, encoder.out_hidden_size))

    return encode


def _numbers(inside: Tensor) -> Tensor:
    return ops.arange(1, inside.shape[-1] + 1, dtype="int32")


def _learned_positions(
    encoder: keras.Model, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]
) -> Tensor:
    """Interpolate the table of positions, of one grid, between its four nearest entries.

    `rows` and `columns` are each patch's place and the number of places, `[rows, patches]`.
    """
    side = encoder.num_grid_per_side
    corners = []
    for place, count in (rows, columns):
        exact = (
            ops.cast(place, "float32") * (side - 1) / ops.cast(ops.maximum(count - 1, 1), "float32")
        )
        before = ops.floor(exact)
        first = ops.cast(before, "int32")
        share = exact - before
        corners.append([(first, 1 - share), (ops.minimum(first + 1, side - 1), share)])
    return sum(
        encoder.pos_embed(row * side + column) * (row_share * column_share)[..., None]
        for row, row_share in corners[0]
        for column, column_share in corners[1]
    )


def _rotary(encoder: keras.Model, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of each patch's angles, `[rows, patches, head size]`."""
    frequencies = encoder.rotary_pos_emb.get_freq_table(2)[1]
    angles = [ops.cast(place, "float32")[..., None] * frequencies for place in (row, column)]
    angles = ops.concatenate([*angles, *angles], axis=-1)
    return ops.cos(angles), ops.sin(angles)


def _vision_attention(layer: keras.layers.Layer) -> Call:
    """Return a layer's `call` for `[rows, patches, width]`; patches see those of their image."""

    def attend(states: Tensor, rotary: tuple[Tensor, Tensor], image: Tensor) -> Tensor:
        rows, patches, width = ops.shape(states)
        shape = (rows, patches, 3, layer.num_heads, layer.head_dim)
        query, key, value = ops.unstack(ops.reshape(layer.qkv(states), shape), axis=2)
        query, key = _rotated(query, rotary), _rotated(key, rotary)
        mask = image[:, None, :, None] == image[:, None, None, :]
        attended = ops.dot_product_attention(query, key, value, mask=mask)
        return layer.proj(ops.reshape(attended, (rows, patches, width)))

    return attend


def _rotated(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = (value[:, :, None] for value in rotary)
    half = states.shape[-1] // 2
    turned = ops.concatenate([-states[..., half:], states[..., :half]], axis=-1)
    return states * cosine + turned * sine
