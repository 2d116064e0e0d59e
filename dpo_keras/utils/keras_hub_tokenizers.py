"""How KerasHub's byte-pair tokenizers cut text, written for KerasHub 0.32.

A Hugging Face checkpoint says in its `tokenizer.json` how text is normalized and cut into words.
KerasHub reads vocabulary and merges from it and nothing else. The rest, here called the rules, is
kept beside the tokenizer and decides before the default of its family.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_keras.utils import JSON

if TYPE_CHECKING:
    import tokenizers

RULES_FILE = "tokenizer_rules.json"
"""Where a KerasHub preset that this package wrote keeps a checkpoint's rules."""
_RULES, _FOLLOWED = "checkpoint_rules", "backend_of_checkpoint_rules"

# How each family cuts text into words before it merges bytes, as its tokenizer.json says. Llama 3's
# and Qwen's differ in the number of digits that a word may hold; Qwen 3.5 takes combining marks for
# letters.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # openai/gpt-2
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}"
    r"| ?[^\s{letters}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = _MODERN.format(letters=r"\p{L}", digits=r"\p{N}{1,3}")
QWEN = _MODERN.format(letters=r"\p{L}", digits=r"\p{N}")
QWEN3_5 = _MODERN.format(letters=r"\p{L}\p{M}", digits=r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_OSS = (  # o200k_base of openai/tiktoken
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SHORT}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

# By the names of KerasHub's classes; other families keep what they have.
WORD_SPLITS = {
    "GPT2Tokenizer": GPT2,
    "OPTTokenizer": GPT2,
    "FalconTokenizer": GPT2,
    "GPTNeoXTokenizer": GPT2,
    "Llama3Tokenizer": LLAMA3,
    "SmolLM3Tokenizer": LLAMA3,
    "QwenTokenizer": QWEN,
    "Qwen3Tokenizer": QWEN,
    "QwenMoeTokenizer": QWEN,
    "Qwen3MoeTokenizer": QWEN,
    "Qwen3_5Tokenizer": QWEN3_5,
    "Qwen3_5MoeTokenizer": QWEN3_5,
    "GptOssTokenizer": GPT_OSS,
    "BloomTokenizer": BLOOM,
}


def checkpoint_rules(directory: Path) -> dict[str, JSON] | None:
    """Read the rules of a Hugging Face checkpoint or of a preset of ours; None without byte pairs.

    Raises OSError or ValueError for a file that cannot be read or has another form.
    """
    saved = directory / RULES_FILE
    path = saved if saved.is_file() else directory / "tokenizer.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object")
    model = content.get("model")  # a KerasHub preset's tokenizer.json has none
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        return None
    model = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    return {**content, "model": {**model, "type": "BPE"}}


def follow_rules(tokenizer: object, rules: dict[str, JSON]) -> None:
    """Make a KerasHub byte-pair tokenizer cut text by the rules of a checkpoint."""
    vars(tokenizer)[_RULES] = rules  # not as an attribute, which Keras would track
    mend_word_splits(tokenizer)


def followed_rules(tokenizer: object) -> dict[str, JSON] | None:
    """Return the rules that `follow_rules` gave a tokenizer; None without any."""
    return getattr(tokenizer, "__dict__", {}).get(_RULES)


# KerasHub 0.32 reads these from a Hugging Face checkpoint, and leaves them out of what it saves.
_LOST_TOKENS = {"Llama3Tokenizer": {"bos_token": "start_token", "eos_token": "end_token"}}
_LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>")


def complete_tokenizer_config(config: JSON, tokenizer: object) -> bool:
    """Write into a saved configuration what KerasHub forgets of a tokenizer; tell whether any."""
    kind = type(tokenizer).__name__
    lost = {
        name: getattr(tokenizer, attribute)
        for name, attribute in _LOST_TOKENS.get(kind, {}).items()
    }
    if not lost or not isinstance(config, dict | list):
        return False
    values = config if isinstance(config, list) else list(config.values())
    changed = [complete_tokenizer_config(value, tokenizer) for value in values]
    if isinstance(config, dict) and config.get("class_name") == kind:
        config["config"] |= lost
        return True
    return any(changed)


