"""Preferences as a sequence, and the one split of pairs in memory and on disk."""

import random

import numpy as np
import pytest
from preferences_samples import random_pairs

from dpo_keras.errors import InputError
from dpo_keras.preferences import (
    Message,
    PreferencePair,
    Preferences,
    build_preferences,
    support_pairs,
)
from dpo_keras.preferences.collection import earlier_split


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


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """The same pairs in memory and on disk: texts, messages, annotators and groups."""
    rng = random.Random(1)
    pairs = []
    for number in range(240):
        prompt, chosen, rejected = f"prompt {rng.randrange(150)}", f"yes {number}", "no"
        if number % 3 == 0:
            prompt = (Message("user", prompt),)
            chosen, rejected = ((Message("assistant", text),) for text in (chosen, rejected))
        # Annotators share prompts within their own ten, so not all of them belong together.
        annotator = f"annotator {hash_free(prompt) % 40}"
        pairs.append(PreferencePair(prompt, chosen, rejected, annotator=annotator,
                                    group=f"group {hash_free(prompt) % 12}"))  # fmt: skip
    memory = Preferences(pairs)
    return memory, build_preferences(pairs, tmp_path_factory.mktemp("built") / "pairs")


def hash_free(prompt):
    """A number for a prompt that no process draws anew."""
    return sum(map(ord, prompt if isinstance(prompt, str) else prompt[0].content)) * 7


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_is_on_both_sides_and_the_share_is_the_fraction(pairs, fraction, seed):
    train, held_out = pairs.split(fraction, seed=seed)
    assert not prompts_of(train) & prompts_of(held_out)
    assert sorted([*train, *held_out], key=str) == sorted(pairs, key=str)
    prompts, sizes = np.unique([pair.prompt for pair in pairs], return_counts=True)
    deviation = (np.square(sizes).sum() * fraction * (1 - fraction)) ** 0.5
    assert abs(len(held_out) - fraction * len(pairs)) < 3 * deviation


@pytest.mark.parametrize("by", ["prompt", "annotator", "group"])
@pytest.mark.parametrize(("fraction", "seed"), [(0.1, 0), (0.3, 1), (0.5, 2), (0.3, -5)])
def test_pairs_in_memory_and_on_disk_have_the_same_sides(labelled, by, fraction, seed):
    memory, disk = labelled
    sides = memory.split(fraction, seed=seed, by=by)
    assert [list(side) for side in disk.split(fraction, seed=seed, by=by)] == [
        list(side) for side in sides
    ]
    for key in {"prompt", by}:
        train, held_out = ({getattr(pair, key) for pair in side} for side in sides)
        assert train and held_out and not train & held_out
    some = np.arange(0, len(memory), 2)
    assert list(disk.select(some).split(fraction, seed, by)[1]) == list(
        memory.select(some).split(fraction, seed, by)[1]
    )


def test_sides_are_those_of_earlier_versions_for_built_directories():
    """Prompts are drawn as `StoredPreferences.split` always drew them."""
    held_out = Preferences(random_pairs(200, prompts=80)).split(0.05, seed=3)[1]
    assert prompts_of(held_out) == {"prompt 8", "prompt 29"}


def test_more_pairs_move_no_prompt_to_the_other_side(pairs):
    before = prompts_of(pairs.split(0.2)[1])
    more = Preferences([*make([f"new {n}" for n in range(500)]), *pairs, *pairs[:100]])
    assert prompts_of(more.split(0.2)[1]) & prompts_of(pairs) == before


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
    conversations = [(Message("user", f"{n // 2}"),) for n in range(80)]
    pairs = Preferences(
        PreferencePair(prompt, (Message("assistant", f"yes {n}"),), (Message("assistant", "no"),))
        for n, prompt in enumerate(conversations)
    )
    train, held_out = pairs.split(0.2)
    assert len(held_out) % 2 == 0 and abs(len(held_out) - 16) <= 10
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


def test_annotators_belong_together_through_others():
    # a-b share p, b-c share q, c-d share r: one unit; e is alone.
    pairs = make(["p", "p", "q", "q", "r", "r", "s"], annotator=list("abbccde"))
    for seed in range(5):
        _, held_out = pairs.split(0.2, seed=seed, by="annotator")
        assert [pair.annotator for pair in held_out] == ["e"]


