"""The pictures of the guides are linked, small, and drawn from what the package computes today."""

import importlib
import re
from pathlib import Path

import keras
import numpy as np
import pytest

from dpo_keras.losses import (
    binary_cross_entropy,
    log_likelihood_ratio,
    preference_probabilities,
)

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github"
NAMES = ("pair", "packed_row", "chunked_head", "loop", "sharding")


@pytest.fixture
def canvas(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("pictures.canvas")


def described():
    """The words that guides have for each picture in `.github/`, as (name, words)."""
    guides = [path.read_text(encoding="utf-8") for path in ROOT.glob("dpo_keras/*/README.md")]
    found = re.findall(r"!\[(.*?)\]\(\.\./\.\./\.github/(\w+)\.png\)", "\n".join(guides))
    return [(name, words) for words, name in found]


def test_each_picture_is_in_one_guide_with_words_for_those_who_do_not_see_it():
    modules = {path.stem for path in (ROOT / "scripts/pictures").glob("*.py")}
    assert modules == {"__main__", "canvas", *NAMES}
    for name in NAMES:
        (words,) = [words for one, words in described() if one == name]
        assert len(words.split()) >= 15
        assert (FOLDER / f"{name}.png").stat().st_size <= 60_000


def test_the_words_for_a_picture_have_its_numbers(canvas):
    figures = {name: canvas.recorded(FOLDER / f"{name}.png") for name in NAMES}
    pair, head = figures["pair"], figures["chunked_head"]
    shares = list(figures["sharding"]["shares"].values())[1:]
    expected = {
        "pair": [f"{p:.3f}" for p in pair["probabilities"]]
        + [f"{pair[name][0]:.2f}" for name in ("llr", "loss")],
        "chunked_head": [str(head[name]) for name in ("places", "predicting", "chunk")]
        + [f"{size:.0f} MiB" for size in head["MiB"]],
        "sharding": [f"{100 * share:.0f} %" for share in shares],
    }
    words = dict(described())
    for name, numbers in expected.items():
        assert [number for number in numbers if number not in words[name]] == [], name


@pytest.mark.parametrize(
    "name",
    [
        "loop",
        pytest.param("packed_row", marks=pytest.mark.slow),
        pytest.param("chunked_head", marks=pytest.mark.slow),
        pytest.param("sharding", marks=pytest.mark.slow),
    ],
)
def test_a_picture_shows_the_figures_of_today(canvas, name):
    found = importlib.import_module(f"pictures.{name}").figures()
    assert canvas.recorded(FOLDER / f"{name}.png") == found, f"python scripts/pictures {name}"


def test_the_mask_in_the_picture_is_that_of_texts_which_know_nothing_of_each_other(canvas):
    figures = canvas.recorded(FOLDER / "packed_row.png")
    places = np.arange(len(figures["ids"]))
    tree = np.searchsorted(figures["trees"], places, side="right")
    response = np.searchsorted(figures["responses"], places, side="right")
    prompt = np.array(list(figures["kinds"])) == "p"
    own = (tree[:, None] == tree) & (prompt | (response[:, None] == response) & ~prompt[:, None])
    sees = np.array([list(row) for row in figures["sees"]]) == "1"
    np.testing.assert_array_equal(sees, own & (places[:, None] >= places))


def test_the_numbers_of_the_pair_follow_from_its_log_probs(canvas):
    figures = canvas.recorded(FOLDER / "pair.png")
    scores = [figures["beta"] * (np.array(figures["policy"]) - figures["reference"])]
    expected = {
        "scores": scores,
        "probabilities": preference_probabilities(scores),
        "llr": log_likelihood_ratio(scores),
        "loss": binary_cross_entropy(np.ones(1, "float32"), scores),
    }
    for name, values in expected.items():
        found = np.ravel(keras.ops.convert_to_numpy(values))
        np.testing.assert_allclose(figures[name], found, atol=2e-4, err_msg=name)


def test_texts_that_overlap_or_leave_a_picture_are_refused(canvas):
    drawn = canvas.Canvas("A title", 100)
    drawn.check()
    drawn.text(30, 30, "over it")
    with pytest.raises(AssertionError, match="'A title' overlaps 'over it'"):
        drawn.check()
    wide = canvas.Canvas("W" * 80, 100)
    with pytest.raises(AssertionError, match="leaves the picture"):
        wide.check()
