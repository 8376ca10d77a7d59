"""Runs steps in processes of their own, and measures their time and memory."""

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

_POLL_SECS = 0.05


@dataclasses.dataclass(frozen=True)
class Measured:
  """A step that has run.

  Attributes:
    name: what it did.
    secs: its time.
    gib: the greatest memory of its process that is not file pages, which the system can drop.
    found: what the step found out.
    load: processes that waited for a core when it began, as a mean over a minute.
  """

  name: str
  secs: float
  gib: float
  found: dict
  load: float


def own_gib(process: int | str = "self") -> float:
  """Returns the memory of a process without the pages of files that are mapped."""
  with open(f"/proc/{process}/status") as file:
    kib = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", file.read(), re.MULTILINE)
  return sum(map(int, kib)) / 2**20


class Peak:
  """The greatest `own_gib` of a process while the block runs."""

  def __init__(self, process: int | str = "self"):
    self.gib, self._process, self._ended = 0.0, process, threading.Event()

  def __enter__(self) -> "Peak":
    self._look()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def _watch(self) -> None:
    while not self._ended.wait(_POLL_SECS):
      self._look()

  def _look(self) -> None:
    with contextlib.suppress(OSError):  # the process has ended
      self.gib = max(self.gib, own_gib(self._process))

  def __exit__(self, *_) -> None:
    self._ended.set()
    self._thread.join()
    self._look()


def command(module: str, *argv: str) -> float:
  """Runs a command to its end; returns its greatest memory in GiB, without mapped files."""
  process = subprocess.Popen([sys.executable, "-m", module, *argv])
  with Peak(process.pid) as peak:
    if process.wait():
      sys.exit(f"{module} failed with exit code {process.returncode}.")
  return peak.gib


def _end_with_parent() -> None:
  """Ends this process when its parent has ended, however that happened."""
  parent = multiprocessing.parent_process()
  assert parent is not None  # a step runs in a process that `Steps` has started
  multiprocessing.connection.wait([parent.sentinel])
  os._exit(1)


def _run(connection, step: Callable, arguments: Mapping) -> None:
  from realm_tf import cli

  threading.Thread(target=_end_with_parent, daemon=True).start()
  cli.set_switches()
  with Peak() as peak:
    started = time.monotonic()
    found = step(**arguments)
    secs = time.monotonic() - started
  connection.send((secs, peak.gib, found or {}))


class Steps:
  """Steps that have run, kept in a file, so that an interrupted program can resume.

  Args:
    path: a JSON file.
  """

  def __init__(self, path: str):
    self._path = path
    self.done: dict[str, Measured] = {}
    if os.path.exists(path):
      with open(path) as file:
        self.done = {row["name"]: Measured(**row) for row in json.load(file)}

  def run(self, name: str, step: Callable, **arguments) -> Measured:
    """Runs a step in a new process, unless it has run before; ends the program if it fails."""
    if name not in self.done:
      print(f"{name} ..", file=sys.stderr, flush=True)
      load = os.getloadavg()[0]
      context = multiprocessing.get_context("spawn")
      ours, theirs = context.Pipe(duplex=False)
      process = context.Process(target=_run, args=(theirs, step, arguments))
      process.start()
      theirs.close()
      try:
        secs, gib, found = ours.recv()
      except EOFError:
        process.join()
        sys.exit(f"{name} failed with exit code {process.exitcode}; its messages are above.")
      process.join()
      self.done[name] = Measured(name, round(secs, 2), round(gib, 2), found, round(load, 2))
      with open(f"{self._path}.new", "w") as file:
        json.dump([dataclasses.asdict(row) for row in self.done.values()], file, indent=1)
      os.replace(f"{self._path}.new", self._path)
    return self.done[name]
