"""A model version on disk as TensorFlow Serving reads it: its number and its warm-up requests.

A server runs the requests in `assets.extra/tf_serving_warmup_requests` through a model before it
takes traffic. They are `PredictionLog` messages (tensorflow/serving, `apis/prediction_log.proto`,
`apis/predict.proto`, `apis/model.proto`). Their classes come with `tensorflow-serving-api`, each
release of which is pinned to an older TensorFlow, so the few fields are encoded here instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow as tf

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.atomic_files import replaced

WARMUP_REQUESTS = Path("assets.extra") / "tf_serving_warmup_requests"


def next_version(path: str | Path) -> int:
    """Return the version after the last one in a model's directory.

    Args:
        path: the directory that holds the versions; it need not exist.

    Returns:
        1 for a new model.

    Example:
        >>> next_version("saved_models/no_such_model")
        1
    """
    folder = Path(path)
    entries = folder.iterdir() if folder.is_dir() else ()
    versions = [int(e.name) for e in entries if e.is_dir() and e.name.isdecimal()]
    return max(versions, default=0) + 1


def version_path(path: str | Path) -> Path:
    """Return where to write a version: `path` if it ends in a number, else its next version.

    Args:
        path: `<name>/<version>`, or `<name>`.

    Returns:
        The absolute path of a version that does not exist yet.

    Raises:
        InputError: the version exists, or a file is in the way.
    """
    given = Path(path).absolute()
    if not given.name.isdecimal():
        given = given / str(next_version(given))
    if given.exists():
        free = given.parent / str(next_version(given.parent))
        hint = (
            "Versions are never overwritten, because a server may be reading them; the next free "
            f"one is {free}."
        )
        raise InputError(InputProblem("path", f"{given} exists already", hint=hint))
    parent = next(parent for parent in given.parents if parent.exists())
    if not parent.is_dir():
        raise InputError(InputProblem("path", f"{given} cannot be made: {parent} is a file"))
    return given


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a directory that becomes `target`, or vanishes; raise OSError where writing fails."""
    try:
        with replaced(target, replace_directory=False) as partial:
            yield partial
    except (OSError, tf.errors.OpError) as error:
        raise OSError(
            f"the model could not be written to {target} ({error}); nothing was left there."
        ) from error


def write_warmup_requests(
    path: Path, model_name: str, calls: Sequence[tuple[str, Mapping[str, Sequence[str]]]]
) -> None:
    """Write warm-up requests (signature and inputs of each) into a SavedModel."""
    target = path / WARMUP_REQUESTS
    target.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(target)) as writer:
        for signature, inputs in calls:
            writer.write(prediction_log(model_name, signature, inputs))


def prediction_log(model_name: str, signature: str, inputs: Mapping[str, Sequence[str]]) -> bytes:
    """Serialize one request, texts by input name, as a `tensorflow.serving.PredictionLog`."""
    # ModelSpec: name = 1, signature_name = 3.
    request = _field(1, _field(1, model_name.encode()) + _field(3, signature.encode()))
    for name, texts in inputs.items():
        tensor = tf.make_tensor_proto(list(texts), tf.string).SerializeToString()
        # An entry of map<string, TensorProto>: key = 1, value = 2.
        request += _field(2, _field(1, name.encode()) + _field(2, tensor))
    # PredictRequest in PredictLog.request = 1, in PredictionLog.predict_log = 6.
    return _field(6, _field(1, request))


def _field(number: int, value: bytes) -> bytes:
    """Encode a string, bytes or message field of a protocol buffer."""
    length_delimited = 2
    return _varint(number << 3 | length_delimited) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
