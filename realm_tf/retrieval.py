"""Retrieval while training: embed → search → drop the query's own passage → prepend the null passage.

The query tower and the searcher always come from the same snapshot and change together, between two batches.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from realm_tf import artifacts, index, metrics, snapshots
from realm_tf.examples import NULL_PASSAGE
from realm_tf.models.retriever import Retriever

# Every index that is opened brings functions of its own to compile; TensorFlow takes that for a mistake.
tf.get_logger().addFilter(lambda record: "triggered tf.function retracing" not in record.getMessage())


@dataclasses.dataclass(frozen=True)
class Found:
  """numbers [B, K] int32 passage numbers, best first; scores [B, K] float32."""

  numbers: np.ndarray
  scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class IndexedRetriever:
  """A query tower and the searcher over the embeddings of the same snapshot.

  Attributes:
    step: training step of that snapshot.
  """

  retriever: Retriever
  searcher: index.ExactSearcher | index.ScannSearcher
  step: int
  folder: str

  def search(self, query_ids: np.ndarray, num: int) -> Found:
    """The `num` best passages of packed queries [B, Lq] int32."""
    return self.find(self.retriever.query_tower.predict_on_batch(query_ids), num)

  def find(self, queries: np.ndarray, num: int) -> Found:
    """The `num` best passages of query vectors [B, D] float32."""
    result = self.searcher.search(tf.constant(queries), num)
    return Found(result.numbers.numpy(), result.scores.numpy())


def load(index_folder: str, *, passages: str, snapshot: str) -> IndexedRetriever:
  """Opens an index with the snapshot that it was made from.

  Raises:
    ArtifactError: they do not belong together.
  """
  searcher = index.load(index_folder, snapshot=snapshot, passages=passages)
  return IndexedRetriever(snapshots.load_retriever(snapshot), searcher, artifacts.step_of(snapshot), index_folder)


def candidates(indexed: IndexedRetriever, query_ids: np.ndarray, *, num: int, own_passages: np.ndarray | None, null: bool) -> np.ndarray:
  """Candidates of each query (REALM, sections 3.3 and 3.4).

  Args:
    query_ids: [B, Lq] int32.
    num: C, the null passage included.
    own_passages: [B] passages that must not be retrieved (they hold the answer unmasked), or None.
    null: put the null passage first.

  Returns:
    [B, C] int32 passage numbers.
  """
  wanted = num - null
  found = indexed.search(query_ids, wanted + (own_passages is not None)).numbers if wanted else np.zeros([len(query_ids), 0], np.int32)
  if own_passages is not None and wanted:
    found = np.stack([row[(row != own) | (row == index.MISSING)][:wanted] for row, own in zip(found, own_passages)])
  if null:
    found = np.concatenate([np.full([len(found), 1], NULL_PASSAGE, np.int32), found], axis=1)
  return found.astype(np.int32)


def search_all(search: Callable[[slice], Found], num_queries: int, *, block: int = 64) -> list[np.ndarray]:
  """The passage numbers [K] found for each query, best first.

  Args:
    search: a slice of the queries → what is found for them.
    block: queries searched at once.
  """
  return [numbers for start in range(0, num_queries, block) for numbers in search(slice(start, start + block)).numbers]


def recall(search: Callable[[slice], Found], answers: Sequence[Sequence[str]], matcher: metrics.AnswerMatcher, *,
           ks: Sequence[int]) -> dict[str, float]:
  """recall@k of a retriever: "recall_at_k" -> share of queries with an answer in the first k passages.

  Args:
    search: a slice of the queries → what is found for them, at least max(ks) passages where the corpus has them.
    answers: of every query.
  """
  found = [matcher.has_answer(numbers, wanted) for numbers, wanted in zip(search_all(search, len(answers)), answers)]
  return metrics.recall_at(found, ks)


class Swapper:
  """Opens newer indexes in the background and hands them over between two batches.

  Args:
    first: what to start with.
    newest_index: cheap; the newest usable index folder or None (`Refresher.newest_index`).
    snapshots_root: W/snapshots.
    passages: passages folder.
  """

  def __init__(self, first: IndexedRetriever, *, newest_index, snapshots_root: str, passages: str):
    self.current, self.swaps = first, 0
    self._newest_index, self._snapshots_root, self._passages = newest_index, snapshots_root, passages
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="index-loader")
    self._loading: concurrent.futures.Future | None = None
    self._tried = first.folder

  def advance(self) -> bool:
    """Takes over a newer index that has finished loading, and starts loading when one has appeared; never waits."""
    swapped = False
    if self._loading is not None and self._loading.done():
      loading, self._loading = self._loading, None
      if (error := loading.exception()) is not None:
        print(f"index {self._tried} is not used: {error}")
      else:
        self.current, swapped = loading.result(), True
        self.swaps += 1
    if self._loading is None and (newest := self._newest_index()) is not None and newest != self._tried:
      if artifacts.step_of(newest) > self.current.step:
        self._tried = newest
        self._loading = self._pool.submit(self._load, newest)
    return swapped

  def _load(self, folder: str) -> IndexedRetriever:
    snapshot = artifacts.step_folder(self._snapshots_root, artifacts.step_of(folder))
    return load(folder, passages=self._passages, snapshot=snapshot)
