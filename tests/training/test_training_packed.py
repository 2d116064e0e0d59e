"""Training on packed rows is training on rows of one pair each, in whatever way it is run."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import gpt2, llama

from dpo_keras.batching import (
    Ragged,
    TokenizedPairs,
    collate,
    collate_packed,
    preference_dataset,
)
from dpo_keras.batching.packing import packed_order, plan_packing
from dpo_keras.errors import InputError
from dpo_keras.losses import DPOLoss
from dpo_keras.scoring import cache_reference
from dpo_keras.scoring import scorer as scorer_module
from dpo_keras.training import DPOModel, strategy

EVERYTHING = {"insufficient_confidence": 0.3, "nll": 0.1, "kl_to_reference": 0.05}
STEPS = 20


@pytest.fixture(scope="module")
def weighed(tokenized):
    """Pairs of unequal weight, soft preferences and three responses to one prompt among them."""
    random = np.random.default_rng(3)
    columns = [part.tolist() for part in tokenized.parts]
    first, other = ([column[pair] for column in columns] for pair in (0, 1))
    for pair in ((first[0], first[1], other[1]), (first[0], other[1], first[2])):
        for column, tokens in zip(columns, pair, strict=True):
            column.append(tokens)
    count = len(columns[0])
    preference = random.choice([1.0, 0.8, 0.5], count).astype(np.float32)
    weight = random.uniform(0.5, 2.0, count).astype(np.float32)
    parts = map(Ragged.from_lists, columns)
    return TokenizedPairs(*parts, preference, weight, pad=tokenized.pad)


def orders(tokenized, rows=2):
    """The pairs of each step of one packed epoch, as they stand in its rows."""
    plan = plan_packing(tokenized, 4, length=48, rows=rows, seed=1)
    assert plan.sizes.pairs.max() == 3
    return plan, packed_order(plan).pairs


def batches(tokenized, packed, rows=2):
    """The same pairs step by step, packed or not."""
    plan, steps = orders(tokenized, rows)
    most = max(int((step >= 0).sum()) for step in steps)
    for step in steps:
        if packed:
            yield collate_packed(tokenized, step, plan.length, plan.slots, plan.pairs, plan.trees)
        else:
            yield collate(tokenized, step[step >= 0], 24, 16, most)


def stream(tokenized, packed, rows=2):
    found = list(batches(tokenized, packed, rows))
    data = {name: np.stack([batch[name] for batch in found]) for name in found[0]}
    dataset = tf.data.Dataset.from_tensor_slices(data).repeat()
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)


def train(data, loss=None, steps=STEPS, optimizer=None, policy=None, reference="auto", **options):
    policy = policy or gpt2(num_layers=1)
    model = DPOModel(policy, reference)
    optimizer = optimizer or keras.optimizers.Adam(3e-3, global_clipnorm=0.5)
    model.compile(optimizer, loss=loss or DPOLoss(penalties=EVERYTHING), **options)
    steps_logged = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: steps_logged.append(
            {name: float(value) for name, value in model.step_logs.items()}
        )
    )
    model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[record])
    return [variable.numpy() for variable in policy.weights], steps_logged


def assert_same(one, other, atol=1e-5, names=("loss", "reward_margin", "grad_norm", "entropy")):
    for ours, theirs in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol)
    for name in names:
        found, expected = ([log[name] for log in logs] for logs in (one[1], other[1]))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def bucketed(weighed):
    return train(stream(weighed, packed=False))


@pytest.fixture(scope="module")
def packed(weighed):
    return train(stream(weighed, packed=True))


def test_twenty_steps_have_the_losses_of_unpacked_rows(bucketed, packed, weighed):
    assert len({int((step >= 0).sum()) for step in orders(weighed)[1]}) > 1
    assert_same(packed, bucketed)
    assert abs(packed[1][0]["preference_loss"] - np.log(2)) < 1e-5
    assert packed[1][-1]["loss"] < packed[1][0]["loss"]


def test_a_step_with_an_empty_row_is_the_step_of_its_pairs(weighed):
    few = weighed.take(np.arange(3))
    steps = packed_order(plan_packing(few, 4, length=48, rows=4, seed=1)).pairs
    assert (steps < 0).all(-1).any()
    packed = preference_dataset(
        few, batch_size=4, batching="packed", row_length=48, rows=4, epochs=None
    )
    bucketed = preference_dataset(few, batch_size=3, batching="buckets", epochs=None)
    assert_same(train(packed, steps=2), train(bucketed, steps=2))


@pytest.mark.slow
def test_xla_compiles_the_packed_step_to_the_same(packed, weighed):
    found = train(stream(weighed, packed=True), steps=4, jit_compile=True)
    np.testing.assert_allclose(
        [log["loss"] for log in found[1]], [log["loss"] for log in packed[1][:4]], rtol=1e-4
    )


def test_two_replicas_share_the_rows_of_a_step(packed, weighed):
    with strategy("mirrored").scope():
        _, found = train(stream(weighed, packed=True), steps=4, policy=gpt2(num_layers=1))
    for name in ("loss", "reward_margin", "grad_norm"):
        expected = [log[name] for log in packed[1][:4]]
        np.testing.assert_allclose([log[name] for log in found], expected, rtol=1e-4, atol=1e-5)


def test_accumulated_rows_are_one_batch_however_many_pairs_each_has(weighed):
    """Keras would average the rows' means; a pair in a row of one would count for more."""
    loss = DPOLoss(penalties={"nll": 0.2})
    whole = train(
        stream(weighed, packed=True), loss, 3, keras.optimizers.Adam(1e-2, global_clipnorm=0.05)
    )
    rows = [
        {name: value[row : row + 1] for name, value in batch.items()}
        for batch in batches(weighed, packed=True)
        for row in range(2)
    ]
    data = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    apart = train(
        tf.data.Dataset.from_tensor_slices(data).repeat(),
        loss,
        6,
        keras.optimizers.Adam(1e-2, global_clipnorm=0.05, gradient_accumulation_steps=2),
    )
    assert_same(apart, whole, names=())


