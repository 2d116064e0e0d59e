"""Count what DESIGN.md bounds: files, lines, repeated names, `: Any`, the longest function.

    python scripts/code_counts.py             # this repository
    python scripts/code_counts.py DIRECTORY   # another checkout of it

It needs Python and nothing else, so that it runs on any commit.
"""

from __future__ import annotations

import argparse
import ast
import collections
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def longest_function(trees: dict[str, ast.Module]) -> tuple[int, str]:
    """Return the lines of the longest function without its docstring, and where it stands."""
    found = (0, "")
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
                lines = (node.end_lineno or 0) - first.lineno + 1
                found = max(found, (lines, f"{name}:{node.lineno} {node.name}"))
    return found


def docstring_lines(tree: ast.Module) -> int:
    """Return the number of lines that docstrings take."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return sum(
        (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node)
    )


def count(root: Path) -> dict[str, object]:
    """Count the package `dpo_keras` below a repository's root."""
    package = root / "dpo_keras"
    texts = {
        str(path.relative_to(root)): path.read_text(encoding="utf-8")
        for path in sorted(package.rglob("*.py"))
    }
    lines = {name: text.count("\n") for name, text in texts.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    names = collections.Counter(Path(name).name for name in texts)
    repeated = sorted(name for name, times in names.items() if times > 1 and name[:2] != "__")
    longest, where = longest_function(trees)
    total = sum(lines.values())
    by_stage: dict[str, list[int]] = collections.defaultdict(list)
    for name, number in lines.items():
        by_stage[Path(name).parts[1] if len(Path(name).parts) > 2 else "(top)"].append(number)
    return {
        "files": len(texts),
        "lines": total,
        "share of docstrings": f"{sum(map(docstring_lines, trees.values())) / total:.0%}",
        "files under 100 lines": sum(number < 100 for number in lines.values()),
        "files over 350 lines": [f"{n} ({lines[n]})" for n in lines if lines[n] > 350] or "none",
        "base names that repeat": repeated or "none",
        "': Any'": sum(": Any" in line for text in texts.values() for line in text.splitlines()),
        "longest function": f"{longest} lines, {where}",
        "stages (files, lines)": ", ".join(
            f"{stage} {len(numbers)}/{sum(numbers)}" for stage, numbers in sorted(by_stage.items())
        ),
    }


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description="Count files, lines and names of dpo_keras.")
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="root of a checkout")
    root = parser.parse_args().root
    if not (root / "dpo_keras" / "__init__.py").is_file():
        parser.error(f"root must be a checkout that holds dpo_keras/, got {root}")
    for name, value in count(root).items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"{name}: {shown}")


if __name__ == "__main__":
    main()
