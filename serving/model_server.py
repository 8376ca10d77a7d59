"""Serves SavedModels over TensorFlow Serving's gRPC and REST, where there is no TensorFlow Serving binary.

    python -m serving.model_server --model_name=realm --model_base_path=M --port=8500 --rest_api_port=8501

M/<version>/ are SavedModels; a new one is loaded, warmed up and takes over while requests go on. Flags and config files are those
of tensorflow_model_server, and a client cannot tell the two apart, but for two things. --host: this server listens on loopback
only, unless told otherwise. And it listens at once, while it loads its first versions; until then it answers UNAVAILABLE (503),
says what it waits for, and its health is NOT_SERVING. Beside TensorFlow Serving's services there are gRPC health and reflection.
SIGTERM lets the requests in flight finish.
"""

import asyncio
import contextlib
import functools
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
from importlib import metadata

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
from serving import batching, predict_protocol, prediction_service, rest_api, server_flags, versions

SERVICES = ("tensorflow.serving.PredictionService", "tensorflow.serving.ModelService")
_DRAIN_SECS = 60  # longest wait for requests in flight at the end
_LAST_SECS = 1  # for answers to reach their clients
_HEALTH_SECS = 0.5  # between two looks at whether all models are available

_CONFIG_MESSAGES = predict_protocol.message_classes(
  {  # that tensorflow-serving-api leaves out
    "Integer": {"value": (1, "int64")},
    "Text": {"value": (1, "string")},
    "BatchingParameters": {
      "max_batch_size": (1, "Integer"),
      "batch_timeout_micros": (2, "Integer"),
      "max_enqueued_batches": (3, "Integer"),
      "num_batch_threads": (4, "Integer"),
      "thread_pool_name": (5, "Text"),
      "allowed_batch_sizes": (6, "int64[]"),
      "pad_variable_length_inputs": (7, "bool"),
    },
    "PrometheusConfig": {"enable": (1, "bool"), "path": (2, "string")},
    "MonitoringConfig": {"prometheus_config": (1, "PrometheusConfig")},
    "SSLConfig": {
      "server_key": (1, "string"),
      "server_cert": (2, "string"),
      "custom_ca": (3, "string"),
      "client_verify": (4, "bool"),
    },
  }
)


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


def channel_arguments(text: str) -> list[tuple[str, int | str]]:
  """--grpc_channel_arguments as gRPC takes them: numbers as numbers. Raises UserError."""
  found = []
  for part in filter(None, text.split(",")):
    key, sign, value = part.partition("=")
    if not key or not sign:
      raise artifacts.UserError(
        f"--grpc_channel_arguments: got {part!r}, wanted KEY=VALUE, separated by commas."
      )
    found.append((key, int(value) if value.removeprefix("-").isdecimal() else value))
  return found


def server_credentials(path: str) -> grpc.ServerCredentials | None:
  """The key and certificate of --ssl_config_file; None without one. Raises UserError."""
  if not path:
    return None
  config = read_config(path, _CONFIG_MESSAGES["SSLConfig"]())
  if not config.server_key or not config.server_cert:
    raise artifacts.UserError(f"{path!r}: server_key and server_cert are wanted, both as PEM text.")
  if config.client_verify and not config.custom_ca:
    raise artifacts.UserError(
      f"{path!r}: client_verify needs custom_ca, the certificates that clients are checked against."
    )
  return grpc.ssl_server_credentials(
    [(config.server_key.encode(), config.server_cert.encode())],
    root_certificates=config.custom_ca.encode() if config.client_verify else None,
    require_client_auth=config.client_verify,
  )


