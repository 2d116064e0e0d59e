"""The examples of the stage's guide run, in their order."""

import re
from pathlib import Path

from tiny import Letters, gpt2

import dpo_keras
from dpo_keras import evaluation
from dpo_keras.evaluation.findings import CHECKS
from dpo_keras.training import DPOModel

FOLDER = Path(evaluation.__file__).parent
GUIDE = (FOLDER / "README.md").read_text(encoding="utf-8")


def rows(title):
    """The first cells of the table under a heading."""
    section = GUIDE.split(f"## {title}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE))


def test_the_examples_run(tokenized, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = gpt2(num_layers=1)
    policy.preprocessor = Letters()
    names = {"dpo_keras": dpo_keras, "model": DPOModel(policy), "tokenized": tokenized}
    names["prompts"] = ["a", "bc"]
    examples = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    for example in examples:
        exec(example, names)
    assert len(examples) == 2
    assert (tmp_path / "report" / "report.html").is_file()


def test_every_file_and_every_finding_is_in_its_table():
    assert rows("Maintain") == {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
    assert rows("Findings") == set(CHECKS)
