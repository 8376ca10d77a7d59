"""TensorFlow Serving's REST API: predict with "instances" (rows) or "inputs" (columns), status, metadata, metrics.

What is accepted and what comes out is as in TensorFlow Serving (util/json_tensor.cc, model_servers/http_rest_api_util.cc):
numbers only where they lose nothing, `{"b64": ...}` for bytes, NaN and Infinity as bare words, strings as the bytes they are.
"""

import asyncio
import base64
import binascii
import contextlib
import itertools
import json
import math
import re
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent import futures

import grpc
import numpy as np
import prometheus_client
import tensorflow as tf
from aiohttp import web
from google.protobuf import json_format
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2

from serving.batching import Arrays
from serving.prediction_service import Predictor, model_metadata, model_status, recorded
from serving.versions import DEFAULT_SIGNATURE, StatusError, invalid, type_name

_MODEL = r"(?i)/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
_POST = re.compile(_MODEL + r":(?P<verb>classify|regress|predict)")
_GET = re.compile(_MODEL + r"(?P<verb>/metadata)?")
_HTTP_STATUS = {
    grpc.StatusCode.CANCELLED: 499, grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.ALREADY_EXISTS: 409, grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429, grpc.StatusCode.FAILED_PRECONDITION: 400, grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400, grpc.StatusCode.UNIMPLEMENTED: 501, grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.UNAUTHENTICATED: 401}  # any other: 500
_CORS_HEADERS = {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "POST, GET",
                 "Access-Control-Allow-Headers": "Content-Type"}
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_BYTES_SUFFIX = "_bytes"  # outputs so named are base64
_SHOWN_CHARS = 500  # of a JSON value in an error

Infos = Mapping[str, meta_graph_pb2.TensorInfo]


# ================================================================================================================= HTTP


class RestApi:
  """The HTTP server's handler; requests run in threads of its own."""

  def __init__(
    self,
    predictor: Predictor,
    *,
    timeout_secs: float,
    num_threads: int,
    max_waiting: int,
    metrics_path: str | None,
    cors: bool = False,
  ):
    """Makes it; see `application`.

    Args:
      predictor: answers.
      timeout_secs: for one request; 0: any time.
      num_threads: requests in work at a time.
      max_waiting: requests that may wait for a thread; beyond, they are refused.
      metrics_path: where metrics are shown; None: nowhere.
      cors: whether a browser may use the answers in pages of other origins.
    """
    self._predictor = predictor
    self._timeout_secs = timeout_secs or math.inf
    self._threads = futures.ThreadPoolExecutor(num_threads, thread_name_prefix="rest")
    self._places = threading.Semaphore(num_threads + max_waiting)
    self._metrics_path = metrics_path
    self._headers = _CORS_HEADERS if cors else {}

  def application(self, *, max_request_bytes: int) -> web.Application:
    application = web.Application(client_max_size=max_request_bytes)
    application.router.add_route("*", "/{path:.*}", self._handle)
    return application

  async def _handle(self, request: web.Request) -> web.Response:
    path = request.rel_url.raw_path
    if path == self._metrics_path:
      return web.Response(body=metrics_page(), headers={"Content-Type": "text/plain"})
    if not re.match("(?i)/v1/", path):
      return web.Response(status=404, text=f"{path} was not found here; see /v1/models/NAME.\n")
    if request.method == "OPTIONS":  # a browser's question, before it sends the request itself
      return web.Response(
        status=200 if re.match("https?://", request.headers.get("Origin", "")) else 400,
        headers=self._headers,
      )
    status = 200
    try:
      text = await self._answer(request.method, path, await request.read())
    except web.HTTPRequestEntityTooLarge as error:
      status, text = error.status, _error_text(f"the request is too large: {error.text}")
    except StatusError as error:
      status, text = _HTTP_STATUS.get(error.code, 500), _error_text(error.message)
    # Strings that are not UTF-8 go out as the bytes they are.
    return web.Response(
      status=status,
      body=text.encode(errors="surrogateescape"),
      headers={"Content-Type": "application/json", **self._headers},
    )

  async def _answer(self, method: str, path: str, body: bytes) -> str:
    pattern = {"POST": _POST, "GET": _GET}.get(method)
    match = pattern and pattern.fullmatch(path)
    if not match:
      if method == "GET" and path.rstrip("/").lower() == "/v1/models":
        raise invalid("Missing model name in request.")
      raise invalid(f"Malformed request: {method} {path}")
    spec = _model_spec(match)
    if method == "GET":
      return self._metadata(spec) if match["verb"] else self._status(spec)
    with recorded(self._predictor.models, spec.name, match["verb"].lower(), "REST"):
      if match["verb"].lower() != "predict":
        raise StatusError(grpc.StatusCode.UNIMPLEMENTED, f"this server has no {match['verb']}; use predict.")
      return await self._predict_in_thread(spec, body)

  async def _predict_in_thread(self, spec: model_pb2.ModelSpec, body: bytes) -> str:
    if not self._places.acquire(blocking=False):
      raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests are waiting; try again later.")
    future = self._threads.submit(self._predict, spec, body, time.monotonic() + self._timeout_secs)
    future.add_done_callback(lambda _: self._places.release())
    try:
      return await asyncio.wait_for(asyncio.wrap_future(future), self._timeout_secs if self._timeout_secs < math.inf else None)
    except TimeoutError:
      raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {self._timeout_secs:g} s.") from None

  def _predict(self, spec: model_pb2.ModelSpec, body: bytes, deadline: float) -> str:
    request = parse(body)
    name = request.get("signature_name", "")
    if not isinstance(name, str):
      raise invalid(f"JSON Value: {_shown(request)} not formatted correctly. 'signature_name' key must be a string value.")
    name = name or DEFAULT_SIGNATURE
    with self._predictor.models.hold(spec) as servable:
      signature = servable.signatures.get(name)
      if signature is None:
        raise invalid(f'Serving signature name: "{name}" not found in signature def')
      by_row, inputs = read_inputs(request, signature.inputs)
      signature.check(inputs)
      outputs = self._predictor.run(signature, inputs, deadline)
      return write_rows(outputs) if by_row else write_columns(outputs)

  def _status(self, spec: model_pb2.ModelSpec) -> str:
    self._predictor.models.check_started(
      spec.name
    )  # probes take 200 for ready: TensorFlow Serving listens only then
    response = model_status(self._predictor.models, get_model_status_pb2.GetModelStatusRequest(model_spec=spec))
    return json.dumps(_dict(response), indent=1)

  def _metadata(self, spec: model_pb2.ModelSpec) -> str:
    response = model_metadata(
        self._predictor.models, get_model_metadata_pb2.GetModelMetadataRequest(model_spec=spec, metadata_field=["signature_def"]))
    signatures = get_model_metadata_pb2.SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    return json.dumps({"model_spec": _dict(response.model_spec), "metadata": {"signature_def": _dict(signatures)}}, indent=1)


