"""TensorFlow Serving's Predict and GetModelStatus calls, without TensorFlow.

The official stubs (tensorflow_serving.apis) import all of TensorFlow, which takes seconds and a
gigabyte for a short message. This module holds the part of their .proto files that a client needs,
as data: numbers and types define the same wire format. The messages are in a separate pool, so that
both can be imported in one process.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

METHOD = "/tensorflow.serving.PredictionService/Predict"
STATUS_METHOD = "/tensorflow.serving.ModelService/GetModelStatus"
STATES = {10: "START", 20: "LOADING", 30: "AVAILABLE", 40: "UNLOADING", 50: "END"}  # of a version
# With NOT_FOUND, `serving.model_server` reports which models it has; TensorFlow Serving does not.
# The suffix "-bin" allows UTF-8.
MODELS_METADATA = "models-bin"

# Message → its fields: name → (number, type). "[]" marks repeated fields; a capitalized type is a
# message of this table.
_MESSAGES = {
  "Dim": {"size": (1, "int64")},
  "TensorShape": {"dim": (2, "Dim[]")},
  "Tensor": {
    "dtype": (1, "int32"),
    "tensor_shape": (2, "TensorShape"),
    "tensor_content": (4, "bytes"),
    "float_val": (5, "float[]"),
    "int_val": (7, "int32[]"),
    "string_val": (8, "bytes[]"),
  },
  # An entry of a map<string, TensorProto>.
  "NamedTensor": {"key": (1, "string"), "value": (2, "Tensor")},
  "Version": {"value": (1, "int64")},
  "ModelSpec": {
    "name": (1, "string"),
    "version": (2, "Version"),
    "signature_name": (3, "string"),
    "version_label": (4, "string"),
  },
  "PredictRequest": {"model_spec": (1, "ModelSpec"), "inputs": (2, "NamedTensor[]")},
  "PredictResponse": {"outputs": (1, "NamedTensor[]"), "model_spec": (2, "ModelSpec")},
  "StatusRequest": {"model_spec": (1, "ModelSpec")},
  "Status": {"error_code": (1, "int32"), "error_message": (2, "string")},
  "VersionStatus": {"version": (1, "int64"), "state": (2, "int32"), "status": (3, "Status")},
  "StatusResponse": {"model_version_status": (1, "VersionStatus[]")},
}
# NumPy kind → number in TensorFlow's DataType, field of the values, NumPy type in tensor_content.
_TYPES = {
  "f": (1, "float_val", np.dtype("<f4")),
  "i": (3, "int_val", np.dtype("<i4")),
  "U": (7, "string_val", None),
}


def message_classes(messages: Mapping[str, Mapping[str, tuple[int, str]]]) -> dict[str, Any]:
  """Makes message classes, by name.

  Args:
    messages: message → its fields: name → (number, type), as in `_MESSAGES`.
  """
  types = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(
    name="serving.proto", package="serving", syntax="proto3"
  )
  for name, fields in messages.items():
    message = file.message_type.add(name=name)
    for field, (number, kind) in fields.items():
      label = types.LABEL_REPEATED if kind.endswith("[]") else types.LABEL_OPTIONAL
      kind = kind.removesuffix("[]")
      if kind in messages:
        message.field.add(
          name=field,
          number=number,
          label=label,
          type=types.TYPE_MESSAGE,
          type_name=f".{file.package}.{kind}",
        )
      else:
        message.field.add(
          name=field, number=number, label=label, type=types.Type.Value(f"TYPE_{kind.upper()}")
        )
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return {
    name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}"))
    for name in messages
  }


_CLASSES = message_classes(_MESSAGES)
Tensor, PredictRequest, PredictResponse = (
  _CLASSES["Tensor"],
  _CLASSES["PredictRequest"],
  _CLASSES["PredictResponse"],
)
StatusRequest, StatusResponse = _CLASSES["StatusRequest"], _CLASSES["StatusResponse"]


def to_tensor(values) -> Message:
  """Converts text, float32 or int32 values to a `Tensor` message.

  Raises:
    TypeError: the values are of another type.
  """
  array = np.asarray(values)
  if array.dtype.kind not in _TYPES:
    raise TypeError(f"got values of type {array.dtype}, wanted text, floats or integers.")
  dtype, field, packed = _TYPES[array.dtype.kind]
  tensor = Tensor(dtype=dtype)
  tensor.tensor_shape.SetInParent()  # a scalar's shape is empty, not missing
  for size in array.shape:
    tensor.tensor_shape.dim.add(size=size)
  flat = array.reshape(-1).tolist()
  getattr(tensor, field).extend(flat if packed else [text.encode() for text in flat])
  return tensor


def to_array(tensor) -> np.ndarray:
  """Returns the values of a `Tensor` message: float32, int32, or str (as objects).

  Raises:
    ValueError: the type is another, or the number of values does not match the shape.
  """
  known = {dtype: (field, packed) for dtype, field, packed in _TYPES.values()}
  if tensor.dtype not in known:
    raise ValueError(
      f"got a tensor with TensorFlow's type number {tensor.dtype}, wanted float32 (1), int32 (3) "
      "or string (7)."
    )
  field, packed = known[tensor.dtype]
  values = getattr(tensor, field)
  if packed is None:
    flat = np.array([text.decode(errors="replace") for text in values], object)
  elif tensor.tensor_content:
    flat = np.frombuffer(tensor.tensor_content, packed)
  else:
    flat = np.array(values, packed)
  shape = [dim.size for dim in tensor.tensor_shape.dim]
  missing = int(np.prod(shape, dtype=np.int64)) - len(flat)
  if missing > 0 and len(flat):
    # TensorFlow omits repetitions of the last value.
    flat = np.pad(flat, (0, missing), mode="edge")
  if missing < 0 or (missing > 0 and not len(flat)):
    raise ValueError(f"got {len(flat)} values for a tensor of shape {shape}.")
  return flat.reshape(shape)
