"""A small run of the load benchmark: many at once, the server killed on the way, nothing lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_nothing_is_lost_when_the_server_is_killed_under_load():
    command = [
        sys.executable, str(ROOT / "scripts/bench/annotate_load.py"), "--annotators", "5",
        "--pairs", "2000", "--overlap", "2", "--kills", "2", "--reading", "0.02",
        "--minutes", "0.05",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["confirmed"] > 50 and found["confirmed_and_missing"] == 0
    assert found["confirmed_twice"] == found["pairs_with_more"] == 0
    assert len(found["seconds_away_after_kill_9"]) == 2
    assert {sample["descriptors"] < 60 for sample in found["server"]} == {True}
