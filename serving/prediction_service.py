"""TensorFlow Serving's gRPC services: PredictionService (Predict, GetModelMetadata) and ModelService.

Codes and messages are TensorFlow Serving's (servables/tensorflow/predict_util.cc, model_servers/server_core.cc and others), so
that a client cannot tell the servers apart.
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
    get_model_metadata_pb2, get_model_status_pb2, model_management_pb2, model_service_pb2_grpc, predict_pb2, prediction_log_pb2,
    prediction_service_pb2_grpc, status_pb2)

from serving.batching import Arrays
from serving.predict_protocol import MODELS_METADATA
from serving.versions import DEFAULT_SIGNATURE, LATENCY_BUCKETS, Models, Servable, Signature, StatusError, invalid, type_name

# Run: outputs of a signature for inputs, before a deadline; `batching.run_alone` or `Batcher.run`.
Run = Callable[[Signature, Arrays, float], Arrays]

_WARM_UP_REQUESTS = "assets.extra/tf_serving_warmup_requests"
_MAX_WARM_UP_REQUESTS = 1000
_MAX_MESSAGE_BYTES = 2000  # of an error: gRPC drops a call whose trailing metadata exceed 8 KB
_MAX_ELEMENTS = 1 << 26  # of one input: a short request must not ask for a huge tensor, filled with its last value
# A response's values stand in these fields, as TensorFlow Serving's do: clients read `.float_val` and the like.
_VALUE_FIELDS = {
    types_pb2.DT_FLOAT: "float_val", types_pb2.DT_DOUBLE: "double_val", types_pb2.DT_STRING: "string_val",
    types_pb2.DT_INT64: "int64_val", types_pb2.DT_BOOL: "bool_val", types_pb2.DT_UINT32: "uint32_val",
    types_pb2.DT_UINT64: "uint64_val", types_pb2.DT_INT32: "int_val", types_pb2.DT_INT16: "int_val", types_pb2.DT_INT8: "int_val",
    types_pb2.DT_UINT16: "int_val", types_pb2.DT_UINT8: "int_val"}

_REQUEST_COUNT = prometheus_client.Counter(
    ":tensorflow:serving:request_count", "The total number of requests.", ["model_name", "status"])
_REQUEST_LATENCY = prometheus_client.Histogram(
    ":tensorflow:serving:request_latency", "Wall time (in microseconds) of a request that succeeded.",
    ["model_name", "API", "entrypoint"], buckets=LATENCY_BUCKETS)


# ============================================================================================================== Predict


class Predictor:
  """What gRPC and REST share of Predict."""

  def __init__(self, models: Models, run: Run):
    self.models = models
    self.run = run

  def predict(self, request: predict_pb2.PredictRequest, deadline: float) -> predict_pb2.PredictResponse:
    """Answers a request.

    Args:
      request: which model, and its inputs.
      deadline: of time.monotonic(); not run after that.

    Returns:
      The outputs asked for, or all; `model_spec` names the version and the signature that answered.

    Raises:
      StatusError: what TensorFlow Serving would answer.
    """
    if not request.HasField("model_spec"):
      raise invalid("Missing ModelSpec")
    with self.models.hold(request.model_spec) as servable:
      name = request.model_spec.signature_name or DEFAULT_SIGNATURE
      signature = servable.signatures.get(name)
      if signature is None:
        raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.')
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
  """A request's inputs as arrays of the signature's dtypes and shapes. Raises StatusError: INVALID_ARGUMENT."""
  wanted, got = signature.inputs.keys(), request.inputs.keys()
  if len(got) > len(wanted) or len(got) < len(wanted) and not signature.defaults:
    raise invalid(
        f"input size does not match signature: {len(got)}!={len(wanted)} len({_set(got)}) != len({_set(wanted)}). "
        f"Sent extra: {_set(got - wanted)}. Missing but required: {_set(wanted - got)}.")
  inputs = {}
  for i, (name, info) in enumerate(signature.inputs.items()):
    proto = request.inputs[name] if name in request.inputs else signature.defaults.get(name)
    if proto is None:
      raise invalid(
          f"Signature input alias: {name}(feed name: {info.name}) not found in request and no default value provided. Inputs "
          f"expected to be in the request {_set(got)}, or default input alias set: {','.join(sorted(signature.defaults))}")
    if proto.dtype != info.dtype and proto.dtype in types_pb2.DataType.values() and proto.dtype:
      raise invalid(f"Expects arg[{i}] to be {type_name(info.dtype)} but {type_name(proto.dtype)} is provided")
    inputs[name] = _array(proto, name)
  if extra := got - wanted:
    used, sent = ",".join(sorted(got - extra)), ",".join(sorted(got))
    raise invalid(f"Inputs contains invalid name. Used request inputs: {used}, request input: {sent}")
  signature.check(inputs)
  return inputs


def _array(proto: tensor_pb2.TensorProto, name: str) -> np.ndarray:
  try:
    if math.prod(dim.size for dim in proto.tensor_shape.dim) > _MAX_ELEMENTS:
      raise ValueError("too many elements")
    return tf.make_ndarray(proto)
  except Exception as error:  # a message can be wrong in more ways than make_ndarray looks for
    raise invalid(f"tensor parsing error: {name}") from error


def _output_names(request: predict_pb2.PredictRequest, signature: Signature) -> list[str]:
  """The outputs to return."""
  names = list(request.output_filter)
  for i, name in enumerate(names):
    if name not in signature.outputs:
      raise invalid(f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                    f"{_set(signature.outputs)}.")
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


# ============================================================================================================== warm-up


def warm_up(servable: Servable, *, repeats: int = 1) -> None:
  """Runs the warm-up requests that a version brings along. Raises StatusError where one fails, as it would in earnest."""
  path = f"{servable.path}/{_WARM_UP_REQUESTS}"
  if not tf.io.gfile.exists(path):
    return
  requests = collections.defaultdict(list)  # by signature
  for i, record in enumerate(
    tf.data.TFRecordDataset(path).take(_MAX_WARM_UP_REQUESTS + 1).as_numpy_iterator()
  ):
    if i == _MAX_WARM_UP_REQUESTS:
      raise invalid(f"Number of warmup records exceeds the maximum ({_MAX_WARM_UP_REQUESTS}) at {path}")
    request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
    name = request.model_spec.signature_name or DEFAULT_SIGNATURE
    if name not in servable.signatures:
      raise StatusError(
          grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found. (a warm-up request in {path})')
    requests[name].append(request)

  def run(name: str) -> None:
    signature = servable.signatures[name]
    for request in requests[name]:
      for _ in range(repeats):
        signature.run(inputs_of(request, signature))

  # Side by side: what takes long is that TensorFlow optimises each signature at its first call, on one core.
  with futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="warm-up") as threads:
    for _ in threads.map(run, requests):
      pass


# ============================================================================================================= services


@contextlib.contextmanager
def recorded(models: Models, model_name: str, api: str, entrypoint: str) -> Iterator[None]:
  """Counts a request, and its time if it succeeds."""
  started, status = time.perf_counter(), grpc.StatusCode.UNKNOWN
  if not models.is_configured(model_name):
    model_name = ""  # or clients could make a metric for each name they invent
  try:
    yield
    status = grpc.StatusCode.OK
    _REQUEST_LATENCY.labels(model_name, api, entrypoint).observe((time.perf_counter() - started) * 1e6)
  except StatusError as error:
    status = error.code
    raise
  finally:
    _REQUEST_COUNT.labels(model_name, status.name).inc()


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
  """Predict and GetModelMetadata; the other methods, for models that take tf.Example, are UNIMPLEMENTED."""

  def __init__(self, predictor: Predictor):
    self._predictor = predictor

  def Predict(self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext) -> predict_pb2.PredictResponse:
    remaining = context.time_remaining()
    deadline = math.inf if remaining is None else time.monotonic() + remaining
    with (
      _aborting(context, self._predictor.models),
      recorded(self._predictor.models, request.model_spec.name, "Predict", "GRPC"),
    ):
      if not context.is_active():
        raise StatusError(grpc.StatusCode.CANCELLED, "the client had left before the request could be run.")
      return self._predictor.predict(request, deadline)

  def GetModelMetadata(
      self, request: get_model_metadata_pb2.GetModelMetadataRequest, context: grpc.ServicerContext
  ) -> get_model_metadata_pb2.GetModelMetadataResponse:
    with _aborting(context, self._predictor.models):
      return model_metadata(self._predictor.models, request)

  def Classify(self, request, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server has no Classify, Regress and MultiInference; use Predict.")

  Regress = MultiInference = Classify


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
  """GetModelStatus and HandleReloadConfigRequest."""

  def __init__(self, models: Models, *, reloaded: Callable[[], None]):
    """Args: models; and what is to be called after the config has changed."""
    self._models = models
    self._reloaded = reloaded

  def GetModelStatus(
      self, request: get_model_status_pb2.GetModelStatusRequest, context: grpc.ServicerContext
  ) -> get_model_status_pb2.GetModelStatusResponse:
    with _aborting(context, self._models):
      return model_status(self._models, request)

  def HandleReloadConfigRequest(
      self, request: model_management_pb2.ReloadConfigRequest, context: grpc.ServicerContext
  ) -> model_management_pb2.ReloadConfigResponse:
    with _aborting(context, self._models):
      try:
        self._models.reload(request.config)
      finally:
        self._reloaded()
      return model_management_pb2.ReloadConfigResponse(status=_status_proto(None))


def model_metadata(
    models: Models, request: get_model_metadata_pb2.GetModelMetadataRequest) -> get_model_metadata_pb2.GetModelMetadataResponse:
  """The signatures of a version. Raises StatusError."""
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
    models: Models, request: get_model_status_pb2.GetModelStatusRequest) -> get_model_status_pb2.GetModelStatusResponse:
  """The states of a model's versions. Raises StatusError."""
  if not request.HasField("model_spec"):
    raise invalid("Missing ModelSpec")
  response = get_model_status_pb2.GetModelStatusResponse()
  for version, (state, error) in models.statuses(request.model_spec).items():
    response.model_version_status.add(version=version, state=state, status=_status_proto(error))
  return response


def _status_proto(error: StatusError | None) -> status_pb2.StatusProto:
  if error is None:
    return status_pb2.StatusProto()
  return status_pb2.StatusProto(error_code=error.code.value[0], error_message=error.message)


@contextlib.contextmanager
def _aborting(context: grpc.ServicerContext, models: Models) -> Iterator[None]:
  """Ends the call with the status of a StatusError; NOT_FOUND comes with the names of the models that are there."""
  try:
    yield
  except StatusError as error:
    if error.code == grpc.StatusCode.NOT_FOUND:
      context.set_trailing_metadata(
        ((MODELS_METADATA, ", ".join(models.names()).encode()[:_MAX_MESSAGE_BYTES]),)
      )
    context.abort(error.code, error.message.encode()[:_MAX_MESSAGE_BYTES].decode(errors="ignore"))
