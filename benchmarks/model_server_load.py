"""Measures the model server's latency and rate, with and without batching, or a version swap.

    python -m benchmarks.model_server_load --model_base_path=M --questions=Q.jsonl \\
        [--seconds=10] [--output=load.json]
    python -m benchmarks.model_server_load --model_base_path=M --questions=Q.jsonl \\
        --swap --seconds=60

Clients are threads, each with its own connection, that send one question after another over gRPC;
server and clients share the machine. --swap serves a copy of M's newest version and publishes
further copies of it while 16 clients send questions; it fails if a request fails, or if a version
still answers after the server has reported its end.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string(
    "model_base_path", None, "Folder that holds the versions of the servable.", required=True
  )
  flags.DEFINE_string(
    "questions", None, 'File of questions: lines of {"question": str, ..}.', required=True
  )
  flags.DEFINE_float("seconds", 10, "Duration of each measurement.", lower_bound=0.1)
  flags.DEFINE_bool("swap", False, "Measure a swap of versions instead of the load.")
  flags.DEFINE_string("output", "model_server_load.json", "JSON file to write the figures to.")
  cli.start("benchmarks.model_server_load")

import grpc
import numpy as np
import tabulate
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
  get_model_status_pb2,
  model_service_pb2_grpc,
  predict_pb2,
)

from realm_tf.storage import json_lines

MODEL = "load"
INPUT = "question"
PREDICT = "/tensorflow.serving.PredictionService/Predict"
NUM_CLIENTS = (1, 4, 16)
START_SECS = 600
State = get_model_status_pb2.ModelVersionStatus.State


@contextlib.contextmanager
def serving(base_path: str, *args: str) -> Iterator[str]:
  """Runs a model server process; yields its address once it is serving."""
  with socket.create_server(("127.0.0.1", 0)) as free:
    address = f"127.0.0.1:{free.getsockname()[1]}"
  command = [
    sys.executable,
    "-m",
    "serving.model_server",
    f"--port={address.split(':')[1]}",
    f"--model_name={MODEL}",
    f"--model_base_path={base_path}",
    "--file_system_poll_wait_seconds=0.2",
    *args,
  ]
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  assert process.stderr is not None  # it is a pipe
  lines: list[str] = []
  reader = threading.Thread(target=lines.extend, args=[process.stderr], daemon=True)
  reader.start()
  try:
    end = time.monotonic() + START_SECS
    with grpc.insecure_channel(address) as channel:
      while not _is_serving(channel):
        if process.poll() is not None or time.monotonic() > end:
          reader.join(1)
          sys.exit(f"{' '.join(command)} does not serve:\n{''.join(lines[-20:])}")
        time.sleep(0.2)
    yield address
  finally:
    process.terminate()
    process.wait()


def _is_serving(channel: grpc.Channel) -> bool:
  with contextlib.suppress(grpc.RpcError):
    response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return response.status == health_pb2.HealthCheckResponse.SERVING
  return False


def requests_of(path: str) -> list[bytes]:
  """Makes a Predict request for each question of a file, serialised before the measurement."""
  requests = []
  with open(path, "rb") as file:
    texts = [
      record.row["question"]
      for record in json_lines.read(file)
      if record.row and isinstance(record.row.get("question"), str)
    ]
  for text in texts:
    request = predict_pb2.PredictRequest(model_spec={"name": MODEL})
    request.inputs[INPUT].CopyFrom(tf.make_tensor_proto([text]))
    requests.append(request.SerializeToString())
  if not requests:
    sys.exit(f"{path}: no questions.")
  return requests


class Clients:
  """Threads that send questions until they are stopped."""

  def __init__(self, address: str, requests: Sequence[bytes], number: int):
    self.answers: list[tuple[float, float, bytes]] = []  # when sent, seconds, response
    self.failures: list[grpc.RpcError] = []
    self._address, self._requests = address, requests
    self._stop = threading.Event()
    self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(number)]
    self._started = time.monotonic()
    for thread in self._threads:
      thread.start()

  def stop(self) -> None:
    self._stop.set()
    for thread in self._threads:
      thread.join()
    self.secs = time.monotonic() - self._started

  def figures(self) -> dict:
    secs = np.array([secs for _, secs, _ in self.answers])
    return {
      "answers": len(secs),
      "failures": len(self.failures),
      "questions_per_sec": round(len(secs) / self.secs, 1),
      **{
        f"p{percent}_ms": round(1e3 * float(np.percentile(secs, percent)), 2)
        for percent in (50, 99, 100)
      },
    }

  def _ask(self, i: int) -> None:
    # With its own pool; otherwise all clients would share one connection.
    with grpc.insecure_channel(
      self._address, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
      predict = channel.unary_unary(PREDICT)
      while not self._stop.is_set():
        i += 1
        sent = time.monotonic()
        try:
          # Each client uses a different order.
          response = predict(self._requests[i * 7919 % len(self._requests)], timeout=60)
          self.answers.append((sent, time.monotonic() - sent, response))
        except grpc.RpcError as error:
          self.failures.append(error)
          time.sleep(0.1)


def ask_for(address: str, requests: Sequence[bytes], number: int, seconds: float) -> Clients:
  clients = Clients(address, requests, number)
  time.sleep(seconds)
  clients.stop()
  return clients


def measure_load(base_path: str, requests: Sequence[bytes], *, seconds: float) -> list[dict]:
  """Measures latency and rate for each number of clients, with batching off and on."""
  rows = []
  for batching in (False, True):
    with serving(base_path, f"--enable_batching={batching}") as address:
      ask_for(address, requests, max(NUM_CLIENTS), 1)  # the first runs of each thread are slow
      for number in NUM_CLIENTS:
        clients = ask_for(address, requests, number, seconds)
        if clients.failures:
          sys.exit(f"{len(clients.failures)} requests failed, the first with {clients.failures[0]}")
        rows.append({"batching": batching, "clients": number, **clients.figures()})
        print(rows[-1], flush=True)
  return rows


def measure_swap(
  base_path: str, requests: Sequence[bytes], *, seconds: float, num_versions: int = 4
) -> dict:
  """Measures 16 clients while copies of a version are published, every `seconds / num_versions`."""
  newest = max(
    (path for path in pathlib.Path(base_path).iterdir() if path.name.isdigit()),
    key=lambda path: int(path.name),
  )
  with tempfile.TemporaryDirectory() as folder:

    def publish(version: int) -> None:
      shutil.copytree(newest, f"{folder}/.{version}")
      os.rename(f"{folder}/.{version}", f"{folder}/{version}")

    publish(1)
    with serving(folder) as address, grpc.insecure_channel(address) as channel:
      clients, alone, swaps = Clients(address, requests, 16), {}, []
      try:
        for version in range(2, num_versions + 1):
          time.sleep(seconds / num_versions)
          publish(version)
          published = time.monotonic()
          alone[version] = _wait_for_swap(channel, version)
          swaps.append(round(alone[version] - published, 2))
        time.sleep(seconds / num_versions)
      finally:
        clients.stop()
  versions = [
    (sent, predict_pb2.PredictResponse.FromString(response).model_spec.version.value)
    for sent, _, response in clients.answers
  ]
  stale = sum(
    answered < version
    for version, since in alone.items()
    for sent, answered in versions
    if sent > since
  )
  counts = {
    version: sum(answered == version for _, answered in versions)
    for version in range(1, num_versions + 1)
  }
  return {
    **clients.figures(),
    "stale": stale,
    "swap_secs": swaps,
    "answers_by_version": counts,
    "first_failure": str(clients.failures[0]) if clients.failures else None,
  }


def _wait_for_swap(channel: grpc.Channel, version: int) -> float:
  """Waits until the server reports `version` available and all older ones ended.

  Returns the time.
  """
  stub = model_service_pb2_grpc.ModelServiceStub(channel)
  request = get_model_status_pb2.GetModelStatusRequest(model_spec={"name": MODEL})
  wanted = {**dict.fromkeys(range(1, version), State.END), version: State.AVAILABLE}
  end = time.monotonic() + START_SECS
  while {
    status.version: status.state for status in stub.GetModelStatus(request).model_version_status
  } != wanted:
    if time.monotonic() > end:
      sys.exit(f"version {version} did not take over within {START_SECS} s.")
    time.sleep(0.05)
  return time.monotonic()


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  requests = requests_of(args.questions)
  if args.swap:
    swap = measure_swap(args.model_base_path, requests, seconds=args.seconds)
    print(json.dumps(swap, indent=2))
  else:
    load = measure_load(args.model_base_path, requests, seconds=args.seconds)
    print(tabulate.tabulate(load, headers="keys"))
  result = swap if args.swap else load
  figures = {"cpus": os.cpu_count(), "seconds": args.seconds, "result": result}
  pathlib.Path(args.output).write_text(json.dumps(figures, indent=2) + "\n")
  if args.swap and (swap["failures"] or swap["stale"]):
    sys.exit("the swap caused failures or stale answers.")