def metrics_page() -> bytes:
  """All metrics in Prometheus' text format."""
  # The library insists on the suffix; TensorFlow Serving has none.
  return prometheus_client.generate_latest().replace(b":request_count_total", b":request_count")


def _model_spec(match: re.Match) -> model_pb2.ModelSpec:
  spec = model_pb2.ModelSpec(name=urllib.parse.unquote(match["name"]))
  if match["version"]:
    if int(match["version"]) >= 1 << 63:
      raise invalid(f"Failed to convert version: {match['version']} to numeric.")
    spec.version.value = int(match["version"])
  if match["label"]:
    spec.version_label = urllib.parse.unquote(match["label"])
  return spec


def _dict(message) -> dict:
  return json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _error_text(message: str) -> str:
  return json.dumps({"error": message}, indent=4, ensure_ascii=False)


# ======================================================================================================== JSON → arrays


def parse(body: bytes) -> dict:
  """The request's JSON object. Raises StatusError: INVALID_ARGUMENT."""
  if not body:
    raise invalid("JSON Parse error: The document is empty")
  try:
    # A string need not be UTF-8: it is a tensor's bytes.
    request = json.loads(body.decode(errors="surrogateescape"))
  except json.JSONDecodeError as error:
    raise invalid(f"JSON Parse error: {error.msg} at offset: {error.pos}") from error
  except (ValueError, RecursionError) as error:
    raise invalid(f"JSON Parse error: {error}") from error
  if not isinstance(request, dict):
    raise invalid(f"JSON Value: {_shown(request)} Is not object")
  return request


def read_inputs(request: Mapping, infos: Infos) -> tuple[bool, Arrays]:
  """A signature's inputs from a predict request.

  Args:
    request: the JSON object.
    infos: input name → TensorInfo.

  Returns:
    Whether they came by rows, and name → array.

  Raises:
    StatusError: INVALID_ARGUMENT; UNIMPLEMENTED for a dtype that JSON has no values for.
  """
  if "instances" in request and "inputs" in request:
    raise invalid(f"JSON Value: {_shown(request)} Not formatted correctly expecting only one of 'inputs' or 'instances' keys to "
                  "exist ")
  if "instances" in request:
    if not isinstance(request["instances"], list):
      raise invalid(f"JSON Value: {_shown(request)} Excepting 'instances' to be an list/array")
    if not request["instances"]:
      raise invalid(f"JSON Value: {_shown(request)} No values in 'instances' array")
    return True, _from_rows(request["instances"], infos)
  if "inputs" in request:
    return False, _from_columns(request["inputs"], infos)
  raise invalid("Missing 'inputs' or 'instances' key")


