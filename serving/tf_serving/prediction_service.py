"""Implements TensorFlow Serving's services, for both gRPC and REST.

The services are PredictionService (Predict, GetModelMetadata) and ModelService.

Codes and messages are those of TensorFlow Serving (servables/tensorflow/predict_util.cc,
model_servers/server_core.cc and others), so that clients need not distinguish the servers.
"""

import collections
import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import numpy as np
import prometheus_client
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow_serving.apis import (
  get_model_metadata_pb2,
  get_model_status_pb2,
  predict_pb2,
  prediction_log_pb2,
  status_pb2,
)

from serving.tf_serving.batching import Arrays
from serving.tf_serving.servables import DEFAULT_SIGNATURE, LATENCY_BUCKETS, Servable, Signature
from serving.tf_serving.status import StatusError, invalid, type_name
from serving.tf_serving.versions import Models

# Computes the outputs of a signature for inputs, before a deadline: `batching.run_alone` or
# `Batcher.run`.
Run = Callable[[Signature, Arrays, float], Arrays]

_WARM_UP_REQUESTS = "assets.extra/tf_serving_warmup_requests"
_MAX_WARM_UP_REQUESTS = 1000
# Limit of the values that a tensor omits because they repeat its last one: a short request must not
# expand to a huge tensor.
_MAX_REPEATED_BYTES = 16 << 20
_STRING_BYTES = 24  # overhead of a string in a tensor
MAX_ROWS = 1 << 16
# The fields that hold the values of a response, as in TensorFlow Serving: clients read `.float_val`
# etc.
_VALUE_FIELDS = {
  types_pb2.DT_FLOAT: "float_val",
  types_pb2.DT_DOUBLE: "double_val",
  types_pb2.DT_STRING: "string_val",
  types_pb2.DT_INT64: "int64_val",
  types_pb2.DT_BOOL: "bool_val",
  types_pb2.DT_UINT32: "uint32_val",
  types_pb2.DT_UINT64: "uint64_val",
  types_pb2.DT_INT32: "int_val",
  types_pb2.DT_INT16: "int_val",
  types_pb2.DT_INT8: "int_val",
  types_pb2.DT_UINT16: "int_val",
  types_pb2.DT_UINT8: "int_val",
}

_REQUEST_COUNT = prometheus_client.Counter(
  ":tensorflow:serving:request_count", "The total number of requests.", ["model_name", "status"]
)
_REQUEST_LATENCY = prometheus_client.Histogram(
  ":tensorflow:serving:request_latency",
  "Wall time (in microseconds) of a request that succeeded.",
  ["model_name", "API", "entrypoint"],
  buckets=LATENCY_BUCKETS,
)


# ========================================================================================== Predict


class Predictor:
  """The part of Predict shared by gRPC and REST."""

  def __init__(self, models: Models, run: Run, *, max_rows: int = MAX_ROWS):
    """Args: the models; the function that runs a signature; the maximum rows of a request."""
    self.models = models
    self.max_rows = max_rows
    self._run = run

  def run(self, signature: Signature, inputs: Arrays, deadline: float) -> Arrays:
    """Checks and runs the inputs of a request. Raises StatusError."""
    signature.check(inputs)
    for name, array in inputs.items():
      if array.ndim and len(array) > self.max_rows:
        raise invalid(too_many_rows(f'input "{name}"', len(array), self.max_rows))
    return self._run(signature, inputs, deadline)

  def predict(
    self, request: predict_pb2.PredictRequest, deadline: float
  ) -> predict_pb2.PredictResponse:
    """Answers a request.

    Args:
      request: names the model, and holds its inputs.
      deadline: in time.monotonic(); the request is not run after that.

    Returns:
      The requested outputs, or all; `model_spec` names the version and the signature that answered.

    Raises:
      StatusError: with the code and message of TensorFlow Serving.
    """
    if not request.HasField("model_spec"):
      raise invalid("Missing ModelSpec")
    with self.models.hold(request.model_spec) as servable:
      name = request.model_spec.signature_name or DEFAULT_SIGNATURE
      signature = servable.signatures.get(name)
      if signature is None:
        raise StatusError(
          grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.'
        )
      inputs = inputs_of(request, signature)
      names = _output_names(request, signature)
      outputs = self.run(signature, inputs, deadline)
      response = predict_pb2.PredictResponse()
      response.model_spec.name = servable.name
      response.model_spec.version.value = servable.version
      response.model_spec.signature_name = name
      for output in names:
        fill_tensor(response.outputs[output], outputs[output], signature.outputs[output].dtype)
      return response


