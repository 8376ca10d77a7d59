"""Recurring spans: a masked sentence is a query for another passage that holds its span.

Spider, Ram et al. 2022.

Such pairs train a retriever, and held-out pairs evaluate it, without any questions.
"""

import sys
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.errors import UserError
from realm_tf.examples import masking, packing
from realm_tf.examples.ict import IctDraw, IctExamples
from realm_tf.examples.masked_sentences import MaskedSentences
from realm_tf.examples.masking import MaskedQueries
from realm_tf.models.retriever import Retriever
from realm_tf.spans.holders import MAX_HOLDERS

HELD_OUT_RECALL = "held_out_recall_at_5"  # in metrics.jsonl
_MOST_PASSAGES = 5000  # searched for held-out sentences
_ROWS_AT_ONCE = 64  # embedded together


class RecurringSpans:
  """Masked sentences, each with one random other passage that holds the masked span.

  Args:
    sentences: sentences of the corpus.
    table: passages of the corpus.
    query_length, passage_length, title_length: word pieces of packed queries, passages and titles.
    query_words: fewest and most words of a query, which is then a random run of words around the
      mask; if empty, the query is the whole sentence.
    keep_span: share of the queries that show the span instead of the mask.
    title_share: share of the queries that begin with the title of their own passage, if it is
      known.
    ict: supplies the part of a batch that is inverse cloze instead.
    ict_share: share of the batch that is inverse cloze; the whole batch if no span recurs.

  Raises:
    UserError: if no span recurs and ict_share is 0.
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
    keep_span: float = 0.0,
    title_share: float = 0.0,
    ict: IctExamples | None = None,
    ict_share: float = 0.0,
  ):
    self.sentences, self.table, self.tokenizer = sentences, table, tokenizer
    self.query_length, self.passage_length, self.title_length = (
      query_length,
      passage_length,
      title_length,
    )
    self.query_words, self.keep_span = tuple(query_words), keep_span
    self.title_share = title_share
    self.ict, self.ict_share = ict, ict_share
    if not sentences.num_with_holders:
      none = (
        f"no span of {sentences.folder!r} occurs in 1 to {MAX_HOLDERS} other passages without "
        "occurring in the title"
      )
      if not ict_share:
        raise UserError(f"{none}. Give more passages, or set recurring_spans.steps to 0.")
      print(f"WARNING: {none}: all examples are inverse cloze.", file=sys.stderr, flush=True)
      self.ict_share = 1.0

  def batch(self, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """Returns the batch of training step `step`, a pure function of the step and the seed.

    Returns:
      query_ids [B, Lq]; passage_ids, passage_segments [B, Lp]; allowed [B, B] float32, 0 where a
      passage of another row must not count as wrong, because it holds the span or the sentence.
    """
    num_ict = round(self.ict_share * batch_size)
    if num_ict == batch_size:
      return self._inverse_cloze(*self._drawn(step, batch_size, seed))
    queries = self.sentences.batch(
      step, batch_size=batch_size - num_ict, seed=seed, with_holders=1.0
    )
    rng = np.random.default_rng([seed, 17, step])
    numbers = masking.draw_holders(queries, 1, rng)[:, 0]
    if self.query_words:
      queries = masking.crop_queries(queries, self.query_words, tokenizer=self.tokenizer, rng=rng)
    shown = masking.for_retriever(
      queries,
      rng,
      keep_span=self.keep_span,
      title_share=self.title_share,
      table=self.table,
      query_length=self.query_length,
      passage_length=self.passage_length,
      title_length=self.title_length,
    )
    packed = self._pack(shown, numbers)
    right = np.concatenate([queries.own_passages, queries.holders], axis=1)  # [B, R]
    if num_ict:
      drawn, rows = self._drawn(step, num_ict, seed)
      packed = {name: np.concatenate([part, rows[name]]) for name, part in packed.items()}
      numbers = np.concatenate([numbers, drawn.numbers])
      own = np.full([num_ict, right.shape[1]], NULL_PASSAGE)
      own[:, 0] = drawn.numbers
      right = np.concatenate([right, own])
    allowed = ~masking.contains(right, numbers) | np.eye(batch_size, dtype=bool)
    return {**packed, "allowed": allowed.astype(np.float32)}

  def _drawn(self, step: int, num: int, seed: int) -> tuple[IctDraw, dict[str, np.ndarray]]:
    """Returns rows of the inverse cloze task, as drawn and as packed."""
    assert self.ict, "ict_share requires ict"
    drawn = self.ict.draw(step, batch_size=num, seed=seed)
    return drawn, self.ict.pack(drawn)

  def _inverse_cloze(self, drawn: IctDraw, packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a batch without recurring spans."""
    del packed["removed"]
    allowed = (drawn.numbers[:, None] != drawn.numbers) | np.eye(len(drawn.numbers), dtype=bool)
    return {**packed, "allowed": allowed.astype(np.float32)}

  def _pack(self, queries: MaskedQueries, numbers: np.ndarray) -> dict[str, np.ndarray]:
    titles, texts = packing.gather_passages(self.table, numbers)
    packed = packing.pack_passages(
      titles,
      texts,
      tokenizer=self.tokenizer,
      length=self.passage_length,
      title_length=self.title_length,
    )
    query_ids = packing.pack_queries(
      queries.ids.tensor(), tokenizer=self.tokenizer, length=self.query_length
    )
    return {
      "query_ids": query_ids.numpy(),
      "passage_ids": packed.token_ids.numpy(),
      "passage_segments": packed.segment_ids.numpy(),
    }


