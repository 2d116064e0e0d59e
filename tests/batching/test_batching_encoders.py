import numpy as np
import pytest

from dpo_keras.batching import TextEncoder
from dpo_keras.errors import InputError

FAMILIES = ["gpt2", "llama3", "qwen", "llama", "gemma"]


@pytest.fixture(params=FAMILIES)
def preprocessor(request):
    return request.getfixturevalue(request.param)


def test_start_token_is_placed_as_the_preprocessor_places_it(preprocessor):
    text = "Hello there, "
    x, _, _ = preprocessor([text])
    theirs = np.asarray(x["token_ids"])[0][np.asarray(x["padding_mask"])[0].astype(bool)]
    ours = TextEncoder(preprocessor).prompts([text])[0]
    # KerasHub adds the end token too; its preprocessor drops one token for the shifted labels.
    assert theirs[: len(ours)].tolist() == ours.tolist()
    assert len(theirs) == len(ours) + 1


def test_start_token_is_there_exactly_once(preprocessor):
    ids = TextEncoder(preprocessor).prompts(["Hello", ""])
    start = preprocessor.tokenizer.start_token_id
    assert [row.count(start) for row in ids.tolist()] == [0 if start is None else 1] * 2


def test_no_start_token_where_the_preprocessor_is_told_not_to_add_one(llama3):
    bare = type(llama3)(llama3.tokenizer, add_start_token=False)
    assert llama3.tokenizer.start_token_id not in TextEncoder(bare).prompts(["Hello"])[0]


def test_a_start_token_written_in_the_prompt_is_not_doubled(llama3):
    ids = TextEncoder(llama3).prompts(["<|begin_of_text|>Hello"])[0]
    assert ids.tolist().count(llama3.tokenizer.start_token_id) == 1


def test_end_token_follows_every_response_exactly_once(preprocessor):
    end = preprocessor.tokenizer.end_token_id
    for ids in TextEncoder(preprocessor).responses(["Hello there.", "yes", "no "]).tolist():
        assert ids[-1] == end and ids.count(end) == 1


@pytest.mark.parametrize("written", ["<|end_of_text|>", "<|eot_id|>"])
def test_an_end_written_in_the_response_is_not_followed_by_another(llama3, written):
    ids = TextEncoder(llama3).responses(["Hello" + written])[0].tolist()
    assert ids[-1] == llama3.tokenizer.token_to_id(written)
    assert sum(i in TextEncoder(llama3).ends for i in ids) == 1


def test_the_end_of_a_family_that_stops_elsewhere_too_is_known():
    class Phi3Tokenizer:
        end_token_id, pad_token_id = 2, 0
        tokenize = staticmethod(lambda texts: [[7] if text == "<|end|>" else [9] for text in texts])
        token_to_id = staticmethod(lambda text: 7 if text == "<|end|>" else None)
        id_to_token = staticmethod(lambda token: "<|end|>" if token == 7 else "?")

    encoder = TextEncoder(Phi3Tokenizer())
    assert encoder.responses(["<|end|>", "x"]).tolist() == [[7], [9, 2]]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("space", ["Hello ", "Hello\n", "Hello  "])
def test_prompt_ids_do_not_depend_on_the_response(request, name, space):
    """A prompt that ends in a space must not lose it to the response's first token."""
    encoder = TextEncoder(request.getfixturevalue(name))
    prompt, response = encoder.prompts([space])[0], encoder.responses(["there"])[0]
    text = encoder.tokenizer.detokenize([[*prompt[encoder.start is not None :], *response[:-1]]])[0]
    assert text == space + "there"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("response", ["four", " four", "\nfour", "  four  ", "\n\nfour"])
def test_joined_ids_read_as_prompt_and_response_without_a_space_nobody_wrote(
    request, name, response
):
    encoder = TextEncoder(request.getfixturevalue(name))
    prompt, ids = encoder.prompts(["2+2="])[0], encoder.responses([response])[0]
    text = encoder.tokenizer.detokenize([[*prompt[encoder.start is not None :], *ids[:-1]]])[0]
    assert text == "2+2=" + response


def test_only_sentencepiece_with_a_dummy_prefix_needs_an_anchor(request):
    anchors = {name: TextEncoder(request.getfixturevalue(name)).anchor for name in FAMILIES}
    assert anchors == {"gpt2": "", "llama3": "", "qwen": "", "llama": "\n", "gemma": ""}


def test_equal_prompts_are_tokenized_once(letters):
    seen = []

    class Counting(type(letters)):
        def tokenize(self, texts):
            seen.extend(texts)
            return super().tokenize(texts)

    rows = TextEncoder(Counting()).prompts(["ab", "c", "ab"])
    assert rows.tolist() == [[1, 97, 98], [1, 99], [1, 97, 98]]
    assert sorted(seen) == ["ab", "c"]


def test_a_plain_function_with_ids_will_do():
    def tokenize(texts):
        return np.array([[5, 6]] * len(texts))

    tokenize.end_token_id, tokenize.pad_token_id = 2, 0
    encoder = TextEncoder(tokenize)
    assert encoder.prompts(["x"]).tolist() == [[5, 6]]
    assert encoder.responses(["x"]).tolist() == [[5, 6, 2]]


def test_the_tensorflow_path_of_a_tokenizer_gives_the_same_layout(gemma):
    same = type(gemma.tokenizer)(gemma.tokenizer.proto, _allow_python_workflow=False)
    texts = ["Hello there", "yes"]
    assert TextEncoder(same).responses(texts).tolist() == (
        TextEncoder(gemma).responses(texts).tolist()
    )


def test_all_that_is_wrong_with_a_tokenizer_is_said_at_once():
    class Wrong:
        sequence_length, add_bos = 16, True
        tokenize = staticmethod(list)

    with pytest.raises(InputError) as error:
        TextEncoder(Wrong())
    text = str(error.value)
    for word in ("end_token_id", "pad_token_id", "sequence_length", "add_bos"):
        assert word in text
    with pytest.raises(InputError, match="preprocessor must be"):
        TextEncoder(object())


def test_ids_are_those_of_the_familys_own_tokenize(preprocessor):
    texts = [
        "Hello there,\n\nhow do I bake",
        "",
        "2+2=4  why?",
        "\u00fcber \u65e5\u672c \U0001f600 <|endoftext|>",
    ]
    encoder = TextEncoder(preprocessor)
    theirs = preprocessor.tokenizer.tokenize(texts)
    assert encoder.tokenize(texts) == [np.asarray(row).tolist() for row in theirs]


def test_a_tokenize_of_its_own_is_the_one_that_is_used(gpt2, monkeypatch):
    kind = type(gpt2.tokenizer)
    monkeypatch.setattr(kind, "tokenize", lambda self, texts: [[7] for _ in texts], raising=False)
    assert TextEncoder(gpt2).tokenize(["a", "b"]) == [[7], [7]]
