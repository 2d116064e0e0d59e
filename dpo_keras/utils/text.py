"""Text for people: suggestions for misspelt names, and texts that are safe to print."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Suggest the known name that is nearest to a misspelt one.

    Args:
        name: what was given.
        known: the right names.
        cutoff: how alike the two must be, from 0 to 1.

    Returns:
        `"did you mean 'sigmoid'?"`, or an empty string where none is near.

    Example:
        >>> did_you_mean("sigmiod", ["sigmoid", "hinge"])
        "did you mean 'sigmoid'?"
        >>> did_you_mean("xyz", ["sigmoid"])
        ''
    """
    near = nearest(name, known, cutoff)
    return f"did you mean {near!r}?" if near else ""


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that is nearest to a misspelt one; None where none is near."""
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def visible(text: str, keep: str = "\n\t") -> str:
    r"""Replace control characters by their escapes, so that a terminal does not obey a text.

    Args:
        text: any text, such as a policy's response.
        keep: control characters that stay.

    Returns:
        The text with control, format and surrogate characters written as `\x1b` or `\u202e`.

    Example:
        >>> print(visible("a\x1b[31mb"))
        a\x1b[31mb
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def shortened(text: str, width: int = 80) -> str:
    """Cut a text to a width, with `...` where something is missing.

    Example:
        >>> shortened("a long sentence", 10)
        'a long ...'
    """
    return text if len(text) <= width else text[: width - 3] + "..."
