"""Whole datasets: every pair in its place, strings, and a cache that knows what it is of."""

import numpy as np
import pytest
import tensorflow as tf
from tiny import Letters, full_logits_log_probs, gpt2, pairs, plain_model

from dpo_keras.batching import collate, tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.scoring import (
    batch_layout,
    cache_reference,
    dataset_scoring,
    response_log_probs,
    score_pairs,
)
from dpo_keras.scoring.dataset_scoring import cache_key


@pytest.fixture(scope="module")
def tokenized():
    return tokenize_pairs(pairs(5), Letters(), max_length=64)


def test_log_prob_of_a_whole_response_is_the_sum_of_its_parts():
    policy = gpt2()
    (both,), (count,) = response_log_probs(policy, ["ab"], ["cd"], preprocessor=Letters())
    tokens = np.array([[1, *Letters().tokenize(["abcd"])[0]]])
    logits = policy({"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, training=False)
    logps = tf.nn.log_softmax(logits[0]).numpy()
    by_hand = logps[2, tokens[0, 3]] + logps[3, tokens[0, 4]] + logps[4, 2]
    assert count == 3
    np.testing.assert_allclose(both, by_hand, atol=1e-5)


def test_batch_size_does_not_change_log_probs():
    policy = gpt2()
    prompts = [p["prompt"] for p in pairs(5)]
    responses = [p["chosen"] for p in pairs(5)]
    one, _ = response_log_probs(policy, prompts, responses, preprocessor=Letters(), batch_size=2)
    all_, _ = response_log_probs(policy, prompts, responses, preprocessor=Letters(), batch_size=16)
    np.testing.assert_allclose(one, all_, atol=1e-5)


def test_score_pairs_puts_every_pair_in_its_place(tokenized):
    policy = gpt2()
    logps = score_pairs(policy, tokenized, batch_size=2)
    np.testing.assert_allclose(
        logps, full_logits_log_probs(policy, collate(tokenized, list(range(5)))), atol=1e-4
    )


def test_score_pairs_packed_puts_every_pair_in_its_place(tokenized):
    policy, done = gpt2(), []
    logps = score_pairs(
        policy, tokenized, batch_size=3, batching="packed", on_batch=lambda *at: done.append(at)
    )
    apart = score_pairs(policy, tokenized, batching="buckets")
    np.testing.assert_allclose(logps, apart, rtol=1e-5, atol=1e-5)
    assert len(done) > 1 and done[-1] == (len(tokenized), len(tokenized))
    with pytest.raises(InputError, match="batching cannot be 'packed': Functional is no"):
        score_pairs(plain_model(), tokenized, batching="packed")


def test_a_model_that_scores_packed_rows_otherwise_is_scored_in_buckets(tokenized, monkeypatch):
    def refuse(scorer):
        raise InputError("batching must be 'buckets' for this policy")

    policy = gpt2(num_layers=1)
    expected = score_pairs(policy, tokenized, batch_size=4, batching="buckets")
    monkeypatch.setattr(batch_layout, "check_packing", refuse)
    found = score_pairs(policy, tokenized, batch_size=4)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="must be 'buckets'"):
        score_pairs(policy, tokenized, batching="packed")


def test_cached_log_probs_are_those_of_the_model_and_are_read_back(tokenized, tmp_path):
    policy, path = gpt2(), tmp_path / "reference.npz"
    cached = cache_reference(policy, tokenized, path)
    np.testing.assert_allclose(cached.reference, score_pairs(policy, tokenized), atol=1e-6)
    computed = []
    again = cache_reference(gpt2(), tokenized, path, on_batch=lambda *_: computed.append(1))
    np.testing.assert_array_equal(again.reference, cached.reference)
    assert not computed
    assert [p.name for p in tmp_path.iterdir()] == ["reference.npz"]


def test_a_cache_of_other_weights_tokens_or_truncation_is_refused(tokenized, tmp_path):
    path = tmp_path / "reference.npz"
    cache_reference(gpt2(), tokenized, path)
    with pytest.raises(InputError, match="weights"):
        cache_reference(gpt2(seed=1), tokenized, path)
    shorter = tokenize_pairs(pairs(5), Letters(), max_length=9)
    with pytest.raises(InputError, match=r"tokens.*max_length: 64 there, 9 now"):
        cache_reference(gpt2(), shorter, path)
    with pytest.raises(InputError, match="template"):
        cache_reference(gpt2(), tokenized, path, template="chatml")
    path.write_bytes(b"not a cache")
    with pytest.raises(InputError, match="cannot be read"):
        cache_reference(gpt2(), tokenized, path)


def test_a_damaged_cache_is_refused_and_never_used(tokenized, tmp_path):
    path, policy = tmp_path / "reference.npz", gpt2()
    right = cache_reference(policy, tokenized, path).reference
    content, refused, key = path.read_bytes(), 0, cache_key(policy, tokenized)
    for start in range(0, len(content), 8):
        path.write_bytes(content[:start] + bytes(8) + content[start + 8 :])
        try:
            found = dataset_scoring._read_cache(path, key)
            np.testing.assert_array_equal(found, right)  # what was hit says nothing, as a date
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "Delete it" in str(error)
    values = content.index(right.tobytes())
    path.write_bytes(content[:values] + bytes(8) + content[values + 8 :])
    with pytest.raises(InputError, match="cannot be read as one .*CRC"):
        cache_reference(policy, tokenized, path)
    assert refused > len(content) // 16


def test_strings_need_a_preprocessor():
    with pytest.raises(InputError, match="preprocessor is needed to tokenize") as raised:
        response_log_probs(plain_model(), ["a"], ["b"])
    assert raised.value.problems[0].argument == "preprocessor"
