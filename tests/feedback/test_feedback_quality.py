"""The quality of a round: known annotators are recognized, and figures are the libraries'."""

import json
import warnings

import choix
import krippendorff
import numpy as np
import pytest
from feedback_tables import table_of
from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa, fleiss_kappa

from dpo_keras.feedback.judgements import BOTH_BAD, FIRST, SECOND, TIE
from dpo_keras.feedback.quality import agreement_figures, assess_table, cycles, policy_strengths
from dpo_keras.feedback.quality_report import html, text


def test_agreement_figures_are_the_libraries_on_the_same_table():
    random = np.random.default_rng(0)
    answers = random.integers(0, 4, (3, 60))
    answers[1:, :40] = answers[0, :40]
    annotator, pair = np.indices(answers.shape)
    table = table_of(annotator.ravel(), pair.ravel(), answers.ravel(), annotators="abc", pairs=60)
    found = agreement_figures(table, resamples=100)
    alpha = krippendorff.alpha(reliability_data=answers, level_of_measurement="nominal")
    assert found["krippendorff_alpha"].value == pytest.approx(alpha)
    fleiss = fleiss_kappa(aggregate_raters(answers.T, 4)[0])
    assert found["fleiss_kappa"].value == pytest.approx(fleiss)
    by_hand = np.mean([answers[a] == answers[b] for a, b in ((0, 1), (0, 2), (1, 2))])
    assert found["raw_agreement"].value == pytest.approx(by_hand)
    for one in ("krippendorff_alpha", "fleiss_kappa", "raw_agreement"):
        assert found[one].low < found[one].value < found[one].high and found[one].count == 60
    assert "exactly two people, 3" in found["cohen_kappa"].reason

    two = table.keep(table.annotator < 2)
    square = np.zeros((4, 4))
    np.add.at(square, (answers[0], answers[1]), 1)
    kappa = agreement_figures(two, resamples=50)["cohen_kappa"]
    assert kappa.value == pytest.approx(cohens_kappa(square, return_results=False))
    assert kappa.low < kappa.value < kappa.high


def test_alpha_takes_pairs_with_unequal_numbers_of_people():
    answers = np.array([[0, 1, 0, 1, 2], [0, 1, 1, np.nan, 2], [np.nan, 1, 0, np.nan, np.nan]])
    annotator, pair = np.nonzero(np.isfinite(answers))
    table = table_of(
        annotator, pair, answers[annotator, pair].astype(int), annotators="abc", pairs=5
    )
    alpha = krippendorff.alpha(reliability_data=answers, level_of_measurement="nominal")
    assert agreement_figures(table, 10)["krippendorff_alpha"].value == pytest.approx(alpha)


@pytest.mark.parametrize(
    ("annotator", "pair", "label", "words"),
    [
        ([], [], [], "judged by two people"),
        ([0, 1], [0, 1], [0, 1], "judged by two people"),
        ([0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1], "same answer"),
    ],
)
def test_undefined_agreement_is_explained(annotator, pair, label, words):
    table = table_of(np.array(annotator, int), np.array(pair, int), np.array(label, int),
                     annotators=["ann", "bob"], pairs=2)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quality = assess_table(table, resamples=20)
    assert quality.agreement["krippendorff_alpha"].value is None
    assert words in quality.agreement["krippendorff_alpha"].reason
    for shown in (text(quality), html(quality), json.dumps(quality.as_dict(), allow_nan=False)):
        assert "nan" not in shown.lower().replace("annotat", "").replace("finan", "")


def test_strengths_are_the_librarys():
    random = np.random.default_rng(0)
    makers = [("a", "b"), ("b", "c"), ("a", "c")] * 60
    label = np.where(random.random(180) < 0.7, FIRST, SECOND)
    table = table_of([0] * 180, range(180), label, annotators=["ann"], pairs=180, makers=makers)
    found = policy_strengths(table, resamples=100).estimates
    index = {"a": 0, "b": 1, "c": 2}
    games = [
        (index[m[0]], index[m[1]]) if one == FIRST else (index[m[1]], index[m[0]])
        for m, one in zip(makers, label, strict=True)
    ]
    expected = choix.ilsr_pairwise(3, games)
    np.testing.assert_allclose(
        [found[n].value for n in "abc"], expected - expected.mean(), atol=1e-5
    )
    assert all(one.low < one.value < one.high for one in found.values())
    assert found["a"].value > found["b"].value > found["c"].value


def test_two_policies_and_ties_have_a_closed_form():
    """7 wins, 2 losses, 2 ties: (7 + 1) / (2 + 1), so the difference is log(8 / 3)."""
    label = [FIRST] * 7 + [SECOND] * 2 + [TIE, BOTH_BAD]
    table = table_of([0] * 11, range(11), label, annotators=["ann"], pairs=11)
    found = policy_strengths(table, resamples=10).estimates
    assert found["a"].value - found["b"].value == pytest.approx(np.log(8 / 3), abs=1e-6)


def test_strengths_that_no_finite_number_fits_are_explained():
    table = table_of([0] * 5, range(5), [FIRST] * 5, annotators=["ann"], pairs=5)
    found = policy_strengths(table, resamples=10).estimates
    assert found["a"].value is None and "won (or lost) every comparison" in found["a"].reason
    unnamed = table_of([0], [0], [FIRST], annotators=["ann"], pairs=1, makers=[(None, None)])
    assert policy_strengths(unnamed).estimates == {}


def test_cycles_are_counted_by_prompt():
    responses = np.array([[1, 2], [2, 3], [1, 3]] * 2)
    prompts = np.array([0, 0, 0, 1, 1, 1])
    # Prompt 0: 1 > 2 > 3 > 1. Prompt 1: 1 > 2 > 3 and 1 > 3.
    label = [FIRST, FIRST, SECOND, FIRST, FIRST, FIRST]
    table = table_of([0] * 6, range(6), label, annotators=["ann"], pairs=6, responses=responses,
                     prompts=prompts, makers=[(None, None)] * 6)  # fmt: skip
    found = cycles(table)
    assert (found.value, found.count) == (0.5, 2)
    two = table_of([0], [0], [FIRST], annotators=["ann"], pairs=1)
    assert "three responses" in cycles(two).reason


def test_nothing_here_imports_tensorflow():
    import subprocess
    import sys

    code = (
        "import sys; import dpo_keras.feedback, dpo_keras.feedback.annotation_server; "
        "import dpo_keras.feedback.quality_report, dpo_keras.feedback.pair_export; "
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0
