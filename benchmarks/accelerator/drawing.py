"""What stands in a batch, drawn on the device: sentences, spans, holders and candidates.

N passages, B rows of a batch, K candidates.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.accelerator import batches
from benchmarks.accelerator.batches import Clozes, Corpus, Layout
from benchmarks.accelerator.packed import NONE


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


def draw_sentences(corpus: Corpus, key, numbers):
  """One sentence of each passage [B]."""
  at = jax.random.uniform(key, numbers.shape) * corpus.num_sentences[numbers]
  return corpus.first_sentence[numbers] + at.astype(jnp.int32)


def ict(corpus: Corpus, key, num: int, layout: Layout, *, removal_rate: float = 0.9) -> dict:
  """Inputs of the inverse cloze task, and allowed [B, B]: 0 where another row has the same passage.

  Passages of a single sentence are left out. `realm_tf.examples` draws them where it does not
  remove the sentence.
  """
  keys = jax.random.split(key, 3)
  numbers = draw(keys[0], corpus.several, num)
  sentences = draw_sentences(corpus, keys[1], numbers)
  removed = jax.random.uniform(keys[2], [num]) < removal_rate
  allowed = (numbers[:, None] != numbers[None]) | jnp.eye(num, dtype=bool)
  return {
    "query_ids": batches.queries(corpus, batches.whole(corpus, sentences), layout)[0],
    **batches.without_sentence(corpus, sentences, removed, layout),
    "allowed": allowed.astype(jnp.float32),
  }


def mixed_spans(
  corpus: Corpus, key, num: int, layout: Layout, *, query_words: Sequence[int], ict_share: float
) -> dict:
  """Recurring spans (Spider, Ram et al. 2022), then the inverse cloze task with nothing removed.

  A masked sentence asks for another passage that holds its span, a sentence for its own, intact
  passage. The draws and `allowed` are those of `realm_tf.recurring_spans`.

  Args:
    corpus: on the device.
    key: of the draws.
    num: B.
    layout: of queries and passages.
    query_words: fewest and most words of each query. Empty: whole sentences.
    ict_share: of the batch.

  Returns:
    query_ids [B, Lq]; passage_ids, passage_segments [B, Lp]; allowed [B, B], 0 where the passage of
    another row holds the span, or the sentence itself.
  """
  keys, num_ict = jax.random.split(key, 6), round(ict_share * num)
  spans = draw_spans(corpus, keys[0], num - num_ict, asked=num - num_ict)
  drawn = batches.clozes(corpus, spans, layout, key=keys[1], query_words=query_words)
  own = draw(keys[2], corpus.some, num_ict)
  sentences = draw_sentences(corpus, keys[3], own)
  runs = batches.crop(corpus, keys[4], batches.whole(corpus, sentences), query_words)
  numbers = jnp.concatenate([draw_holders(corpus, keys[5], drawn, 1)[:, 0], own])
  right = jnp.pad(holds(corpus, drawn, numbers), [[0, num_ict], [0, 0]])
  right |= jnp.concatenate([drawn.own, own])[:, None] == numbers
  return {
    "query_ids": jnp.concatenate([drawn.query_ids, batches.queries(corpus, runs, layout)[0]]),
    **batches.passages(corpus, numbers, layout),
    "allowed": (~right | jnp.eye(num, dtype=bool)).astype(jnp.float32),
  }


def unread(corpus: Corpus, drawn: Clozes, numbers):
  """Which candidates of the batch count for each cloze among those that it was not read with.

  As `realm_tf.examples.unread_passages`: each passage once; not the null passage, nor what the
  cloze was read with, nor what may hold the answer.

  Args:
    corpus: on the device.
    drawn: B clozes.
    numbers: [B, K] their candidates.

  Returns:
    [B, B * K] float32.
  """
  everything = numbers.reshape(-1)
  first = jnp.argmax(everything[:, None] == everything, axis=1) == jnp.arange(len(everything))
  read = jnp.any(numbers[:, None] == everything[:, None], axis=-1)
  right = holds(corpus, drawn, everything) | (drawn.own[:, None] == everything)
  counts = first & (everything != len(corpus.rows) - 1) & ~read & ~right
  return counts.astype(jnp.float32)


def warmup(corpus: Corpus, key, num: int, layout: Layout, *, query_words: Sequence[int]) -> dict:
  """The reader's warm-up, on clozes cut like those of REALM.

  Half of the clozes are read with a holder, a quarter with their own, intact passage, the rest
  with the null passage.
  """
  keys = jax.random.split(key, 3)
  spans = draw_spans(corpus, keys[0], num, asked=num // 2)
  drawn = batches.clozes(corpus, spans, layout, key=keys[2], query_words=query_words)
  null = len(corpus.rows) - 1
  rest = jnp.where(jnp.arange(num) < num * 3 // 4, drawn.own, null)
  numbers = jnp.where(
    jnp.arange(num) < num // 2, draw_holders(corpus, keys[1], drawn, 1)[:, 0], rest
  )
  return batches.realm(corpus, drawn, numbers[:, None], layout)


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