def test_annotators_who_all_share_prompts_cannot_be_split():
    pairs = make(["a", "a", "b", "b"], annotator=["x", "y", "y", "z"])
    with pytest.raises(InputError, match="every annotator shares prompts"):
        pairs.split(0.5, by="annotator")


def test_a_pair_without_annotator_is_told():
    with pytest.raises(InputError, match="1 of 2 have none") as caught:
        make(["a", "b"], annotator=["x", None]).split(0.5, by="annotator")
    assert caught.value.problems[0].argument == "by"


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), "0.1", True])
def test_a_fraction_outside_0_and_1_is_refused(pairs, fraction):
    with pytest.raises(InputError, match=r"fraction must be a number in \(0, 1\)") as caught:
        pairs.split(fraction)
    assert caught.value.problems[0].argument == "fraction"


def test_an_unknown_key_is_refused(pairs):
    with pytest.raises(InputError, match="prompt, annotator, group") as caught:
        pairs.split(1.5, by="topic")
    assert [problem.argument for problem in caught.value.problems] == ["fraction", "by"]


@pytest.mark.parametrize("seed", range(5))
def test_few_prompts_leave_no_side_empty(seed):
    pairs = make(["a", "b", "b", "c"])
    held_out = [prompts_of(pairs.split(fraction, seed=seed)[1])
                for fraction in (1e-9, 0.01, 0.3, 0.6, 0.99, 1 - 1e-9)]  # fmt: skip
    assert (len(held_out[0]), len(held_out[-1])) == (1, 2)
    # The prompt that changes sides is that with the nearest draw: larger shares contain smaller.
    assert all(less <= more for less, more in zip(held_out, held_out[1:], strict=False))


@pytest.mark.parametrize("pairs", [make(["a"] * 5), make(["a"])])
def test_one_prompt_cannot_be_split(pairs):
    with pytest.raises(InputError, match="have one prompt"):
        pairs.split(0.5)


def test_groups_that_are_all_far_from_the_fraction_are_refused():
    pairs = make([str(n) for n in range(20)], group=["x"] * 10 + ["y"] * 10)
    with pytest.raises(InputError, match="held-out side empty; choose another") as caught:
        pairs.split(0.1, by="group")
    assert caught.value.problems[0].argument == "fraction"
    assert len(pairs.split(0.3, by="group")[1]) == 10


def test_runs_begun_before_find_their_sides_again():
    """Rows that the versions with two splits held out."""
    pairs = [PreferencePair(f"p {n % 30}", f"yes {n}", "no", annotator=f"a{n % 6}",
                            group=f"g{n % 10}") for n in range(60)]  # fmt: skip

    def rows(pairs, *arguments):
        held_out = set(earlier_split(Preferences(pairs), *arguments)[1])
        return [n for n, pair in enumerate(pairs) if pair in held_out]

    assert rows(pairs, 0.3, 1, "annotator") == [n for n in range(60) if n % 6 in (0, 2)]
    assert rows(pairs, 0.2, 1, "group") == [n for n in range(60) if n % 10 in (2, 3)]
    assert rows(list(support_pairs(300)), 0.1, 5, "prompt") == [
        7, 8, 14, 15, 16, 20, 23, 31, 46, 56, 69, 83, 84, 92, 108, 109, 128, 132, 135, 161, 175,
        205, 210, 226, 233, 236, 244, 256, 258, 262,
    ]  # fmt: skip
    conversations = [
        PreferencePair((Message("user", pair.prompt),), (Message("assistant", pair.chosen),),
                       (Message("assistant", pair.rejected),)) for pair in pairs
    ]  # fmt: skip
    assert rows(conversations, 0.2, 3, "prompt") == [
        3, 9, 14, 20, 28, 29, 33, 39, 44, 50, 58, 59
    ]  # fmt: skip


def test_preferences_are_a_sequence_with_the_report():
    pairs = make(["a", "b", "c", "d", "e"])
    assert isinstance(pairs[1:3], Preferences) and pairs[1:3].report is pairs.report
    assert [pair.prompt for pair in pairs[1:3]] == ["b", "c"]
    assert pairs[-1].prompt == "e" and pairs[0] in pairs
    assert repr(pairs) == "Preferences(5 pairs, 0 dropped)"
    with pytest.raises(InputError, match="item 0 is a dict"):
        Preferences([{"prompt": "p"}])
