"""Serves SavedModels over TensorFlow Serving's gRPC and REST APIs.

    python -m serving.model_server --model_name=realm --model_base_path=M \\
        --port=8500 --rest_api_port=8501

Use it where no TensorFlow Serving binary is available.

M/<version>/ are SavedModels; a new version is loaded and warmed up, and takes over without
interrupting requests. Flags and config files are those of tensorflow_model_server, and clients see
the same behaviour, with two differences. First, this server listens on loopback only, unless --host
is set. Second, it starts listening immediately, while it loads the first versions; until they are
loaded it answers UNAVAILABLE (503) with the reason, and its health is NOT_SERVING. In addition to
TensorFlow Serving's services it offers gRPC health and reflection. After SIGTERM, it finishes the
requests in flight.
"""

import asyncio
import contextlib
import functools
import gc
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from importlib import metadata

from absl import flags

from realm_tf import cli
from serving.tf_serving import server_flags

if __name__ == "__main__":
  server_flags.define()
  cli.start("serving.model_server", optimize_loops=True)

import prometheus_client
import tensorflow as tf
from absl import logging
from aiohttp import web
from grpc_health.v1 import health_pb2

from realm_tf.storage import artifacts
from serving.tf_serving import (
  batching,
  grpc_server,
  prediction_service,
  rest_api,
  server_config,
  versions,
)
from serving.tf_serving.status import StatusError

_DRAIN_SECS = 60  # maximum time between SIGTERM and exit
_LAST_SECS = 1  # for answers to reach their clients, and for a poll of the base paths to finish
_BACKLOG = 1024  # connections that wait to be accepted
_HEALTH_SECS = 0.5  # between two checks whether all models are available


def set_threads(args) -> None:
  """Sets the number of TensorFlow's threads, before it starts them. Raises UserError."""
  both, intra, inter = (
    getattr(args, f"tensorflow_{name}_parallelism") for name in ("session", "intra_op", "inter_op")
  )
  if both and (intra or inter):
    raise artifacts.UserError(
      "--tensorflow_session_parallelism cannot be combined with --tensorflow_intra_op_parallelism "
      "or --tensorflow_inter_op_parallelism; set one or the other."
    )
  tf.config.threading.set_intra_op_parallelism_threads(both or intra)
  tf.config.threading.set_inter_op_parallelism_threads(both or inter)


