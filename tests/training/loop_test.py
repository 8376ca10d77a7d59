"""realm_tf/training/loop.py: the optimizer against NumPy.

Also tests runs that were stopped, killed or failed.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from keras import ops

from realm_tf import progress, settings
from realm_tf.corpus import passages
from realm_tf.examples.ict import IctExamples
from realm_tf.models import snapshots
from realm_tf.models.in_batch import InBatchModel
from realm_tf.storage import artifacts, publishing
from realm_tf.training import loop, new_models
from realm_tf.training.optimizer import LinearWarmupDecay, bert_optimizer
from tests.processes import REPOSITORY, wait_until

# ---------------------------------------------------------------------------------------- optimizer


def released_rate(step: int, *, peak: float, steps: int, warmup: int) -> float:
  """Returns the learning rate of 0-based `step`.

  See google-research/bert, optimization.py, create_optimizer.
  """
  if step < warmup:
    return peak * step / warmup
  return peak * (1 - min(step, steps) / steps)  # tf.train.polynomial_decay with power 1, to 0


@pytest.mark.parametrize(
  "steps, least, warmup",
  [
    (5, 1, 1),
    (40, 1, 4),
    (990, 1, 99),
    (40, 100, 100),
    (990, 100, 100),
    (1500, 100, 150),
    (100_000, 100, 10_000),
    (200_000, 100, 10_000),
  ],
)
def test_schedule_is_berts(steps, least, warmup):
  """The rate falls from step 0 to the end except in the warm-up, compared step by step."""
  schedule = bert_optimizer(learning_rate=3e-3, steps=steps, min_warmup_steps=least)._learning_rate
  at = sorted({0, 1, 2, warmup - 1, warmup, warmup + 1, steps // 2, steps - 1, steps, steps + 5})
  got = [float(schedule(step)) for step in at]
  wanted = [released_rate(step, peak=3e-3, steps=steps, warmup=warmup) for step in at]
  np.testing.assert_allclose(
    got, wanted, rtol=1e-4, atol=1e-9, err_msg=f"rates of steps {at} of {steps}"
  )
  again = LinearWarmupDecay(**schedule.get_config())
  assert float(again(1)) == float(schedule(1)), "a schedule made from its config"


def test_every_optimizer_of_a_process_has_the_same_name():
  """Checkpoints hold it: those of a resumed run would differ from those of a whole one."""
  made = [bert_optimizer(learning_rate=1e-3, steps=10).name for _ in range(2)]
  assert made == ["bert_adam_w"] * 2


def test_released_warm_up_is_the_default():
  for steps, warmup in ((50, 100), (2_000, 200), (200_000, 10_000)):
    schedule = bert_optimizer(learning_rate=1.0, steps=steps)._learning_rate
    assert schedule.warmup_steps == warmup == min(10_000, max(100, int(steps / 10))), (
      f"of {steps} steps"
    )


def released_update(
  value, gradient, first, second, *, rate: float, decayed: bool, correction: float = 1.0
):
  """Returns one variable's next value and averages.

  See google-research/bert, AdamWeightDecayOptimizer.apply_gradients.

  `correction` is not BERT's: Adam's, of both averages.
  """
  first = 0.9 * first + (1.0 - 0.9) * gradient
  second = 0.999 * second + (1.0 - 0.999) * gradient**2
  update = correction * first / (np.sqrt(second) + 1e-6)
  if decayed:
    update = update + 0.01 * value
  return value - rate * update, first, second


NAMES = {
  "kernel": (3, 2),
  "bias": (2,),
  "embeddings": (4, 2),
  "gamma": (2,),
  "beta": (2,),
  "output_bias": (3,),
}


@pytest.mark.parametrize("bias_correction", [False, True])
def test_optimizer_is_berts(bias_correction):
  """Values equal those of BERT's optimizer step by step.

  Updates are clipped by the global norm, and decayed except for biases and LayerNorm. Some have a
  slower rate, which includes the decay.
  """
  rng = np.random.default_rng(0)
  variables = [
    keras.Variable(rng.normal(size=shape), name=name, dtype="float32")
    for name, shape in NAMES.items()
  ]
  slow = [variables[1], variables[2]]
  optimizer = bert_optimizer(
    learning_rate=0.1,
    steps=40,
    slow=slow,
    slow_factor=0.25,
    min_warmup_steps=1,
    bias_correction=bias_correction,
  )
  values = [np.array(variable, np.float64) for variable in variables]
  first, second = (
    [np.zeros_like(value) for value in values],
    [np.zeros_like(value) for value in values],
  )
  optimizer.build(variables)
  for step in range(8):
    gradients = [rng.normal(size=value.shape, scale=0.05 if step % 2 else 3.0) for value in values]
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
    assert (norm < 1) == bool(step % 2), "some steps are clipped, others not"
    rate = released_rate(step, peak=0.1, steps=40, warmup=4)
    correction = (
      np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1)) if bias_correction else 1.0
    )
    for i, gradient in enumerate(gradients):
      values[i], first[i], second[i] = released_update(
        values[i],
        gradient / max(norm, 1.0),
        first[i],
        second[i],
        rate=rate * (0.25 if i in (1, 2) else 1.0),
        decayed=variables[i].name in ("kernel", "embeddings"),
        correction=correction,
      )
    optimizer.apply([ops.convert_to_tensor(gradient, "float32") for gradient in gradients])
    for variable, value in zip(variables, values, strict=True):
      np.testing.assert_allclose(
        variable, value, rtol=2e-4, atol=2e-5, err_msg=f"{variable.name} after step {step}"
      )


def test_slow_variables_decay_at_their_own_rate():
  """With hardly any gradient, only the decay moves the weights."""
  fast, slow = (keras.Variable(np.ones(3, np.float32), name="kernel") for _ in range(2))
  optimizer = bert_optimizer(
    learning_rate=0.1, steps=40, slow=[slow], slow_factor=0.25, min_warmup_steps=1
  )
  optimizer.build([fast, slow])
  for _ in range(10):
    optimizer.apply([ops.zeros(3)] * 2)
  moved = [1 - float(np.array(variable)[0]) for variable in (fast, slow)]
  assert moved[0] > 1e-3 and moved[1] == pytest.approx(0.25 * moved[0], rel=1e-2), (
    f"moved by {moved}"
  )


def test_first_updates_without_bias_correction_are_larger():
  """The first update is 0.1 / sqrt(0.001) times the rate instead of the rate.

  The setting decides this.
  """
  moved = {}
  for correction in (False, True):
    variable = keras.Variable(np.zeros(3, np.float32), name="bias")
    optimizer = bert_optimizer(
      learning_rate=0.1, steps=40, min_warmup_steps=0, bias_correction=correction
    )
    optimizer.build([variable])
    optimizer.iterations.assign(1)  # the first that has a rate; Adam's averages are still empty
    optimizer.apply([ops.convert_to_tensor(np.array([0.1, -0.2, 0.3], np.float32))])
    moved[correction] = np.abs(np.array(variable)) / (0.1 / 4)
  np.testing.assert_allclose(moved[False], 0.1 / np.sqrt(0.001), rtol=1e-3)
  np.testing.assert_allclose(
    moved[True], np.sqrt(1 - 0.999**2) / (1 - 0.9**2) * moved[False], rtol=1e-3
  )


JAX = """
import keras, numpy as np, sys
assert keras.backend.backend() == "jax"
from realm_tf.training.optimizer import bert_optimizer
assert "tensorflow" not in sys.modules
variable = keras.Variable(np.ones([3, 2], "float32"), name="kernel")
optimizer = bert_optimizer(learning_rate=0.1, steps=40, slow=[variable], slow_factor=0.5)
optimizer.build([variable])
for _ in range(3):
  optimizer.apply([keras.ops.ones([3, 2])])
