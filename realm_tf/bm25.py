"""The sparse baseline: BM25 from the `bm25s` library behind the searchers' interface."""

import logging
from collections.abc import Sequence

import bm25s
import numpy as np

from realm_tf.passages import PassageTable
from realm_tf.retrieval import Found

logging.getLogger("bm25s").setLevel(logging.WARNING)


class Bm25Searcher:
  """BM25 (Lucene's variant, k1 1.2, b 0.75) over title and text, lower-cased words, no stop words removed.

  Args:
    table: the knowledge corpus.
  """

  def __init__(self, table: PassageTable):
    self.num_rows = len(table)
    self._bm25 = bm25s.BM25(k1=1.2, b=0.75)
    texts = [f"{title}\n{text}" for title, text in zip(table.titles, table.texts)]
    self._bm25.index(bm25s.tokenize(texts, stopwords=None, show_progress=False), show_progress=False)

  def search(self, texts: Sequence[str], num: int) -> Found:
    """The `num` best passages of each text: numbers and scores [B, num]."""
    tokens = bm25s.tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)
    numbers, scores = self._bm25.retrieve(tokens, k=num, show_progress=False)
    return Found(np.asarray(numbers, np.int32), np.asarray(scores, np.float32))
