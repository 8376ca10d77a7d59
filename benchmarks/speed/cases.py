"""One comparison: a work, a size, a batch; its inputs, its sides and their times."""

import dataclasses
import itertools
import os
import re
import tempfile
from collections.abc import Sequence

import numpy as np

from benchmarks.speed import inputs, report, sides
from benchmarks.speed.jobs import REALM_STEP, Job
from realm_tf import errors

_SEED = 0


@dataclasses.dataclass(frozen=True)
class Case:
  """What is compared.

  Attributes:
    work: REALM_STEP or EMBEDDING.
    layers, hidden: sizes of the encoders.
    lengths: one of `inputs.LENGTHS`.
    batch_size: examples in a REALM step; 0 for embedding.
    passages: passages folder to draw from; None draws random word pieces.
    num_passages: passages to draw.
  """

  work: str
  layers: int
  hidden: int
  lengths: str
  batch_size: int
  passages: str | None
  num_passages: int

  def corpus(self, scratch: str) -> inputs.Corpus:
    """Draws the passages; `scratch` is an empty folder."""
    if self.passages:
      return inputs.read(self.passages, num_passages=self.num_passages, seed=_SEED)
    return inputs.draw(self.lengths, scratch, num_passages=self.num_passages, seed=_SEED)


def cases_of(
  work: str,
  *,
  sizes: Sequence[str],
  lengths: Sequence[str],
  batch_sizes: Sequence[str],
  passages: str | None,
  num_passages: int,
) -> list[Case]:
  """Returns all combinations.

  Args:
    work: REALM_STEP or EMBEDDING.
    sizes: layers and width, such as "2x128".
    lengths: some of `inputs.LENGTHS`.
    batch_sizes: examples in a REALM step.
    passages: passages folder for real lengths; None for random word pieces.
    num_passages: passages to draw.

  Raises:
    UserError: a value is unknown or no number.
  """
  _check("sizes", sizes, r"[1-9]\d*x[1-9]\d*", "layers and width, such as 2x128")
  _check("lengths", lengths, "|".join(inputs.LENGTHS), " or ".join(inputs.LENGTHS))
  _check("batch_sizes", batch_sizes, r"[1-9]\d*", "positive numbers")
  batches = map(int, batch_sizes) if work == REALM_STEP else [0]
  found = []
  for size, kind, batch_size in itertools.product(sizes, lengths, batches):
    layers, hidden = map(int, size.split("x"))
    source = passages if kind == inputs.REAL else None
    found.append(Case(work, layers, hidden, kind, batch_size, source, num_passages))
  return found


def _check(flag: str, values: Sequence[str], pattern: str, wanted: str) -> None:
  for value in values:
    if not re.fullmatch(pattern, value):
      raise errors.UserError(f"--{flag} has {value!r}; wanted {wanted}.")


def measure(
  case: Case, names: Sequence[str], *, rounds: int, secs: float, environments_root: str
) -> dict:
  """Checks and times sides.

  Args:
    case: what to compare.
    names: the sides.
    rounds: how often each side has its turn.
    secs: duration of a turn, at least one step.
    environments_root: folder of the peers' environments.

  Returns:
    A row of the results, see `report.row_of`.

  Raises:
    SideError: a side failed, or computed something else than the others.
  """
  load_before = os.getloadavg()[0]
  with tempfile.TemporaryDirectory() as folder:
    corpus = case.corpus(folder)
    job = Job(
      case.work,
      folder,
      dtype="float32",
      threads=len(os.sched_getaffinity(0)),
      architecture=inputs.architecture_of(case.layers, case.hidden, corpus.tokenizer.size),
    )
    arrays = inputs.write(job, corpus, batch_size=case.batch_size, seed=_SEED)
    with sides.running(names, job, environments_root=environments_root) as processes:
      versions = {name: process.versions() for name, process in processes.items()}
      gaps = sides.check(processes, folder)
      timing = sides.time_in_turn(processes, rounds=rounds, secs=secs)
  return report.row_of(
    dataclasses.asdict(case),
    timing=timing,
    size=case.batch_size or int(np.count_nonzero(arrays["token_ids"])),
    gaps=gaps,
    versions=versions,
    load_before=load_before,
  )
