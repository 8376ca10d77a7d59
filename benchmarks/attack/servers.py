"""Attacks the model server over REST and gRPC; compares its codes with those of TensorFlow Serving.

    python -m benchmarks.attack.servers --requests=10000 --seed=0 [--output=attack_servers.json]

Starts a server with a stand-in model. Requests are drawn from rest_cases.py and grpc_cases.py,
which list the answers of TensorFlow Serving; eight clients send them, while one more sends a valid
question repeatedly. The report counts the codes of each kind. The attack fails if a code differs,
an error is longer than 2 kB, the question waits for more than 5 s, the log has a traceback, or the
server does not exit within 60 s of SIGTERM.
"""

import collections
import contextlib
import dataclasses
import http.client
import json
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_integer("requests", 10_000, "Number of requests to send.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Seed of the requests.")
  flags.DEFINE_string("output", "attack_servers.json", "JSON file to write the report to.")
  cli.start("benchmarks.attack.servers")

import grpc
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.attack import grpc_cases, rest_cases

NUM_CLIENTS = 8
START_SECS = 240
END_SECS = 60
MAX_WAIT_SECS = 5.0
MAX_ERROR_BYTES = 2048


class StandIn(tf.Module):
  """A model with three signatures: text, two inputs, and an input of any rank."""

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
    return {"y": tf.reduce_sum(x, 1) + bias}

  @tf.function(input_signature=[tf.TensorSpec(None, tf.int64, "x")])
  def any_rank(self, x):
    return {"x": x + 1}