def inputs_of(request: predict_pb2.PredictRequest, signature: Signature) -> Arrays:
  """Returns the inputs of a request as arrays of the signature's dtypes.

  Raises StatusError: INVALID_ARGUMENT.
  """
  wanted, got = signature.inputs.keys(), request.inputs.keys()
  if len(got) > len(wanted) or len(got) < len(wanted) and not signature.defaults:
    raise invalid(
      f"input size does not match signature: {len(got)}!={len(wanted)} len({_set(got)}) != "
      f"len({_set(wanted)}). Sent extra: {_set(got - wanted)}. Missing but required: "
      f"{_set(wanted - got)}."
    )
  inputs = {}
  for i, (name, info) in enumerate(signature.inputs.items()):
    proto = request.inputs[name] if name in request.inputs else signature.defaults.get(name)
    if proto is None:
      raise invalid(
        f"Signature input alias: {name}(feed name: {info.name}) not found in request and no "
        f"default value provided. Inputs expected to be in the request {_set(got)}, or default "
        f"input alias set: {','.join(sorted(signature.defaults))}"
      )
    if proto.dtype != info.dtype and proto.dtype in types_pb2.DataType.values() and proto.dtype:
      raise invalid(
        f"Expects arg[{i}] to be {type_name(info.dtype)} but {type_name(proto.dtype)} is provided"
      )
    inputs[name] = _array(proto, name)
  if extra := got - wanted:
    used, sent = ",".join(sorted(got - extra)), ",".join(sorted(got))
    raise invalid(
      f"Inputs contains invalid name. Used request inputs: {used}, request input: {sent}"
    )
  return inputs


def too_many_rows(what: str, number: int, most: int) -> str:
  return f"{what} has {number} rows; a request may have {most} (--max_request_rows)."


def _array(proto: tensor_pb2.TensorProto, name: str) -> np.ndarray:
  try:
    _check_repeated(proto)
    return tf.make_ndarray(proto)
  except Exception as error:  # a message can be wrong in more ways than make_ndarray checks
    raise invalid(f"tensor parsing error: {name}") from error


def _check_repeated(proto: tensor_pb2.TensorProto) -> None:
  """Raises ValueError if the shape of a tensor is far larger than its content."""
  wanted = math.prod(dim.size for dim in proto.tensor_shape.dim)
  strings = proto.dtype == types_pb2.DT_STRING
  if proto.tensor_content:  # holds all values, which TensorFlow checks
    return
  values = max((len(value) for field, value in proto.ListFields() if field.is_repeated), default=0)
  size = tf.as_dtype(proto.dtype).size
  if strings:
    size = _STRING_BYTES + (len(proto.string_val[-1]) if proto.string_val else 0)
  if (wanted - values) * size > _MAX_REPEATED_BYTES:
    raise ValueError("too many values are omitted")


def _output_names(request: predict_pb2.PredictRequest, signature: Signature) -> list[str]:
  """Returns the names of the outputs to return."""
  names = list(request.output_filter)
  for i, name in enumerate(names):
    if name not in signature.outputs:
      raise invalid(
        f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
        f"{_set(signature.outputs)}."
      )
    if name in names[:i]:
      raise invalid(f"duplicate output tensor alias: {name}")
  return names or list(signature.outputs)


def fill_tensor(proto: tensor_pb2.TensorProto, array: np.ndarray, dtype: int) -> None:
  """Writes an array into an empty TensorProto."""
  field = _VALUE_FIELDS.get(dtype)
  if field is None:
    return proto.CopyFrom(tf.make_tensor_proto(array, dtype))
  proto.dtype = dtype
  proto.tensor_shape.SetInParent()  # a scalar has a shape too
  for size in array.shape:
    proto.tensor_shape.dim.add(size=size)
  getattr(proto, field).extend(array.ravel().tolist())


