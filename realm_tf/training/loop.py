"""Code shared by all trainers: the training loop, checkpoints, resuming and logging."""

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from realm_tf.models import devices, snapshots
from realm_tf.progress import METRICS, MetricsLog, read_metrics
from realm_tf.storage import artifacts, ownership, publishing
from realm_tf.training.optimizer import BertAdamW, bert_optimizer

CHECKPOINT = "checkpoint"
_RATE = "examples_per_sec"  # a field of every row of metrics.jsonl
_WAIT = "data_wait_share"  # likewise: the share of the time in which no batch was ready
DEV_EXACT_MATCH = "dev_exact_match"


class TrainingError(artifacts.UserError):
  """Training cannot start or continue; the message says why and what to try."""


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long a trainer trains, and how often it logs and saves.

  Attributes:
    steps: steps of the whole training.
    batch_size: examples in each batch, over all devices.
    learning_rate: peak of BERT's schedule.
    log_every: steps between rows of metrics.jsonl; divides `steps` and `checkpoint_every`.
    checkpoint_every: steps between checkpoints.
  """

  steps: int
  batch_size: int
  learning_rate: float
  log_every: int
  checkpoint_every: int

  def check(self, *, num_devices: int) -> None:
    """Raises TrainingError if the steps cannot be divided into epochs, or a batch among devices."""
    if self.steps % self.log_every or self.checkpoint_every % self.log_every:
      raise TrainingError(
        f"steps is {self.steps} and checkpoint_every {self.checkpoint_every}; both must be "
        f"multiples of log_every, {self.log_every}."
      )
    if self.batch_size % num_devices:
      raise TrainingError(
        f"batch_size is {self.batch_size}; it must be a multiple of num_devices, {num_devices}."
      )


@dataclasses.dataclass(frozen=True)
class Setup:
  """Settings shared by all trainings of a run: devices, precision, XLA and BERT's optimizer.

  Attributes:
    num_devices: GPUs of the machine that share each batch.
    mixed_precision: whether training computes in bfloat16; weights stay float32.
    jit_compile: whether XLA compiles the training step.
    bias_correction: see `optimizer.BertAdamW`.
    min_warmup_steps: see `optimizer.bert_optimizer`.
  """

  num_devices: int = 1
  mixed_precision: bool = False
  jit_compile: bool = False
  bias_correction: bool = False
  min_warmup_steps: int = 100

  def scope(self) -> contextlib.AbstractContextManager:
    """Scope for building models that train on these devices and in this precision."""
    return devices.on(self.num_devices, mixed_precision=self.mixed_precision)

  def optimizer(
    self, schedule: Schedule, *, slow: Sequence[keras.Variable] = (), slow_factor: float = 1.0
  ) -> BertAdamW:
    """Returns a new BERT optimizer; `slow` and `slow_factor` are as in `optimizer.BertAdamW`."""
    return bert_optimizer(
      learning_rate=schedule.learning_rate,
      steps=schedule.steps,
      bias_correction=self.bias_correction,
      min_warmup_steps=self.min_warmup_steps,
      slow=slow,
      slow_factor=slow_factor,
    )


def check_workdir(workdir: str, steps: int) -> None:
  """Checks that training would overwrite nothing in its workdir but the output of a trainer.

  Trainers call this before any work is done.

  Args:
    workdir: workdir of the trainer.
    steps: step of the snapshot that training will end with.

  Raises:
    UserError: something else is there; the message names it.
  """
  roots = {kind: os.path.join(workdir, f"{kind}s") for kind in (CHECKPOINT, snapshots.KIND)}
  for kind, root in roots.items():
    ownership.check_numbered(root, kind=kind)
  ownership.check_output(artifacts.step_folder(roots[snapshots.KIND], steps), kind=snapshots.KIND)
  log, rows = os.path.join(workdir, METRICS), read_metrics(workdir)
  begun = artifacts.gfile.exists(log) and "\n" in artifacts.read_text(log)
  if begun and not (
    rows and all(isinstance(row, dict) and {"step", _RATE} <= set(row) for row in rows)
  ):
    raise artifacts.UserError(
      f"{log!r} was not written by a REALM trainer and would be overwritten. Move it away, or "
      "give another workdir."
    )


def train(
  model: keras.Model,
  batches: Callable[[int], Mapping[str, np.ndarray]],
  *,
  workdir: str,
  schedule: Schedule,
  optimizer: keras.optimizers.Optimizer,
  jit_compile: bool = False,
  extra_metrics: Callable[[], Mapping[str, float]] = dict,
  callbacks: Sequence[keras.callbacks.Callback] = (),
  best: "KeepBest | None" = None,
  made_from: Mapping[str, str] = {},
) -> None:
  """Runs Keras' `fit`, resuming from W's newest checkpoint.

  Args:
    model: a model that computes its own loss in `compute_loss`.
    batches: training step -> its batch, the same at every call.
    workdir: W, with checkpoints and metrics.
    schedule: how long to train, and how often to log and save. Keras' "epoch" is `log_every` steps.
    optimizer: a new optimizer; its state is restored with the model.
    jit_compile: whether XLA compiles the step.
    extra_metrics: returns further values for rows of metrics.jsonl.
    callbacks: further Keras callbacks.
    best: keeps the best weights, which the caller takes afterwards.
    made_from: names of what the model is trained with, such as "questions" → their fingerprints;
      checkpoints record them.

  Raises:
    UserError: the workdir holds files of other origin, or another process trains there.
    TrainingError: the checkpoint was trained with something else, the loss is not finite, or the
      batch cannot be divided among the devices that the model was built on.
  """
  steps, log_every = schedule.steps, schedule.log_every
  check_workdir(workdir, steps)
  strategy = model.distribute_strategy
  schedule.check(num_devices=strategy.num_replicas_in_sync)
  with strategy.scope():
    model.compile(optimizer=optimizer, jit_compile=jit_compile)
    optimizer.build(model.trainable_variables)
  _check_made_from(workdir, made_from)
  start = restore(model, workdir)
  if start:
    print(f"{workdir}: resuming from step {start} of {steps}", file=sys.stderr)
  if start >= steps:
    return

  data = _Batches(batches, steps)
  with data.errors_as_raised(), ownership.only_writer(workdir):
    model.fit(
      data.dataset(start),
      steps_per_epoch=log_every,
      shuffle=False,
      initial_epoch=start // log_every,
      epochs=steps // log_every,
      verbose=1 if sys.stderr.isatty() else 2,
      callbacks=[
        _Report(workdir, start, schedule, data, extra_metrics, best, made_from),
        *callbacks,
        *([best] if best else ()),
      ],
    )


class _Batches:
  """The batches of a training as a dataset; all have one shape.

  They are made in another thread, while the model trains.

  Args:
    batches: training step -> its batch.
    steps: steps of the whole training.
  """

  def __init__(self, batches: Callable[[int], Mapping[str, np.ndarray]], steps: int):
    self._batches, self._steps = batches, steps
    self._error: Exception | None = None
    self._made: dict[int, float] = {}  # step → when its batch was made

  def _from(self, start: int) -> Iterator[tuple]:
    for step in range(start, self._steps):
      try:
        batch = self._batches(step)
      except Exception as error:
        self._error = error
        raise
      self._made[step] = time.monotonic()
      yield (batch,)

  def waited(self, step: int, *, since: float) -> float:
    """Returns how many seconds a step that began at `since` waited for its batch."""
    return max(self._made.pop(step) - since, 0.0)

  def dataset(self, start: int) -> tf.data.Dataset:
    """Returns the batches from step `start` on.

    Keras would take the batches too, but leave their shapes open. Known shapes make smaller graphs
    (`models.lengths`), and a strategy needs them.
    """
    first = next(self._from(start))
    dataset = tf.data.Dataset.from_generator(
      lambda: itertools.chain([first], self._from(start + 1)),
      output_signature=tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), first),
    )
    return dataset.prefetch(tf.data.AUTOTUNE)

  @contextlib.contextmanager
  def errors_as_raised(self) -> Iterator[None]:
    """Raises an error of a batch as it was.

    tf.data wraps it in an UnknownError with a traceback in its message.
    """
    try:
      yield
    except Exception as error:
      if self._error and error is not self._error:
        raise self._error from error
      raise


def checkpoint_step(workdir: str) -> int:
  """Returns the step of W's newest checkpoint, or 0."""
  folder = artifacts.latest(os.path.join(workdir, "checkpoints"))
  return artifacts.step_of(folder) if folder else 0


