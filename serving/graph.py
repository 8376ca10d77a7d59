"""The graphs of a servable: text in, text out, and every step between as trainers and evaluation do it.

All that grows with the corpus or a model is a variable, because a graph cannot hold more than 2 GB. Only ops of TensorFlow and
TensorFlow Text are used, and ScaNN's where the searcher is ScaNN.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from realm_tf import examples, index
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.span_reader import SpanReader, span_mask
from realm_tf.passages import PassageTable
from realm_tf.tokenization import Tokenizer
from serving.signatures import MASK, NO_PASSAGE, NO_SCORE


class Frozen(tf.Module):
  """A Keras model as it predicts, with the TensorFlow variables that it reads, which a SavedModel must be told of."""

  def __init__(self, model: keras.Model):
    super().__init__()
    self.values = [variable.value for variable in model.variables]
    self._predict = lambda inputs: model(inputs, training=False)

  def __call__(self, inputs):
    return self._predict(inputs)


class Corpus(tf.Module):
  """All passages. Numbers ([N] int32) are rows of the corpus; `NO_PASSAGE` is the null passage, an empty one.

  Args:
    table: what to take over.
  """

  def __init__(self, table: PassageTable):
    super().__init__()
    self._num_rows = len(table)
    splits = table.text_ids.splits
    with tf.device("CPU"):  # where strings live
      self.titles, self.texts, self.splits, self.ids, self.starts, self.ends = (
          tf.Variable(values, trainable=False) for values in (
              [*table.titles, ""], [*table.texts, ""], np.append(splits, splits[-1]),  # the last row is the null passage
              table.text_ids.values, table.token_starts.values, table.token_ends.values))

  def rows(self, numbers: tf.Tensor) -> tf.Tensor:
    return tf.where(numbers == NO_PASSAGE, self._num_rows, numbers)

  def shown(self, numbers: tf.Tensor, probability: tf.Tensor) -> dict[str, tf.Tensor]:
    """What every signature says of its passages."""
    rows = self.rows(numbers)
    return {"passage_number": numbers, "title": tf.gather(self.titles, rows), "text": tf.gather(self.texts, rows),
            "probability": probability}

  def tokens(self, numbers: tf.Tensor) -> tf.RaggedTensor:
    """Where the word pieces of each text stand in `ids`, `starts` and `ends`: [N, None] int64."""
    rows = self.rows(numbers)
    return tf.ragged.range(tf.gather(self.splits, rows), tf.gather(self.splits, rows + 1))

  def text_ids(self, tokens: tf.RaggedTensor) -> tf.RaggedTensor:
    """The word pieces at `tokens`."""
    return tokens.with_values(tf.gather(self.ids, tokens.values))


class Found(NamedTuple):
  """vectors [B, D] of the queries; numbers [B, num] int32, best first, `NO_PASSAGE` where the searcher found no more; scores."""

  vectors: tf.Tensor
  numbers: tf.Tensor
  scores: tf.Tensor


class Retrieval(tf.Module):
  """Embed and search.

  Args:
    searcher: over the passage embeddings that belong to the query tower.
    query_length: word pieces of packed queries.
  """

  def __init__(self, corpus: Corpus, searcher: index.ExactSearcher | index.ScannSearcher, query_tower: keras.Model, *,
               tokenizer: Tokenizer, query_length: int):
    super().__init__()
    self.corpus, self.searcher, self.query_tower = corpus, searcher, Frozen(query_tower)
    self._tokenizer, self._query_length = tokenizer, query_length

  def search(self, ids: tf.RaggedTensor, num: int) -> Found:
    """The `num` best passages for word pieces [B, None]."""
    vectors = self.query_tower(examples.pack_queries(ids, tokenizer=self._tokenizer, length=self._query_length))
    found = self.searcher.search(vectors, num)
    return Found(vectors, found.numbers, tf.maximum(found.scores, NO_SCORE))

  def retrieve(self, question: tf.Tensor, num: int) -> dict[str, tf.Tensor]:
    """Signature `retrieve`."""
    found = self.search(self._tokenizer(question), num)
    return {**self.corpus.shown(found.numbers, prior(found)), "retrieval_score": found.scores}


def prior(found: Found) -> tf.Tensor:
  """p(z|x) of what was found: [B, num]."""
  return tf.where(found.numbers == NO_PASSAGE, 0.0, tf.nn.softmax(found.scores))


def repeated(rows: tf.RaggedTensor, times: int) -> tf.RaggedTensor:
  """Every row so many times, one after the other."""
  return tf.gather(rows, tf.repeat(tf.range(rows.nrows()), times))


# ========================================================================================================= answering


class Spans(NamedTuple):
  """Every span of the passages read, S = L * W of each; byte offsets into the passage's UTF-8 text.

  Attributes:
    scores: [B, R, S] of the reader; NO_SCORE where there is no such span of whole words.
    texts: [B, R, S] string, "" there.
    starts, ends: [B, R, S] int32, 0 there.
  """

  scores: tf.Tensor
  texts: tf.Tensor
  starts: tf.Tensor
  ends: tf.Tensor


class Answering(tf.Module):
  """Retrieve, read, choose spans; the same answers as `realm_tf.evaluate`'s.

  Args:
    num_retrieved, num_passages, num_answers: K, R, N.
  """

  def __init__(self, retrieval: Retrieval, reader: SpanReader, *, tokenizer: Tokenizer, num_retrieved: int, num_passages: int,
               num_answers: int):
    super().__init__()
    self.retrieval, self.reader = retrieval, Frozen(reader)
    self._length, self._width, self._query_length = reader.length, reader.max_span, reader.query_length
    self._tokenizer = tokenizer
    self._num_retrieved, self._num_passages, self._num_answers = num_retrieved, num_passages, num_answers

  def answer(self, question: tf.Tensor) -> dict[str, tf.Tensor]:
    """Signature `answer`."""
    ids = self._tokenizer(question)
    found, count = self.retrieval.search(ids, self._num_retrieved), self._num_passages
    numbers, scores = found.numbers[:, :count], found.scores[:, :count]
    spans = self._read(ids, numbers)
    best = tf.argmax(spans.scores, axis=-1)  # [B, R]
    of_best = lambda values: tf.gather(values, best, batch_dims=2)
    return {
        **self._best_answers(spans, scores), **self.retrieval.corpus.shown(numbers, prior(found)[:, :count]),
        "retrieval_score": scores, "reader_score": of_best(spans.scores), "answer_start": of_best(spans.starts),
        "answer_end": of_best(spans.ends)}

  def _read(self, ids: tf.RaggedTensor, numbers: tf.Tensor) -> Spans:
    """Word pieces [B, None] of questions, and the passages to read for each [B, R]."""
    corpus, flat = self.retrieval.corpus, tf.reshape(numbers, [-1])  # [B * R]
    tokens = corpus.tokens(flat)
    packed = examples.pack_reader(
        repeated(ids, self._num_passages), corpus.text_ids(tokens), tokenizer=self._tokenizer, query_length=self._query_length,
        length=self._length)
    scores = self.reader({"token_ids": packed.token_ids, "segment_ids": packed.segment_ids})  # [B * R, L, W]
    mask = span_mask(packed.token_ids, packed.segment_ids, sep_id=self._tokenizer.sep_id, max_span=self._width) > 0
    starts, ends = self._offsets(tokens, packed.segment_ids)  # [B * R, L + W]
    allowed = mask & self._whole_words(packed.token_ids)
    shape = [-1, self._length * self._width]
    starts = tf.reshape(tf.where(allowed, starts[:, :self._length, None], 0), shape)
    ends = tf.reshape(tf.where(allowed, self._windows(ends), 0), shape)
    texts = tf.strings.substr(tf.gather(corpus.texts, corpus.rows(flat))[:, None], starts, ends - starts, unit="BYTE")
    scores = tf.reshape(tf.where(allowed, scores, NO_SCORE), shape)
    return Spans(*(tf.reshape(part, [-1, self._num_passages, shape[1]]) for part in (scores, texts, starts, ends)))

  def _whole_words(self, reader_ids: tf.Tensor) -> tf.Tensor:
    """Spans that neither begin nor end inside a word: [N, L, W] bool."""
    inside = tf.pad(tf.gather(tf.constant(self._tokenizer.continues), reader_ids), [[0, 0], [0, self._width]])  # [N, L + W]
    return ~inside[:, :self._length, None] & ~self._windows(inside[:, 1:])

  def _offsets(self, tokens: tf.RaggedTensor, segment_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Byte offsets of the packed word pieces of the text, 0 elsewhere: starts and ends, [N, L + W] int32."""
    first = tf.argmax(segment_ids, axis=1, output_type=tf.int64)  # where the text begins
    at = tf.range(self._length + self._width, dtype=tf.int64) - first[:, None]  # number in the text
    is_text = (at >= 0) & (at < tokens.row_lengths()[:, None])
    at = tf.where(is_text, at + tokens.row_starts()[:, None], 0)
    corpus = self.retrieval.corpus
    # One 0 at the end: there may be no word piece at all.
    pick = lambda values: tf.where(is_text, tf.gather(tf.pad(tf.gather(values, tokens.values), [[0, 1]]), at), 0)
    return pick(corpus.starts), pick(corpus.ends)

  def _windows(self, values: tf.Tensor) -> tf.Tensor:
    """[N, L + ..] → [N, L, W]: entry [n, i, w] is values[n, i + w]."""
    return tf.stack([values[:, width:width + self._length] for width in range(self._width)], axis=-1)

  def _best_answers(self, spans: Spans, retrieval_scores: tf.Tensor) -> dict[str, tf.Tensor]:
    """The best `num_answers` different texts and where they were read."""
    size = self._num_passages * self._length * self._width
    scores = tf.where(spans.scores > NO_SCORE, spans.scores + retrieval_scores[:, :, None], NO_SCORE)
    scores, texts = tf.reshape(scores, [-1, size]), tf.reshape(spans.texts, [-1, size])
    answers = []
    for _ in range(self._num_answers):
      best = tf.argmax(scores, axis=1, output_type=tf.int32)  # [B]
      score, text = (tf.gather(part, best, batch_dims=1) for part in (scores, texts))
      answers.append((text, score, tf.where(score > NO_SCORE, best // (self._length * self._width), NO_PASSAGE)))
      scores = tf.where(texts == text[:, None], NO_SCORE, scores)
    return dict(zip(("answer", "score", "answer_rank"), (tf.stack(part, axis=1) for part in zip(*answers))))


# ====================================================================================================== filling blanks


class Blanks(NamedTuple):
  """Texts cut at their blanks.

  Attributes:
    pieces: [B, None] string, what stands before, between and after the blanks.
    ids: [B, None] int32 word pieces, [MASK] at the blanks.
    positions: [B, M] int32 of the blanks in the packed query, 0 where unused.
    num: [B] int32 blanks that are filled.
  """

  pieces: tf.RaggedTensor
  ids: tf.RaggedTensor
  positions: tf.Tensor
  num: tf.Tensor


class MaskFilling(tf.Module):
  """p(y|x) = Σ_z p(y|z,x) p(z|x) for the blanks of a text, the null passage among the candidates.

  Args:
    null_vector: [D] embedding of the null passage.
    num_candidates, num_answers: C, N.
  """

  def __init__(self, retrieval: Retrieval, reader: MaskedReader, *, null_vector: np.ndarray, tokenizer: Tokenizer,
               num_candidates: int, num_answers: int):
    super().__init__()
    self.retrieval, self.reader = retrieval, Frozen(reader)
    self.null_vector = tf.Variable(null_vector, trainable=False)
    self.vocabulary = tf.Variable(tokenizer.pieces, trainable=False)
    self._length, self._query_length, self._max_masks = reader.length, reader.query_length, reader.max_masks
    self._tokenizer, self._num_candidates, self._num_answers = tokenizer, num_candidates, num_answers

  def fill_mask(self, text: tf.Tensor) -> dict[str, tf.Tensor]:
    """Signature `fill_mask`."""
    blanks = self._blanks(text)
    numbers, scores = self._candidates(blanks)  # [B, C]
    log_probs = tf.nn.log_softmax(self._read(blanks, numbers))  # [B, C, M, V]
    probability = tf.nn.softmax(scores)
    best = tf.math.top_k(tf.einsum("bc,bcmv->bmv", probability, tf.exp(log_probs)), self._num_answers)  # [B, M, N]
    alone = tf.math.top_k(tf.exp(log_probs[:, 0]), self._num_answers)
    used = tf.sequence_mask(blanks.num, tf.shape(blanks.positions)[1])[:, :, None]  # [B, M, 1]
    pieces, pieces_alone = (tf.where(used, tf.gather(self.vocabulary, part.indices), "") for part in (best, alone))
    return {
        "num_masks": blanks.num, "token": pieces, "token_probability": tf.where(used, best.values, 0.0),
        "token_without_retrieval": pieces_alone, "token_probability_without_retrieval": tf.where(used, alone.values, 0.0),
        **self.retrieval.corpus.shown(numbers, probability),
        "retrieval_utility": _utility(log_probs, best.indices[:, :, 0], used[:, :, 0]),
        "filled": _fill(blanks, pieces[:, :, 0])}

  def _blanks(self, text: tf.Tensor) -> Blanks:
    text = tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")  # it is given back, and JSON wants UTF-8
    pieces = tf.strings.split(text, MASK)  # the tokenizer knows no [MASK]: it would take it to pieces
    row, at = pieces.value_rowids(), _number_in_row(pieces)
    is_blank = tf.cast(at < tf.gather(pieces.row_lengths(), row) - 1, tf.int64)  # one follows every piece but the last
    blank = tf.fill([tf.reduce_sum(is_blank)], self._tokenizer.mask_id)
    blank = tf.RaggedTensor.from_row_lengths(blank, is_blank, validate=False)
    ids = pieces.with_values(tf.concat([self._tokenizer(pieces.values), blank], axis=1)).merge_dims(1, 2)
    query = ids[:, :self._query_length - 2]
    positions = tf.cast(query.with_values(_number_in_row(query) + 1), tf.int32)  # [CLS] is 0
    positions = tf.ragged.boolean_mask(positions, query == self._tokenizer.mask_id)[:, :self._max_masks]
    num = positions.row_lengths()
    positions = positions.to_tensor(0, shape=[None, self._max_masks])[:, :tf.maximum(tf.reduce_max(num), 1)]
    return Blanks(pieces, ids, positions, tf.cast(num, tf.int32))

  def _candidates(self, blanks: Blanks) -> tuple[tf.Tensor, tf.Tensor]:
    """Numbers and retrieval scores of the null passage and the best others: [B, C]."""
    found = self.retrieval.search(blanks.ids, self._num_candidates - 1)
    null_score = tf.linalg.matvec(found.vectors, self.null_vector)[:, None]  # [B, 1]
    numbers = tf.pad(found.numbers, [[0, 0], [1, 0]], constant_values=NO_PASSAGE)
    return numbers, tf.concat([null_score, found.scores], axis=1)

  def _read(self, blanks: Blanks, numbers: tf.Tensor) -> tf.Tensor:
    """The reader's logits: [B, C, M, V]."""
    corpus, count = self.retrieval.corpus, self._num_candidates
    tokens = corpus.tokens(tf.reshape(numbers, [-1]))
    packed = examples.pack_reader(
        repeated(blanks.ids, count), corpus.text_ids(tokens), tokenizer=self._tokenizer, query_length=self._query_length,
        length=self._length)
    logits = self.reader({"token_ids": packed.token_ids, "segment_ids": packed.segment_ids,
                          "mask_positions": tf.repeat(blanks.positions, count, axis=0)})  # [B * C, M, V]
    return tf.reshape(logits, [-1, count, tf.shape(logits)[1], self._tokenizer.size])


def _utility(log_probs: tf.Tensor, chosen: tf.Tensor, used: tf.Tensor) -> tf.Tensor:
  """log p(y|z,x) - log p(y|null,x): log_probs [B, C, M, V], chosen word pieces [B, M], used [B, M] bool → [B, C]."""
  chosen = tf.repeat(chosen[:, None], log_probs.shape[1], axis=1)  # [B, C, M]
  log_probs = tf.gather(log_probs, chosen, batch_dims=3)
  log_likelihoods = tf.reduce_sum(tf.where(used[:, None], log_probs, 0.0), axis=-1)  # [B, C]
  return log_likelihoods - log_likelihoods[:, :1]


def _fill(blanks: Blanks, tokens: tf.Tensor) -> tf.Tensor:
  """The texts with a word piece [B, M] in each blank; ## joins the word before it, and blanks past `num` stay."""
  pieces, row, at = blanks.pieces.values, blanks.pieces.value_rowids(), _number_in_row(blanks.pieces)
  last = at == tf.gather(blanks.pieces.row_lengths(), row) - 1
  filled = at < tf.cast(tf.gather(blanks.num, row), tf.int64)
  token = tf.gather_nd(tokens, tf.stack([row, tf.minimum(at, tf.shape(tokens, tf.int64)[1] - 1)], axis=1))
  token = tf.where(last, "", tf.where(filled, token, MASK))
  joins = tf.strings.regex_full_match(token, "##.+")
  touches = filled & ~last & (at > 0) & (pieces == "")  # the blank before it, without a space between
  pieces = tf.where(joins, tf.strings.regex_replace(pieces, r"\s+$", ""), tf.where(touches, " ", pieces))
  token = tf.strings.regex_replace(token, "^##", "")
  return tf.strings.reduce_join(blanks.pieces.with_values(pieces + token), axis=1)


def _number_in_row(rows: tf.RaggedTensor) -> tf.Tensor:
  """0, 1, 2, .. for the values of each row: flat int64."""
  return tf.range(tf.shape(rows.values, tf.int64)[0]) - tf.gather(rows.row_starts(), rows.value_rowids())
