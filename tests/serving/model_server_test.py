"""The model server as clients see it: real processes, official stubs, plain HTTP."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import datetime
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import proto_reflection_descriptor_database
from prometheus_client import parser
from tensorflow_serving.apis import (
  classification_pb2,
  get_model_metadata_pb2,
  get_model_status_pb2,
  inference_pb2,
  model_management_pb2,
  model_pb2,
  model_service_pb2_grpc,
  predict_pb2,
  prediction_log_pb2,
  prediction_service_pb2_grpc,
  regression_pb2,
)

from realm_tf.storage import artifacts
from serving import client as serving_client
from serving import model_server
from serving.tf_serving import batching, server_config, server_flags
from tests import canned_answers
from tests.processes import free_ports

REPOSITORY = pathlib.Path(__file__).parents[2]
START_SECS = 240  # for a process on a busy machine
C = grpc.StatusCode
State = get_model_status_pb2.ModelVersionStatus.State


# =========================================================================================== models


class Toy(tf.Module):
  """A model of many small signatures, whose answers contain its version."""

  def __init__(self, version: int):
    super().__init__()
    self.version = tf.Variable(version)
    self.runs = tf.Variable(0)

  @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")])
  def upper(self, text):
    return {"upper": tf.strings.upper(text), "raw_bytes": text}

  @tf.function(
    input_signature=[
      tf.TensorSpec([None, 2], tf.float32, "x"),
      tf.TensorSpec([None], tf.float32, "bias"),
    ]
  )
  def affine(self, x, bias):
    return {"y": 2 * tf.reduce_sum(x, 1) + bias}

  @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, "x")])
  def versioned(self, x):
    """Returns the batch's size to each row, and `x`, so that mixed-up rows show."""
    return {
      "x": x,
      "version": tf.fill(tf.shape(x), self.version),
      "batch_size": tf.fill(tf.shape(x), tf.size(x)),
    }

  @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "secs")])
  def slow(self, secs):
    end = tf.timestamp() + tf.cast(tf.reduce_max(secs), tf.float64)
    tf.while_loop(lambda _: tf.timestamp() < end, lambda a: [tf.linalg.matmul(a, a)], [tf.eye(64)])
    return {"secs": secs}

  @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
  def count(self, x):
    return {"runs": tf.fill(tf.shape(x), self.runs.assign_add(1))}

  @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
  def picky(self, x):
    with tf.control_dependencies([tf.debugging.assert_non_negative(x, "x must not be negative")]):
      return {"root": tf.sqrt(x)}

  @tf.function(input_signature=[tf.TensorSpec(None, tf.int64, "x")])
  def every_type(self, x):
    types = (
      tf.float64,
      tf.float16,
      tf.bfloat16,
      tf.int8,
      tf.uint8,
      tf.int16,
      tf.uint16,
      tf.int32,
      tf.uint32,
      tf.uint64,
      tf.bool,
    )
    return {"int64": x, **{dtype.name: tf.cast(x, dtype) for dtype in types}}


def save(toy: Toy, path: str, *, warm_up: list | None = None) -> None:
  """Writes a version elsewhere and renames it into place."""
  signatures = {
    "serving_default": toy.upper,
    **{
      name: getattr(toy, name)
      for name in ("affine", "versioned", "slow", "count", "picky", "every_type")
    },
  }
  tf.saved_model.save(toy, path + ".partial", signatures=signatures)
  if warm_up is not None:
    os.makedirs(path + ".partial/assets.extra")
    with tf.io.TFRecordWriter(path + ".partial/assets.extra/tf_serving_warmup_requests") as writer:
      for request in warm_up:
        writer.write(
          prediction_log_pb2.PredictionLog(predict_log={"request": request}).SerializeToString()
        )
  os.rename(path + ".partial", path)


def publish(source: str, target: str) -> None:
  """Copies a version elsewhere and renames it into place."""
  shutil.copytree(source, target + ".partial")
  os.rename(target + ".partial", target)


# =========================================================================================== server


@dataclasses.dataclass
class Server:
  """A process `python -m serving.model_server`, and clients for it."""

  process: subprocess.Popen
  log: pathlib.Path
  port: int
  rest_port: int

  def __post_init__(self):
    self.channel = grpc.insecure_channel(
      f"127.0.0.1:{self.port}",
      options=[("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)],
    )
    self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
    self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
    self.health = health_pb2_grpc.HealthStub(self.channel)

  def wait(self) -> "Server":
    """Waits until it serves."""
    end = time.monotonic() + START_SECS
    while time.monotonic() < end and self.process.poll() is None:
      with contextlib.suppress(grpc.RpcError):
        if (
          self.health.Check(health_pb2.HealthCheckRequest()).status
          == health_pb2.HealthCheckResponse.SERVING
        ):
          return self
      time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{self.log.read_text()}")

  def predict(
    self,
    inputs: dict,
    *,
    name: str = "toy",
    signature: str = "",
    version: int | None = None,
    label: str = "",
    output_filter=(),
    timeout: float | None = 30,
  ) -> predict_pb2.PredictResponse:
    request = request_of(inputs, name=name, signature=signature, output_filter=output_filter)
    if version is not None:
      request.model_spec.version.value = version
    if label:
      request.model_spec.version_label = label
    return self.prediction.Predict(request, timeout=timeout)

  def states(self, name: str, **spec) -> dict[int, int]:
    return {
      status.version: status.state for status in self.status(name, **spec).model_version_status
    }

  def status(self, name: str, **spec) -> get_model_status_pb2.GetModelStatusResponse:
    return self.models.GetModelStatus(
      get_model_status_pb2.GetModelStatusRequest(model_spec={"name": name, **spec}), timeout=30
    )

  def wait_for_states(self, name: str, wanted: dict[int, int]) -> None:
    end = time.monotonic() + 60
    while (got := self.states(name)) != wanted:
      assert time.monotonic() < end, f"got {got}, wanted {wanted}\n{self.log.read_text()}"
      time.sleep(0.05)

  def http(self, method: str, path: str, body=None) -> tuple[int, bytes]:
    """Status and body of one request."""
    status, text, _ = self.http_with_headers(method, path, body)
    return status, text

  def http_with_headers(
    self, method: str, path: str, body=None, **headers: str
  ) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", self.rest_port, timeout=60)
    body = json.dumps(body) if isinstance(body, (dict, list)) else body
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, text, dict(response.getheaders())

  def post(self, body, path: str = "/v1/models/toy:predict") -> tuple[int, dict]:
    status, text = self.http("POST", path, body)
    return status, json.loads(text)


def request_of(
  inputs: dict, *, name: str = "toy", signature: str = "", output_filter=()
) -> predict_pb2.PredictRequest:
  request = predict_pb2.PredictRequest(
    model_spec={"name": name, "signature_name": signature}, output_filter=output_filter
  )
  for key, value in inputs.items():
    request.inputs[key].CopyFrom(
      value if isinstance(value, tf.make_tensor_proto(0).__class__) else tf.make_tensor_proto(value)
    )
  return request


def start(log: pathlib.Path, *args: str, ports: tuple[int, int] | None = None) -> Server:
  port, rest_port = ports or free_ports(2)
  process = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "serving.model_server",
      f"--port={port}",
      f"--rest_api_port={rest_port}",
      *args,
    ],
    cwd=REPOSITORY,
    stdout=log.open("w"),
    stderr=subprocess.STDOUT,
    env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"},
  )
  return Server(process, log, port, rest_port)


