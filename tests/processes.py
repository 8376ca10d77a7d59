"""Helpers for tests of real processes: waiting, ports and servers."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable

from serving import signatures

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def wait_until(condition: Callable[[], bool], what: str, *, timeout_secs: float = 60) -> None:
  """Returns when the condition holds; fails if it does not in time."""
  deadline = time.monotonic() + timeout_secs
  while not condition():
    assert time.monotonic() < deadline, f"{what} did not appear in {timeout_secs} s"
    time.sleep(0.01)


def free_ports(number: int) -> list[int]:
  """Returns different free ports of the loopback interface."""
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
    return [one.getsockname()[1] for one in sockets]


def is_listening(port: int) -> bool:
  """Whether a process accepts connections on a port of the loopback interface."""
  with socket.socket() as client:
    return client.connect_ex(("127.0.0.1", port)) == 0


def is_running(pid: int) -> bool:
  """Whether the process is alive, not only waiting to be reaped."""
  state, *_ = _stat(pid) or ["Z"]
  return state != "Z"


def processes_of_group(group: int) -> list[int]:
  """Returns the processes of a process group that are alive."""
  pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
  return [pid for pid in pids if _stat(pid)[2:3] == [str(group)] and is_running(pid)]


def _stat(pid: int) -> list[str]:
  """Returns the state, parent, process group, .. of a process; nothing if it has ended."""
  with contextlib.suppress(FileNotFoundError, ProcessLookupError):
    with open(f"/proc/{pid}/stat") as stat:
      return stat.read().rsplit(")", 1)[1].split()
  return []


@contextlib.contextmanager
def model_server(base_path: str, *arguments: str):
  """Runs python -m serving.model_server. Yields its gRPC and REST ports."""
  grpc_port, rest_port = free_ports(2)
  process = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "serving.model_server",
      f"--model_base_path={base_path}",
      f"--model_name={signatures.MODEL_NAME}",
      f"--port={grpc_port}",
      f"--rest_api_port={rest_port}",
      *arguments,
    ],
    cwd=REPOSITORY,
  )
  try:
    wait_until(lambda: is_listening(grpc_port) and answers(rest_port), "the model server")
    yield grpc_port, rest_port
  finally:
    process.terminate()
    assert process.wait(30) == 0


def answers(rest_port: int) -> bool:
  """Whether the model is available over REST."""
  with contextlib.suppress(OSError):
    status = json.load(
      urllib.request.urlopen(
        f"http://localhost:{rest_port}/v1/models/{signatures.MODEL_NAME}", timeout=5
      )
    )
    return status["model_version_status"][0]["state"] == "AVAILABLE"
  return False


@contextlib.contextmanager
def page_server(rest: str, *arguments: str):
  """Runs python -m serving.web. Yields its URL."""
  port = free_ports(1)[0]
  command = [sys.executable, "-m", "serving.web", f"--rest={rest}", f"--port={port}", *arguments]
  process = subprocess.Popen(command, cwd=REPOSITORY)
  try:
    wait_until(lambda: is_listening(port), "the page's server")
    yield f"http://localhost:{port}"
  finally:
    process.terminate()
    assert process.wait(20) in (0, -15)
