"""Draws the contents of a batch on the device: sentences, spans, holders and candidates.

Dimensions: N passages, B rows of a batch, K candidates.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.accelerator import batches
from benchmarks.accelerator.batches import Clozes, Corpus, Layout
from benchmarks.accelerator.packed import NONE


def draw(key, values, num: int):
  """Draws `num` of the values, with replacement."""
  return values[jax.random.randint(key, [num], 0, len(values))]


def draw_spans(corpus: Corpus, key, num: int, *, asked: int):
  """Draws spans [B]: the first `asked` have a phrase, each of the others is any span of a cloze."""
  keys = jax.random.split(key, 3)
  drawn = jax.random.randint(keys[1], [num - asked], 0, len(corpus.cloze_sentence))
  any_span = corpus.first_span[drawn] + (
    jax.random.uniform(keys[2], [num - asked]) * corpus.num_spans[drawn]
  ).astype(jnp.int32)
  return jnp.concatenate([draw(keys[0], corpus.asked, asked), any_span])


def draw_holders(corpus: Corpus, key, drawn: Clozes, num: int):
  """Draws different holders [B, num] of each cloze's phrase, without its own passage; then NONE."""
  holders, count = corpus.holders[drawn.phrase], corpus.num_holders[drawn.phrase] - 1
  own_at = jnp.argmax(holders == drawn.own[:, None], axis=1)
  first = (jax.random.uniform(key, drawn.own.shape) * count).astype(jnp.int32)
  picked = (first[:, None] + jnp.arange(num)) % jnp.maximum(count, 1)[:, None]
  picked = jnp.take_along_axis(holders, picked + (picked >= own_at[:, None]), axis=1)
  return jnp.where(
    (jnp.arange(num) < count[:, None]) & (drawn.phrase != NONE)[:, None], picked, NONE
  )


def keep_spans(drawn: Clozes, key, share) -> jax.Array:
  """Returns packed queries [B, Lq], a random share of which show the span instead of [MASK]s.

  As in `realm_tf.examples.masking.keep_spans`, for the retriever only.
  """
  used = drawn.target_mask > 0
  at = jnp.where(used, drawn.mask_positions, drawn.query_ids.shape[1])  # the rest is dropped
  whole = drawn.query_ids.at[jnp.arange(len(at))[:, None], at].set(drawn.targets, mode="drop")
  kept = jax.random.uniform(key, [len(at), 1]) < share
  return jnp.where(kept, whole, drawn.query_ids)


def holds(corpus: Corpus, drawn: Clozes, numbers):
  """Returns whether passages ([K], or [B, K] by cloze) hold each cloze's phrase: [B, K]."""
  numbers = jnp.broadcast_to(numbers, (len(drawn.own), numbers.shape[-1]))
  found = jnp.any(corpus.holders[drawn.phrase][:, None, :] == numbers[..., None], axis=-1)
  return found & (drawn.phrase != NONE)[:, None] & (numbers != NONE)


def draw_sentences(corpus: Corpus, key, numbers):
  """Draws one sentence of each passage [B]."""
  at = jax.random.uniform(key, numbers.shape) * corpus.num_sentences[numbers]
  return corpus.first_sentence[numbers] + at.astype(jnp.int32)


