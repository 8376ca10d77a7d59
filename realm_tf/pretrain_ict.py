"""Warm start of the retriever by the inverse cloze task (ORQA, section 4).

    python -m realm_tf.pretrain_ict --config=configs/quickstart.py --workdir=runs/quickstart/ict

Run again with the same workdir, it goes on where it stopped. With ict.eval_every, the snapshot that finds most of the held-out
recurring spans is published: the task becomes too easy long before its loss stops to fall.
"""

import keras

from realm_tf import artifacts, examples, passages, settings, warm_start
from realm_tf.models.in_batch import InBatchModel


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
    model = InBatchModel(retriever, measures_removed=True)
  data = examples.IctExamples(
    table,
    tokenizer=tokenizer,
    query_length=config.ict.query_length,
    passage_length=config.retriever.passage_length,
    title_length=config.retriever.title_length,
    removal_rate=config.ict.removal_rate,
    query_words=config.ict.query_words,
  )
  sentences = settings.masked_sentences(config, config.knowledge_spans, table, tokenizer) if config.ict.eval_every else None
  return warm_start.train(config, config.ict, workdir, model, data, sentences, table, tokenizer, made_by="pretrain_ict")


if __name__ == "__main__":
  settings.start_trainer(pretrain_ict, section="ict")
