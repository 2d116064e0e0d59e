"""The page of documentation says what the code does."""

import importlib.util
import re
from pathlib import Path

import pytest

from dpo_keras.losses import OBJECTIVES, PENALTIES, DPOLoss, available
from dpo_keras.losses.options import OPTIONS

_PATH = Path(__file__).parents[2] / "scripts" / "losses_page.py"
_SPEC = importlib.util.spec_from_file_location("losses_page", _PATH)
losses_page = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(losses_page)

TEXT = losses_page.PAGE.read_text(encoding="utf-8")


def test_the_tables_are_those_of_today():
    assert losses_page.page(TEXT) == TEXT, "run python scripts/losses_page.py --write"


def test_every_objective_penalty_and_option_has_a_row():
    assert [row["name"] for row in losses_page.objective_rows()] == list(available())
    assert [row["name"] for row in losses_page.penalty_rows()] == list(PENALTIES)
    assert [row["name"] for row in losses_page.option_rows()] == list(OPTIONS)


@pytest.mark.parametrize("name", available())
def test_every_objective_has_formula_summary_and_source(name):
    objective = OBJECTIVES[name]
    assert objective.formula and objective.summary().endswith(".")
    assert all(re.fullmatch(r"\d{4}\.\d{5}", paper) for paper in objective.source.split(", "))


def test_code_names_of_the_page_exist():
    """Every `name` or `name=…` in the page is a loss, a penalty, an option or an argument."""
    prose = re.sub(r"<!-- tables.*end of tables -->", "", TEXT, flags=re.DOTALL)
    known = {*available(), *PENALTIES, *OPTIONS, *DPOLoss().get_config(), "OBJECTIVES", "OPTIONS"}
    known |= {"preference", "margin", "group", "chosen_reward", "chosen_logps", "kto"}
    known |= {"reverse_kl", "forward_kl", "js", "alpha", "Hinge", "pair_loss"}
    named = {name.split("=")[0] for name in re.findall(r"`([a-z_A-Z]+(?:=[^`]*)?)`", prose)}
    assert named - known == {"KERAS_BACKEND"}


def test_the_command_prints_the_tables_and_keeps_the_page_up_to_date(tmp_path, monkeypatch, capsys):
    losses_page.main([])
    assert "| `simpo` | -log σ(β(π̄⁺ - π̄⁻) - γ) |" in capsys.readouterr().out
    page = tmp_path / "README.md"
    page.write_text(
        f"before\n{losses_page.BEGIN}\nold\n{losses_page.END}\nafter\n", encoding="utf-8"
    )
    monkeypatch.setattr(losses_page, "PAGE", page)
    losses_page.main(["--write"])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "old" not in text and losses_page.tables() in text
