"""Trains the tagger of salient spans on sentences with marked names (REALM, section 3.4).

The tagger is scored on held-out sentences.

    python -m realm_tf.train_tagger --config=configs/tagger.py --workdir=runs/tagger
    python -m beam_jobs.annotate_spans --passages=P --tagger=runs/tagger/tagger --output=S

If interrupted, run it again with the same workdir to resume. The tagger reads sentences as written,
not CoNLL's words joined by blanks, and is scored on exact bytes.
"""

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from realm_tf import cli

if __name__ == "__main__":
  cli.start_trainer("realm_tf.train_tagger", section="tagger")

import keras
import numpy as np
import tabulate
import tensorflow as tf
from keras import ops
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2

from realm_tf import settings
from realm_tf.corpus import vocabularies
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import epochs
from realm_tf.models.measured import MeasuredModel
from realm_tf.models.tagger import NUM_BOUNDS, Tagger
from realm_tf.spans import conll, rules, span_tagger
from realm_tf.spans.conll import ConllError, Document, Sentence, Span
from realm_tf.storage import artifacts, ownership, publishing
from realm_tf.training import loop, new_models

MERGED = "any"  # type of all names when types are ignored, since REALM masks all names alike


# -------------------------------------------------------------------------------------------- model


class TaggerModel(MeasuredModel):
  """Training of a tagger on the bounds of names and the types of the words in them.

  The loss is cross-entropy; the measures are accuracies.
  """

  def __init__(self, tagger: Tagger):
    super().__init__(("loss", "bounds", "types"), name="tagger_training")
    self.tagger = tagger

  def call(self, inputs, training=False):
    return self.tagger(inputs, training=training)

  def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    parts = {"bounds": y_pred[..., :NUM_BOUNDS], "types": y_pred[..., NUM_BOUNDS:]}
    costs, num_words = 0.0, 0.0
    for name, logits in parts.items():
      labels = x[name]  # [B, L]
      scored = ops.cast(ops.not_equal(labels, span_tagger.UNSCORED), "float32")
      cross_entropy = keras.losses.sparse_categorical_crossentropy(
        ops.maximum(labels, 0), logits, from_logits=True
      )  # [B, L]
      costs += ops.sum(cross_entropy * scored)
      num_words = ops.maximum(num_words, ops.sum(scored))
      self.means[name].update_state(
        ops.equal(ops.cast(ops.argmax(logits, axis=-1), labels.dtype), labels), scored
      )
    loss = costs / ops.maximum(num_words, 1)
    self.means["loss"].update_state(loss)
    return loss


def new_tagger(
  start: new_models.EncoderStart, tokenizer: Tokenizer, *, length: int, num_types: int
) -> Tagger:
  """Builds a tagger with a fresh or published encoder.

  Raises:
    EncoderError: the encoder has another vocabulary, or takes fewer than `length` word pieces.
  """
  architecture, published_bert = new_models.new_encoder(start, tokenizer, length)
  tagger = Tagger(architecture=architecture, num_types=num_types)
  new_models.start_encoder(tagger.encoder, published_bert, start.init_std)
  return tagger


# --------------------------------------------------------------------------------------------- data


def read_data(
  train_files: str, held_out_files: str, *, types: Sequence[str]
) -> tuple[list[Document], list[Document]]:
  """Reads the documents to train on and those held out.

  Lines that cannot be read are reported.

  Args:
    train_files: files and globs, separated by commas.
    held_out_files: the same, or the share of each training file that is held out.
    types: types of the names to find; if empty, all types.

  Raises:
    ConllError: there are no files, no names, or nothing held out.
  """
  read = _read(train_files, types)
  try:
    share = float(held_out_files)
  except ValueError:
    held_out = [document for documents in _read(held_out_files, types) for document in documents]
    train = [document for documents in read for document in documents]
  else:
    parts = [conll.split(documents, share) for documents in read]
    train, held_out = ([document for part in parts for document in part[side]] for side in (0, 1))
  for name, files, documents in (
    ("train", train_files, train),
    ("held_out", held_out_files, held_out),
  ):
    if not any(sentence.spans for document in documents for sentence in document):
      raise ConllError(
        f"tagger.{name}={files!r} gives {sum(map(len, documents))} sentences without a name"
        f"{' of types ' + ', '.join(types) if types else ''}; wanted at least one name."
      )
  return train, held_out


