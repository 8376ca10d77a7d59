"""Our side of a comparison, with the regular models, optimizer and embedder.

`benchmarks.speed` starts it as a process, and speaks with it as `benchmarks.speed.jobs` says:

    python -m benchmarks.speed.ours --job=JSON
"""

import itertools
from collections.abc import Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("job", None, "The job, as JSON.", required=True)
  cli.start_job("benchmarks.speed.ours")

import keras
import numpy as np
import tensorflow as tf

from beam_jobs.embedder import Embedder
from benchmarks.speed import inputs, jobs
from benchmarks.speed.jobs import Job
from realm_tf.models import snapshots
from realm_tf.models.realm import RealmModel
from realm_tf.storage.columns import Chunk, Ragged
from realm_tf.training import loop


def versions() -> dict[str, str]:
  return {"tensorflow": tf.__version__, "keras": keras.__version__}


class RealmStep:
  """Steps of a `RealmModel`, compiled as a trainer compiles it."""

  def __init__(self, job: Job):
    self.versions = versions()
    setup = loop.Setup(
      mixed_precision=job.dtype == "bfloat16",
      bias_correction=True,
      min_warmup_steps=jobs.WARMUP_STEPS,
    )
    schedule = loop.Schedule(
      steps=jobs.STEPS,
      batch_size=0,  # only `loop.train` reads it
      learning_rate=jobs.PEAK_RATE,
      log_every=jobs.STEPS,
      checkpoint_every=jobs.STEPS,
    )
    folder = inputs.snapshot_of(job.folder)
    with setup.scope():
      parts = [snapshots.load_model(folder, name) for name in ("retriever", "reader")]
      self.model = RealmModel(*parts, per_token=True)
    self.model.compile(optimizer=setup.optimizer(schedule))
    with np.load(job.inputs) as arrays:
      stacked = dict(arrays)  # [K, B, ...]
    batches = [
      {name: rows[number] for name, rows in stacked.items()}
      for number in range(len(stacked["query_ids"]))
    ]
    self._batches = itertools.cycle(batches)

  def write_outputs(self, path: str) -> None:
    np.save(path, [self._loss() for _ in range(jobs.CHECKED_STEPS)])

  def run(self, steps: int) -> float:
    return [self._loss() for _ in range(steps)][-1]

  def _loss(self) -> float:
    """Takes one step; returns its loss."""
    self.model.reset_metrics()
    return float(self.model.train_on_batch(next(self._batches), return_dict=True)["loss"])


class Embedding:
  """Passages embedded as `beam_jobs.embed_passages` embeds a record file."""

  def __init__(self, job: Job):
    self.versions = versions()
    self._embedder = Embedder(
      inputs.snapshot_of(job.folder),
      batch_size=jobs.EMBEDDING_BATCH,
      jit_compile=False,
      mixed_precision=job.dtype == "bfloat16",
    )
    with np.load(job.inputs) as arrays:
      self._passages = [
        Ragged([Chunk(arrays[f"{part}_ids"], arrays[f"{part}_splits"])]).tensor()
        for part in inputs.PARTS
      ]

  def write_outputs(self, path: str) -> None:
    np.save(path, self._embed())

  def run(self, steps: int) -> float:
    return float(np.abs([self._embed() for _ in range(steps)][-1]).sum())

  def _embed(self) -> np.ndarray:
    return self._embedder(*self._passages)[0]


def open_side(job: Job) -> jobs.Side:
  return RealmStep(job) if job.work == jobs.REALM_STEP else Embedding(job)


def main(argv: Sequence[str]) -> None:
  del argv
  job = Job.from_json(flags.FLAGS.job)
  tf.config.threading.set_intra_op_parallelism_threads(job.threads)
  tf.config.threading.set_inter_op_parallelism_threads(job.threads)
  jobs.serve(job, open_side)
