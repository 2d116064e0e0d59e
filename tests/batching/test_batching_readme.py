"""The examples of the stage's guide run, and its list of files is complete."""

import re
from pathlib import Path

import dpo_keras.batching
from dpo_keras.batching import available_templates

FOLDER = Path(dpo_keras.batching.__file__).parent
GUIDE = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_examples_run(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        exec(block, names)
    assert "3 pairs, 3 kept" in capsys.readouterr().out
    assert "reach" in names["packed"].element_spec and int(names["dataset"].cardinality()) == 2


def test_every_file_and_template_is_listed():
    files = {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
    assert files == set(re.findall(r"^\| `(\w+\.py)`", GUIDE, re.MULTILINE))
    assert all(f"`{name}`" in GUIDE for name in available_templates())
