"""Reads the config files of `serving.model_server`, which are TensorFlow Serving's text protos."""

from typing import Any

import grpc
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from realm_tf.storage import artifacts
from serving.tf_serving import batching, predict_protocol

_CONFIG_MESSAGES = predict_protocol.message_classes(
  {  # not included in tensorflow-serving-api
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


def read_config(path: str, message):
  """Fills a message from a text proto file. Raises UserError."""
  try:
    return text_format.Parse(artifacts.read_text(path), message)
  except (text_format.ParseError, tf.errors.OpError, UnicodeDecodeError) as error:
    raise artifacts.UserError(
      f"{path!r} is not a text proto of {message.DESCRIPTOR.full_name}: {error}"
    ) from error


def batching_parameters(path: str) -> batching.Parameters:
  """Reads --batching_parameters_file; omitted parameters have TensorFlow Serving's defaults."""
  if not path:
    return batching.Parameters()
  proto = read_config(path, _CONFIG_MESSAGES["BatchingParameters"]())
  if proto.pad_variable_length_inputs:
    raise artifacts.UserError(
      f"{path!r}: pad_variable_length_inputs is not supported; remove it. Inputs of different "
      "shapes are run in different batches."
    )
  values: dict[str, Any] = {"allowed_sizes": tuple(proto.allowed_batch_sizes)}
  for field, name in (
    ("max_batch_size", "max_batch_size"),
    ("max_enqueued_batches", "max_enqueued_batches"),
    ("num_batch_threads", "num_threads"),
  ):
    if proto.HasField(field):
      values[name] = getattr(proto, field).value
  if proto.HasField("batch_timeout_micros"):
    values["timeout_secs"] = proto.batch_timeout_micros.value / 1e6
  return batching.Parameters(**values)


def model_config(args) -> model_server_config_pb2.ModelServerConfig:
  """Returns the models to serve: --model_config_file, or the one model of --model_base_path."""
  if args.model_config_file:
    return read_config(args.model_config_file, model_server_config_pb2.ModelServerConfig())
  if not args.model_base_path:
    raise artifacts.UserError(
      "no model given; set --model_base_path (a folder that holds 1/, 2/, ...) or "
      "--model_config_file."
    )
  config = model_server_config_pb2.ModelServerConfig()
  config.model_config_list.config.add(
    name=args.model_name, base_path=args.model_base_path, model_platform="tensorflow"
  )
  return config


def channel_arguments(text: str) -> list[tuple[str, int | str]]:
  """Parses --grpc_channel_arguments for gRPC: numbers become integers. Raises UserError."""
  found = []
  for part in filter(None, text.split(",")):
    key, sign, value = part.partition("=")
    if not key or not sign:
      raise artifacts.UserError(
        f"--grpc_channel_arguments: got {part!r}, wanted KEY=VALUE pairs, separated by commas."
      )
    found.append((key, int(value) if value.removeprefix("-").isdecimal() else value))
  return found


def server_credentials(path: str) -> grpc.ServerCredentials | None:
  """Returns the key and certificate of --ssl_config_file, or None. Raises UserError."""
  if not path:
    return None
  config = read_config(path, _CONFIG_MESSAGES["SSLConfig"]())
  if not config.server_key or not config.server_cert:
    raise artifacts.UserError(f"{path!r} needs server_key and server_cert, both as PEM text.")
  if config.client_verify and not config.custom_ca:
    raise artifacts.UserError(
      f"{path!r}: client_verify needs custom_ca, the certificates that clients are checked against."
    )
  return grpc.ssl_server_credentials(
    [(config.server_key.encode(), config.server_cert.encode())],
    root_certificates=config.custom_ca.encode() if config.client_verify else None,
    require_client_auth=config.client_verify,
  )


def metrics_path(path: str) -> str | None:
  """Returns the path of the metrics, or None if they are disabled."""
  config = _CONFIG_MESSAGES["PrometheusConfig"]()
  config.enable = True  # even without a file, so that scrapers need no configuration
  if path:
    config = read_config(path, _CONFIG_MESSAGES["MonitoringConfig"]()).prometheus_config
  return (config.path or "/monitoring/prometheus/metrics") if config.enable else None
