"""What the trainers share: the loop, checkpoints and resume, logging."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from realm_tf import artifacts, ownership, snapshots
from realm_tf.progress import METRICS, MetricsLog, read_metrics

CHECKPOINT = "checkpoint"
_RATE = "examples_per_sec"  # in every row of metrics.jsonl
DEV_EXACT_MATCH = "dev_exact_match"


class TrainingError(artifacts.UserError):
  """Training cannot go on; the message says at which step and what to try."""


def check_workdir(workdir: str, steps: int) -> None:
  """Checks, before any work is done, that a trainer finds in its workdir nothing but what one left there.

  Args:
    steps: of the snapshot that it will end with.

  Raises:
    UserError: names what stands in the way.
  """
  roots = {kind: os.path.join(workdir, f"{kind}s") for kind in (CHECKPOINT, snapshots.KIND)}
  for kind, root in roots.items():
    ownership.check_numbered(root, kind=kind)
  ownership.check_output(artifacts.step_folder(roots[snapshots.KIND], steps), kind=snapshots.KIND)
  log, rows = os.path.join(workdir, METRICS), read_metrics(workdir)
  begun = artifacts.gfile.exists(log) and "\n" in artifacts.read_text(log)
  if begun and not (rows and all(isinstance(row, dict) and {"step", _RATE} <= set(row) for row in rows)):
    raise artifacts.UserError(
        f"{log!r} was not written by a trainer of REALM, and would be written over. Move it "
        "away, or give another workdir.")


def train(model: keras.Model, batches: Callable[[int], Mapping[str, np.ndarray]], *, workdir: str, steps: int, log_every: int,
          checkpoint_every: int, optimizer: keras.optimizers.Optimizer, batch_size: int, jit_compile: bool = False,
          extra_metrics: Callable[[], Mapping[str, float]] = dict, callbacks: Sequence[keras.callbacks.Callback] = (),
          best: "KeepBest | None" = None) -> None:
  """Runs Keras' `fit`, resuming from W's newest checkpoint.

  Args:
    model: computes its own loss in `compute_loss`.
    batches: training step -> its batch, the same whenever it is asked.
    steps: to stop after.
    log_every: steps between rows of metrics.jsonl; a Keras "epoch" here. Divides `steps` and `checkpoint_every`.
    extra_metrics: further values for those rows.
    best: keeps the best weights, which the caller takes afterwards.

  Raises:
    UserError: something of somebody else's stands in the workdir.
    TrainingError: the loss is not finite, or the batch does not divide by the devices that the model was built on.
  """
  check_workdir(workdir, steps)
  if steps % log_every or checkpoint_every % log_every:
    raise TrainingError(f"steps is {steps} and checkpoint_every {checkpoint_every}; both must be multiples of log_every, {log_every}.")
  strategy = model.distribute_strategy
  if batch_size % strategy.num_replicas_in_sync:
    raise TrainingError(f"batch_size is {batch_size}; it must be a multiple of num_devices, {strategy.num_replicas_in_sync}.")
  with strategy.scope():
    model.compile(optimizer=optimizer, jit_compile=jit_compile)
    optimizer.build(model.trainable_variables)
  start = restore(model, workdir)
  if start:
    print(f"{workdir}: going on from step {start} of {steps}", file=sys.stderr)
  if start >= steps:
    return

  failed = []

  def stream():
    for step in range(start, steps):
      try:
        yield (batches(step),)
      except Exception as error:
        failed.append(error)
        raise

  try:
    model.fit(
        stream() if strategy.num_replicas_in_sync == 1 else _dataset(stream), steps_per_epoch=log_every, shuffle=False,
        initial_epoch=start // log_every, epochs=steps // log_every,
        verbose=1 if sys.stderr.isatty() else 2,
        callbacks=[_Report(workdir, start, log_every, checkpoint_every, batch_size, extra_metrics, best),
                   *callbacks, *([best] if best else ())])
  except Exception as error:
    if failed and error is not failed[0]:
      raise failed[0] from error  # tf.data wraps it in an UnknownError with a traceback in its message
    raise


def _dataset(stream: Callable) -> tf.data.Dataset:
  """The stream as what a strategy can spread over devices."""
  spec = tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), next(stream()))
  return tf.data.Dataset.from_generator(stream, output_signature=spec)


def checkpoint_step(workdir: str) -> int:
  """The step of W's newest checkpoint, or 0."""
  folder = artifacts.latest(os.path.join(workdir, "checkpoints"))
  return artifacts.step_of(folder) if folder else 0


