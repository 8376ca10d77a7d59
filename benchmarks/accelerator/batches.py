"""Packs batches on the device, from arrays that are transferred there once.

The packing is that of `realm_tf.examples` (tests compare them), on rows of fixed length.
Dimensions: V word pieces, N passages, S sentences, C clozes, X spans, P phrases; B rows of a batch,
K candidates.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.packed import NONE, Packed, firsts, padded


@dataclasses.dataclass(frozen=True)
class Layout:
  """Packed lengths (query, passage, reader), number of masks M, and ids of cls, sep and mask."""

  query: int
  passage: int
  reader: int
  masks: int
  cls: int
  sep: int
  mask: int


class Corpus(NamedTuple):
  """The packed corpus on the device. In arrays by passage, row N is the null passage.

  Attributes:
    rows: [N + 1, Lp] uint16 packed passages.
    text_at, text_size: [N + 1] where the text of a row begins, and its number of word pieces.
    continues: [V] 1 for word pieces that continue a word.
    some, several: passages of at least one sentence, and of more than one.
    first_sentence, num_sentences: [N].
    sentence_passage, sentence_at, sentence_size: [S]; relative to the beginning of the text.
    cloze_sentence, first_span, num_spans: [C].
    span_cloze, span_at, span_size, span_phrase: [X]; relative to the beginning of the sentence.
    asked: spans with a phrase.
    holders: [P, H] passages that hold the phrase, padded with NONE.
    num_holders: [P].
  """

  rows: jax.Array
  text_at: jax.Array
  text_size: jax.Array
  continues: jax.Array
  some: jax.Array
  several: jax.Array
  first_sentence: jax.Array
  num_sentences: jax.Array
  sentence_passage: jax.Array
  sentence_at: jax.Array
  sentence_size: jax.Array
  cloze_sentence: jax.Array
  first_span: jax.Array
  num_spans: jax.Array
  span_cloze: jax.Array
  span_at: jax.Array
  span_size: jax.Array
  span_phrase: jax.Array
  asked: jax.Array
  holders: jax.Array
  num_holders: jax.Array


def put(data: Packed, layout: Layout) -> Corpus:
  """Transfers the packed corpus to the device."""
  titles = padded(data.title_ids, data.title_counts, layout.passage, 0)[data.passage_titles]
  texts = padded(data.text_ids, data.text_counts, layout.passage, 0)
  title_size = np.append(data.title_counts[data.passage_titles].astype(np.int32), 0)
  text_size = np.append(data.text_counts.astype(np.int32), 0)
  titles, texts = (np.concatenate([part, np.zeros_like(part[:1])]) for part in (titles, texts))
  at, text_at = np.arange(layout.passage)[None], title_size + 2
  text = at - text_at[:, None]
  shifted = np.take_along_axis(texts, np.clip(text, 0, layout.passage - 1), axis=1)
  rows = np.where(
    text < text_size[:, None], shifted, np.where(text == text_size[:, None], layout.sep, 0)
  )
  title = np.take_along_axis(titles, np.clip(at - 1, 0, None), axis=1)
  rows = np.where(
    text >= 0, rows, np.where(at == 0, layout.cls, np.where(text == -1, layout.sep, title))
  )
  sentence_passage = np.repeat(np.arange(len(data.text_counts)), data.sentence_counts)
  starts = data.sentence_starts.astype(np.int32)
  follows = np.append(starts[1:], 0)
  follows[firsts(data.sentence_counts)[1:][data.sentence_counts > 0] - 1] = data.text_counts[
    data.sentence_counts > 0
  ]
  arrays = dict(
    rows=rows.astype(np.uint16),
    text_at=text_at,
    text_size=text_size,
    continues=data.continues,
    some=np.flatnonzero(data.sentence_counts > 0),
    several=np.flatnonzero(data.sentence_counts > 1),
    first_sentence=firsts(data.sentence_counts)[:-1],
    num_sentences=data.sentence_counts,
    sentence_passage=sentence_passage,
    sentence_at=starts,
    sentence_size=follows - starts,
    cloze_sentence=data.cloze_sentences,
    first_span=firsts(data.span_counts)[:-1],
    num_spans=data.span_counts,
    span_cloze=np.repeat(np.arange(len(data.span_counts)), data.span_counts),
    span_at=data.span_starts,
    span_size=data.span_ends.astype(np.int32) - data.span_starts,
    span_phrase=data.span_phrases,
    asked=np.flatnonzero(data.span_phrases != NONE),
    holders=padded(
      data.phrase_passages, data.phrase_counts, int(data.phrase_counts.max(initial=1)), NONE
    ),
    num_holders=data.phrase_counts,
  )
  return Corpus(
    **{
      name: jnp.asarray(array if name == "rows" else array.astype(np.int32))
      for name, array in arrays.items()
    }
  )


def questions(data: Packed, layout: Layout) -> jax.Array:
  """Returns packed questions [Q, Lq] int32, as input of the query tower."""
  size = np.minimum(data.question_counts, layout.query - 2).astype(np.int32)[:, None]
  ids = np.pad(
    padded(data.question_ids, data.question_counts, layout.query - 1, 0), [[0, 0], [1, 0]]
  ).astype(np.int32)
  at = np.arange(layout.query)[None]
  return jnp.asarray(
    np.where(
      at == 0, layout.cls, np.where(at <= size, ids, np.where(at == size + 1, layout.sep, 0))
    ),
    jnp.int32,
  )


# ------------------------------------------------------------------------------------------ packing


def passages(corpus: Corpus, numbers, layout: Layout) -> dict:
  """Returns passage_ids, passage_segments [..., Lp]; NONE and N are the null passage."""
  at = jnp.arange(layout.passage) - corpus.text_at[numbers][..., None]
  segments = (at >= 0) & (at <= corpus.text_size[numbers][..., None])
  return {
    "passage_ids": corpus.rows[numbers].astype(jnp.int32),
    "passage_segments": segments.astype(jnp.int32),
  }


def without_sentence(corpus: Corpus, sentences, removed, layout: Layout) -> dict:
  """Returns the passages [B, Lp] of sentences, without the sentence if `removed` [B] is 1."""
  numbers = corpus.sentence_passage[sentences]
  text_at, size = corpus.text_at[numbers][:, None], corpus.text_size[numbers][:, None]
  gone = jnp.where(removed > 0, corpus.sentence_size[sentences], 0)[:, None]
  at = jnp.arange(layout.passage)[None]
  source = jnp.where(at - text_at >= corpus.sentence_at[sentences][:, None], at + gone, at)
  ids = jnp.take_along_axis(
    corpus.rows[numbers].astype(jnp.int32), jnp.minimum(source, layout.passage - 1), axis=1
  )
  end = text_at + size - gone
  ids = jnp.where(at < end, ids, jnp.where(at == end, layout.sep, 0))
  return {"passage_ids": ids, "passage_segments": ((at >= text_at) & (at <= end)).astype(jnp.int32)}


class Runs(NamedTuple):
  """Runs of word pieces in the texts of passages.

  Attributes:
    passage: [B] the passage.
    at, size: [B] the first word piece in its text, and the number of word pieces.
  """

  passage: jax.Array
  at: jax.Array
  size: jax.Array


def whole(corpus: Corpus, sentences) -> Runs:
  """Returns whole sentences [B] as runs."""
  return Runs(
    corpus.sentence_passage[sentences],
    corpus.sentence_at[sentences],
    corpus.sentence_size[sentences],
  )


def crop(corpus: Corpus, key, runs: Runs, num_words: Sequence[int], *, keep=None) -> Runs:
  """Cuts random runs of whole words from runs, as `realm_tf.examples.sentences.crop` does.

  Args:
    corpus: the corpus on the device.
    key: key of the random draw.
    runs: the runs to cut.
    num_words: minimum and maximum number of words, uniformly distributed; all words if there are
      fewer. If empty, nothing is cut.
    keep: first [B], size [B] of the word pieces of each run that the result must hold. They count
      as one word.
  """
  if not num_words:
    return runs
  at = jnp.arange(corpus.rows.shape[1])[None]
  begins, inside = corpus.continues[_pieces(corpus, runs, at)] == 0, at < runs.size[:, None]
  if keep is not None:
    first, size = (part[:, None] for part in keep)
    begins &= (at <= first) | (at >= first + size)
  # The word of each word piece; if a word was split, the rest belongs to the next one.
  word = jnp.maximum(jnp.cumsum(begins & inside, axis=1) - 1, 0)
  num, chance = word[:, -1] + 1, jax.random.uniform(key, [2, len(runs.at)])
  size = num_words[0] + (chance[0] * (num_words[1] - num_words[0] + 1)).astype(jnp.int32)
  size = jnp.minimum(size, num)
  lowest, highest = jnp.zeros_like(num), num - size  # where the run may begin
  if keep is not None:
    kept = jnp.take_along_axis(word, first, axis=1)[:, 0]
    lowest, highest = jnp.maximum(kept + 1 - size, 0), jnp.minimum(kept, highest)
  begin = lowest + (chance[1] * (highest - lowest + 1)).astype(jnp.int32)
  start, end = (
    jnp.sum(inside & (word < before[:, None]), axis=1) for before in (begin, begin + size)
  )
  return Runs(runs.passage, runs.at + start, end - start)


def _pieces(corpus: Corpus, runs: Runs, at):
  """Returns the word pieces [B, L] at positions [1, L] of runs; arbitrary ones outside of them."""
  source = (corpus.text_at[runs.passage] + runs.at)[:, None] + at
  rows = corpus.rows[runs.passage].astype(jnp.int32)
  return jnp.take_along_axis(rows, jnp.clip(source, 0, rows.shape[1] - 1), axis=1)


def queries(corpus: Corpus, runs: Runs, layout: Layout, *, titled=None):
  """Returns runs as packed queries [B, Lq], and the number of their word pieces in these [B].

  Those that are `titled` ([B] bool) begin with the title of their passage.
  """
  size = jnp.minimum(runs.size, layout.query - 2)
  titles = jnp.zeros_like(size)
  if titled is not None:
    titles = jnp.where(titled, corpus.text_at[runs.passage] - 2, 0)
    titles = jnp.minimum(titles, layout.query - 2 - size)
  at, end = jnp.arange(layout.query)[None], (titles + size)[:, None]
  # A passage is [CLS] title [SEP] text [SEP].
  title = corpus.rows[runs.passage, : layout.query].astype(jnp.int32)
  ids = jnp.where(at <= titles[:, None], title, _pieces(corpus, runs, at - 1 - titles[:, None]))
  ids = jnp.where(at <= end, ids, jnp.where(at == end + 1, layout.sep, 0))
  return jnp.where(at == 0, layout.cls, ids), titles + size


class Clozes(NamedTuple):
  """Masked sentences.

  Attributes:
    query_ids: [B, Lq] int32.
    size: [B] number of word pieces in the query.
    mask_positions, targets: [B, M] int32, 0 if unused.
    target_mask: [B, M] float32.
    own: [B] the passage that contains the sentence.
    phrase: [B] the phrase of the span, or NONE.
  """

  query_ids: jax.Array
  size: jax.Array
  mask_positions: jax.Array
  targets: jax.Array
  target_mask: jax.Array
  own: jax.Array
  phrase: jax.Array


def clozes(
  corpus: Corpus, spans, layout: Layout, *, key=None, query_words: Sequence[int] = ()
) -> Clozes:
  """Returns sentences with spans [B] masked.

  Args:
    corpus: the corpus on the device.
    spans: numbers of the spans.
    layout: layout of the query.
    key: key for cutting the sentences.
    query_words: minimum and maximum words of a query, a random run around the mask. If empty, the
      whole sentence.
  """
  sentences = corpus.cloze_sentence[corpus.span_cloze[spans]]
  first, width = corpus.span_at[spans], corpus.span_size[spans]
  sentence = whole(corpus, sentences)
  run = crop(corpus, key, sentence, query_words, keep=(first, width))
  ids, size = queries(corpus, run, layout)
  first, width = (first - (run.at - sentence.at))[:, None] + 1, width[:, None]
  mask = jnp.arange(layout.masks)[None]
  used = mask < width
  positions = jnp.where(used, first + mask, 0)
  targets = jnp.where(used, jnp.take_along_axis(ids, positions, axis=1), 0)
  at = jnp.arange(layout.query)[None]
  query_ids = jnp.where((at >= first) & (at < first + width), layout.mask, ids)
  return Clozes(
    query_ids,
    size,
    positions,
    targets,
    used.astype(jnp.float32),
    corpus.sentence_passage[sentences],
    corpus.span_phrase[spans],
  )


def reader(corpus: Corpus, drawn: Clozes, numbers, layout: Layout) -> dict:
  """Returns reader_ids, reader_segments [B, K, L] of clozes with candidates [B, K]."""
  query = (drawn.size + 2)[:, None, None]
  size = jnp.minimum(corpus.text_size[numbers][..., None], layout.reader - query - 1)
  at = jnp.arange(layout.reader)
  text = at - query  # [B, 1, L]
  source = jnp.clip(corpus.text_at[numbers][..., None] + text, 0, layout.passage - 1)
  ids = jnp.take_along_axis(corpus.rows[numbers].astype(jnp.int32), source, axis=-1)
  own = jnp.pad(drawn.query_ids, [[0, 0], [0, layout.reader - layout.query]])[:, None]
  ids = jnp.where(
    text < 0, own, jnp.where(text < size, ids, jnp.where(text == size, layout.sep, 0))
  )
  return {"reader_ids": ids, "reader_segments": ((text >= 0) & (text <= size)).astype(jnp.int32)}


def realm(corpus: Corpus, drawn: Clozes, numbers, layout: Layout) -> dict:
  """Returns the inputs of a `RealmModel`, for clozes and candidates [B, K]."""
  return {
    "query_ids": drawn.query_ids,
    **passages(corpus, numbers, layout),
    **reader(corpus, drawn, numbers, layout),
    "mask_positions": drawn.mask_positions,
    "targets": drawn.targets,
    "target_mask": drawn.target_mask,
  }
