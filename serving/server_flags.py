"""Flags of `serving.model_server`: all that tensorflow_model_server has, and a few of its own.

Names, types and defaults are those of TensorFlow Serving's main.cc and server.h. What has
no meaning in this server is accepted too, so that a command line moves over unchanged, and
`without_effect` names what was given in vain.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags


class _Flag(NamedTuple):
  """A flag of its default's type (None: a string); numbers lie between `lowest` and `highest`."""

  default: bool | int | float | str | None
  help: str
  lowest: int | None = 0
  highest: int | None = None


_LISTENING = {
  "host": _Flag(
    "127.0.0.1", "Address to listen on, for gRPC and REST; 0.0.0.0: all of this machine's."
  ),
  "port": _Flag(
    8500, "gRPC port; 0: any free one (see --port_file), or none with --grpc_socket_path.", 0, 65535
  ),
  "port_file": _Flag(None, "File to write the gRPC port to when the server listens there."),
  "grpc_socket_path": _Flag(None, "UNIX socket to listen on for gRPC, beside the port."),
  "rest_api_port": _Flag(0, "HTTP port; 0: no REST.", 0, 65535),
  "rest_api_num_threads": _Flag(
    0, "REST requests in work at a time; 0: as many as --grpc_max_threads."
  ),
  "rest_api_timeout_in_ms": _Flag(30_000, "Time for one REST request; 0: any."),
  "rest_api_enable_cors_support": _Flag(
    False, "Whether web pages of other origins may call the REST API."
  ),
  "grpc_max_threads": _Flag(max(64, 4 * (os.cpu_count() or 1)), "Requests in work at a time.", 1),
  "grpc_channel_arguments": _Flag(
    "", "Arguments of the gRPC server: grpc.max_connection_age_ms=2000,.."
  ),
  "ssl_config_file": _Flag(None, "Text proto SSLConfig: key and certificate, for gRPC over TLS."),
  "use_alts_credentials": _Flag(
    False, "Google's ALTS credentials; refused, for they are not supported here."
  ),
  "max_waiting_requests": _Flag(
    1000, "Requests that may wait for a thread; beyond, they are refused."
  ),
  "max_request_bytes": _Flag(64 << 20, "Largest request.", 1),
  "monitoring_config_file": _Flag(
    None, "Text proto MonitoringConfig: where, or whether, metrics are shown."
  ),
}
_MODELS = {
  "version": _Flag(False, "Print the versions of the server and of TensorFlow, and end."),
  "model_name": _Flag("default", "Name of the model of --model_base_path."),
  "model_base_path": _Flag(None, "Folder that holds the model's versions, 1/, 2/, ..."),
  "model_config_file": _Flag(None, "Text proto ModelServerConfig, in place of the two above."),
  "model_config_file_poll_wait_seconds": _Flag(
    0.0, "Time between looks at that file; 0: never again."
  ),
  "file_system_poll_wait_seconds": _Flag(
    1.0, "Time between looks at base paths; 0: only at the start."
  ),
  "saved_model_tags": _Flag(
    "serve", "Tags of the graph to load from a SavedModel, separated by commas."
  ),
  "max_num_load_retries": _Flag(5, "How often a version that did not load is tried again."),
  "load_retry_interval_micros": _Flag(
    60_000_000, "Time before each of these; below 0: none.", None
  ),
  "allow_version_labels_for_unavailable_models": _Flag(
    False, "Whether a new label may stand for a version not yet loaded."
  ),
  "force_allow_any_version_labels_for_unavailable_models": _Flag(
    False, "Whether any label may stand for a version not yet loaded."
  ),
  "enable_model_warmup": _Flag(
    True, "Whether a version's warm-up requests are run before it answers."
  ),
  "num_request_iterations_for_warmup": _Flag(0, "How often each warm-up request is run; 0: once."),
}
_EXECUTION = {
  "enable_batching": _Flag(False, "Whether concurrent requests are run together."),
  "batching_parameters_file": _Flag(None, "Text proto BatchingParameters."),
  "tensorflow_session_parallelism": _Flag(
    0, "TensorFlow's threads, both those below; 0: its choice."
  ),
  "tensorflow_intra_op_parallelism": _Flag(0, "TensorFlow's threads within one op; 0: its choice."),
  "tensorflow_inter_op_parallelism": _Flag(0, "TensorFlow's threads between ops; 0: its choice."),
}
_WITHOUT_EFFECT = {  # name -> default
  "enable_grpc_healthcheck_service": False,  # the service is always there
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
  ignored = {
    name: _Flag(default, "Of tensorflow_model_server; without effect here.", None)
    for name, default in _WITHOUT_EFFECT.items()
  }
  for name, flag in (_LISTENING | _MODELS | _EXECUTION | ignored).items():
    numbers = {"lower_bound": flag.lowest, "upper_bound": flag.highest, "flag_values": values}
    if isinstance(flag.default, bool):
      flags.DEFINE_bool(name, flag.default, flag.help, flag_values=values)
    elif isinstance(flag.default, int):
      flags.DEFINE_integer(name, flag.default, flag.help, **numbers)
    elif isinstance(flag.default, float):
      flags.DEFINE_float(name, flag.default, flag.help, **numbers)
    else:
      flags.DEFINE_string(name, flag.default, flag.help, flag_values=values)
  flags.DEFINE_alias("enable_cors_support", "rest_api_enable_cors_support", flag_values=values)


def without_effect(args: flags.FlagValues) -> Sequence[str]:
  """The flags given that do nothing here."""
  return [name for name in sorted(_WITHOUT_EFFECT) if args[name].present]
