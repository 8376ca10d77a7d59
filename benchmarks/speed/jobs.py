"""The work of one side of a comparison, and the protocol between a side's process and the command.

A side reads one JSON object a line from standard input, and writes one a line to standard output:

    {"outputs": PATH}  →  {}                                 writes what the job computes to PATH
    {"run": N}         →  {"seconds": float, "cpu_seconds": float, "checksum": float}
                                                           runs N steps

Its first line, {"versions": {..}}, says that it is ready. Between requests it waits for the next
line, and uses no core. This module is imported in the peers' environments too, so it needs nothing
but the standard library.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

REALM_STEP, EMBEDDING = "realm_step", "embedding"
WORKS = (REALM_STEP, EMBEDDING)

EMBEDDING_BATCH = 64  # passages
CHECKED_STEPS = 4  # training steps whose losses are compared

# The optimizer of all sides is AdamW with these settings and BERT's schedule.
PEAK_RATE, STEPS, WARMUP_STEPS = 1e-3, 100, 10
EPSILON, DECAY, CLIP_NORM = 1e-6, 0.01, 1.0


@dataclasses.dataclass(frozen=True)
class Job:
  """The work of one side.

  Attributes:
    work: one of WORKS.
    folder: folder of the inputs and weights, see `inputs.write`.
    dtype: "float32" or "bfloat16", the dtype of matrix products.
    threads: number of threads to compute with.
    architecture: sizes of the encoders, see `realm_tf.models.encoder.build_encoder`.
  """

  work: str
  folder: str
  dtype: str
  threads: int
  architecture: dict[str, Any]

  @property
  def inputs(self) -> str:
    """Path of the arrays of inputs."""
    return os.path.join(self.folder, "inputs.npz")

  @property
  def weights(self) -> str:
    """Path of the arrays of weights, by the names of transformers."""
    return os.path.join(self.folder, "weights.npz")

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self))

  @classmethod
  def from_json(cls, text: str) -> "Job":
    return cls(**json.loads(text))


class Side(Protocol):
  """A job that is ready to run."""

  @property
  def versions(self) -> Mapping[str, str]:
    """Package → version."""

  def write_outputs(self, path: str) -> None:
    """Writes the losses of CHECKED_STEPS steps [S], or the embeddings [N, D], as a .npy file."""

  def run(self, steps: int) -> float:
    """Runs training steps, or embeds all passages `steps` times; returns a checksum."""


def learning_rate(step: int) -> float:
  """Returns BERT's learning rate at a step: a linear warm-up, then a linear decay to 0.

  The warm-up is short, so that the updates of the few checked steps show in their losses.
  """
  if step < WARMUP_STEPS:
    return PEAK_RATE * step / WARMUP_STEPS
  return PEAK_RATE * max(1 - step / STEPS, 0)


def serve(job: Job, open_side: Callable[[Job], Side]) -> None:
  """Opens a side and answers requests until standard input ends.

  Whatever libraries print goes to standard error.
  """
  replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  side = open_side(job)
  print(json.dumps({"versions": dict(side.versions)}), file=replies)
  for line in sys.stdin:
    print(json.dumps(answer(side, json.loads(line))), file=replies)


def answer(side: Side, request: Mapping[str, Any]) -> dict[str, float]:
  """Does what a request asks for; returns the reply."""
  if "outputs" in request:
    side.write_outputs(request["outputs"])
    return {}
  started, cpu_started = time.perf_counter(), time.process_time()
  checksum = side.run(request["run"])
  return {
    "seconds": time.perf_counter() - started,
    "cpu_seconds": time.process_time() - cpu_started,  # of all threads
    "checksum": checksum,
  }
