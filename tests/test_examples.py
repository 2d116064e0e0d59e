"""The examples in keras.io's form: short, marked, current as notebooks, and they run."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
EXAMPLES = sorted((SCRIPTS / "examples").glob("*.py"))
FIELDS = ["Title", "Author", "Date created", "Last modified", "Description", "Accelerator"]
# What a run prints of its result, and which earlier figure or number it must be above.
PRINTED = {
    "choosing_an_objective": (r"rankings: plackett_luce +(?P<after>[\d.]+)", 0.8),
    "dpo_with_lora": (r"Good replies: (?P<before>\d+)% before, (?P<after>\d+)% after", None),
    "feedback_to_served_policy": (r"before: (?P<before>\d+), after: (?P<after>\d+)", None),
    "larger_than_one_device": (r"reward_accuracy: (?P<after>[\d.]+)", 0.7),
    "your_own_keras_model": (r"reward_accuracy +(?P<before>[\d.]+) +(?P<after>[\d.]+)", None),
}


@pytest.fixture
def notebooks(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import notebooks

    return notebooks


def named(path):
    return path.stem


def test_there_are_five():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("example", EXAMPLES, ids=named)
def test_an_example_has_the_form_of_keras_io(example, notebooks):
    source = example.read_text(encoding="utf-8")
    assert list(notebooks.header(source)) == FIELDS
    assert len(source.splitlines()) < 300
    marked = re.findall(r"  # (?:For a real model: |Your own model goes here)", source)
    assert len(marked) == 1, "one line is marked for a real model"
    kinds = [block.kind for block in notebooks.blocks(source)]
    assert kinds[0] == "text"
    assert {"text", "shell", "code"} == set(kinds)


@pytest.mark.parametrize("example", EXAMPLES, ids=named)
def test_its_notebook_is_current(example, notebooks):
    source = example.read_text(encoding="utf-8")
    path = example.with_suffix(".ipynb")
    assert path.read_text(encoding="utf-8") == notebooks.notebook(source), (
        "run: python scripts/notebooks.py --write"
    )


def test_a_notebook_has_the_code_and_the_text_of_its_example(notebooks):
    shell, end = "shell\ndo x \\\n  --y\n", "\n"
    texts = ["Title: T\nDescription: D.\n", "## A\n", shell]
    source = end.join(f'"""{text}"""\n' for text in texts) + "\nx = 1\n\n" + '"""\nB\n"""\n'
    cells = json.loads(notebooks.notebook(source))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == [
        ("markdown", "# T\n\n**Description:** D."),
        ("markdown", "## A"),
        ("code", "!do x \\\n  --y"),
        ("code", "x = 1"),
        ("markdown", "B"),
    ]
    assert ast.unparse(ast.parse("".join(cells[3]["source"]))) == "x = 1"


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=named)
def test_an_example_runs_as_it_stands(example, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    pattern, least = PRINTED[example.stem]
    found = re.search(pattern, done.stdout)
    assert found, done.stdout[-3000:]
    before = least if least is not None else float(found["before"])
    assert float(found["after"]) > before, found[0]
