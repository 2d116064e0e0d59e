"""Text for people: suggestions for misspelt names, and texts that are safe to print."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

QUOTED = "quoted_formulas"  # the column that marks such rows
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


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


def without_formulas(cells: dict[str, object]) -> dict[str, object]:
    """Return a CSV row in which no text is a formula to a spreadsheet.

    Such a text gets a quote before it, and the row a mark, by which `with_formulas` undoes it.

    Example:
        >>> without_formulas({"prompt": "2 + 2", "chosen": "=4", "margin": -1.0})
        {'prompt': '2 + 2', 'chosen': "'=4", 'margin': -1.0, 'quoted_formulas': 1}
    """
    quoted = {
        name: f"'{cell}"
        for name, cell in cells.items()
        if isinstance(cell, str) and _FORMULA.match(cell)
    }
    return {**cells, **quoted, QUOTED: 1} if quoted else cells


def with_formulas(cells: dict[str, str]) -> dict[str, str]:
    """Return a CSV row as it was before `without_formulas`; rows without its mark stay.

    Example:
        >>> with_formulas({"chosen": "'=4", "quoted_formulas": "1"})
        {'chosen': '=4'}
    """
    if QUOTED not in cells:
        return cells
    quoted = cells[QUOTED] == "1"
    return {
        name: cell[1:] if quoted and cell.startswith("'") and _FORMULA.match(cell) else cell
        for name, cell in cells.items()
        if name != QUOTED
    }
