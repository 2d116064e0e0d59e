"""The quality of a round: known annotators are recognized, and figures are the libraries'."""

import json
import warnings

import choix
import krippendorff
import numpy as np
import pytest
from feedback_rounds import judge_all, prefers
from feedback_tables import ACCURACIES, simulated, table_of
from scipy.stats import binomtest
from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa, fleiss_kappa

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Response, assess
from dpo_keras.feedback.annotator_quality import dawid_skene, fit_labels
from dpo_keras.feedback.judgements import BOTH_BAD, FIRST, SECOND, TIE, read_table
from dpo_keras.feedback.quality import agreement_figures, assess_table, cycles, policy_strengths
from dpo_keras.feedback.quality_report import html, text, write


def majority_right(table, truth):
    counts = table.counts()[:, :2]
    return (np.where(counts[:, 0] > counts[:, 1], 0, 1) == truth).mean()


@pytest.mark.parametrize("seed", range(5))
def test_the_two_biased_annotators_are_named_and_nobody_else(seed):
    table, _ = simulated(seed=seed)
    found = assess_table(table, resamples=20).findings()
    assert [f.split()[0] for f in found if "bias" in f] == ["lee", "lou"], found
    assert "position bias: chose the left" in found[0]
    assert "length bias: chose the longer" in found[1]


@pytest.mark.parametrize("longer_is_better", [0.3, 0.7])
def test_honest_people_are_not_blamed_where_length_and_quality_go_together(longer_is_better):
    for seed in range(4):
        table, _ = simulated(seed=seed, longer_is_better=longer_is_better, biased=False)
        assert [f for f in assess_table(table, resamples=20).findings() if "bias" in f] == []


@pytest.mark.parametrize("seed", range(5))
def test_dawid_skene_labels_beat_the_majority(seed):
    table, truth = simulated(seed=seed)
    labels = (fit_labels(table).posterior.argmax(1) == truth).mean()
    assert labels > majority_right(table, truth) + 0.03
    assert labels > 0.9


def test_dawid_skene_finds_how_often_people_are_right():
    table, truth = simulated(pairs=1000)
    accuracy = dict(zip(table.annotators, fit_labels(table).accuracy(), strict=True))
    for name, known in ACCURACIES.items():
        mine = table.annotator == table.annotators.index(name)
        seen = (table.label[mine] == truth[table.pair[mine]]).mean()
        assert accuracy[name] == pytest.approx(seen, abs=0.07) and abs(seen - known) < 0.05
    assert accuracy["lee"] == pytest.approx(0.5, abs=0.06)


def test_dawid_skene_holds_with_two_judgements_a_pair():
    table, truth = simulated(pairs=1500, seed=3)
    random = np.random.default_rng(0)
    order = random.random((5, 1500)).argsort(0)
    table = table.keep(order[table.annotator, table.pair] < 2)
    assert (table.counts().sum(1) == 2).all()
    posterior = fit_labels(table).posterior
    decided = table.counts()[:, 0] != table.counts()[:, 1]
    labels = (posterior.argmax(1) == truth).mean()
    coin = majority_right(table, truth)  # a split pair goes to the second: right half the time
    assert labels > coin + 0.05 and (posterior.argmax(1) == truth)[decided].mean() > 0.8


def test_dawid_skene_of_one_perfect_and_one_contrary_person():
    """Three who agree and one who always differs: the labels are theirs, the fourth is contrary."""
    label = np.array([[0, 1, 0, 1, 1, 0]] * 3 + [[1, 0, 1, 0, 0, 1]])
    annotator, pair = np.indices(label.shape)
    fit = dawid_skene(
        annotator.ravel(), pair.ravel(), label.ravel(), annotators=4, pairs=6, classes=2
    )
    assert fit.posterior.argmax(1).tolist() == label[0].tolist()
    assert (fit.accuracy()[:3] > 0.9).all() and fit.accuracy()[3] < 0.2
    np.testing.assert_allclose(fit.posterior.sum(1), 1.0)


