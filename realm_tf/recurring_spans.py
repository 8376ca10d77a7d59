"""Recurring spans: a masked sentence asks for another passage that holds its span. Spider, Ram et al. 2022.

Such pairs train a retriever, and those held out measure one, without a single question.
"""

import sys
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from realm_tf import examples
from realm_tf.errors import UserError
from realm_tf.examples import NULL_PASSAGE, IctDraw, IctExamples, MaskedQueries, MaskedSentences
from realm_tf.holders import MAX_HOLDERS
from realm_tf.models.retriever import Retriever
from realm_tf.passages import PassageTable
from realm_tf.tokenization import Tokenizer

HELD_OUT_RECALL = "held_out_recall_at_5"  # in metrics.jsonl
_MOST_PASSAGES = 5000  # that held-out sentences are searched among
_ROWS_AT_ONCE = 64  # embedded together


class RecurringSpans:
  """Masked sentences, each with one random other passage that holds the masked span.

  Args:
    sentences: of the corpus.
    table: its passages.
    query_length, passage_length, title_length: word pieces of packed queries, passages and titles.
    query_words: fewest and most words of a query, which is then a random run of words around the mask; empty: the
      whole sentence.
    ict: gives the part of a batch that is inverse cloze instead.
    ict_share: of the batch; all of it where no span recurs.

  Raises:
    UserError: no span recurs, and ict_share is 0.
  """

  def __init__(
    self,
    sentences: MaskedSentences,
    table: PassageTable,
    *,
    tokenizer: Tokenizer,
    query_length: int,
    passage_length: int,
    title_length: int | None = None,
    query_words: Sequence[int] = (),
    ict: IctExamples | None = None,
    ict_share: float = 0.0,
  ):
    self.sentences, self.table, self.tokenizer = sentences, table, tokenizer
    self.query_length, self.passage_length, self.title_length = query_length, passage_length, title_length
    self.query_words = tuple(query_words)
    self.ict, self.ict_share = ict, ict_share
    if not sentences.num_with_holders:
      none = f"no span of {sentences.folder!r} stands in 1 to {MAX_HOLDERS} other passages without standing in the title"
      if not ict_share:
        raise UserError(f"{none}. Give more passages, or set recurring_spans.steps to 0.")
      print(f"WARNING: {none}: all of this is inverse cloze.", file=sys.stderr, flush=True)
      self.ict_share = 1.0

  def batch(self, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """The batch of training step `step`, a pure function of it and the seed.

    Returns:
      query_ids [B, Lq]; passage_ids, passage_segments [B, Lp]; allowed [B, B] float32, 0 where a passage of another row
      must not count as wrong: it holds the span, or the sentence itself.
    """
    num_ict = round(self.ict_share * batch_size)
    if num_ict == batch_size:
      return self._inverse_cloze(self.ict.draw(step, batch_size=batch_size, seed=seed))
    queries = self.sentences.batch(step, batch_size=batch_size - num_ict, seed=seed, with_holders=1.0)
    rng = np.random.default_rng([seed, 17, step])
    numbers = examples.draw_holders(queries, 1, rng)[:, 0]
    if self.query_words:
      queries = examples.crop_queries(queries, self.query_words, tokenizer=self.tokenizer, rng=rng)
    packed = self._pack(queries, numbers)
    right = np.concatenate([queries.own_passages, queries.holders], axis=1)  # [B, R]
    if num_ict:
      drawn = self.ict.draw(step, batch_size=num_ict, seed=seed)
      rows = self.ict.pack(drawn)
      packed = {name: np.concatenate([part, rows[name]]) for name, part in packed.items()}
      numbers = np.concatenate([numbers, drawn.numbers])
      own = np.full([num_ict, right.shape[1]], NULL_PASSAGE)
      own[:, 0] = drawn.numbers
      right = np.concatenate([right, own])
    allowed = ~examples.contains(right, numbers) | np.eye(batch_size, dtype=bool)
    return {**packed, "allowed": allowed.astype(np.float32)}

  def _inverse_cloze(self, drawn: IctDraw) -> dict[str, np.ndarray]:
    """A batch without recurring spans."""
    packed = self.ict.pack(drawn)
    del packed["removed"]
    allowed = (drawn.numbers[:, None] != drawn.numbers) | np.eye(len(drawn.numbers), dtype=bool)
    return {**packed, "allowed": allowed.astype(np.float32)}

  def _pack(self, queries: MaskedQueries, numbers: np.ndarray) -> dict[str, np.ndarray]:
    titles, texts = examples.gather_passages(self.table, numbers)
    packed = examples.pack_passages(
      titles, texts, tokenizer=self.tokenizer, length=self.passage_length, title_length=self.title_length)
    query_ids = examples.pack_queries(queries.ids.tensor(), tokenizer=self.tokenizer, length=self.query_length)
    return {
      "query_ids": query_ids.numpy(),
      "passage_ids": packed.token_ids.numpy(),
      "passage_segments": packed.segment_ids.numpy(),
    }


class HeldOutRecall:
  """Measures how often a retriever finds another passage that holds the masked span of a held-out sentence.

  Sentences without such passages are left out. They are searched among all those passages, and others of the corpus
  at random, 5,000 in all: to embed a whole corpus would take longer than the training between two looks.

  Args:
    retriever: as it is at each call.
    sentences: some of which are held out.
    table: the passages.

  Raises:
    UserError: no sentence is held out that other passages hold the span of.
  """

  def __init__(self, retriever: Retriever, sentences: MaskedSentences, table: PassageTable, *, tokenizer: Tokenizer):
    queries = sentences.held_out(with_holders=True)
    if queries is None:
      raise UserError(
        f"no held-out sentence of {sentences.folder!r} has a span that other passages hold, so its recall cannot be "
        "measured. Set eval_every to 0, or give more passages.")
    self._own, self._holders = queries.own_passages, queries.holders
    wanted = np.setdiff1d(self._holders, [NULL_PASSAGE])[:_MOST_PASSAGES]
    others = np.setdiff1d(np.arange(len(table)), wanted)
    num_others = min(len(others), _MOST_PASSAGES - len(wanted))
    others = np.random.default_rng(19).choice(others, num_others, replace=False)
    self._numbers = np.sort(np.concatenate([wanted, others]))
    titles, texts = examples.gather_passages(table, self._numbers)
    self._query_ids = examples.pack_queries(
      queries.ids.tensor(), tokenizer=tokenizer, length=retriever.query_length)
    self._passages = examples.pack_passages(
      titles, texts, tokenizer=tokenizer, length=retriever.passage_length, title_length=retriever.title_length)
    self._embed_queries = tf.function(retriever.embed_queries)
    self._embed_passages = tf.function(retriever.embed_passages)

  def __call__(self, k: int = 5) -> float:
    """The share of the sentences with such a passage among the first k, 0 to 1."""
    queries = _in_blocks(self._embed_queries, self._query_ids)  # [Q, D]
    vectors = _in_blocks(self._embed_passages, *self._passages)  # [N, D]
    scores = queries @ vectors.T
    scores[examples.contains(self._own, self._numbers)] = -np.inf
    best = self._numbers[np.argsort(-scores, axis=1, kind="stable")[:, :k]]  # [Q, k]
    return float(examples.contains(self._holders, best).any(axis=1).mean())


def _in_blocks(embed: Callable, *packed: tf.Tensor) -> np.ndarray:
  """Vectors [N, D] of packed rows [N, L]."""
  blocks = range(0, len(packed[0]), _ROWS_AT_ONCE)
  return np.concatenate([embed(*(part[at : at + _ROWS_AT_ONCE] for part in packed)).numpy() for at in blocks])
