"""From a report's content to text: Markdown and HTML through templates, JSON; nothing gets through.

Texts of the policy and of the data may hold HTML, Markdown, or control characters for a terminal.
"""

from __future__ import annotations

import base64
import json
import pathlib
import re
from typing import Any

import jinja2

_TEMPLATES = pathlib.Path(__file__).parent / "templates"
KINDS = {"markdown": "md", "html": "html", "json": "json"}
LONGEST = 1200  # characters of one text of the policy or of the data
# Delete, C1 controls, halves of characters, and marks that reorder the text around them.
_UNSAFE = r"[\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]"


def render(kind: str, content: dict[str, Any]) -> str:
    """Fills a template.

    Args:
        kind: "markdown" or "html".
        content: from `report_content`, with `plots` (name to path) and `captions`.

    Returns:
        The document.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=kind == "html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (visible, shown, cell, prose, fence, inline)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(f"report.{KINDS[kind]}.jinja").render(content)


def as_json(content: dict[str, Any]) -> str:
    r"""A dict as JSON text, with escapes for what cannot be shown or encoded.

    Args:
        content: holds no NaN.

    Example:
        >>> print(as_json({"text": "café \u202e\ud800"}), end="")
        {
         "text": "café \u202e\ud800"
        }
    """
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    return re.sub(_UNSAFE, lambda found: f"\\u{ord(found[0]):04x}", text)


def visible(text: Any) -> str:
    r"""A text with pictures of its control characters: a terminal must not obey a policy.

    Args:
        text: anything; line feeds and tabs stay.

    Example:
        >>> print(visible("a\x1b[31mb\r\nc"))
        a␛[31mb
        c
    """
    text = str(text).replace("\r\n", "\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return re.sub(_UNSAFE, "\ufffd", text)


def shown(text: Any) -> str:
    """A text of the policy or of the data: visible, and cut in its middle where it is long.

    Args:
        text: anything.

    Example:
        >>> len(shown("x" * 10_000)) < 1300
        True
    """
    text = visible(text)
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def cell(text: Any) -> str:
    r"""A text as one line of Markdown, or a cell of a table, in which nothing is markup.

    Args:
        text: anything.

    Example:
        >>> print(cell("a|b <i>\n![x](http://y)"))
        a\|b \<i\> \!\[x\](http\://y)
    """
    return _escaped(" ".join(str(text).split()))


def prose(text: Any) -> str:
    r"""A sentence of ours as Markdown: code in backticks stays code, names from data do not act.

    Args:
        text: the sentence.

    Example:
        >>> print(prose("Use `ld_alpha` for group <b>."))
        Use `ld_alpha` for group \<b\>.
    """
    parts = re.split(r"(`[^`]*`)", visible(text))
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def fence(text: Any) -> str:
    """A text as a Markdown code block, in a fence longer than any run of backticks in it.

    Args:
        text: anything.

    Example:
        >>> print(fence("```"))
        ````text
        ```
        ````
    """
    text = visible(text)
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{marks}text\n{text}\n{marks}"


def inline(path: pathlib.Path) -> str:
    """A file as base64, for a data URI.

    Args:
        path: the file.
    """
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _escaped(text: str) -> str:
    # With these gone there are no tags, emphasis, links, images, formulas, mentions or entities;
    # and no bare addresses, which some readers turn into links.
    text = re.sub(r"([\\`*_\[\]<>#|~!&$@])", r"\\\1", visible(text))
    return re.sub(r":(?=//)|(?<=www)\.", r"\\\g<0>", text)