CONFIG = """
model_config_list {{
  config {{ name: "toy" base_path: "{root}/toy" model_platform: "tensorflow" }}
  config {{ name: "two" base_path: "{root}/two" model_platform: "tensorflow"
    model_version_policy {{ specific {{ versions: 1 versions: 2 }} }}
    version_labels {{ key: "stable" value: 1 }} version_labels {{ key: "canary" value: 2 }} }}
  config {{ name: "all" base_path: "{root}/two" model_platform: "tensorflow"
    model_version_policy {{ all {{}} }} }}
}}
"""
BATCHING = """
max_batch_size {{ value: {max} }} batch_timeout_micros {{ value: 20000 }}
num_batch_threads {{ value: 2 }}
max_enqueued_batches {{ value: 100 }} {allowed}
"""


@dataclasses.dataclass
class Servers:
  root: pathlib.Path
  plain: Server
  batching: Server
  no_port: Server
  slow: Server  # its model's warm-up takes ten minutes
  taken: socket.socket
  early: dict[str, object]  # what `plain` answered before there was any model


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
  """Four processes, started together before there is any model.

  Most of their time goes into importing TensorFlow.
  """
  root = tmp_path_factory.mktemp("servers")
  (root / "models.config").write_text(CONFIG.format(root=root))
  (root / "batching.config").write_text(
    BATCHING.format(max=8, allowed="allowed_batch_sizes: 4 allowed_batch_sizes: 8")
  )
  taken = socket.create_server(("127.0.0.1", 0))
  poll = "--file_system_poll_wait_seconds=0.2"
  servers = Servers(
    root,
    plain=start(
      root / "plain.log",
      f"--model_config_file={root}/models.config",
      poll,
      "--grpc_max_threads=4",
      "--rest_api_timeout_in_ms=4000",
      "--max_waiting_requests=12",
      "--model_config_file_poll_wait_seconds=0.2",
      "--allow_version_labels_for_unavailable_models=true",
      f"--port_file={root}/port",
    ),
    batching=start(
      root / "batching.log",
      "--model_name=swap",
      f"--model_base_path={root}/swap",
      poll,
      "--enable_batching",
      f"--batching_parameters_file={root}/batching.config",
      "--enable_cors_support=true",
      f"--grpc_socket_path={root}/socket",
      "--rest_api_num_threads=8",
      "--tensorflow_intra_op_parallelism=2",
      "--num_load_threads=2",
      "--flush_filesystem_caches=false",
      "--per_process_gpu_memory_fraction=0.5",
    ),
    no_port=start(
      root / "no_port.log",
      f"--model_base_path={root}/toy",
      ports=(taken.getsockname()[1], free_ports(1)[0]),
    ),
    slow=start(root / "slow.log", "--model_name=slow", f"--model_base_path={root}/slow", poll),
    taken=taken,
    early={},
  )
  try:
    warm_up = [request_of({"x": np.zeros(4, np.float32)}, signature="count")] * 3
    for version in (1, 2, 3):
      save(Toy(version), str(root / f"version-{version}"), warm_up=warm_up)
    save(Toy(1), str(root / "slow/1"), warm_up=[request_of({"secs": [600.0]}, signature="slow")])
    servers.early.update(early_answers(servers.plain))
    for model, versions in {"two": [1, 2, 3], "toy": [1], "swap": [1]}.items():
      for version in versions:
        publish(str(root / f"version-{version}"), str(root / model / str(version)))
    servers.plain.wait(), servers.batching.wait()
    yield servers
  finally:
    for server in (servers.plain, servers.batching, servers.no_port, servers.slow):
      server.process.kill()
      server.process.wait()
    taken.close()


def early_answers(server: Server) -> dict[str, object]:
  """Waits until the server listens, and asks it."""
  grpc.channel_ready_future(server.channel).result(START_SECS)
  answers = {"health": server.health.Check(health_pb2.HealthCheckRequest()).status}
  for name, ask in {
    "predict": lambda: server.predict({"text": ["a"]}),
    "label": lambda: server.predict({}, name="two", label="stable"),
    "unknown": lambda: server.predict({}, name="nope"),
    "status": lambda: server.status("toy"),
  }.items():
    with pytest.raises(grpc.RpcError) as error:
      ask()
    answers[name] = error.value
  for path in ("", "/metadata", ":predict"):
    answers[path] = server.http(
      "POST" if path == ":predict" else "GET", f"/v1/models/toy{path}", {"instances": ["a"]}
    )
  return answers


@pytest.fixture(scope="module")
def plain(servers) -> Server:
  return servers.plain


# ============================================================================================ start


def test_a_server_listens_before_it_has_a_model_and_says_what_it_waits_for(servers):
  early, waits = (
    servers.early,
    f"base path '{servers.root}/toy' of model 'toy' is not a folder; waiting for it.",
  )
  assert early["health"] == health_pb2.HealthCheckResponse.NOT_SERVING
  for name, code, message in (
    ("predict", C.UNAVAILABLE, waits),
    ("label", C.UNAVAILABLE, "of model 'two' is not a folder"),
    ("unknown", C.NOT_FOUND, "Servable not found for request: Latest(nope)"),
    ("status", C.NOT_FOUND, "Could not find any versions of model toy"),
  ):
    assert (early[name].code(), message in early[name].details()) == (code, True), (
      name,
      early[name],
    )
  assert dict(early["unknown"].trailing_metadata())["models-bin"] == b"all, toy, two"
  for path in ("", "/metadata", ":predict"):
    status, body = early[path]
    assert (status, json.loads(body)) == (503, {"error": waits}), (
      f"REST {path or 'status'}: got {status} {body}"
    )
  assert (servers.root / "port").read_text() == f"{servers.plain.port}\n"


def test_while_a_model_is_loaded_the_server_says_so_and_can_be_stopped(servers):
  server = servers.slow
  grpc.channel_ready_future(server.channel).result(START_SECS)
  end, loading = time.monotonic() + 60, {"error": "version 1 of model 'slow' is being loaded."}
  while (got := server.http("GET", "/v1/models/slow")[1]) and json.loads(got) != loading:
    assert time.monotonic() < end, f"got {got}, wanted {loading}"
    time.sleep(0.05)
  assert server.states("slow")[1] in (State.START, State.LOADING)
  assert (
    server.health.Check(health_pb2.HealthCheckRequest()).status
    == health_pb2.HealthCheckResponse.NOT_SERVING
  )
  with pytest.raises(grpc.RpcError) as error:
    server.predict({"text": ["a"]}, name="slow")
  assert (error.value.code(), error.value.details()) == (C.UNAVAILABLE, loading["error"])
  server.process.send_signal(signal.SIGTERM)
  assert server.process.wait(60) == 0, "SIGTERM does not wait for a model that will not be used"


PAIR_MODEL = "realm"


class Answerer(tf.Module):
  """Signature `answer` with constant outputs."""

  @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "question")])
  def answer(self, question):
    rows = tf.shape(question)[0]
    return {
      name: tf.repeat(tf.constant(values), rows, axis=0)
      for name, values in canned_answers.answer_outputs(["q"]).items()
    }


