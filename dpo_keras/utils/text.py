"""Text for people: suggestions for misspelt names, and texts that are safe to print."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `"did you mean 'sigmoid'?"` for "sigmiod"; an empty string where no name is near."""
    near = nearest(name, known, cutoff)
    return f"did you mean {near!r}?" if near else ""


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name nearest to a misspelt one; `cutoff`, 0 to 1, is how alike they are."""
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def visible(text: str, keep: str = "\n\t") -> str:
    r"""Write control, format and surrogate characters as `\x1b` or `\u202e`, except `keep`.

    A terminal would obey them, in a policy's response for example.
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
    """Cut a text to a width, with `...` where something is missing."""
    return text if len(text) <= width else text[: width - 3] + "..."
