"""A Hugging Face directory's tokenizer.json decides how text becomes tokens, everywhere."""

import json
import random

import keras
import pytest
import serving_tiny
import tensorflow as tf
from assembling import assemble
from huggingface_hub.errors import EntryNotFoundError
from tokenizers import Tokenizer

import dpo_keras
from dpo_keras.app.models import save_policy
from dpo_keras.batching import TextEncoder
from dpo_keras.errors import InputError
from dpo_keras.serving.graph_encoder import GraphEncoder
from dpo_keras.utils.keras_hub_tokenizers import LLAMA3, QWEN

ADDED = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool>",
    "<|start_header_id|>",
    "<|end_header_id|>",
]
PIECES = [
    *"aAbsStTeE'’,.!?(-0123456789   \t\n\r\u00a0\u2003é\u0301東京🙂²½İ\x00_",
    *(*ADDED, "'s", "'LL", "  ", "\n\n", "\r\n", "the", " the", "Hello", "don't", "▁", "e\u0301"),
]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(pattern):
    return {**SPLIT, "pattern": {"Regex": pattern}}


# Of the architecture, the file's entries that differ from those of its family.
FILES = {
    "digits one by one": (
        "Qwen",
        {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, BYTES)},
    ),
    "composed": (
        "Qwen",
        {
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": sequence(split(QWEN), {**BYTES, "use_regex": False}),
        },
    ),
    "a space in front": ("GPT2", {"pre_tokenizer": {**BYTES, "add_prefix_space": True}}),
    "whole words": (
        "Llama3",
        {
            "model": {"ignore_merges": True},
            "pre_tokenizer": sequence(split(LLAMA3), {**BYTES, "use_regex": False}),
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {
                    "<|im_start|>": {"id": "<|im_start|>", "ids": [2], "tokens": ["<|im_start|>"]}
                },
            },
        },
    ),
    "pieces of a sentence": (
        "Qwen",
        {
            "model": {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"},
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "pre_tokenizer": None,
        },
    ),
}
SIZES = {
    "GPT2": {"num_heads": 2, "max_sequence_length": 64},
    "Qwen": {"num_query_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Llama3": {"num_query_heads": 2, "num_key_value_heads": 2},
}


def tokenizer_file(changes):
    """A whole tokenizer.json, in the form in which checkpoints are published."""
    vocabulary, merges = serving_tiny.bpe()
    vocabulary = dict(vocabulary)
    # A token that no merge leads to, and what a SentencePiece vocabulary has.
    for token in [*ADDED, "987", "<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]:
        vocabulary.setdefault(token, len(vocabulary))
    model = {"type": "BPE", "vocab": vocabulary, "merges": [merge.split(" ") for merge in merges]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            # As GPT-2's own file has it: looked for after normalization.
            {"id": vocabulary[text], "content": text, **flags}
            | {"normalized": text == "<tool>", "special": text != "<tool>"}
            for text in ADDED
        ],
        "normalizer": None,
        "post_processor": None,
        "decoder": {**BYTES, "use_regex": True},
        **changes,
        "model": {**model, **changes.get("model", {})},
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes a Hugging Face directory with a tokenizer.json of `FILES`, once."""
    made = {}

    def make(name):
        if name in made:
            return made[name]
        family, changes = FILES[name]
        file = tokenizer_file(changes)
        place = made[name] = tmp_path_factory.mktemp(family)
        vocabulary = file["model"]["vocab"]
        merges = [" ".join(merge) for merge in file["model"]["merges"]]
        policy = assemble(
            family,
            FAMILY_TOKENIZERS[family](vocabulary, merges),
            {"sequence_length": 64},
            num_layers=1,
            hidden_dim=16,
            intermediate_dim=64,
            **SIZES[family],
        )
        policy.export_to_transformers(str(place))
        config = json.loads((place / "config.json").read_text())
        # KerasHub's exporter leaves out what its own importer, and every real checkpoint, has.
        config |= {"architectures": [f"{family}ForCausalLM"], "use_sliding_window": False}
        config.setdefault("sliding_window", 64)
        (place / "config.json").write_text(json.dumps(config))
        (place / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
        words = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        (place / "tokenizer_config.json").write_text(json.dumps(words))
        return place

    return make


def llama3(vocabulary, merges):
    import keras_hub

    words = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return keras_hub.models.Llama3Tokenizer(
        vocabulary, merges, misc_special_tokens=set(ADDED), **words
    )


def qwen(vocabulary, merges):
    import keras_hub

    return keras_hub.models.QwenTokenizer(vocabulary, merges, unsplittable_tokens=ADDED)


def gpt2(vocabulary, merges):
    import keras_hub

    return keras_hub.models.GPT2Tokenizer(vocabulary, merges)


FAMILY_TOKENIZERS = {"GPT2": gpt2, "Qwen": qwen, "Llama3": llama3}


def texts(count=200, seed=0):
    chooser = random.Random(seed)
    some = ["".join(chooser.choices(PIECES, k=chooser.randint(1, 25))) for _ in range(count)]
    return [*some, " ", "987 Hello!", "e\u0301", *serving_tiny.CORPUS]


def expected(place, given):
    theirs = Tokenizer.from_file(str(place / "tokenizer.json"))
    return [item.ids for item in theirs.encode_batch(given, add_special_tokens=False)]


def test_a_repository_of_hugging_face_is_read_as_its_directory(checkpoint, monkeypatch):
    name = next(iter(FILES))
    place, given = checkpoint(name), texts()

    def fetch(repo_id, filename):
        assert repo_id == "someone/model"
        if not (place / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(place / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    policy = dpo_keras.load_model("hf://someone/model")
    assert TextEncoder(policy.preprocessor).tokenize(given) == expected(place, given)


@pytest.mark.parametrize("name", FILES)
def test_training_generation_and_server_cut_text_as_the_checkpoints_own_file(
    name, checkpoint, tmp_path
):
    place, given = checkpoint(name), texts()
    policy = dpo_keras.load_model(str(place))
    wanted = expected(place, given)
    assert TextEncoder(policy.preprocessor).tokenize(given) == wanted
    # What KerasHub's `generate` calls.
    assert policy.preprocessor.tokenizer(given) == wanted
    save_policy(policy, tmp_path / "saved")
    again = dpo_keras.load_model(str(tmp_path / "saved"))
    encoder, other = TextEncoder(policy.preprocessor), TextEncoder(again.preprocessor)
    assert other.tokenize(given) == wanted
    assert (other.start, other.end, other.ends) == (encoder.start, encoder.end, encoder.ends)
    if name == "pieces of a sentence":
        with pytest.raises(InputError, match=r"its model is BPE with byte_fallback.*Prepend"):
            GraphEncoder(policy.preprocessor, 64)
        return
    served = tf.Module()
    served.encoder = GraphEncoder(again.preprocessor, 64)
    served.tokenize = served.encoder.tokenizer._traced
    tf.saved_model.save(served, str(tmp_path / "served"))
    found = tf.saved_model.load(str(tmp_path / "served")).tokenize(tf.constant(given))
    assert found.to_list() == wanted


def test_the_files_differ_from_what_the_family_would_do(checkpoint):
    import keras_hub

    for name in FILES:
        place, given = checkpoint(name), texts(100)
        plain = keras_hub.models.CausalLM.from_preset(str(place)).preprocessor
        assert TextEncoder(plain).tokenize(given) != expected(place, given), name


def test_a_saved_model_keeps_the_rules_and_the_end_of_its_checkpoint(checkpoint, tmp_path):
    place, given = checkpoint("whole words"), texts(50)
    model = dpo_keras.DPOModel(dpo_keras.load_model(str(place)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    wanted = expected(place, given)
    encoder = TextEncoder(loaded.policy.preprocessor)
    assert encoder.tokenize(given) == wanted
    assert encoder.end == encoder.token_id("<|im_end|>")


def test_a_vocabulary_of_another_tokenizer_is_refused(checkpoint, tmp_path):
    place = checkpoint("a space in front")
    for path in place.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = file["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(InputError, match=r"tokenizer.json gives other tokens: for '  two"):
        dpo_keras.load_model(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}, "added_tokens": 3}')
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        dpo_keras.load_model(str(tmp_path))


def test_a_llama_without_the_tokens_that_kerashub_wants_in_a_preset_is_refused(
    checkpoint, tmp_path
):
    """KerasHub reads every Llama as Llama 3, and its saved tokenizer would not load again."""
    for path in checkpoint("whole words").iterdir():
        content = path.read_bytes().replace(b"<|start_header_id|>", b"<|begin_header_i|>")
        (tmp_path / path.name).write_bytes(content)
    with pytest.raises(InputError, match=r"no <\|start_header_id\|>.*KerasHub"):
        dpo_keras.load_model(str(tmp_path))
