"""Servers open to strangers: nothing that they send blocks others."""

import asyncio
import concurrent.futures
import contextlib
import gzip
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import zlib

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2
from tensorflow.core.framework import tensor_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import model_management_pb2, model_pb2

from realm_tf import errors
from serving import pages
from serving.tf_serving import grpc_server, json_requests, versions
from serving.tf_serving.status import StatusError
from tests.processes import REPOSITORY, is_listening, wait_until
from tests.serving import client_test, model_server_test, versions_test
from tests.serving.model_server_test import State, Toy, free_ports, publish, request_of, save, start
from tests.serving.versions_test import base, latest, saved, started, wait_for  # noqa: F401  fixtures

C = grpc.StatusCode
TIMEOUT_SECS = 3.0
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
PREDICT = "/tensorflow.serving.PredictionService/Predict"


@pytest.fixture(autouse=True)
def stop_models():
  yield
  while versions_test._STARTED:
    versions_test._STARTED.pop().stop()


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
  """A server whose model does not return, and that is told to stop: it takes a minute.

  Most tests do not need it, but it may as well stop while they run.
  """
  root = tmp_path_factory.mktemp("stopping")
  save(Toy(1), str(root / "toy/1"))
  server = start(
    root / "log",
    "--model_name=toy",
    f"--model_base_path={root}/toy",
    "--rest_api_timeout_in_ms=0",
  ).wait()

  def stop() -> tuple[int, float]:
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    return server.process.wait(75), time.monotonic() - began

  try:
    call = server.prediction.Predict.future(request_of({"secs": [200.0]}, signature="slow"))
    threading.Thread(target=post_quietly, args=[server], daemon=True).start()
    time.sleep(2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      yield types.SimpleNamespace(call=call, ended=pool.submit(stop))
  finally:
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory, stopping):
  """A server of model "toy", with low limits."""
  root = tmp_path_factory.mktemp("attack")
  save(Toy(1), str(root / "toy/1"))
  found = start(
    root / "log",
    "--model_name=toy",
    f"--model_base_path={root}/toy",
    "--file_system_poll_wait_seconds=0.2",
    f"--rest_api_timeout_in_ms={int(1000 * TIMEOUT_SECS)}",
    "--max_request_bytes=8000000",
    "--max_request_bytes_in_work=16000000",
    "--max_request_rows=400000",
    "--grpc_max_threads=8",
  )
  found.root = root
  try:
    yield found.wait()
  finally:
    found.process.kill()
    found.process.wait()


@pytest.fixture
def asked(server):
  """The server; after an attack it answers others, and its log has no traceback."""
  yield server
  assert server.post({"instances": ["a"]})[0] == 200
  assert server.predict({"text": ["a"]}, timeout=5).model_spec.version.value == 1
  assert "Traceback" not in server.log.read_text()


# ========================================================================================= versions


def test_a_folder_name_that_is_no_utf8_does_no_harm(base):  # noqa: F811
  base(1)
  models = started(base)
  for name in (b"\xff\xfe", b"2\xff", "٣".encode(), b"1\n", b" 2", b"+2", b"9" * 40):
    os.mkdir(os.path.join(os.fsencode(base.path), name))
  time.sleep(0.1)
  base(2)
  wait_for(models, {1: State.END, 2: State.AVAILABLE})
  (base.path / "2/assets").mkdir(exist_ok=True)
  open(os.path.join(os.fsencode(base.path), b"2/assets/\xff"), "w").close()
  base(3)
  os.mkdir(os.path.join(os.fsencode(base.path), b"3/\xff"))
  wait_for(models, {1: State.END, 2: State.END, 3: State.AVAILABLE})
  assert models.all_available()


def test_one_models_trouble_is_its_own(base, tmp_path, saved, monkeypatch):  # noqa: F811
  base(1)
  config = versions_test.config_of(
    f'name: "bad" base_path: "{tmp_path}/bad"', f'name: "m" base_path: "{base.path}"'
  )
  models = versions.Models(config)
  versions_test._STARTED.append(models)
  update = models._update

  def fail(config):
    if config.name == "bad":
      raise RuntimeError("whatever")
    update(config)

  monkeypatch.setattr(models, "_update", fail)
  models.start(poll_secs=0.02)
  assert latest(models) == 1
  base(2)
  wait_for(models, {1: State.END, 2: State.AVAILABLE})
  monkeypatch.setattr(models, "_look", lambda: 1 / 0)
  time.sleep(0.1)
  assert models._watcher.is_alive()