def restore(model: keras.Model, workdir: str) -> int:
  """Loads W's newest checkpoint (weights and optimizer) into a compiled model; its step, or 0."""
  step = checkpoint_step(workdir)
  if step:
    folder = artifacts.step_folder(os.path.join(workdir, "checkpoints"), step)
    snapshots.load_weights(model, os.path.join(folder, "train.weights.h5"))
  return step


def save(model: keras.Model, workdir: str, step: int) -> None:
  """Publishes W/checkpoints/<step> and deletes all but the newest two."""
  root = os.path.join(workdir, "checkpoints")
  with artifacts.publish(artifacts.step_folder(root, step), kind=CHECKPOINT, config={}, inputs={}) as staged:
    snapshots.save_weights(model, os.path.join(staged.path, "train.weights.h5"))
  artifacts.prune(root, newest=2)


class KeepBest(keras.callbacks.Callback):
  """Measures the model on held-out data every so many steps, and keeps the best snapshot.

  The best so far stands in W/best, so a run that was killed goes on with it.

  Args:
    measure: the model as it is now → how good it is; more is better.
    name: of the measure, in metrics.jsonl and in info.json.
    write_snapshot: a root, a step and more for info.json → publishes a snapshot of the model there.
    restore: gives the model the weights of such a snapshot.
    workdir: W.
    every_steps: between two measurements; the model is also measured after the last step, `steps`.
  """

  def __init__(self, measure: Callable[[], float], write_snapshot: Callable[[str, int, dict], str],
               restore: Callable[[str], None], *, name: str = DEV_EXACT_MATCH, workdir: str, every_steps: int, steps: int):
    super().__init__()
    self.measure, self.write_snapshot, self.restore, self.name = measure, write_snapshot, restore, name
    self.root, self.step = os.path.join(workdir, "best"), checkpoint_step(workdir)
    self.every_steps, self.steps = every_steps, steps
    self.measured: dict[str, float] = {}  # for metrics.jsonl, after a step that was measured

  def on_train_batch_end(self, batch, logs=None):
    self.step += 1
    self.measured = {}
    if self.step % self.every_steps and self.step != self.steps:
      return
    self.measured = {self.name: self.measure()}
    best = self._best()
    if best is None or self.measured[self.name] > artifacts.read_info(best)[self.name]:
      kept = self.write_snapshot(self.root, self.step, self.measured)
      for folder in artifacts.complete_folders(self.root):
        if folder != kept:
          ownership.remove(folder)

  def take(self) -> dict:
    """Gives the model its best weights; returns what info.json should say of them.

    Nothing happens where nothing was measured: in a run that had ended before it was asked for.
    """
    best = self._best()
    if best is None:
      return {}
    self.restore(best)
    info = artifacts.read_info(best)
    return {"best_step": info["step"], self.name: info[self.name]}

  def _best(self) -> str | None:
    """The best snapshot, the earliest of equals."""
    measured = lambda folder: artifacts.read_info(folder)[self.name]
    return max(artifacts.complete_folders(self.root), key=measured, default=None)


class _Report(keras.callbacks.Callback):
  """metrics.jsonl, TensorBoard, checkpoints, and a stop when the loss is not finite."""

  def __init__(self, workdir, start, log_every, checkpoint_every, batch_size, extra_metrics, best):
    super().__init__()
    self.workdir, self.step, self.log_every, self.checkpoint_every = workdir, start, log_every, checkpoint_every
    self.batch_size, self.extra_metrics, self.best = batch_size, extra_metrics, best
    self.log, self.since = MetricsLog(workdir, start_step=start), time.monotonic()

  def on_train_batch_end(self, batch, logs=None):
    self.step += 1
    if not np.isfinite(logs["loss"]):
      raise TrainingError(f"the loss is {logs['loss']} at step {self.step}; lower the learning rate, or look at this step's data.")

  def on_epoch_end(self, epoch, logs=None):
    secs = time.monotonic() - self.since
    self.since = time.monotonic()
    rate = self.log_every * self.batch_size / secs
    measured = self.best.measured if self.best else {}
    self.log.write(
        self.step, {**logs, _RATE: rate, "secs": secs, **self.extra_metrics(), **measured})
    if self.step % self.checkpoint_every == 0:
      save(self.model, self.workdir, self.step)