def test_the_server_and_the_client_may_be_started_together(tmp_path):
  """The lines of docs/serving.md, pasted together: no port, then no model, then answers.

  An error that will not pass ends at once.
  """
  port, base = free_ports(1)[0], tmp_path / "models"
  server = start(
    tmp_path / "log",
    f"--model_name={PAIR_MODEL}",
    f"--model_base_path={base}",
    "--file_system_poll_wait_seconds=0.2",
    ports=(port, free_ports(1)[0]),
  )
  asking = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "serving.client",
      f"--server=localhost:{port}",
      "--question=who wrote Übermut",
      "--timeout_secs=200",
    ],
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    encoding="utf-8",
    env={**os.environ, "COLUMNS": "100", "PYTHONUTF8": "1"},
  )
  try:
    model = Answerer()
    tf.saved_model.save(model, str(tmp_path / "1"), signatures={"answer": model.answer})
    grpc.channel_ready_future(server.channel).result(START_SECS)
    started = time.monotonic()
    for name, timeout_secs, wanted in (
      ("other", 60, ["it has no model 'other'", "Models there: realm."]),
      (PAIR_MODEL, 1, ["model 'realm' is not ready", "Gave up after 1 s", "waiting for it."]),
    ):
      client = serving_client.Client(
        f"localhost:{port}", model_name=name, timeout_secs=timeout_secs
      )
      with pytest.raises(serving_client.ClientError) as error:
        client.answer(["q"])
      assert all(words in str(error.value) for words in wanted), (
        f"{name}: got {error.value}, wanted {wanted}"
      )
    assert time.monotonic() - started < 20, "a wrong model name ends at once"
    base.mkdir()
    os.rename(tmp_path / "1", base / "1")
    out, err = asking.communicate(timeout=60)
    assert (asking.returncode, out) == (0, canned_answers.ANSWERS_TEXT), err
    lines = err.splitlines()
    assert "nothing answers there" in lines[0] and "is not ready. Waiting" in lines[1], err
    assert len(lines) == 2 or len(lines) == 3 and "is still being loaded. Waiting" in lines[2], err
    server.wait()
    with pytest.raises(
      serving_client.ClientError,
      match=r"no model 'realm', version 9. Versions there: 1 \(available\)",
    ):
      serving_client.Client(f"localhost:{port}", version=9).answer(["q"])
    with pytest.raises(
      serving_client.ClientError, match="that is an HTTP port; gRPC is usually at 8500"
    ):
      serving_client.Client(f"localhost:{server.rest_port}").answer(["q"])
  finally:
    for process in (asking, server.process):
      process.kill()
      process.wait()


# ============================================================================================ flags

# Every flag of tensorflow_model_server, from model_servers/main.cc of version 2.20, with a typical
# value.
TENSORFLOW_SERVINGS = """
port=8500 grpc_socket_path=/tmp/s rest_api_port=8501 rest_api_num_threads=8
rest_api_timeout_in_ms=30000 rest_api_enable_cors_support=true enable_batching=true
allow_version_labels_for_unavailable_models=true batching_parameters_file=b
enable_per_model_batching_parameters=false model_config_file=m
model_config_file_poll_wait_seconds=60 model_name=realm model_base_path=/models/realm
num_load_threads=4 num_unload_threads=4 max_num_load_retries=5 load_retry_interval_micros=60000000
file_system_poll_wait_seconds=1 flush_filesystem_caches=true tensorflow_session_parallelism=0
tensorflow_session_config_file=s tensorflow_intra_op_parallelism=2 tensorflow_inter_op_parallelism=2
use_alts_credentials=false ssl_config_file=ssl platform_config_file=p
per_process_gpu_memory_fraction=0.5 saved_model_tags=serve,gpu
grpc_channel_arguments=grpc.max_connection_age_ms=2000 grpc_max_threads=40 enable_model_warmup=true
num_request_iterations_for_warmup=2 version=false monitoring_config_file=m
remove_unused_fields_from_bundle_metagraph=true prefer_tflite_model=false num_tflite_pools=1
num_tflite_interpreters_per_pool=1 enable_signature_method_name_check=false
xla_cpu_compilation_enabled=true xla_gpu_compilation_enabled=true enable_profiler=true
thread_pool_factory_config_file=t mixed_precision=bfloat16 skip_initialize_tpu=false
enable_grpc_healthcheck_service=true enable_serialization_as_tensor_content=true
enable_cors_support=true
""".split()


def parsed(*words: str):
  values = server_flags.flags.FlagValues()
  server_flags.define(values)
  values(["model_server", *words])
  return values


def test_every_flag_of_tensorflow_model_server_is_taken():
  args = parsed(*(f"--{word}" for word in TENSORFLOW_SERVINGS), "-enable_profiler")
  assert (
    args.saved_model_tags,
    args.rest_api_num_threads,
    args.per_process_gpu_memory_fraction,
  ) == ("serve,gpu", 8, 0.5)
  assert args.rest_api_enable_cors_support and args.enable_profiler
  ignored = server_flags.without_effect(args)
  assert "num_load_threads" in ignored and not {
    "saved_model_tags",
    "ssl_config_file",
    "max_num_load_retries",
  } & set(ignored)
  assert not server_flags.without_effect(parsed())
  with pytest.raises(
    server_flags.flags.UnrecognizedFlagError, match="Did you mean: rest_api_num_threads"
  ):
    parsed("--rest_api_num_thread=8")
  with pytest.raises(artifacts.UserError, match="use_alts_credentials is not supported"):
    model_server.check_flags(parsed("--use_alts_credentials"))
  with pytest.raises(artifacts.UserError, match="both 8501; they must differ"):
    model_server.check_flags(parsed("--port=8501", "--rest_api_port=8501"))
  with pytest.raises(artifacts.UserError, match="tensorflow_intra_op_parallelism"):
    model_server.set_threads(
      parsed("--tensorflow_session_parallelism=1", "--tensorflow_intra_op_parallelism=1")
    )
  assert server_config.channel_arguments("grpc.max_connection_age_ms=2000,grpc.name=a") == [
    ("grpc.max_connection_age_ms", 2000),
    ("grpc.name", "a"),
  ]
  with pytest.raises(artifacts.UserError, match="got 'grpc.x', wanted KEY=VALUE"):
    server_config.channel_arguments("grpc.x")


def test_what_has_no_effect_is_named_once(servers):
  lines = [line for line in servers.batching.log.read_text().splitlines() if "no effect" in line]
  assert len(lines) == 1 and lines[0].endswith(
    "no effect in this server: "
    "--flush_filesystem_caches, --num_load_threads, --per_process_gpu_memory_fraction"
  ), lines


def test_grpc_over_a_unix_socket(servers):
  with grpc.insecure_channel(f"unix:{servers.root}/socket") as channel:
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
  assert health.status == health_pb2.HealthCheckResponse.SERVING


def certificate(path: pathlib.Path) -> tuple[str, str]:
  """Makes a key and self-signed certificate of localhost, as PEM."""
  x509 = pytest.importorskip("cryptography.x509")
  from cryptography.hazmat.primitives import hashes, serialization
  from cryptography.hazmat.primitives.asymmetric import ec

  key = ec.generate_private_key(ec.SECP256R1())
  name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
  now = datetime.datetime.now(datetime.UTC)
  signed = (
    x509.CertificateBuilder(
      name,
      name,
      key.public_key(),
      x509.random_serial_number(),
      now - datetime.timedelta(days=1),
      now + datetime.timedelta(days=1),
    )
    .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    .sign(key, hashes.SHA256())
  )
  private = key.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
  )
  return private.decode(), signed.public_bytes(serialization.Encoding.PEM).decode()