def ict(corpus: Corpus, key, num: int, layout: Layout, *, removal_rate: float = 0.9) -> dict:
  """Draws inputs of the inverse cloze task.

  The output `allowed` [B, B] is 0 if another row has the same passage. Passages of a single
  sentence are omitted; `realm_tf.examples` draws them if it does not remove the sentence.
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
  corpus: Corpus,
  key,
  num: int,
  layout: Layout,
  *,
  query_words: Sequence[int],
  keep_span: float,
  ict_share: float,
  title_share: float = 0.0,
) -> dict:
  """Draws recurring spans (Spider, Ram et al. 2022), then inverse clozes with nothing removed.

  A masked sentence retrieves another passage that holds its span, a sentence retrieves its own,
  intact passage. The draws and `allowed` are those of `realm_tf.examples.recurring_spans`.

  Args:
    corpus: the corpus on the device.
    key: key of the random draws.
    num: B.
    layout: layout of queries and passages.
    query_words: minimum and maximum words of each query. If empty, whole sentences.
    keep_span: share of the masked sentences that show the span instead.
    ict_share: share of inverse clozes in the batch.
    title_share: share of these whose query begins with the passage's title.

  Returns:
    query_ids [B, Lq]; passage_ids, passage_segments [B, Lp]; allowed [B, B], 0 if the passage of
    another row holds the span, or the sentence itself.
  """
  keys, num_ict = jax.random.split(key, 8), round(ict_share * num)
  spans = draw_spans(corpus, keys[0], num - num_ict, asked=num - num_ict)
  drawn = batches.clozes(corpus, spans, layout, key=keys[1], query_words=query_words)
  own = draw(keys[2], corpus.some, num_ict)
  sentences = draw_sentences(corpus, keys[3], own)
  runs = batches.crop(corpus, keys[4], batches.whole(corpus, sentences), query_words)
  with_title = jax.random.uniform(keys[7], [num_ict]) < title_share
  numbers = jnp.concatenate([draw_holders(corpus, keys[5], drawn, 1)[:, 0], own])
  right = jnp.pad(holds(corpus, drawn, numbers), [[0, num_ict], [0, 0]])
  right |= jnp.concatenate([drawn.own, own])[:, None] == numbers
  return {
    "query_ids": jnp.concatenate(
      [
        keep_spans(drawn, keys[6], keep_span),
        batches.queries(corpus, runs, layout, titled=with_title)[0],
      ]
    ),
    **batches.passages(corpus, numbers, layout),
    "allowed": (~right | jnp.eye(num, dtype=bool)).astype(jnp.float32),
  }


def unread(corpus: Corpus, drawn: Clozes, numbers):
  """Returns which candidates of the batch count as unread ones for each cloze.

  As in `realm_tf.examples.realm.unread_passages`: each passage once, without the null passage,
  those that the cloze was read with, and those that may hold the answer.

  Args:
    corpus: the corpus on the device.
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
  """Draws inputs for the warm-up of the reader: clozes cut like those of REALM.

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


def candidates(
  corpus: Corpus,
  key,
  drawn: Clozes,
  scores,
  num: int,
  *,
  holders: int,
  share,
  own: int = 0,
  pool: int = 0,
):
  """Draws candidates [B, num]: the null passage, retrieved ones, and holders at the end.

  Args:
    corpus: the corpus on the device.
    key: key of the random draw.
    drawn: B clozes.
    scores: [B, N] scores of all passages.
    num: K.
    holders: maximum number of candidates that are holders of the phrase.
    share: [] probability of each of them; otherwise a retrieved passage takes its place.
    own: number of clozes, the last ones, that keep their own passage as one of the holders.
    pool: draw the retrieved candidates at random from this many of the best; 0: take the best.

  Returns:
    numbers [B, num] int32; given [B, holders], NONE in place of a retrieved passage.
  """
  keys = jax.random.split(key, 3)
  given = draw_holders(corpus, keys[0], drawn, holders)
  keeps_own = jnp.arange(len(drawn.own)) >= len(drawn.own) - own
  if own and holders:
    given = given.at[:, 0].set(jnp.where(keeps_own, drawn.own, given[:, 0]))
  # sorts NONE to the front
  given = jnp.sort(jnp.where(jax.random.uniform(keys[1], given.shape) < share, given, NONE))
  row, null = jnp.arange(len(drawn.own))[:, None], len(corpus.rows) - 1
  dropped = jnp.where(keeps_own, NONE, drawn.own)[:, None]
  taken = jnp.concatenate([dropped, given], axis=1)
  scores = (
    jnp.pad(scores, [[0, 0], [0, 1]])
    .at[row, jnp.where(taken == NONE, null, taken)]
    .set(-jnp.inf)
    .at[:, null]
    .set(-jnp.inf)
  )
  found = jax.lax.top_k(scores, max(pool, num - 1))[1]
  if pool:
    chance = jax.random.uniform(keys[2], found.shape)
    chosen = jax.lax.top_k(chance, num - 1)[1]  # unordered, so that all are replaced equally often
    found = jnp.take_along_axis(found, chosen, axis=1)
  tail = found[:, num - 1 - holders :]
  found = jnp.concatenate(
    [found[:, : num - 1 - holders], jnp.where(given == NONE, tail, given)], axis=1
  )
  return jnp.pad(found, [[0, 0], [1, 0]], constant_values=null).astype(jnp.int32), given
