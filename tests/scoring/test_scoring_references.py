"""References: what they hold, that they do not move, and what is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import Letters, gpt2, pairs

from dpo_keras.batching import collate, tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.scoring import (
    ResponseScorer,
    check_same_vocabulary,
    make_reference,
)


@pytest.fixture(scope="module")
def tokenized():
    return tokenize_pairs(pairs(5), Letters(), max_length=64)


@pytest.fixture(scope="module")
def batch(tokenized):
    return {k: tf.constant(v) for k, v in collate(tokenized, list(range(5)), 32, 24).items()}


def move(policy):
    for variable in policy.trainable_variables:
        variable.assign_add(0.05 * keras.random.normal(variable.shape, seed=3))


def with_lora():
    policy = gpt2()
    policy.backbone.enable_lora(2)
    return policy


@pytest.mark.parametrize("make", [gpt2, with_lora])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_reference_stays_where_the_policy_was(make, compiled, batch):
    policy = make()
    reference, scorer = make_reference(policy, "auto"), ResponseScorer(policy)
    run = tf.function(reference.logps) if compiled else reference.logps
    start = scorer(batch)["logps"].numpy()
    np.testing.assert_allclose(run(scorer, batch), start, atol=1e-6)
    move(policy)
    np.testing.assert_allclose(run(scorer, batch), start, atol=1e-6)
    assert np.abs(scorer(batch)["logps"] - start).max() > 0.05


def test_auto_is_free_under_fresh_adapters_and_a_copy_otherwise():
    assert make_reference(gpt2(), "auto").mode == "frozen_copy"
    policy = with_lora()
    assert make_reference(policy, "auto").mode == "adapters_off"
    copied = sum(int(np.prod(copy.shape)) for copy in make_reference(policy, "auto").copies)
    assert copied == 2 * 2 * 32  # the query and value biases of two layers
    move(policy)
    # Adapters that were trained already: switched off they would not be what the policy is.
    assert make_reference(policy, "auto").mode == "frozen_copy"


def test_adapters_off_is_the_base_model_even_for_trained_adapters(batch):
    policy = with_lora()
    base = ResponseScorer(policy)(batch)["logps"].numpy()
    for variable in policy.trainable_variables:
        if "lora" in variable.name:
            variable.assign_add(0.1 * keras.random.normal(variable.shape, seed=1))
    reference = make_reference(policy, "adapters_off")
    assert not reference.starts_as_policy
    np.testing.assert_allclose(reference.logps(ResponseScorer(policy), batch), base, atol=1e-6)
    assert all(layer.lora_enabled for layer in reference._adapted.variables)


def test_a_copy_moves_toward_the_policy_by_alpha(batch):
    policy = gpt2()
    reference = make_reference(policy, "frozen_copy")
    variable, copy = policy.trainable_variables[0], reference.copies[0]
    before = copy.numpy()
    move(policy)
    reference.update_from_policy(0.25)
    np.testing.assert_allclose(copy, 0.75 * before + 0.25 * variable.numpy(), atol=1e-6)
    reference.update_from_policy()
    np.testing.assert_allclose(copy, variable.numpy(), atol=1e-6)


def test_weights_that_become_trainable_afterwards_are_refused():
    policy = with_lora()
    reference = make_reference(policy, "auto")
    reference.check(policy)
    policy.backbone.layers[-1].trainable = True
    with pytest.raises(InputError, match="became trainable after the reference"):
        reference.check(policy)


def test_another_model_is_a_reference_of_its_own(batch):
    policy, other = gpt2(0), gpt2(1)
    reference = make_reference(policy, other)
    expected = ResponseScorer(other)(batch)["logps"]
    np.testing.assert_allclose(reference.logps(ResponseScorer(policy), batch), expected, atol=1e-6)
    assert not reference.trainable_variables


def test_a_reference_with_another_vocabulary_is_refused():
    with pytest.raises(InputError, match="41 tokens, the policy has 97") as raised:
        make_reference(gpt2(), gpt2(vocabulary_size=41))
    assert raised.value.problems[0].argument == "reference"


class Words:
    """A tokenizer as a model's preprocessor carries it."""

    def __init__(self, *words):
        self.words, self.tokenizer = words, self

    def vocabulary_size(self):
        return len(self.words)

    def id_to_token(self, id):
        return self.words[id]


class Unloaded(Words):
    """A tokenizer of KerasHub whose vocabulary is not loaded yet."""

    def vocabulary_size(self):
        raise ValueError("No vocabulary has been set for this tokenizer.")


class Model:
    def __init__(self, preprocessor=None, logits=3):
        self.preprocessor, self.output_shape = preprocessor, (None, None, logits)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (Model(Words("a", "c", "b")), "NAME has another .*token 1 is 'c', the policy's is 'b'"),
        (Model(Words("a", "b")), "2 tokens, the policy has 3"),
        (Model(Words("a", "b", "c"), logits=4), "4 tokens, the policy has 3"),
        (Model(logits=4), "4 tokens, the policy has 3"),
    ],
)
def test_tokens_are_compared_where_both_models_have_a_tokenizer(reference, message):
    policy = Model(Words("a", "b", "c"))
    with pytest.raises(InputError, match=message):
        check_same_vocabulary(policy, reference, "NAME")
    check_same_vocabulary(policy, Model())
    check_same_vocabulary(policy, Model(Unloaded()))
    check_same_vocabulary(policy, Model(Words("a", "b", "c")))


@pytest.mark.parametrize(
    ("name", "message"),
    [("frozen-copy", "reference must be one of auto"), ("adapters_off", "needs LoRA")],
)
def test_references_that_cannot_be_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        make_reference(gpt2(), name)


def test_cached_needs_batches_that_carry_log_probs(batch):
    policy = gpt2()
    with pytest.raises(InputError, match="cache_reference"):
        make_reference(policy, "cached").logps(ResponseScorer(policy), batch)
