"""Streams: the same texts as without, as they grow, whatever they are written together with."""

import threading
import time

import keras
import pytest
from families import ALL_FAMILIES
from tiny import Letters, gpt2, plain_model

from dpo_keras.errors import InputError
from dpo_keras.training import generate_responses, stream_responses

PROMPTS = ["a", "bcd", "efghij"]
SEEDS = [3, 4, 3]
OPTIONS = {"max_new_tokens": 12, "preprocessor": Letters(), "top_p": 0.9}


@pytest.fixture(scope="module")
def policy():
    return gpt2()


def check_the_end(policy):
    alone = [
        generate_responses(policy, [prompt], seed=seed, **OPTIONS)[0]
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    texts, ended = ["", "", ""], [0, 0, 0]
    for number, text, last in stream_responses(policy, PROMPTS, seeds=SEEDS, **OPTIONS):
        assert text.startswith(texts[number]) and not ended[number]
        texts[number] = text
        ended[number] += last
    assert texts == alone and ended == [1, 1, 1]


def test_a_stream_ends_with_the_text_that_its_prompt_and_seed_have_alone(policy):
    check_the_end(policy)
    check_the_end(plain_model())


@pytest.mark.slow
def test_a_stream_by_the_cache_of_keras_hub_ends_with_the_same_text_too():
    check_the_end(ALL_FAMILIES["qwen3_5"]())


def test_two_streams_of_one_policy_at_once_keep_apart(policy):
    both = [stream_responses(policy, [prompt], seeds=[1], **OPTIONS) for prompt in "ab"]
    first, second = next(both[0]), next(both[1])
    texts = [[first, *both[0]][-1].text, [second, *both[1]][-1].text]
    assert texts == [generate_responses(policy, [p], seed=1, **OPTIONS)[0] for p in "ab"]


def test_texts_come_while_the_policy_goes_on_and_closing_ends_it():
    """This policy never stops by itself; 20,000 forward passes take much longer than a second."""
    ids = {name: keras.Input((None,), name=name) for name in ("token_ids", "padding_mask")}
    one_hot = keras.layers.Lambda(lambda x: keras.ops.one_hot(0 * x + 9, 97) * 99)
    endless = keras.Model(ids, one_hot(ids["token_ids"]))
    stream = stream_responses(endless, ["a"], seeds=[0], **{**OPTIONS, "max_new_tokens": 20_000})
    text, ended = next(stream)[1:]
    assert 0 < len(text) < 10_000 and not ended
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 2
    assert "stream_responses" not in {thread.name for thread in threading.enumerate()}
    *_, last = stream_responses(endless, ["a"], seeds=[0], **OPTIONS)
    assert last.text == "&" * 12, "a stream that was closed leaves the policy as it was"


def test_nothing_is_cut_off_in_silence(policy):
    with pytest.raises(InputError, match=r"prompts must have 84 tokens at most, got 91"):
        stream_responses(policy, ["a" * 90], seeds=[0], **OPTIONS)
    with pytest.raises(InputError, match=r"seeds must be as many as the 2 prompts, got 1"):
        stream_responses(policy, ["a", "b"], seeds=[0], **OPTIONS)
    with pytest.raises(InputError, match=r"temperature must be >= 0"):
        stream_responses(policy, ["a"], seeds=[0], temperature=-1, preprocessor=Letters())
    assert list(stream_responses(policy, [], seeds=[], **OPTIONS)) == []