def _set(names) -> str:
  return f"{{{','.join(sorted(names))}}}"


# ========================================================================================== warm-up


def warm_up(servable: Servable, *, repeats: int = 1) -> None:
  """Runs the warm-up requests that come with a version.

  Raises StatusError if one fails.
  """
  path = f"{servable.path}/{_WARM_UP_REQUESTS}"
  if not tf.io.gfile.exists(path):
    return
  requests = collections.defaultdict(list)  # by signature
  for i, record in enumerate(
    tf.data.TFRecordDataset(path).take(_MAX_WARM_UP_REQUESTS + 1).as_numpy_iterator()
  ):
    if i == _MAX_WARM_UP_REQUESTS:
      raise invalid(
        f"Number of warmup records exceeds the maximum ({_MAX_WARM_UP_REQUESTS}) at {path}"
      )
    request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
    name = request.model_spec.signature_name or DEFAULT_SIGNATURE
    if name not in servable.signatures:
      raise StatusError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f'Serving signature key "{name}" not found. (a warm-up request in {path})',
      )
    requests[name].append(request)

  def run(name: str) -> None:
    signature = servable.signatures[name]
    for request in requests[name]:
      for _ in range(repeats):
        inputs = inputs_of(request, signature)
        signature.check(inputs)
        signature.run(inputs)

  # In parallel: most of the time goes to TensorFlow optimising each signature at its first call, on
  # one core.
  with futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="warm-up") as threads:
    for _ in threads.map(run, requests):
      pass


# ========================================================================================= services


@contextlib.contextmanager
def recorded(models: Models, model_name: str, api: str, entrypoint: str) -> Iterator[None]:
  """Counts a request, and records its time if it succeeds."""
  started, status = time.perf_counter(), grpc.StatusCode.UNKNOWN
  if not models.is_configured(model_name):
    model_name = ""  # otherwise clients could create metrics with arbitrary names
  try:
    yield
    status = grpc.StatusCode.OK
    _REQUEST_LATENCY.labels(model_name, api, entrypoint).observe(
      (time.perf_counter() - started) * 1e6
    )
  except StatusError as error:
    status = error.code
    raise
  finally:
    _REQUEST_COUNT.labels(model_name, status.name).inc()


def model_metadata(
  models: Models, request: get_model_metadata_pb2.GetModelMetadataRequest
) -> get_model_metadata_pb2.GetModelMetadataResponse:
  """Returns the signatures of a version. Raises StatusError."""
  if not request.HasField("model_spec"):
    raise invalid("Missing ModelSpec")
  if not request.metadata_field:
    raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
  for field in request.metadata_field:
    if field != "signature_def":
      raise invalid(f"Metadata field {field} is not supported")
  with models.hold(request.model_spec) as servable:
    response = get_model_metadata_pb2.GetModelMetadataResponse()
    response.model_spec.name = servable.name
    response.model_spec.version.value = servable.version
    signatures = get_model_metadata_pb2.SignatureDefMap()
    for name, signature in servable.signature_defs.items():
      signatures.signature_def[name].CopyFrom(signature)
    response.metadata["signature_def"].Pack(signatures)
    return response


def model_status(
  models: Models, request: get_model_status_pb2.GetModelStatusRequest
) -> get_model_status_pb2.GetModelStatusResponse:
  """Returns the states of a model's versions. Raises StatusError."""
  if not request.HasField("model_spec"):
    raise invalid("Missing ModelSpec")
  response = get_model_status_pb2.GetModelStatusResponse()
  for version, (state, error) in models.statuses(request.model_spec).items():
    response.model_version_status.add(version=version, state=state, status=status_proto(error))
  return response


def status_proto(error: StatusError | None) -> status_pb2.StatusProto:
  if error is None:
    return status_pb2.StatusProto()
  return status_pb2.StatusProto(error_code=error.code.value[0], error_message=error.message)
