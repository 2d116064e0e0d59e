"""Images of prompts: their tokens, and the arrays of a batch, by the preset's own preprocessor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from dpo_keras.batching.image_decoding import decode
from dpo_keras.batching.ragged import Ragged
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import Image, Record, StoredPreferences, Text
from dpo_keras.preferences.images import PLACE
from dpo_keras.utils import JSON

# A Unicode noncharacter, never part of text: stands for an image until its tokens are written.
SLOT = "\ufdd1"
_LISTED = 20  # pairs that an error lists
# What arrays of images are called in a batch: as the backbone's inputs.
IMAGE_KEYS = (
    "image_grid_thw",
    "images",
    "pixel_position_ids",
    "pixel_values",
    "vision_indices",
    "vision_mask",
)


class BatchSizes(NamedTuple):
    """What the images of a batch's rows have room for."""

    most: int  # images of a row
    room: int  # placeholders of a row
    length: int  # tokens per sequence


@dataclass(frozen=True)
class ImagePreprocessor:
    """How a family reads images; `image_preprocessor` makes one.

    Attributes:
        expansion: text that stands for an image in a prompt.
        written: what the family's own prompts write for an image, longest first; () where they
            write nothing.
        placeholder: id of the token that an image's states replace; None where they precede the
            text.
        tokens: placeholders of one image.
        limit: images that a prompt may have; None for any number.
        key: what batches depend on, besides the images.
    """

    expansion: str
    written: tuple[str, ...]
    placeholder: int | None
    tokens: int
    limit: int | None
    key: str
    _convert: Callable[[np.ndarray], dict[str, np.ndarray]] = field(repr=False)

    def texts(self, images: Sequence[Image]) -> list[str]:
        """Return the text that stands for each image in its prompt."""
        return [self.expansion] * len(images)

    def count(self, images: Sequence[Image]) -> int:
        """Return the number of placeholders of some images."""
        return len(images) * self.tokens

    def room(self, prompts: Ragged, most: int) -> int:
        """Return how many placeholders a prompt has at most, if it has `most` images at most."""
        return most * self.tokens

    def prompt(self, prompt: Text, count: int) -> Text:
        """Return a prompt with `SLOT` in the place of each of its images."""
        places = _marked(prompt, PLACE)
        if _slots(places) == 0 and self.written:
            places = _marked(prompt, *self.written)
        if _slots(places) == 0:  # before the text of the first turn of the user
            return _before(prompt, SLOT * count)
        return places

    def with_slots(self, records: Sequence[Record], first: int) -> list[Record]:
        """Mark the places of images in the prompts that have any; `first` numbers the records.

        Raises:
            InputError: a prompt has more images than the model takes.
        """
        marked, problems = [], []
        for number, pair in enumerate(records, first):
            if not pair.images:
                marked.append(pair)
                continue
            count = len(pair.images)
            if self.limit is not None and count > self.limit:
                rule = f"pair {number} has {count} images, and a prompt may have {self.limit}"
                problems.append(InputProblem("images", f"{rule} (of the preset's preprocessor)"))
            marked.append(replace(pair, prompt=self.prompt(pair.prompt, count)))
        if problems:
            raise InputError(problems[:_LISTED])
        return marked

    def held(self, records: Sequence[Record], prompts: Ragged, first: int) -> np.ndarray:
        """Mark the prompts that hold tokens of images, bool `[N]`: they cannot be cut.

        Raises:
            InputError: a prompt writes such tokens itself, or has lost some.
        """
        held = np.zeros(len(records), bool)
        for row, pair in enumerate(records):
            if pair.images:
                found, expected = len(self.places(prompts[row])), self.count(pair.images)
                if found != expected:
                    rule = f"pair {first + row}: its prompt itself writes tokens of images"
                    hint = f"Write {PLACE} once for each image, or nothing."
                    if found < expected:
                        rule = f"pair {first + row}: {found} of {expected} image tokens are left"
                        hint = "The template must write the prompt as it is, and the tokenizer "
                        hint += "must have image tokens among its `unsplittable_tokens`."
                    raise InputError(InputProblem("images", rule, hint=hint))
                held[row] = found > 0
        return held

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Return the places of image tokens among the ids of a prompt."""
        if self.placeholder is None:
            return np.zeros(0, np.int64)
        return np.flatnonzero(ids == self.placeholder)

    def tensors(
        self, rows: Sequence[tuple[Image, ...]], prompts: Sequence[np.ndarray], sizes: BatchSizes
    ) -> dict[str, np.ndarray]:
        """Return the arrays of one batch; the first rows have prompts of these ids."""
        arrays = self._arrays(rows, sizes.most)
        if self.placeholder is None:
            return arrays
        arrays["vision_indices"] = np.zeros((len(rows), sizes.room), np.int32)
        arrays["vision_mask"] = np.zeros((len(rows), sizes.length), np.int32)
        for row, (images, prompt) in enumerate(zip(rows, prompts, strict=False)):
            places = self.places(prompt)
            if images:
                arrays["vision_indices"][row, : len(places)] = places
                arrays["vision_mask"][row, places] = 1
        return arrays

    def _arrays(self, rows: Sequence[tuple[Image, ...]], most: int) -> dict[str, np.ndarray]:
        """Open and convert the images of some rows: arrays `[rows, most, …]`.

        Each image is converted alone. Where a row has fewer than `most`, the rest is 0.
        """
        converted = [[self._convert(decode(image)) for image in images] for images in rows]
        sample = next((one for row in converted for one in row), None)
        if sample is None:  # rows of text alone
            sample = self._convert(np.zeros((8, 8, 3), np.float32))
        arrays = {}
        for name, value in sample.items():
            arrays[name] = np.zeros((len(rows), most, *value.shape), value.dtype)
            for row, images in enumerate(converted):
                for place, image in enumerate(images):
                    arrays[name][row, place] = image[name]
        if self.placeholder is None:  # the one image of each row has no dimension of its own
            arrays = {name: value[:, 0] for name, value in arrays.items()}
        return arrays


def any_images(pairs: Sequence[Record]) -> bool:
    """Return whether any prompt has an image."""
    return any(pair.images for pair in pairs)


def expanded(pair: Record, family: ImagePreprocessor | None) -> str:
    """Return a pair's prompt with the texts that stand for its images."""
    prompt = str(pair.prompt)
    if family is None or not pair.images:
        return prompt
    return filled(prompt, family.texts(pair.images))


