"""Images of prompts: their tokens, and the arrays of a batch, by the preset's own preprocessor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dpo_keras.batching.ragged import Ragged
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import Image, Message, PreferencePair, StoredPreferences, Text
from dpo_keras.preferences.images import PLACE, media_type
from dpo_keras.utils import JSON

# A Unicode noncharacter, never part of text: stands for an image until its tokens are written.
SLOT = "\ufdd1"
_LISTED = 20  # pairs that an error lists
# What arrays of images are called in a batch: as the backbone's inputs.
IMAGE_KEYS = ("images", "pixel_values", "pixel_position_ids", "vision_indices", "vision_mask")

_NO_ROTARY_POSITIONS = (
    "cannot be trained on: KerasHub's forward pass of Qwen 3.5 takes no M-RoPE positions, which "
    "its generation uses for images, so that log-probs would not be those of what it generates"
)


@dataclass(frozen=True)
class ImagePreprocessor:
    """How a family reads images; `image_preprocessor` makes one.

    Attributes:
        expansion: text that stands for an image in a prompt.
        written: what the family's own prompts write for an image; "" where they write nothing.
        placeholder: id of the token that an image's states replace; None where they precede the
            text.
        tokens: placeholders of one image.
        limit: images that a prompt may have.
        key: what batches depend on, besides the images.
    """

    expansion: str
    written: str
    placeholder: int | None
    tokens: int
    limit: int
    key: str
    _convert: Callable[[np.ndarray], dict[str, np.ndarray]] = field(repr=False)

    def prompt(self, prompt: Text, count: int) -> Text:
        """Return a prompt with `SLOT` in the place of each of its images."""
        places = _marked(prompt, PLACE)
        if _slots(places) == 0 and self.written:
            places = _marked(prompt, self.written)
        if _slots(places) == 0:  # before the text of the first turn of the user
            return _before(prompt, SLOT * count)
        return places

    def with_slots(self, records: list[PreferencePair], first: int) -> list[PreferencePair]:
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
            if count > self.limit:
                rule = f"pair {number} has {count} images, and a prompt may have {self.limit}"
                problems.append(InputProblem("images", f"{rule} (of the preset's preprocessor)"))
            marked.append(replace(pair, prompt=self.prompt(pair.prompt, count)))
        if problems:
            raise InputError(problems[:_LISTED])
        return marked

    def held(self, records: Sequence[PreferencePair], prompts: Ragged, first: int) -> np.ndarray:
        """Mark the prompts that hold tokens of images, bool `[N]`: they cannot be cut.

        Raises:
            InputError: a prompt writes such tokens itself.
        """
        held = np.zeros(len(records), bool)
        for row, pair in enumerate(records):
            if pair.images:
                found = len(self.places(prompts[row]))
                if found != len(pair.images) * self.tokens:
                    rule = f"pair {first + row}: its prompt itself writes tokens of images"
                    hint = f"Write {PLACE} once for each image, or nothing."
                    raise InputError(InputProblem("images", rule, hint=hint))
                held[row] = found > 0
        return held

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Return the places of image tokens among the ids of a prompt."""
        if self.placeholder is None:
            return np.zeros(0, np.int64)
        return np.flatnonzero(ids == self.placeholder)

    def arrays(self, rows: Sequence[tuple[Image, ...]], most: int) -> dict[str, np.ndarray]:
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


def any_images(pairs: Sequence[PreferencePair]) -> bool:
    """Return whether any prompt has an image."""
    return any(pair.images for pair in pairs)


def expanded(pair: PreferencePair, image: str) -> str:
    """Return a pair's prompt with a text in the place of each image."""
    prompt = str(pair.prompt)
    return prompt.replace(SLOT, image) if pair.images else prompt


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
    if "Qwen3_5CausalLMPreprocessor" in names:
        rule = _NO_ROTARY_POSITIONS
    elif converter is None:
        rule = f"need a preset with a vision encoder; {own} has no image converter"
    elif not names & _FAMILIES.keys():
        rule = f"are read for {', '.join(sorted(_FAMILIES))}, got {own}"
    if rule is not None:
        hint = "Leave the column out, or take another model."
        raise InputError(InputProblem("images", rule, hint=hint))
    assert converter is not None
    settings = json.dumps(converter.get_config(), sort_keys=True, default=str)
    make = next(_FAMILIES[name] for name in sorted(names & _FAMILIES.keys()))
    return make(family, f"{own} {settings}")


