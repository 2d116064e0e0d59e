"""The examples of the stage's README run, in their order."""

import re
from pathlib import Path

import dpo_keras
from dpo_keras.preferences import support_pairs, write_preferences

README = Path(dpo_keras.__file__).parent / "preferences" / "README.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_preferences(support_pairs(60), "pairs.jsonl")
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    for example in examples:
        exec(example, names)
    assert len(examples) == 6
    assert len(names["train"]) + len(names["held_out"]) == 60


def test_every_file_of_the_stage_is_in_the_table():
    files = {path.name for path in README.parent.glob("*.py")} - {"__init__.py"}
    rows = re.findall(r"^\| `(\w+\.py)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(rows) == files
