"""Serves SavedModels over TensorFlow Serving's gRPC and REST, where there is no TensorFlow Serving binary.

    python -m serving.model_server --model_name=realm --model_base_path=M --port=8500 --rest_api_port=8501

M/<version>/ are SavedModels; a new one is loaded, warmed up and takes over while requests go on. Flags and config files are those
of tensorflow_model_server, and a client cannot tell the two apart. --host is the one difference to mind: this server listens on
loopback only, unless told otherwise. Beside TensorFlow Serving's services there are gRPC health and reflection. SIGTERM lets the
requests in flight finish.
"""

import asyncio
import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent import futures

import grpc
import prometheus_client
import tensorflow as tf
from absl import app, flags, logging
from aiohttp import web
from google.protobuf import text_format
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc
from tensorflow_serving.config import model_server_config_pb2

from realm_tf import artifacts
from serving import batching, predict_protocol, prediction_service, rest_api, versions

SERVICES = ("tensorflow.serving.PredictionService", "tensorflow.serving.ModelService")
_DRAIN_SECS = 60  # longest wait for requests in flight at the end
_LAST_SECS = 1  # for answers to reach their clients
_HEALTH_SECS = 0.5  # between two looks at whether all models are available

_CONFIG_MESSAGES = predict_protocol.message_classes({  # that tensorflow-serving-api leaves out
    "Integer": {"value": (1, "int64")}, "Text": {"value": (1, "string")},
    "BatchingParameters": {
        "max_batch_size": (1, "Integer"), "batch_timeout_micros": (2, "Integer"), "max_enqueued_batches": (3, "Integer"),
        "num_batch_threads": (4, "Integer"), "thread_pool_name": (5, "Text"), "allowed_batch_sizes": (6, "int64[]"),
        "pad_variable_length_inputs": (7, "bool")},
    "PrometheusConfig": {"enable": (1, "bool"), "path": (2, "string")},
    "MonitoringConfig": {"prometheus_config": (1, "PrometheusConfig")},
})


# ================================================================================================================ config


def read_config(path: str, message):
  """Fills a message from a text proto file. Raises UserError."""
  try:
    return text_format.Parse(artifacts.read_text(path), message)
  except (text_format.ParseError, tf.errors.OpError, UnicodeDecodeError) as error:
    raise artifacts.UserError(f"{path!r} is no text of {message.DESCRIPTOR.full_name}: {error}") from error


def batching_parameters(path: str) -> batching.Parameters:
  """--batching_parameters_file; what it leaves out keeps TensorFlow Serving's default."""
  if not path:
    return batching.Parameters()
  proto = read_config(path, _CONFIG_MESSAGES["BatchingParameters"]())
  if proto.pad_variable_length_inputs:
    raise artifacts.UserError(
        f"{path!r}: pad_variable_length_inputs is not supported; leave it out: inputs of other shapes run in other batches.")
  values = {"allowed_sizes": tuple(proto.allowed_batch_sizes)}
  for field, name in (("max_batch_size", "max_batch_size"), ("max_enqueued_batches", "max_enqueued_batches"),
                      ("num_batch_threads", "num_threads")):
    if proto.HasField(field):
      values[name] = getattr(proto, field).value
  if proto.HasField("batch_timeout_micros"):
    values["timeout_secs"] = proto.batch_timeout_micros.value / 1e6
  return batching.Parameters(**values)


def model_config(args) -> model_server_config_pb2.ModelServerConfig:
  """The models to serve: --model_config_file, or the one model of --model_base_path."""
  if args.model_config_file:
    return read_config(args.model_config_file, model_server_config_pb2.ModelServerConfig())
  if not args.model_base_path:
    raise artifacts.UserError("give --model_base_path (a folder that holds 1/, 2/, ...) or --model_config_file.")
  config = model_server_config_pb2.ModelServerConfig()
  config.model_config_list.config.add(name=args.model_name, base_path=args.model_base_path, model_platform="tensorflow")
  return config


def metrics_path(path: str) -> str | None:
  """Where metrics are shown; None: nowhere."""
  config = _CONFIG_MESSAGES["PrometheusConfig"]()
  config.enable = True  # without a file too: a scraper finds them without being told
  if path:
    config = read_config(path, _CONFIG_MESSAGES["MonitoringConfig"]()).prometheus_config
  return (config.path or "/monitoring/prometheus/metrics") if config.enable else None


# ================================================================================================================ server


