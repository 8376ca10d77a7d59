"""Processes that read damaged files, monitored from outside."""

import contextlib
import dataclasses
import importlib
import io
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import tempfile
import time
import traceback
from multiprocessing.connection import Connection

_MOST_WORDS = 2000  # characters of an error message
_READY_SECS = 120  # for the imports of a new process


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The outcome of reading one file.

  Attributes:
    number: number of the file; together with the seed it determines everything about the file.
    kind: a key of `file_kinds.KINDS`.
    how: which file was damaged, and how.
    result: "read", "refused", or a failure: "crashed", "died", "slow", "large".
    words: the error message or the traceback.
    secs: time taken.
    megabytes: peak memory taken.
  """

  number: int
  kind: str
  how: str
  result: str
  words: str
  secs: float
  megabytes: float

  @property
  def is_failure(self) -> bool:
    return self.result not in ("read", "refused")


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits for reading a file.

  Attributes:
    secs: processor time; on the clock, a busy machine may take ten times as long.
    megabytes: memory beyond what the process used before.
  """

  secs: float
  megabytes: float


class Worker:
  """A process that reads one file after another, and is replaced if it dies."""

  def __init__(self, *, seed: int, limits: Limits):
    self._seed, self._limits = seed, limits
    self._process: multiprocessing.process.BaseProcess | None = None

  def try_file(self, number: int, kind: str) -> Outcome:
    """Makes, damages and reads one file."""
    process = self._process
    if process is None or not process.is_alive():
      process = self._start()
    self._pipe.send((number, kind))
    started, wanted = time.monotonic(), 10 * self._limits.secs
    try:
      if self._pipe.poll(wanted):
        outcome = self._pipe.recv()
        if outcome.result == "large":
          self.stop()  # its peak memory would hide that of the next file
        return outcome
      result, words = "slow", f"still running after {wanted:g} s"
    except (EOFError, OSError):
      process.join()
      result, words = "died", f"the process ended with {process.exitcode}"
    self.stop()
    return Outcome(number, kind, "", result, words, time.monotonic() - started, 0.0)

  def stop(self) -> None:
    """Ends the process and removes its files."""
    if self._process is not None:
      self._process.kill()
      self._process.join()
      self._process = None
      shutil.rmtree(self._scratch, ignore_errors=True)

  def _start(self) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("spawn")
    self._scratch = tempfile.mkdtemp(prefix="attack_files_")
    self._pipe, other = context.Pipe()
    process = context.Process(
      target=_work, args=(other, self._scratch, self._seed, self._limits), daemon=True
    )
    process.start()
    other.close()
    self._process = process
    if not self._pipe.poll(_READY_SECS) or self._pipe.recv() != "ready":
      raise RuntimeError("a process that reads files failed to start")
    return process


def _work(pipe: Connection, scratch: str, seed: int, limits: Limits) -> None:
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # output of TensorFlow and the readers
  importlib.import_module("benchmarks.attack.file_kinds")  # before memory is limited
  from realm_tf import cli

  cli.set_switches()
  # Protects the machine if the other limits fail.
  most = _address_bytes() + int(20 * limits.megabytes * 1e6)
  resource.setrlimit(resource.RLIMIT_AS, (most, most))
  examples = pathlib.Path(scratch)
  pipe.send("ready")
  with contextlib.suppress(EOFError):
    while True:
      number, name = pipe.recv()
      try:
        pipe.send(_outcome_of(number, name, examples=examples, seed=seed, limits=limits))
      except Exception:
        words = f"the attack itself failed: {traceback.format_exc()[-_MOST_WORDS:]}"
        pipe.send(Outcome(number, name, "", "crashed", words, 0.0, 0.0))


def _outcome_of(
  number: int, name: str, *, examples: pathlib.Path, seed: int, limits: Limits
) -> Outcome:
  from benchmarks.attack import file_kinds

  kind, good = file_kinds.KINDS[name], examples / name.replace(" ", "_")
  if not good.exists():
    good.mkdir()
    kind.make(good)
    kind.read(_copy(good))  # so that one-time loading does not count for any file
  folder = _copy(good)
  how = file_kinds.damage(kind, folder, random.Random(f"{seed} {number} {name}"))
  return _read(kind, folder, number=number, name=name, how=how, limits=limits)


def _copy(good: pathlib.Path) -> pathlib.Path:
  folder = good.parent / "now"
  shutil.rmtree(folder, ignore_errors=True)
  return pathlib.Path(shutil.copytree(good, folder))


def _read(kind, folder, *, number: int, name: str, how: str, limits: Limits) -> Outcome:
  from realm_tf.errors import UserError

  held, peak = _megabytes("VmRSS"), _megabytes("VmHWM")
  started = time.process_time()
  result, words = "read", ""
  try:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
      kind.read(folder)
  except UserError as error:
    result, words = "refused", str(error)
    if not words.strip() or len(words) > _MOST_WORDS:
      result, words = "crashed", f"the message has {len(words)} characters: {words[:200]}"
    elif "\x1b" in words:
      result, words = "crashed", f"the message has terminal commands: {words!r}"
  except BaseException as error:
    result, words = "crashed", "".join(traceback.format_exception(error))[-4000:]
  secs, highest = time.process_time() - started, _megabytes("VmHWM")
  megabytes = highest - held if highest > peak else 0.0
  if result in ("read", "refused") and secs > limits.secs:
    result = "slow"
  if result in ("read", "refused") and megabytes > limits.megabytes:
    result = "large"
  return Outcome(number, name, how, result, words, round(secs, 3), round(megabytes, 1))


def _address_bytes() -> int:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  return pages * resource.getpagesize()


def _megabytes(what: str) -> float:
  """Returns the memory of this process: VmRSS is its current memory, VmHWM its peak."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.partition(f"{what}:")[2].split()[0]) / 1000
