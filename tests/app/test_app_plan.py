"""How long a run takes: the arithmetic by hand, the work counted, and what a trial predicts."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from app_runs import settings
from tiny import Letters, pairs

from dpo_keras.app import plan
from dpo_keras.app.config import Config
from dpo_keras.app.console import Silent
from dpo_keras.app.prediction import Stage, StageTimes, seconds_left, stretched
from dpo_keras.app.run_clock import TRAINING, RunClock, outcome_lines, peak_memory
from dpo_keras.app.run_work import stages_of, work_of
from dpo_keras.batching import tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.training import Layout


def timed(began, *reports, every=0, ended=None):
    times = StageTimes(began, every)
    for done, now in reports:
        times.report(done, now)
    times.ended = ended
    return times


def test_speed_is_that_of_typical_units_without_the_trace_and_the_pauses():
    # Two steps of 1 s, a pause of 5 s in the third interval, and one step that something disturbed.
    times = timed(0, (1, 9), (2, 10), (3, 11), (4, 17), (5, 18), (6, 28), every=3)
    assert times.typical == 1 and times.timed == 4
    # Step 1 has 2 places, the others 1; steps are numbered from 0.
    assert timed(0, (1, 9), (2, 13)).per_unit_of([1, 2].__getitem__) == 2


def test_pauses_come_after_every_so_many_steps_and_at_the_end():
    assert Stage("a", 10, every=4).pauses() == 3 and Stage("a", 8, every=4).pauses() == 2
    assert Stage("a", 10, every=4).pauses(done=4) == 2 and Stage("a", 10).pauses() == 0


def test_a_trial_is_stretched_by_what_the_run_has_more_or_fewer_of():
    # 6 steps of 1 s after a trace of 9 s, with two validations of 2 pairs, 3 s each.
    times = timed(0, (1, 9), (2, 10), (3, 11), (4, 15), (5, 16), (6, 17), every=3, ended=20)
    trial = Stage("a", 6, every=3, validated=2)
    same = stretched(times, trial, trial, per_unit=1, per_pair=0.5)
    assert same == 20
    # 15 steps more; 5 pauses more of 3 s; 8 pairs more in each of all 7.
    whole = Stage("a", 21, every=3, validated=10)
    assert stretched(times, trial, whole, 1, 0.5) == 20 + 15 + 5 * 3 + 7 * 8 * 0.5
    # 2 steps fewer, and as many pauses.
    assert stretched(times, trial, Stage("a", 4, every=3, validated=2), 1, 0.5) == 18


STAGES = [
    Stage("before", 10, passes=100),
    Stage("training", 20, passes=600, every=10, validated=10, like="before"),
    Stage("after", 10, passes=100, like="before"),
]


def test_the_time_left_is_of_all_stages_to_come():
    assert seconds_left(STAGES, {}, 0) is None
    seen = {"data": timed(0, ended=2), "before": timed(2, (2, 8), (4, 10), (6, 12))}
    # 4 pairs at 1 s; a pass takes 10 pairs * 1 s / 100 passes; the last is like the first so far.
    assert seconds_left(STAGES, seen, 12) == pytest.approx(4 + 600 * 0.1 + 10)
    seen["before"] = timed(2, (2, 8), (4, 10), (10, 16), ended=17)
    seen["training"] = timed(17, (1, 30), (2, 32), (3, 34), every=10)
    # 17 steps at 2 s, two validations of 10 pairs at 1 s, and `before` took 15 s.
    assert seconds_left(STAGES, seen, 34) == 17 * 2 + 2 * 10 + 15
    # A stage that a resumed run had behind it counts no more.
    del seen["before"]
    assert seconds_left(STAGES, seen, 34) == pytest.approx(17 * 2 + 100 * (2 * 20 / 600))


class Clocked:
    """A clock that a test sets, and what a run showed."""

    def __init__(self, steps):
        self.time, self.shown = 0.0, []
        self.clock = RunClock(SimpleNamespace(advance=self.advance, stage=print), lambda: self.time)
        self.clock.expect([Stage(TRAINING, steps, passes=steps)])
        self.clock.stage(TRAINING)

    def advance(self, done, total, **values):
        self.shown.append(values.get("seconds_left"))

    def steps(self, *ends, total):
        for now in ends:
            self.time = now
            self.clock.advance(len(self.shown) + 1, total)


def test_a_run_predicts_itself_after_ten_steps_and_shows_no_time_before_it_settles():
    run = Clocked(100)
    run.steps(30, 32, 34, 36, total=100)
    assert run.shown == [None, None, None, 2 * 96]
    run.steps(*range(38, 50, 2), total=100)
    assert run.clock.prediction is None
    run.steps(50, total=100)
    assert run.clock.prediction["step"] == 11
    assert run.clock.prediction["seconds"] == 50 + 2 * 89
    run.time = 200
    found = run.clock.outcome()
    assert found["seconds"]["difference"] == pytest.approx(0.14)
    assert found["peak_bytes"]["actual"] >= found["peak_bytes"]["predicted"] > 0
    said = outcome_lines(found)["time up to the report"]
    assert said == "3 min 20 s; after step 11 predicted 3 min 48 s (+14 %)"


def test_a_short_run_predicts_itself_at_its_half_and_one_step_nothing():
    run = Clocked(5)
    run.steps(30, 32, 34, total=5)
    assert run.clock.prediction["step"] == 3 and run.clock.prediction["seconds"] == 38
    alone = Clocked(1)
    alone.steps(30, total=1)
    assert alone.clock.outcome() is None and outcome_lines(None) == {}


def test_the_stages_of_a_run_add_up_to_no_more_than_its_time():
    run = Clocked(5)
    run.steps(30, 32, 34, total=5)
    readings = itertools.count(40)
    run.clock.now = lambda: next(readings)  # a clock that never stands still
    found = run.clock.outcome()
    assert sum(found["stages"].values()) == found["seconds"]["actual"] == 40


@pytest.mark.parametrize("layout", [Layout("buckets", buckets=2), Layout("packed", row_length=64)])
@pytest.mark.parametrize("length", [{"epochs": 2}, {"max_steps": 5}])
def test_work_is_what_the_batches_hold(layout, length):
    tokenized = tokenize_pairs(pairs(11), Letters(), max_length=48)
    config = Config(
        model={"path": "x"},
        data={"path": "y"},
        training={"batch_size": 4, **length},
    )
    context = SimpleNamespace(config=config, layout=layout)
    work = work_of(context, config.training, tokenized)
    batches = layout.dataset(tokenized, 4, seed=config.seed, epochs=None).take(work.steps)
    masks = [batch["padding_mask"].numpy() for batch in batches]
    if layout.packed:
        assert work.tokens == sum(mask.sum() for mask in masks)
    else:  # empty rows of the short batch repeat a pair, and are not counted
        weights = [batch["weight"].numpy().any(-1) for batch in batches]
        kept = [mask[real] for mask, real in zip(masks, weights, strict=True)]
        assert work.tokens == sum(mask.sum() for mask in kept)
    assert work.steps == length.get("max_steps", 2 * work.per_epoch)
    first = [mask.size for mask in masks[: work.per_epoch]]
    assert work.step_places[: len(first)].tolist() == first
    assert first[work.longest] == max(first)
    assert work.fill == pytest.approx(work.epoch_tokens / sum(work.step_places))


def test_the_stages_of_a_run_are_counted_in_order():
    tokenized = tokenize_pairs(pairs(11), Letters(), max_length=48)
    config = settings("x", evaluation={"prompts": 3}, reference="cached")
    context = SimpleNamespace(
        config=config, layout=Layout("packed"), run=SimpleNamespace(writes=True)
    )
    stages = stages_of(context, "cached", tokenized, tokenized.take(np.arange(4)))
    assert [(stage.title, stage.units) for stage in stages] == [
        ("Supervised warm-up", 2),
        ("Reference log-probs of the pairs (train)", 11),
        ("Reference log-probs of the pairs (held_out)", 4),
        ("Evaluation before preference training", 4),
        ("Responses before preference training", 3),
        ("Preference training", 2),
        ("Evaluation after preference training", 4),
        ("Responses after preference training", 3),
    ]
    assert all(stage.passes > 0 for stage in stages)


def test_a_cluster_cannot_be_planned_by_one_of_its_processes(tmp_path, monkeypatch):
    workers = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(workers))
    with pytest.raises(InputError, match=r"^training\.strategy cannot be planned by one of its 2"):
        plan.predict_run(settings(tmp_path / "run"), Silent())


def test_peak_memory_never_falls():
    before = peak_memory()
    held = np.ones(2_000_000)
    assert peak_memory() >= before > held.nbytes