class HeldOutRecall:
  """Evaluates a retriever on held-out sentences whose span is masked.

  Measures how often the retriever finds another passage that holds the masked span.

  Sentences without such passages are left out. The retriever searches all those passages, and
  random others of the corpus, 5,000 in all, because embedding a whole corpus would take longer than
  the training between two evaluations.

  Args:
    retriever: the retriever, in its current state at each call.
    sentences: sentences, some of which are held out.
    table: the passages.

  Raises:
    UserError: if no held-out sentence has a span that other passages hold.
  """

  def __init__(
    self,
    retriever: Retriever,
    sentences: MaskedSentences,
    table: PassageTable,
    *,
    tokenizer: Tokenizer,
  ):
    queries = sentences.held_out(with_holders=True)
    if queries is None:
      raise UserError(
        f"no held-out sentence of {sentences.folder!r} has a span that other passages hold, so "
        "its recall cannot be measured. Set eval_every to 0, or give more passages."
      )
    self._own, self._holders = queries.own_passages, queries.holders
    wanted = np.setdiff1d(self._holders, [NULL_PASSAGE])[:_MOST_PASSAGES]
    others = np.setdiff1d(table.numbers, wanted)
    num_others = min(len(others), _MOST_PASSAGES - len(wanted))
    others = np.random.default_rng(19).choice(others, num_others, replace=False)
    self._numbers = np.sort(np.concatenate([wanted, others]))
    titles, texts = packing.gather_passages(table, self._numbers)
    self._query_ids = packing.pack_queries(
      queries.ids.tensor(), tokenizer=tokenizer, length=retriever.query_length
    )
    self._passages = packing.pack_passages(
      titles,
      texts,
      tokenizer=tokenizer,
      length=retriever.passage_length,
      title_length=retriever.title_length,
    )
    self._embed_queries = tf.function(retriever.embed_queries, autograph=False)
    self._embed_passages = tf.function(retriever.embed_passages, autograph=False)

  def __call__(self, k: int = 5) -> float:
    """Returns the share of the sentences with such a passage among the first k, 0 to 1."""
    queries = _in_blocks(self._embed_queries, self._query_ids)  # [Q, D]
    vectors = _in_blocks(self._embed_passages, *self._passages)  # [N, D]
    scores = queries @ vectors.T
    scores[masking.contains(self._own, self._numbers)] = -np.inf
    best = self._numbers[np.argsort(-scores, axis=1, kind="stable")[:, :k]]  # [Q, k]
    return float(masking.contains(self._holders, best).any(axis=1).mean())


def _in_blocks(embed: Callable, *packed: tf.Tensor) -> np.ndarray:
  """Returns the vectors [N, D] of packed rows [N, L]."""
  blocks = range(0, len(packed[0]), _ROWS_AT_ONCE)
  return np.concatenate(
    [embed(*(part[at : at + _ROWS_AT_ONCE] for part in packed)).numpy() for at in blocks]
  )