def _gemma3(preprocessor: Any, key: str) -> ImagePreprocessor:
    placeholders = preprocessor.image_placeholder * preprocessor.num_vision_tokens_per_image
    start, end = preprocessor.start_of_image_token, preprocessor.end_of_image_token
    return ImagePreprocessor(
        expansion=f"\n\n{start}{placeholders}{end}\n\n",
        written=start,
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
        written=mark,
        placeholder=preprocessor.tokenizer.image_placeholder_id,
        tokens=preprocessor.num_vision_tokens_per_image,
        limit=preprocessor.max_images_per_prompt,
        key=f"{key} {preprocessor.num_vision_tokens_per_image}",
        _convert=convert,
    )


def _pali_gemma(preprocessor: Any, key: str) -> ImagePreprocessor:
    return ImagePreprocessor(
        expansion="",
        written="",
        placeholder=None,
        tokens=0,
        limit=1,
        key=key,
        _convert=lambda image: {"images": _one(preprocessor.image_converter(image[None]))},
    )


_FAMILIES: dict[str, Callable[[Any, str], ImagePreprocessor]] = {
    "Gemma3CausalLMPreprocessor": _gemma3,
    "Gemma4CausalLMPreprocessor": _gemma4,
    "PaliGemmaCausalLMPreprocessor": _pali_gemma,
}


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
    """

    rows: np.ndarray | StoredImages
    preprocessor: ImagePreprocessor
    most: int

    @classmethod
    def of(cls, pairs: Sequence[PreferencePair], preprocessor: ImagePreprocessor) -> PairImages:
        """Return the images of pairs."""
        rows = np.empty(len(pairs), object)
        for row, pair in enumerate(pairs):  # NumPy would make an array of tuples two-dimensional
            rows[row] = pair.images
        return cls(rows, preprocessor, max((len(pair.images) for pair in pairs), default=0))

    @classmethod
    def stored(
        cls, pairs: StoredPreferences, source: np.ndarray | None, preprocessor: ImagePreprocessor
    ) -> PairImages:
        """Return the images of pairs on disk; `source` names them among all of the directory."""
        assert source is not None
        rows = StoredImages(pairs.whole, source)
        return cls(rows, preprocessor, pairs.report.most_images)

    def __getitem__(self, rows: np.ndarray) -> PairImages:
        """Return the images of some pairs."""
        return PairImages(self.rows[rows], self.preprocessor, self.most)

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
        family = self.preprocessor
        arrays = family.arrays(images, self.most)
        if family.placeholder is None:
            return arrays
        arrays["vision_indices"] = np.zeros((rows, self.most * family.tokens), np.int32)
        arrays["vision_mask"] = np.zeros((rows, length), np.int32)
        for row in range(len(prompts)):
            places = family.places(prompts[row])
            if images[row]:
                arrays["vision_indices"][row, : len(places)] = places
                arrays["vision_mask"][row, places] = 1
        return arrays


def decode(image: Image) -> np.ndarray:
    """Return an image's pixels, 0 to 255, float32 `[height, width, 3]`: resized without rounding.

    Raises:
        InputError: the content cannot be decoded.
    """
    import tensorflow as tf

    content = image.read()
    try:
        if media_type(content) == "image/webp":
            pixels = tf.io.decode_webp(content, channels=3)[0]
        else:
            pixels = tf.io.decode_image(content, channels=3, expand_animations=False)
        return pixels.numpy().astype(np.float32)
    except tf.errors.InvalidArgumentError as error:
        name = image.path or f"of {len(content):,} bytes"
        reason = str(error.message).splitlines()[0][:200]
        raise InputError(f"image {name} cannot be decoded: {reason}") from error


def _one(values: Any) -> np.ndarray:
    return np.asarray(values)[0]


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
        Message(message.role, (slots if n == first else "") + message.content.replace(SLOT, ""))
        for n, message in enumerate(prompt)
    )


def _marked(prompt: Text, mark: str) -> Text:
    if isinstance(prompt, str):
        return prompt.replace(SLOT, "").replace(mark, SLOT)
    return tuple(
        Message(message.role, message.content.replace(SLOT, "").replace(mark, SLOT))
        for message in prompt
    )
