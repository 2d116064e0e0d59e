"""The chief of the test's cluster: trains on parameter servers and says what came of it."""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tiny_models"), str(HERE)]

import dpo_keras  # noqa: E402

# The strategy connects to the cluster: before anything else touches a device.
SERVERS = dpo_keras.strategy("parameter_server")

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from legacy_learning import BATCH, accuracy, compiled, learn, sides  # noqa: E402
from legacy_tiny import transformer  # noqa: E402

from dpo_keras import legacy  # noqa: E402
from dpo_keras.errors import InputError  # noqa: E402


def shares(directory):
    """The numbers of the pairs that each worker is given, by its own index."""
    creator = legacy.worker_batches(sides()[0], batch_size=BATCH, directory=directory)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(SERVERS)
    batches = coordinator.create_per_worker_dataset(
        lambda: SERVERS.distribute_datasets_from_function(creator)
    )
    iterator = iter(batches)

    @tf.function
    def step(iterator):
        index = tf.distribute.coordinator.experimental_get_current_worker_index()
        return index, next(iterator)["token_ids"][:, 0]

    found = {}
    while len(found) < 2 or any(len(rows) < len(sides()[0]) // 2 for rows in found.values()):
        values = [coordinator.schedule(step, args=(iterator,)) for _ in range(40)]
        coordinator.join()
        for index, rows in (value.fetch() for value in values):
            texts = {" ".join(map(str, row)) for row in rows.tolist()}
            found.setdefault(str(int(index)), set()).update(texts)
    return {index: sorted(texts) for index, texts in found.items()}


def refused(make):
    try:
        make()
    except InputError as error:
        return str(error)
    return None


if __name__ == "__main__":
    directory = sys.argv[1]
    other = transformer(keras, layers=1)
    with SERVERS.scope():
        model = compiled()
        found = {"before": accuracy(model)}
        found["refused"] = [
            refused(lambda: dpo_keras.DPOModel(other)),
            refused(lambda: model.compile(loss=dpo_keras.DPOLoss(group_robust={"groups": 2}))),
        ]
        _, history = learn(legacy.worker_batches(sides()[0], batch_size=BATCH), model)
    found["accuracy"] = accuracy(model)
    found["steps"] = int(model.optimizer.iterations)
    found["logs"] = {name: values[-1] for name, values in history.items()}
    batch = next(iter(dpo_keras.preference_dataset(sides()[1], batch_size=4)))
    found["logps"] = model.policy_logps(batch).numpy().tolist()
    model.policy.save(f"{directory}/policy.keras")
    found["shares"] = shares(directory)
    print(json.dumps(found))
