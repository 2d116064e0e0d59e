"""Run every cell of the table of models, and write the table into dpo_keras/scoring/README.md.

    python scripts/model_table.py             # all cells: some minutes
    python scripts/model_table.py -k gemma4   # these cells; the table is left alone

The cells are the tests of `tests/scoring/test_scoring_model_matrix.py`. The table is written only
where all of them pass, and names a reason where a test expects one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "scoring"


def run_cells(arguments: list[str]) -> int:
    """Run the tests of the cells, with pytest's own arguments; returns pytest's exit code."""
    options = ["-q", "-m", "table or not table", f"--rootdir={ROOT}"]
    module = TESTS / "test_scoring_model_matrix.py"
    return int(pytest.main([str(module), *options, *arguments]))


def main() -> int:
    """Run the cells and, where all of them were run and passed, write the table."""
    arguments = sys.argv[1:]
    # What pytest's own `-k` leaves out has not been seen.
    whole = ["-k", "test_a_family"]
    code = run_cells(arguments or whole)
    if code == 0 and not arguments:
        # The tests' own module, found by `pythonpath` of pyproject.toml.
        from model_reasons import write_table

        write_table()
    return code


if __name__ == "__main__":
    sys.exit(main())
