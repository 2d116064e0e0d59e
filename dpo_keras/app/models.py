"""Policies and references: found, loaded, built from scratch, saved."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dpo_keras.app.config_sections import Model, Quantization, Scratch
from dpo_keras.app.model_sources import local_directory, source_problem
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.atomic_files import replaced
from dpo_keras.utils.text import shortened

if TYPE_CHECKING:
    import keras


def load_model(path: str, dtype: str = "float32") -> keras.Model:
    """Load a `keras_hub.models.CausalLM` from a directory, a file or a preset name.

    Beyond `keras_hub.models.CausalLM.from_preset`, it names what is missing or damaged, and lets a
    Hugging Face checkpoint's own `tokenizer.json` decide how text becomes tokens.

    Args:
        path: a directory of KerasHub or Hugging Face, a `.keras` file, the name of a preset, or
            `"hf://OWNER/MODEL"`.
        dtype: of weights and computation; a `.keras` file keeps its own.

    Returns:
        The model, with its preprocessor.

    Raises:
        InputError: the path names no language model, or a damaged one.
        RuntimeError: a preset that could not be fetched.

    Example:
        >>> import tempfile
        >>> sizes = Scratch(vocabulary_size=300, num_layers=1, num_heads=2, hidden_dim=8)
        >>> policy = build_policy(sizes, ["Any text trains its tokenizer."])
        >>> policy.save_to_preset(directory := tempfile.mkdtemp())
        >>> load_model(directory).backbone.num_layers
        1
    """
    problem = source_problem(path)
    if problem is not None:
        raise InputError(problem)
    import keras_hub

    try:
        if Path(path).is_file():
            model = _from_archive(path)
        else:
            with warnings.catch_warnings():
                # KerasHub leaves closing a SentencePiece file to the garbage collector.
                warnings.simplefilter("ignore", ResourceWarning)
                model = keras_hub.models.CausalLM.from_preset(path, dtype=dtype)
    except InputError:
        raise
    except Exception as error:
        if not Path(path).exists():  # the network, or the hub's terms: not the input's fault
            raise RuntimeError(f"the preset {path} could not be fetched: {error}") from error
        raise InputError(f"{path} could not be loaded as a model: {_reason(error)}") from error
    _check_language_model(model, path)
    directory = local_directory(path)
    if directory is not None:
        from dpo_keras.batching.encoders import follow_checkpoint

        follow_checkpoint(model.preprocessor.tokenizer, directory)
    return model


def _from_archive(path: str) -> keras.Model:
    import keras

    import dpo_keras.training  # noqa: F401 (registers DPOModel for loading)

    with warnings.catch_warnings():
        # Keras warns of containers that hold the layers a second time, under another name.
        warnings.filterwarnings("ignore", message="Skipping nested container")
        model = keras.saving.load_model(path, compile=False)
    return getattr(model, "policy", model)


def _reason(error: Exception) -> str:
    return shortened(f"{type(error).__name__}: {error}".strip().splitlines()[0], 300)


def _check_language_model(model: keras.Model, path: str) -> None:
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is None or not hasattr(model, "backbone"):
        raise InputError(
            f"{path} must be a KerasHub CausalLM with its preprocessor, got "
            f"{type(model).__name__}; save it with model.save_to_preset(DIRECTORY)."
        )
    tokens = preprocessor.tokenizer.vocabulary_size()
    rows = getattr(model.backbone, "vocabulary_size", tokens)
    if tokens > rows:
        raise InputError(
            f"{path}: the tokenizer has {tokens} tokens, but the model has embeddings for {rows}; "
            "they do not belong together."
        )


def load_reference(path: str, policy: keras.Model, dtype: str = "float32") -> keras.Model:
    """Load a reference model, as `load_model`, and check that it has the policy's vocabulary."""
    from dpo_keras.scoring import check_same_vocabulary

    reference = load_model(path, dtype)
    check_same_vocabulary(policy, reference, path)
    return reference


def load_policy(model: Model, training_texts: Iterable[str] | None = None) -> keras.Model:
    """Load the policy of a configuration, or build it with a tokenizer trained on the texts."""
    texts = list(training_texts or ()) if model.quantization == "gptq" else training_texts or ()
    if model.scratch is not None:
        policy = build_policy(model.scratch, texts, model.dtype)
    else:
        policy = load_model(str(model.path), model.dtype)
    if model.quantization is not None:
        _quantize(policy, model.quantization, texts)
    if model.lora_rank is not None:
        _enable_lora(policy, model, model.lora_rank)
    return policy


