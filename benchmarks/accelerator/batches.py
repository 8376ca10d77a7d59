"""Batches, drawn and packed on the device from arrays that are put there once.

The packing is that of `realm_tf.examples` (tests compare them), on rows of fixed length.
N passages, S sentences, C clozes, X spans, P phrases; B rows of a batch, K candidates.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.packed import NONE, Packed, firsts, padded


@dataclasses.dataclass(frozen=True)
class Layout:
  """query, passage, reader: packed lengths; masks: M; cls, sep, mask: ids."""

  query: int
  passage: int
  reader: int
  masks: int
  cls: int
  sep: int
  mask: int


class Corpus(NamedTuple):
  """On the device. Row N of what is by passage is the null passage.

  Attributes:
    rows: [N + 1, Lp] uint16 packed passages.
    text_at, text_size: [N + 1] where a row's text begins, and its word pieces.
    several: passages of more than one sentence.
    first_sentence, num_sentences: [N].
    sentence_passage, sentence_at, sentence_size: [S]; from the text's begin.
    cloze_sentence, first_span, num_spans: [C].
    span_cloze, span_at, span_size, span_phrase: [X]; from the sentence's begin.
    asked: spans with a phrase.
    holders: [P, H] passages that hold the phrase, NONE at the end.
    num_holders: [P].
  """

  rows: jax.Array
  text_at: jax.Array
  text_size: jax.Array
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
  """The packed corpus, on the device."""
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
  arrays = Corpus(
    rows=rows.astype(np.uint16),
    text_at=text_at,
    text_size=text_size,
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
    *(
      jnp.asarray(array if name == "rows" else array.astype(np.int32))
      for name, array in arrays._asdict().items()
    )
  )


def questions(data: Packed, layout: Layout) -> jax.Array:
  """Packed questions [Q, Lq] int32, as the query tower reads them."""
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
  """passage_ids, passage_segments [..., Lp] of passages; NONE and N are the null passage."""
  at = jnp.arange(layout.passage) - corpus.text_at[numbers][..., None]
  segments = (at >= 0) & (at <= corpus.text_size[numbers][..., None])
  return {
    "passage_ids": corpus.rows[numbers].astype(jnp.int32),
    "passage_segments": segments.astype(jnp.int32),
  }


def without_sentence(corpus: Corpus, sentences, removed, layout: Layout) -> dict:
  """The passages [B, Lp] of sentences, without them where `removed` [B] is 1."""
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


def sentence_queries(corpus: Corpus, sentences, layout: Layout):
  """Sentences as packed queries [B, Lq], and their word pieces within them [B]."""
  numbers = corpus.sentence_passage[sentences]
  size = jnp.minimum(corpus.sentence_size[sentences], layout.query - 2)
  at = jnp.arange(layout.query)[None]
  source = jnp.clip(
    (corpus.text_at[numbers] + corpus.sentence_at[sentences])[:, None] + at - 1,
    0,
    layout.passage - 1,
  )
  ids = jnp.take_along_axis(corpus.rows[numbers].astype(jnp.int32), source, axis=1)
  ids = jnp.where(
    at == 0,
    layout.cls,
    jnp.where(at <= size[:, None], ids, jnp.where(at == size[:, None] + 1, layout.sep, 0)),
  )
  return ids, size


class Clozes(NamedTuple):
  """Masked sentences.

  Attributes:
    query_ids: [B, Lq] int32.
    size: [B] word pieces of the sentence.
    mask_positions, targets: [B, M] int32, 0 where unused.
    target_mask: [B, M] float32.
    own: [B] the passage that the sentence stands in.
    phrase: [B] of the span, or NONE.
  """

  query_ids: jax.Array
  size: jax.Array
  mask_positions: jax.Array
  targets: jax.Array
  target_mask: jax.Array
  own: jax.Array
  phrase: jax.Array


def clozes(corpus: Corpus, spans, layout: Layout) -> Clozes:
  """Sentences with spans [B] masked."""
  sentences = corpus.cloze_sentence[corpus.span_cloze[spans]]
  ids, size = sentence_queries(corpus, sentences, layout)
  first, width = corpus.span_at[spans][:, None] + 1, corpus.span_size[spans][:, None]
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
  """reader_ids, reader_segments [B, K, L] of clozes with candidates [B, K]."""
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


# ------------------------------------------------------------------------------------------ drawing


def draw(key, values, num: int):
  """So many of the values, with repetition."""
  return values[jax.random.randint(key, [num], 0, len(values))]


def draw_spans(corpus: Corpus, key, num: int, *, asked: int):
  """Spans [B]: the first `asked` have a phrase, the others are one of any cloze."""
  keys = jax.random.split(key, 3)
  drawn = jax.random.randint(keys[1], [num - asked], 0, len(corpus.cloze_sentence))
  any_span = corpus.first_span[drawn] + (
    jax.random.uniform(keys[2], [num - asked]) * corpus.num_spans[drawn]
  ).astype(jnp.int32)
  return jnp.concatenate([draw(keys[0], corpus.asked, asked), any_span])


def draw_holders(corpus: Corpus, key, drawn: Clozes, num: int):
  """Different holders [B, num] of each cloze's phrase, the own passage left out; then NONE."""
  holders, count = corpus.holders[drawn.phrase], corpus.num_holders[drawn.phrase] - 1
  own_at = jnp.argmax(holders == drawn.own[:, None], axis=1)
  first = (jax.random.uniform(key, drawn.own.shape) * count).astype(jnp.int32)
  picked = (first[:, None] + jnp.arange(num)) % jnp.maximum(count, 1)[:, None]
  picked = jnp.take_along_axis(holders, picked + (picked >= own_at[:, None]), axis=1)
  return jnp.where(
    (jnp.arange(num) < count[:, None]) & (drawn.phrase != NONE)[:, None], picked, NONE
  )