def test_grpc_over_tls(tmp_path):
  key, signed = certificate(tmp_path)
  config = tmp_path / "ssl.config"
  config.write_text(f"server_key: {json.dumps(key)} server_cert: {json.dumps(signed)}")
  server = start(
    tmp_path / "log", f"--ssl_config_file={config}", f"--model_base_path={tmp_path}/nothing"
  )
  try:
    credentials = grpc.ssl_channel_credentials(signed.encode())
    with (
      grpc.secure_channel(f"localhost:{server.port}", credentials) as secure,
      grpc.insecure_channel(f"localhost:{server.port}") as insecure,
    ):

      def ask(channel):
        return (
          health_pb2_grpc.HealthStub(channel)
          .Check(health_pb2.HealthCheckRequest(), timeout=10)
          .status
        )

      grpc.channel_ready_future(secure).result(START_SECS)
      assert ask(secure) == health_pb2.HealthCheckResponse.NOT_SERVING  # there is no model
      with pytest.raises(grpc.RpcError):
        ask(insecure)
  finally:
    server.process.kill()
    server.process.wait()
  config.write_text("server_key: 'k'")
  with pytest.raises(artifacts.UserError, match="needs server_key and server_cert"):
    server_config.server_credentials(str(config))
  config.write_text("server_key: 'k' server_cert: 'c' client_verify: true")
  with pytest.raises(artifacts.UserError, match="client_verify needs custom_ca"):
    server_config.server_credentials(str(config))


def test_cors(servers):
  """Preflight requests are answered as by TensorFlow Serving.

  The answer is 200 with the headers, 200 without them if CORS is off, and 400 without an origin.
  """
  names = (
    "Access-Control-Allow-Origin",
    "Access-Control-Allow-Methods",
    "Access-Control-Allow-Headers",
  )
  for server, model, values in (
    (servers.batching, "swap", ("*", "POST, GET", "Content-Type")),
    (servers.plain, "toy", (None,) * 3),
  ):
    path = f"/v1/models/{model}"
    for method, headers, wanted in (
      ("OPTIONS", {"Origin": "https://page.example"}, 200),
      ("OPTIONS", {}, 400),
      ("GET", {}, 200),
    ):
      status, body, got = server.http_with_headers(method, path, **headers)
      assert status == wanted and tuple(map(got.get, names)) == values, (
        model,
        method,
        headers,
        status,
        got,
      )
      assert bool(body) == (method == "GET"), (model, method, body)


# ============================================================================================= gRPC


def test_predict(plain):
  response = plain.predict({"text": ["aé", "b\xff"]})
  assert set(response.outputs) == {"raw_bytes", "upper"}
  assert list(response.outputs["upper"].string_val) == ["Aé".encode(), "B\xff".encode()]
  spec = response.model_spec
  assert (spec.name, spec.version.value, spec.signature_name) == ("toy", 1, "serving_default")
  response = plain.predict({"x": [[1.0, 2.0], [3.0, 4.0]], "bias": [0.5, -1.0]}, signature="affine")
  assert list(response.outputs["y"].float_val) == [6.5, 13.0]
  assert response.model_spec.signature_name == "affine"


def test_predict_returns_what_output_filter_names(plain):
  response = plain.predict({"text": ["a"]}, output_filter=["upper"])
  assert list(response.outputs) == ["upper"]


def test_strings_are_bytes(plain):
  raw = b"\xff\x00\xfe ok\x00"
  response = plain.predict({"text": [raw, b""]})
  assert list(response.outputs["raw_bytes"].string_val) == [raw, b""]


def test_every_type_stands_in_its_own_field(plain):
  response = plain.predict({"x": np.array([[1, 0, 3]])}, signature="every_type")
  for name, proto in response.outputs.items():
    got = tf.make_ndarray(proto)
    assert tf.as_dtype(proto.dtype).name == name and got.shape == (1, 3)
    np.testing.assert_array_equal(got.astype(np.int64), [[1, 0, 1 if name == "bool" else 3]], name)
    assert bool(proto.tensor_content) == (name in ("float16", "bfloat16")), name
  scalar = plain.predict({"x": np.int64(7)}, signature="every_type").outputs["int64"]
  assert scalar.HasField("tensor_shape") and list(scalar.int64_val) == [7]


def test_an_empty_batch_is_answered(plain):
  response = plain.predict({"x": np.zeros(0, np.int32)}, signature="versioned")
  assert tf.make_ndarray(response.outputs["x"]).shape == (0,)


X = np.ones([1, 2], np.float32)
BIAS = np.ones(1, np.float32)
HUGE = tf.make_tensor_proto(np.ones(1, np.int32))
HUGE.tensor_shape.dim[0].size = 1 << 40
UNKNOWN_DTYPE = tf.make_tensor_proto(np.ones(1, np.int32))
UNKNOWN_DTYPE.dtype = 0
LOUD = "x" * 100_000


@pytest.mark.parametrize(
  "inputs, call, code, message",
  [
    (
      {"text": ["a"]},
      dict(name="nope"),
      C.NOT_FOUND,
      "Servable not found for request: Latest(nope)",
    ),
    ({"text": ["a"]}, dict(name=""), C.INVALID_ARGUMENT, "ModelSpec has no name specified."),
    (
      {"text": ["a"]},
      dict(version=9),
      C.NOT_FOUND,
      "Servable not found for request: Specific(toy, 9)",
    ),
    (
      {"text": ["a"]},
      dict(version=-1),
      C.NOT_FOUND,
      "Servable not found for request: Specific(toy, -1)",
    ),
    (
      {"text": ["a"]},
      dict(label="nope"),
      C.INVALID_ARGUMENT,
      "Unrecognized servable version label: nope",
    ),
    (
      {"text": ["a"]},
      dict(signature="nope"),
      C.FAILED_PRECONDITION,
      'Serving signature key "nope" not found.',
    ),
    (
      {},
      {},
      C.INVALID_ARGUMENT,
      "input size does not match signature: 0!=1 len({}) != len({text}). "
      "Sent extra: {}. Missing but required: {text}.",
    ),
    (
      {"text": ["a"], "b": [1]},
      {},
      C.INVALID_ARGUMENT,
      "input size does not match signature: 2!=1 len({b,text}) != len({text}). "
      "Sent extra: {b}. Missing but required: {}.",
    ),
    (
      {"txet": ["a"]},
      {},
      C.INVALID_ARGUMENT,
      "Signature input alias: text(feed name: serving_default_text:0) "
      "not found in request and no default value provided.",
    ),
    ({"text": [1.0]}, {}, C.INVALID_ARGUMENT, "Expects arg[0] to be string but float is provided"),
    (
      {"x": X.astype(int), "bias": BIAS},
      dict(signature="affine"),
      C.INVALID_ARGUMENT,
      "Expects arg[1] to be float but int64 is provided",
    ),
    (
      {"text": [["a"]]},
      {},
      C.INVALID_ARGUMENT,
      'input "text" has shape [1, 1]; the signature wants [-1]',
    ),
    (
      {"x": np.ones([1, 3], np.float32), "bias": BIAS},
      dict(signature="affine"),
      C.INVALID_ARGUMENT,
      'input "x" has shape [1, 3]; the signature wants [-1, 2]',
    ),
    (
      {"x": X, "bias": np.ones(3, np.float32)},
      dict(signature="picky"),
      C.INVALID_ARGUMENT,
      "Sent extra: {bias}",
    ),
    ({"x": HUGE}, dict(signature="versioned"), C.INVALID_ARGUMENT, "tensor parsing error: x"),
    (
      {"x": UNKNOWN_DTYPE},
      dict(signature="versioned"),
      C.INVALID_ARGUMENT,
      "tensor parsing error: x",
    ),
    (
      {"text": ["a"]},
      dict(output_filter=["nope"]),
      C.INVALID_ARGUMENT,
      "output tensor alias not found in signature: nope "
      "Outputs expected to be in the set {raw_bytes,upper}.",
    ),
    (
      {"text": ["a"]},
      dict(output_filter=["upper", "upper"]),
      C.INVALID_ARGUMENT,
      "duplicate output tensor alias: upper",
    ),
    ({"x": [-1.0]}, dict(signature="picky"), C.INVALID_ARGUMENT, "x must not be negative"),
    # an error too long for gRPC
    (
      {"text": ["a"]},
      dict(signature=LOUD),
      C.FAILED_PRECONDITION,
      "Serving signature key",
    ),
    ({"secs": [1.0]}, dict(signature="slow", timeout=0.001), C.DEADLINE_EXCEEDED, ""),
  ],
  ids=lambda value: str(value)[:60],
)
def test_grpc_status(plain, inputs, call, code, message):
  with pytest.raises(grpc.RpcError) as error:
    plain.predict(inputs, **call)
  assert error.value.code() == code
  assert message in error.value.details()


