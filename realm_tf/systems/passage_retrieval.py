"""Passage retrieval: the best passages for a text.

Example:
  found = DenseRetrieval(opened.load_index(), tokenizer=tokenizer, query_length=64)
  found.retrieve(["rivers of the north"], 5).numbers    # [1, 5]
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from realm_tf.corpus.candidates import Found
from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing, questions
from realm_tf.retrieval import bm25
from realm_tf.retrieval.dense import IndexedRetriever

SERVED = 100  # passages that a servable retrieves


class DenseRetrieval:
  """Retrieves passages with a trained retriever.

  Args:
    indexed: the retriever with its index.
    tokenizer: the retriever's tokenizer.
    query_length: word pieces of a packed query.
  """

  def __init__(self, indexed: IndexedRetriever, *, tokenizer: Tokenizer, query_length: int):
    self.indexed, self.tokenizer, self.query_length = indexed, tokenizer, query_length

  @property
  def name(self) -> str:
    """Folder of the index, shown to the user."""
    return self.indexed.folder

  def search(self, query_ids: np.ndarray, texts: Sequence[str], num: int) -> Found:
    """Returns the `num` best passages for packed queries [B, Lq] with these texts."""
    del texts
    return self.indexed.search(query_ids, num)

  def retrieve(self, texts: Sequence[str], num: int) -> Found:
    """Returns the `num` best passages for each text."""
    ids = self.tokenizer(tf.constant(list(texts), tf.string))
    questions.tell_cut(ids.row_lengths().numpy(), length=self.query_length)
    packed = packing.pack_queries(ids, tokenizer=self.tokenizer, length=self.query_length)
    return self.indexed.search(packed.numpy(), num)


class Bm25Retrieval:
  """Retrieves passages with BM25.

  Args:
    table: the passages.
    score_weight: factor of BM25's scores relative to a reader's.
  """

  name = "bm25"

  def __init__(self, table: PassageTable, *, score_weight: float = 1.0):
    self.searcher, self.score_weight = bm25.Bm25Searcher(table), score_weight

  def search(self, query_ids: np.ndarray, texts: Sequence[str], num: int) -> Found:
    """Returns the `num` best passages for texts, with unweighted scores; ignores `query_ids`."""
    del query_ids
    return self.searcher.search(texts, num)

  def retrieve(self, texts: Sequence[str], num: int) -> Found:
    """Returns the `num` best passages for each text, with weighted scores."""
    found = self.searcher.search(texts, num)
    return Found(found.numbers, found.scores * np.float32(self.score_weight))