def test_a_cached_reference_is_the_policy_it_was_made_from(packed, weighed):
    with_logps = cache_reference(gpt2(num_layers=1), weighed, batching="packed")
    apart = cache_reference(gpt2(num_layers=1), weighed, batching="buckets")
    np.testing.assert_allclose(with_logps.reference, apart.reference, rtol=1e-5)
    found = train(stream(with_logps, packed=True), reference="cached")
    assert_same(found, packed, atol=5e-5)


def lora():
    policy = gpt2(num_layers=1)
    policy.backbone.enable_lora(2)
    return policy


def test_adapters_and_their_absence_as_reference_work_packed(weighed):
    found, expected = (
        train(stream(weighed, packed), steps=5, policy=lora(), run_eagerly=True)
        for packed in (True, False)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("packed", [True, False])
def test_no_gradient_of_a_frozen_kernels_size_is_formed(packed, weighed, monkeypatch):
    (batch, *_) = batches(weighed, packed)

    def formed():
        policy = llama(num_layers=1)
        policy.backbone.enable_lora(3)
        model = DPOModel(policy)
        model.compile("sgd")
        step = tf.function(model.train_step, autograph=False)
        graph = step.get_concrete_function({k: tf.constant(v) for k, v in batch.items()}).graph
        frozen = [v.shape for v in policy.backbone.non_trainable_variables if len(v.shape) > 1]
        kernels = {(shape[0], int(np.prod(shape[1:]))) for shape in frozen}
        # What nothing is updated from is laid out at most, and never run.
        run, waiting = set(), [op for op in graph.get_operations() if op.type.startswith("Assign")]
        waiting += [output.op for output in graph.outputs]
        while waiting:
            operation = waiting.pop()
            if operation.name not in run:
                run.add(operation.name)
                waiting += [tensor.op for tensor in operation.inputs]
        return [
            operation.name
            for operation in graph.get_operations()
            if operation.name in run
            and "gradient_tape" in operation.name
            and "MatMul" in operation.type
            and tuple(operation.outputs[0].shape[-2:]) in kernels
        ]

    assert formed() == []
    # What this test looks for is there to be seen: Keras' own way forms one per adapted kernel.
    monkeypatch.setattr(scorer_module, "low_rank_overrides", lambda model: [])
    assert len(formed()) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        DPOLoss("simpo", beta=2.0, gamma=0.5),
        DPOLoss("sigmoid", ld_alpha=0.5),
        DPOLoss("sigmoid", wpo=True),
        DPOLoss(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    ],
    ids=["simpo", "ld", "wpo", "mpo"],
)
def test_objectives_see_the_same_pairs(loss, weighed):
    found, expected = (
        train(
            stream(weighed, packed),
            DPOLoss.from_config(loss.get_config()),
            2,
            keras.optimizers.SGD(0.05),
            run_eagerly=True,
        )
        for packed in (True, False)
    )
    assert_same(found, expected)


def test_mixed_precision_starts_at_log_2_packed(weighed):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        _, logs = train(stream(weighed, packed=True), DPOLoss(), steps=6, run_eagerly=True)
    finally:
        keras.config.set_dtype_policy("float32")
    assert abs(logs[0]["loss"] - np.log(2)) < 5e-2
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_recomputed_blocks_train_the_same_and_are_saved_as_such(packed, weighed):
    policy = gpt2(num_layers=1)
    model = DPOModel(policy, remat=True)
    assert DPOModel.from_config(model.get_config()).scorer.remat
    model.compile(keras.optimizers.Adam(3e-3, global_clipnorm=0.5), DPOLoss(penalties=EVERYTHING))
    model.fit(stream(weighed, packed=True), steps_per_epoch=STEPS, verbose=0)
    for one, other in zip(policy.weights, packed[0], strict=True):
        np.testing.assert_allclose(one.numpy(), other, atol=1e-5)


def test_recomputed_dropout_is_refused():
    """It would be drawn twice, and the gradient be that of another network."""
    with pytest.raises(InputError, match="remat needs dropout=False"):
        DPOModel(gpt2(num_layers=1), dropout=True, remat=True)
    assert DPOModel(gpt2(num_layers=1, dropout=0.0), dropout=True, remat=True).dropout


def test_evaluation_and_predictions_are_those_of_unpacked_rows(tokenized):
    model = DPOModel(gpt2(num_layers=1))
    model.compile(keras.optimizers.SGD(0.1), loss=DPOLoss(), run_eagerly=True)
    for variable in model.policy.trainable_variables:
        variable.assign(variable * 1.2)
    found, expected = (
        model.evaluate(
            preference_dataset(tokenized, batch_size=4, shuffle=False, batching=batching),
            verbose=0,
            return_dict=True,
        )
        for batching in ("packed", "buckets")
    )
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_one_trace_serves_a_packed_run_and_its_evaluation(tokenized):
    traces = []

    class Counted(DPOModel):
        def train_step(self, batch):
            traces.append("train")
            return super().train_step(batch)

        def test_step(self, batch):
            traces.append("test")
            return super().test_step(batch)

    model = Counted(gpt2(num_layers=1))
    model.compile(keras.optimizers.SGD(0.1))
    data = preference_dataset(tokenized, batch_size=4, batching="packed")
    model.fit(data, validation_data=data, epochs=3, verbose=0)
    assert sorted(traces) == ["test", "train"]