print(*np.array(variable).ravel())
"""


def test_optimizer_on_jax_without_tensorflow():
  done = subprocess.run(
    [sys.executable, "-c", JAX],
    cwd=REPOSITORY,
    env={**os.environ, "KERAS_BACKEND": "jax"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  value, first, second = np.ones(6), np.zeros(6), np.zeros(6)
  for step in range(3):
    value, first, second = released_update(
      value,
      np.full(6, 1 / np.sqrt(6)),
      first,
      second,
      rate=0.5 * released_rate(step, peak=0.1, steps=40, warmup=100),
      decayed=True,
    )
  np.testing.assert_allclose([float(part) for part in done.stdout.split()], value, rtol=1e-5)


# --------------------------------------------------------------------------------------------- runs


class Line(keras.Model):
  """Learns the mean of its inputs."""

  def __init__(self):
    super().__init__()
    self.bias = self.add_weight(shape=(2,), initializer="zeros", name="bias")
    self.built = True

  def call(self, inputs, training=False):
    return inputs["x"] - self.bias

  def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    return ops.mean(y_pred**2)


def train_line(
  workdir,
  batches,
  *,
  model: keras.Model | None = None,
  steps: int = 8,
  log_every: int = 2,
  checkpoint_every: int = 4,
  **more,
):
  model = model or Line()
  loop.train(
    model,
    batches,
    workdir=str(workdir),
    schedule=loop.Schedule(
      steps=steps,
      batch_size=3,
      learning_rate=0.1,
      log_every=log_every,
      checkpoint_every=checkpoint_every,
    ),
    optimizer=bert_optimizer(learning_rate=0.1, steps=steps, min_warmup_steps=1),
    **more,
  )
  return model


def line_batch(step: int) -> dict[str, np.ndarray]:
  return {"x": np.random.default_rng(step).normal(size=[3, 2]).astype(np.float32) + 5}


def losses_of(workdir) -> dict[int, float]:
  rows = [json.loads(line) for line in open(os.path.join(workdir, "metrics.jsonl"))]
  assert len({row["step"] for row in rows}) == len(rows)
  return {row["step"]: row["loss"] for row in rows}


def test_training_does_not_go_on_with_something_else(tmp_path):
  """For example fine-tuning, after the retriever that it started from was trained again."""
  train_line(tmp_path / "W", line_batch, steps=4, made_from={"questions": "1", "retriever": "2"})
  before = losses_of(tmp_path / "W")
  for steps, others in ((4, {"questions": "1", "retriever": "3"}), (8, {"questions": "1"})):
    with pytest.raises(loop.TrainingError, match="with something else .retriever. and cannot go"):
      train_line(tmp_path / "W", line_batch, steps=steps, made_from=others)
    assert losses_of(tmp_path / "W") == before
  train_line(tmp_path / "W", line_batch, steps=8, made_from={"retriever": "2", "questions": "1"})
  assert list(losses_of(tmp_path / "W")) == [2, 4, 6, 8]


class Stop(Exception):
  pass


def stopping_at(step: int, batches):
  def stopped(at: int):
    if at == step:
      raise Stop
    return batches(at)

  return stopped


def test_batches_are_asked_once_each_and_finished_runs_do_nothing(tmp_path):
  asked = []
  train_line(
    tmp_path,
    lambda step: asked.append(step) or line_batch(step),
    extra_metrics=lambda: {"extra": len(asked)},
  )
  rows = progress.read_metrics(str(tmp_path))
  assert asked == list(range(8)) and [row["step"] for row in rows] == [2, 4, 6, 8]
  assert all(row["secs"] > 0 and row["extra"] > 0 for row in rows)
  np.testing.assert_allclose(
    [row["examples_per_sec"] for row in rows], [6 / row["secs"] for row in rows], rtol=1e-6
  )
  assert [
    artifacts.step_of(folder)
    for folder in artifacts.complete_folders(str(tmp_path / "checkpoints"))
  ] == [4, 8]
  before = progress.read_metrics(str(tmp_path))
  train_line(tmp_path, stopping_at(0, line_batch))  # asks for no batch
  assert progress.read_metrics(str(tmp_path)) == before


@pytest.mark.parametrize("slow", ["batches", "model"])
def test_waiting_for_batches_is_measured(slow, tmp_path):
  """They are made ahead: a slow model waits for none, a fast one nearly all the time."""
  secs = 0.2

  def batch(step: int) -> dict[str, np.ndarray]:
    time.sleep(secs if slow == "batches" else 0)
    return line_batch(step)

  class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
      time.sleep(secs if slow == "model" else 0)

  train_line(tmp_path, batch, callbacks=[Slow()])
  _, *rows = progress.read_metrics(str(tmp_path))
  shares = [row["data_wait_share"] for row in rows]
  if slow == "batches":
    assert all(0.5 < share <= 1 for share in shares), shares
  else:
    assert all(0 <= share < 0.2 for share in shares), shares


def test_loss_of_a_row_is_the_mean_of_its_steps(tmp_path):
  values = [1.0, 3.0, 10.0, 20.0]

  class Given(Line):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
      return ops.mean(x["x"]) + 0 * ops.sum(self.bias)

  train_line(
    tmp_path, lambda step: {"x": np.full([3, 2], values[step], np.float32)}, model=Given(), steps=4
  )
  assert losses_of(tmp_path) == {2: 2.0, 4: 15.0}


def ict_run(toy, workdir: str, stop_at: int | None = None):
  """Runs eight steps of ICT on the toy corpus, or fewer."""
  config = toy.config()
  table, tokenizer = passages.load(config.passages), passages.load_tokenizer(config.passages)
  keras.utils.set_random_seed(1)
  retriever = new_models.new_retriever(settings.retriever_start(config), tokenizer)
  data = IctExamples(table, tokenizer=tokenizer, query_length=24, passage_length=44)

  def batches(step):
    return data.batch(step, batch_size=4, seed=0)

  loop.train(
    InBatchModel(retriever, measures_removed=True),
    batches if stop_at is None else stopping_at(stop_at, batches),
    workdir=workdir,
    schedule=loop.Schedule(
      steps=8, batch_size=4, learning_rate=1e-2, log_every=2, checkpoint_every=4
    ),
    optimizer=bert_optimizer(learning_rate=1e-2, steps=8),
  )
  return retriever


def test_stopped_and_resumed_equals_uninterrupted(toy, tmp_path, capfd):
  whole = ict_run(toy, str(tmp_path / "whole"))
  with pytest.raises(Stop):  # as it was raised, not as tf.data converts it
    # after the row of step 6, which is past the last checkpoint
    ict_run(toy, str(tmp_path / "stopped"), stop_at=7)
  left = losses_of(tmp_path / "stopped")
  assert max(left) == 6 and artifacts.latest(str(tmp_path / "stopped/checkpoints")).endswith(
    "/00000004"
  )
  resumed = ict_run(toy, str(tmp_path / "stopped"))
  assert "resuming from step 4 of 8" in capfd.readouterr().err
  for got, wanted in zip(resumed.weights, whole.weights, strict=True):
    np.testing.assert_array_equal(got, wanted, err_msg=wanted.path)
  assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "stopped")
  assert {step: left[step] for step in (2, 4)} == {
    step: losses_of(tmp_path / "whole")[step] for step in (2, 4)
  }


def test_killed_process_goes_on(toy, tmp_path):
  workdir = str(tmp_path / "ict")
  command = [
    sys.executable,
    "-m",
    "realm_tf.pretrain_ict",
    f"--config={toy.config_path}",
    f"--workdir={workdir}",
    "--config.ict.steps=60",
    "--config.ict.log_every=2",
    "--config.ict.checkpoint_every=10",
  ]
  trainer = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
  wait_until(
    lambda: (
      len(progress.read_metrics(workdir)) >= 7
      and artifacts.latest(os.path.join(workdir, "checkpoints"))
    ),
    "7 rows",
  )
  trainer.send_signal(signal.SIGKILL)
  trainer.wait()
  before = {row["step"]: row["loss"] for row in progress.read_metrics(workdir)}
  kept = artifacts.step_of(artifacts.latest(os.path.join(workdir, "checkpoints")))
  assert 10 <= kept <= max(before) < 60 and not os.path.exists(os.path.join(workdir, "snapshots"))
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  rows = losses_of(workdir)
  assert done.returncode == 0 and f"resuming from step {kept} of 60" in done.stderr, done.stderr
  assert list(rows) == list(range(2, 61, 2))
  assert {step: rows[step] for step in before if step <= kept} == {
    step: before[step] for step in before if step <= kept
  }
  # the repeated steps, too
  np.testing.assert_allclose([rows[step] for step in before], list(before.values()), rtol=1e-3)
  assert (
    snapshots.load_retriever(artifacts.step_folder(os.path.join(workdir, "snapshots"), 60)).dim == 8
  )


def test_full_disk_stops_with_a_line_and_loses_nothing(toy, tmp_path):
  workdir = str(tmp_path / "ict")
  command = [
    sys.executable,
    "-m",
    "realm_tf.pretrain_ict",
    f"--config={toy.config_path}",
    f"--workdir={workdir}",
    "--config.ict.steps=12",
    "--config.ict.log_every=2",
    "--config.ict.checkpoint_every=6",
  ]

  def limit():
    # rows of metrics fit, a checkpoint does not
    return resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

  full = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=limit)
  last = full.stderr.splitlines()[-1]
  assert full.returncode == 1 and "File too large" in last, last
  assert (
    max(losses_of(workdir)) == 6 and artifacts.latest(os.path.join(workdir, "checkpoints")) is None
  )
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0 and list(losses_of(workdir)) == [2, 4, 6, 8, 10, 12], done.stderr
  assert artifacts.complete_folders(os.path.join(workdir, "snapshots"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_loss_that_is_not_finite_stops_with_the_step(bad, tmp_path):
  def batches(step):
    return {"x": line_batch(step)["x"] * (bad if step == 6 else 1)}

  with pytest.raises(
    loop.TrainingError, match=f"the loss is {bad} at step 7; lower the learning rate"
  ):
    train_line(tmp_path, batches, steps=12)
  assert list(losses_of(tmp_path)) == [2, 4, 6]
  assert artifacts.latest(str(tmp_path / "checkpoints")).endswith("/00000004"), (
    "nothing after the bad step is kept"
  )


def test_log_every_must_divide(tmp_path):
  for numbers in (dict(steps=9), dict(checkpoint_every=5)):
    with pytest.raises(loop.TrainingError, match="must be multiples of log_every, 2"):
      train_line(tmp_path, line_batch, **numbers)


def test_half_written_last_row_survives(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 2, "loss": 1.5}\n{"step": 4, "loss": 1.25}\n{"step": 6, "lo')
  assert [row["step"] for row in progress.read_metrics(str(tmp_path))] == [2, 4]
  log = progress.MetricsLog(str(tmp_path), start_step=4)
  log.write(6, {"loss": np.float32(0.5)})
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    {"step": 2, "loss": 1.5},
    {"step": 4, "loss": 1.25},
    {"step": 6, "loss": 0.5},
  ]
  # resumed from an earlier checkpoint: later rows will be written again
  progress.MetricsLog(str(tmp_path), start_step=2)
  assert [row["step"] for row in progress.read_metrics(str(tmp_path))] == [2]
  assert progress.read_metrics(str(tmp_path / "nothing")) == []


# ---------------------------------------------------------------------------------- the best on dev


class Kept:
  """A run of `Line` with given exact match on dev questions.

  Its snapshots are its weights.
  """

  def __init__(self, workdir, scores: dict[int, float]):
    self.workdir, self.scores, self.model, self.measured = str(workdir), scores, Line(), []

  def write(self, root: str, step: int, more: dict) -> str:
    folder = artifacts.step_folder(root, step)
    with publishing.publish(folder, kind="snapshot", config={"step": step}, inputs={}) as staged:
      artifacts.write_text(
        os.path.join(staged.path, "bias.txt"), repr(self.model.bias.numpy().tolist())
      )
      staged.details = {"step": step, **more}
    return folder

  def restore(self, folder: str) -> None:
    self.model.bias.assign(json.loads(artifacts.read_text(os.path.join(folder, "bias.txt"))))

  def train(self, batches=line_batch) -> dict:
    """Trains, and leaves the best weights in the model; returns what is reported of them."""
    self.best = loop.KeepBest(
      self.measure, self.write, self.restore, workdir=self.workdir, every_steps=4, steps=18
    )
    train_line(
      self.workdir, batches, model=self.model, steps=18, checkpoint_every=6, best=self.best
    )
    return self.best.take()

  def measure(self) -> float:
    self.measured.append(self.best.step)
    return self.scores[self.best.step]


def logged(workdir) -> dict[int, float]:
  return {
    row["step"]: row[loop.DEV_EXACT_MATCH]
    for row in progress.read_metrics(str(workdir))
    if loop.DEV_EXACT_MATCH in row
  }


SCORES = {4: 0.25, 8: 0.5, 12: 0.5, 16: 0.125, 18: 0.375}  # the last step is measured too


def test_the_best_on_dev_is_kept_and_logged(tmp_path):
  """Keeps the earlier of two equally good ones, with its weights, not those of the last step."""
  kept = Kept(tmp_path / "W", SCORES)
  assert kept.train() == {"best_step": 8, "dev_exact_match": 0.5}
  assert logged(tmp_path / "W") == SCORES and kept.measured == list(SCORES)
  assert os.listdir(tmp_path / "W/best") == ["00000008"]
  last, at_8 = (
    train_line(tmp_path / "last", line_batch, steps=18, checkpoint_every=6),
    Kept(tmp_path / "stopped", SCORES),
  )
  with pytest.raises(Stop):
    at_8.train(stopping_at(8, line_batch))
  np.testing.assert_array_equal(kept.model.bias, at_8.model.bias, err_msg="weights after step 8")
  assert np.abs(np.array(last.bias) - np.array(kept.model.bias)).max() > 0.01, "the last step's"


@pytest.mark.parametrize("stop_at", [9, 17])
def test_a_run_that_was_killed_goes_on_with_its_best(tmp_path, stop_at):
  """Stops after the best was kept: before the next checkpoint, and after it."""
  whole = Kept(tmp_path / "whole", SCORES)
  said = whole.train()
  with pytest.raises(Stop):
    Kept(tmp_path / "stopped", SCORES).train(stopping_at(stop_at, line_batch))
  kept = loop.checkpoint_step(str(tmp_path / "stopped"))
  assert kept == stop_at // 6 * 6 and os.path.exists(tmp_path / "stopped/best/00000008")
  resumed = Kept(tmp_path / "stopped", SCORES)
  assert resumed.train() == said and logged(tmp_path / "stopped") == SCORES
  assert resumed.measured == [step for step in SCORES if step > kept]
  np.testing.assert_array_equal(resumed.model.bias, whole.model.bias, err_msg="the best weights")


def test_a_better_one_replaces_what_a_killed_run_left(tmp_path):
  """A run differs when repeated, as with background refreshes of the index."""
  with pytest.raises(Stop):
    Kept(tmp_path, SCORES).train(stopping_at(11, line_batch))
  again = Kept(tmp_path, {8: 0.25, 12: 0.75, 16: 0.5, 18: 0.5})
  assert again.train() == {"best_step": 12, "dev_exact_match": 0.75}
  assert os.listdir(tmp_path / "best") == ["00000012"]


def test_what_was_best_before_the_first_checkpoint_does_not_count(tmp_path):
  """A run without a checkpoint may be of other data: nothing of it is used."""
  with pytest.raises(Stop):
    Kept(tmp_path, SCORES | {4: 1.0}).train(stopping_at(5, line_batch))
  assert os.listdir(tmp_path / "best") == ["00000004"] and not loop.checkpoint_step(str(tmp_path))
  assert Kept(tmp_path, SCORES).train() == {"best_step": 8, "dev_exact_match": 0.5}


def test_a_run_that_ended_before_there_were_dev_questions(tmp_path):
  kept = Kept(tmp_path, SCORES)
  train_line(tmp_path, line_batch, model=kept.model, steps=18, checkpoint_every=6)
  last = np.array(kept.model.bias)
  assert kept.train() == {} and not kept.measured
  np.testing.assert_array_equal(kept.model.bias, last, err_msg="stay the last step's")
