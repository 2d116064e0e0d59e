"""Policies come from presets, directories, files or from scratch; what is none is said so."""

import json
import shutil

import h5py
import keras
import keras_hub
import numpy as np
import pytest
from app_tiny import SIZES, TEXTS, same_logits

from dpo_keras.app.config_sections import Model, Scratch
from dpo_keras.app.model_sources import source_problem
from dpo_keras.app.models import (
    FAMILIES,
    check_length,
    load_model,
    load_policy,
    load_reference,
    save_policy,
    train_tokenizer,
)
from dpo_keras.errors import InputError
from dpo_keras.scoring import check_same_vocabulary
from dpo_keras.utils.keras_internals import all_layers


def test_a_tokenizer_is_the_same_for_the_same_texts_and_knows_every_byte():
    first = train_tokenizer(TEXTS, 300, ("<|endoftext|>",))
    assert first == train_tokenizer(iter(TEXTS), 300, ("<|endoftext|>",))
    vocabulary, merges = first
    assert list(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(vocabulary) == 1 + 256 + len(merges)
    assert vocabulary["<|endoftext|>"] == 0
    assert train_tokenizer(["low lower"] * 9, 300, ("<|endoftext|>",))[1][0] == "l o"
    with pytest.raises(InputError, match="no training pair"):
        train_tokenizer(["", ""], 300, ("<|endoftext|>",))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_scratch_has_the_sizes_asked_for_and_reads_any_text(family, request):
    policy = request.getfixturevalue(family)
    tokenizer = policy.preprocessor.tokenizer
    text = "The lamp é 漢 🙂\n\tcosts  40"
    assert tokenizer.detokenize(tokenizer(text)) == text
    assert (
        policy.backbone.vocabulary_size == tokenizer.vocabulary_size() <= SIZES["vocabulary_size"]
    )
    assert policy.backbone.num_layers == 2 and policy.backbone.hidden_dim == 16
    assert policy.preprocessor.sequence_length == 64
    assert tokenizer.pad_token_id == 0 and tokenizer.end_token_id is not None


def test_the_same_seed_gives_the_same_weights(gpt2):
    keras.utils.set_random_seed(0)
    same_logits(gpt2, load_policy(Model(scratch={"family": "gpt2", **SIZES}), TEXTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_loads_as_a_preset_directory(family, request, tmp_path):
    policy = request.getfixturevalue(family)
    save_policy(policy, tmp_path / "preset")
    loaded = load_model(str(tmp_path / "preset"))
    same_logits(policy, loaded)
    check_same_vocabulary(policy, loaded, "x")


def test_a_llama_with_tied_embeddings_survives_saving(tmp_path):
    vocabulary, merges = train_tokenizer(TEXTS, 300, FAMILIES["llama"].special_tokens)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=len(vocabulary), num_layers=1, num_query_heads=2, num_key_value_heads=1,
        hidden_dim=8, intermediate_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    tokenizer = keras_hub.models.Llama3Tokenizer(vocabulary, merges)
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(tokenizer, sequence_length=16)
    policy = keras_hub.models.Llama3CausalLM(backbone, preprocessor)
    save_policy(policy, tmp_path / "tied")
    same_logits(policy, load_model(str(tmp_path / "tied")))


def test_adapters_are_merged_into_the_saved_policy(gpt2_preset, tmp_path):
    policy = load_policy(Model(path=str(gpt2_preset), lora_rank=2))
    trainable = policy.backbone.trainable_variables
    assert 0 < sum(v.shape.num_elements() for v in trainable) < policy.backbone.count_params() / 4
    random = np.random.default_rng(0)
    for variable in trainable:
        variable.assign(random.normal(size=variable.shape, scale=0.1))
    save_policy(policy, tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"))
    same_logits(policy, merged)
    assert len(merged.backbone.trainable_variables) > len(trainable)


@pytest.mark.parametrize("quantization", ["int8", "int4", "gptq"])
def test_a_quantized_policy_is_saved_as_the_numbers_that_it_has(quantization, tmp_path):
    # GPTQ takes seconds for each few columns of a kernel.
    small = {**SIZES, "num_layers": 1, "hidden_dim": 8, "intermediate_dim": 8}
    model = Model(scratch=small, lora_rank=2, quantization=quantization)
    policy = load_policy(model, TEXTS)
    assert len({id(layer) for layer in all_layers(policy) if layer.quantization_mode}) == 6
    for variable in policy.backbone.trainable_variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape, scale=0.1))
    save_policy(policy, tmp_path / "merged")
    same_logits(policy, load_model(str(tmp_path / "merged")))


def test_quantization_without_adapters_is_refused():
    with pytest.raises(ValueError, match="needs adapters, since quantized kernels do not train"):
        Model(path="gpt2_base_en", quantization="int4")


def test_a_hugging_face_directory_loads_with_the_same_logits(gpt2, gpt2_hugging_face):
    loaded = load_policy(Model(path=str(gpt2_hugging_face)))
    same_logits(gpt2, loaded)
    check_same_vocabulary(gpt2, loaded, "x")


def test_a_keras_file_loads(gpt2, tmp_path):
    gpt2.save(tmp_path / "policy.keras")
    same_logits(gpt2, load_model(str(tmp_path / "policy.keras")))


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "float16"])
def test_the_dtype_is_that_of_the_configuration(gpt2_preset, dtype):
    policy = load_policy(Model(path=str(gpt2_preset), dtype=dtype))
    assert policy.compute_dtype == dtype.removeprefix("mixed_")
    assert policy.backbone.variables[0].dtype == ("float32" if "mixed" in dtype else dtype)


