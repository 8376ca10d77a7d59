"""Trains the tagger of salient spans on sentences whose names are marked, and scores it on others. REALM, section 3.4.

    python -m realm_tf.train_tagger --config=configs/tagger.py --workdir=runs/tagger
    python -m beam_jobs.annotate_spans --passages=P --tagger=runs/tagger/tagger --output=S

Run again with the same workdir, it goes on where it stopped. The tagger reads sentences as they are written, not CoNLL's words
with blanks between them, and is scored on exact bytes.
"""

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tabulate
import tensorflow as tf
from keras import ops
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2

from realm_tf import (
    artifacts, conll, examples, ownership, salient_spans, settings, span_tagger, training, vocabularies)
from realm_tf.conll import ConllError, Document, Sentence, Span
from realm_tf.models.tagger import NUM_BOUNDS, Tagger
from realm_tf.optimizer import bert_optimizer
from realm_tf.tokenization import Tokenizer

MERGED = "any"  # the one type of names whose types do not count: REALM masks them all alike


# ---------------------------------------------------------------------------------------------------------------- model


class TaggerModel(keras.Model):
  """A tagger that learns the bounds of names, and the types of the words in them, by cross-entropy; it reports accuracies."""

  def __init__(self, tagger: Tagger):
    super().__init__(name="tagger_training")
    self.tagger = tagger
    self.means = {name: keras.metrics.Mean(name) for name in ("loss", "bounds", "types")}
    self.built = True  # its weights are the tagger's

  def call(self, inputs, training=False):
    return self.tagger(inputs, training=training)

  def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    parts = {"bounds": y_pred[..., :NUM_BOUNDS], "types": y_pred[..., NUM_BOUNDS:]}
    costs, num_words = 0.0, 0.0
    for name, logits in parts.items():
      labels = x[name]  # [B, L]
      scored = ops.cast(ops.not_equal(labels, span_tagger.UNSCORED), "float32")
      cross_entropy = keras.losses.sparse_categorical_crossentropy(ops.maximum(labels, 0), logits, from_logits=True)  # [B, L]
      costs += ops.sum(cross_entropy * scored)
      num_words = ops.maximum(num_words, ops.sum(scored))
      self.means[name].update_state(ops.equal(ops.cast(ops.argmax(logits, axis=-1), labels.dtype), labels), scored)
    loss = costs / ops.maximum(num_words, 1)
    self.means["loss"].update_state(loss)
    return loss

  @property
  def metrics(self):
    return list(self.means.values())


def new_tagger(config, tokenizer: Tokenizer, *, num_types: int) -> Tagger:
  """A tagger whose encoder is fresh or published, as `config.encoder` says.

  Raises:
    EncoderError: the encoder has another vocabulary, or is shorter than the config asks for.
  """
  architecture, published_bert = settings.new_encoder(config.encoder, tokenizer, config.tagger.length)
  tagger = Tagger(architecture=architecture, num_types=num_types)
  settings.start_encoder(tagger.encoder, published_bert, config.encoder.init_std)
  return tagger


# ----------------------------------------------------------------------------------------------------------------- data


def read_data(section) -> tuple[list[Document], list[Document]]:
  """Documents to train on and those held out, as `config.tagger` says; what could not be read is told.

  Raises:
    ConllError: no files, no names, or nothing held out.
  """
  train, held_out = _read(section.train, section.types), []
  try:
    share = float(section.held_out)
  except ValueError:
    held_out = [document for documents in _read(section.held_out, section.types) for document in documents]
    train = [document for documents in train for document in documents]
  else:
    parts = [conll.split(documents, share) for documents in train]
    train, held_out = ([document for part in parts for document in part[side]] for side in (0, 1))
  for name, documents in (("train", train), ("held_out", held_out)):
    if not any(sentence.spans for document in documents for sentence in document):
      raise ConllError(f"tagger.{name}={section[name]!r} gives {sum(map(len, documents))} sentences without a name"
                       f"{' of types ' + ', '.join(section.types) if section.types else ''}; wanted some.")
  return train, held_out


def _read(patterns: str, types: Sequence[str]) -> list[list[Document]]:
  """The documents of each file."""
  files = []
  for path in conll.matching(patterns):
    documents, dropped = conll.read(path, types=types)
    if dropped:
      print(f"{path}: lines left out, by reason: {dict(dropped)}", file=sys.stderr)
    if documents:
      files.append(documents)
  return files


