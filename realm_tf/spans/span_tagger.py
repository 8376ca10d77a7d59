"""Finds names in raw sentences.

Training, evaluation and the exported tagger share this code.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from realm_tf.corpus.tokenization import Tokenizer, Tokens
from realm_tf.examples import packing
from realm_tf.models.tagger import BEGIN, INSIDE, NUM_BOUNDS, OUTSIDE, Tagger
from realm_tf.spans.conll import Span
from realm_tf.storage import artifacts, integrity, paths, saved_models

KIND = "tagger"
_SAVED_MODEL = "saved_model"
_BATCH_SENTENCES = 32
UNSCORED = -1  # label of word pieces that are not scored


class Pieces(NamedTuple):
  """The word pieces of N sentences.

  token_ids and capitals are [N, L] int32, the model's inputs; tokens are all word pieces, ragged.
  """

  token_ids: tf.Tensor
  capitals: tf.Tensor
  tokens: Tokens


def read_pieces(sentences: tf.Tensor, *, tokenizer: Tokenizer, length: int) -> Pieces:
  """Packs `[CLS] sentence [SEP]`, cut at `length` word pieces; usable inside a graph."""
  tokens = tokenizer.with_offsets(sentences)
  starts, ends = tokens.starts, tokens.ends  # [N, None]
  written = tf.strings.substr(
    tf.gather(sentences, starts.value_rowids()), starts.values, ends.values - starts.values
  )
  capitals = tf.cast(tf.strings.lower(written, encoding="utf-8") != written, tf.int32)
  capitals = starts.with_values(capitals)[:, : length - 2].to_tensor(shape=[None, length - 2])
  return Pieces(
    packing.pack_queries(tokens.ids, tokenizer=tokenizer, length=length),
    tf.pad(capitals, [[0, 0], [1, 1]]),
    tokens,
  )


def label_pieces(
  spans: Sequence[Span],
  starts: np.ndarray,
  begins_word: np.ndarray,
  *,
  types: Sequence[str],
  length: int,
) -> dict[str, np.ndarray]:
  """Returns the model's labels for one sentence.

  Args:
    spans: names of the sentence, in BYTES.
    starts: [P] byte offsets of its word pieces.
    begins_word: [P] bool; a word is labelled at its first word piece.
    types: the types of names.
    length: L, the length of the model's input.

  Returns:
    bounds and types [L] int32, `UNSCORED` where there is no label.
  """
  bounds, kinds = np.where(begins_word, OUTSIDE, UNSCORED), np.full(len(starts), UNSCORED)
  for span in spans:
    words = np.flatnonzero(begins_word & (starts >= span.start) & (starts < span.end))
    bounds[words], bounds[words[:1]], kinds[words] = INSIDE, BEGIN, types.index(span.label)
  rows = {
    "bounds": np.full([length], UNSCORED, np.int32),
    "types": np.full([length], UNSCORED, np.int32),
  }
  for name, values in (("bounds", bounds), ("types", kinds)):
    rows[name][1 : length - 1][: len(values)] = values[: length - 2]
  return rows


class SpanTagger(tf.Module):
  """A trained tagger that maps sentences to spans, as it is exported.

  Args:
    tagger: the model.
    tokenizer: the model's tokenizer.
    types: the types of names.
    length: maximum number of word pieces of `[CLS] sentence [SEP]`; words beyond are in no span.
  """

  def __init__(self, tagger: Tagger, tokenizer: Tokenizer, *, types: Sequence[str], length: int):
    super().__init__()
    # A SavedModel must track these variables explicitly.
    self._values = [variable.value for variable in tagger.variables]
    self._tagger, self._tokenizer, self._types, self._length = (
      lambda inputs: tagger(inputs),
      tokenizer,
      list(types),
      length,
    )

  @tf.function(
    autograph=False, input_signature=[tf.TensorSpec([None], tf.string, name="sentences")]
  )
  def __call__(self, sentences: tf.Tensor) -> dict[str, tf.Tensor]:
    """Finds names in [N] sentences.

    Returns:
      For each of S spans, `sentence` int32, `start` and `end` int32 in bytes of the UTF-8 text,
      `label` string (the type), and `score` float32, the probability of its least certain bound.
    """
    token_ids, capitals, tokens = read_pieces(
      sentences, tokenizer=self._tokenizer, length=self._length
    )
    longest = tf.maximum(tf.reduce_max(tf.math.count_nonzero(token_ids, axis=1, dtype=tf.int32)), 2)
    logits = self._tagger(
      {"token_ids": token_ids[:, :longest], "capitals": capitals[:, :longest]}
    )  # [N, longest, 3 + T]
    spans = self._spans(logits[:, 1:-1], tokens)
    written = tf.strings.substr(
      tf.gather(sentences, spans["sentence"]), spans["start"], spans["end"] - spans["start"]
    )
    names = tf.strings.regex_full_match(written, r"(?s).*[\pL\pN].*")  # not a lone full stop
    return {name: tf.boolean_mask(column, names) for name, column in spans.items()}

  def _spans(self, logits: tf.Tensor, tokens: Tokens) -> dict[str, tf.Tensor]:
    rows = tf.cast(tokens.starts.value_rowids(), tf.int32)  # [P], all word pieces
    at = tf.range(tf.shape(rows)[0]) - tf.gather(tf.cast(tokens.starts.row_splits, tf.int32), rows)
    first = tf.where(tf.logical_not(tf.gather(self._tokenizer.continues, tokens.ids.values)))[
      :, 0
    ]  # [W], all words
    rows, at, starts = (tf.gather(part, first) for part in (rows, at, tokens.starts.values))
    next_first = tf.concat([first, [tf.size(tokens.ends.values, out_type=tf.int64)]], 0)[1:]
    ends = tf.gather(tokens.ends.values, next_first - 1)

    seen = at < tf.shape(logits)[1]  # not cut
    logits = tf.gather_nd(logits, tf.stack([rows, tf.where(seen, at, 0)], axis=1))  # [W, 3 + T]
    bounds = tf.where(
      seen, tf.argmax(logits[:, :NUM_BOUNDS], axis=1, output_type=tf.int32), OUTSIDE
    )
    certain = tf.reduce_max(tf.nn.softmax(logits[:, :NUM_BOUNDS]), axis=1)
    inside = bounds != OUTSIDE
    # the previous word is in a name of the same sentence
    follows = tf.concat([[False], inside[:-1] & (rows[1:] == rows[:-1])], 0)[: tf.size(rows)]
    begins = inside & ((bounds == BEGIN) | ~follows)

    spans = (tf.cumsum(tf.cast(begins, tf.int32)) - 1)[inside]  # span of each word inside one
    types = tf.argmax(
      tf.math.segment_sum(tf.nn.log_softmax(logits[:, NUM_BOUNDS:])[inside], spans), axis=1
    )
    return {
      "sentence": rows[begins],
      "start": starts[begins],
      "end": tf.math.segment_max(ends[inside], spans),
      "label": tf.gather(tf.constant(self._types), types),
      "score": tf.math.segment_min(certain[inside], spans),
    }


def save(tagger: SpanTagger, folder: str) -> str:
  """Writes the SavedModel of a tagger folder; returns the digest of its weights.

  Its only signature takes `sentences`.
  """
  path = os.path.join(folder, _SAVED_MODEL)
  saved_models.save(tagger, path, signatures=tagger.__call__.get_concrete_function())
  (weights,) = paths.listed(os.path.join(path, "variables"), r"variables\.data-.*")
  return artifacts.file_digest(weights)


def load(folder: str) -> Callable[[tf.Tensor], Mapping[str, tf.Tensor]]:
  """Loads the tagger that `realm_tf.train_tagger` published; it is called like `SpanTagger`.

  Raises:
    ArtifactError: if `folder` is not a complete tagger folder, or is damaged.
  """
  artifacts.read_info(folder, kind=KIND)
  integrity.check_digests(folder)
  return tf.saved_model.load(paths.literal(os.path.join(folder, _SAVED_MODEL)))


def find_names(
  tagger: Callable[[tf.Tensor], Mapping[str, tf.Tensor]], sentences: Sequence[str]
) -> list[list[Span]]:
  """Returns the names in each of any number of sentences, in order, as character ranges."""
  found: list[list[Span]] = [[] for _ in sentences]
  # Batches of similar lengths need little padding.
  order = sorted(range(len(sentences)), key=lambda row: len(sentences[row]))
  for begin in range(0, len(order), _BATCH_SENTENCES):
    rows = order[begin : begin + _BATCH_SENTENCES]
    texts = [sentences[row].encode() for row in rows]
    spans = {name: column.numpy() for name, column in tagger(tf.constant(texts, tf.string)).items()}
    for row, start, end, label in zip(
      *(spans[name] for name in ("sentence", "start", "end", "label")), strict=True
    ):
      start, end = (len(texts[row][:at].decode()) for at in (start, end))
      found[rows[row]].append(Span(start, end, label.decode()))
  return found
