"""One exported model, and the policies that the tests of its parts share."""

import pytest
import serving_tiny
import tensorflow as tf

from dpo_keras.losses import DPOLoss
from dpo_keras.serving import export
from dpo_keras.training import DPOModel

EXAMPLES = (
    ("Hello, how are you?", "I am fine, thanks.", "No."),
    ("It's 12345  o'clock", "don't worry", "naïve café 東京 🙂"),
    ("a", "The quick brown fox", "lazy dog\n"),
)


@pytest.fixture(scope="session")
def gpt2():
    return serving_tiny.gpt2()


@pytest.fixture(scope="session")
def llama():
    return serving_tiny.llama()


@pytest.fixture(scope="session")
def gemma3():
    return serving_tiny.gemma3()


@pytest.fixture(scope="session")
def model(gpt2):
    """A policy that has moved away from its reference."""
    model = DPOModel(gpt2, reference="frozen_copy")
    model.compile(optimizer="sgd", loss=DPOLoss("sigmoid", beta=0.3))
    for variable in gpt2.trainable_variables:
        variable.assign(variable * 1.1)
    return model


@pytest.fixture(scope="session")
def report(model, tmp_path_factory):
    """An export, verified in a process without Keras."""
    path = tmp_path_factory.mktemp("served") / "support" / "3"
    return export(model, path, max_length=48, max_new_tokens=8, examples=EXAMPLES)


@pytest.fixture(scope="session")
def signatures(report):
    return tf.saved_model.load(str(report.path)).signatures
