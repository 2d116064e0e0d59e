"""Tokenizer, chat template and stopping rules of a policy as Hugging Face files.

Where the policy came from a Hugging Face directory, its own files are copied. Otherwise they are
made from the tokenizer that training used, so that `transformers` gives the ids trained on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_keras.batching import ChatTemplate, TextEncoder
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.keras_hub_tokenizers import python_tokenizer

COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tekken.json", "chat_template.jinja"),
    *("chat_template.json", "generation_config.json", "preprocessor_config.json"),
    "processor_config.json",
)
# What reads a SentencePiece model, by KerasHub's tokenizer.
_SENTENCE_PIECE = {
    **dict.fromkeys(("GemmaTokenizer", "Gemma3Tokenizer", "Gemma4Tokenizer"), "GemmaTokenizer"),
    **dict.fromkeys(("LlamaTokenizer", "MistralTokenizer"), "LlamaTokenizer"),
    **dict.fromkeys(("MixtralTokenizer", "Phi3Tokenizer"), "LlamaTokenizer"),
}


def write_tokenizer(
    preprocessor: object, directory: Path, template: ChatTemplate | None, source: Path | None
) -> dict[str, JSON]:
    """Write the tokenizer's files; return the ids that belong into config.json.

    Args:
        preprocessor: what tokenized in training.
        directory: where to write.
        template: the chat template of the training; None keeps that of `source`.
        source: the Hugging Face directory that the policy was loaded from, if any.
    """
    encoder = TextEncoder(preprocessor)
    settings: dict[str, JSON]
    if source is not None and (source / "tokenizer_config.json").is_file():
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        settings = _read(directory / "tokenizer_config.json")
    else:
        settings = _make_files(encoder, directory)
    if template is not None:
        settings["chat_template"] = _with_start(template, encoder)
        (directory / "chat_template.jinja").write_text(settings["chat_template"], encoding="utf-8")
        (directory / "chat_template.json").unlink(missing_ok=True)
    _write(directory / "tokenizer_config.json", settings)
    generation = _read(directory / "generation_config.json")
    ids = {
        "bos_token_id": encoder.start,
        "eos_token_id": _ends(encoder, template, generation.get("eos_token_id")),
        "pad_token_id": encoder.pad,
    }
    _write(directory / "generation_config.json", {"do_sample": False} | generation | ids)
    return ids


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write(path: Path, content: JSON) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _make_files(encoder: TextEncoder, directory: Path) -> dict[str, JSON]:
    """Write the vocabulary, and return the content of tokenizer_config.json."""
    tokenizer = encoder.tokenizer
    if python_tokenizer(tokenizer) is not None:
        _write_byte_pairs(encoder, directory)
        kind = "PreTrainedTokenizerFast"
    elif (
        getattr(tokenizer, "proto", None) is not None
        and type(tokenizer).__name__ in _SENTENCE_PIECE
    ):
        proto = tokenizer.proto
        content = proto if isinstance(proto, bytes) else Path(proto).read_bytes()
        (directory / "tokenizer.model").write_bytes(content)
        kind = _SENTENCE_PIECE[type(tokenizer).__name__]
    else:
        rule = f"has a {type(tokenizer).__name__}, which cannot be written for Hugging Face"
        hint = "Give the Hugging Face directory that the policy came from as source."
        raise InputError(InputProblem("model", rule, hint=hint))
    special = {"bos_token": encoder.start, "eos_token": encoder.end, "pad_token": encoder.pad}
    named = {
        name: _token(tokenizer, number) for name, number in special.items() if number is not None
    }
    if kind != "PreTrainedTokenizerFast":
        named["unk_token"] = "<unk>"
    # SentencePiece puts a word boundary behind the start token, too; the new behavior does not.
    legacy = {"legacy": True} if kind == "LlamaTokenizer" else {}
    _write(directory / "special_tokens_map.json", named)
    texts = dict.fromkeys([*encoder.special_tokens, *named.values()])
    numbers = {text: encoder.token_id(text) for text in texts if text}
    return {
        "tokenizer_class": kind,
        **legacy,
        **named,
        "add_bos_token": encoder.start is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # the library's own mark for "no limit"
        "added_tokens_decoder": {
            str(number): {
                "content": text,
                "special": True,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
            for text, number in sorted(numbers.items(), key=lambda item: item[1] or 0)
            if number is not None
        },
    }


def _token(tokenizer: Any, number: int) -> str:
    token = tokenizer.id_to_token(number)
    return token.decode() if isinstance(token, bytes) else str(token)


def _write_byte_pairs(encoder: TextEncoder, directory: Path) -> None:
    """Write the very tokenizer of the training, which adds the start token if training did."""
    backend = python_tokenizer(encoder.tokenizer)
    assert backend is not None
    content = json.loads(backend.to_str())
    if encoder.start is not None:
        start = _token(encoder.tokenizer, encoder.start)
        first = {"SpecialToken": {"id": start, "type_id": 0}}
        texts = [{"Sequence": {"id": part, "type_id": number}} for number, part in enumerate("AB")]
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, texts[0]],
            "pair": [first, *texts],
            "special_tokens": {start: {"id": start, "ids": [encoder.start], "tokens": [start]}},
        }
    _write(directory / "tokenizer.json", content)
    if type(encoder.tokenizer).__name__ == "GPT2Tokenizer":  # KerasHub reads these
        _write(directory / "vocab.json", content["model"]["vocab"])
        merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
        text = "\n".join(["#version: 0.2", *merges, ""])
        (directory / "merges.txt").write_text(text, encoding="utf-8")


def _with_start(template: ChatTemplate, encoder: TextEncoder) -> str:
    """Return a template that writes the start token, which `transformers` leaves to templates."""
    if encoder.start is None:
        return template.source
    start = _token(encoder.tokenizer, encoder.start)
    talk: list[dict[str, str]] = [{"role": "user", "content": "a"}]
    rendered = template.render(talk, add_generation_prompt=True, bos_token=start)
    return template.source if rendered.startswith(start) else "{{ bos_token }}" + template.source


def _ends(encoder: TextEncoder, template: ChatTemplate | None, others: JSON) -> list[int]:
    """Return the ids that end a response, those that end a turn of the template first."""
    ids: list[int] = []
    if template is not None:
        ids += _turn_end(encoder, template)
    ids += [encoder.end, *sorted(encoder.ends)]
    ids += others if isinstance(others, list) else [others] if isinstance(others, int) else []
    return list(dict.fromkeys(ids))


def _turn_end(encoder: TextEncoder, template: ChatTemplate) -> list[int]:
    """Return the id of the first special token behind an answer; empty where there is none."""
    variables: dict[str, Any] = {
        name: getattr(encoder.tokenizer, attribute, None) or ""
        for name, attribute in (("bos_token", "start_token"), ("eos_token", "end_token"))
    }
    talk: Sequence[dict[str, str]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "answer"},
    ]
    behind = template.render(talk, **variables).rpartition("answer")[2]
    places = {
        behind.find(m): m for m in (*template.markers, variables["eos_token"]) if m in behind and m
    }
    if not places:
        return []
    found = encoder.token_id(places[min(places)])
    return [] if found is None else [found]
