"""The page of documentation says what the code does."""

import re

import pytest

from dpo_keras.losses import OBJECTIVES, PENALTIES, DPOLoss, available, catalogue
from dpo_keras.losses.options import OPTIONS

TEXT = catalogue.PAGE.read_text(encoding="utf-8")


def test_the_tables_are_those_of_today():
    assert catalogue.page(TEXT) == TEXT, "run python -m dpo_keras.losses.catalogue --write"


def test_every_objective_penalty_and_option_has_a_row():
    assert [row["name"] for row in catalogue.objective_rows()] == list(available())
    assert [row["name"] for row in catalogue.penalty_rows()] == list(PENALTIES)
    assert [row["name"] for row in catalogue.option_rows()] == list(OPTIONS)


@pytest.mark.parametrize("name", available())
def test_every_objective_has_formula_summary_and_source(name):
    objective = OBJECTIVES[name]
    assert objective.formula and objective.summary.endswith(".")
    assert all(re.fullmatch(r"\d{4}\.\d{5}", paper) for paper in objective.source.split(", "))


def test_code_names_of_the_page_exist():
    """Every `name` or `name=…` in the page is a loss, a penalty, an option or an argument."""
    prose = re.sub(r"<!-- tables.*end of tables -->", "", TEXT, flags=re.DOTALL)
    known = {*available(), *PENALTIES, *OPTIONS, *DPOLoss().get_config(), "OBJECTIVES"}
    known |= {"preference", "margin", "group", "chosen_reward", "chosen_logps", "kto"}
    known |= {"reverse_kl", "forward_kl", "js", "alpha"}
    named = {name.split("=")[0] for name in re.findall(r"`([a-z_A-Z]+(?:=[^`]*)?)`", prose)}
    assert named - known == {"KERAS_BACKEND"}


def test_the_command_prints_the_tables_and_keeps_the_page_up_to_date(tmp_path, monkeypatch, capsys):
    catalogue.main([])
    assert "| `simpo` | -log σ(β(π̄⁺ - π̄⁻) - γ) |" in capsys.readouterr().out
    page = tmp_path / "README.md"
    page.write_text(f"before\n{catalogue.BEGIN}\nold\n{catalogue.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(catalogue, "PAGE", page)
    catalogue.main(["--write"])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "old" not in text and catalogue.tables() in text
