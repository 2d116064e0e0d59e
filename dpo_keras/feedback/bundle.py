"""The page as one document, with a policy under which only its own script and style run."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page.

    Args:
        body: HTML with its style and script in it.
        hashes: CSP sources of its style and script.
    """

    body: bytes
    hashes: dict[str, str]


@cache
def page(name: str) -> Page:
    """Puts a page's style and script into its HTML.

    Args:
        name: "annotate" or "admin".

    Example:
        >>> len(page("annotate").body) < 100_000
        True
    """
    folder = importlib.resources.files(__package__) / "page"
    document = (folder / f"{name}.html").read_text("utf-8")
    style = (folder / "style.css").read_text("utf-8")
    script = (folder / "common.js").read_text("utf-8") + (folder / f"{name}.js").read_text("utf-8")
    hashes = {"style": _source(style), "script": _source(script)}
    document = document.replace("/*style*/", style).replace("/*script*/", script)
    return Page(document.encode(), hashes)


def policy() -> str:
    """The Content-Security-Policy of everything served: nothing from elsewhere, nothing unknown."""
    pages = [page(name) for name in ("annotate", "admin")]
    styles = " ".join(one.hashes["style"] for one in pages[:1])
    scripts = " ".join(one.hashes["script"] for one in pages)
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
