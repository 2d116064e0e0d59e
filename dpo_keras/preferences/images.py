"""Images beside a prompt: references, checked when pairs are read and opened for a batch."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dpo_keras.errors import InputError
from dpo_keras.utils import JSON
from dpo_keras.utils.text import shortened

PLACE = "<image>"  # stands in a prompt where an image belongs
LARGEST = 64 * 2**20  # bytes of one encoded image
PART_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")
# What a base64 text of each format begins with.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "Qk", "UklGR")


class InvalidImage(ValueError):  # noqa: N818 (it becomes a fault of a record)
    """A value that is no usable image: a short name of the rule, and what the image must be."""

    def __init__(self, rule: str, must: str):
        super().__init__(must)
        self.rule, self.must = rule, must


@dataclass(frozen=True, slots=True)
class Image:
    """A reference to an encoded image. Images of equal content are equal, wherever they lie.

    Args:
        digest: hash of the encoded content, in hexadecimal digits.
        path: absolute path of the file; None where `data` holds the image.
        data: the encoded content, for images that came without a file.

    Example:
        >>> Image.of("photos/cat.png")
        Traceback (most recent call last):
        ...
        dpo_keras.preferences.images.InvalidImage: must name an image file; there is no ...
    """

    digest: str
    path: str | None = field(default=None, compare=False)
    data: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, value: JSON, folder: str | os.PathLike[str] = "") -> Image:
        """Make a reference of a path, bytes, a data URL, base64, a mapping or an image of Pillow.

        Relative paths begin at `folder`. The content is read once, to be checked and hashed.

        Raises:
            InvalidImage: the file is missing or broken, or the value is no image.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):  # as `datasets.Image` stores it, or as OpenAI's parts
            keys = ("bytes", *(key for key in PART_KEYS if key != "bytes"))
            value = next((value[key] for key in keys if value.get(key) is not None), None)
            if isinstance(value, Mapping):
                return cls.of(value, folder)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str):
            data = _decoded(value)
            if data is None:
                # Links are kept: data sets are often folders of links.
                path = os.path.normpath(Path(folder, value).absolute())
                return cls(_checked_digest(_content(path), path), path)
        elif isinstance(value, bytes | bytearray):
            data = bytes(value)
        elif hasattr(value, "save") and hasattr(value, "mode"):  # Pillow's
            stream = io.BytesIO()
            value.save(stream, format="PNG")
            data = stream.getvalue()
        else:
            kind = type(value).__name__
            raise InvalidImage(
                "wrong type",
                "must be a path, bytes, a data URL, {'bytes': …, 'path': …} or an image of "
                f"Pillow, got {shortened(repr(value), 60)} ({kind}).",
            )
        return cls(_checked_digest(data, "these bytes"), data=data)

    def read(self) -> bytes:
        """Return the encoded content.

        Raises:
            InputError: the file is gone, or no longer what it was when the pair was read.
        """
        if self.data is not None:
            return self.data
        path = str(self.path)
        try:
            content = _content(path)
        except InvalidImage as error:
            raise InputError(f"image {path} {error}") from error
        if _digest(content) != self.digest:
            raise InputError(
                f"image {path} is not the image that was there when the pair was read; restore "
                "it, or read the pairs again."
            )
        return content

    def as_text(self, folder: Path | None = None) -> str:
        """Return the path, relative where it lies in `folder`, or a data URL."""
        if self.data is not None:
            encoded = base64.b64encode(self.data).decode("ascii")
            return f"data:{media_type(self.data)};base64,{encoded}"
        path = Path(str(self.path))
        if folder is not None and path.is_relative_to(folder.absolute()):
            return str(path.relative_to(folder.absolute()))
        return str(path)


def media_type(content: bytes) -> str | None:
    """Return the media type of an encoded image, by its first bytes; None if it is no image."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    starts = {
        b"\x89PNG\r\n\x1a\n": "image/png",
        b"\xff\xd8\xff": "image/jpeg",
        b"GIF87a": "image/gif",
        b"GIF89a": "image/gif",
        b"BM": "image/bmp",
    }
    return next((kind for start, kind in starts.items() if content.startswith(start)), None)


def _content(path: str) -> bytes:
    """Read a file of a bounded size."""
    file = Path(path)
    if not file.is_file():
        raise InvalidImage("missing image", f"must name an image file; there is no {path}.")
    try:
        if file.stat().st_size > LARGEST:
            raise InvalidImage("large image", f"must be at most {LARGEST:,} bytes; {path} is not.")
        return file.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        must = f"must name a readable file; {path} cannot be read ({reason})."
        raise InvalidImage("missing image", must) from error


def _decoded(text: str) -> bytes | None:
    """Return what a data URL or base64 holds; None for a path."""
    if text.startswith(("http://", "https://")):
        must = f"must be a local file, got {shortened(text, 60)}; download it first."
        raise InvalidImage("remote image", must)
    encoded = text
    if text.startswith("data:"):
        head, _, encoded = text.partition(",")
        if not head.endswith(";base64"):
            must = f"must be base64 in a data URL, got {shortened(text, 60)}."
            raise InvalidImage("broken image", must)
    elif len(text) < 64 or not text.startswith(_BASE64_STARTS) or Path(text).exists():
        return None
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        if encoded is text:  # a long path
            return None
        must = f"must be base64 in a data URL, got {shortened(text, 60)} ({error})."
        raise InvalidImage("broken image", must) from error


def _checked_digest(content: bytes, name: str) -> str:
    if len(content) > LARGEST:
        raise InvalidImage("large image", f"must be at most {LARGEST:,} bytes; {name} are not.")
    if problem := _problem(content):
        raise InvalidImage("broken image", f"must be a whole image; {name}: {problem}.")
    return _digest(content)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _problem(content: bytes) -> str | None:
    """Return why encoded bytes are no whole image. Their pixels are not decoded."""
    kind, size = media_type(content), len(content)
    if kind is None:
        return "no PNG, JPEG, GIF, BMP or WebP"
    if kind == "image/png":
        return _png_problem(content)
    filled = content.rstrip(b"\0")
    ends = {
        "image/jpeg": b"\xff\xd9" in filled[-1024:],
        "image/gif": filled.endswith(b";"),
        "image/bmp": int.from_bytes(content[2:6], "little") <= size,
        "image/webp": int.from_bytes(content[4:8], "little") + 8 <= size,
    }
    return None if ends[kind] else f"{kind} is cut off"


def _png_problem(content: bytes) -> str | None:
    """Compare the checksum of every chunk."""
    place = 8
    while place + 12 <= len(content):
        end = place + 8 + int.from_bytes(content[place : place + 4], "big")
        body, checksum = content[place + 4 : end], content[end : end + 4]
        if len(checksum) < 4:
            break
        if zlib.crc32(body) != int.from_bytes(checksum, "big"):
            return "image/png is damaged: a checksum is wrong"
        if body[:4] == b"IEND":
            return None
        place = end + 4
    return "image/png is cut off"