def holds(corpus: Corpus, drawn: Clozes, numbers):
  """Whether passages ([K], or [B, K] one row for each cloze) hold each cloze's phrase: [B, K]."""
  numbers = jnp.broadcast_to(numbers, (len(drawn.own), numbers.shape[-1]))
  found = jnp.any(corpus.holders[drawn.phrase][:, None, :] == numbers[..., None], axis=-1)
  return found & (drawn.phrase != NONE)[:, None] & (numbers != NONE)


def ict(corpus: Corpus, key, num: int, layout: Layout, *, removal_rate: float = 0.9):
  """Inputs of the inverse cloze task, and allowed [B, B]: 0 where another row has the same passage.

  Passages of a single sentence are left out. `realm_tf.examples` draws them where it does not
  remove the sentence.
  """
  keys = jax.random.split(key, 3)
  numbers = draw(keys[0], corpus.several, num)
  sentences = corpus.first_sentence[numbers] + (
    jax.random.uniform(keys[1], [num]) * corpus.num_sentences[numbers]
  ).astype(jnp.int32)
  removed = jax.random.uniform(keys[2], [num]) < removal_rate
  allowed = (numbers[:, None] != numbers[None]) | jnp.eye(num, dtype=bool)
  inputs = {
    "query_ids": sentence_queries(corpus, sentences, layout)[0],
    **without_sentence(corpus, sentences, removed, layout),
  }
  return inputs, allowed.astype(jnp.float32)


def recurring_spans(corpus: Corpus, key, num: int, layout: Layout):
  """Masked sentences, each with one other passage that holds its span, and allowed [B, B].

  allowed is 0 for other holders.

  Spider, Ram et al. 2022.
  """
  keys = jax.random.split(key)
  drawn = clozes(corpus, draw_spans(corpus, keys[0], num, asked=num), layout)
  numbers = draw_holders(corpus, keys[1], drawn, 1)[:, 0]
  allowed = ~holds(corpus, drawn, numbers) | jnp.eye(num, dtype=bool)
  return {"query_ids": drawn.query_ids, **passages(corpus, numbers, layout)}, allowed.astype(
    jnp.float32
  )


def realm(corpus: Corpus, drawn: Clozes, numbers, layout: Layout) -> dict:
  """What a `RealmModel` reads, of clozes and candidates [B, K]."""
  return {
    "query_ids": drawn.query_ids,
    **passages(corpus, numbers, layout),
    **reader(corpus, drawn, numbers, layout),
    "mask_positions": drawn.mask_positions,
    "targets": drawn.targets,
    "target_mask": drawn.target_mask,
  }


def warmup(corpus: Corpus, key, num: int, layout: Layout) -> dict:
  """The reader's warm-up.

  Half of the clozes are read with a holder, a quarter with their own, intact passage, the rest
  with the null passage.
  """
  keys = jax.random.split(key)
  drawn = clozes(corpus, draw_spans(corpus, keys[0], num, asked=num // 2), layout)
  null = len(corpus.rows) - 1
  rest = jnp.where(jnp.arange(num) < num * 3 // 4, drawn.own, null)
  numbers = jnp.where(
    jnp.arange(num) < num // 2, draw_holders(corpus, keys[1], drawn, 1)[:, 0], rest
  )
  return realm(corpus, drawn, numbers[:, None], layout)


def candidates(corpus: Corpus, key, drawn: Clozes, scores, num: int, *, holders: int, share):
  """Candidates [B, num]: the null passage, retrieved ones, and the drawn holders at the end.

  Args:
    corpus: on the device.
    key: of the draw.
    drawn: B clozes.
    scores: [B, N] of all passages.
    num: K.
    holders: at most so many are holders of the phrase.
    share: [] probability of each of them; else a retrieved passage stands there.
  """
  keys = jax.random.split(key)
  given = draw_holders(corpus, keys[0], drawn, holders)
  given = jnp.sort(
    jnp.where(jax.random.uniform(keys[1], given.shape) < share, given, NONE)
  )  # NONE first
  row, null = jnp.arange(len(drawn.own))[:, None], len(corpus.rows) - 1
  taken = jnp.concatenate([drawn.own[:, None], given], axis=1)
  scores = (
    jnp.pad(scores, [[0, 0], [0, 1]])
    .at[row, jnp.where(taken == NONE, null, taken)]
    .set(-jnp.inf)
    .at[:, null]
    .set(-jnp.inf)
  )
  found = jax.lax.top_k(scores, num - 1)[1]
  tail = found[:, num - 1 - holders :]
  found = jnp.concatenate(
    [found[:, : num - 1 - holders], jnp.where(given == NONE, tail, given)], axis=1
  )
  return jnp.pad(found, [[0, 0], [1, 0]], constant_values=null).astype(jnp.int32), given
