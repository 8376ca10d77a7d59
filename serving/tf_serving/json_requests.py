"""Parses TensorFlow Serving's JSON of a predict request into arrays.

The accepted format is that of TensorFlow Serving (util/json_tensor.cc): numbers only if they are
converted without loss, `{"b64": ...}` for bytes, NaN and Infinity as bare words, strings as raw
bytes.

Values are converted in blocks of rows, each by a few calls that do not run Python code for every
value. Between blocks other requests get a turn, and the deadline is checked.
"""

import base64
import binascii
import contextlib
import itertools
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from serving.tf_serving.batching import Arrays, too_late
from serving.tf_serving.status import StatusError, invalid, type_name

Infos = Mapping[str, meta_graph_pb2.TensorInfo]

_SHOWN_CHARS = 500  # of a JSON value in an error
_BLOCK_ROWS = 1024  # converted at a time
# Limit of values in a request, counted by commas before parsing: the parser can neither be
# interrupted nor let others run.
_MAX_VALUES = 1 << 23
_MAX_RANK = 63  # NumPy's limit, minus one for the rows
# Matches JSON text up to its end, or up to an escape \uXXXX that is half of a surrogate pair.
_WHOLE_PAIRS = re.compile(
  rb"(?:[^\\]++"
  rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
  rb"|\\u(?![dD][89a-fA-F])"
  rb"|\\[^u])*+",
  re.DOTALL,
)
# An exponent or a sequence of digits with which a number may be too big for float64. Checking every
# number would be slow.
_MAY_BE_TOO_BIG = re.compile(rb"[eE]\+?[0-9]{3}|[0-9]{300}")
_HALF_A_PAIR = "JSON Parse error: The surrogate pair in string is invalid."


# ========================================================================================== request


def parse(body: bytes) -> dict:
  """Parses the JSON object of a request. Raises StatusError: INVALID_ARGUMENT."""
  if not body:
    raise invalid("JSON Parse error: The document is empty")
  if body.count(b",") >= _MAX_VALUES:
    raise invalid(f"JSON Parse error: more than {_MAX_VALUES} values in one request.")
  try:
    # Strings need not be UTF-8: they are bytes of a tensor.
    request = json.loads(
      body.decode(errors="surrogateescape"),
      parse_float=_not_too_big if _MAY_BE_TOO_BIG.search(body) else None,
    )
  except json.JSONDecodeError as error:
    raise invalid(f"JSON Parse error: {error.msg} at offset: {error.pos}") from error
  except RecursionError as error:
    raise invalid("JSON Parse error: lists and objects are nested too deeply.") from error
  except ValueError as error:
    raise invalid(f"JSON Parse error: {error}") from error
  if b"\\ud" in body or b"\\uD" in body:
    whole = _WHOLE_PAIRS.match(body)
    if whole is None or whole.end() < len(body):
      raise invalid(_HALF_A_PAIR)
  if not isinstance(request, dict):
    raise invalid(f"JSON Value: {shown(request)} Is not object")
  return request


def _not_too_big(number: str) -> float:
  value = float(number)
  if math.isinf(value):
    raise ValueError("Number too big to be stored in double.")
  return value


def read_inputs(
  request: Mapping, infos: Infos, *, deadline: float = math.inf, max_rows: int | None = None
) -> tuple[bool, Arrays]:
  """Reads the inputs of a signature from a predict request.

  Args:
    request: the JSON object.
    infos: input name → TensorInfo.
    deadline: in time.monotonic(); checked between blocks of rows.
    max_rows: maximum number of rows in "instances"; None for no limit.

  Returns:
    Whether the inputs were given by rows, and name → array.

  Raises:
    StatusError: INVALID_ARGUMENT; UNIMPLEMENTED for a dtype that JSON cannot represent;
      DEADLINE_EXCEEDED.
  """
  if "instances" in request and "inputs" in request:
    raise invalid(
      f"JSON Value: {shown(request)} Not formatted correctly expecting only one of 'inputs' or "
      "'instances' keys to exist "
    )
  if not infos:
    raise invalid("Failed to get input map for signature: it has no inputs.")
  if "instances" in request:
    rows = request["instances"]
    if not isinstance(rows, list):
      raise invalid(f"JSON Value: {shown(request)} Excepting 'instances' to be an list/array")
    if not rows:
      raise invalid(f"JSON Value: {shown(request)} No values in 'instances' array")
    if max_rows is not None and len(rows) > max_rows:
      raise invalid(
        f"'instances' has {len(rows)} rows; a request may have {max_rows} (--max_request_rows)."
      )
    return True, _from_rows(rows, infos, deadline)
  if "inputs" in request:
    return False, _from_columns(request["inputs"], infos, deadline)
  raise invalid("Missing 'inputs' or 'instances' key")


