"""How a retriever is trained by itself, before REALM: shared by the inverse cloze task and recurring spans."""

import os
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from realm_tf import settings, snapshots, training
from realm_tf.errors import UserError
from realm_tf.examples import MaskedSentences
from realm_tf.models.in_batch import InBatchModel
from realm_tf.optimizer import bert_optimizer
from realm_tf.passages import PassageTable
from realm_tf.recurring_spans import HELD_OUT_RECALL, HeldOutRecall
from realm_tf.tokenization import Tokenizer


class Batches(Protocol):
  """Gives the batch of a training step."""

  def batch(self, step: int, *, batch_size: int, seed: int) -> Mapping[str, np.ndarray]: ...


def train(
  config,
  section,
  workdir: str,
  model: InBatchModel,
  data: Batches,
  sentences: MaskedSentences | None,
  table: PassageTable,
  tokenizer: Tokenizer,
  *,
  made_by: str,
) -> str:
  """Trains a retriever, and publishes it: the best by held-out recall where `section.eval_every` asks for that, or the last.

  Args:
    section: steps, batch_size, learning_rate, eval_every, log_every, checkpoint_every.
    sentences: some held out; needed for `eval_every` only.
    made_by: the trainer's name.

  Returns:
    The snapshot's folder.

  Raises:
    UserError: eval_every does not fit log_every, or nothing is held out.
  """
  retriever, said = model.retriever, {}

  def write_snapshot(root: str, step: int, details: Mapping) -> str:
    return snapshots.publish(
      root, step, {"retriever": retriever}, tokenizer=tokenizer, made_by=made_by, details=details)

  best = None
  if section.eval_every % section.log_every:
    raise UserError(
      f"eval_every is {section.eval_every}; it must be a multiple of log_every, {section.log_every}, or 0.")
  if section.steps and section.eval_every:
    best = training.KeepBest(
      HeldOutRecall(retriever, sentences, table, tokenizer=tokenizer),
      write_snapshot,
      lambda folder: retriever.set_weights(snapshots.load_retriever(folder).get_weights()),
      name=HELD_OUT_RECALL,
      workdir=workdir,
      every_steps=section.eval_every,
      steps=section.steps,
    )
  if section.steps:
    with settings.scope(config):
      optimizer = bert_optimizer(
        learning_rate=section.learning_rate, steps=section.steps, **config.optimizer)
    training.train(
      model,
      lambda step: data.batch(step, batch_size=section.batch_size, seed=config.seed),
      workdir=workdir,
      steps=section.steps,
      log_every=section.log_every,
      checkpoint_every=section.checkpoint_every,
      batch_size=section.batch_size,
      jit_compile=config.jit_compile,
      optimizer=optimizer,
      best=best,
    )
    said = best.take() if best else {}
  return write_snapshot(os.path.join(workdir, "snapshots"), section.steps, said)
