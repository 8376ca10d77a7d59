"""Retrieves passages for questions in the graph of a servable.

All steps are the same as in training and evaluation.

Everything that grows with the corpus or a model is a variable, because a graph cannot exceed 2 GB.
Only ops of TensorFlow and TensorFlow Text are used, and ScaNN's if it is the searcher.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

from realm_tf.corpus.candidates import NULL_PASSAGE, Found
from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer, Tokens
from realm_tf.examples import packing
from realm_tf.models import equations
from realm_tf.retrieval import index
from serving.signatures import NO_SCORE

_ROWS_AT_ONCE = 1 << 16


class Frozen(tf.Module):
  """A Keras model for prediction only, with the TensorFlow variables that it reads.

  The variables are attributes so that a SavedModel tracks them.
  """

  def __init__(self, model: keras.Model):
    super().__init__()
    self.values = [variable.value for variable in model.variables]
    self._predict = lambda inputs: model(inputs, training=False)

  def __call__(self, inputs):
    return self._predict(inputs)


class Corpus(tf.Module):
  """The titles and texts of all passages, copied into memory: they are written to the SavedModel.

  Word pieces are not copied. They would take more than twice the room of the texts, and making them
  anew for the passages of a query takes well under a millisecond a passage.

  Numbers ([N] int32) are rows of the corpus; `NULL_PASSAGE` is the null passage, which is empty.

  Args:
    table: the passages.
    tokenizer: the tokenizer that they were made with.
  """

  def __init__(self, table: PassageTable, tokenizer: Tokenizer):
    super().__init__()
    self._num_rows, self._tokenizer = len(table), tokenizer
    with tf.device("CPU"):  # strings exist only there
      self.titles, self.texts = (_variable(table, part) for part in (table.titles, table.texts))

  def rows(self, numbers: tf.Tensor) -> tf.Tensor:
    return tf.where(numbers == NULL_PASSAGE, self._num_rows, numbers)

  def shown(self, numbers: tf.Tensor, probability: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns the outputs about passages that every signature has."""
    rows = self.rows(numbers)
    return {
      "passage_number": numbers,
      "title": tf.gather(self.titles, rows),
      "text": tf.gather(self.texts, rows),
      "probability": probability,
    }

  def text_ids(self, numbers: tf.Tensor) -> tf.RaggedTensor:
    """Returns the word pieces of texts: [N, None] int32."""
    return self._tokenizer(tf.gather(self.texts, self.rows(numbers)))

  def tokens(self, numbers: tf.Tensor) -> Tokens:
    """Returns the word pieces of texts with their byte offsets."""
    return self._tokenizer.with_offsets(tf.gather(self.texts, self.rows(numbers)))


def _variable(table: PassageTable, texts: Sequence[str]) -> tf.Variable:
  """Returns texts of all passages, and the null passage's; those of deleted passages are empty.

  They are copied a few at a time, so that never all of them are Python objects.
  """
  deleted, num_rows = set(table.deleted.tolist()), len(table)
  variable = tf.Variable(tf.fill([num_rows + 1], ""), trainable=False)
  for start in range(0, num_rows, _ROWS_AT_ONCE):
    end = min(start + _ROWS_AT_ONCE, num_rows)
    part = ["" if row in deleted else text for row, text in enumerate(texts[start:end], start)]
    # in place; assigning to a slice would copy the whole variable each time
    variable.scatter_update(tf.IndexedSlices(tf.constant(part), tf.range(start, end)))
  return variable


class Retrieval(tf.Module):
  """Embeds queries and searches.

  Args:
    searcher: a searcher over the passage embeddings that belong to the query tower.
    query_length: length of packed queries in word pieces.
  """

  def __init__(
    self,
    corpus: Corpus,
    searcher: index.Searcher,
    query_tower: keras.Model,
    *,
    tokenizer: Tokenizer,
    query_length: int,
  ):
    super().__init__()
    self.corpus, self.searcher, self.query_tower = corpus, searcher, Frozen(query_tower)
    self._tokenizer, self._query_length = tokenizer, query_length

  def embed(self, ids: tf.RaggedTensor) -> tf.Tensor:
    """Embeds queries, given as word pieces [B, None], as vectors [B, D]."""
    return self.query_tower(
      packing.pack_queries(ids, tokenizer=self._tokenizer, length=self._query_length)
    )

  def find(self, vectors: tf.Tensor, num: int) -> Found:
    """Returns the `num` best passages for query vectors [B, D]; scores are at least NO_SCORE."""
    found = self.searcher.search(vectors, num)
    return Found(found.numbers, tf.maximum(found.scores, NO_SCORE))

  def search(self, ids: tf.RaggedTensor, num: int) -> Found:
    """Returns the `num` best passages for word pieces [B, None]."""
    return self.find(self.embed(ids), num)

  def retrieve(self, question: tf.Tensor, num: int) -> dict[str, tf.Tensor]:
    """Computes the signature `retrieve`."""
    found = self.search(self._tokenizer(question), num)
    return {**self.corpus.shown(found.numbers, prior(found)), "retrieval_score": found.scores}


def prior(found: Found) -> tf.Tensor:
  """Returns p(z|x) of the passages found: [B, num]."""
  return tf.where(found.numbers == NULL_PASSAGE, 0.0, tf.exp(equations.log_prior(found.scores)))


def repeated(rows: tf.RaggedTensor, times: int) -> tf.RaggedTensor:
  """Repeats every row `times` times in succession."""
  return tf.gather(rows, tf.repeat(tf.range(rows.nrows()), times))
