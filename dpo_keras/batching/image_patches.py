"""Images of any size, in patches: Qwen 3.5's, whose number of tokens depends on the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_keras.batching.image_decoding import decode, pixel_size
from dpo_keras.batching.image_preprocessing import BatchSizes, ImagePreprocessor
from dpo_keras.batching.ragged import Ragged
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import Image

_PROMPTS_AT_ONCE = 4096  # that are read from a disk


@dataclass(frozen=True)
class PatchPreprocessor(ImagePreprocessor):
    """Reads images as grids of patches; a square of `merge`² patches is one token.

    Patches of a square follow each other, as in Qwen's own image processor. KerasHub 0.32 writes
    those of an image row by row, while its encoder, whose weights are Qwen's, gives them positions
    square by square and merges what follows each other.

    Attributes:
        mark: the placeholder, which `expansion` has once.
        converter: KerasHub's image converter.
    """

    mark: str
    converter: Any
    _grids: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def merge(self) -> int:
        """Patches along a side of a token's square."""
        return int(self.converter.spatial_merge_size)

    def texts(self, images: Sequence[Image]) -> list[str]:
        """Return the text that stands for each image in its prompt."""
        return [self.expansion.replace(self.mark, self.mark * self.count([i])) for i in images]

    def count(self, images: Sequence[Image]) -> int:
        """Return the number of placeholders of some images, whose headers are read once."""
        for image in images:
            if image.digest not in self._grids:
                self._grids[image.digest] = self.grid(*pixel_size(image))
        grids = [self._grids[image.digest] for image in images]
        return sum(down * across for down, across in grids) // self.merge**2

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return how many patches down and across the converter makes of so many pixels.

        It computes in float32, and so must this: a side may lie halfway between two sizes.
        """
        converter, pixels, scale = self.converter, np.float32(height * width), np.float32(1)
        if pixels < converter.min_pixels:
            scale = np.sqrt(np.float32(converter.min_pixels) / pixels)
        elif pixels > converter.max_pixels:
            scale = np.sqrt(np.float32(converter.max_pixels) / pixels)
        stride = np.float32(converter.patch_size * self.merge)
        squares = [max(int(np.round(np.float32(s) * scale / stride)), 1) for s in (height, width)]
        return squares[0] * self.merge, squares[1] * self.merge

    def room(self, prompts: Ragged, most: int) -> int:
        """Return how many placeholders a prompt has at most."""
        room = 0
        for first in range(0, len(prompts), _PROMPTS_AT_ONCE):
            rows = prompts.take(range(first, min(first + _PROMPTS_AT_ONCE, len(prompts))))
            found = np.cumsum(np.append(0, rows.flat_values == self.placeholder))
            room = max(room, int(np.diff(found[rows.row_splits]).max(initial=0)))
        return room

    def tensors(
        self, rows: Sequence[tuple[Image, ...]], prompts: Sequence[np.ndarray], sizes: BatchSizes
    ) -> dict[str, np.ndarray]:
        """Return the arrays of one batch: the patches of a row's images, one after another.

        Short sequences have room for few tokens of images, and so for few patches.
        """
        patches = min(sizes.room, sizes.length) * self.merge**2
        side = self.converter.patch_size
        shape = (self.converter.temporal_patch_size, side, side, 3)
        arrays = {
            "pixel_values": np.zeros((len(rows), patches, *shape), np.float32),
            "image_grid_thw": np.zeros((len(rows), sizes.most, 3), np.int32),
            "vision_mask": np.zeros((len(rows), sizes.length), np.int32),
        }
        for row, (images, prompt) in enumerate(zip(rows, prompts, strict=False)):
            end, found = 0, self.places(prompt)
            for place, image in enumerate(images):
                made = self._converted(image)
                begin, end = end, end + len(made["patches"])
                arrays["pixel_values"][row, begin:end] = made["patches"]
                arrays["image_grid_thw"][row, place] = made["grid_thw"]
            if images and end != len(found) * self.merge**2:
                rule = f"make {end} patches, and their prompt has {len(found)} tokens for them"
                raise InputError(InputProblem("images", rule))
            if images:
                arrays["vision_mask"][row, found] = 1
        return arrays

    def _converted(self, image: Image) -> dict[str, np.ndarray]:
        """Return an image's patches, square by square, and its grid (1, down, across)."""
        made = self._convert(decode(image))
        (_, down, across), side, patches = made["grid_thw"], self.merge, made["patches"]
        squares = patches.reshape(down // side, side, across // side, side, *patches.shape[1:])
        return {**made, "patches": squares.swapaxes(1, 2).reshape(patches.shape)}