def filled(text: str, images: Sequence[str]) -> str:
    """Put the texts of images in the places of `SLOT`s, in order; the last one in all that follow.

    A template may write a place twice. `ImagePreprocessor.held` refuses what comes of it.
    """
    parts = text.split(SLOT)
    texts = [images[min(n, len(images) - 1)] if images else "" for n in range(len(parts) - 1)]
    return "".join(part + shown for part, shown in zip(parts, [*texts, ""], strict=True))


@dataclass(frozen=True)
class StoredImages:
    """The images of pairs on disk, found where a batch needs them."""

    pairs: StoredPreferences  # all of the directory
    source: np.ndarray  # int64 [N]

    def __getitem__(self, rows: np.ndarray) -> StoredImages:
        """Return the images of some rows."""
        return StoredImages(self.pairs, self.source[rows])

    def tolist(self) -> list[tuple[Image, ...]]:
        """Return the images of each row."""
        return [self.pairs[row].images for row in self.source.tolist()]


@dataclass(frozen=True)
class PairImages:
    """The images of tokenized pairs, opened when a batch is made.

    Args:
        rows: for each pair a tuple of `Image`, as an object array `[N]`; or `StoredImages`.
        preprocessor: how the model reads them.
        most: images that a row has room for.
        room: placeholders that a row has room for.
    """

    rows: np.ndarray | StoredImages
    preprocessor: ImagePreprocessor
    most: int
    room: int

    @classmethod
    def of(cls, pairs: Sequence[Record], preprocessor: ImagePreprocessor) -> PairImages:
        """Return the images of pairs."""
        rows = np.empty(len(pairs), object)
        for row, pair in enumerate(pairs):  # NumPy would make an array of tuples two-dimensional
            rows[row] = pair.images
        most = max((len(pair.images) for pair in pairs), default=0)
        room = max((preprocessor.count(pair.images) for pair in pairs), default=0)
        return cls(rows, preprocessor, most, room)

    @classmethod
    def stored(
        cls,
        pairs: StoredPreferences,
        source: np.ndarray | None,
        prompts: Ragged,
        preprocessor: ImagePreprocessor,
    ) -> PairImages:
        """Return the images of pairs on disk; `source` names them among all of the directory."""
        assert source is not None
        rows, most = StoredImages(pairs.whole, source), pairs.report.most_images
        return cls(rows, preprocessor, most, preprocessor.room(prompts, most))

    def __getitem__(self, rows: np.ndarray) -> PairImages:
        """Return the images of some pairs."""
        return replace(self, rows=self.rows[rows])

    @property
    def digest_text(self) -> str:
        """What log-probs depend on: every image, and how they are read."""
        digests = [[image.digest for image in images] for images in self.rows.tolist()]
        return json.dumps([self.preprocessor.key, digests])

    def tensors(
        self, prompts: Ragged | Sequence[np.ndarray], length: int, rows: int
    ) -> dict[str, JSON]:
        """Return the arrays of one batch, whose first rows are these pairs, in order.

        Args:
            prompts: the ids of each prompt.
            length: tokens per sequence.
            rows: rows of the batch.
        """
        images = self.rows.tolist()
        images += [()] * (rows - len(images))
        ids = [prompts[row] for row in range(len(prompts))]
        return self.preprocessor.tensors(images, ids, BatchSizes(self.most, self.room, length))


def _slots(text: Text) -> int:
    if isinstance(text, str):
        return text.count(SLOT)
    return sum(message.content.count(SLOT) for message in text)


def _before(prompt: Text, slots: str) -> Text:
    if isinstance(prompt, str):
        return slots + prompt.replace(SLOT, "")
    users = [n for n, message in enumerate(prompt) if message.role == "user"]
    first = users[0] if users else len(prompt) - 1
    return tuple(
        replace(turn, content=(slots if n == first else "") + turn.content.replace(SLOT, ""))
        for n, turn in enumerate(prompt)
    )


def _marked(prompt: Text, *marks: str) -> Text:
    if not isinstance(prompt, str):
        return tuple(replace(turn, content=str(_marked(turn.content, *marks))) for turn in prompt)
    prompt = prompt.replace(SLOT, "")
    for mark in marks:
        prompt = prompt.replace(mark, SLOT)
    return prompt