def _from_rows(rows: list, infos: Infos, deadline: float) -> Arrays:
  named = _is_named(rows[0])
  if not isinstance(rows[0], dict) and len(infos) > 1:
    raise invalid(
      "instances is a plain list, but expecting list of objects as multiple input tensors "
      "required as per tensorinfo_map"
    )
  parts: dict[str, list[np.ndarray]] = {name: [] for name in infos}
  for start, block in _blocks(rows, deadline):
    try:
      columns = _columns_of(block, infos) if named else {next(iter(infos)): block}
      first = rows[0] if named else dict.fromkeys(infos, rows[0])
      for name, column in columns.items():
        parts[name].append(_array_of(column, first[name], infos[name].dtype))
    except (StatusError, KeyError) as error:
      _explain(block, infos, start=start, first_row=rows[0])
      raise invalid(f"Failed to process 'instances' list. Error: {error}") from error
  return {name: np.concatenate(part) for name, part in parts.items()}


def _columns_of(rows: Sequence[dict], infos: Infos) -> dict[str, list]:
  """Returns input name → its values in all rows. Raises KeyError if a row has other keys."""
  names = infos.keys()
  if not all(isinstance(row, dict) and row.keys() == names for row in rows):
    raise KeyError("rows with other keys")
  return {name: [row[name] for row in rows] for name in names}


def _explain(rows: Sequence, infos: Infos, *, start: int, first_row) -> None:
  """Raises the StatusError of the first invalid row, with TensorFlow Serving's message.

  Args:
    rows: some rows of a request.
    infos: input name → TensorInfo.
    start: the number of the first of these rows.
    first_row: the first row of the request, which the others must resemble.
  """
  named = _is_named(first_row)
  shapes: dict[str, list[int]] = {}
  for number, row in itertools.chain([(0, first_row)], enumerate(rows, start)):
    if _is_named(row) != named:
      raise invalid(
        f"Expecting object but got list at item {number} of input list"
        if named
        else f"Expecting value/list but got object at item {number} of input list"
      )
    for name, value in row.items() if named else [(next(iter(infos)), row)]:
      try:
        if name not in infos:
          raise invalid(f"JSON object: does not have named input: {name}")
        shape, flat = _flat(value)
        _checked(flat, infos[name].dtype)
        _check_same(shapes.setdefault(name, shape), shape)
      except StatusError as error:
        key = f"key: {name} " if named else ""
        raise invalid(
          f"Failed to process element: {number} {key}of 'instances' list. Error: {error}"
        ) from error
    if named and row.keys() != infos.keys():
      raise invalid(
        f"Failed to process element: {number} of 'instances' list. JSON object: {shown(row)} keys "
        f"must be equal to: {','.join(infos)}"
      )


def _from_columns(columns, infos: Infos, deadline: float) -> Arrays:
  if not _is_named(columns):
    if len(infos) > 1:
      raise invalid(
        "inputs is a plain value/list, but expecting an object as multiple input tensors required "
        "as per tensorinfo_map"
      )
    columns = {name: columns for name in infos}
  arrays = {}
  for name, info in infos.items():
    if name not in columns:
      raise invalid(f"Missing named input: {name} in 'inputs' object.")
    arrays[name] = _column(columns[name], info.dtype, deadline)
  return arrays


def _column(value, dtype: int, deadline: float) -> np.ndarray:
  """Makes an array from nested lists, or from a single value."""
  if not isinstance(value, list) or not value:
    shape, flat = _flat(value)
    return _array(_checked(flat, dtype), shape, dtype)
  return np.concatenate(
    [_array_of(block, value[0], dtype) for _, block in _blocks(value, deadline)]
  )


def _blocks(rows: Sequence, deadline: float) -> Iterator[tuple[int, Sequence]]:
  """Yields blocks of rows, with the number of the first row. Raises StatusError if too late."""
  for start in range(0, len(rows), _BLOCK_ROWS):
    if time.monotonic() >= deadline:
      raise too_late()
    yield start, rows[start : start + _BLOCK_ROWS]


def _array_of(rows: Sequence, first_row, dtype: int) -> np.ndarray:
  """Makes an array [rows, ...] of rows that have the shape of the first row of the request."""
  shape, flat = _flat([first_row, *rows])
  size = math.prod(shape[1:])
  return _array(_checked(flat[size:], dtype), [len(rows), *shape[1:]], dtype)


def _check_same(wanted: Sequence[int], got: Sequence[int]) -> None:
  if math.prod(wanted) != math.prod(got):
    raise invalid(f"Expecting tensor size: {math.prod(wanted)} but got: {math.prod(got)}")
  if wanted != got:
    raise invalid(f"Expecting shape {_shape(wanted)} but got: {_shape(got)}")


