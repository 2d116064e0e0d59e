import random

import pytest

from dpo_keras.errors import InputError
from dpo_keras.preferences import Message, PreferencePair, Preferences


def make(prompts, **fields):
    return Preferences(
        PreferencePair(
            prompt, f"yes {n}", "no", **{name: values[n] for name, values in fields.items()}
        )
        for n, prompt in enumerate(prompts)
    )


def prompts_of(pairs):
    return {pair.prompt for pair in pairs}


@pytest.fixture(scope="module")
def pairs():
    rng = random.Random(0)
    return make([f"prompt {rng.randrange(400)}" for _ in range(1000)])


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_is_on_both_sides_and_the_fraction_is_hit(pairs, fraction, seed):
    train, held_out = pairs.split(fraction, seed=seed)
    assert not prompts_of(train) & prompts_of(held_out)
    assert sorted([*train, *held_out], key=str) == sorted(pairs, key=str)
    assert abs(len(held_out) - fraction * len(pairs)) <= 1


def test_the_same_seed_gives_the_same_split_and_another_seed_another(pairs):
    assert pairs.split(0.1, seed=3) == pairs.split(0.1, seed=3)
    assert prompts_of(pairs.split(0.1, seed=3)[1]) != prompts_of(pairs.split(0.1, seed=4)[1])


def test_the_split_does_not_depend_on_the_order_and_keeps_it(pairs):
    shuffled = list(pairs)
    random.Random(1).shuffle(shuffled)
    train, held_out = pairs.split(0.2)
    assert set(Preferences(shuffled).split(0.2)[1]) == set(held_out)
    place = {pair: n for n, pair in enumerate(pairs)}
    for side in (train, held_out):
        assert [place[pair] for pair in side] == sorted(place[pair] for pair in side)


def test_sides_keep_the_report(pairs):
    train, held_out = pairs.split(0.1)
    assert train.report is held_out.report is pairs.report


def test_prompts_in_messages_are_split_too():
    conversations = [(Message("user", f"{n // 2}"),) for n in range(20)]
    pairs = Preferences(
        PreferencePair(prompt, (Message("assistant", f"yes {n}"),), (Message("assistant", "no"),))
        for n, prompt in enumerate(conversations)
    )
    train, held_out = pairs.split(0.2)
    assert len(held_out) == 4
    assert not prompts_of(train) & prompts_of(held_out)


@pytest.mark.parametrize("by", ["annotator", "group"])
def test_annotators_and_groups_stay_on_one_side_and_so_do_their_prompts(by):
    keys = [f"key {n % 10}" for n in range(100)]
    # Keys 0 and 5 share a prompt, so they go together.
    prompts = ["shared" if n in (0, 5) else f"prompt {n}" for n in range(100)]
    for seed in range(5):
        train, held_out = make(prompts, **{by: keys}).split(0.3, seed=seed, by=by)
        sides = [{getattr(pair, by) for pair in side} for side in (train, held_out)]
        assert not sides[0] & sides[1]
        assert ("key 0" in sides[0]) == ("key 5" in sides[0])
        assert not prompts_of(train) & prompts_of(held_out)
        assert len(held_out) == 30


def test_annotators_who_all_share_prompts_cannot_be_split():
    pairs = make(["a", "a", "b", "b"], annotator=["x", "y", "y", "z"])
    with pytest.raises(InputError, match="every annotator shares prompts"):
        pairs.split(0.5, by="annotator")


def test_a_pair_without_annotator_is_told():
    with pytest.raises(InputError, match="1 of 2 have none"):
        make(["a", "b"], annotator=["x", None]).split(0.5, by="annotator")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), "0.1", True])
def test_a_fraction_outside_0_and_1_is_refused(pairs, fraction):
    with pytest.raises(InputError, match=r"fraction must be a number in \(0, 1\)"):
        pairs.split(fraction)


def test_an_unknown_key_is_refused(pairs):
    with pytest.raises(InputError, match="prompt, annotator, group"):
        pairs.split(0.1, by="topic")


@pytest.mark.parametrize(
    ("prompts", "fraction", "reason"),
    [
        (["a"] * 5, 0.5, "all 5 pairs have one prompt"),
        (["a", "b", "c"], 0.01, "held-out side empty"),
        (["a", "b", "c"], 0.99, "training side empty"),
    ],
)
def test_a_side_that_would_be_empty_is_refused(prompts, fraction, reason):
    with pytest.raises(InputError, match=reason):
        make(prompts).split(fraction)
