"""Flags of `serving.model_server`: all that tensorflow_model_server has, and a few of its own.

Names, types and defaults are those of TensorFlow Serving's model_servers/main.cc and server.h. What has no meaning in this server
is accepted too, so that a command line moves over unchanged; `without_effect` names what was given in vain.
"""

import os
from collections.abc import Sequence

from absl import flags

# Name → default, of the flags that are accepted and do nothing.
_WITHOUT_EFFECT = {
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


def define() -> None:
  """Defines all flags."""
  _define_listening()
  _define_models()
  _define_execution()
  for name, default in _WITHOUT_EFFECT.items():
    kind = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}[type(default)]
    kind(name, default, "Of tensorflow_model_server; without effect here.")


def _define_listening() -> None:
  flags.DEFINE_string("host", "127.0.0.1", "Address to listen on, for gRPC and REST; 0.0.0.0: all of this machine's.")
  flags.DEFINE_integer(
      "port", 8500, "gRPC port; 0: any free one, see --port_file, or none with --grpc_socket_path.", lower_bound=0, upper_bound=65535)
  flags.DEFINE_string("port_file", None, "File to write the gRPC port to as soon as the server listens.")
  flags.DEFINE_string("grpc_socket_path", None, "UNIX socket to listen on for gRPC, beside the port.")
  flags.DEFINE_integer("rest_api_port", 0, "HTTP port; 0: no REST.", lower_bound=0, upper_bound=65535)
  flags.DEFINE_integer("rest_api_num_threads", None, "REST requests in work at a time; --grpc_max_threads by default.", lower_bound=1)
  flags.DEFINE_integer("rest_api_timeout_in_ms", 30_000, "Time for one REST request; 0: any.", lower_bound=0)
  flags.DEFINE_bool("rest_api_enable_cors_support", False, "Whether pages of other origins may call the REST API from a browser.")
  flags.DEFINE_alias("enable_cors_support", "rest_api_enable_cors_support")
  flags.DEFINE_integer("grpc_max_threads", max(64, 4 * (os.cpu_count() or 1)), "Requests in work at a time.", lower_bound=1)
  flags.DEFINE_string("grpc_channel_arguments", "", "Arguments for the gRPC server: grpc.max_connection_age_ms=2000,..")
  flags.DEFINE_string("ssl_config_file", None, "Text proto SSLConfig: key and certificate, for gRPC over TLS.")
  flags.DEFINE_bool("use_alts_credentials", False, "Google's ALTS credentials; not supported here.")
  flags.DEFINE_integer(
      "max_waiting_requests", 1000, "Requests that may wait for a thread; beyond, they are refused.", lower_bound=0)
  flags.DEFINE_integer("max_request_bytes", 64 << 20, "Largest request.", lower_bound=1)
  flags.DEFINE_string("monitoring_config_file", None, "Text proto MonitoringConfig: where, or whether, metrics are shown.")


def _define_models() -> None:
  flags.DEFINE_bool("version", False, "Print the versions of server and TensorFlow, and end.")
  flags.DEFINE_string("model_name", "default", "Name of the model of --model_base_path.")
  flags.DEFINE_string("model_base_path", None, "Folder that holds the model's versions, 1/, 2/, ...")
  flags.DEFINE_string("model_config_file", None, "Text proto ModelServerConfig, in place of the two above.")
  flags.DEFINE_float(
      "model_config_file_poll_wait_seconds", 0, "Time between looks at --model_config_file; 0: never again.", lower_bound=0)
  flags.DEFINE_float("file_system_poll_wait_seconds", 1, "Time between looks at base paths; 0: only at the start.", lower_bound=0)
  flags.DEFINE_string("saved_model_tags", "serve", "Tags of the graph to load from a SavedModel, separated by commas.")
  flags.DEFINE_integer("max_num_load_retries", 5, "How often a version that did not load is tried again.", lower_bound=0)
  flags.DEFINE_integer("load_retry_interval_micros", 60_000_000, "Time before each of these; below 0: none.")
  flags.DEFINE_bool(
      "allow_version_labels_for_unavailable_models", False, "Whether a new label may stand for a version not yet loaded.")
  flags.DEFINE_bool(
      "force_allow_any_version_labels_for_unavailable_models", False, "Whether any label may stand for a version not yet loaded.")
  flags.DEFINE_bool("enable_model_warmup", True, "Whether a version's warm-up requests are run before it answers.")
  flags.DEFINE_integer("num_request_iterations_for_warmup", 0, "How often each warm-up request is run; 0: once.", lower_bound=0)


def _define_execution() -> None:
  flags.DEFINE_bool("enable_batching", False, "Whether concurrent requests are run together.")
  flags.DEFINE_string("batching_parameters_file", None, "Text proto BatchingParameters.")
  for name, what in (("session", "both below"), ("intra_op", "within one op"), ("inter_op", "between ops")):
    flags.DEFINE_integer(f"tensorflow_{name}_parallelism", 0, f"TensorFlow's threads, {what}; 0: its choice.", lower_bound=0)


def without_effect(args: flags.FlagValues) -> Sequence[str]:
  """The flags given that do nothing here."""
  return [name for name in sorted(_WITHOUT_EFFECT) if args[name].present]
