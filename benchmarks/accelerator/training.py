"""Training steps of Keras models as jitted functions of JAX arrays, and their cost."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

from benchmarks.accelerator import batches, drawing
from benchmarks.accelerator.batches import Corpus, Layout
from realm_tf.models.in_batch import InBatchModel
from realm_tf.models.realm import RealmModel
from realm_tf.models.retriever import Tower
from realm_tf.training import optimizer

# Dense bfloat16 operations per second, from NVIDIA's data sheets.
_PEAKS = {"H100": 989e12, "H200": 989e12}
_FIRST_STEPS = 2  # not timed


class State(NamedTuple):
  """The state changed by a step: trainable and other variables of the model and the optimizer."""

  trainable: list
  fixed: list
  optimizer: list


class Trained(NamedTuple):
  """The cost and metrics of a stage.

  Attributes:
    compile_secs: time before the first step.
    secs, steps: time and steps of the training.
    steps_per_sec: rate after the first few steps.
    metrics: means over each tenth of the steps.
  """

  compile_secs: float
  secs: float
  steps: int
  steps_per_sec: float
  metrics: dict


def values(variables: Sequence[keras.Variable]) -> list:
  """Returns copies on the accelerator, since a step may overwrite its inputs."""
  return [jax.device_put(jnp.array(variable.value), jax.devices()[0]) for variable in variables]


class Trainer:
  """Trains a model for one stage.

  Args:
    model: its variables are the initial values, and receive the result.
    batch: (corpus, key, step, extra) → the inputs of a step, drawn on the device, and metrics to
      pass on.
    corpus: the corpus on the device.
    steps, learning_rate: steps and peak rate of the schedule.
    slow, slow_factor: variables with another learning rate, and its factor.
  """

  def __init__(
    self,
    model: InBatchModel | RealmModel,
    batch: Callable,
    *,
    corpus: Corpus,
    steps: int,
    learning_rate: float,
    slow: Sequence[keras.Variable] = (),
    slow_factor: float = 1.0,
  ):
    self.model, self.corpus, loss = model, corpus, loss_of(model)
    self.optimizer = optimizer.bert_optimizer(
      learning_rate=learning_rate, steps=steps, slow=slow, slow_factor=slow_factor
    )
    self.optimizer.build(model.trainable_variables)

    def step(state: State, corpus: Corpus, key, number, extra):
      drawn = batch(corpus, jax.random.fold_in(key, number), number, extra)
      (_, (fixed, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(
        state.trainable, state.fixed, drawn
      )
      trainable, changed = self.optimizer.stateless_apply(
        state.optimizer, gradients, state.trainable
      )
      return State(trainable, fixed, changed), metrics

    self._step = jax.jit(step, donate_argnums=0)

  def run(
    self,
    steps: int,
    *,
    seed: int,
    extra=None,
    secs: float = float("inf"),
    every: int = 0,
    refresh: Callable | None = None,
  ) -> Trained:
    """Trains for a number of steps or seconds, and assigns the result to the model.

    Args:
      steps: number of steps.
      seed: seed of the batches.
      extra: passed to `batch`.
      secs: time limit.
      every: steps between refreshes.
      refresh: `refresh(trainable)` returns the next `extra`; the time that it takes counts.
    """
    state = State(
      values(self.model.trainable_variables),
      values(self.model.non_trainable_variables),
      values(self.optimizer.variables),
    )
    key, started = jax.random.key(seed), time.monotonic()
    step = self._step.lower(state, self.corpus, key, jnp.int32(0), extra).compile()
    compile_secs = time.monotonic() - started
    history, started, done = [], time.monotonic(), 0
    timed_from, timed_at = 0, started
    while done < steps and time.monotonic() - started < secs:
      if refresh is not None and done and done % every == 0:
        extra = refresh(state.trainable)
      state, metrics = step(state, self.corpus, key, jnp.int32(done), extra)
      history.append(metrics)
      done += 1
      # The host must not run ahead, or the measured time would be meaningless.
      if done == _FIRST_STEPS or done % 20 == 0:
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
          raise FloatingPointError(f"the loss is {loss} at step {done}.")
        if done == _FIRST_STEPS:
          timed_from, timed_at = done, time.monotonic()
    jax.block_until_ready(state)
    ended = time.monotonic()
    for variable, value in zip(
      self.model.trainable_variables + self.model.non_trainable_variables,
      state.trainable + state.fixed,
      strict=True,
    ):
      variable.assign(value)
    history = jax.device_get(history)
    tenths = np.array_split(np.arange(done), min(10, done))
    means = {
      name: [round(float(np.mean([history[at][name] for at in part])), 4) for part in tenths]
      for name in history[0]
    }
    return Trained(
      compile_secs, ended - started, done, (done - timed_from) / max(ended - timed_at, 1e-9), means
    )


# ------------------------------------------------------------------------------- losses and batches


def loss_of(model: InBatchModel | RealmModel) -> Callable:
  """Returns a function of the model's loss and metrics; a batch is (inputs, metrics to pass on)."""

  def loss(trainable, fixed, batch):
    inputs, metrics = batch
    nothing = [jnp.zeros(variable.shape, variable.dtype) for variable in model.metrics_variables]
    outputs, fixed = model.stateless_call(trainable, fixed, inputs, training=True)
    value, (_, fixed, sums) = model.stateless_compute_loss(
      trainable, fixed, nothing, x=inputs, y_pred=outputs
    )
    means = {
      name: total / count
      for name, total, count in zip(model.means, sums[::2], sums[1::2], strict=True)
    }
    return value, (fixed, metrics | means)

  return loss