def restore(model: keras.Model, workdir: str) -> int:
  """Loads W's newest checkpoint (weights and optimizer) into a compiled model.

  Returns:
    The step of the checkpoint, or 0 if there is none.
  """
  step = checkpoint_step(workdir)
  if step:
    folder = artifacts.step_folder(os.path.join(workdir, "checkpoints"), step)
    snapshots.load_weights(model, os.path.join(folder, "train.weights.h5"))
  return step


def _check_made_from(workdir: str, made_from: Mapping[str, str]) -> None:
  """Checks that W's newest checkpoint was trained with the same things.

  Raises:
    TrainingError: it was trained with something else.
  """
  folder = artifacts.latest(os.path.join(workdir, "checkpoints"))
  before = artifacts.read_info(folder)["config"] if folder else made_from
  names = {*before, *made_from}
  if others := sorted(name for name in names if before.get(name) != made_from.get(name)):
    raise TrainingError(
      f"{workdir!r} was trained with something else ({', '.join(others)}) and cannot go on. Give "
      "another workdir, or delete this one to train again."
    )


def save(model: keras.Model, workdir: str, step: int, *, made_from: Mapping[str, str]) -> None:
  """Publishes W/checkpoints/<step> and deletes all but the newest two."""
  root = os.path.join(workdir, "checkpoints")
  with publishing.publish(
    artifacts.step_folder(root, step), kind=CHECKPOINT, config=dict(made_from), inputs={}
  ) as staged:
    snapshots.save_weights(model, os.path.join(staged.path, "train.weights.h5"))
  artifacts.prune(root, newest=2)


