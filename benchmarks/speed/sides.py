"""The sides of a comparison: a process for each, and their timing in turn."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from benchmarks import environments
from benchmarks.speed.jobs import EMBEDDING, REALM_STEP, Job
from realm_tf import errors

OURS = "ours"
REFERENCE = f"{OURS}-float32"  # the side that the others are checked against
SIDES = {
  REALM_STEP: (
    REFERENCE,
    "ours-bfloat16",
    "torch-float32",
    "torch-bfloat16",
    "transformers-float32",
  ),
  EMBEDDING: (REFERENCE, "ours-bfloat16", "torch-float32", "torch-bfloat16"),
}
# The greatest difference from the reference: of a loss, relative to it; of an embedding, relative
# to its norm.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
_REPOSITORY = Path(__file__).parents[2]


class SideError(errors.UserError):
  """A side failed, or computed something else than the others."""


def dtype_of(side: str) -> str:
  return side.partition("-")[2]


def named(names: Sequence[str], work: str) -> list[str]:
  """Returns the sides with these names; all sides of a work if there are none.

  Raises:
    UserError: a side is unknown, or the reference is missing.
  """
  known = SIDES[work]
  if unknown := [name for name in names if name not in known]:
    raise errors.UserError(f"--sides has {', '.join(unknown)}; wanted some of {', '.join(known)}.")
  if names and REFERENCE not in names:
    raise errors.UserError(
      f"--sides is {','.join(names)}; add {REFERENCE}, which the others are checked against."
    )
  return list(names or known)


def environment_of(side: str) -> str | None:
  """Returns the name of a peer's environment; None for our side."""
  name = side.partition("-")[0]
  return None if name == OURS else name


class Process:
  """A side's process; see `jobs` for what it is asked and answers.

  Args:
    side: the side's name.
    job: its job.
    environments_root: folder of the peers' environments.
  """

  def __init__(self, side: str, job: Job, *, environments_root: str):
    self.side, environment = side, environment_of(side)
    if environment is None:
      command = [sys.executable, "-m", "benchmarks.speed.ours", f"--job={job.to_json()}"]
    else:
      python = os.path.abspath(environments.python_of(environments_root, environment))
      command = [python, "-m", "benchmarks.speed.peer", f"peer_{environment}", job.to_json()]
    self._process = subprocess.Popen(
      command,
      cwd=_REPOSITORY,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,  # Ctrl-C is for the command, which stops its sides
      env=os.environ | {"OMP_NUM_THREADS": str(job.threads)},
    )
    assert self._process.stdin is not None and self._process.stdout is not None  # pipes
    self._requests: IO[str] = self._process.stdin
    self._replies: IO[str] = self._process.stdout

  def versions(self) -> dict[str, str]:
    """Waits until the side is ready; returns its packages' versions."""
    return self._reply()["versions"]

  def ask(self, **request) -> dict:
    """Sends a request; returns the reply."""
    with contextlib.suppress(BrokenPipeError):  # told below
      self._requests.write(json.dumps(request) + "\n")
      self._requests.flush()
    return self._reply()

  def stop(self) -> None:
    self._process.kill()
    self._process.communicate()

  def _reply(self) -> dict:
    line = self._replies.readline()
    if not line:
      raise SideError(
        f"the side {self.side!r} ended with exit code {self._process.wait()} instead of an answer; "
        "its messages are above."
      )
    return json.loads(line)


@contextlib.contextmanager
def running(names: Sequence[str], job: Job, *, environments_root: str) -> Iterator[dict]:
  """Starts a process for each side; yields name → `Process`."""
  started: dict[str, Process] = {}
  try:
    for name in names:
      own = dataclasses.replace(job, dtype=dtype_of(name))
      started[name] = Process(name, own, environments_root=environments_root)
    yield started
  finally:
    for process in started.values():
      process.stop()


# ---------------------------------------------------------------------------------------- the check


def check(processes: Mapping[str, Process], folder: str) -> dict[str, float]:
  """Checks that all sides compute the same; returns the greatest difference of each.

  Raises:
    SideError: a side differs from the reference by more than its tolerance.
  """
  outputs = {}
  for name, process in processes.items():
    path = os.path.join(folder, f"{name}.npy")
    process.ask(outputs=path)
    outputs[name] = np.load(path).astype(np.float64)
  found = {name: difference(got, outputs[REFERENCE]) for name, got in outputs.items()}
  for name, gap in found.items():
    tolerance = TOLERANCES[dtype_of(name)]
    if not gap <= tolerance:
      raise SideError(
        f"{name} does not compute what {REFERENCE} computes: it differs by {gap:.2g} of the value; "
        f"wanted at most {tolerance:g}. Nothing was timed."
      )
  return found


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
  """Returns the greatest relative difference of losses [S], or of embeddings [N, D] by row."""
  axes = tuple(range(1, wanted.ndim))
  size = np.sqrt(np.sum(wanted**2, axis=axes))
  return float(np.max(np.sqrt(np.sum((got - wanted) ** 2, axis=axes)) / size))


# --------------------------------------------------------------------------------------- the timing


@dataclasses.dataclass(frozen=True)
class Timing:
  """Measured rates.

  Attributes:
    rates: side → steps per second of each round.
    cores: side → processor time over time in each round: the cores that its threads got.
    loads: the machine's load average of the last minute after each round.
  """

  rates: dict[str, list[float]]
  cores: dict[str, list[float]]
  loads: list[float]


def time_in_turn(processes: Mapping[str, Process], *, rounds: int, secs: float) -> Timing:
  """Runs each side once a round, while the others wait.

  Args:
    processes: the sides.
    rounds: number of rounds.
    secs: duration of a side's turn, at least one step.
  """
  steps = {}
  for name, process in processes.items():
    steps[name] = max(1, round(secs / process.ask(run=1)["seconds"]))
  timing = Timing({name: [] for name in processes}, {name: [] for name in processes}, [])
  for _ in range(rounds):
    for name, process in processes.items():
      reply = process.ask(run=steps[name])
      if not np.isfinite(reply["checksum"]):
        raise SideError(f"{name} computed {reply['checksum']} while it was timed.")
      timing.rates[name].append(steps[name] / reply["seconds"])
      timing.cores[name].append(reply["cpu_seconds"] / reply["seconds"])
    timing.loads.append(os.getloadavg()[0])
  return timing