def realm_batch(
  tower: Tower,
  layout: Layout,
  *,
  batch_size: int,
  candidates: int,
  holders: int,
  anneal: float,
  own_passages: float,
  pool: int,
  with_holders: float,
  query_words: Sequence[int],
  keep_span: float,
  steps: int,
) -> Callable:
  """Returns a function that draws clozes and finds candidates among all passages.

  Queries are embedded with the same snapshot as the passages.

  Args:
    tower: the query tower.
    layout: layout of the inputs.
    batch_size: B.
    candidates: K, including the null passage.
    holders: initial number of candidates that hold the masked span.
    anneal: share of the steps over which retrieved ones replace them; 0: they stay.
    own_passages: share of the clozes that keep their own passage, as one of the holders.
    pool: see `drawing.candidates`.
    with_holders: share of the clozes that are drawn from the spans that have holders.
    query_words: see `batches.clozes`.
    keep_span: share of the queries in which the retriever, not the reader, sees the span.
    steps: steps of the stage.
  """

  def batch(corpus, key, number, extra):
    keys = jax.random.split(key, 4)
    spans = drawing.draw_spans(corpus, keys[0], batch_size, asked=round(with_holders * batch_size))
    drawn = batches.clozes(corpus, spans, layout, key=keys[2], query_words=query_words)
    query_ids = drawing.keep_spans(drawn, keys[3], keep_span)
    queries = tower.stateless_call(extra["trainable"], extra["fixed"], query_ids)[0]
    numbers, given = drawing.candidates(
      corpus,
      keys[1],
      drawn,
      queries @ extra["index"].T,
      candidates,
      holders=holders,
      share=jnp.maximum(0.0, 1 - number / (anneal * steps)) if anneal else 1.0,
      own=round(own_passages * batch_size),
      pool=pool,
    )
    found = drawing.holds(corpus, drawn, numbers) & ~jnp.any(
      numbers[..., None] == given[:, None], axis=-1
    )
    metrics = {
      "holder_retrieved": jnp.sum(jnp.any(found, axis=1))
      / jnp.maximum(jnp.sum(drawn.phrase >= 0), 1),
      "holders_given": jnp.mean(jnp.sum(given >= 0, axis=1).astype(jnp.float32)),
    }
    inputs = {**batches.realm(corpus, drawn, numbers, layout), "query_ids": query_ids}
    return {**inputs, "unread": drawing.unread(corpus, drawn, numbers)}, metrics

  return batch


# ---------------------------------------------------------------------------------------- embedding


class Index:
  """The embeddings of all passages, on the device.

  Args:
    tower: the passage tower.
    chunk: passages embedded at once.
  """

  def __init__(self, tower: Tower, corpus: Corpus, layout: Layout, *, chunk: int):
    self.tower, self.corpus = tower, corpus
    num = len(corpus.rows) - 1

    def embed(trainable, fixed, corpus):
      def one(numbers):
        inputs = batches.passages(corpus, numbers, layout)
        return tower.stateless_call(
          trainable, fixed, inputs["passage_ids"], inputs["passage_segments"]
        )[0]

      numbers = jnp.minimum(jnp.arange(-(-num // chunk) * chunk), num - 1).reshape(-1, chunk)
      return jax.lax.map(one, numbers).reshape(-1, self.dim)[:num]

    def search(trainable, fixed, index, queries):
      return jax.lax.top_k(
        tower.stateless_call(trainable, fixed, queries)[0] @ index.T, min(20, num)
      )[1]

    self.dim = tower.projection.units
    self._embed, self._search = jax.jit(embed), jax.jit(search)

  def snapshot(self, trainable: Sequence | None = None) -> dict:
    """Embeds all passages with the given or current weights; returns them with the embeddings."""
    trainable = (
      values(self.tower.trainable_variables)
      if trainable is None
      else [jnp.array(value) for value in trainable]
    )
    fixed = values(self.tower.non_trainable_variables)
    return {
      "trainable": trainable,
      "fixed": fixed,
      "index": self._embed(trainable, fixed, self.corpus),
    }

  def search(self, snapshot: Mapping, queries, *, block: int = 256) -> np.ndarray:
    """Returns the 20 best passages for packed queries [Q, Lq]: [Q, 20]."""
    padded = jnp.pad(queries, [[0, -len(queries) % block], [0, 0]])
    found = [
      self._search(
        snapshot["trainable"], snapshot["fixed"], snapshot["index"], padded[at : at + block]
      )
      for at in range(0, len(padded), block)
    ]
    return np.concatenate([np.asarray(part) for part in found])[: len(queries)]


# -------------------------------------------------------------------------------------------- costs


def encoder_operations(architecture: Mapping, rows: int, length: int) -> float:
  """Counts multiplications and additions of an encoder's forward matrix products, with padding."""
  width, inner = architecture["hidden_dim"], architecture["intermediate_dim"]
  return (
    rows
    * length
    * architecture["num_layers"]
    * (2 * (4 * width * width + 2 * width * inner) + 4 * length * width)
  )


def head_operations(architecture: Mapping, rows: int, masks: int) -> float:
  """Counts the same for the masked-LM head."""
  width = architecture["hidden_dim"]
  return rows * masks * 2 * width * (width + architecture["vocabulary_size"])


def peak_operations() -> float | None:
  """Returns the chip's bfloat16 operations per second, or None if unknown."""
  kind = jax.devices()[0].device_kind
  return next((peak for name, peak in _PEAKS.items() if name in kind), None)


def peak_memory_gb() -> float | None:
  """Returns the peak memory in use on the device since the process started."""
  stats = jax.devices()[0].memory_stats() or {}
  return round(stats["peak_bytes_in_use"] / 1e9, 2) if "peak_bytes_in_use" in stats else None
