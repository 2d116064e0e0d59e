"""A model version on disk as TensorFlow Serving reads it: its number and its warm-up requests.

A server runs the requests in `assets.extra/tf_serving_warmup_requests` through a model before it
takes traffic. They are `PredictionLog` messages. Their classes come with `tensorflow-serving-api`,
which is pinned to one TensorFlow release each and trails it, so the few fields that are needed are
declared here instead (tensorflow/serving, `apis/prediction_log.proto`, `apis/predict.proto`,
`apis/model.proto`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow as tf
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message,
    message_factory,
)

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.atomic_files import replaced

PLACE = Path("assets.extra") / "tf_serving_warmup_requests"
_STRING, _BYTES, _MESSAGE = 9, 12, 11  # FieldDescriptorProto.Type
_ONE, _MANY = 1, 3  # FieldDescriptorProto.Label

# message -> (field, number, type, label, type name)
_FIELDS: dict[str, tuple[tuple[str, int, int, int, str], ...]] = {
    "ModelSpec": (("name", 1, _STRING, _ONE, ""), ("signature_name", 3, _STRING, _ONE, "")),
    # map<string, TensorProto>: on the wire a repeated entry of key and value, and a message is
    # written like bytes, which spares declaring TensorProto.
    "Input": (("key", 1, _STRING, _ONE, ""), ("value", 2, _BYTES, _ONE, "")),
    "PredictRequest": (
        ("model_spec", 1, _MESSAGE, _ONE, "ModelSpec"),
        ("inputs", 2, _MESSAGE, _MANY, "Input"),
    ),
    "PredictLog": (("request", 1, _MESSAGE, _ONE, "PredictRequest"),),
    "PredictionLog": (("predict_log", 6, _MESSAGE, _ONE, "PredictLog"),),
}


def next_version(path: str | Path) -> int:
    """Return the version after the last one in a model's directory, which need not exist.

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
    target = path / PLACE
    target.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(target)) as writer:
        for signature, inputs in calls:
            writer.write(prediction_log(model_name, signature, inputs))


def prediction_log(model_name: str, signature: str, inputs: Mapping[str, Sequence[str]]) -> bytes:
    """Serialize one request, texts by input name, as a `tensorflow.serving.PredictionLog`."""
    kinds = _messages()
    request = kinds["PredictRequest"](
        model_spec=kinds["ModelSpec"](name=model_name, signature_name=signature),
        inputs=[
            kinds["Input"](
                key=name, value=tf.make_tensor_proto(list(texts), tf.string).SerializeToString()
            )
            for name, texts in inputs.items()
        ],
    )
    log = kinds["PredictionLog"](predict_log=kinds["PredictLog"](request=request))
    return log.SerializeToString(deterministic=True)


def _messages() -> dict[str, type[message.Message]]:
    # A pool of its own: in the default one these names would clash with tensorflow-serving-api.
    package = "dpo_keras.serving"
    file = descriptor_pb2.FileDescriptorProto(
        name="dpo_keras/serving/warmup.proto", package=package, syntax="proto3"
    )
    for name, fields in _FIELDS.items():
        kind = file.message_type.add(name=name)
        for field, number, type_, label, type_name in fields:
            full = f".{package}.{type_name}" if type_name else None
            kind.field.add(name=field, number=number, type=type_, label=label, type_name=full)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in _FIELDS
    }
