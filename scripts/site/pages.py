"""Finds the pages of the site: the repository's own guides and examples, and one page per API.

A page keeps its path in the repository, so that the guides' relative links hold. A link to another
file of the repository leads to a page that shows it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File, Files, InclusionLevel

sys.path.insert(0, str(Path(__file__).parents[1]))
from notebooks import header, markdown
from public_names import public_names

if TYPE_CHECKING:
    import griffe

ROOT = Path(__file__).parents[2]
EXAMPLES = (
    "dpo_with_lora",
    "feedback_to_served_policy",
    "your_own_keras_model",
    "choosing_an_objective",
    "larger_than_one_device",
)
INCLUDED, NOT_IN_NAV = InclusionLevel.INCLUDED, InclusionLevel.NOT_IN_NAV
IMAGES = (".png", ".svg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".html": "html", ".css": "css"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
FENCED = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def on_config(config: Any) -> Any:
    """Put the examples and the API's pages into the navigation."""
    examples = [f"scripts/examples/{name}.py" for name in EXAMPLES]
    titles = {header((ROOT / path).read_text(encoding="utf-8"))["Title"]: path for path in examples}
    pages = {
        "EXAMPLES": [{title: f"{path}.md"} for title, path in titles.items()],
        "API": [{module: f"api/{module}.md"} for module in sorted(public_names())],
    }
    for entry in config.nav:
        for title, value in entry.items():
            entry[title] = pages.get(value, value) if isinstance(value, str) else value
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the guides, the examples, what they link to, and the API's pages."""
    guides = [ROOT / "README.md", *ROOT.glob(".github/[!P]*.md"), *ROOT.glob("dpo_keras/**/*.md")]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in guides}
    for name in EXAMPLES:
        path = f"scripts/examples/{name}.py"
        texts[f"{path}.md"] = markdown(ROOT / path)
    linked: set[str] = set()
    pages = {path: _with_links(text, path, linked) for path, text in texts.items()}
    pages |= _api_pages(public_names())
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content, inclusion=INCLUDED))
    for path in sorted(linked - pages.keys()):
        source = ROOT / path.removesuffix(".md")
        if path.endswith(IMAGES) and source.exists():
            image = File.generated(config, path, abs_src_path=str(source), inclusion=INCLUDED)
            files.append(image)
        elif source.exists():  # else mkdocs reports the link
            content = _source_page(source)
            files.append(File.generated(config, path, content=content, inclusion=NOT_IN_NAV))
    return files


def _with_links(text: str, page: str, linked: set[str]) -> str:
    """Lead the links of a page to pages, and note them."""

    def follow(link: re.Match[str]) -> str:
        before, target, after = link.groups()
        if ":" in target:
            return link[0]
        path = os.path.normpath(PurePosixPath(page).parent / target)
        if not path.endswith((".md", *IMAGES)):
            target, path = f"{target.rstrip('/')}.md", f"{path}.md"
        linked.add(path)
        return f"{before}{target}{after}"

    parts = FENCED.split(text)
    parts[::2] = [LINK.sub(follow, part) for part in parts[::2]]
    return "".join(parts)


def _source_page(source: Path) -> str:
    path = source.relative_to(ROOT)
    if source.is_dir():
        names = sorted(each.name for each in source.iterdir() if each.is_file())
        return f"# {path}\n\n" + "".join(f"- `{name}`\n" for name in names)
    code, language = source.read_text(encoding="utf-8"), LANGUAGES.get(source.suffix, "text")
    return f"# {source.name}\n\n`{path}`\n\n````{language}\n{code}````\n"


def _api_pages(modules: dict[str, dict[str, griffe.Object]]) -> dict[str, str]:
    """Describe each name once: on the page of its stage, where it has one."""
    top = {definition.path: name for name, definition in modules["dpo_keras"].items()}
    home: dict[str, str] = {}
    for module, names in reversed(modules.items()):  # so that the first of them has it
        home |= {each.path: module for each in names.values()}
    pages = {}
    for module, names in modules.items():
        entries = [f"# {module}\n"]
        for name, each in sorted(names.items(), key=lambda named: named[0].isupper()):
            if home[each.path] == module:
                heading = f"dpo_keras.{top[each.path]}" if each.path in top else f"{module}.{name}"
                options = f"      heading: {heading}\n      toc_label: {name}\n"
                entries.append(f"::: {each.path}\n    options:\n{options}")
            else:
                summary = each.docstring.value.partition("\n")[0] if each.docstring else ""
                entries.append(f"- [`{module}.{name}`][{each.path}]: {summary}")
        pages[f"api/{module}.md"] = "\n".join(entries) + "\n"
    return pages