def saving_obstacle(tokenizer: object) -> str | None:
    """Return why a tokenizer's preset would not load again; None where it does."""
    missing = [token for token in _LLAMA3_TOKENS if token not in (_vocabulary(tokenizer) or ())]
    if type(tokenizer).__name__ != "Llama3Tokenizer" or not missing:
        return None
    return f"it has no {missing[0]}, which KerasHub wants in every preset of the Llama family"


def _vocabulary(tokenizer: object) -> dict[str, int] | None:
    return getattr(tokenizer, "vocabulary", None)


def write_rules(model: object, directory: Path) -> None:
    """Write the rules that a model's tokenizer follows, if any, into its preset."""
    rules = followed_rules(getattr(getattr(model, "preprocessor", None), "tokenizer", None))
    if rules is not None:
        text = json.dumps(rules, ensure_ascii=False)
        (directory / RULES_FILE).write_text(text, encoding="utf-8")


def rules_digest(tokenizer: object) -> str | None:
    """Return what tells one tokenizer's rules from another's; None without any."""
    rules = followed_rules(tokenizer)
    return None if rules is None else hashlib.sha256(json.dumps(rules).encode()).hexdigest()


def mend_word_splits(tokenizer: object) -> bool:
    """Make a KerasHub byte-pair tokenizer cut words as its checkpoint or its own family does.

    KerasHub 0.32 passes the regular expression that finds words, Llama 3's for all families, to the
    `tokenizers` library as a literal string, which occurs in no text. Merges then cross word
    boundaries, and about a third of ordinary texts get tokens that the model was not trained on.
    The tokenizer itself is changed, so that KerasHub's `generate` sees the same tokens. Returns
    whether it now cuts words by its checkpoint or by the expression of its family.
    """
    pattern = WORD_SPLITS.get(type(tokenizer).__name__)
    backend: Any = python_tokenizer(tokenizer)
    if not hasattr(backend, "pre_tokenizer"):
        return False
    rules = followed_rules(tokenizer)
    if rules is not None:
        # Loading a vocabulary makes another backend.
        if vars(tokenizer).get(_FOLLOWED) is not backend:
            vars(tokenizer)["_tokenizer"] = _backend(tokenizer, rules)
            vars(tokenizer)[_FOLLOWED] = vars(tokenizer)["_tokenizer"]
        return True
    if pattern is None:
        return False
    from tokenizers import Regex, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(
                add_prefix_space=bool(getattr(tokenizer, "add_prefix_space", False)),
                use_regex=False,
            ),
        ]
    )
    return True


def _backend(tokenizer: Any, rules: dict[str, JSON]) -> tokenizers.Tokenizer:
    """Return a checkpoint's own tokenizer, which adds no start or end token."""
    from tokenizers import Tokenizer, decoders

    added = {token["content"]: token["id"] for token in rules.get("added_tokens") or ()}
    vocabulary = {**tokenizer.vocabulary, **added}
    merges = [merge for merge in tokenizer.merges if "#version" not in merge]
    model = {**rules["model"], "vocab": vocabulary, "merges": merges}
    unused = {"post_processor": None, "truncation": None, "padding": None}
    backend = Tokenizer.from_str(json.dumps({**rules, **unused, "model": model}))
    if backend.decoder is None:
        backend.decoder = decoders.ByteLevel()
    return backend


def python_tokenizer(tokenizer: object) -> tokenizers.Tokenizer | None:
    """Return the `tokenizers.Tokenizer` in a byte-pair tokenizer; None without one."""
    return getattr(tokenizer, "_tokenizer", None)


def fast_byte_pair_encoding(tokenizer: object) -> Callable[[list[str]], list[list[int]]] | None:
    """Return a byte-pair tokenizer's encoding of a batch; None where its `tokenize` may do more.

    KerasHub 0.32 also computes the tokens' offsets and drops them, which takes a fifth of the time.
    """
    method = getattr(type(tokenizer), "tokenize", None)
    # A family that overrides `tokenize` may do more than encode.
    if getattr(method, "__qualname__", "") != "BytePairTokenizer.tokenize":
        return None
    encode = getattr(getattr(tokenizer, "_tokenizer", None), "encode_batch_fast", None)
    in_python = getattr(tokenizer, "_use_tf_workflow", lambda: True)() is False
    if encode is None or not in_python or "int" not in str(getattr(tokenizer, "compute_dtype", "")):
        return None
    return lambda texts: [encoding.ids for encoding in encode(texts)]
