"""The sparse baseline: BM25 from the `bm25s` library behind the searchers' interface."""

import logging
from collections.abc import Sequence

import bm25s
import numpy as np

from realm_tf import characters
from realm_tf.passages import PassageTable
from realm_tf.retrieval import Found

logging.getLogger("bm25s").setLevel(logging.WARNING)
_WORD = rf"(?u)\b\w\w+\b|[{characters.CJK}]"  # bm25s' own words, and single Chinese characters


def _tokenize(texts: Sequence[str], *, return_ids: bool):
  split = [characters.split_cjk(text) for text in texts]
  return bm25s.tokenize(split, token_pattern=_WORD, stopwords=None, return_ids=return_ids, show_progress=False)


class Bm25Searcher:
  """BM25 (Lucene's variant, k1 1.2, b 0.75) over title and text, lower-cased words, no stop words removed.

  A Chinese character is a word, as in BERT.

  Args:
    table: the knowledge corpus.
  """

  def __init__(self, table: PassageTable):
    self.num_rows = len(table)
    self._bm25 = bm25s.BM25(k1=1.2, b=0.75)
    texts = [f"{title}\n{text}" for title, text in zip(table.titles, table.texts)]
    self._bm25.index(_tokenize(texts, return_ids=True), show_progress=False)

  def search(self, texts: Sequence[str], num: int) -> Found:
    """The `num` best passages of each text: numbers and scores [B, num]."""
    numbers, scores = self._bm25.retrieve(_tokenize(texts, return_ids=False), k=num, show_progress=False)
    return Found(np.asarray(numbers, np.int32), np.asarray(scores, np.float32))
