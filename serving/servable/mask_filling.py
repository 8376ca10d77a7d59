"""Fills blanks in the graph of a servable: REALM's pre-training task (REALM, section 3.1)."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing
from realm_tf.examples.packing import QUERY_START
from realm_tf.models import equations
from realm_tf.models.masked_reader import MaskedReader
from serving.servable.retrieval import Frozen, Retrieval, repeated
from serving.signatures import MASK


class Blanks(NamedTuple):
  """Texts split at their blanks.

  Attributes:
    pieces: [B, None] string, the texts before, between and after the blanks.
    ids: [B, None] int32 word pieces, [MASK] at the blanks.
    positions: [B, M] int32 positions of the blanks in the packed query, 0 if unused.
    num: [B] int32 number of blanks that are filled.
  """

  pieces: tf.RaggedTensor
  ids: tf.RaggedTensor
  positions: tf.Tensor
  num: tf.Tensor


class MaskFilling(tf.Module):
  """Computes p(y|x) = Σ_z p(y|z,x) p(z|x) for blanks; the null passage is among the candidates.

  Args:
    null_vector: [D] embedding of the null passage.
    num_candidates, num_answers: C, N.
  """

  def __init__(
    self,
    retrieval: Retrieval,
    reader: MaskedReader,
    *,
    null_vector: np.ndarray,
    tokenizer: Tokenizer,
    num_candidates: int,
    num_answers: int,
  ):
    super().__init__()
    self.retrieval, self.reader = retrieval, Frozen(reader)
    self.null_vector = tf.Variable(null_vector, trainable=False)
    self.vocabulary = tf.Variable(tokenizer.pieces, trainable=False)
    self._length, self._query_length, self._max_masks = (
      reader.length,
      reader.query_length,
      reader.max_masks,
    )
    self._tokenizer, self._num_candidates, self._num_answers = (
      tokenizer,
      num_candidates,
      num_answers,
    )

  def fill_mask(self, text: tf.Tensor) -> dict[str, tf.Tensor]:
    """Computes the signature `fill_mask`."""
    blanks = self._blanks(text)
    numbers, scores = self._candidates(blanks)  # [B, C]
    log_probs = tf.nn.log_softmax(self._read(blanks, numbers))  # [B, C, M, V]
    log_prior = equations.log_prior(scores)  # [B, C]
    together = tf.exp(equations.log_marginal(log_probs, log_prior))  # [B, M, V]
    best = tf.math.top_k(together, self._num_answers)  # [B, M, N]
    alone = tf.math.top_k(tf.exp(log_probs[:, 0]), self._num_answers)
    used = tf.sequence_mask(blanks.num, tf.shape(blanks.positions)[1])[:, :, None]  # [B, M, 1]
    pieces, pieces_alone = (
      tf.where(used, tf.gather(self.vocabulary, part.indices), "") for part in (best, alone)
    )
    return {
      "num_masks": blanks.num,
      "token": pieces,
      "token_probability": tf.where(used, best.values, 0.0),
      "token_without_retrieval": pieces_alone,
      "token_probability_without_retrieval": tf.where(used, alone.values, 0.0),
      **self.retrieval.corpus.shown(numbers, tf.exp(log_prior)),
      "retrieval_utility": _utility(log_probs, best.indices[:, :, 0], used[:, :, 0]),
      "filled": _fill(blanks, pieces[:, :, 0]),
    }

  def _blanks(self, text: tf.Tensor) -> Blanks:
    # The text is part of the output, and JSON requires UTF-8.
    text = tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")
    # The tokenizer does not know [MASK] and would split it.
    pieces = tf.strings.split(text, MASK)
    row, at = pieces.value_rowids(), _number_in_row(pieces)
    # A blank follows every piece but the last.
    is_blank = tf.cast(at < tf.gather(pieces.row_lengths(), row) - 1, tf.int64)
    blank = tf.fill([tf.reduce_sum(is_blank)], self._tokenizer.mask_id)
    blank = tf.RaggedTensor.from_row_lengths(blank, is_blank, validate=False)
    ids = pieces.with_values(tf.concat([self._tokenizer(pieces.values), blank], axis=1)).merge_dims(
      1, 2
    )
    query = ids[:, : packing.query_room(self._query_length)]
    positions = tf.cast(query.with_values(_number_in_row(query) + QUERY_START), tf.int32)
    positions = tf.ragged.boolean_mask(positions, query == self._tokenizer.mask_id)[
      :, : self._max_masks
    ]
    num = positions.row_lengths()
    positions = positions.to_tensor(0, shape=[None, self._max_masks])[
      :, : tf.maximum(tf.reduce_max(num), 1)
    ]
    return Blanks(pieces, ids, positions, tf.cast(num, tf.int32))

  def _candidates(self, blanks: Blanks) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns numbers and retrieval scores of the null passage and the best others: [B, C]."""
    vectors = self.retrieval.embed(blanks.ids)  # [B, D]
    found = self.retrieval.find(vectors, self._num_candidates - 1)
    null_score = tf.linalg.matvec(vectors, self.null_vector)[:, None]  # [B, 1]
    numbers = tf.pad(found.numbers, [[0, 0], [1, 0]], constant_values=NULL_PASSAGE)
    return numbers, tf.concat([null_score, found.scores], axis=1)

  def _read(self, blanks: Blanks, numbers: tf.Tensor) -> tf.Tensor:
    """Returns the logits of the reader: [B, C, M, V]."""
    corpus, count = self.retrieval.corpus, self._num_candidates
    packed = packing.pack_reader(
      repeated(blanks.ids, count),
      corpus.text_ids(tf.reshape(numbers, [-1])),
      tokenizer=self._tokenizer,
      query_length=self._query_length,
      length=self._length,
    )
    # [B * C, M, V]
    logits = self.reader(
      {
        "token_ids": packed.token_ids,
        "segment_ids": packed.segment_ids,
        "mask_positions": tf.repeat(blanks.positions, count, axis=0),
      }
    )
    return tf.reshape(logits, [-1, count, tf.shape(logits)[1], self._tokenizer.size])


