"""Training of a retriever or a masked reader by itself, before REALM."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.errors import UserError
from realm_tf.examples.masked_sentences import MaskedSentences
from realm_tf.examples.recurring_spans import HELD_OUT_RECALL, HeldOutRecall
from realm_tf.models import snapshots
from realm_tf.models.in_batch import InBatchModel
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.realm import RealmModel
from realm_tf.retrieval.dense import IndexedRetriever
from realm_tf.training import loop
from realm_tf.training.loop import Schedule, Setup
from realm_tf.training.realm_batches import Batches


class RetrieverExamples(Protocol):
  """A source of training batches."""

  def batch(self, step: int, *, batch_size: int, seed: int) -> Mapping[str, np.ndarray]: ...


def train_retriever(
  model: InBatchModel,
  data: RetrieverExamples,
  *,
  workdir: str,
  schedule: Schedule,
  setup: Setup,
  seed: int,
  eval_every: int,
  sentences: Callable[[], MaskedSentences],
  table: PassageTable,
  tokenizer: Tokenizer,
  made_by: str,
  made_from: Mapping[str, str] = {},
) -> str:
  """Trains a retriever and publishes it.

  The published weights are the best by held-out recall if `eval_every` is not 0, else the last.

  Args:
    model: holds the retriever.
    data: source of the batches.
    workdir: workdir of the trainer.
    schedule: schedule of the training; with no steps, the retriever is published unchanged.
    setup: devices, precision and optimizer.
    seed: seed of the batches.
    eval_every: steps between measurements of held-out recall; 0 for none.
    sentences: reads sentences, some of them held out; called only if `eval_every` is not 0.
    table: the passages.
    tokenizer: the retriever's tokenizer.
    made_by: the trainer's name.
    made_from: see `loop.train`.

  Returns:
    The snapshot's folder.

  Raises:
    UserError: eval_every is not a multiple of log_every, or nothing is held out.
  """
  retriever, details, best = model.retriever, {}, None
  write_snapshot = snapshots.publisher(
    {"retriever": retriever}, tokenizer=tokenizer, made_by=made_by
  )
  if eval_every % schedule.log_every:
    raise UserError(
      f"eval_every is {eval_every}; it must be a multiple of log_every, {schedule.log_every}, or 0."
    )
  if schedule.steps and eval_every:
    best = loop.KeepBest(
      HeldOutRecall(retriever, sentences(), table, tokenizer=tokenizer),
      write_snapshot,
      lambda folder: retriever.set_weights(snapshots.load_retriever(folder).get_weights()),
      name=HELD_OUT_RECALL,
      workdir=workdir,
      every_steps=eval_every,
      steps=schedule.steps,
    )
  if schedule.steps:
    with setup.scope():
      optimizer = setup.optimizer(schedule)
    loop.train(
      model,
      lambda step: data.batch(step, batch_size=schedule.batch_size, seed=seed),
      workdir=workdir,
      schedule=schedule,
      jit_compile=setup.jit_compile,
      optimizer=optimizer,
      best=best,
      made_from=made_from,
    )
    details = best.take() if best else {}
  return write_snapshot(os.path.join(workdir, "snapshots"), schedule.steps, details)


@dataclasses.dataclass(frozen=True)
class MaskedLm:
  """Settings of a masked-LM stage.

  Attributes:
    schedule: schedule of the stage; with no steps the stage is skipped.
    pretraining_every: steps from one batch of the pre-training corpus to the next.
    holders: share of each batch that is read with another passage that holds the masked span.
  """

  schedule: Schedule
  pretraining_every: int
  holders: float


def train_reader(
  reader: MaskedReader,
  batches: Batches,
  *,
  stage: MaskedLm,
  workdir: str,
  setup: Setup,
  indexed: IndexedRetriever | None = None,
) -> None:
  """Trains the reader alone with one given passage for each query: REALM with a single candidate.

  Args:
    reader: the reader to train.
    batches: source of the masked sentences.
    stage: settings of the stage.
    workdir: workdir of the stage.
    setup: devices, precision and optimizer.
    indexed: finds passages for sentences of the pre-training corpus; if None, they are read with
      the null passage.
  """
  schedule = stage.schedule
  if not schedule.steps:
    return
  with setup.scope():
    model = RealmModel(None, reader)
    optimizer = setup.optimizer(schedule)
  loop.train(
    model,
    lambda step: batches.masked_lm(
      step,
      batch_size=schedule.batch_size,
      pretraining_every=stage.pretraining_every,
      holders=stage.holders,
      indexed=indexed,
    ),
    workdir=workdir,
    schedule=schedule,
    jit_compile=setup.jit_compile,
    optimizer=optimizer,
  )
