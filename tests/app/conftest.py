"""Tiny models in the formats that real ones come in."""

import json

import keras
import pytest
from app_tiny import SIZES, TEXTS

from dpo_keras.app.models import load_policy, save_policy
from dpo_keras.app.sections import Model


@pytest.fixture(scope="session")
def gpt2():
    keras.utils.set_random_seed(0)
    return load_policy(Model(scratch={"family": "gpt2", **SIZES}), TEXTS)


@pytest.fixture(scope="session")
def llama():
    keras.utils.set_random_seed(0)
    return load_policy(Model(scratch={"family": "llama", **SIZES}), TEXTS)


@pytest.fixture(scope="session")
def gpt2_preset(gpt2, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "gpt2_preset"
    save_policy(gpt2, path)
    return path


@pytest.fixture(scope="session")
def gpt2_hugging_face(gpt2, tmp_path_factory):
    """The same model as a Hugging Face checkpoint, as `transformers` would have saved it."""
    path = tmp_path_factory.mktemp("models") / "gpt2_hugging_face"
    gpt2.export_to_transformers(str(path))
    config = json.loads((path / "config.json").read_text())
    # KerasHub's exporter leaves out what its own importer, and every real checkpoint, has.
    config["architectures"] = ["GPT2LMHeadModel"]
    (path / "config.json").write_text(json.dumps(config))
    return path
