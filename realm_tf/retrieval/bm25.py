"""The sparse baseline: BM25 from the `bm25s` library with the searchers' interface."""

from collections.abc import Sequence

import numpy as np

from realm_tf import imports
from realm_tf.corpus import characters
from realm_tf.corpus.candidates import Found
from realm_tf.corpus.passages import PassageTable

# The library would start JAX, if it is installed, for a selection that is not used here. JAX's
# threads do not survive a fork.
with imports.without("jax"):
  import bm25s

_WORD = rf"(?u)\b\w\w+\b|[{characters.CJK}]"  # bm25s' words, and single Chinese characters


def _tokenize(texts: Sequence[str], *, return_ids: bool):
  split = [characters.split_cjk(text) for text in texts]
  return bm25s.tokenize(
    split, token_pattern=_WORD, stopwords=None, return_ids=return_ids, show_progress=False
  )


class Bm25Searcher:
  """BM25 over title and text, with lower-cased words and no stop word removal.

  This is Lucene's variant with k1 1.2 and b 0.75. A Chinese character is a word, as in BERT.

  Args:
    table: the knowledge corpus.
  """

  def __init__(self, table: PassageTable):
    self.num_rows, self._deleted = len(table), table.deleted
    self._bm25 = bm25s.BM25(k1=1.2, b=0.75)
    texts = [f"{title}\n{text}" for title, text in zip(table.titles, table.texts, strict=True)]
    self._bm25.index(_tokenize(texts, return_ids=True), show_progress=False)

  def search(self, texts: Sequence[str], num: int) -> Found:
    """Returns the `num` best passages for each text: numbers and scores [B, num].

    Of passages with equal scores, that with the lower number comes first. The library's own
    selection depends on whether JAX is installed.
    """
    found = [self._best(words, num) for words in _tokenize(texts, return_ids=False)]
    numbers, scores = (np.stack(part) for part in zip(*found, strict=True))
    return Found(numbers.astype(np.int32), scores)

  def _best(self, words: list[str], num: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns numbers and scores [num] for a query; without words, all scores are 0."""
    scores = self._bm25.get_scores(words) if words else np.zeros(self.num_rows, np.float32)
    scores[self._deleted] = -np.inf
    least = np.partition(scores, -num)[-num]
    enough = np.flatnonzero(scores >= least)
    numbers = enough[np.argsort(-scores[enough], kind="stable")[:num]]
    return numbers, scores[numbers]
