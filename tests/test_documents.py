"""The guides say what is there: links lead somewhere, and the walks name functions that exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *ROOT.glob(".github/*.md"), *ROOT.glob("dpo_keras/**/*.md")]
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files(document):
    prose = re.sub(r"```.*?```|`[^`]*`", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (document.parent / link).exists()] == []


def test_the_readme_is_a_door():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize(
    ("title", "most"), [("### One pair", 15), ("### One `dpo-keras train`", 20)]
)
def test_a_walk_names_functions_that_exist(title, most):
    section = CONTRIBUTING.split(title)[1].split("\n##")[0]
    names = re.findall(r"^\| \d+ \| `([\w.]+)`", section, re.MULTILINE)
    assert 10 < len(names) <= most
    for name in names:
        parts = name.split(".")
        found = importlib.import_module(".".join(["dpo_keras", *parts[:2]]))
        for part in parts[2:]:
            found = getattr(found, part)
        assert callable(found), name