class KeepBest(keras.callbacks.Callback):
  """Measures the model on held-out data every `every_steps` steps and keeps the best snapshot.

  The best snapshot so far is in W/best, so an interrupted run resumes with it.

  Args:
    measure: measures the current model; higher is better.
    write_snapshot: root, step and further fields of info.json → publishes a snapshot of the model.
    restore: loads the weights of such a snapshot into the model.
    name: name of the measure in metrics.jsonl and info.json.
    workdir: W.
    every_steps: steps between two measurements; the model is also measured after the last step.
    steps: steps of the whole training.
  """

  def __init__(
    self,
    measure: Callable[[], float],
    write_snapshot: Callable[[str, int, dict], str],
    restore: Callable[[str], None],
    *,
    name: str = DEV_EXACT_MATCH,
    workdir: str,
    every_steps: int,
    steps: int,
  ):
    super().__init__()
    self.measure, self.write_snapshot, self.restore, self.name = (
      measure,
      write_snapshot,
      restore,
      name,
    )
    self.root, self.step = os.path.join(workdir, "best"), checkpoint_step(workdir)
    if not self.step:  # training begins anew, perhaps with something else
      artifacts.remove_after(self.root, 0)
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
    """Gives the model its best weights; returns their fields for info.json.

    Does nothing if nothing was measured because the run had already ended.
    """
    best = self._best()
    if best is None:
      return {}
    self.restore(best)
    info = artifacts.read_info(best)
    return {"best_step": info["step"], self.name: info[self.name]}

  def _best(self) -> str | None:
    """Returns the best snapshot; the earliest of several equal ones."""

    def measured(folder):
      return artifacts.read_info(folder)[self.name]

    return max(artifacts.complete_folders(self.root), key=measured, default=None)


class _Report(keras.callbacks.Callback):
  """Writes metrics.jsonl, TensorBoard logs and checkpoints; stops if the loss is not finite."""

  def __init__(self, workdir, start, schedule, data, extra_metrics, best, made_from):
    super().__init__()
    self.workdir, self.step, self.schedule, self.data = workdir, start, schedule, data
    self.extra_metrics, self.best, self.made_from = extra_metrics, best, made_from
    self.log, self.since = MetricsLog(workdir, start_step=start), time.monotonic()
    self.begun, self.waited = self.since, 0.0

  def on_train_batch_begin(self, batch, logs=None):
    self.begun = time.monotonic()

  def on_train_batch_end(self, batch, logs=None):
    self.waited += self.data.waited(self.step, since=self.begun)
    self.step += 1
    if not np.isfinite(logs["loss"]):
      raise TrainingError(
        f"the loss is {logs['loss']} at step {self.step}; lower the learning rate, or inspect "
        "the data of this step."
      )

  def on_epoch_end(self, epoch, logs=None):
    secs = time.monotonic() - self.since
    self.since = time.monotonic()
    rate = self.schedule.log_every * self.schedule.batch_size / secs
    speed = {_RATE: rate, _WAIT: self.waited / secs, "secs": secs}
    self.waited = 0.0
    measured = self.best.measured if self.best else {}
    self.log.write(self.step, {**logs, **speed, **self.extra_metrics(), **measured})
    if self.step % self.schedule.checkpoint_every == 0:
      save(self.model, self.workdir, self.step, made_from=self.made_from)