def _from_rows(rows: Sequence, infos: Infos) -> Arrays:
  named = _is_named(rows[0])
  if not isinstance(rows[0], dict) and len(infos) > 1:
    raise invalid("instances is a plain list, but expecting list of objects as multiple input tensors required as per "
                  "tensorinfo_map")
  shapes, values = {}, {name: [] for name in infos}
  for i, row in enumerate(rows):
    if _is_named(row) != named:
      raise invalid(f"Expecting object but got list at item {i} of input list" if named else
                    f"Expecting value/list but got object at item {i} of input list")
    for name, value in row.items() if named else [(next(iter(infos)), row)]:
      try:
        if name not in infos:
          raise invalid(f"JSON object: does not have named input: {name}")
        shape, flat = _flat(value, infos[name].dtype)
        _check_same(shapes.setdefault(name, shape), shape)
      except StatusError as error:
        key = f"key: {name} " if named else ""
        raise invalid(f"Failed to process element: {i} {key}of 'instances' list. Error: {error}") from error
      values[name] += flat
    if named and row.keys() != infos.keys():
      raise invalid(f"Failed to process element: {i} of 'instances' list. JSON object: {_shown(row)} keys must be equal to: "
                    f"{','.join(infos)}")
  return {name: _array(values[name], [len(rows), *shapes[name]], info.dtype) for name, info in infos.items()}