def _read(patterns: str, types: Sequence[str]) -> list[list[Document]]:
  """Reads the documents of each file."""
  files = []
  for path in conll.matching(patterns):
    documents, dropped = conll.read(path, types=types)
    if dropped:
      print(f"{path}: lines left out, by reason: {dict(dropped)}", file=sys.stderr)
    if documents:
      files.append(documents)
  return files


class Examples:
  """Batches of sentences as word pieces with their tags.

  Args:
    sentences: sentences to learn from.
    tokenizer: the tagger's tokenizer.
    types: types of the names in the sentences.
    length: L.
  """

  def __init__(
    self, sentences: Sequence[Sentence], *, tokenizer: Tokenizer, types: Sequence[str], length: int
  ):
    texts = tf.constant([sentence.text for sentence in sentences], tf.string)
    pieces = span_tagger.read_pieces(texts, tokenizer=tokenizer, length=length)
    labels = [
      span_tagger.label_pieces(
        in_bytes(sentence),
        starts.numpy(),
        ~tokenizer.continues[ids.numpy()],
        types=types,
        length=length,
      )
      for sentence, ids, starts in zip(
        sentences, pieces.tokens.ids, pieces.tokens.starts, strict=True
      )
    ]
    self.columns = {
      "token_ids": pieces.token_ids.numpy(),
      "capitals": pieces.capitals.numpy(),
      **{name: np.stack([row[name] for row in labels]) for name in ("bounds", "types")},
    }

  def batch(self, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """Makes the batch of step `step`: token_ids, capitals, bounds and types [B, L] int32."""
    rows = epochs.epoch_rows(len(self.columns["token_ids"]), step, batch_size, seed)
    return {name: column[rows] for name, column in self.columns.items()}


def in_bytes(sentence: Sentence) -> list[Span]:
  """Returns a sentence's spans in bytes of the UTF-8 text."""
  return [
    Span(
      len(sentence.text[: span.start].encode()), len(sentence.text[: span.end].encode()), span.label
    )
    for span in sentence.spans
  ]


# ------------------------------------------------------------------------------------------- scores


def score(
  wanted: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]]
) -> dict[str, dict[str, float]]:
  """Computes seqeval's precision, recall and F1 of names with exactly the right bounds and type.

  Seqeval's words are the pieces of a sentence between the bounds of all names. So names whose
  bounds lie inside a word of the CoNLL file, which no tag can express, count as wrong.

  Args:
    wanted: the names marked in each sentence, in order.
    found: the names found in each sentence, in order.

  Returns:
    By type, over all ("micro avg", ..), and, as MERGED, ignoring types: "precision", "recall",
    "f1-score", "support".
  """

  def report(merge: bool) -> dict:
    sides = [
      [
        _tags(spans, (*one, *other), merge)
        for spans, one, other in zip(side, wanted, found, strict=True)
      ]
      for side in (wanted, found)
    ]
    return classification_report(
      *sides, output_dict=True, mode="strict", scheme=IOB2, zero_division=0
    )

  scores = {**report(merge=False), MERGED: report(merge=True)[MERGED]}
  return {
    name: {key: round(float(value), 4) for key, value in row.items()}
    for name, row in scores.items()
  }


def _tags(spans: Sequence[Span], all_spans: Sequence[Span], merge: bool) -> list[str]:
  """Returns the tags of the pieces between the bounds of `all_spans`."""
  bounds = sorted({at for span in all_spans for at in (span.start, span.end)})
  tags = ["O"] * len(bounds)
  for span in spans:
    first, last = bounds.index(span.start), bounds.index(span.end)
    label = MERGED if merge else span.label
    tags[first:last] = [f"B-{label}"] + [f"I-{label}"] * (last - first - 1)
  return tags


