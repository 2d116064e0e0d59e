"""A few of the mutations that `scripts/fuzz.py` makes, and a fault that it must find."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
KINDS = (
    *("jsonl", "csv", "jsonl.gz", "csv.gz", "parquet", "built", "tokens", "yaml", "checkpoint"),
    *("candidates", "candidates.gz", "http"),
)


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("fuzz")


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_or_reported_or_means_what_it_says(fuzz, tmp_path, kind):
    outcomes, findings = fuzz.fuzz([kind], mutations=12, seed=1, folder=tmp_path)
    assert findings == [] and outcomes[kind].total() == 12


def test_no_kind_of_input_is_left_out(fuzz):
    assert set(fuzz.KINDS) == set(KINDS)


def test_a_program_that_leaves_out_the_last_pair_is_found(fuzz, tmp_path, monkeypatch):
    files = importlib.import_module("fuzzing.text_files")
    whole = files.read_preferences

    def shortened(path, **options):
        found = whole(path, **options)
        return type(found)(found[:-1], found.report)

    monkeypatch.setattr(files, "read_preferences", shortened)
    _, findings = fuzz.fuzz(["jsonl"], mutations=12, seed=1, folder=tmp_path)
    assert any("the pairs are not what the file says" in finding for finding in findings)


def test_a_mutation_can_be_made_again_by_its_number(fuzz, tmp_path):
    kind = fuzz.KINDS["jsonl"](tmp_path)
    outcomes = [fuzz.attempt(kind, number, seed=3) for number in (*range(6), *range(6))]
    assert outcomes[:6] == outcomes[6:]
