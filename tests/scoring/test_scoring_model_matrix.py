"""Every model family does what the table of `dpo_keras/scoring/README.md` says.

A cell that begins to work, or fails otherwise than by the reason given, fails its test.
`python scripts/model_table.py` runs all cells and writes the table anew; the suite runs those of
`REPRESENTATIVES`.
"""

import functools

import pytest
from families import ALL_FAMILIES
from model_matrix import CELLS, REPRESENTATIVES, Family, NothingToDoError
from model_reasons import BEGIN, END, README, REASONS, table

from dpo_keras.errors import InputError

pytestmark = pytest.mark.slow


@functools.lru_cache(maxsize=1)  # the cells of a family are run one after the other
def family_of(name):
    return Family(name)


def marked(family, cell):
    marks = () if family in REPRESENTATIVES else pytest.mark.table
    return pytest.param(family, cell, marks=marks, id=f"{family}-{cell.replace(' ', '_')}")


@pytest.mark.parametrize(
    ("family", "cell"), [marked(family, cell) for family in ALL_FAMILIES for cell in CELLS]
)
def test_a_family_does_what_the_table_says(family, cell, tmp_path):
    reason = REASONS.get((family, cell))
    if reason is None:
        CELLS[cell](family_of(family), tmp_path)
    else:
        with pytest.raises((InputError, NothingToDoError), match=reason.error):
            CELLS[cell](family_of(family), tmp_path)


def test_the_table_in_the_guide_is_that_of_the_cells():
    text = README.read_text(encoding="utf-8")
    assert BEGIN + table() + END in text, "run: python scripts/model_table.py"
