"""Score whole datasets outside training: pairs, strings, and reference log-probs kept in a file."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import keras
import numpy as np

from dpo_keras.batching import (
    Batch,
    BatchingChoice,
    TokenizedPairs,
    batch_from_strings,
    one_pass,
    pass_signature,
)
from dpo_keras.batching.image_families import image_preprocessor
from dpo_keras.batching.image_preprocessing import PairImages, expanded
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import PreferencePair
from dpo_keras.scoring.batch_layout import scoring_layout
from dpo_keras.scoring.model_inputs import check_images
from dpo_keras.scoring.scorer import ResponseScorer
from dpo_keras.utils import JSON, Tensor
from dpo_keras.utils.atomic_files import replaced
from dpo_keras.utils.backends import compiled

Arrays: TypeAlias = dict[str, np.ndarray]

_CACHE_VERSION = 1
_AGAIN = "Delete it, or give another path, to compute the log-probs again."


def _compiled(scorer: ResponseScorer) -> Callable[[Batch], Arrays]:
    """Compile a scorer with one trace for batches of any length."""
    functions: dict[tuple[str, ...], Callable[[Batch], Arrays]] = {}

    def logps_and_lengths(batch: Batch) -> dict[str, Tensor]:
        scored = scorer(batch)
        return {name: scored[name] for name in ("logps", "lengths")}

    def run(batch: Batch) -> Arrays:
        names = tuple(sorted(batch))
        if names not in functions:
            check_images(scorer.body, names)
            functions[names] = compiled(logps_and_lengths, scorer.variables, pass_signature(batch))
        return functions[names](batch)

    return run


def score_pairs(
    model: keras.Model,
    tokenized: TokenizedPairs,
    *,
    batch_size: int = 16,
    batching: BatchingChoice = "auto",
    on_batch: Callable[[int, int], None] | None = None,
    scorer: ResponseScorer | None = None,
) -> np.ndarray:
    """Compute the log-probs of both responses of every pair.

    Args:
        model: a KerasHub causal language model, or any Keras model from token ids and mask to
            logits.
        tokenized: N pairs.
        batch_size: pairs at a time; on average, where packed.
        batching: "packed" for models without a `packing_obstacle`, else "buckets"; "auto" chooses.
        on_batch: called with (pairs done, N) after each batch.
        scorer: of the model, in place of one for log-probs, such as a `RewardModel`'s.

    Returns:
        `[N, 2]` float32: log pi(chosen | prompt), log pi(rejected | prompt), in nats.

    Raises:
        InputError: `batching` is "packed", and the model cannot run on packed rows.
    """
    scorer = scorer or ResponseScorer(model)
    batching = scoring_layout(scorer, [model], tokenized, batching)
    run = _compiled(scorer)
    logps = np.zeros((len(tokenized), len(tokenized.responses)), np.float32)
    done = 0
    for part in one_pass(tokenized, batch_size, batching):
        done += part.put(run(part.batch)["logps"], logps)
        if on_batch is not None:
            on_batch(done, len(tokenized))
    return logps


def response_log_probs(
    model: keras.Model,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    images: Sequence[Sequence[JSON]] | None = None,
    preprocessor: object = None,
    batch_size: int = 16,
    max_length: int | None = None,
    scorer: ResponseScorer | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute log pi(response | prompt), summed over response tokens and the end token.

        log pi(y | x) = sum_t log pi(y_t | x, y_<t)

    Prompt and response are tokenized apart and joined as ids. The model's preprocessor decides
    whether a start token is added.

    Args:
        model: a KerasHub causal language model, or any Keras model from
            `{"token_ids", "padding_mask"}` to logits.
        prompts: N strings.
        responses: N strings.
        images: N lists of images, as `PreferencePair` takes them; `<image>` in a prompt stands
            where one belongs. None for none.
        preprocessor: a KerasHub preprocessor or tokenizer; by default `model.preprocessor`.
        batch_size: responses at a time.
        max_length: cut prompts from the left, then responses from the right, to this many tokens;
            None leaves all.
        scorer: of the model, in place of one for log-probs, such as a `RewardModel`'s.

    Returns:
        `(logps, lengths)`: `[N]` float32 in nats, and `[N]` int32 response tokens.

    Raises:
        InputError: no preprocessor, or lists of different length.

    Example:
        >>> import keras_hub
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     tokenize = staticmethod(lambda texts: [[ord(c) - 90 for c in t] for t in texts])
        >>> backbone = keras_hub.models.GPT2Backbone(
        ...     vocabulary_size=64, num_layers=1, num_heads=2, hidden_dim=8,
        ...     intermediate_dim=16, max_sequence_length=32)
        >>> model = keras_hub.models.GPT2CausalLM(backbone)
        >>> logps, lengths = response_log_probs(model, ["a"], ["bc"], preprocessor=Letters())
        >>> lengths
        array([3], dtype=int32)
    """
    preprocessor = preprocessor or getattr(model, "preprocessor", None)
    if preprocessor is None:
        rule = "is needed to tokenize: the model has none attached"
        raise InputError(InputProblem("preprocessor", rule))
    if not prompts:
        return np.zeros(0, np.float32), np.zeros(0, np.int32)
    run = _compiled(scorer or ResponseScorer(model))
    shown = None if images is None else shown_images(preprocessor, prompts, images)
    texts = prompts if shown is None else shown[0]
    batch = batch_from_strings(preprocessor, texts, responses, max_length=max_length)
    logps, lengths = [], []
    for start in range(0, len(prompts), batch_size):
        # The last row is repeated to keep one shape; the results of its copies are cut off.
        rows = np.minimum(np.arange(start, start + batch_size), len(prompts) - 1)
        part = {name: values[rows] for name, values in cast(Arrays, batch).items()}
        if shown is not None:
            prompt = [
                ids[0, : source[0] + 1]
                for ids, source in zip(part["token_ids"], part["source"], strict=True)
            ]
            part |= image_arrays(shown[1], rows, prompt, part["token_ids"].shape[2])
        found = run(cast(Batch, part))
        logps.append(found["logps"][:, 0])
        lengths.append(found["lengths"][:, 0])
    return np.concatenate(logps)[: len(prompts)], np.concatenate(lengths)[: len(prompts)]


