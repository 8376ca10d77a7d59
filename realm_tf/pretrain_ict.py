"""Warm start of the retriever by the inverse cloze task (ORQA, section 4).

    python -m realm_tf.pretrain_ict --config=configs/quickstart.py --workdir=runs/quickstart/ict

Run again with the same workdir, it goes on where it stopped.
"""

import os

import keras

from realm_tf import artifacts, examples, passages, settings, snapshots, training
from realm_tf.models.ict import IctModel
from realm_tf.optimizer import bert_optimizer


def pretrain_ict(config, workdir: str) -> str:
  """Trains and publishes; returns the last snapshot's folder.

  Raises:
    ArtifactError: passages missing or of another vocabulary.
    UserError: the batch is larger than the corpus.
  """
  keras.utils.set_random_seed(config.seed)
  table = passages.load(config.passages)
  tokenizer = settings.tokenizer(config.passages)
  if config.ict.batch_size > len(table):
    raise artifacts.UserError(f"ict.batch_size is {config.ict.batch_size}, the corpus has {len(table)} passages; in-batch negatives want "
                     "different passages: lower the batch size.")
  retriever = settings.new_retriever(config, tokenizer)
  with settings.scope(config):
    model = IctModel(retriever)
    optimizer = bert_optimizer(
        learning_rate=config.ict.learning_rate, steps=config.ict.steps, **config.optimizer)
  data = examples.IctExamples(table, tokenizer=tokenizer, query_length=config.ict.query_length,
                              passage_length=config.retriever.passage_length, removal_rate=config.ict.removal_rate)
  if config.ict.steps:
    training.train(
        model, lambda step: data.batch(step, batch_size=config.ict.batch_size, seed=config.seed),
        workdir=workdir, steps=config.ict.steps, log_every=config.ict.log_every,
        checkpoint_every=config.ict.checkpoint_every, batch_size=config.ict.batch_size, jit_compile=config.jit_compile, optimizer=optimizer)
  return snapshots.publish(os.path.join(workdir, "snapshots"), config.ict.steps, {"retriever": retriever},
                           tokenizer=tokenizer, made_by="pretrain_ict")


if __name__ == "__main__":
  settings.start_trainer(pretrain_ict, section="ict")