def _flat(value) -> tuple[list[int], list]:
  """Returns the shape of nested lists, and their values in order."""
  shape, first = [], value
  while isinstance(first, list):
    shape.append(len(first))
    if len(shape) > _MAX_RANK + 1:
      raise invalid(f"Lists are nested deeper than {_MAX_RANK}.")
    if not first:
      break
    first = first[0]
  values = [value]
  for level, size in enumerate(shape):
    if set(map(type, values)) != {list} or set(map(len, values)) != {size}:
      raise _ragged(values, level, size, len(shape))
    values = list(itertools.chain.from_iterable(values))
  if list in set(map(type, values)):
    raise invalid(f"Encountered list at unexpected level: {len(shape)} expected < {len(shape)}")
  return shape, values


def _ragged(values: Sequence, level: int, size: int, rank: int) -> StatusError:
  """Returns the error for the first value at a level that is not a list of the expected size."""
  for item in values:
    if not isinstance(item, list):
      return invalid(
        f"JSON Value: {shown(item)} found at incorrect level: {level + 1} in the JSON DOM. "
        f"Expected at level: {rank}"
      )
    if len(item) != size:
      break
  return invalid(
    f"Encountered list at unexpected size: {len(item)} at level: {level} expected size: {size}"
  )


def _checked(values: list, dtype: int) -> list:
  """Returns the values, strings as bytes; raises StatusError unless all are of a dtype."""
  type_ = tf.as_dtype(dtype)
  if dtype == types_pb2.DT_STRING:
    return [_bytes(value) for value in values]
  if type_.is_floating:
    _check_types(values, {int, float}, dtype)
    _check_lossless(values, dtype)
  elif dtype == types_pb2.DT_BOOL:
    _check_types(values, {bool}, dtype)
  elif type_.is_integer and not type_.is_quantized:
    _check_types(values, {int}, dtype)
    limits = np.iinfo(type_.as_numpy_dtype)
    if values and not limits.min <= min(values) <= max(values) <= limits.max:
      raise _type_error(
        next(value for value in values if not limits.min <= value <= limits.max), dtype
      )
  else:
    raise StatusError(
      grpc.StatusCode.UNIMPLEMENTED,
      f"Conversion of JSON Value: {shown(values[:1])} to type: {type_name(dtype)}",
    )
  return values


def _check_lossless(values: list, dtype: int) -> None:
  """Raises StatusError if a number is too large for a floating dtype."""
  largest = float(tf.as_dtype(dtype).max)
  digits = {types_pb2.DT_HALF: 11, types_pb2.DT_BFLOAT16: 8, types_pb2.DT_FLOAT: 24}.get(dtype, 53)

  def is_lossy(value) -> bool:
    if type(value) is int:
      return abs(value) >= 1 << digits
    return largest < abs(value) < math.inf

  with contextlib.suppress(OverflowError):  # an integer too large for any float
    sizes = np.abs(np.array(values, np.float64))
    # The limit for integers is the lower one: no value below it is lossy.
    if not np.any((sizes >= 1 << digits) & (sizes < math.inf)):
      return
  lossy = next((value for value in values if is_lossy(value)), None)
  if lossy is not None:
    raise invalid(
      f"Cannot convert JSON value: {shown(lossy)} to {type_name(dtype)} without loss of precision."
    )


def _check_types(values: list, types: set, dtype: int) -> None:
  if not set(map(type, values)) <= types:
    raise _type_error(next(value for value in values if type(value) not in types), dtype)


def _bytes(value) -> bytes:
  if isinstance(value, str):
    return value.encode(errors="surrogateescape")
  if not isinstance(value, dict):
    raise _type_error(value, types_pb2.DT_STRING)
  if not _is_b64(value):
    raise invalid(f"JSON Value: {shown(value)} not formatted correctly for base64 data")
  text = "".join(value["b64"].split()).rstrip("=")
  try:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
  except (ValueError, binascii.Error) as error:
    raise invalid("Unable to base64 decode") from error


def _is_b64(value) -> bool:
  return isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str)


def _is_named(value) -> bool:
  return isinstance(value, dict) and not _is_b64(value)


def _array(values: list, shape: Sequence[int], dtype: int) -> np.ndarray:
  return np.array(values, tf.as_dtype(dtype).as_numpy_dtype).reshape(shape)


def _type_error(value, dtype: int) -> StatusError:
  kind = {type(None): "Null", dict: "Object", list: "Array", str: "String", bool: str(value)}.get(
    type(value), "Number"
  )
  return invalid(
    f"JSON Value: {shown(value)} Type: {kind} is not of expected type: {type_name(dtype)}"
  )


def shown(value) -> str:
  """Returns the JSON of a value for an error message, shortened."""
  if isinstance(value, str):
    value = value[:_SHOWN_CHARS]
  parts: list[str] = []
  num_chars = 0
  with contextlib.suppress(RecursionError):  # the beginning of such a value is long enough
    for part in json.JSONEncoder().iterencode(value):
      parts.append(part)
      num_chars += len(part)
      if num_chars > _SHOWN_CHARS:
        break
  text = "".join(parts)
  return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _shape(shape: Sequence[int]) -> str:
  return f"[{','.join(map(str, shape))}]"
