"""Warm start of the retriever by the inverse cloze task (ORQA, section 4).

    python -m realm_tf.pretrain_ict --config=configs/quickstart.py --workdir=runs/quickstart/ict

If interrupted, run it again with the same workdir to resume. With ict.eval_every, the snapshot that
finds most of the held-out recurring spans is published, because the task becomes too easy long
before its loss stops falling.
"""

from realm_tf import cli

if __name__ == "__main__":
  cli.start_trainer("realm_tf.pretrain_ict", section="ict")

import keras

from realm_tf import settings
from realm_tf.corpus import passages
from realm_tf.examples.ict import IctExamples
from realm_tf.models.in_batch import InBatchModel
from realm_tf.storage import artifacts
from realm_tf.training import new_models, warm_start
from realm_tf.training.realm_batches import masked_sentences


def pretrain_ict(config, workdir: str) -> str:
  """Trains and publishes the retriever; returns the last snapshot's folder.

  Raises:
    ArtifactError: passages are missing or have another vocabulary.
    UserError: the batch is larger than the corpus.
  """
  # ---- Settings
  seed, passages_folder, knowledge_spans = config.seed, config.passages, config.knowledge_spans
  query_length, query_words = config.ict.query_length, tuple(config.ict.query_words)
  removal_rate, title_share = config.ict.removal_rate, config.ict.title_share
  eval_every = config.ict.eval_every
  masking, lengths = config.masking, settings.lengths(config)
  retriever_start = settings.retriever_start(config)
  schedule, setup = settings.schedule(config.ict), settings.setup(config)

  # ---- Inputs
  keras.utils.set_random_seed(seed)
  table = passages.load(passages_folder)
  tokenizer = passages.load_tokenizer(passages_folder)
  if schedule.batch_size > table.num_alive:
    raise artifacts.UserError(
      f"ict.batch_size is {schedule.batch_size}, but the corpus has {table.num_alive} passages; "
      "in-batch negatives must be different passages. Lower the batch size."
    )

  # ---- Training
  retriever = new_models.new_retriever(retriever_start, tokenizer)
  with setup.scope():
    model = InBatchModel(retriever, measures_removed=True)
  data = IctExamples(
    table,
    tokenizer=tokenizer,
    query_length=query_length,
    passage_length=lengths.passage_length,
    title_length=lengths.title_length,
    removal_rate=removal_rate,
    query_words=query_words,
    title_share=title_share,
  )
  return warm_start.train_retriever(
    model,
    data,
    workdir=workdir,
    schedule=schedule,
    setup=setup,
    seed=seed,
    eval_every=eval_every,
    sentences=lambda: masked_sentences(
      knowledge_spans, table, tokenizer=tokenizer, lengths=lengths, masking=masking
    ),
    table=table,
    tokenizer=tokenizer,
    made_by="pretrain_ict",
  )
