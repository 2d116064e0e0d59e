"""Warm-up requests: what TensorFlow Serving runs through a model before it takes traffic.

The file `assets.extra/tf_serving_warmup_requests` holds `PredictionLog` messages. Their classes
come with `tensorflow-serving-api`, which is pinned to one TensorFlow release each and trails it, so
the few fields that are needed are declared here instead (tensorflow/serving,
`apis/prediction_log.proto`, `apis/predict.proto`, `apis/model.proto`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)

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


def _messages() -> dict[str, Any]:
    # A pool of its own: in the default one these names would clash with tensorflow-serving-api.
    package = "dpo_keras.serving"
    file = descriptor_pb2.FileDescriptorProto(
        name="dpo_keras/serving/warmup.proto", package=package, syntax="proto3"
    )
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind, label, type_name in fields:
            full = f".{package}.{type_name}" if type_name else None
            message.field.add(name=field, number=number, type=kind, label=label, type_name=full)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in _FIELDS
    }


def prediction_log(model_name: str, signature: str, inputs: Mapping[str, Sequence[str]]) -> bytes:
    """One request as a serialized `tensorflow.serving.PredictionLog`.

    Args:
        model_name: the name that the model is served under.
        signature: the signature's name.
        inputs: texts by input name, `[batch]` each.

    Returns:
        The message's bytes.

    Example:
        >>> b"generate" in prediction_log("support", "generate", {"prompt": ["Hello"]})
        True
    """
    message = _messages()
    request = message["PredictRequest"](
        model_spec=message["ModelSpec"](name=model_name, signature_name=signature),
        inputs=[
            message["Input"](
                key=name, value=tf.make_tensor_proto(list(texts), tf.string).SerializeToString()
            )
            for name, texts in inputs.items()
        ],
    )
    log = message["PredictionLog"](predict_log=message["PredictLog"](request=request))
    return log.SerializeToString(deterministic=True)


def write_warmup_requests(
    path: Path, model_name: str, calls: Sequence[tuple[str, Mapping[str, Sequence[str]]]]
) -> None:
    """Writes warm-up requests into a SavedModel.

    Args:
        path: the SavedModel.
        model_name: the name that it is served under.
        calls: signature and inputs of each request.
    """
    target = path / PLACE
    target.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(target)) as writer:
        for signature, inputs in calls:
            writer.write(prediction_log(model_name, signature, inputs))
