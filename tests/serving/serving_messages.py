"""The messages of TensorFlow Serving, to read warm-up requests as it does."""

import tensorflow as tf
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorflow.core.framework import (
    resource_handle_pb2,
    tensor_pb2,
    tensor_shape_pb2,
    types_pb2,
)

# As in tensorflow/serving: apis/model.proto, apis/predict.proto, apis/prediction_log.proto.
MESSAGES = """
ModelSpec: name 1 string; signature_name 3 string
PredictRequest: model_spec 1 ModelSpec; inputs 2 InputsEntry*; output_filter 3 string*
PredictLog: request 1 PredictRequest
PredictionLog: predict_log 6 PredictLog
"""


def serving_messages():
    """The definitions of TensorFlow Serving, with real `TensorProto`s and a real map."""
    pool = descriptor_pool.DescriptorPool()
    for module in (types_pb2, tensor_shape_pb2, resource_handle_pb2, tensor_pb2):
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        pool.Add(file)
    file = descriptor_pb2.FileDescriptorProto(
        name="serving.proto", package="tensorflow.serving", syntax="proto3"
    )
    file.dependency.append("tensorflow/core/framework/tensor.proto")
    for line in MESSAGES.strip().splitlines():
        name, fields = line.split(": ")
        message = file.message_type.add(name=name)
        if name == "PredictRequest":
            entry = message.nested_type.add(name="InputsEntry")
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, type=9, label=1)
            entry.field.add(
                name="value", number=2, type=11, label=1, type_name=".tensorflow.TensorProto"
            )
        for field in fields.split("; "):
            label, number, kind = field.split(" ")
            many, kind = kind.endswith("*"), kind.rstrip("*")
            added = message.field.add(
                name=label, number=int(number), label=3 if many else 1, type=9
            )
            if kind != "string":
                added.type = 11
                inner = "PredictRequest.InputsEntry" if kind == "InputsEntry" else kind
                added.type_name = f".tensorflow.serving.{inner}"
    pool.Add(file)
    found = pool.FindMessageTypeByName("tensorflow.serving.PredictionLog")
    return message_factory.GetMessageClass(found)


def texts_of(tensor_proto):
    data = tensor_pb2.TensorProto.FromString(tensor_proto.SerializeToString())
    return [text.decode() for text in tf.make_ndarray(data).tolist()]