def test_a_dead_watcher_is_told(base):  # noqa: F811
  base(1)
  models = started(base)
  assert models.all_available()
  models.stop()
  assert not models.all_available()


def test_versions_of_nanoseconds(base):  # noqa: F811
  base(1, 1764208000123456789, (1 << 63) - 1, 1 << 63)
  models = started(base)
  assert latest(models) == (1 << 63) - 1


def test_two_names_of_one_version_do_not_take_turns(base, saved):  # noqa: F811
  base("01", "1", "001")
  models = started(base)
  with models.hold(model_pb2.ModelSpec(name="m")) as first:
    time.sleep(0.2)
    with models.hold(model_pb2.ModelSpec(name="m")) as second:
      assert first is second and first.path == f"{base.path}/1"


def test_a_base_path_that_vanishes_and_returns(base):  # noqa: F811
  base(1)
  models = started(base)
  base.path.rename(f"{base.path}.away")
  time.sleep(0.1)
  base.path.write_text("a file in its place")
  time.sleep(0.1)
  assert latest(models) == 1
  base.path.unlink()
  os.rename(f"{base.path}.away", base.path)
  base(2)
  wait_for(models, {1: State.END, 2: State.AVAILABLE})


def test_reload_with_odd_names(asked):
  server = asked
  bad = server.root / "bad"
  bad.mkdir()
  os.mkdir(os.path.join(os.fsencode(bad), b"\xff"))
  good = f'name: "toy" base_path: "{server.root}/toy"'

  def reload(*models):
    config = versions_test.config_of(good)
    for name, path in models:
      config.model_config_list.config.add(name=name, base_path=path, model_platform="tensorflow")
    try:
      server.models.HandleReloadConfigRequest(
        model_management_pb2.ReloadConfigRequest(config=config), timeout=60
      )
      return C.OK
    except grpc.RpcError as error:
      assert len(error.details().encode()) <= 1024
      return error.code()

  for name, path, code in (
    ("bad", str(bad), C.UNKNOWN),
    ("a/b:c\n\x1b[31m", str(bad), C.UNKNOWN),
    ("x" * 100_000, f"/{'y' * 100_000}", C.UNKNOWN),
    ("nul", "/tmp\0", C.INVALID_ARGUMENT),
    ("", str(bad), C.INVALID_ARGUMENT),
    ("scheme", "nope://nowhere", C.UNKNOWN),
    ("proc", "/proc", C.UNKNOWN),
    ("file", "/dev/zero", C.UNKNOWN),
  ):
    assert reload((name, path)) == code, (name[:20], path[:20])
  assert reload(("bad", str(bad))) == C.UNKNOWN
  # The watcher is still alive.
  publish(str(server.root / "toy/1"), str(server.root / "toy/2"))
  server.wait_for_states("toy", {1: State.END, 2: State.AVAILABLE})
  (server.root / "toy/2").rename(server.root / "gone")
  server.wait_for_states("toy", {1: State.AVAILABLE, 2: State.END})
  assert reload() == C.OK


# ============================================================================================= REST


def deep(depth: int) -> str:
  return "[" * depth + "1" + "]" * depth


