"""Turns scripts/examples/*.py, in keras.io's own form, into notebooks beside them.

python scripts/notebooks.py            # name the notebooks that are not current; exit code 1
python scripts/notebooks.py --write    # write them

The form: a module whose first string is a header (`Title: …`), whose further strings are text in
Markdown, or commands for a shell where they begin with `shell`; what is between them is code.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbformat import v4

EXAMPLES = Path(__file__).parent / "examples"


class Block(NamedTuple):
    """A part of an example: `kind` is "text", "shell" or "code"."""

    kind: str
    content: str


def header(source: str) -> dict[str, str]:
    """Return the fields of an example's first string, by name."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    pairs = (line.partition(": ") for line in docstring.splitlines())
    return {name: value for name, colon, value in pairs if colon}


def blocks(source: str) -> list[Block]:
    """Split an example, its header left out, into text, commands and code."""
    lines, found = source.splitlines(), []
    _, *statements = ast.parse(source).body
    begin = None
    for statement in statements:
        match statement:
            case ast.Expr(ast.Constant(str())):
                # As it is written: a backslash at the end of a line stays one.
                text = (ast.get_source_segment(source, statement) or "")[3:-3].lstrip("\n")
                if begin is not None:
                    found.append(_code(lines[begin : statement.lineno - 1]))
                begin = statement.end_lineno
                shell = text.startswith("shell\n")
                found.append(
                    Block("shell" if shell else "text", text.removeprefix("shell\n").strip())
                )
    found.append(_code(lines[begin:]))
    return [block for block in found if block.content]


def _code(lines: list[str]) -> Block:
    return Block("code", "\n".join(lines).strip())


def markdown(example: Path) -> str:
    """Return an example as a page of Markdown."""
    source = example.read_text(encoding="utf-8")
    about = header(source)
    files = f"`scripts/examples/{example.name}`, and as a notebook, `{example.stem}.ipynb`"
    page = [f"# {about['Title']}", f"{about['Description']} The code is in {files}."]
    fences = {"text": "{}", "shell": "```shell\n{}\n```", "code": "```python\n{}\n```"}
    page += [fences[block.kind].format(block.content) for block in blocks(source)]
    return "\n\n".join(page) + "\n"


def notebook(source: str) -> str:
    """Return an example as a notebook without outputs: the same bytes for the same source."""
    about = header(source)
    facts = "<br>\n".join(
        f"**{name}:** {value}" for name, value in about.items() if name != "Title"
    )
    cells = [v4.new_markdown_cell(f"# {about['Title']}\n\n{facts}")]
    for block in blocks(source):
        if block.kind == "text":
            cells.append(v4.new_markdown_cell(block.content))
        elif block.kind == "shell":
            # A command that a backslash continues is one.
            commands = re.sub(r"(?<!\\)\n", "\n!", block.content)
            cells.append(v4.new_code_cell(f"!{commands}"))
        else:
            cells.append(v4.new_code_cell(block.content))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def main() -> int:
    """Check the notebooks, or write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the notebooks")
    write = parser.parse_args().write
    outdated = 0
    for example in sorted(EXAMPLES.glob("*.py")):
        path, made = example.with_suffix(".ipynb"), notebook(example.read_text(encoding="utf-8"))
        if path.exists() and path.read_text(encoding="utf-8") == made:
            continue
        if write:
            path.write_text(made, encoding="utf-8")
        print(f"{path.name}: {'written' if write else 'is not current; run it with --write'}")
        outdated += 1
    return int(outdated > 0 and not write)


if __name__ == "__main__":
    sys.exit(main())