def _from_columns(columns, infos: Infos) -> Arrays:
  if not _is_named(columns):
    if len(infos) > 1:
      raise invalid("inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                    "tensorinfo_map")
    columns = {name: columns for name in infos}
  arrays = {}
  for name, info in infos.items():
    if name not in columns:
      raise invalid(f"Missing named input: {name} in 'inputs' object.")
    shape, flat = _flat(columns[name], info.dtype)
    arrays[name] = _array(flat, shape, info.dtype)
  return arrays


def _check_same(wanted: Sequence[int], got: Sequence[int]) -> None:
  if math.prod(wanted) != math.prod(got):
    raise invalid(f"Expecting tensor size: {math.prod(wanted)} but got: {math.prod(got)}")
  if wanted != got:
    raise invalid(f"Expecting shape {_shape(wanted)} but got: {_shape(got)}")


def _flat(value, dtype: int) -> tuple[list[int], list]:
  """The shape of nested lists, and their values in order, right for `dtype`."""
  shape, first = [], value
  while isinstance(first, list):
    shape.append(len(first))
    if not first:
      break
    first = first[0]
  values = [value]
  for level, size in enumerate(shape):
    for item in values:
      if not isinstance(item, list):
        raise invalid(f"JSON Value: {_shown(item)} found at incorrect level: {level + 1} in the JSON DOM. Expected at level: "
                      f"{len(shape)}")
      if len(item) != size:
        raise invalid(f"Encountered list at unexpected size: {len(item)} at level: {level} expected size: {size}")
    values = list(itertools.chain.from_iterable(values))
  if any(isinstance(item, list) for item in values):
    raise invalid(f"Encountered list at unexpected level: {len(shape)} expected < {len(shape)}")
  return shape, _checked(values, dtype)


def _checked(values: list, dtype: int) -> list:
  """The values if all are of a dtype, strings as bytes."""
  if dtype == types_pb2.DT_STRING:
    return [_bytes(value) for value in values]
  numpy_type = tf.as_dtype(dtype).as_numpy_dtype
  if tf.as_dtype(dtype).is_floating:
    _check_types(values, {int, float}, dtype)
    largest = float(tf.as_dtype(dtype).max)
    digits = {types_pb2.DT_HALF: 11, types_pb2.DT_BFLOAT16: 8, types_pb2.DT_FLOAT: 24}.get(dtype, 53)
    for value in values:
      if abs(value) >= 1 << digits if type(value) is int else largest < abs(value) < math.inf:
        raise invalid(f"Cannot convert JSON value: {_shown(value)} to {type_name(dtype)} without loss of precision.")
  elif dtype == types_pb2.DT_BOOL:
    _check_types(values, {bool}, dtype)
  elif tf.as_dtype(dtype).is_integer and not tf.as_dtype(dtype).is_quantized:
    _check_types(values, {int}, dtype)
    limits = np.iinfo(numpy_type)
    for value in values:
      if not limits.min <= value <= limits.max:
        raise _type_error(value, dtype)
  else:
    raise StatusError(
        grpc.StatusCode.UNIMPLEMENTED, f"Conversion of JSON Value: {_shown(values[:1])} to type: {type_name(dtype)}")
  return values


def _check_types(values: list, types: set, dtype: int) -> None:
  if not set(map(type, values)) <= types:
    raise _type_error(next(value for value in values if type(value) not in types), dtype)


def _bytes(value) -> bytes:
  if isinstance(value, str):
    with contextlib.suppress(UnicodeEncodeError):
      return value.encode(errors="surrogateescape")
    raise invalid("JSON Parse error: The surrogate pair in string is invalid.")
  if not isinstance(value, dict):
    raise _type_error(value, types_pb2.DT_STRING)
  if not _is_b64(value):
    raise invalid(f"JSON Value: {_shown(value)} not formatted correctly for base64 data")
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
  kind = {type(None): "Null", dict: "Object", list: "Array", str: "String", bool: str(value)}.get(type(value), "Number")
  return invalid(f"JSON Value: {_shown(value)} Type: {kind} is not of expected type: {type_name(dtype)}")


def _shown(value) -> str:
  text = json.dumps(value)
  return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _shape(shape: Sequence[int]) -> str:
  return f"[{','.join(map(str, shape))}]"


# ======================================================================================================== arrays → JSON


def write_rows(outputs: Arrays) -> str:
  """The response to "instances": one value or object for each row. Raises StatusError where outputs have no such rows."""
  num_rows = None
  for name, array in outputs.items():
    if not array.ndim:
      raise invalid(f"Tensor name: {name} has no shape information ")
    if num_rows not in (None, len(array)):
      raise invalid(f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {num_rows}")
    num_rows = len(array)
  columns = {name: _nested(name, array, 1) for name, array in sorted(outputs.items())}
  if len(columns) == 1:
    (rows,) = columns.values()
  else:
    keys = [json.dumps(name) for name in columns]
    rows = ["{" + ", ".join(f"{key}: {value}" for key, value in zip(keys, values)) + "}" for values in zip(*columns.values())]
  return '{\n    "predictions": [' + ",\n        ".join(rows) + "\n    ]\n}"


def write_columns(outputs: Arrays) -> str:
  """The response to "inputs": whole tensors."""
  columns = {name: _nested(name, array, 0)[0] for name, array in sorted(outputs.items())}
  if len(columns) == 1:
    (text,) = columns.values()
  else:
    text = "{\n        " + ",\n        ".join(f"{json.dumps(name)}: {value}" for name, value in columns.items()) + "\n    }"
  return '{\n    "outputs": ' + text + "\n}"


def _nested(name: str, array: np.ndarray, num_outer: int) -> list[str]:
  """The JSON of each element of the first `num_outer` dimensions."""
  texts = _texts(name, array)
  for axis in reversed(range(num_outer, array.ndim)):
    size = array.shape[axis]
    texts = ["[" + ", ".join(texts[i * size:(i + 1) * size]) + "]" for i in range(math.prod(array.shape[:axis]))]
  return texts


def _texts(name: str, array: np.ndarray) -> list[str]:
  """The JSON of each element."""
  values = array.ravel().tolist()
  if array.dtype == object:
    if name.endswith(_BYTES_SUFFIX):
      return [json.dumps({"b64": base64.b64encode(value).decode()}) for value in values]
    return [json.dumps(value.decode(errors="surrogateescape"), ensure_ascii=False) for value in values]
  if array.dtype.kind in "iub":
    return [json.dumps(value) for value in values]
  if array.dtype.kind == "c" or not tf.as_dtype(array.dtype).is_floating:
    raise invalid(f"Failed to write JSON value for tensor type: {type_name(tf.as_dtype(array.dtype).as_datatype_enum)}")
  # Six digits where they are enough, else all that tell it from its neighbours; a point, or it would be read as an integer.
  kind, digits = (np.float64, 17) if array.dtype == np.float64 else (np.float32, 9)
  short = [f"{value:.6g}" for value in values]
  exact = np.array(short, np.float64).astype(kind) == array.ravel().astype(kind)
  texts = [text if same else f"{value:.{digits}g}" for value, text, same in zip(values, short, exact)]
  return [_NOT_FINITE.get(text) or (text if "." in text or "e" in text else f"{text}.0") for text in texts]
