"""Warm start of the retriever by recurring spans, after the inverse cloze task. Spider, Ram et al. 2022.

    python -m realm_tf.pretrain_spans --config=configs/own_corpus.py --workdir=runs/own_corpus/recurring_spans

A masked sentence asks for another passage that holds the masked span, among the passages of its batch. Run again with the same
workdir, it goes on where it stopped.
"""

import keras

from realm_tf import artifacts, examples, passages, recurring_spans, settings, snapshots, warm_start
from realm_tf.models.in_batch import InBatchModel


def pretrain_spans(config, workdir: str) -> str:
  """Trains the retriever of `recurring_spans.init` on and publishes it; returns the last snapshot's folder.

  Raises:
    ArtifactError: inputs missing, or not belonging together.
    UserError: no span stands in other passages.
  """
  keras.utils.set_random_seed(config.seed)
  section = config.recurring_spans
  table = passages.load(config.passages)
  tokenizer = settings.tokenizer(config.passages)
  start = snapshots.newest(section.init, advice="run realm_tf.pretrain_ict first (steps=0 gives a fresh retriever).")
  examples.check_vocabulary(artifacts.read_info(start), start, tokenizer)
  with settings.scope(config):
    retriever = snapshots.load_retriever(start)
    model = InBatchModel(retriever)
  lengths = {name: config.retriever[name] for name in ("query_length", "passage_length", "title_length")}
  sentences = settings.masked_sentences(config, config.knowledge_spans, table, tokenizer)
  ict = examples.IctExamples(
    table, tokenizer=tokenizer, removal_rate=section.ict_removal_rate, query_words=section.query_words, **lengths)
  data = recurring_spans.RecurringSpans(
    sentences, table, tokenizer=tokenizer, query_words=section.query_words, ict=ict, ict_share=section.ict_share, **lengths)
  return warm_start.train(config, section, workdir, model, data, sentences, table, tokenizer, made_by="pretrain_spans")


if __name__ == "__main__":
  settings.start_trainer(pretrain_spans, section="recurring_spans")
