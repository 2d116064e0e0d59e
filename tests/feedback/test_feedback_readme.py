"""The guide's programs run, and print what they say."""

import re
from pathlib import Path

import dpo_keras.feedback

README = Path(dpo_keras.feedback.__file__).with_name("README.md")


def test_the_programs_of_the_guide_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(programs) >= 3
    names = {}  # a program may go on where the one before it ended
    for program in programs:
        exec(compile(program, str(README), "exec"), names)
        said = re.search(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)
        printed = capsys.readouterr().out
        assert said is None or printed.splitlines()[-1] == said.group(1)