def directory(path, **files):
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return str(path)


def test_a_directory_that_is_no_model_is_told_what_was_looked_for(tmp_path):
    cases = {
        directory(tmp_path / "a", notes__txt="x"): ["config.json", "it holds notes.txt"],
        directory(tmp_path / "b"): ["config.json", "it is empty"],
        directory(tmp_path / "c", config__json="{"): ["config.json can not be read"],
        directory(tmp_path / "d", config__json="{}"): ["registered_name", "model_type"],
        directory(tmp_path / "e", config__json='{"registered_name": "x"}'): [
            "KerasHub", "model.weights.h5", "tokenizer.json"
        ],
        directory(tmp_path / "f", config__json='{"model_type": "gpt2", "architectures": ["x"]}'): [
            "Hugging Face", "model.safetensors", "vocab.json", "merges.txt"
        ],
        directory(tmp_path / "g", config__json='{"model_type": "gpt2"}'): ["architectures"],
        directory(tmp_path / "h", weights__h5="x") + "/weights.h5": ["not a .keras archive"],
        str(tmp_path / "missing"): ["does not exist"],
        "missing.keras": ["does not exist"],
    }  # fmt: skip
    for path, words in cases.items():
        problem = source_problem(path)
        assert path.split("/")[-1] in problem
        assert [word for word in words if word not in problem] == [], problem
        with pytest.raises(InputError):
            load_model(path)


def test_a_run_directory_points_to_the_policy_in_it(tmp_path):
    directory(tmp_path / "run", config__yaml="")
    (tmp_path / "run" / "policy").mkdir()
    problem = source_problem(str(tmp_path / "run"))
    assert problem.endswith(f"give {tmp_path / 'run' / 'policy'}.")


def test_a_misspelt_preset_is_answered_with_the_nearest_one():
    assert source_problem("gpt2_base_en") is None
    problem = source_problem("gpt2_bse_en")
    assert "did you mean gpt2_base_en?" in problem


