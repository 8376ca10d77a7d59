"""The gRPC server: TensorFlow Serving's services, health and reflection.

It runs on asyncio, so that calls that do not send their requests occupy no threads, however many
there are. The bytes of a request are parsed in the thread that answers it.
"""

import asyncio
import contextlib
import functools
import importlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from tensorflow_serving.apis import (
  classification_pb2,
  get_model_metadata_pb2,
  get_model_status_pb2,
  inference_pb2,
  model_management_pb2,
  predict_pb2,
  regression_pb2,
)

from realm_tf.storage import artifacts
from serving.tf_serving import prediction_service
from serving.tf_serving.predict_protocol import MODELS_METADATA
from serving.tf_serving.status import StatusError, shortened
from serving.tf_serving.workers import Workers

PREDICTION, MODEL = "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"
_READ_SECS = 60.0  # for a request to arrive
_MAX_WAITING_RELOADS = 8
_MAX_METADATA_BYTES = 2000  # gRPC drops a call whose trailing metadata exceed 8 KB
_GRPC_LOGGER = "grpc._cython.cygrpc"
_LOOK_SECS = 0.05  # between two checks whether calls in progress have ended


class Method(NamedTuple):
  """A method with one request and one response.

  Attributes:
    request: the class of the request message.
    answer: computes the response from a request and a deadline in time.monotonic(), in a thread;
      raises StatusError.
    workers: the threads.
  """

  request: type[Message]
  answer: Callable[[Any, float], Message]
  workers: Workers


class GrpcServer:
  """All services on their ports, and whether the server is stopping."""

  def __init__(
    self,
    predictor: prediction_service.Predictor,
    *,
    num_threads: int,
    max_waiting: int,
    options: Sequence[tuple[str, int | str]],
    reloaded: Callable[[], object],
  ):
    """Creates the server, in the running event loop; see `listen`.

    Args:
      predictor: answers the requests.
      num_threads: requests processed concurrently.
      max_waiting: requests that may wait for a thread; any more are rejected.
      options: options of gRPC.
      reloaded: called, in a thread, after the config has changed.
    """
    self.stopping = False
    self.health = Health()
    self._models = predictor.models
    self._reloaded = reloaded
    self._workers = Workers(num_threads, max_waiting=max_waiting, name="grpc")
    # One at a time, in a separate thread: waiting reloads must not occupy the threads that answer.
    reloads = Workers(1, max_waiting=_MAX_WAITING_RELOADS, name="reload")
    self._server = grpc.aio.server(options=options)
    logging.getLogger(_GRPC_LOGGER).addFilter(_is_news)
    services = {
      PREDICTION: {
        "Predict": Method(
          predict_pb2.PredictRequest, functools.partial(_predict, predictor), self._workers
        ),
        "GetModelMetadata": Method(
          get_model_metadata_pb2.GetModelMetadataRequest, self._metadata, self._workers
        ),
        "Classify": Method(classification_pb2.ClassificationRequest, _missing, self._workers),
        "Regress": Method(regression_pb2.RegressionRequest, _missing, self._workers),
        "MultiInference": Method(inference_pb2.MultiInferenceRequest, _missing, self._workers),
      },
      MODEL: {
        "GetModelStatus": Method(
          get_model_status_pb2.GetModelStatusRequest, self._model_status, self._workers
        ),
        "HandleReloadConfigRequest": Method(
          model_management_pb2.ReloadConfigRequest, self._reload, reloads
        ),
      },
    }
    self._server.add_generic_rpc_handlers(
      [
        *(self._handlers(service, methods) for service, methods in services.items()),
        self.health.handlers(),
        _reflection(services),
      ]
    )

  def listen(self, address: str, credentials: grpc.ServerCredentials | None, *, hint: str) -> int:
    """Binds an address; returns the port. Raises UserError, with a hint at what may be wrong."""
    try:
      if credentials:
        return self._server.add_secure_port(address, credentials)
      return self._server.add_insecure_port(address)
    except RuntimeError as error:
      raise artifacts.UserError(hint.format(address=address, error=error)) from error

  async def start(self) -> None:
    """Starts to serve."""
    await self._server.start()

  async def drain(self) -> None:
    """Rejects new calls, and returns once those in progress are answered."""
    self.stopping = True
    while self._workers.num_tasks:
      await asyncio.sleep(_LOOK_SECS)

  async def stop(self, grace_secs: float) -> None:
    """Ends all calls, including those that watch the health, after at most `grace_secs`."""
    await self._server.stop(grace_secs)

  # -------------------------------------------------------------------------------------- one call

  def _handlers(self, service: str, methods: Mapping[str, Method]) -> grpc.GenericRpcHandler:
    # To gRPC these are streams of requests, of which only the first is read. This way the time that
    # it may take to arrive can be limited.
    return grpc.method_handlers_generic_handler(
      service,
      {
        name: grpc.stream_unary_rpc_method_handler(functools.partial(self._handle, method))
        for name, method in methods.items()
      },
    )

  async def _handle(
    self, method: Method, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
  ) -> bytes:
    try:
      if self.stopping:  # so that clients try elsewhere; gRPC's `stop` would cancel their calls
        raise StatusError(grpc.StatusCode.UNAVAILABLE, "this server is stopping")
      body = await read_message(requests)
      remaining = context.time_remaining()
      timeout_secs = math.inf if remaining is None else remaining
      deadline = time.monotonic() + timeout_secs
      return await method.workers.run(
        functools.partial(_answer, method, body, deadline), timeout_secs
      )
    except StatusError as error:
      if error.code == grpc.StatusCode.NOT_FOUND:
        names = ", ".join(self._models.names()).encode()[:_MAX_METADATA_BYTES]
        context.set_trailing_metadata(((MODELS_METADATA, names),))
      await context.abort(error.code, shortened(error.message))
      raise AssertionError("abort raises") from error

  # --------------------------------------------------------------------------------------- answers

  def _metadata(self, request: Any, deadline: float) -> Message:
    del deadline
    return prediction_service.model_metadata(self._models, request)

  def _model_status(self, request: Any, deadline: float) -> Message:
    del deadline
    return prediction_service.model_status(self._models, request)

  def _reload(self, request: Any, deadline: float) -> Message:
    del deadline
    try:
      self._models.reload(request.config)
    finally:
      self._reloaded()
    return model_management_pb2.ReloadConfigResponse(status=prediction_service.status_proto(None))