def _utility(log_probs: tf.Tensor, chosen: tf.Tensor, used: tf.Tensor) -> tf.Tensor:
  """Returns the retrieval utility of each candidate: [B, C].

  Args:
    log_probs: [B, C, M, V] log-probabilities of the word pieces.
    chosen: [B, M] word pieces y.
    used: [B, M] bool, which of them count.
  """
  chosen = tf.repeat(chosen[:, None], log_probs.shape[1], axis=1)  # [B, C, M]
  of_chosen = tf.gather(log_probs, chosen, batch_dims=3)  # [B, C, M]
  likelihoods = equations.log_likelihoods(of_chosen, tf.cast(used, tf.float32))
  return equations.candidate_utility(likelihoods)


def _fill(blanks: Blanks, tokens: tf.Tensor) -> tf.Tensor:
  """Returns the texts with a word piece [B, M] in each blank.

  A piece with ## is joined to the preceding word; blanks beyond `num` remain.
  """
  pieces, row, at = (
    blanks.pieces.values,
    blanks.pieces.value_rowids(),
    _number_in_row(blanks.pieces),
  )
  last = at == tf.gather(blanks.pieces.row_lengths(), row) - 1
  filled = at < tf.cast(tf.gather(blanks.num, row), tf.int64)
  token = tf.gather_nd(
    tokens, tf.stack([row, tf.minimum(at, tf.shape(tokens, tf.int64)[1] - 1)], axis=1)
  )
  token = tf.where(last, "", tf.where(filled, token, MASK))
  joins = tf.strings.regex_full_match(token, "##.+")
  # Adjacent to the preceding blank, without a space between them.
  touches = filled & ~last & (at > 0) & (pieces == "")
  pieces = tf.where(
    joins, tf.strings.regex_replace(pieces, r"\s+$", ""), tf.where(touches, " ", pieces)
  )
  token = tf.strings.regex_replace(token, "^##", "")
  return tf.strings.reduce_join(blanks.pieces.with_values(pieces + token), axis=1)


def _number_in_row(rows: tf.RaggedTensor) -> tf.Tensor:
  """Numbers the values of each row 0, 1, 2, ..: flat int64."""
  return tf.range(tf.shape(rows.values, tf.int64)[0]) - tf.gather(
    rows.row_starts(), rows.value_rowids()
  )
