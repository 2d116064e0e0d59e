"""The command line, and tiny models in the formats that real ones come in."""

import json

import keras
import keras_hub
import pytest
from app_tiny import SIZES, TEXTS
from assembling import GEMMA_PIECES, assemble, sentence_pieces

from dpo_keras.app.cli import main
from dpo_keras.app.config_sections import Model
from dpo_keras.app.models import load_policy, save_policy
from dpo_keras.evaluation import run_report


@pytest.fixture(autouse=True)
def runs_draw_no_plots(monkeypatch):
    """Plots take a third of a tiny run. Runs of module fixtures, such as `trained`, draw them."""
    monkeypatch.setattr(run_report, "_draw", lambda *arguments: ({}, {}))


@pytest.fixture
def run(capsys):
    """Calls the command line in this process: exit code, stdout, stderr."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


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


@pytest.fixture(scope="session")
def gemma3_preset(tmp_path_factory):
    """A text-only Gemma 3 like the 1B one, but for its size, as a KerasHub preset."""
    pieces = sentence_pieces(
        TEXTS,
        330,
        add_dummy_prefix=False,
        **GEMMA_PIECES,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
    )
    policy = assemble(
        "Gemma3",
        keras_hub.models.Gemma3Tokenizer(pieces, has_vision_tokens=False),
        {"sequence_length": 64},
        image_size=None,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=32,
        head_dim=8,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=32,
    )
    path = tmp_path_factory.mktemp("models") / "gemma3_preset"
    save_policy(policy, path)
    return path