@dataclasses.dataclass(frozen=True)
class Server:
  """The server process under attack."""

  process: subprocess.Popen
  log: pathlib.Path
  port: int
  rest_port: int

  def channel(self) -> grpc.Channel:
    return grpc.insecure_channel(
      f"127.0.0.1:{self.port}",
      options=[("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)],
    )


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[Server]:
  """Runs a model server with the stand-in model."""
  model = StandIn()
  signatures = {"serving_default": model.upper, "affine": model.affine, "any_rank": model.any_rank}
  tf.saved_model.save(model, str(folder / "model/1"), signatures=signatures)
  with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
    ports = one.getsockname()[1], two.getsockname()[1]
  log = folder / "log"
  command = [sys.executable, "-m", "serving.model_server", f"--model_name={rest_cases.MODEL}"]
  command += [f"--model_base_path={folder}/model", f"--port={ports[0]}"]
  command += [f"--rest_api_port={ports[1]}"]
  with log.open("w") as file:
    process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
  server = Server(process, log, *ports)
  try:
    end = time.monotonic() + START_SECS
    with server.channel() as channel:
      while not _is_serving(channel):
        if process.poll() is not None or time.monotonic() > end:
          sys.exit(f"{' '.join(command)} does not serve:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)
    yield server
  finally:
    process.kill()
    process.wait()


def _is_serving(channel: grpc.Channel) -> bool:
  with contextlib.suppress(grpc.RpcError):
    response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return response.status == health_pb2.HealthCheckResponse.SERVING
  return False


class Report:
  """Codes by kind of request, and failures; thread-safe."""

  def __init__(self) -> None:
    self.codes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    self.failures: list[str] = []
    self.longest_wait_secs = 0.0
    self._lock = threading.Lock()

  def add(self, kind: str, code: str, *, is_right: bool, detail: str) -> None:
    with self._lock:
      self.codes[kind][code] += 1
      if not is_right:
        self.failures.append(f"{kind}: {code}: {detail[:300]}")

  def note_wait(self, secs: float, *, answered: bool) -> None:
    with self._lock:
      self.longest_wait_secs = max(self.longest_wait_secs, secs)
      if secs > MAX_WAIT_SECS or not answered:
        self.failures.append(f"a valid question: answered {answered}, after {secs:.1f} s")

  def as_json(self) -> dict:
    return {
      "requests": sum(sum(counter.values()) for counter in self.codes.values()),
      "longest_wait_secs": round(self.longest_wait_secs, 2),
      "failures": self.failures,
      "codes": {kind: dict(counter) for kind, counter in sorted(self.codes.items())},
    }


def send_rest(server: Server, case: rest_cases.Case, rng: random.Random, report: Report) -> None:
  request = case.make(rng)
  connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=90)
  try:
    connection.request(request.method, request.path, request.body, dict(request.headers))
    response = connection.getresponse()
    status, body = response.status, response.read()
  except OSError as error:  # none of these requests may lose its connection
    report.add(
      f"REST {case.name}", type(error).__name__, is_right=False, detail=repr(request)[:300]
    )
    return
  finally:
    connection.close()
  is_right = status in case.wanted and (status == 200 or len(body) <= MAX_ERROR_BYTES)
  detail = f"{request.method} {request.path[:80]} {request.body[:120]!r} -> {body[:120]!r}"
  report.add(f"REST {case.name}", str(status), is_right=is_right, detail=detail)


def send_grpc(
  channel: grpc.Channel, case: grpc_cases.Case, rng: random.Random, report: Report
) -> None:
  call = case.make(rng)
  code, words = grpc.StatusCode.OK, ""
  try:
    channel.unary_unary(call.method)(call.request, timeout=90)
  except grpc.RpcError as error:
    code, words = error.code(), error.details() or ""
  is_right = code in case.wanted and len(words.encode()) <= MAX_ERROR_BYTES
  detail = f"{call.method} {call.request[:120]!r} -> {words}"
  report.add(f"gRPC {case.name}", code.name, is_right=is_right, detail=detail)


def attack(server: Server, *, num_requests: int, seed: int, report: Report) -> None:
  """Sends the requests; request i is the same for the same seed."""
  local = threading.local()

  def send(i: int) -> None:
    rng = random.Random(f"{seed}/{i}")
    if i % 2:
      send_rest(server, rng.choice(rest_cases.CASES), rng, report)
      return
    if not hasattr(local, "channel"):
      local.channel = server.channel()
    send_grpc(local.channel, rng.choice(grpc_cases.CASES), rng, report)

  with futures.ThreadPoolExecutor(NUM_CLIENTS) as clients:
    for _ in clients.map(send, range(num_requests)):
      pass


def ask_on(server: Server, stop: threading.Event, report: Report) -> None:
  """Sends a valid question repeatedly."""
  while not stop.wait(0.05):
    began, answered = time.monotonic(), False
    with contextlib.suppress(OSError):
      connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=60)
      connection.request("POST", rest_cases.PREDICT, b'{"instances": ["a"]}')
      answered = connection.getresponse().status == 200
      connection.close()
    report.note_wait(time.monotonic() - began, answered=answered)


def end(server: Server, report: Report) -> None:
  """Stops the server, and checks its log."""
  server.process.send_signal(signal.SIGTERM)
  try:
    code = server.process.wait(END_SECS + 5)
    if code:
      report.failures.append(f"the server exited with code {code}")
  except subprocess.TimeoutExpired:
    report.failures.append(f"the server is still running {END_SECS} s after SIGTERM")
  if "Traceback" in (text := server.log.read_text(errors="replace")):
    report.failures.append(f"a traceback in the log: {text[text.index('Traceback') :][:1000]}")


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  report, stop, began = Report(), threading.Event(), time.monotonic()
  with tempfile.TemporaryDirectory() as folder, serving(pathlib.Path(folder)) as server:
    asking = threading.Thread(target=ask_on, args=[server, stop, report])
    asking.start()
    attack(server, num_requests=args.requests, seed=args.seed, report=report)
    stop.set()
    asking.join()
    end(server, report)
  figures = {"seed": args.seed, "secs": round(time.monotonic() - began, 1), **report.as_json()}
  pathlib.Path(args.output).write_text(json.dumps(figures, indent=2) + "\n")
  print(json.dumps({name: figures[name] for name in ("requests", "secs", "longest_wait_secs")}))
  if report.failures:
    first = "\n".join(report.failures[:20])
    sys.exit(f"{len(report.failures)} failures (see {args.output}); the first:\n{first}")
