"""Answers questions in the graph of a servable: reads the retrieved passages, picks best spans."""

from typing import NamedTuple

import tensorflow as tf

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.tokenization import Tokenizer, Tokens
from realm_tf.examples import packing
from realm_tf.models.span_reader import SpanReader, best_span, span_mask, whole_word_mask, windows
from serving.servable.retrieval import Frozen, Retrieval, prior, repeated
from serving.signatures import NO_SCORE


class Spans(NamedTuple):
  """All spans of the passages read, S = L * W for each passage.

  Attributes:
    allowed: [B, R, S] bool, whether the span exists and consists of whole words.
    scores: [B, R, S] scores of the reader; NO_SCORE if not allowed.
    texts: [B, R, S] string, "" if not allowed.
    starts, ends: [B, R, S] int32 byte offsets into the passage's UTF-8 text, 0 if not allowed.
  """

  allowed: tf.Tensor
  scores: tf.Tensor
  texts: tf.Tensor
  starts: tf.Tensor
  ends: tf.Tensor


class Answering(tf.Module):
  """Retrieves, reads and chooses spans; gives the same answers as `realm_tf.evaluate`.

  Args:
    num_retrieved, num_passages, num_answers: K, R, N.
  """

  def __init__(
    self,
    retrieval: Retrieval,
    reader: SpanReader,
    *,
    tokenizer: Tokenizer,
    num_retrieved: int,
    num_passages: int,
    num_answers: int,
  ):
    super().__init__()
    self.retrieval, self.reader = retrieval, Frozen(reader)
    self._length, self._width, self._query_length = (
      reader.length,
      reader.max_span,
      reader.query_length,
    )
    self._tokenizer = tokenizer
    self._num_retrieved, self._num_passages, self._num_answers = (
      num_retrieved,
      num_passages,
      num_answers,
    )

  def answer(self, question: tf.Tensor) -> dict[str, tf.Tensor]:
    """Computes the signature `answer`."""
    ids = self._tokenizer(question)
    found, count = self.retrieval.search(ids, self._num_retrieved), self._num_passages
    numbers, scores = found.numbers[:, :count], found.scores[:, :count]
    spans = self._read(ids, numbers)
    best = best_span(spans.scores, spans.allowed)  # [B, R]

    def of_best(values):
      return tf.gather(values, best, batch_dims=2)

    return {
      **self._best_answers(spans, scores),
      **self.retrieval.corpus.shown(numbers, prior(found)[:, :count]),
      "retrieval_score": scores,
      "reader_score": of_best(spans.scores),
      "answer_start": of_best(spans.starts),
      "answer_end": of_best(spans.ends),
    }

  def _read(self, ids: tf.RaggedTensor, numbers: tf.Tensor) -> Spans:
    """Reads the passages [B, R] for questions, given as word pieces [B, None]."""
    corpus, flat = self.retrieval.corpus, tf.reshape(numbers, [-1])  # [B * R]
    tokens = corpus.tokens(flat)
    packed = packing.pack_reader(
      repeated(ids, self._num_passages),
      tokens.ids,
      tokenizer=self._tokenizer,
      query_length=self._query_length,
      length=self._length,
    )
    # [B * R, L, W]
    scores = self.reader({"token_ids": packed.token_ids, "segment_ids": packed.segment_ids})
    inside = span_mask(
      packed.token_ids, packed.segment_ids, sep_id=self._tokenizer.sep_id, max_span=self._width
    )
    continues = tf.gather(tf.constant(self._tokenizer.continues), packed.token_ids)  # [B * R, L]
    allowed = (inside > 0) & whole_word_mask(continues, max_span=self._width)  # [B * R, L, W]
    starts, ends = self._offsets(tokens, packed.segment_ids)  # [B * R, L]
    ends = windows(ends, max_span=self._width)  # [B * R, L, W]
    shape = [-1, self._length * self._width]
    starts = tf.reshape(tf.where(allowed, starts[:, :, None], 0), shape)
    ends = tf.reshape(tf.where(allowed, ends, 0), shape)
    texts = tf.strings.substr(
      tf.gather(corpus.texts, corpus.rows(flat))[:, None], starts, ends - starts, unit="BYTE"
    )
    scores = tf.reshape(tf.where(allowed, scores, NO_SCORE), shape)
    return Spans(
      *(
        tf.reshape(part, [-1, self._num_passages, shape[1]])
        for part in (allowed, scores, texts, starts, ends)
      )
    )

  def _offsets(self, tokens: Tokens, segment_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Looks up the byte offsets of the packed word pieces of the text; 0 elsewhere.

    Returns:
      starts and ends, [N, L] int32.
    """
    first = tf.argmax(segment_ids, axis=1, output_type=tf.int64)  # where the text begins
    at = tf.range(self._length, dtype=tf.int64) - first[:, None]  # position in the text
    is_text = (at >= 0) & (at < tokens.ids.row_lengths()[:, None])
    at = tf.where(is_text, at + tokens.ids.row_starts()[:, None], 0)

    # Padded with a 0, since there may be no word piece at all.
    def pick(values: tf.RaggedTensor):
      return tf.where(is_text, tf.gather(tf.pad(values.values, [[0, 1]]), at), 0)

    return pick(tokens.starts), pick(tokens.ends)

  def _best_answers(self, spans: Spans, retrieval_scores: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns the best `num_answers` different texts and where they were read."""
    num_spans = self._length * self._width  # of a passage
    scores, allowed, texts = (
      tf.reshape(part, [-1, self._num_passages * num_spans])
      for part in (spans.scores + retrieval_scores[:, :, None], spans.allowed, spans.texts)
    )
    answers = []
    for _ in range(self._num_answers):
      best = best_span(scores, allowed)  # [B]
      is_any, score, text = (
        tf.gather(part, best, batch_dims=1) for part in (allowed, scores, texts)
      )
      answers.append(
        (
          text,
          tf.where(is_any, score, NO_SCORE),
          tf.where(is_any, best // num_spans, NULL_PASSAGE),
        )
      )
      allowed &= texts != text[:, None]
    parts = [tf.stack(part, axis=1) for part in zip(*answers, strict=True)]
    return dict(zip(("answer", "score", "answer_rank"), parts, strict=True))