def test_dawid_skene_does_not_depend_on_which_response_is_called_the_first():
    table, _ = simulated(pairs=200)
    flipped = np.random.default_rng(1).random(200) < 0.5
    label = np.where(flipped[table.pair], 1 - table.label, table.label)
    one = fit_labels(table).posterior
    other = dawid_skene(table.annotator, table.pair, label, annotators=5, pairs=200, classes=2)
    swapped = np.where(flipped[:, None], other.posterior[:, ::-1], other.posterior)
    np.testing.assert_allclose(one, swapped, atol=1e-4)


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


def test_position_bias_is_the_binomial_test():
    label = [FIRST] * 40 + [SECOND] * 10
    table = table_of([0] * 50, range(50), label, annotators=["lee"], pairs=50)
    (person,) = assess_table(table, resamples=5).people
    assert person.left.value == pytest.approx(0.8)
    assert person.left_p == pytest.approx(binomtest(40, 50).pvalue)


def test_checks_and_repeats_are_counted_apart():
    label = np.array([FIRST, SECOND, FIRST, FIRST, SECOND, TIE])
    table = table_of(
        [0] * 6, [0, 1, 2, 0, 1, 3], label, annotators=["ann"], pairs=4,
        repeat=np.array([0, 0, 0, 1, 1, 0], bool), gold=np.array([-1, -1, SECOND, -1, -1, FIRST]),
    )  # fmt: skip
    quality = assess_table(table, resamples=5)
    (person,) = quality.people
    assert person.judged == 2 and quality.counts["judgements"] == 2
    assert (person.gold.value, person.gold.count) == (0.0, 2)
    assert (person.repeats.value, person.repeats.count) == (1.0, 2)


def test_a_store_is_read_by_response_not_by_side(make_store, people):
    store = make_store(30, overlap=2)
    ann, bob = people(store, "ann", "bob")
    judge_all(store, ann, prefers("one"))
    judge_all(store, bob, prefers("two"))
    table = read_table(store.database)
    assert set(table.label[table.annotator == 0]) == {FIRST}
    assert set(table.label[table.annotator == 1]) == {SECOND}
    quality = assess(store, resamples=20)
    assert quality.contradicted.value == 1.0 and quality.agreement["raw_agreement"].value == 0.0
    assert any("Agreement is low" in finding for finding in quality.findings())


def test_undone_and_skipped_judgements_do_not_count(make_store, people):
    store = make_store(3, overlap=1)
    (ann,) = people(store, "ann")
    first = store.next(ann)[0].id
    store.submit(ann, first, "left", key="a")
    store.undo(ann, first, key="b")
    store.submit(ann, first, "both_bad", key="c")
    store.submit(ann, store.next(ann)[0].id, "skip", key="d")
    table = read_table(store.database)
    assert table.label.tolist() == [BOTH_BAD] and table.skipped.tolist() == [1]


def test_the_report_shows_hostile_names_as_text(make_store, tmp_path):
    name = "<script>alert(1)</script>\u202e$x$"
    given = [
        Candidates(f"p{n}", (Response(f"a{n}", name), Response(f"b{n}", "other"))) for n in range(6)
    ]
    store = make_store(given=given, overlap=1)
    person, _ = store.add_annotator(name)
    judge_all(store, person.id, lambda shown: "left" if hash(shown.left) % 2 else "tie")
    quality = assess(store, resamples=20)
    page = html(quality)
    assert "<script>" not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert "\u202e" not in text(quality)
    for suffix in (".html", ".json", ".txt"):
        write(quality, tmp_path / f"report{suffix}")
    assert json.loads((tmp_path / "report.json").read_text())["counts"]["judgements"] == 6
    with pytest.raises(InputError, match="must end in"):
        write(quality, tmp_path / "report.pdf")


def test_an_empty_store_has_a_report(make_store):
    quality = assess(make_store(2), resamples=5)
    assert quality.counts["judgements"] == 0 and "0 judgements" in text(quality)
    assert html(quality)


def test_nothing_here_imports_tensorflow():
    import subprocess
    import sys

    code = (
        "import sys; import dpo_keras.feedback, dpo_keras.feedback.annotation_server; "
        "import dpo_keras.feedback.quality_report, dpo_keras.feedback.pair_export; "
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    path = ":".join(sys.path)
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}).returncode == 0