@pytest.mark.parametrize("kind", ["gpt2_hugging_face", "gpt2_preset"])
@pytest.mark.parametrize("left", [0.5, 0.0, 0.999])
def test_weights_that_are_cut_off_are_named(kind, left, request, tmp_path):
    shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    (weights,) = (p for p in (tmp_path / "model").iterdir() if p.suffix in (".h5", ".safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * left)])
    for check in (source_problem, load_model):
        try:
            problem = check(str(tmp_path / "model"))
        except InputError as error:
            problem = str(error)
        assert f"{weights} is damaged: it " in problem and "download it again" in problem


def test_damaged_parts_of_a_sharded_checkpoint_are_named(gpt2_hugging_face, tmp_path):
    folder = shutil.copytree(gpt2_hugging_face, tmp_path / "model")
    part = folder / "model-1.safetensors"
    (folder / "model.safetensors").rename(part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": part.name, "b": "model-2.safetensors"}}))
    assert "model-2.safetensors of model.safetensors.index.json is missing" in (
        source_problem(str(folder))
    )
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert source_problem(str(folder)) is None
    part.write_bytes(b"\x05\0\0\0\0\0\0\0[1,2]")
    assert f"{part} is damaged: its header is not that" in source_problem(str(folder))
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        assert f"{index} is damaged" in source_problem(str(folder))


def test_broken_weights_are_an_input_error_with_the_reason(gpt2_preset, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(gpt2_preset, broken)
    h5py.File(broken / "model.weights.h5", "w").close()
    with pytest.raises(InputError, match="could not be loaded as a model"):
        load_model(str(broken))


def test_a_preset_that_can_not_be_fetched_is_no_fault_of_the_input(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(keras_hub.models.CausalLM, "from_preset", offline)
    with pytest.raises(RuntimeError, match="gpt2_base_en could not be fetched: no network"):
        load_model("gpt2_base_en")


def test_a_tokenizer_that_does_not_belong_to_the_weights_is_refused(gpt2_preset, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(gpt2_preset, other)
    for name in ("config.json", "task.json"):
        content = json.loads((other / name).read_text())
        part = content["config"].get("backbone", content)
        part["config"]["vocabulary_size"] = 100
        (other / name).write_text(json.dumps(content))
    backbone = keras_hub.models.GPT2Backbone(**{**SIZES, "vocabulary_size": 100})
    backbone.save_weights(other / "model.weights.h5")
    with pytest.raises(InputError, match="tokens, but the model has embeddings for 100"):
        load_model(str(other))


def test_a_reference_with_another_vocabulary_is_refused(gpt2, llama, gpt2_preset, tmp_path):
    save_policy(llama, tmp_path / "llama")
    with pytest.raises(InputError, match=r"reference .*llama has another vocabulary .* tokens"):
        load_reference(str(tmp_path / "llama"), gpt2)
    shuffled = tmp_path / "shuffled"
    shutil.copytree(gpt2_preset, shuffled)
    path = shuffled / "assets" / "tokenizer" / "vocabulary.json"
    vocabulary = json.loads(path.read_text())
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(vocabulary))
    with pytest.raises(InputError, match=r"token \d+ is 'b', the policy's is 'a'"):
        load_reference(str(shuffled), gpt2)
    load_reference(str(gpt2_preset), gpt2)


def test_errors_of_adapters_name_the_key(gpt2_preset):
    for key, value in {"lora_targets": "qwery", "lora_alpha": 1e400}.items():
        settings = Model.model_construct(path=str(gpt2_preset), lora_rank=2, **{key: value})
        with pytest.raises(InputError, match=rf"^model\.{key} must"):
            load_policy(settings)


def test_lengths_beyond_the_positions_of_the_model_are_refused(gpt2, llama):
    check_length(gpt2, 64)
    check_length(llama, 10_000)
    with pytest.raises(InputError, match=r"must be <= 64, .* got 65"):
        check_length(gpt2, 65)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        Scratch(hidden_dim=10, num_heads=3)
    with pytest.raises(ValueError, match="even"):
        Scratch(family="llama", hidden_dim=12, num_heads=4)
    assert source_problem("kaggle://x/y") is None