class _Threads(futures.ThreadPoolExecutor):
  """Threads that know how many tasks they have, waiting ones included."""

  num_tasks = 0
  _lock = threading.Lock()

  def submit(self, *args, **kwargs) -> futures.Future:
    self._add(1)
    future = super().submit(*args, **kwargs)
    future.add_done_callback(lambda _: self._add(-1))
    return future

  def _add(self, number: int) -> None:
    with self._lock:
      self.num_tasks += number


class _RefuseWhenStopping(grpc.ServerInterceptor):
  """Turns new calls away with UNAVAILABLE, which clients try elsewhere; gRPC's own `stop` would cancel them."""

  stopping = False

  def intercept_service(self, continuation, handler_call_details):
    handler = continuation(handler_call_details)
    if self.stopping and handler is not None and handler.unary_unary:
      return grpc.unary_unary_rpc_method_handler(
          lambda request, context: context.abort(grpc.StatusCode.UNAVAILABLE, "this server is stopping"))
    return handler


class Server:
  """All services on their ports. `run` blocks until SIGTERM or SIGINT."""

  def __init__(self, args):
    """Reads the configs and takes the ports. Raises UserError."""
    self._args = args
    self._config = model_config(args)
    if args.batching_parameters_file and not args.enable_batching:
      raise artifacts.UserError("--batching_parameters_file is set without --enable_batching.")
    self._batcher = batching.Batcher(batching_parameters(args.batching_parameters_file)) if args.enable_batching else None
    self._models = versions.Models(warm_up=prediction_service.warm_up if args.enable_model_warmup else None,
                                   labels_for_unavailable=args.allow_version_labels_for_unavailable_models)
    predictor = prediction_service.Predictor(self._models, self._batcher.run if self._batcher else batching.run_alone)
    self._health = health.HealthServicer()
    # Or a server busy enough would seem dead. (Functions carry the attribute; it is how gRPC is told of another pool.)
    health.HealthServicer.Check.experimental_thread_pool = futures.ThreadPoolExecutor(1, thread_name_prefix="health")
    self._status = None
    self._grpc = self._grpc_server(predictor)
    self._rest = rest_api.RestApi(
        predictor, timeout_secs=args.rest_api_timeout_in_ms / 1000, num_threads=args.grpc_max_threads,
        max_waiting=args.max_waiting_requests, metrics_path=metrics_path(args.monitoring_config_file))
    self._rest_socket = self._bind_rest() if args.rest_api_port else None

  def run(self) -> None:
    """Loads the models, then serves. Raises StatusError where the config cannot be met."""
    gc.freeze()  # so that collecting an unloaded model need not walk through all that was imported
    self._models.start(self._config, poll_secs=self._args.file_system_poll_wait_seconds)
    asyncio.run(self._serve())
    self._models.stop()
    if self._batcher:
      self._batcher.stop()

  async def _serve(self) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
      asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(self._rest.application(max_request_bytes=self._args.max_request_bytes), access_log=None,
                           shutdown_timeout=_DRAIN_SECS)
    await runner.setup()
    if self._rest_socket:
      await web.SockSite(runner, self._rest_socket).start()
      logging.info("Exporting HTTP/REST API at:%s ...", _address(self._args.host, self._rest_socket.getsockname()[1]))
    self._set_health()
    self._grpc.start()
    logging.info("Running gRPC ModelServer at %s ...", _address(self._args.host, self.port))
    tasks = [asyncio.create_task(self._watch_health()), asyncio.create_task(self._watch_config())]
    await stop.wait()
    logging.info("stopping: requests in flight may finish within %d s", _DRAIN_SECS)
    for task in tasks:
      task.cancel()
    deadline = time.monotonic() + _DRAIN_SECS
    self._refuse.stopping = True
    self._health.enter_graceful_shutdown()
    await runner.cleanup()
    while self._grpc_threads.num_tasks and time.monotonic() < deadline:
      await asyncio.sleep(0.05)
    await asyncio.to_thread(self._grpc.stop(_LAST_SECS).wait)  # not longer: clients that watch the health hold the server

  async def _watch_health(self) -> None:
    while True:
      await asyncio.sleep(_HEALTH_SECS)
      self._set_health()

  async def _watch_config(self) -> None:
    """Reloads --model_config_file when it has changed."""
    path, wait_secs = self._args.model_config_file, self._args.model_config_file_poll_wait_seconds
    while path and wait_secs:
      await asyncio.sleep(wait_secs)
      try:
        config = model_config(self._args)
        if config != self._config:
          self._config = config
          await asyncio.to_thread(self._models.reload, config)
          logging.info("%s has changed and was reloaded", path)
      except (artifacts.UserError, versions.StatusError) as error:
        logging.error("--model_config_file: %s", error)

  def _set_health(self) -> None:
    states = health_pb2.HealthCheckResponse
    status = states.SERVING if self._models.all_available() else states.NOT_SERVING
    if status != self._status:  # each setting is told to all who watch
      self._status = status
      for service in (health.OVERALL_HEALTH, *SERVICES):
        self._health.set(service, status)

  def _grpc_server(self, predictor: prediction_service.Predictor) -> grpc.Server:
    args = self._args
    self._grpc_threads, self._refuse = _Threads(args.grpc_max_threads, thread_name_prefix="grpc"), _RefuseWhenStopping()
    server = grpc.server(
        self._grpc_threads, interceptors=[self._refuse],
        maximum_concurrent_rpcs=args.grpc_max_threads + args.max_waiting_requests,
        options=[("grpc.max_receive_message_length", args.max_request_bytes), ("grpc.max_send_message_length", -1),
                 ("grpc.so_reuseport", 0)])  # or a second server would take half of the first one's requests
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(prediction_service.PredictionService(predictor), server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(
        prediction_service.ModelService(self._models, reloaded=self._set_health), server)
    health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
    _describe_services()
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
      self.port = server.add_insecure_port(_address(args.host, args.port))
    except RuntimeError as error:
      raise artifacts.UserError(
          f"--port: cannot listen on {_address(args.host, args.port)}; is another server running there, or is --host not of this "
          f"machine? ({error})") from error
    return server

  def _bind_rest(self) -> socket.socket:
    host, port = self._args.host, self._args.rest_api_port
    try:
      return socket.create_server((host, port), backlog=1024, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
      raise artifacts.UserError(
          f"--rest_api_port: cannot listen on {_address(host, port)}; is another server running there? ({error})") from error


def _address(host: str, port: int) -> str:
  return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _describe_services() -> None:
  """Registers the services' descriptors, for reflection."""
  for name in ("prediction_service_pb2", "model_service_pb2"):
    # Registers its file, then breaks off with today's protobuf, in code written for an early one; nothing after that is needed.
    with contextlib.suppress(AttributeError):
      importlib.import_module(f"tensorflow_serving.apis.{name}")


def main(argv: Sequence[str]) -> None:
  del argv
  logging.set_verbosity(logging.INFO)
  prometheus_client.disable_created_metrics()
  try:
    Server(flags.FLAGS).run()
  except (artifacts.UserError, versions.StatusError) as error:
    sys.exit(f"model_server: {error}")


if __name__ == "__main__":
  flags.DEFINE_string("host", "127.0.0.1", "Address to listen on, for gRPC and REST; 0.0.0.0: all of this machine's.")
  flags.DEFINE_integer("port", 8500, "gRPC port; 0: any free one.", lower_bound=0, upper_bound=65535)
  flags.DEFINE_integer("rest_api_port", 0, "HTTP port; 0: no REST.", lower_bound=0, upper_bound=65535)
  flags.DEFINE_string("model_name", "default", "Name of the model of --model_base_path.")
  flags.DEFINE_string("model_base_path", None, "Folder that holds the model's versions, 1/, 2/, ...")
  flags.DEFINE_string("model_config_file", None, "Text proto ModelServerConfig, in place of the two above.")
  flags.DEFINE_float(
      "model_config_file_poll_wait_seconds", 0, "Time between looks at --model_config_file; 0: never again.", lower_bound=0)
  flags.DEFINE_float("file_system_poll_wait_seconds", 1, "Time between looks at base paths; 0: only at the start.", lower_bound=0)
  flags.DEFINE_bool("enable_batching", False, "Whether concurrent requests are run together.")
  flags.DEFINE_string("batching_parameters_file", None, "Text proto BatchingParameters.")
  flags.DEFINE_integer("rest_api_timeout_in_ms", 30_000, "Time for one REST request; 0: any.", lower_bound=0)
  flags.DEFINE_integer("grpc_max_threads", max(64, 4 * (os.cpu_count() or 1)), "Requests in work at a time.", lower_bound=1)
  flags.DEFINE_integer(
      "max_waiting_requests", 1000, "Requests that may wait for a thread; beyond, they are refused.", lower_bound=0)
  flags.DEFINE_integer("max_request_bytes", 64 << 20, "Largest request.", lower_bound=1)
  flags.DEFINE_string("monitoring_config_file", None, "Text proto MonitoringConfig: where, or whether, metrics are shown.")
  flags.DEFINE_bool(
      "allow_version_labels_for_unavailable_models", False, "Whether a new label may stand for a version not yet loaded.")
  flags.DEFINE_bool("enable_model_warmup", True, "Whether a version's warm-up requests are run before it answers.")
  app.run(main)