def _is_news(record: logging.LogRecord) -> bool:
  # A call that ends while it is answered fails or is cancelled in gRPC, which then logs a traceback
  # if it has not heard yet that the caller has gone. Nobody can do anything about it.
  ended = (grpc.aio.InternalError, asyncio.CancelledError)
  return not (record.exc_info and isinstance(record.exc_info[1], ended))


async def read_message(requests: AsyncIterator[bytes]) -> bytes:
  """Reads the single request of a call. Raises StatusError."""
  try:
    async with asyncio.timeout(_READ_SECS):
      async for request in requests:
        return request
  except TimeoutError:
    raise StatusError(
      grpc.StatusCode.DEADLINE_EXCEEDED, f"no request arrived within {_READ_SECS:g} s."
    ) from None
  raise StatusError(grpc.StatusCode.INTERNAL, "the call ended without a request.")


def _answer(method: Method, body: bytes, deadline: float) -> bytes:
  return method.answer(parsed(method.request, body), deadline).SerializeToString()


def parsed(message: type[Message], body: bytes) -> Any:
  """Parses a message. Raises StatusError, with the same code as gRPC's own parsers."""
  try:
    return message.FromString(body)
  except DecodeError as error:
    raise StatusError(
      grpc.StatusCode.INTERNAL, f"the request is not a {message.DESCRIPTOR.full_name}: {error}"
    ) from error


def _predict(
  predictor: prediction_service.Predictor, request: Any, deadline: float
) -> predict_pb2.PredictResponse:
  with prediction_service.recorded(predictor.models, request.model_spec.name, "Predict", "GRPC"):
    return predictor.predict(request, deadline)


def _missing(request: Any, deadline: float) -> Message:
  del request, deadline
  raise StatusError(
    grpc.StatusCode.UNIMPLEMENTED,
    "this server does not support Classify, Regress and MultiInference; use Predict.",
  )


# =========================================================================================== health


class Health:
  """gRPC's health service.

  The asyncio implementation of the gRPC library forgets all watchers of a service when one leaves.
  """

  def __init__(self) -> None:
    self._statuses: dict[str, int] = {}
    self._changed = asyncio.Event()

  def set(self, status: int) -> None:
    """Sets the status of the server and of each of its services, and notifies all watchers."""
    services = (health.OVERALL_HEALTH, PREDICTION, MODEL)
    statuses = dict.fromkeys(services, status)
    if statuses != self._statuses:
      self._statuses = statuses
      self._changed.set()
      self._changed = asyncio.Event()

  def handlers(self) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(
      health.SERVICE_NAME,
      {
        "Check": grpc.stream_unary_rpc_method_handler(self._check),
        "Watch": grpc.stream_stream_rpc_method_handler(self._watch),
      },
    )

  async def _service(self, requests: AsyncIterator[bytes], context) -> str:
    try:
      body = await read_message(requests)
      return parsed(health_pb2.HealthCheckRequest, body).service
    except StatusError as error:
      await context.abort(error.code, shortened(error.message))
      raise AssertionError("abort raises") from error

  async def _check(self, requests: AsyncIterator[bytes], context) -> bytes:
    service = await self._service(requests, context)
    if service not in self._statuses:
      await context.abort(grpc.StatusCode.NOT_FOUND, shortened(f"no service {service!r}"))
    return health_pb2.HealthCheckResponse(status=self._statuses[service]).SerializeToString()

  async def _watch(self, requests: AsyncIterator[bytes], context) -> AsyncIterator[bytes]:
    service = await self._service(requests, context)
    last = None
    while True:
      changed = self._changed
      status = self._statuses.get(service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
      if status != last:
        yield health_pb2.HealthCheckResponse(status=status).SerializeToString()
      last = status
      await changed.wait()


# ======================================================================================= reflection


def _reflection(services: Mapping[str, Mapping[str, Method]]) -> grpc.GenericRpcHandler:
  for name in ("prediction_service_pb2", "model_service_pb2"):
    # The import registers the file, then fails with current versions of protobuf, in code written
    # for an old one; nothing after that is needed.
    with contextlib.suppress(AttributeError):
      importlib.import_module(f"tensorflow_serving.apis.{name}")
  servicer = reflection.aio.ReflectionServicer(
    (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
  )
  return grpc.method_handlers_generic_handler(
    reflection.SERVICE_NAME,
    {
      "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=_question,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
      )
    },
  )


def _question(body: bytes) -> reflection_pb2.ServerReflectionRequest:
  """Parses a reflection request; a malformed one becomes empty, which is answered as invalid."""
  try:
    return reflection_pb2.ServerReflectionRequest.FromString(body)
  except DecodeError:
    return reflection_pb2.ServerReflectionRequest()
