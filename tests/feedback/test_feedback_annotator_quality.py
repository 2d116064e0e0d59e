"""Known annotators are recognized: their accuracy, their biases, and the labels they imply."""

import numpy as np
import pytest
from feedback_tables import ACCURACIES, simulated, table_of
from scipy.stats import binomtest

from dpo_keras.feedback.annotator_quality import dawid_skene, fit_labels
from dpo_keras.feedback.judgements import FIRST, SECOND, TIE
from dpo_keras.feedback.quality import assess_table


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
