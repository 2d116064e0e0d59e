"""Encoded images to pixels, and their sizes from their headers."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import numpy as np

from dpo_keras.errors import InputError
from dpo_keras.preferences import Image
from dpo_keras.preferences.images import media_type


def decode(image: Image) -> np.ndarray:
    """Return an image's pixels, 0 to 255, float32 `[height, width, 3]`: resized without rounding.

    Raises:
        InputError: the content cannot be decoded.
    """
    import tensorflow as tf

    content = image.read()
    with _named_errors(image, content):
        if media_type(content) == "image/webp":
            pixels = tf.io.decode_webp(content, channels=3)[0]
        else:
            pixels = tf.io.decode_image(content, channels=3, expand_animations=False)
        return np.asarray(pixels, np.float32)


def pixel_size(image: Image) -> tuple[int, int]:
    """Return an image's height and width, those of `decode`.

    PNG and JPEG say them in their headers. Other formats are decoded.

    Raises:
        InputError: the content cannot be decoded.
    """
    import tensorflow as tf

    content = image.read()
    kind = media_type(content)
    if kind == "image/png":
        width, height = struct.unpack(">II", content[16:24])
    elif kind == "image/jpeg":
        with _named_errors(image, content):
            height, width, _ = tf.image.extract_jpeg_shape(content).numpy().tolist()
    else:
        height, width, _ = decode(image).shape
    return height, width


@contextlib.contextmanager
def _named_errors(image: Image, content: bytes) -> Iterator[None]:
    import tensorflow as tf

    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        name = image.path or f"of {len(content):,} bytes"
        reason = str(error.message).splitlines()[0][:200]
        raise InputError(f"image {name} cannot be decoded: {reason}") from error
