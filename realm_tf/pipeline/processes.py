"""Processes of stages: the command itself, and a server beside it."""

import contextlib
import ctypes
import functools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

from realm_tf import errors

_LAST_LINES = 15  # of the log of a server that has ended


class PipelineError(errors.UserError):
  """A stage failed, or existing output does not match the config."""


def start(command: Sequence[str], *, log: IO[bytes] | None = None) -> subprocess.Popen:
  """Prints and starts a module with its flags; with a `log`, it runs in the background."""
  print(f"$ python -m {shlex.join(command)}{' &' if log else ''}", flush=True)
  bind = functools.partial(_end_with, os.getpid()) if sys.platform == "linux" else None
  return subprocess.Popen([sys.executable, "-m", *command], preexec_fn=bind, stdout=log, stderr=log)


class Server:
  """A server that runs beside a stage, on a port that it chooses; without a command, no server.

  Args:
    command: a module that takes --port_file.
    folder: folder for the server's log and port.
  """

  port: int | None = None

  def __init__(self, command: Sequence[str], folder: str):
    self._process, self._log = None, os.path.join(folder, "log")
    if not command:
      return
    port_file = os.path.join(folder, "port")
    with open(self._log, "wb") as log:
      self._process = start([*command, f"--port_file={port_file}"], log=log)
    while not os.path.exists(port_file):  # no timeout: a machine may be slow
      self.check()
      time.sleep(0.1)
    with open(port_file, encoding="utf-8") as file:
      self.port = int(file.read())

  def check(self) -> None:
    """Raises PipelineError with the server's last lines of output if it has ended."""
    if self._process and self._process.poll() is not None:
      with open(self._log, encoding="utf-8", errors="replace") as file:
        words = "".join(file.readlines()[-_LAST_LINES:])
      raise PipelineError(
        f"the server beside this stage ended with code {self._process.returncode}; its last "
        f"output:\n{words}"
      )

  def stop(self) -> None:
    if self._process:
      self._process.terminate()
      self._process.wait()


@contextlib.contextmanager
def serve(command: Sequence[str]) -> Iterator[Server]:
  """Runs a server until the block ends; without a command, runs none.

  Raises PipelineError if the server ends before it listens.
  """
  with tempfile.TemporaryDirectory() as folder:
    server = Server(command, folder)
    try:
      yield server
    finally:
      server.stop()


def _end_with(parent_pid: int) -> None:
  """Has this new process (on Linux) killed when the pipeline is killed.

  So two processes never work in one folder.
  """
  ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
  if os.getppid() != parent_pid:  # the pipeline has already ended
    os._exit(1)