def score_held_out(tagger: span_tagger.SpanTagger, held_out: Sequence[Document]) -> dict[str, dict]:
  """Scores the tagger and the rules on held-out documents.

  The rules have no types and treat a document as a passage.
  """
  sentences = [sentence for document in held_out for sentence in document]
  texts, wanted = (
    [sentence.text for sentence in sentences],
    [sentence.spans for sentence in sentences],
  )
  by_rules = [
    [Span(*name, MERGED) for name in names]
    for document in held_out
    for names in rules.find_names_of_passage([sentence.text for sentence in document])
  ]
  return {
    "tagger": score(wanted, span_tagger.find_names(tagger, texts)),
    "rules": {MERGED: score(wanted, by_rules)[MERGED]},
  }


def _table(scores: Mapping[str, Mapping]) -> str:
  rows = [
    (
      who,
      name.replace("micro avg", "all, with their types").replace(MERGED, "all, of any type"),
      *(100 * row[key] for key in ("precision", "recall", "f1-score")),
      row["support"],
    )
    for who in scores
    for name, row in scores[who].items()
    if name not in ("macro avg", "weighted avg")
  ]
  columns = ("", "names", "precision", "recall", "F1", "held out")
  return tabulate.tabulate(rows, columns, floatfmt=("", "", ".1f", ".1f", ".1f", ".0f"))


# ----------------------------------------------------------------------------------------- training


def train_tagger(config, workdir: str) -> str:
  """Trains, scores and publishes the tagger; returns its folder.

  Raises:
    ConllError: the files have no sentences to learn from.
    EncoderError: the encoder does not fit the vocabulary or the length.
  """
  # ---- Settings
  seed, length, recorded = config.seed, config.tagger.length, config.to_dict()
  train_files, held_out_files = config.tagger.train, config.tagger.held_out
  name_types, vocab, lower_case = tuple(config.tagger.types), config.vocab, config.lower_case
  encoder_start = settings.encoder_start(config.encoder)
  schedule, setup = settings.schedule(config.tagger), settings.setup(config)

  # ---- Training
  keras.utils.set_random_seed(seed)
  folder = os.path.join(workdir, span_tagger.KIND)
  ownership.check_output(folder, kind=span_tagger.KIND, reads=conll.matching(train_files))
  tokenizer = Tokenizer(vocabularies.read(vocab).with_case(lower_case))
  train, held_out = read_data(train_files, held_out_files, types=name_types)
  sentences = [sentence for document in train for sentence in document]
  counts = Counter(span.label for sentence in sentences for span in sentence.spans)
  types = sorted(counts)
  print(
    f"{len(sentences)} training sentences with {counts.total()} names {dict(counts)}; "
    f"{sum(map(len, held_out))} held out",
    file=sys.stderr,
  )
  tagger = new_tagger(encoder_start, tokenizer, length=length, num_types=len(types))
  data = Examples(sentences, tokenizer=tokenizer, types=types, length=length)
  loop.train(
    TaggerModel(tagger),
    lambda step: data.batch(step, batch_size=schedule.batch_size, seed=seed),
    workdir=workdir,
    schedule=schedule,
    jit_compile=setup.jit_compile,
    optimizer=setup.optimizer(schedule),
    made_from={"sentences": artifacts.fingerprint_of(sentences)},
  )

  # ---- Scores, and the exported tagger
  exported = span_tagger.SpanTagger(tagger, tokenizer, types=types, length=length)
  scores = score_held_out(exported, held_out)
  print(_table(scores))
  recipe = {
    "tagger": tagger.get_config(),
    "types": types,
    "length": length,
    "vocab": tokenizer.fingerprint,
  }
  with publishing.publish(folder, kind=span_tagger.KIND, config=recipe, inputs={}) as staged:
    staged.content = span_tagger.save(exported, staged.path)
    staged.counts = {"train": len(sentences), "held_out": sum(map(len, held_out))}
    files = {path: artifacts.file_digest(path) for path in conll.matching(train_files)}
    staged.details = {"scores": scores, "settings": recorded, "files": files}
  return folder