def test_a_request_of_100_mb_is_refused(plain):
  text = "x" * 100_000_000
  with pytest.raises(grpc.RpcError) as error:
    plain.predict({"text": [text]})
  assert error.value.code() == C.RESOURCE_EXHAUSTED
  status, body = plain.post({"instances": [text]})
  assert (status, "too large" in body["error"]) == (413, True), body
  assert (
    plain.predict({"text": [text[:10_000_000]]}, output_filter=["upper"])
    .outputs["upper"]
    .string_val[0]
    == b"X" * 10_000_000
  )


def test_grpc_status_of_the_other_methods(plain):
  spec = model_pb2.ModelSpec(name="toy")
  calls = {
    "Predict": (
      plain.prediction.Predict,
      predict_pb2.PredictRequest(),
      C.INVALID_ARGUMENT,
      "Missing ModelSpec",
    ),
    "Classify": (
      plain.prediction.Classify,
      classification_pb2.ClassificationRequest(model_spec=spec),
      C.UNIMPLEMENTED,
      "",
    ),
    "Regress": (
      plain.prediction.Regress,
      regression_pb2.RegressionRequest(model_spec=spec),
      C.UNIMPLEMENTED,
      "",
    ),
    "MultiInference": (
      plain.prediction.MultiInference,
      inference_pb2.MultiInferenceRequest(),
      C.UNIMPLEMENTED,
      "",
    ),
    "GetModelMetadata": (
      plain.prediction.GetModelMetadata,
      get_model_metadata_pb2.GetModelMetadataRequest(model_spec=spec),
      C.INVALID_ARGUMENT,
      "must specify at least one metadata_field",
    ),
    "GetModelStatus": (
      plain.models.GetModelStatus,
      get_model_status_pb2.GetModelStatusRequest(model_spec={"name": "nope"}),
      C.NOT_FOUND,
      "Could not find any versions of model nope",
    ),
    "GetModelStatus of a version": (
      plain.models.GetModelStatus,
      get_model_status_pb2.GetModelStatusRequest(
        model_spec={"name": "toy", "version": {"value": 7}}
      ),
      C.NOT_FOUND,
      "Could not find version 7 of model toy",
    ),
    "HandleReloadConfigRequest": (
      plain.models.HandleReloadConfigRequest,
      model_management_pb2.ReloadConfigRequest(),
      C.INVALID_ARGUMENT,
      "model_config_list",
    ),
  }
  for name, (method, request, code, message) in calls.items():
    with pytest.raises(grpc.RpcError) as error:
      method(request, timeout=30)
    assert (error.value.code(), message in error.value.details()) == (code, True), (
      f"{name}: {error.value.details()}"
    )


def test_a_request_whose_deadline_has_passed_is_not_run(plain):
  """Four threads are kept busy; requests with a shorter deadline are dropped, not run late."""
  before = plain.predict({"x": [0.0]}, signature="count").outputs["runs"].int_val[0]
  with concurrent.futures.ThreadPoolExecutor(12) as threads:
    busy = [threads.submit(plain.predict, {"secs": [1.0]}, signature="slow") for _ in range(4)]
    time.sleep(0.4)
    late = [
      threads.submit(plain.predict, {"x": [0.0]}, signature="count", timeout=0.2) for _ in range(8)
    ]
    codes = [future.exception().code() for future in late]
    [future.result() for future in busy]
  after = plain.predict({"x": [0.0]}, signature="count").outputs["runs"].int_val[0]
  assert codes == [C.DEADLINE_EXCEEDED] * 8
  assert after == before + 1


def test_more_requests_than_may_wait_are_refused(plain):
  """With 4 requests running and 12 waiting, the rest is refused.

  Of 24 that come after the 4, gRPC refuses some at once, and so does REST.
  """

  def ask(_):
    try:
      plain.predict({"x": [0]}, signature="versioned", timeout=60)
      return C.OK
    except grpc.RpcError as error:
      return error.code()

  def post(_):
    return plain.post({"signature_name": "versioned", "instances": [0]})[0]

  with concurrent.futures.ThreadPoolExecutor(28) as threads:
    busy = [
      threads.submit(plain.predict, {"secs": [1.5]}, signature="slow", timeout=60) for _ in range(4)
    ]
    time.sleep(0.3)
    codes = list(threads.map(ask, range(24)))
    [future.result() for future in busy]
    busy = [
      threads.submit(plain.post, {"signature_name": "slow", "instances": [1.5]}) for _ in range(4)
    ]
    time.sleep(0.3)
    statuses = list(threads.map(post, range(24)))
    [future.result() for future in busy]
  assert set(codes) == {C.OK, C.RESOURCE_EXHAUSTED}
  # 504: on a busy machine
  assert {200, 429} <= set(statuses) <= {200, 429, 504}


def test_warm_up_requests_were_run(plain):
  runs = (
    plain.predict({"x": [0.0]}, name="two", version=1, signature="count").outputs["runs"].int_val[0]
  )
  assert runs == 4  # three at startup, and this one


def test_metadata(plain):
  response = plain.prediction.GetModelMetadata(
    get_model_metadata_pb2.GetModelMetadataRequest(
      model_spec={"name": "toy"}, metadata_field=["signature_def"]
    ),
    timeout=30,
  )
  signatures = get_model_metadata_pb2.SignatureDefMap()
  assert response.metadata["signature_def"].Unpack(signatures)
  affine = signatures.signature_def["affine"]
  assert (response.model_spec.name, response.model_spec.version.value) == ("toy", 1)
  assert affine.inputs["x"].dtype == tf.float32.as_datatype_enum
  assert [dim.size for dim in affine.inputs["x"].tensor_shape.dim] == [-1, 2]
  assert affine.method_name == "tensorflow/serving/predict"


def test_health_and_reflection(plain):
  for service in ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"):
    assert (
      plain.health.Check(health_pb2.HealthCheckRequest(service=service)).status
      == health_pb2.HealthCheckResponse.SERVING
    )
  database = proto_reflection_descriptor_database.ProtoReflectionDescriptorDatabase(plain.channel)
  services = set(database.get_services())
  assert {
    "tensorflow.serving.PredictionService",
    "tensorflow.serving.ModelService",
    "grpc.health.v1.Health",
  } <= services
  for service, method in (
    ("PredictionService", "Predict"),
    ("ModelService", "HandleReloadConfigRequest"),
  ):
    file = database.FindFileContainingSymbol(f"tensorflow.serving.{service}")
    assert method in [m.name for s in file.service for m in s.method]


