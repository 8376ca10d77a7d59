"""Flags of `serving.model_server`: all those of tensorflow_model_server, and a few more.

Names, types and defaults are those of TensorFlow Serving's main.cc and server.h. Flags that have no
meaning in this server are accepted too, so that command lines need no changes; `without_effect`
lists those that were given.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags


class _Flag(NamedTuple):
  """A flag, of the type of its default (None: a string); numbers have `lowest` and `highest`."""

  default: bool | int | float | str | None
  help: str
  lowest: int | None = 0
  highest: int | None = None


_LISTENING = {
  "host": _Flag(
    "127.0.0.1", "Address to listen on, for gRPC and REST; 0.0.0.0: all addresses of the machine."
  ),
  "port": _Flag(
    8500, "gRPC port; 0: any free one (see --port_file), or none with --grpc_socket_path.", 0, 65535
  ),
  "port_file": _Flag(None, "File to write the gRPC port to once the server is listening."),
  "grpc_socket_path": _Flag(None, "UNIX socket to listen on for gRPC, in addition to the port."),
  "rest_api_port": _Flag(0, "HTTP port; 0: no REST API.", 0, 65535),
  "rest_api_num_threads": _Flag(
    0, "REST requests processed concurrently; 0: as many as --grpc_max_threads."
  ),
  "rest_api_timeout_in_ms": _Flag(
    30_000, "Time limit of a REST request, from its first byte to its answer; 0: none."
  ),
  "rest_api_enable_cors_support": _Flag(
    False, "Whether web pages of other origins may call the REST API."
  ),
  "grpc_max_threads": _Flag(
    max(64, 4 * (os.cpu_count() or 1)), "Requests processed concurrently.", 1
  ),
  "grpc_channel_arguments": _Flag(
    "", "Arguments of the gRPC server, such as grpc.max_connection_age_ms=2000,.."
  ),
  "ssl_config_file": _Flag(None, "Text proto SSLConfig: key and certificate, for gRPC over TLS."),
  "use_alts_credentials": _Flag(
    False, "Google's ALTS credentials; rejected, because they are not supported."
  ),
  "max_waiting_requests": _Flag(
    1000, "Requests that may wait for a thread; any more are rejected."
  ),
  "max_request_bytes": _Flag(64 << 20, "Maximum size of a request.", 1),
  "max_request_bytes_in_work": _Flag(
    256 << 20,
    "Maximum total size of the REST requests in progress; beyond it, large ones are rejected.",
    1,
  ),
  "max_request_rows": _Flag(1 << 16, "Maximum rows (questions) in a request.", 1),
  "monitoring_config_file": _Flag(
    None, "Text proto MonitoringConfig: whether and where metrics are shown."
  ),
}
_MODELS = {
  "version": _Flag(False, "Print the versions of the server and of TensorFlow, and exit."),
  "model_name": _Flag("default", "Name of the model of --model_base_path."),
  "model_base_path": _Flag(None, "Folder that holds the model's versions, 1/, 2/, ..."),
  "model_config_file": _Flag(
    None, "Text proto ModelServerConfig, instead of --model_name and --model_base_path."
  ),
  "model_config_file_poll_wait_seconds": _Flag(
    0.0, "Time between checks of that file for changes; 0: never check."
  ),
  "file_system_poll_wait_seconds": _Flag(
    1.0, "Time between checks of base paths for versions; 0: only at the start."
  ),
  "saved_model_tags": _Flag(
    "serve", "Tags of the graph to load from a SavedModel, separated by commas."
  ),
  "max_num_load_retries": _Flag(5, "How often a version that failed to load is retried."),
  "load_retry_interval_micros": _Flag(60_000_000, "Time before each retry; negative: none.", None),
  "allow_version_labels_for_unavailable_models": _Flag(
    False, "Whether a new label may refer to a version that is not loaded yet."
  ),
  "force_allow_any_version_labels_for_unavailable_models": _Flag(
    False, "Whether any label may refer to a version that is not loaded yet."
  ),
  "enable_model_warmup": _Flag(
    True, "Whether the warm-up requests of a version are run before it answers."
  ),
  "num_request_iterations_for_warmup": _Flag(0, "How often each warm-up request is run; 0: once."),
}
_EXECUTION = {
  "enable_batching": _Flag(False, "Whether concurrent requests are batched."),
  "batching_parameters_file": _Flag(None, "Text proto BatchingParameters."),
  "tensorflow_session_parallelism": _Flag(
    0, "TensorFlow's threads, both within and between ops; 0: chosen by TensorFlow."
  ),
  "tensorflow_intra_op_parallelism": _Flag(
    0, "TensorFlow's threads within an op; 0: chosen by TensorFlow."
  ),
  "tensorflow_inter_op_parallelism": _Flag(
    0, "TensorFlow's threads between ops; 0: chosen by TensorFlow."
  ),
}
_WITHOUT_EFFECT: dict[str, bool | int | float | str] = {  # name -> default
  "enable_grpc_healthcheck_service": False,  # the service is always enabled
  "enable_per_model_batching_parameters": False,
  "enable_profiler": False,
  "enable_serialization_as_tensor_content": False,
  "enable_signature_method_name_check": False,
  "enforce_session_run_timeout": True,
  "flush_filesystem_caches": True,
  "mixed_precision": "",
  "num_load_threads": 0,
  "num_tflite_interpreters_per_pool": 1,
  "num_tflite_pools": 0,
  "num_unload_threads": 0,
  "per_process_gpu_memory_fraction": 0.0,
  "platform_config_file": "",
  "prefer_tflite_model": False,
  "remove_unused_fields_from_bundle_metagraph": True,
  "skip_initialize_tpu": False,
  "tensorflow_session_config_file": "",
  "thread_pool_factory_config_file": "",
  "use_tflite_model": False,
  "xla_cpu_compilation_enabled": False,
  "xla_gpu_compilation_enabled": False,
}


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines all flags, in `values`."""
  flags.disclaim_key_flags()  # so that --help lists them as flags of the command
  ignored = {
    name: _Flag(default, "Flag of tensorflow_model_server; no effect in this server.", None)
    for name, default in _WITHOUT_EFFECT.items()
  }
  for name, flag in (_LISTENING | _MODELS | _EXECUTION | ignored).items():
    if isinstance(flag.default, bool):
      flags.DEFINE_bool(name, flag.default, flag.help, flag_values=values)
    elif isinstance(flag.default, int):
      flags.DEFINE_integer(
        name, flag.default, flag.help, flag.lowest, flag.highest, flag_values=values
      )
    elif isinstance(flag.default, float):
      flags.DEFINE_float(
        name, flag.default, flag.help, flag.lowest, flag.highest, flag_values=values
      )
    else:
      flags.DEFINE_string(name, flag.default, flag.help, flag_values=values)
  flags.DEFINE_alias("enable_cors_support", "rest_api_enable_cors_support", flag_values=values)


def without_effect(args: flags.FlagValues) -> Sequence[str]:
  """Returns the flags that were given but have no effect in this server."""
  return [name for name in sorted(_WITHOUT_EFFECT) if args[name].present]