def shown_images(
    preprocessor: object, prompts: Sequence[str], images: Sequence[Sequence[JSON]]
) -> tuple[list[str], PairImages]:
    """Return prompts with the tokens of their images, and the images."""
    if len(images) != len(prompts):
        rule = f"must be as many lists as prompts, got {len(images)} for {len(prompts)}"
        raise InputError(InputProblem("images", rule))
    family = image_preprocessor(preprocessor)
    pairs = [
        PreferencePair(prompt, " a", " b", images=tuple(own))  # the responses do not matter
        for prompt, own in zip(prompts, images, strict=True)
    ]
    texts = [expanded(pair, family) for pair in family.with_slots(pairs, 0)]
    return texts, PairImages.of(pairs, family)


def image_arrays(
    images: PairImages, rows: np.ndarray, prompts: Sequence[Sequence[int]], length: int
) -> Arrays:
    """Return the arrays of the images of some rows, given the ids of their prompts.

    Raises:
        InputError: tokens of images were cut off, or a prompt writes such tokens itself.
    """
    images, family = images[rows], images.preprocessor
    tokens = [np.asarray(ids) for ids in prompts]
    for row, own, ids in zip(rows, images.rows.tolist(), tokens, strict=True):
        if len(family.places(ids)) != family.count(own):
            rule = f"leaves out tokens of images, or prompt {row} itself writes such tokens"
            raise InputError(InputProblem("max_length", rule))
    return images.tensors(tokens, length, len(rows))


def cache_reference(
    model: keras.Model,
    tokenized: TokenizedPairs,
    path: str | os.PathLike[str] | None = None,
    *,
    template: object = None,
    batch_size: int = 16,
    batching: BatchingChoice = "auto",
    on_batch: Callable[[int, int], None] | None = None,
) -> TokenizedPairs:
    """Add reference log-probs to pairs, so that every batch carries them (`reference="cached"`).

    Args:
        model: the reference; usually the policy before training.
        tokenized: N pairs.
        path: an `.npz` file. An existing one is read, provided it was made for this model and these
            tokens; otherwise it is written, whole or not at all. None keeps nothing.
        template: the chat template's name, recorded in the file.
        batch_size: pairs at a time; on average, where packed.
        batching: as in `score_pairs`. The file does not depend on it, but for rounding.
        on_batch: called with (pairs done, N) after each batch.

    Returns:
        `tokenized` with `reference` `[N, 2]` float32.

    Raises:
        InputError: the file belongs to other weights, tokens, template or truncation, or is no
            cache at all. The problem's argument is `path`.
    """
    key = cache_key(model, tokenized, template)
    path = None if path is None else Path(path)
    if path is not None and path.exists():
        return tokenized.with_reference(_read_cache(path, key))
    logps = score_pairs(
        model, tokenized, batch_size=batch_size, batching=batching, on_batch=on_batch
    )
    if path is not None:
        # An open file: given a name, NumPy would add a suffix to it.
        with replaced(path) as partial, partial.open("wb") as file:
            np.savez(file, logps=logps, key=np.array(json.dumps(key)))
    return tokenized.with_reference(logps)


def cache_key(
    model: keras.Model, tokenized: TokenizedPairs, template: object = None
) -> dict[str, JSON]:
    """Return what a cache depends on: two runs may share one where all entries are equal."""
    return {
        "version": _CACHE_VERSION,
        "model": type(model).__name__,
        "weights": weights_fingerprint(model),
        "dtype": str(model.compute_dtype),
        # Covers what tokenizer, template and truncation did to every token.
        "tokens": tokenized.fingerprint,
        "pairs": len(tokenized),
        "max_length": tokenized.max_length,
        "template": None if template is None else str(template),
    }


def weights_fingerprint(model: keras.Model) -> str:
    """Compute the SHA-256 of every weight of a built model, in order, shapes included."""
    digest = hashlib.sha256()
    for weight in model.weights:
        values = np.ascontiguousarray(keras.ops.convert_to_numpy(weight))
        # Not the paths: Keras numbers them by what else was made in the process.
        digest.update(f"{values.shape} {values.dtype}\n".encode())
        digest.update(values.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def _read_cache(path: Path, key: dict[str, JSON]) -> np.ndarray:
    try:
        # An open file: given a name, NumPy leaves a damaged one open. Every entry has a checksum.
        with path.open("rb") as file, np.load(file) as stored:
            found, logps = json.loads(str(stored["key"])), stored["logps"]
    except Exception as error:
        rule = f"must be a reference cache; {path} cannot be read as one ({error})"
        raise InputError(InputProblem("path", rule, hint=_AGAIN)) from error
    different = [name for name in key if found.get(name) != key[name]]
    if different:
        details = "; ".join(f"{n}: {found.get(n)} there, {key[n]} now" for n in different)
        rule = f"must be a cache of this model and these pairs; {path} is of others ({details})"
        raise InputError(InputProblem("path", rule, hint=_AGAIN))
    return np.asarray(logps)