# ============================================================================================= REST


def test_rest_predict(plain):
  encoded = {"b64": base64.b64encode("aé".encode()).decode()}
  assert plain.post({"instances": ["aé"]}) == (
    200,
    {"predictions": [{"raw_bytes": encoded, "upper": "Aé"}]},
  )
  affine = {"signature_name": "affine"}
  rows = [{"x": [1, 2], "bias": 0.5}, {"x": [3, 4], "bias": -1.0}]
  assert plain.post({**affine, "instances": rows}) == (200, {"predictions": [6.5, 13.0]})
  assert plain.post({**affine, "inputs": {"x": [[1, 2], [3, 4]], "bias": [0.5, -1]}}) == (
    200,
    {"outputs": [6.5, 13.0]},
  )
  # a scalar
  assert plain.post({"signature_name": "every_type", "inputs": 3})[1]["outputs"]["int64"] == 3
  assert (
    plain.post({"signature_name": "count", "inputs": [1.0]}, "/v1/models/toy/versions/1:predict")[0]
    == 200
  )


def test_rest_floats_are_as_tensorflow_serving_writes_them(plain):
  body = (
    '{"signature_name": "affine", "instances": ['
    + ", ".join(
      f'{{"x": [{x}, 0], "bias": 0}}'
      for x in ("0.1", "0.3345345", "1e20", "3", "NaN", "Infinity", "-Infinity", "4.5e-7")
    )
    + "]}"
  )
  status, text = plain.http("POST", "/v1/models/toy:predict", body)
  got = [item.strip() for item in text.decode().split("[")[1].split("]")[0].split(",")]
  assert (status, got) == (
    200,
    ["0.2", "0.669069", "2e+20", "6.0", "NaN", "Infinity", "-Infinity", "9e-07"],
  )
  status, text = plain.http(
    "POST", "/v1/models/toy:predict", '{"signature_name": "picky", "instances": [2]}'
  )
  assert b"[1.41421354" in text  # the nine digits of the float32


def test_rest_strings_that_are_not_utf8(plain):
  raw = b"\xff\xfe ok"
  status, text = plain.http(
    "POST", "/v1/models/toy:predict", {"instances": [{"b64": base64.b64encode(raw).decode()}]}
  )
  assert status == 200 and b'"upper": "\xff\xfe OK"' in text, text  # as they are
  assert base64.b64encode(raw) in text  # raw_bytes is base64
  assert plain.http("POST", "/v1/models/toy:predict", b'{"instances": ["' + raw + b'"]}') == (
    status,
    text,
  )


PREDICT = "/v1/models/toy:predict"


@pytest.mark.parametrize(
  "body, status, message",
  [
    (
      {"instances": ["a"], "signature_name": "nope"},
      400,
      'Serving signature name: "nope" not found in signature def',
    ),
    (
      {"instances": ["a"], "signature_name": 1},
      400,
      "'signature_name' key must be a string value.",
    ),
    ("", 400, "JSON Parse error: The document is empty"),
    ('{"instances": [1', 400, "JSON Parse error: "),
    ("[" * 100_000, 400, "JSON Parse error: "),
    (["a"], 400, "Is not object"),
    ({}, 400, "Missing 'inputs' or 'instances' key"),
    (
      {"instances": ["a"], "inputs": ["a"]},
      400,
      "expecting only one of 'inputs' or 'instances' keys to exist",
    ),
    ({"instances": "a"}, 400, "Excepting 'instances' to be an list/array"),
    ({"instances": []}, 400, "No values in 'instances' array"),
    ({"instances": [1]}, 400, "JSON Value: 1 Type: Number is not of expected type: string"),
    (
      {"instances": [{"txet": "a"}]},
      400,
      "Failed to process element: 0 key: txet of 'instances' list. Error: INVALID_ARGUMENT: "
      "JSON object: does not have named input: txet",
    ),
    (
      {"instances": ["a", ["b"]]},
      400,
      "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: "
      "Expecting shape [] but got: [1]",
    ),
    (
      {"instances": ["a", {"text": "b"}]},
      400,
      "Expecting value/list but got object at item 1 of input list",
    ),
    ({"instances": [{"b64": "*"}]}, 400, "Unable to base64 decode"),
    (
      '{"instances": ["\\ud800"]}',
      400,
      "JSON Parse error: The surrogate pair in string is invalid.",
    ),
    ({"instances": [["a"]]}, 400, 'input "text" has shape [1, 1]; the signature wants [-1]'),
    (
      {"signature_name": "affine", "instances": [1]},
      400,
      "expecting list of objects as multiple input tensors required",
    ),
    (
      {"signature_name": "affine", "instances": [{"x": [1, 2]}]},
      400,
      "keys must be equal to: bias,x",
    ),
    (
      {"signature_name": "affine", "inputs": {"x": [[1, 2]]}},
      400,
      "Missing named input: bias in 'inputs' object.",
    ),
    (
      {"signature_name": "affine", "inputs": {"x": [[1, 2], [3]], "bias": [1]}},
      400,
      "Encountered list at unexpected size: 1 at level: 1 expected size: 2",
    ),
    (
      {"signature_name": "affine", "inputs": {"x": [[1, 2], 3], "bias": [1]}},
      400,
      "JSON Value: 3 found at incorrect level: 2 in the JSON DOM. Expected at level: 2",
    ),
    (
      {"signature_name": "count", "inputs": ["1"]},
      400,
      'JSON Value: "1" Type: String is not of expected type: float',
    ),
    (
      {"signature_name": "count", "inputs": [True]},
      400,
      "Type: True is not of expected type: float",
    ),
    (
      {"signature_name": "count", "inputs": [None]},
      400,
      "Type: Null is not of expected type: float",
    ),
    ({"signature_name": "count", "inputs": [1e39]}, 400, "to float without loss of precision."),
    ({"signature_name": "count", "inputs": [1 << 24]}, 400, "to float without loss of precision."),
    (
      {"signature_name": "versioned", "inputs": [1.0]},
      400,
      "Type: Number is not of expected type: int32",
    ),
    (
      {"signature_name": "versioned", "inputs": [1 << 31]},
      400,
      "Type: Number is not of expected type: int32",
    ),
    ({"signature_name": "picky", "instances": [-1]}, 400, "x must not be negative"),
    ({"signature_name": "slow", "instances": [6.0]}, 504, "no answer within 4 s."),
  ],
  ids=lambda value: str(value)[:60],
)
def test_rest_status_of_predict(plain, body, status, message):
  check_rest_status(plain, "POST", PREDICT, body, status, message)


@pytest.mark.parametrize(
  "method, path, body, status, message",
  [
    (
      "POST",
      "/v1/models/nope:predict",
      {"instances": ["a"]},
      404,
      "Servable not found for request: Latest(nope)",
    ),
    (
      "POST",
      "/v1/models/toy/versions/9:predict",
      {"instances": ["a"]},
      404,
      "Servable not found for request: Specific(toy, 9)",
    ),
    (
      "POST",
      "/v1/models/toy/versions/99999999999999999999:predict",
      {"instances": ["a"]},
      400,
      "Failed to convert version",
    ),
    (
      "POST",
      "/v1/models/toy/labels/nope:predict",
      {"instances": ["a"]},
      400,
      "Unrecognized servable version label: nope",
    ),
    ("POST", "/v1/models/toy:classify", {}, 501, "does not support classify"),
    ("POST", "/v1/models/toy:nope", {}, 400, "Malformed request: POST /v1/models/toy:nope"),
    ("POST", "/v1/models/toy", {}, 400, "Malformed request: POST /v1/models/toy"),
    ("GET", PREDICT, None, 400, "Malformed request: GET /v1/models/toy:predict"),
    ("DELETE", PREDICT, None, 400, "Malformed request: DELETE /v1/models/toy:predict"),
    ("GET", "/v1/models", None, 400, "Missing model name in request."),
    ("GET", "/v1/models/nope", None, 404, "Could not find any versions of model nope"),
    ("GET", "/v1/models/nope/metadata", None, 404, "Servable not found for request: Latest(nope)"),
    ("GET", "/v1/models/toy/versions/9", None, 404, "Could not find version 9 of model toy"),
  ],
  ids=lambda value: str(value)[:60],
)
def test_rest_status_of_urls(plain, method, path, body, status, message):
  check_rest_status(plain, method, path, body, status, message)


