"""Warm start of the retriever by recurring spans, after the inverse cloze task.

Spider, Ram et al. 2022.

    python -m realm_tf.pretrain_spans --config=configs/own_corpus.py \\
        --workdir=runs/own_corpus/recurring_spans

For each masked sentence, the retriever learns to find another passage with the masked span among
the passages of the batch. If interrupted, run it again with the same workdir to resume.
"""

from realm_tf import cli

if __name__ == "__main__":
  cli.start_trainer("realm_tf.pretrain_spans", section="recurring_spans")

import keras

from realm_tf import settings
from realm_tf.corpus import passages
from realm_tf.examples import packing, recurring_spans
from realm_tf.examples.ict import IctExamples
from realm_tf.models import snapshots
from realm_tf.models.in_batch import InBatchModel
from realm_tf.storage import artifacts
from realm_tf.training import warm_start
from realm_tf.training.realm_batches import masked_sentences


def pretrain_spans(config, workdir: str) -> str:
  """Continues training the retriever of `recurring_spans.init` and publishes it.

  Returns:
    The last snapshot's folder.

  Raises:
    ArtifactError: inputs are missing, or do not belong together.
    UserError: no span occurs in other passages.
  """
  # ---- Settings
  seed, passages_folder, knowledge_spans = config.seed, config.passages, config.knowledge_spans
  section = config.recurring_spans
  init, eval_every, query_words = section.init, section.eval_every, tuple(section.query_words)
  keep_span = section.keep_span
  ict_share, removal_rate = section.ict_share, section.ict_removal_rate
  title_share = section.title_share
  masking, lengths = config.masking, settings.lengths(config)
  schedule, setup = settings.schedule(section), settings.setup(config)

  # ---- Inputs
  keras.utils.set_random_seed(seed)
  table = passages.load(passages_folder)
  tokenizer = passages.load_tokenizer(passages_folder)
  start = snapshots.newest(
    init, advice="run realm_tf.pretrain_ict first (steps=0 gives a fresh retriever)."
  )
  packing.check_vocabulary(artifacts.read_info(start), start, tokenizer)

  # ---- Training
  with setup.scope():
    retriever = snapshots.load_retriever(start)
    model = InBatchModel(retriever)
  sentences = masked_sentences(
    knowledge_spans, table, tokenizer=tokenizer, lengths=lengths, masking=masking
  )
  ict = IctExamples(
    table,
    tokenizer=tokenizer,
    query_length=lengths.query_length,
    passage_length=lengths.passage_length,
    title_length=lengths.title_length,
    removal_rate=removal_rate,
    query_words=query_words,
    title_share=title_share,
  )
  data = recurring_spans.RecurringSpans(
    sentences,
    table,
    tokenizer=tokenizer,
    query_length=lengths.query_length,
    passage_length=lengths.passage_length,
    title_length=lengths.title_length,
    query_words=query_words,
    keep_span=keep_span,
    title_share=title_share,
    ict=ict,
    ict_share=ict_share,
  )
  return warm_start.train_retriever(
    model,
    data,
    workdir=workdir,
    schedule=schedule,
    setup=setup,
    seed=seed,
    eval_every=eval_every,
    sentences=lambda: sentences,
    table=table,
    tokenizer=tokenizer,
    made_by="pretrain_spans",
    made_from={"retriever": artifacts.read_info(start)["fingerprint"]},
  )