def _enable_lora(policy: keras.Model, model: Model, rank: int) -> None:
    from dpo_keras.scoring import enable_lora

    assert model.lora_rank is not None
    try:
        enable_lora(policy, rank, model.lora_alpha, model.lora_targets, model.lora_scaling)
    except InputError as error:
        names = ("alpha", "targets", "scaling")
        keys = {name: f"model.lora_{name}" for name in names}
        problems = [p.renamed(keys.get(p.argument, "model.lora_rank")) for p in error.problems]
        raise InputError(problems) from error


def _quantize(policy: keras.Model, mode: Quantization, texts: Iterable[str]) -> None:
    from dpo_keras.scoring import quantize

    try:
        quantize(policy, mode, texts if mode == "gptq" else None)
    except InputError as error:
        problems = [InputProblem("model.quantization", f": {p}") for p in error.problems]
        raise InputError(problems) from error


def check_length(policy: keras.Model, max_length: int) -> None:
    """Refuse texts longer than the policy's table of positions, where it has one."""
    positions = getattr(policy.backbone, "max_sequence_length", None)
    if positions is not None and max_length > positions:
        rule = f"must be <= {positions}, the positions that the model has"
        raise InputError(InputProblem("data.max_length", rule, max_length))


def save_policy(policy: keras.Model, directory: Path) -> None:
    """Write a policy as a KerasHub preset directory, whole."""
    from dpo_keras.serving.pretrained import write_preset
    from dpo_keras.utils.keras_internals import raise_failed_writes

    with replaced(directory) as partial, raise_failed_writes():
        write_preset(policy, partial)


class Family(NamedTuple):
    """An architecture that can be built from scratch."""

    prefix: str  # of its KerasHub classes, `GPT2` in `GPT2CausalLM`
    special_tokens: tuple[str, ...]  # the first gets id 0, which KerasHub pads with


FAMILIES = {
    "gpt2": Family("GPT2", ("<|endoftext|>",)),
    "llama": Family(
        "Llama3",
        (
            "<|end_of_text|>",
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
    ),
}


def build_policy(sizes: Scratch, texts: Iterable[str], dtype: str = "float32") -> keras.Model:
    """Build a policy with random weights and a tokenizer trained on `texts`.

    The weights follow `keras.utils.set_random_seed`. `sizes.vocabulary_size` is an upper bound: the
    model gets as many embeddings as the tokenizer has tokens.
    """
    import keras_hub

    prefix, special_tokens = FAMILIES[sizes.family]
    vocabulary, merges = train_tokenizer(texts, sizes.vocabulary_size, special_tokens)
    shared = sizes.model_dump(include={"num_layers", "hidden_dim", "intermediate_dim", "dropout"})
    shared |= {"vocabulary_size": len(vocabulary), "dtype": dtype}
    if sizes.family == "gpt2":
        backbone = keras_hub.models.GPT2Backbone(
            num_heads=sizes.num_heads, max_sequence_length=sizes.max_sequence_length, **shared
        )
    else:
        backbone = keras_hub.models.Llama3Backbone(
            num_query_heads=sizes.num_heads, num_key_value_heads=sizes.num_heads, **shared
        )
    tokenizer, preprocessor, language_model = (
        getattr(keras_hub.models, f"{prefix}{role}")
        for role in ("Tokenizer", "CausalLMPreprocessor", "CausalLM")
    )
    tokenize = tokenizer(vocabulary=vocabulary, merges=merges)
    prepare = preprocessor(tokenize, sequence_length=sizes.max_sequence_length)
    return language_model(backbone=backbone, preprocessor=prepare)


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, special_tokens: tuple[str, ...]
) -> tuple[dict[str, int], list[str]]:
    """Train a byte-level BPE on texts; the same texts give the same tokens.

    The special tokens get the first ids. Return the vocabulary and the merges, "left right" lines
    in order of priority, as KerasHub's `BytePairTokenizer` takes them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    some = filter(None, texts)
    first = next(some, None)
    if first is None:
        raise InputError("a tokenizer needs text to learn from; there is no training pair.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        # All 256 bytes, so that no text is unknown.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(itertools.chain([first], some), trainer=trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in learned["merges"]]
    return dict(sorted(learned["vocab"].items(), key=lambda item: item[1])), merges