def check_rest_status(plain, method, path, body, status, message):
  got, text = plain.http(method, path, body)
  assert got == status, text[:300]
  assert message in json.loads(text)["error"]


def test_rest_of_another_path_is_not_found(plain):
  assert plain.http("GET", "/index.html")[0] == 404


def test_rest_model_status_and_metadata(plain):
  available = {
    "version": "1",
    "state": "AVAILABLE",
    "status": {"error_code": "OK", "error_message": ""},
  }
  for path in ("/v1/models/toy", "/v1/models/toy/versions/1", "/V1/Models/toy"):
    status, text = plain.http("GET", path)
    assert (status, json.loads(text)) == (200, {"model_version_status": [available]})
  status, text = plain.http("GET", "/v1/models/toy/metadata")
  metadata = json.loads(text)
  assert (status, metadata["model_spec"]) == (
    200,
    {"name": "toy", "signature_name": "", "version": "1"},
  )
  assert metadata["metadata"]["signature_def"]["signature_def"]["affine"]["inputs"]["x"] == {
    "dtype": "DT_FLOAT",
    "name": "affine_x:0",
    "tensor_shape": {
      "dim": [{"size": "-1", "name": ""}, {"size": "2", "name": ""}],
      "unknown_rank": False,
    },
  }


def test_metrics(plain):
  """The metrics page parses, has TensorFlow Serving's names and labels, and counts requests."""

  def samples():
    status, text = plain.http("GET", "/monitoring/prometheus/metrics")
    assert status == 200
    # the parser adds a suffix
    assert b':tensorflow:serving:request_count{model_name="two",status="OK"}' in text
    return {
      (sample.name, *sorted(sample.labels.items())): sample.value
      for family in parser.text_string_to_metric_families(text.decode())
      for sample in family.samples
    }

  def count(status):
    return (
      ":tensorflow:serving:request_count_total",
      ("model_name", "two"),
      ("status", status),
    )

  def latency(api, entrypoint):
    return (
      ":tensorflow:serving:request_latency_count",
      ("API", api),
      ("entrypoint", entrypoint),
      ("model_name", "two"),
    )

  runtime = (
    ":tensorflow:serving:runtime_latency_count",
    ("API", "Predict"),
    ("model_name", "two"),
    ("runtime", "TF1"),
  )
  plain.predict({"text": ["a"]}, name="two")
  before = samples()
  plain.predict({"text": ["a"]}, name="two")
  plain.post({"instances": ["a"]}, "/v1/models/two:predict")
  with pytest.raises(grpc.RpcError):
    plain.predict({"text": [1.0]}, name="two")
  after = samples()
  for key, more in (
    (count("OK"), 2),
    (count("INVALID_ARGUMENT"), 1),
    (runtime, 2),
    (latency("Predict", "GRPC"), 1),
    (latency("predict", "REST"), 1),
  ):
    assert after[key] == before.get(key, 0) + more, key
  assert not [key for key in after if ("model_name", "nope") in key], (
    "clients must not create metrics"
  )


# ========================================================================================= batching


def test_batches_of_concurrent_requests(servers):
  """All answers are right, in fewer runs than requests; batches are padded only as allowed."""
  server, rng = servers.batching, np.random.default_rng(0)
  xs = [rng.integers(0, 1 << 30, size, np.int32) for size in rng.integers(1, 4, 200)]
  with concurrent.futures.ThreadPoolExecutor(16) as threads:
    responses = list(
      threads.map(lambda x: server.predict({"x": x}, name="swap", signature="versioned"), xs)
    )
  sizes = [response.outputs["batch_size"].int_val[0] for response in responses]
  for x, response in zip(xs, responses, strict=True):
    assert list(response.outputs["x"].int_val) == x.tolist()
  assert set(sizes) <= {4, 8}
  assert sizes.count(8) > 50


def test_a_bad_request_does_not_fail_its_neighbours(servers):
  def ask(i):
    x = -1.0 if i % 10 == 0 else float(i * i)
    try:
      return (
        servers.batching.predict({"x": [x]}, name="swap", signature="picky")
        .outputs["root"]
        .float_val[0]
      )
    except grpc.RpcError as error:
      return error.code()

  with concurrent.futures.ThreadPoolExecutor(16) as threads:
    answers = list(threads.map(ask, range(100)))
  assert answers == [C.INVALID_ARGUMENT if i % 10 == 0 else float(i) for i in range(100)]


def test_different_shapes_and_signatures_do_not_mix(servers):
  def ask(i):
    shape = [1 + i % 3, 1 + i % 4]
    x = np.full(shape, i, np.int64)
    response = servers.batching.predict({"x": x}, name="swap", signature="every_type")
    return np.array_equal(tf.make_ndarray(response.outputs["int64"]), x)

  with concurrent.futures.ThreadPoolExecutor(16) as threads:
    assert all(threads.map(ask, range(60)))


# ========================================================================================= versions


def test_policies_and_labels(plain):
  assert plain.states("toy") == {1: State.AVAILABLE}
  assert plain.states("two") == {1: State.AVAILABLE, 2: State.AVAILABLE}
  assert plain.states("all") == {1: State.AVAILABLE, 2: State.AVAILABLE, 3: State.AVAILABLE}

  def ask(**spec):
    return plain.predict({"x": [1]}, name=spec.pop("name", "two"), signature="versioned", **spec)

  assert [ask(label=label).outputs["version"].int_val[0] for label in ("stable", "canary")] == [
    1,
    2,
  ]
  assert ask(label="canary").model_spec.version.value == 2
  assert [
    ask(name="all", version=version).outputs["version"].int_val[0] for version in (1, 2, 3)
  ] == [1, 2, 3]
  assert ask(name="all").outputs["version"].int_val[0] == 3
  status, body = plain.post(
    {"signature_name": "versioned", "inputs": [5]}, "/v1/models/two/labels/stable:predict"
  )
  assert (status, body["outputs"]["version"]) == (200, [1])
  assert (
    json.loads(plain.http("GET", "/v1/models/two/labels/canary")[1])["model_version_status"][0][
      "version"
    ]
    == "2"
  )


