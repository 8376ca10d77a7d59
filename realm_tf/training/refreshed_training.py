"""Training with asynchronous refreshes of the index (REALM, section 3.3).

The trainer publishes snapshots; a background job embeds the corpus again from the newest one; the
trainer switches to each new index between two steps and never waits.
"""

import os
from collections.abc import Callable, Mapping

import keras
import numpy as np

from realm_tf.progress import read_metrics
from realm_tf.retrieval import dense, index
from realm_tf.retrieval.dense import IndexedRetriever
from realm_tf.storage import artifacts, ownership
from realm_tf.training import loop, refresh


def check_workdir(workdir: str, steps: int) -> None:
  """Checks that training for `steps` steps would overwrite nothing of other origin in its workdir.

  Raises:
    UserError: something else is there; the message names it.
  """
  loop.check_workdir(workdir, steps)
  ownership.check_numbered(os.path.join(workdir, "indexes"), kind=index.KIND)


def no_recall(indexed: IndexedRetriever) -> dict[str, float]:
  """Measures nothing; the default of `train_with_refresh`."""
  del indexed
  return {}


def train_with_refresh(
  model: keras.Model,
  batches: Callable[[int, IndexedRetriever], Mapping[str, np.ndarray]],
  *,
  workdir: str,
  schedule: loop.Schedule,
  optimizer: keras.optimizers.Optimizer,
  jit_compile: bool,
  first: IndexedRetriever,
  job: refresh.RefreshJob,
  every_steps: int,
  write_snapshot: Callable[[str, int, Mapping], str],
  recall: Callable[[IndexedRetriever], dict[str, float]] = no_recall,
  prepare: Callable[[IndexedRetriever], IndexedRetriever] | None = None,
  keep_best: Callable[[Callable[[], IndexedRetriever]], loop.KeepBest] | None = None,
  made_from: Mapping[str, str] = {},
) -> str:
  """Trains with batches from the newest index; resumes from the workdir.

  The job reads W/snapshots and writes W/indexes. The last snapshot's index is not made here, see
  `refresh.make_index`.

  Args:
    model: a model that computes its own loss, see `loop.train`.
    batches: training step and the newest index -> the step's batch.
    workdir: W.
    schedule: how long to train, and how often to log and save.
    optimizer: a new optimizer; its state is restored with the model.
    jit_compile: whether XLA compiles the step.
    first: the index to start from, of step 0.
    job: the job that embeds the passages again.
    every_steps: steps between the snapshots that it embeds them from.
    write_snapshot: root, step and further fields of info.json -> publishes a snapshot and returns
      its folder.
    recall: measures retrieval with each new index, for metrics.jsonl.
    prepare: see `dense.Swapper`.
    keep_best: function that returns the current index -> callback that keeps the best weights.
    made_from: see `loop.train`.

  Returns:
    The last snapshot's folder, with the best weights if `keep_best` chose some.
  """
  snapshots, indexes = (os.path.join(workdir, name) for name in ("snapshots", "indexes"))
  step = loop.checkpoint_step(workdir)
  artifacts.gfile.makedirs(workdir)
  for root in (snapshots, indexes):
    artifacts.remove_after(root, step)
  chosen: dict[str, float] = {}  # fields of info.json about the best weights
  log = os.path.join(workdir, "refresh.log")
  with refresh.Refresher(job, snapshots=snapshots, indexes=indexes, log=log) as refresher:
    swapper = dense.Swapper(
      newest_index(workdir, first),
      newest_index=refresher.newest_index,
      snapshots_root=snapshots,
      prepare=prepare,
    )
    refreshing = RefreshCallback(
      lambda step: write_snapshot(snapshots, step, chosen),
      swapper,
      refresher,
      workdir=workdir,
      step=step,
      every_steps=every_steps,
      recall=recall,
    )
    best = keep_best(lambda: swapper.current) if keep_best else None
    loop.train(
      model,
      lambda step: batches(step, refreshing.index_for(step)),
      workdir=workdir,
      schedule=schedule,
      jit_compile=jit_compile,
      optimizer=optimizer,
      extra_metrics=refreshing.metrics,
      callbacks=[refreshing],
      best=best,
      made_from=made_from,
    )
    if best:
      chosen |= best.take()
  last = artifacts.step_folder(snapshots, schedule.steps)
  written = artifacts.read_info(last) if artifacts.is_complete(last) else None
  if written is None or written.get("best_step") != chosen.get("best_step"):
    last = refreshing.publish()
  return last