@pytest.mark.parametrize(
  "body, headers",
  [
    (f'{{"signature_name": "every_type", "instances": {deep(66)}}}', {}),
    (f'{{"signature_name": "every_type", "inputs": {deep(65)}}}', {}),
    (f'{{"signature_name": "every_type", "inputs": {deep(200)}}}', {}),
    (f'{{"inputs": {deep(900)}}}', {}),
    (f'{{"inputs": {{"text": {deep(990)}}}}}', {}),
    (f"{deep(990)}", {}),
    ('{"signature_name": "\\ud800", "instances": ["a"]}', {}),
    ('{"signature_name": "\\udc80", "instances": ["a"]}', {}),
    ('{"instances": [{"\\ud800": "a"}]}', {}),
    ('{"instances": [{"text": "\\udfff"}]}', {}),
    ('{"instances": ["a"], "else": "\\uD83D"}', {}),
    (b'{"signature_name": "\xff", "instances": ["a"]}', {}),
    (b'{"instances": [{"\xff": "a"}]}', {}),
    (f'{{"signature_name": "count", "inputs": [{"9" * 4301}]}}', {}),
    (f'{{"signature_name": "count", "inputs": [{"9" * 4000}]}}', {}),
    (f'{{"signature_name": "versioned", "inputs": [-{"9" * 4000}]}}', {}),
    ('{"signature_name": "versioned", "inputs": [{}]}', {}),
    ('{"instances": [null]}', {}),
    ('{"instances": ["a"], "else": 1e999}', {}),
    ('{"instances": ["a"], "else": -1.5E+0400}', {}),
    (f'{{"instances": ["a"], "else": 1{"0" * 400}.5}}', {}),
    (b"no gzip", {"Content-Encoding": "gzip"}),
    # without the time, which would be part of the test's name
    (gzip.compress(b'{"instances": ["a"]}', mtime=0)[:-9], {"Content-Encoding": "gzip"}),
    (gzip.compress(b'{"instances": ["a"]}', mtime=0) + b"junk", {"Content-Encoding": "gzip"}),
    (b"\x00\x01", {"Content-Encoding": "deflate"}),
    (b'{"instances": ["a"]}', {"Content-Encoding": "br"}),
    (b'{"instances": ["a"]}', {"Content-Encoding": "none of these"}),
  ],
  ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_read_is_a_bad_request(asked, body, headers):
  status, text, _ = asked.http_with_headers("POST", "/v1/models/toy:predict", body, **headers)
  error = json.loads(text)["error"]
  assert (status, bool(error), len(text) < 1200) == (400, True, True), (status, text[:300])


def test_right_requests_of_these_kinds_are_answered(asked):
  body = json.dumps({"instances": ["a\U0001f600", "\\ud800"]}).encode()  # pairs, and a backslash
  plain = asked.http("POST", "/v1/models/toy:predict", body)
  assert plain[0] == 200 and "A\U0001f600".encode() in plain[1]
  numbers = (
    b'{"instances": ["a1e999"], "else": [1e308, 1e-999, -1.5e+000000000000003, NaN, Infinity]}'
  )
  assert asked.http("POST", "/v1/models/toy:predict", numbers)[0] == 200
  raw = zlib.compressobj(wbits=-15)
  for encoding, sent in (
    ("gzip", gzip.compress(body)),
    ("deflate", zlib.compress(body)),
    ("deflate", raw.compress(body) + raw.flush()),
    ("identity", body),
  ):
    headers = {"Content-Encoding": encoding}
    got = asked.http_with_headers("POST", "/v1/models/toy:predict", sent, **headers)
    assert got[:2] == plain, encoding
  for depth in (8, 9, 33, 64):
    deepest = f'{{"signature_name": "every_type", "inputs": {deep(depth)}}}'
    assert asked.http("POST", "/v1/models/toy:predict", deepest)[0] == 200, depth


@pytest.mark.parametrize(
  "method, path",
  [
    ("POST", f"/v1/models/toy/versions/{'9' * 4301}:predict"),
    ("GET", f"/v1/models/toy/versions/{'9' * 19}"),
    ("GET", "/v1/models/toy/versions/%D9%A3"),
    ("POST", "/v1/models/toy/versions/1.5:predict"),
  ],
)
def test_versions_that_are_no_numbers(asked, method, path):
  status, text = asked.http(method, path, b'{"instances": ["a"]}' if method == "POST" else None)
  assert (status, len(text) < 1200) == (400, True), text[:300]


@pytest.mark.parametrize(
  "request_, statuses",
  [
    (b"\x16\x03\x01 no http\r\n\r\n", {400}),
    (b"GET /v1/models/toy HTTP/9.9\r\n\r\n", {400}),
    (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", {400}),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", {400}),
    (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 10_000 + b"\r\n", {400}),
    (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", {400}),
    (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", {400, 404}),
    (
      b"POST /v1/models/toy:predict HTTP/1.1\r\nHost: a\r\n"
      b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
      {400},
    ),
    (b"GET /v1/models/\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n", {400, 404}),
    (b"GET /v1/models/%ff%00%1b HTTP/1.1\r\nHost: a\r\n\r\n", {404}),
    (b"GET /v1/models/" + b"a" * 8000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", {404}),
  ],
  ids=lambda value: str(value)[:40],
)
def test_what_is_no_http(asked, request_, statuses):
  with socket.create_connection(("127.0.0.1", asked.rest_port), timeout=20) as client:
    with contextlib.suppress(ConnectionError):  # the server need not read to the end
      client.sendall(request_)
    answer = client.recv(65536)
  assert int(answer.split(b" ")[1]) in statuses, answer[:300]
  assert len(answer) < 2000


def connect(server) -> socket.socket:
  return socket.create_connection(("127.0.0.1", server.rest_port), timeout=30)


HEAD = b"POST /v1/models/toy:predict HTTP/1.1\r\nHost: a\r\n"


UNFINISHED = (
  b"",
  b"POST /v1/mod",
  HEAD,
  HEAD + b"Content-Length: 100\r\n\r\n",
  HEAD + b"Content-Length: 100\r\n\r\n{",
  HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
  b"GET /v1/models/toy HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n",
  b"GET /v1/models/toy HTTP/1.1\r\nHost: a\r\n\r\nPOST",  # pipelined
)


def test_a_request_that_never_ends_is_ended(asked):
  """This also holds if single bytes of it keep arriving."""

  def secs_to_end(half: bytes) -> float:
    with connect(asked) as client:
      client.sendall(half)
      client.settimeout(0.5)
      began = time.monotonic()
      while time.monotonic() < began + 4 * TIMEOUT_SECS:
        try:
          if not client.recv(65536):
            break
        except TimeoutError:
          if half.endswith(b"{"):
            client.sendall(b" ")
        except ConnectionError:
          break
    return time.monotonic() - began

  with concurrent.futures.ThreadPoolExecutor(len(UNFINISHED)) as threads:
    secs = dict(zip(UNFINISHED, threads.map(secs_to_end, UNFINISHED), strict=True))
  assert max(secs.values()) < 3 * TIMEOUT_SECS, secs


def test_bodies_in_work_have_a_limit_together(asked):
  """Unfinished bodies count too; small ones are always accepted."""
  clients = [connect(asked) for _ in range(12)]
  try:
    for client in clients:
      client.sendall(HEAD + b"Content-Length: 7000000\r\n\r\n")
      client.settimeout(0.5)
    statuses = []
    for client in clients:
      try:
        client.sendall(b" " * 6_000_000)
      except (TimeoutError, ConnectionError):
        pass
    assert asked.post({"instances": ["a" * 50_000]})[0] == 200
    resident = resident_bytes(asked.process.pid)
    for client in clients:
      try:
        statuses.append(client.recv(100).split(b" ")[1])
      except (TimeoutError, ConnectionError, IndexError):
        statuses.append(None)
  finally:
    for client in clients:
      client.close()
  assert statuses.count(b"429") >= 6, statuses
  assert resident < 1.5e9


def resident_bytes(pid: int) -> int:
  text = open(f"/proc/{pid}/status").read()
  return 1024 * int(text.split("VmRSS:")[1].split()[0])


def test_a_small_body_does_not_become_gigabytes(asked):
  step, compressor = b" " * (1 << 20), zlib.compressobj(9, wbits=31)
  bomb = b"".join(compressor.compress(step) for _ in range(2048)) + compressor.flush()
  before, began = resident_bytes(asked.process.pid), time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(9) as threads:
    bombs = [
      threads.submit(
        asked.http_with_headers,
        "POST",
        "/v1/models/toy:predict",
        bomb,
        **{"Content-Encoding": "gzip"},
      )
      for _ in range(8)
    ]
    waits = []
    while not all(future.done() for future in bombs):
      asked_at = time.monotonic()
      assert asked.post({"instances": ["a"]})[0] == 200
      waits.append(time.monotonic() - asked_at)
  assert {future.result()[0] for future in bombs} <= {413, 429}
  assert resident_bytes(asked.process.pid) - before < 400e6
  assert time.monotonic() - began < 30 and max(waits, default=0) < 3 * TIMEOUT_SECS


def test_a_body_without_a_length_has_the_same_limit(asked):
  with connect(asked) as client:
    client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    try:
      for _ in range(300):
        client.sendall(chunk)
    except ConnectionError:
      pass
    try:
      answer = client.recv(65536)
    except ConnectionError:
      answer = b"HTTP/1.1 413"
  assert b" 413" in answer[:20], answer[:300]


def test_pipelined_requests_are_answered_in_order(asked):
  body = b'{"instances": ["%d"]}'
  requests = [body % i for i in range(1000, 1200)]
  with connect(asked) as client:
    client.sendall(
      b"".join(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(one), one) for one in requests)
    )
    text = b""
    while text.count(b"HTTP/1.1 200") < len(requests) or not text.endswith(b"}"):
      text += client.recv(65536)
  order = [text.index(b'"upper": "%d"' % i) for i in range(1000, 1200)]
  assert order == sorted(order)


def test_many_idle_connections(asked):
  clients = [connect(asked) for _ in range(500)]
  try:
    assert asked.post({"instances": ["a"]})[0] == 200
  finally:
    for client in clients:
      client.close()


@pytest.mark.parametrize(
  "body",
  [
    b'{"instances": [' + b",".join([b'"a"'] * 250_000) + b"]}",
    b'{"instances": [' + b",".join([b'{"text": "a"}'] * 70_000) + b"]}",
    b'{"signature_name": "count", "instances": [' + b",".join([b"1"] * 399_000) + b"]}",
    b'{"signature_name": "every_type", "inputs": [' + b",".join([b"[1]"] * 40_000) + b"]}",
    b'{"signature_name": "count", "instances": [' + b",".join([b"1"] * 399_000) + b',"a"]}',
    b'{"signature_name": "count", "instances": [' + b",".join([b"[]"] * 300_000) + b"]}",
    b'{"instances": [' + b",".join([b"0"] * 3_000_000) + b"]}",
  ],
  ids=lambda value: str(value)[:45],
)
def test_a_large_request_does_not_keep_others_waiting(asked, body):
  with concurrent.futures.ThreadPoolExecutor(6) as threads:
    large = [threads.submit(asked.http, "POST", "/v1/models/toy:predict", body) for _ in range(4)]
    waits = []
    while not all(future.done() for future in large):
      asked_at = time.monotonic()
      assert asked.post({"instances": ["a"]})[0] == 200
      waits.append(time.monotonic() - asked_at)
  assert {future.result()[0] for future in large} <= {200, 400, 429, 504}
  assert max(waits) < TIMEOUT_SECS, waits


def info(dtype: tf.DType) -> dict[str, meta_graph_pb2.TensorInfo]:
  return {"x": meta_graph_pb2.TensorInfo(dtype=dtype.as_datatype_enum)}


def test_rows_are_converted_at_the_rate_of_their_parser():
  rows = {"instances": [{"x": [1.5, 2, -3]}] * 100_000}
  began = time.process_time()
  by_row, arrays = json_requests.read_inputs(rows, info(tf.float32))
  assert time.process_time() - began < 1.5
  assert by_row and arrays["x"].shape == (100_000, 3) and arrays["x"][-1].tolist() == [1.5, 2, -3]


def test_the_deadline_is_looked_at_while_rows_are_converted():
  with pytest.raises(StatusError) as error:
    json_requests.read_inputs({"instances": ["a"] * 10}, info(tf.string), deadline=0)
  assert error.value.code == C.DEADLINE_EXCEEDED


def test_too_many_rows(asked):
  for body in (
    b'{"signature_name": "count", "instances": [' + b",".join([b"1"] * 400_001) + b"]}",
    b'{"signature_name": "count", "inputs": [' + b",".join([b"1"] * 400_001) + b"]}",
  ):
    status, text = asked.http("POST", "/v1/models/toy:predict", body)
    assert (status, b"400001 rows" in text) == (400, True), text[:300]
  with pytest.raises(grpc.RpcError) as error:
    asked.predict({"x": np.zeros(400_001, np.float32)}, signature="count")
  assert error.value.code() == C.INVALID_ARGUMENT and "400001 rows" in error.value.details()


# ============================================================================================= gRPC


@pytest.mark.parametrize(
  "shape, fields, signature",
  [
    ([1 << 26], {"dtype": 7, "string_val": [b"a"]}, ""),
    ([1 << 26], {"dtype": 7}, ""),
    ([5000], {"dtype": 7, "string_val": [b"a" * 10_000]}, ""),
    ([1 << 13, 1 << 13], {"dtype": 9, "int64_val": [1]}, "every_type"),
    ([1 << 62, 4], {"dtype": 9, "int64_val": [1]}, "every_type"),
    ([-5, -5], {"dtype": 9, "int64_val": [1]}, "every_type"),
    ([1] * 65, {"dtype": 9, "int64_val": [1]}, "every_type"),
  ],
)
def test_a_short_grpc_request_cannot_ask_for_a_huge_tensor(asked, shape, fields, signature):
  proto = tensor_pb2.TensorProto(tensor_shape={"dim": [{"size": size} for size in shape]}, **fields)
  began = time.monotonic()
  with pytest.raises(grpc.RpcError) as error:
    asked.predict({"x" if signature else "text": proto}, signature=signature)
  assert error.value.code() == C.INVALID_ARGUMENT
  assert time.monotonic() - began < TIMEOUT_SECS


def test_repeated_values_may_be_left_out(asked):
  proto = tensor_pb2.TensorProto(dtype=9, tensor_shape={"dim": [{"size": 1000}]}, int64_val=[3])
  response = asked.predict({"x": proto}, signature="every_type")
  assert list(response.outputs["int64"].int64_val) == [3] * 1000


def test_grpc_requests_that_cannot_be_parsed(asked):
  for path in (PREDICT, "/tensorflow.serving.ModelService/GetModelStatus"):
    with pytest.raises(grpc.RpcError) as error:
      asked.channel.unary_unary(path)(b"\xff\xff\xff", timeout=10)
    assert error.value.code() == C.INTERNAL
  for health_path in ("/grpc.health.v1.Health/Check",):
    with pytest.raises(grpc.RpcError) as error:
      asked.channel.unary_unary(health_path)(b"\xff\xff\xff", timeout=10)
    assert error.value.code() == C.INTERNAL


def test_grpc_calls_without_an_end_hold_nobody_up(asked):
  """More calls than threads: some send no request, and reflection and health are kept open."""
  going_on = threading.Event()

  def nothing():
    going_on.wait()
    return
    yield

  calls = [asked.channel.stream_unary(PREDICT).future(nothing()) for _ in range(50)]
  calls += [asked.channel.stream_stream(REFLECTION)(nothing()) for _ in range(50)]
  calls += [asked.health.Watch(health_pb2.HealthCheckRequest()) for _ in range(50)]
  try:
    time.sleep(0.5)
    assert asked.predict({"text": ["a"]}, timeout=5).model_spec.version.value == 1
    assert asked.health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
  finally:
    going_on.set()
    for call in calls:
      call.cancel()
  with pytest.raises(grpc.RpcError) as error:
    asked.channel.stream_unary(PREDICT)(iter([]), timeout=10)
  assert error.value.code() == C.INTERNAL


@pytest.mark.parametrize(
  ("error", "is_logged"),
  [
    (grpc.aio.InternalError("gone"), False),
    (asyncio.CancelledError(), False),
    (ValueError("no"), True),
  ],
)
def test_an_answer_whose_caller_is_gone_is_no_news(caplog, error, is_logged):
  """gRPC logs a traceback if a call ends at the moment when it is answered."""

  async def make():
    predictor = types.SimpleNamespace(models=None)
    grpc_server.GrpcServer(predictor, num_threads=1, max_waiting=1, options=[], reloaded=list)

  asyncio.run(make())
  logging.getLogger("grpc._cython.cygrpc").error("a method failed", exc_info=error)
  assert ("a method failed" in caplog.text) == is_logged


def test_errors_echo_no_more_than_a_kilobyte(asked):
  for inputs, call in (
    ({"text": ["a"]}, {"name": "x" * 100_000}),
    ({"text": ["a"]}, {"signature": "x" * 100_000}),
    ({"x" * 100_000: ["a"]}, {}),
  ):
    with pytest.raises(grpc.RpcError) as error:
      asked.predict(inputs, **call)
    assert len(error.value.details().encode()) <= 1024
  for body in (
    {"instances": [{"x" * 100_000: 1}]},
    {"signature_name": "x" * 100_000, "instances": ["a"]},
    {"signature_name": "count", "inputs": "x" * 100_000},
  ):
    status, text = asked.http("POST", "/v1/models/toy:predict", body)
    assert (status, len(text) < 1200) == (400, True), len(text)


# ============================================================================================== end


def test_sigterm_ends_the_server_after_malformed_and_open_calls(tmp_path):
  save(Toy(1), str(tmp_path / "toy/1"))
  server = start(tmp_path / "log", "--model_name=toy", f"--model_base_path={tmp_path}/toy").wait()
  going_on = threading.Event()

  def endless():
    yield b"\xff\xff\xff"
    going_on.wait()

  try:
    reflection = server.channel.stream_stream(REFLECTION)
    for _ in range(20):
      try:
        list(reflection(iter([b"\xff\xff\xff"]), timeout=5))
      except grpc.RpcError:
        pass
    calls = [reflection(endless()) for _ in range(20)]
    calls += [server.channel.stream_unary(PREDICT).future(endless()) for _ in range(5)]
    half = socket.create_connection(("127.0.0.1", server.rest_port))
    half.sendall(HEAD)
    time.sleep(0.5)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert time.monotonic() - began < 20
    half.close()
  finally:
    going_on.set()
    for call in calls:
      call.cancel()
    server.process.kill()
    server.process.wait()
  assert "Traceback" not in server.log.read_text()


def test_sigterm_ends_the_server_whose_model_does_not_return(stopping):
  """Requests that take longer than the 60 s are cut off in both APIs."""
  code, secs = stopping.ended.result(75)
  assert code == 0 and 50 < secs < 70, (code, secs)
  assert stopping.call.exception().code() in (C.UNAVAILABLE, C.CANCELLED)


def post_quietly(server) -> None:
  try:
    server.post({"signature_name": "slow", "instances": [200.0]})
  except OSError:
    pass


def test_drawn_requests_get_tensorflow_servings_codes(tmp_path):
  """A short run of the fuzzer; `python -m benchmarks.attack.servers` makes longer ones."""
  report = tmp_path / "report.json"
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.attack.servers", "--requests=1000", f"--output={report}"],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=280,
    env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"},
  )
  assert done.returncode == 0, done.stdout + done.stderr
  figures = json.loads(report.read_text())
  assert (figures["requests"], figures["failures"]) == (1000, [])
  assert len(figures["codes"]) > 50


# ============================================================================== web page and client


@pytest.fixture(scope="module")
def page():
  """The port of a web page, and the paths it requests from a stand-in for a model server."""
  paths: list[str] = []
  listener = socket.create_server(("127.0.0.1", 0))

  def serve():
    while True:
      try:
        client, _ = listener.accept()
      except OSError:
        return
      with client:
        paths.append(client.recv(65536).split(b" ")[1].decode("latin-1"))
        client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")

  threading.Thread(target=serve, daemon=True).start()
  (port,) = free_ports(1)
  rest = f"--rest=http://127.0.0.1:{listener.getsockname()[1]}"
  process = subprocess.Popen(
    [sys.executable, "-m", "serving.web", rest, f"--port={port}", "--allowed_hosts=realm.example"],
    cwd=REPOSITORY,
  )
  try:
    wait_until(lambda: is_listening(port), "the web page")
    yield port, paths
  finally:
    process.kill()
    process.wait()
    listener.close()


def raw_http(port: int, path: str, *headers: str, method: str = "GET") -> int:
  lines = [f"{method} {path} HTTP/1.1", *headers, "Connection: close", "Content-Length: 0"]
  with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
    client.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    return int(client.recv(65536).split(b" ")[1])


@pytest.mark.parametrize(
  "path",
  [
    "/v1/models/../../monitoring/prometheus/metrics",
    "/v1/models/realm/../../../secret",
    "/v1/models/%2e%2e/%2e%2e/secret",
    "/v1/models/..",
    "/v1/models/%2E%2E",
    "/v1/models/.%2e:predict",
    "/v1/models/a%2f..%2f..%2fsecret",
    "/v1/models/a%5c..%5csecret",
    "/v1/models/realm/labels/%2e%2e",
    "/v1/models/realm/labels/..",
    "/v1/models/realm/labels/..:predict",
    "/v1/models//secret",
    "/v1/models/realm/secret",
    "/v1/models/realm:delete",
    "/v1/models/realm/versions/1/../../../../secret",
    "/v1/../secret",
  ],
)
def test_the_page_passes_on_only_calls_of_models(page, path):
  port, paths = page
  before = len([one for one in paths if one != "/v1/models/realm"])
  for method in ("GET", "POST"):
    assert raw_http(port, path, "Host: localhost", method=method) in (400, 403, 404, 405)
  assert len([one for one in paths if one != "/v1/models/realm"]) == before, paths


def test_the_page_passes_on_calls_as_they_are(page):
  port, paths = page
  for path in ("/v1/models/m%20n/versions/3:predict", "/v1/models/m/labels/x/metadata"):
    assert raw_http(port, path, "Host: localhost") == 200
    assert path in paths


@pytest.mark.parametrize(
  "headers, status",
  [
    (["Host: localhost"], 200),
    (["Host: localhost:8080"], 200),
    (["Host: 127.0.0.1"], 200),
    (["Host: [::1]:80"], 200),
    (["Host: realm.example"], 200),
    (["Host: localhost:1", "Origin: http://localhost:1"], 200),
    (["Host: evil.example"], 403),
    (["Host: evil.example", "Origin: http://evil.example"], 403),
    (["Host: localhost.evil.example"], 403),
    (["Host: 10.0.0.1"], 403),
    (["Host: [x"], 403),
    (["Host: "], 403),
    (["Host: localhost", "Origin: http://evil.example"], 403),
    (["Host: localhost:1", "Origin: http://localhost:2"], 403),
    (["Host: localhost", "Origin: null"], 403),
    (["Host: localhost", "Origin: "], 403),
    (["Host: localhost", "Origin: http://[x"], 403),
  ],
  ids=str,
)
def test_the_page_is_served_to_its_own_origin(page, headers, status):
  for path in ("/", "/v1/models/realm"):
    assert raw_http(page[0], path, *headers) == status, path


def test_a_terminal_sees_no_commands():
  evil = "a\x1b]0;b\x07\x9bc\x7f\x00\r\x08d"
  assert errors.plain(evil) == "a ]0;b  c    d"
  escaped = pages.plain_json(json.dumps({"text": evil}, ensure_ascii=False))
  assert json.loads(escaped) == {"text": evil}
  assert not set(escaped) & {chr(code) for code in [*range(32), *range(127, 160)]}


def test_the_client_prints_no_commands(tmp_path):
  address, stop = client_server()
  evil = "who \x1b[31m\x9b31m?"
  questions = tmp_path / "q.jsonl"
  questions.write_text(json.dumps({"question": evil}) + "\n")
  try:
    for arguments in (
      [f"--question=echo {evil}"],
      [f"--question=echo {evil}", "--json"],
      [f"--questions={questions}"],
      [f"--questions={questions}", "--json"],
      ["--question=q", "--model_name=\x1b[31m\x9b"],
      [f"--fill=\x9b{evil} [MASK]"],
      [f"--fill={evil}"],
      ["--question=q", "--output=\x1b[31m/x"],
    ):
      done = subprocess.run(
        [sys.executable, "-m", "serving.client", f"--server={address}", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        env={**os.environ, "PYTHONUTF8": "1"},
      )
      shown = done.stdout + done.stderr
      assert shown and not set(shown) & {"\x1b", "\x9b", "\x07"}, (arguments, shown)
  finally:
    stop()


def client_server():
  """The stand-in of tests/serving/client_test.py: its address, and what stops it."""
  service = client_test.PredictionService()
  service.models.HandleReloadConfigRequest = None
  server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
  model_server_test.prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
    service, server
  )
  model_server_test.model_service_pb2_grpc.add_ModelServiceServicer_to_server(
    service.models, server
  )
  address = f"localhost:{server.add_insecure_port('localhost:0')}"
  server.start()
  return address, lambda: server.stop(None)