def test_reload_config(servers):
  """Changes a label, adds a model and removes one; a wrong config changes nothing."""
  plain, root = servers.plain, servers.root
  config = text_format.Parse(
    CONFIG.format(root=root), model_management_pb2.ReloadConfigRequest().config
  )

  def reload(config):
    return plain.models.HandleReloadConfigRequest(
      model_management_pb2.ReloadConfigRequest(config=config), timeout=60
    )

  def version(**spec):
    return plain.predict({"x": [1]}, signature="versioned", **spec).outputs["version"].int_val[0]

  wrong = type(config)()
  wrong.CopyFrom(config)
  wrong.model_config_list.config[1].version_labels["stable"] = 3
  with pytest.raises(grpc.RpcError) as error:
    reload(wrong)
  assert error.value.code() == C.FAILED_PRECONDITION
  assert error.value.details() == (
    "Request to assign label to version 3 of model two, "
    "which is not currently available for inference"
  )
  assert version(name="two", label="stable") == 1

  changed = type(config)()
  changed.CopyFrom(config)
  changed.model_config_list.config[1].version_labels["stable"] = 2
  del changed.model_config_list.config[2]
  changed.model_config_list.config.add(
    name="new", base_path=str(root / "two"), model_platform="tensorflow"
  )
  assert reload(changed).status.error_code == 0
  assert version(name="two", label="stable") == 2
  assert version(name="new") == 3
  assert set(plain.states("all").values()) == {State.END}
  with pytest.raises(grpc.RpcError) as error:
    version(name="all")
  assert error.value.code() == C.NOT_FOUND

  missing = type(config)()
  missing.CopyFrom(config)
  missing.model_config_list.config.add(
    name="missing", base_path=str(root / "nothing"), model_platform="tensorflow"
  )
  with pytest.raises(grpc.RpcError) as error:
    reload(missing)
  assert (
    error.value.code() == C.UNKNOWN
    and "1 model(s) did not become available" in error.value.details()
  )
  assert "nothing" in error.value.details()
  reload(config)
  assert (version(name="two", label="stable"), version(name="all")) == (1, 3)


def test_the_config_file_is_watched(servers):
  path, text = servers.root / "models.config", CONFIG.format(root=servers.root)

  def stable():
    return servers.plain.predict(
      {"x": [1]}, name="two", label="stable", signature="versioned"
    ).model_spec.version.value

  for version, content in (
    (2, text.replace('key: "stable" value: 1', 'key: "stable" value: 2')),
    (1, text),
  ):
    path.with_suffix(".aside").write_text(content)
    path.with_suffix(".aside").rename(path)
    end = time.monotonic() + 30
    while stable() != version and time.monotonic() < end:
      time.sleep(0.05)
    assert stable() == version


def test_config_files(tmp_path):
  def file(text):
    (tmp_path / "config").write_text(text)
    return str(tmp_path / "config")

  text = BATCHING.format(max=8, allowed="allowed_batch_sizes: 4 allowed_batch_sizes: 8")
  parameters = server_config.batching_parameters(file(text))
  assert parameters == batching.Parameters(
    max_batch_size=8,
    timeout_secs=0.02,
    num_threads=2,
    max_enqueued_batches=100,
    allowed_sizes=(4, 8),
  )
  assert (
    server_config.batching_parameters(file("thread_pool_name { value: 'x' }"))
    == batching.Parameters()
  )
  with pytest.raises(artifacts.UserError, match="pad_variable_length_inputs is not supported"):
    server_config.batching_parameters(file("pad_variable_length_inputs: true"))
  with pytest.raises(artifacts.UserError, match="max_bach_size"):
    server_config.batching_parameters(file("max_bach_size { value: 8 }"))
  with pytest.raises(artifacts.UserError, match="nowhere"):
    server_config.batching_parameters(str(tmp_path / "nowhere"))
  assert server_config.metrics_path("") == "/monitoring/prometheus/metrics"
  assert (
    server_config.metrics_path(file('prometheus_config { enable: true path: "/metrics" }'))
    == "/metrics"
  )
  assert server_config.metrics_path(file("prometheus_config { enable: false }")) is None


def test_swap_under_load(servers):
  """16 clients ask continuously while versions 2, 3 and a broken 4 appear.

  None fails, and none gets a version that has ended.
  """
  server, root = servers.batching, servers.root
  stop, failures, answers = threading.Event(), [], []

  def ask():
    channel = grpc.insecure_channel(
      f"127.0.0.1:{server.port}", options=[("grpc.use_local_subchannel_pool", 1)]
    )
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    request = request_of({"x": np.array([1, 2], np.int32)}, name="swap", signature="versioned")
    while not stop.is_set():
      sent = time.monotonic()
      try:
        response = stub.Predict(request, timeout=30)
        versions = {response.model_spec.version.value, *response.outputs["version"].int_val}
        answers.append((sent, versions))
      except grpc.RpcError as error:
        failures.append(error)
    channel.close()

  clients = [threading.Thread(target=ask) for _ in range(16)]
  [client.start() for client in clients]
  over = {1: time.monotonic()}  # version → since when it alone answers
  try:
    for version in (2, 3):
      time.sleep(2)
      publish(str(root / f"version-{version}"), str(root / "swap" / str(version)))
      server.wait_for_states(
        "swap", {**dict.fromkeys(range(1, version), State.END), version: State.AVAILABLE}
      )
      over[version] = time.monotonic()
    broken = root / "swap" / "4"
    broken.mkdir()
    (broken / "saved_model.pb").write_bytes(b"nothing of the kind")
    (root / "swap" / "latest").mkdir()  # no number, no version
    (root / "swap" / "5").mkdir()  # nothing in it yet
    server.wait_for_states("swap", {1: State.END, 2: State.END, 3: State.AVAILABLE, 4: State.END})
    time.sleep(2)
  finally:
    stop.set()
    [client.join() for client in clients]
  counts = {version: sum(versions == {version} for _, versions in answers) for version in (1, 2, 3)}
  assert not failures
  assert sum(counts.values()) == len(answers), (
    "the version in model_spec is the one that answered, for all rows"
  )
  assert all(counts.values()), counts
  for version in (2, 3):
    late = [
      versions for sent, versions in answers if sent > over[version] and min(versions) < version
    ]
    assert not late, f"{len(late)} answers of an older version after {version} was alone"
  error = {status.version: status.status for status in server.status("swap").model_version_status}[
    4
  ]
  assert error.error_code and "4" in error.error_message, error


# ==================================================================================== start and end


def test_a_port_in_use_is_a_clear_error(servers):
  assert servers.no_port.process.wait(START_SECS) == 1
  text = servers.no_port.log.read_text()
  port = servers.taken.getsockname()[1]
  assert (
    f"model_server: --port: cannot listen on 127.0.0.1:{port}; is another server running there"
    in text
  )
  assert "Traceback" not in text


def test_sigterm_lets_requests_in_flight_finish(servers):
  """gRPC and REST requests in flight are answered, and new ones are refused.

  The watched health reports it, and the exit code is 0.
  """
  server = servers.plain  # this is its last test
  watched = []
  watch = server.health.Watch(health_pb2.HealthCheckRequest())

  def look():
    with contextlib.suppress(grpc.RpcError):
      for response in watch:
        watched.append(response.status)

  watching = threading.Thread(target=look)
  watching.start()
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    call = threads.submit(server.predict, {"secs": [6.0]}, signature="slow")
    post = threads.submit(server.post, {"signature_name": "slow", "instances": [3.0]})
    time.sleep(1)
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(grpc.RpcError) as refused:
      while not call.done():
        server.predict({"text": ["a"]}, timeout=5)
    assert not call.done()
    assert list(call.result().outputs["secs"].float_val) == [6.0]
    assert post.result() == (200, {"predictions": [3.0]})
  code = server.process.wait(60)
  watching.join()
  assert code == 0
  assert refused.value.code() == C.UNAVAILABLE
  assert watched == [
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
  ]
  assert "Traceback" not in server.log.read_text()