class Server:
  """All services on their ports. `run` blocks until SIGTERM or SIGINT."""

  def __init__(self, args):
    """Reads the configs and binds the REST port. Raises UserError."""
    self._args = args
    self._config = server_config.model_config(args)
    self._credentials = server_config.server_credentials(args.ssl_config_file)
    self._options = [
      ("grpc.max_receive_message_length", args.max_request_bytes),
      ("grpc.max_send_message_length", -1),
      ("grpc.so_reuseport", 0),  # otherwise a second server could take half of the requests
      *server_config.channel_arguments(args.grpc_channel_arguments),
    ]
    if args.batching_parameters_file and not args.enable_batching:
      raise artifacts.UserError("--batching_parameters_file needs --enable_batching.")
    self._batcher = (
      batching.Batcher(server_config.batching_parameters(args.batching_parameters_file))
      if args.enable_batching
      else None
    )
    self._models = self._new_models()
    self._predictor = prediction_service.Predictor(
      self._models,
      self._batcher.run if self._batcher else batching.run_alone,
      max_rows=args.max_request_rows,
    )
    self._rest = rest_api.RestApi(
      self._predictor,
      timeout_secs=args.rest_api_timeout_in_ms / 1000,
      num_threads=args.rest_api_num_threads or args.grpc_max_threads,
      max_waiting=args.max_waiting_requests,
      max_request_bytes=args.max_request_bytes,
      max_bytes_in_work=max(args.max_request_bytes_in_work, args.max_request_bytes),
      metrics_path=server_config.metrics_path(args.monitoring_config_file),
      cors=args.rest_api_enable_cors_support,
    )
    self._rest_socket = self._bind_rest() if args.rest_api_port else None

  def run(self) -> None:
    """Serves, while loading the models.

    Raises:
      UserError: a gRPC address is not available.
      StatusError: the config cannot be satisfied.
    """
    gc.freeze()  # so that collecting an unloaded model does not traverse all imported modules
    try:
      asyncio.run(self._serve())
    finally:
      if not self._models.stop(timeout_secs=_LAST_SECS):
        _end_now()
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
      self._config,
      warm_up=warm_up if args.enable_model_warmup else None,
      loading=loading,
      labels_for_unavailable=args.allow_version_labels_for_unavailable_models,
      force_labels=args.force_allow_any_version_labels_for_unavailable_models,
    )

  async def _serve(self) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
      asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = self._rest.runner(shutdown_secs=_DRAIN_SECS)
    self._grpc = self._grpc_server()
    self._set_health()
    await self._listen(runner)
    loading = asyncio.create_task(self._load())
    loading.add_done_callback(lambda task: stop.set() if task.exception() else None)
    tasks = [
      asyncio.create_task(self._watch_health()),
      asyncio.create_task(self._watch_config(loading)),
    ]
    await stop.wait()
    for task in tasks:
      task.cancel()
    await self._stop(runner)
    if not loading.done():  # the models being loaded will not be used
      _end_now()
    await loading  # raises its exception, if any

  async def _listen(self, runner: web.AppRunner) -> None:
    """Starts to listen on all ports. Raises UserError."""
    args = self._args
    addresses = self._take_addresses()
    await runner.setup()
    if self._rest_socket:
      await web.SockSite(runner, self._rest_socket, backlog=_BACKLOG).start()
      logging.info(
        "Exporting HTTP/REST API at:%s ...",
        _address(args.host, self._rest_socket.getsockname()[1]),
      )
    await self._grpc.start()
    logging.info("Running gRPC ModelServer at %s ...", " and ".join(addresses))
    if args.port_file:
      try:
        artifacts.write_text(args.port_file, f"{self.port}\n")
      except tf.errors.OpError as error:
        raise artifacts.UserError(
          f"--port_file: cannot write {args.port_file!r}: {error.message}"
        ) from error

  async def _stop(self, runner: web.AppRunner) -> None:
    """Rejects new requests and lets those in progress finish, within `_DRAIN_SECS`."""
    logging.info("stopping: requests in flight may finish within %d s", _DRAIN_SECS)
    # In case something hangs: a client that does not read, or a model that does not return.
    ending = threading.Timer(_DRAIN_SECS, _end_now)
    ending.daemon = True
    ending.start()
    self._grpc.health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
    await asyncio.gather(self._grpc.drain(), runner.cleanup())
    # With a time limit, since clients that watch the health would keep the server running.
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(self._grpc.stop(_LAST_SECS), 2 * _LAST_SECS)

  async def _load(self) -> None:
    """Loads the first versions; until then requests are answered UNAVAILABLE."""
    await asyncio.to_thread(self._models.start, poll_secs=self._args.file_system_poll_wait_seconds)
    self._set_health()
    if self._models.all_available():
      logging.info("all models are available")

  async def _watch_health(self) -> None:
    while True:
      await asyncio.sleep(_HEALTH_SECS)
      self._set_health()

  async def _watch_config(self, loading: asyncio.Task) -> None:
    """Reloads --model_config_file whenever it changes, once the first load is done."""
    path, wait_secs = self._args.model_config_file, self._args.model_config_file_poll_wait_seconds
    await asyncio.wait([loading])
    while path and wait_secs:
      await asyncio.sleep(wait_secs)
      try:
        config = server_config.model_config(self._args)
        if config != self._config:
          self._config = config
          await asyncio.to_thread(self._models.reload, config)
          logging.info("%s has changed and has been reloaded", path)
      except (artifacts.UserError, StatusError) as error:
        logging.error("--model_config_file: %s", error)

  def _set_health(self) -> None:
    states = health_pb2.HealthCheckResponse
    self._grpc.health.set(states.SERVING if self._models.all_available() else states.NOT_SERVING)

  def _grpc_server(self) -> grpc_server.GrpcServer:
    loop = asyncio.get_running_loop()
    return grpc_server.GrpcServer(
      self._predictor,
      num_threads=self._args.grpc_max_threads,
      max_waiting=self._args.max_waiting_requests,
      options=self._options,
      reloaded=lambda: loop.call_soon_threadsafe(self._set_health),
    )

  def _take_addresses(self) -> list[str]:
    """Binds gRPC's port and socket; returns their addresses. Raises UserError."""
    args = self._args
    listen = functools.partial(self._grpc.listen, credentials=self._credentials)
    addresses = []
    self.port = 0
    if args.port or not args.grpc_socket_path:
      self.port = listen(
        _address(args.host, args.port),
        hint="--port: cannot listen on {address}; is another server running there, or is --host "
        "not an address of this machine? ({error})",
      )
      addresses.append(_address(args.host, self.port))
    if args.grpc_socket_path:
      addresses.append(f"unix:{args.grpc_socket_path}")
      listen(
        addresses[-1],
        hint="--grpc_socket_path: cannot listen on {address}; is another server running there, or "
        "is the path not writable? ({error})",
      )
    return addresses

  def _bind_rest(self) -> socket.socket:
    host, port = self._args.host, self._args.rest_api_port
    try:
      return socket.create_server(
        (host, port), backlog=_BACKLOG, family=socket.AF_INET6 if ":" in host else socket.AF_INET
      )
    except OSError as error:
      raise artifacts.UserError(
        f"--rest_api_port: cannot listen on {_address(host, port)}; is another server running "
        f"there? ({error})"
      ) from error


def _address(host: str, port: int) -> str:
  return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _end_now() -> None:
  """Ends the process at once: running TensorFlow code cannot be interrupted."""
  logging.flush()
  os._exit(0)


def allow_many_connections() -> None:
  """Raises the limit of open files, which include connections, to the maximum allowed."""
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def check_flags(args) -> None:
  """Warns about flags without effect.

  Raises UserError for those that would be unsafe to ignore.
  """
  if args.use_alts_credentials:
    raise artifacts.UserError(
      "--use_alts_credentials is not supported; for encrypted connections use --ssl_config_file."
    )
  if args.port == args.rest_api_port != 0:
    raise artifacts.UserError(f"--port and --rest_api_port are both {args.port}; they must differ.")
  if ignored := server_flags.without_effect(args):
    logging.warning("no effect in this server: %s", ", ".join(f"--{name}" for name in ignored))


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  if args.version:
    print(
      f"TensorFlow ModelServer: {metadata.version('tensorflow-serving-api')}\n"
      f"TensorFlow Library: {tf.__version__}"
    )
    return
  if argv[1:]:
    sys.exit(f"model_server: got {' '.join(argv[1:])!r}; wanted only flags, each as --name=value.")
  logging.set_verbosity(logging.INFO)
  prometheus_client.disable_created_metrics()
  try:
    check_flags(args)
    set_threads(args)
    allow_many_connections()
    Server(args).run()
  except (artifacts.UserError, StatusError) as error:
    sys.exit(f"model_server: {error}")