class Examples:
  """Sentences as batches of word pieces with their tags.

  Args:
    sentences: to learn from.
    types: of the names in them.
    length: L.
  """

  def __init__(self, sentences: Sequence[Sentence], *, tokenizer: Tokenizer, types: Sequence[str], length: int):
    texts = tf.constant([sentence.text for sentence in sentences], tf.string)
    pieces = span_tagger.read_pieces(texts, tokenizer=tokenizer, length=length)
    labels = [
        span_tagger.label_pieces(
            in_bytes(sentence), starts.numpy(), ~tokenizer.continues[ids.numpy()], types=types, length=length)
        for sentence, ids, starts in zip(sentences, pieces.tokens.ids, pieces.tokens.starts, strict=True)]
    self.columns = {"token_ids": pieces.token_ids.numpy(), "capitals": pieces.capitals.numpy(),
                    **{name: np.stack([row[name] for row in labels]) for name in ("bounds", "types")}}

  def batch(self, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """The batch of training step `step`: token_ids, capitals, bounds and types [B, L] int32."""
    rows = examples.epoch_rows(len(self.columns["token_ids"]), step, batch_size, seed)
    return {name: column[rows] for name, column in self.columns.items()}


def in_bytes(sentence: Sentence) -> list[Span]:
  """Its spans in bytes of the UTF-8 text."""
  return [Span(*(len(sentence.text[:at].encode()) for at in (span.start, span.end)), span.label) for span in sentence.spans]


# --------------------------------------------------------------------------------------------------------------- scores


def score(wanted: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]]) -> dict[str, dict[str, float]]:
  """seqeval's precision, recall and F1 of names with exactly the right bounds and type.

  What seqeval takes for words are the pieces of a sentence between the bounds of all names: names whose bounds lie inside a word
  of the CoNLL file, which no tag can tell, count as wrong.

  Args:
    wanted, found: the names of each sentence, in order.

  Returns:
    By type, over all ("micro avg", ..), and, as MERGED, with types not looked at: "precision", "recall", "f1-score", "support".
  """
  def report(merge: bool) -> dict:
    sides = [[_tags(spans, (*one, *other), merge) for spans, one, other in zip(side, wanted, found, strict=True)]
             for side in (wanted, found)]
    return classification_report(*sides, output_dict=True, mode="strict", scheme=IOB2, zero_division=0)

  scores = {**report(merge=False), MERGED: report(merge=True)[MERGED]}
  return {name: {key: round(float(value), 4) for key, value in row.items()} for name, row in scores.items()}


def _tags(spans: Sequence[Span], all_spans: Sequence[Span], merge: bool) -> list[str]:
  """Tags of the pieces between the bounds of `all_spans`."""
  bounds = sorted({at for span in all_spans for at in (span.start, span.end)})
  tags = ["O"] * len(bounds)
  for span in spans:
    first, last = bounds.index(span.start), bounds.index(span.end)
    label = MERGED if merge else span.label
    tags[first:last] = [f"B-{label}"] + [f"I-{label}"] * (last - first - 1)
  return tags


def score_held_out(tagger: span_tagger.SpanTagger, held_out: Sequence[Document]) -> dict[str, dict]:
  """Scores of the tagger and of the rules, which know no types and take a document for a passage."""
  sentences = [sentence for document in held_out for sentence in document]
  texts, wanted = [sentence.text for sentence in sentences], [sentence.spans for sentence in sentences]
  by_rules = [[Span(*name, MERGED) for name in names] for document in held_out
              for names in salient_spans.find_names_of_passage([sentence.text for sentence in document])]
  return {"tagger": score(wanted, span_tagger.find_names(tagger, texts)), "rules": {MERGED: score(wanted, by_rules)[MERGED]}}


def _table(scores: Mapping[str, Mapping]) -> str:
  rows = [(who, name.replace("micro avg", "all, with their types").replace(MERGED, "all, of any type"),
           *(100 * row[key] for key in ("precision", "recall", "f1-score")), row["support"])
          for who in scores for name, row in scores[who].items() if name not in ("macro avg", "weighted avg")]
  columns = ("", "names", "precision", "recall", "F1", "held out")
  return tabulate.tabulate(rows, columns, floatfmt=("", "", ".1f", ".1f", ".1f", ".0f"))


# ------------------------------------------------------------------------------------------------------------- training


def train_tagger(config, workdir: str) -> str:
  """Trains, scores and publishes; returns the tagger's folder.

  Raises:
    ConllError: files with no sentences to learn from.
    EncoderError: the encoder does not fit the vocabulary or the length.
  """
  keras.utils.set_random_seed(config.seed)
  folder = os.path.join(workdir, span_tagger.KIND)
  ownership.check_output(folder, kind=span_tagger.KIND, reads=conll.matching(config.tagger.train))
  section, tokenizer = config.tagger, Tokenizer(vocabularies.read(config.vocab).with_case(config.lower_case))
  train, held_out = read_data(section)
  sentences = [sentence for document in train for sentence in document]
  counts = Counter(span.label for sentence in sentences for span in sentence.spans)
  types = sorted(counts)
  print(f"{len(sentences)} sentences to train on with {counts.total()} names {dict(counts)}; {sum(map(len, held_out))} held out",
        file=sys.stderr)
  tagger = new_tagger(config, tokenizer, num_types=len(types))
  data = Examples(sentences, tokenizer=tokenizer, types=types, length=section.length)
  optimizer = bert_optimizer(
      learning_rate=section.learning_rate, steps=section.steps, **config.optimizer)
  training.train(
      TaggerModel(tagger), lambda step: data.batch(step, batch_size=section.batch_size, seed=config.seed), workdir=workdir,
      steps=section.steps, log_every=section.log_every, checkpoint_every=section.checkpoint_every, batch_size=section.batch_size,
      jit_compile=config.jit_compile, optimizer=optimizer)

  exported = span_tagger.SpanTagger(tagger, tokenizer, types=types, length=section.length)
  scores = score_held_out(exported, held_out)
  print(_table(scores))
  recipe = {"tagger": tagger.get_config(), "types": types, "length": section.length, "vocab": tokenizer.fingerprint}
  with artifacts.publish(folder, kind=span_tagger.KIND, config=recipe, inputs={}) as staged:
    staged.content = span_tagger.save(exported, staged.path)
    staged.counts = {"train": len(sentences), "held_out": sum(map(len, held_out))}
    files = {path: artifacts.file_digest(path) for path in conll.matching(section.train)}
    staged.details = {"scores": scores, "settings": config.to_dict(), "files": files}
  return folder


if __name__ == "__main__":
  settings.start_trainer(train_tagger, section="tagger")