def set_threads(args) -> None:
  """Tells TensorFlow how many threads to use, before it starts them. Raises UserError."""
  both, intra, inter = (
    getattr(args, f"tensorflow_{name}_parallelism") for name in ("session", "intra_op", "inter_op")
  )
  if both and (intra or inter):
    raise artifacts.UserError(
      "give --tensorflow_session_parallelism, or --tensorflow_intra_op_parallelism and --tensorflow_inter_op_parallelism."
    )
  tf.config.threading.set_intra_op_parallelism_threads(both or intra)
  tf.config.threading.set_inter_op_parallelism_threads(both or inter)


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
    self._credentials = server_credentials(args.ssl_config_file)
    if args.batching_parameters_file and not args.enable_batching:
      raise artifacts.UserError("--batching_parameters_file is set without --enable_batching.")
    self._batcher = batching.Batcher(batching_parameters(args.batching_parameters_file)) if args.enable_batching else None
    self._models = self._new_models()
    predictor = prediction_service.Predictor(self._models, self._batcher.run if self._batcher else batching.run_alone)
    self._health = health.HealthServicer()
    # Or a server busy enough would seem dead. (Functions carry the attribute; it is how gRPC is told of another pool.)
    health.HealthServicer.Check.experimental_thread_pool = futures.ThreadPoolExecutor(1, thread_name_prefix="health")
    self._status = None
    self._grpc = self._grpc_server(predictor)
    self._rest = rest_api.RestApi(
      predictor,
      timeout_secs=args.rest_api_timeout_in_ms / 1000,
      num_threads=args.rest_api_num_threads or args.grpc_max_threads,
      max_waiting=args.max_waiting_requests,
      metrics_path=metrics_path(args.monitoring_config_file),
      cors=args.rest_api_enable_cors_support,
    )
    self._rest_socket = self._bind_rest() if args.rest_api_port else None

  def run(self) -> None:
    """Serves, and loads the models meanwhile. Raises StatusError if the config cannot be met."""
    gc.freeze()  # so that collecting an unloaded model need not walk through all that was imported
    try:
      asyncio.run(self._serve())
    finally:
      self._models.stop()
      if self._batcher:
        self._batcher.stop()

  def _new_models(self) -> versions.Models:
    args = self._args
    warm_up = functools.partial(
      prediction_service.warm_up, repeats=max(args.num_request_iterations_for_warmup, 1)
    )
    loading = versions.Loading(
      tags=args.saved_model_tags.split(","),
      max_retries=args.max_num_load_retries,
      retry_secs=max(args.load_retry_interval_micros, 0) / 1e6,
    )
    return versions.Models(
        self._config, warm_up=warm_up if args.enable_model_warmup else None, loading=loading,
        labels_for_unavailable=args.allow_version_labels_for_unavailable_models,
        force_labels=args.force_allow_any_version_labels_for_unavailable_models)

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
    logging.info("Running gRPC ModelServer at %s ...", self.addresses)
    if self._args.port_file:
      self._tell_port(self._args.port_file)
    loading = asyncio.create_task(self._load())
    loading.add_done_callback(lambda task: stop.set() if task.exception() else None)
    tasks = [
      asyncio.create_task(self._watch_health()),
      asyncio.create_task(self._watch_config(loading)),
    ]
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
    if not loading.done():  # nobody will use what it loads, and TensorFlow cannot be interrupted
      logging.flush()
      os._exit(0)
    await loading  # raises what it did

  def _tell_port(self, path: str) -> None:
    try:
      artifacts.write_text(path, f"{self.port}\n")
    except tf.errors.OpError as error:
      raise artifacts.UserError(f"--port_file: cannot write {path!r}: {error.message}") from error

  async def _load(self) -> None:
    """Loads the first versions; requests meanwhile are told so."""
    await asyncio.to_thread(self._models.start, poll_secs=self._args.file_system_poll_wait_seconds)
    self._set_health()
    if self._models.all_available():
      logging.info("all models are available")

  async def _watch_health(self) -> None:
    while True:
      await asyncio.sleep(_HEALTH_SECS)
      self._set_health()

  async def _watch_config(self, loading: asyncio.Task) -> None:
    """Reloads --model_config_file if it has changed after the first load."""
    path, wait_secs = self._args.model_config_file, self._args.model_config_file_poll_wait_seconds
    await asyncio.wait([loading])
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
      self._grpc_threads,
      interceptors=[self._refuse],
      maximum_concurrent_rpcs=args.grpc_max_threads + args.max_waiting_requests,
      options=[
        ("grpc.max_receive_message_length", args.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # or a second server would take half of the first one's requests
        *channel_arguments(args.grpc_channel_arguments),
      ],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(prediction_service.PredictionService(predictor), server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(
        prediction_service.ModelService(self._models, reloaded=self._set_health), server)
    health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
    _describe_services()
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    self.port = 0
    sockets = [f"unix:{args.grpc_socket_path}"] if args.grpc_socket_path else []
    if args.port or not sockets:
      self.port = self._bind_grpc(
        server, _address(args.host, args.port), "--port", "is --host not of this machine"
      )
      sockets.insert(0, _address(args.host, self.port))
    if args.grpc_socket_path:
      self._bind_grpc(server, sockets[-1], "--grpc_socket_path", "can the file not be written")
    self.addresses = " and ".join(sockets)
    return server

  def _bind_grpc(self, server: grpc.Server, address: str, flag: str, doubt: str) -> int:
    """Listens at an address; returns the port. Raises UserError."""
    try:
      if self._credentials:
        return server.add_secure_port(address, self._credentials)
      return server.add_insecure_port(address)
    except RuntimeError as error:
      raise artifacts.UserError(
        f"{flag}: cannot listen on {address}; is another server running there, or {doubt}? ({error})"
      ) from error

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


def check_flags(args) -> None:
  """Names once what was given and has no effect. Raises UserError for what would be unsafe to pass over."""
  if args.use_alts_credentials:
    raise artifacts.UserError(
      "--use_alts_credentials is not supported; for an encrypted connection give --ssl_config_file."
    )
  if args.port == args.rest_api_port != 0:
    raise artifacts.UserError(
      f"--port and --rest_api_port are both {args.port}; give them different ones."
    )
  if ignored := server_flags.without_effect(args):
    logging.warning("without effect in this server: %s", ", ".join(f"--{name}" for name in ignored))


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  if args.version:
    print(
      f"TensorFlow ModelServer: {metadata.version('tensorflow-serving-api')}\nTensorFlow Library: {tf.__version__}"
    )
    return
  if argv[1:]:
    sys.exit(f"model_server: got {' '.join(argv[1:])!r}; wanted only flags, each as --name=value.")
  logging.set_verbosity(logging.INFO)
  prometheus_client.disable_created_metrics()
  try:
    check_flags(args)
    set_threads(args)
    Server(args).run()
  except (artifacts.UserError, versions.StatusError) as error:
    sys.exit(f"model_server: {error}")


if __name__ == "__main__":
  server_flags.define()
  app.run(main)