def newest_index(workdir: str, first: IndexedRetriever) -> IndexedRetriever:
  """Returns the index to resume with: the newest in W, or the first.

  An index in W counts if its snapshot still exists and it was made from the passages of the first
  one. If the passages have been updated since, the job makes newer ones.
  """
  for folder in reversed(artifacts.complete_folders(os.path.join(workdir, "indexes"))):
    snapshot = artifacts.step_folder(os.path.join(workdir, "snapshots"), artifacts.step_of(folder))
    if artifacts.is_complete(snapshot) and dense.is_of(folder, first.table):
      return dense.load(folder, table=first.table, snapshot=snapshot)
  return first


class RefreshCallback(keras.callbacks.Callback):
  """Publishes snapshots, watches the refresh job, switches to new indexes, and counts refreshes.

  Batches are made some steps before they are trained on. The counts refer to the index that the
  batch of a step was made with: its age is the number of trainer steps since its snapshot, its
  staleness the number of trainer steps between its snapshot and the newest one.

  Args:
    write_snapshot: publishes W/snapshots/<step>, given the step; returns the folder.
    swapper: holds the current index; checked after every step for a newer one.
    refresher: runs the refresh job.
    workdir: W.
    step: step that training starts from.
    every_steps: steps between snapshots.
    recall: measures retrieval on held-out clozes with an index.

  Attributes:
    used: the index that the last batch was made with.
  """

  def __init__(
    self,
    write_snapshot: Callable[[int], str],
    swapper: dense.Swapper,
    refresher: refresh.Refresher,
    *,
    workdir: str,
    step: int,
    every_steps: int,
    recall: Callable[[IndexedRetriever], dict],
  ):
    super().__init__()
    self.write_snapshot, self.swapper, self.refresher, self.measure_recall = (
      write_snapshot,
      swapper,
      refresher,
      recall,
    )
    self.workdir, self.step, self.every_steps = workdir, step, every_steps
    self.snapshot_step = step // every_steps * every_steps
    self.used = swapper.current
    self._made_with: dict[int, IndexedRetriever] = {}  # step -> index, until trained on
    names = (
      "refreshes",
      "steps_during_refreshes",
      "index_age_steps",
      "max_index_age_steps",
      "staleness_steps",
      "max_staleness_steps",
    )
    self.counts = dict.fromkeys(names, 0.0)
    for row in read_metrics(workdir):
      if row["step"] <= step:
        self.counts.update({name: row[name] for name in self.counts if name in row})
    self.recall = recall(self.used)

  def index_for(self, step: int) -> IndexedRetriever:
    """Returns and records the index to make the batch of a step with, counted from 0."""
    self._made_with[step] = self.swapper.current
    return self._made_with[step]

  def on_train_batch_end(self, batch, logs=None):
    used = self._made_with.pop(self.step)
    self.step += 1
    self.refresher.poll()
    self.counts["steps_during_refreshes"] += self.refresher.running
    if self.step % self.every_steps == 0:
      self.publish()
    self.swapper.advance()
    if used is not self.used:
      self.used = used
      self.counts["refreshes"] += 1
      self.recall = self.measure_recall(used)
    for name, step in (("index_age_steps", self.step), ("staleness_steps", self.snapshot_step)):
      self.counts[name] = step - used.step
      self.counts[f"max_{name}"] = max(self.counts[name], self.counts[f"max_{name}"])

  def publish(self) -> str:
    """Writes W/snapshots/<step> and deletes snapshots that are no longer used."""
    folder = self.write_snapshot(self.step)
    self.snapshot_step = self.step
    artifacts.prune(
      os.path.dirname(folder),
      newest=1,
      keep_steps=self.refresher.snapshots_in_use() | {self.swapper.current.step},
    )
    return folder

  def metrics(self) -> dict[str, float]:
    """Returns values for metrics.jsonl: the counts, and step and recall of the index in use.

    They include the time and speed of the refresh that made the index.
    """
    info = ownership.own_info(self.used.folder) or {}  # the job may be deleting it
    took = {name: info[name] for name in ("refresh_secs", "passages_per_sec") if name in info}
    return {**self.counts, "index_step": self.used.step, **took, **self.recall}
