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
        "--pairs", "60", "--overlap", "2", "--kills", "2", "--think", "0.02", "--limit", "120",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["confirmed"] == 120 and found["confirmed_and_missing"] == 0
    assert found["pairs_with_exactly_the_overlap"] == 60 and found["kills"] == 2
