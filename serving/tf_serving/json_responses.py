"""Writes TensorFlow Serving's JSON of a predict response: outputs by rows or as whole tensors.

As in TensorFlow Serving (util/json_tensor.cc), floats have six digits if that is exact, NaN and
Infinity are bare words, and strings are written as raw bytes.
"""

import base64
import json
import math

import numpy as np
import tensorflow as tf

from serving.tf_serving.batching import Arrays
from serving.tf_serving.status import invalid, type_name

_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_encode = json.JSONEncoder(ensure_ascii=False).encode
_BYTES_SUFFIX = "_bytes"  # outputs whose names end so are base64


def write_rows(outputs: Arrays) -> str:
  """Returns the response to "instances": one value or object for each row.

  Raises StatusError if outputs have no rows, or not the same number.
  """
  num_rows = None
  for name, array in outputs.items():
    if not array.ndim:
      raise invalid(f"Tensor name: {name} has no shape information ")
    if num_rows not in (None, len(array)):
      raise invalid(
        f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {num_rows}"
      )
    num_rows = len(array)
  columns = {name: _nested(name, array, 1) for name, array in sorted(outputs.items())}
  if len(columns) == 1:
    (rows,) = columns.values()
  else:
    keys = [json.dumps(name) for name in columns]
    rows = [
      "{" + ", ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True)) + "}"
      for values in zip(*columns.values(), strict=True)
    ]
  return '{\n    "predictions": [' + ",\n        ".join(rows) + "\n    ]\n}"


def write_columns(outputs: Arrays) -> str:
  """Returns the response to "inputs": whole tensors."""
  columns = {name: _nested(name, array, 0)[0] for name, array in sorted(outputs.items())}
  if len(columns) == 1:
    (text,) = columns.values()
  else:
    text = (
      "{\n        "
      + ",\n        ".join(f"{json.dumps(name)}: {value}" for name, value in columns.items())
      + "\n    }"
    )
  return '{\n    "outputs": ' + text + "\n}"


def _nested(name: str, array: np.ndarray, num_outer: int) -> list[str]:
  """Returns the JSON of each element of the first `num_outer` dimensions."""
  texts = _texts(name, array)
  for axis in reversed(range(num_outer, array.ndim)):
    size = array.shape[axis]
    texts = [
      "[" + ", ".join(texts[i * size : (i + 1) * size]) + "]"
      for i in range(math.prod(array.shape[:axis]))
    ]
  return texts


def _texts(name: str, array: np.ndarray) -> list[str]:
  """Returns the JSON of each element."""
  values = array.ravel().tolist()
  if array.dtype == object:
    if name.endswith(_BYTES_SUFFIX):
      return [json.dumps({"b64": base64.b64encode(value).decode()}) for value in values]
    return [_encode(value.decode(errors="surrogateescape")) for value in values]
  if array.dtype.kind in "iu":
    return list(map(str, values))
  if array.dtype.kind == "b":
    return ["true" if value else "false" for value in values]
  if array.dtype.kind == "c" or not tf.as_dtype(array.dtype).is_floating:
    raise invalid(
      "Failed to write JSON value for tensor type: "
      f"{type_name(tf.as_dtype(array.dtype).as_datatype_enum)}"
    )
  # Six digits if that is exact, else as many as distinguish it from its neighbours; with a decimal
  # point, or it would be read as an integer.
  kind, digits = (np.float64, 17) if array.dtype == np.float64 else (np.float32, 9)
  short = [f"{value:.6g}" for value in values]
  exact = np.array(short, np.float64).astype(kind) == array.ravel().astype(kind)
  texts = [
    text if same else f"{value:.{digits}g}"
    for value, text, same in zip(values, short, exact, strict=True)
  ]
  return [
    _NOT_FINITE.get(text) or (text if "." in text or "e" in text else f"{text}.0") for text in texts
  ]
