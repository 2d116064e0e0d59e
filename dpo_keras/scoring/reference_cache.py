"""Reference log-probs computed once and kept beside the run."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from dpo_keras.batching import Batching, TokenizedPairs
from dpo_keras.errors import InputError
from dpo_keras.scoring.offline_scoring import score_pairs

_VERSION = 1


def weights_fingerprint(model: keras.Model) -> str:
    """SHA-256 over every weight of a model, in order, shapes included.

    Args:
        model: a built model.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> len(weights_fingerprint(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])))
        64
    """
    digest = hashlib.sha256()
    for weight in model.weights:
        values = np.ascontiguousarray(keras.ops.convert_to_numpy(weight))
        # Not the paths: Keras numbers them by what else was made in the process.
        digest.update(f"{values.shape} {values.dtype}\n".encode())
        digest.update(values.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def cache_key(
    model: keras.Model, tokenized: TokenizedPairs, template: Any = None
) -> dict[str, Any]:
    """What a cache of reference log-probs depends on.

    Args:
        model: the reference.
        tokenized: the pairs, whose fingerprint covers tokenizer, template and truncation in what
            they did to every token.
        template: the template's name, to be able to say that it was this which differed.

    Returns:
        A JSON-able dict; two runs may share a cache where all its entries are equal.
    """
    return {
        "version": _VERSION,
        "model": type(model).__name__,
        "weights": weights_fingerprint(model),
        "dtype": str(model.compute_dtype),
        "tokens": tokenized.fingerprint,
        "pairs": len(tokenized),
        "max_length": tokenized.max_length,
        "template": None if template is None else str(template),
    }


def cache_reference(
    model: keras.Model,
    tokenized: TokenizedPairs,
    path: str | os.PathLike[str] | None = None,
    *,
    template: Any = None,
    batch_size: int = 16,
    batching: Batching = "buckets",
    on_batch: Callable[[int, int], None] | None = None,
) -> TokenizedPairs:
    """Pairs that carry their reference log-probs into every batch, for `reference="cached"`.

    Args:
        model: the reference; usually the policy before training.
        tokenized: N pairs.
        path: an `.npz` file. Where it exists it is read, provided it was made for this model and
            these tokens; otherwise it is written (whole or not at all). None keeps nothing.
        template: the chat template's name, recorded in the key.
        batch_size: pairs at a time; in the mean, where packed.
        batching: as in `score_pairs`; both ways find the same but for rounding, so that the file
            does not depend on it.
        on_batch: called with (pairs done, N).

    Returns:
        `tokenized` with `reference` `[N, 2]` float32.

    Raises:
        InputError: the file belongs to other weights, tokens, template or truncation, or is no
            cache at all.
    """
    key = cache_key(model, tokenized, template)
    path = None if path is None else pathlib.Path(path)
    if path is not None and path.exists():
        return tokenized.with_reference(_read(path, key))
    logps = score_pairs(
        model, tokenized, batch_size=batch_size, batching=batching, on_batch=on_batch
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial.npz")
        try:
            np.savez(partial, logps=logps, key=np.array(json.dumps(key)))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return tokenized.with_reference(logps)


def _read(path: pathlib.Path, key: dict[str, Any]) -> np.ndarray:
    try:
        with np.load(path) as stored:
            found, logps = json.loads(str(stored["key"])), stored["logps"]
    except Exception as error:
        raise InputError(
            f"reference cache {path} cannot be read ({error}). Delete it to compute it again."
        ) from error
    different = [name for name in key if found.get(name) != key[name]]
    if different:
        details = "; ".join(f"{n}: {found.get(n)} there, {key[n]} now" for n in different)
        raise InputError(
            f"reference cache {path} was made for something else ({details}). Delete it, or give "
            "another path, to compute it again."
        )
    return np.asarray(logps)
