"""Retrieval while training: embed → search → drop the query's own passage → prepend the null passage.

The query tower and the searcher always come from the same snapshot and change together, between two batches.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from realm_tf import artifacts, examples, index, metrics, snapshots
from realm_tf.examples import NULL_PASSAGE
from realm_tf.models.retriever import Retriever
from realm_tf.passages import PassageTable
from realm_tf.tokenization import Tokenizer

_QUERIES_AT_ONCE = 64


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

  @property
  def num_rows(self) -> int:
    """Number of passages."""
    return self.searcher.num_rows

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


def sample_queries(
  retriever: Retriever, table: PassageTable, *, tokenizer: Tokenizer, config: index.IndexConfig
) -> np.ndarray | None:
  """Embedded sentences of the passages, [Q, D] float32, to measure an index by; None if that is not needed.

  Args:
    retriever: whose passage tower the passages were embedded with.
    config: of the index.
  """
  share = index.share_queried(config, len(table))
  if not share:
    return None
  drawn = examples.draw_sentences(
    table.text_ids,
    table.token_starts,
    table.sentence_starts,
    share=share,
    rng=np.random.default_rng(0),
  )
  packed = examples.pack_queries(drawn.tensor(), tokenizer=tokenizer, length=retriever.query_length)
  return retriever.query_tower.predict(packed, batch_size=_QUERIES_AT_ONCE, verbose=0)


def candidates(
  indexed: IndexedRetriever,
  query_ids: np.ndarray,
  *,
  num: int,
  own_passages: np.ndarray | None,
  null: bool,
  given: np.ndarray | None = None,
  pool: int = 0,
  rng: np.random.Generator | None = None,
) -> np.ndarray:
  """Candidates of each query (REALM, sections 3.3 and 3.4).

  Args:
    query_ids: [B, Lq] int32.
    num: C, the null passage included.
    own_passages: [B, K] passages that must not be retrieved, because they hold the answer unmasked; NULL_PASSAGE
      where there are fewer; or None.
    null: put the null passage first.
    given: [B, G] passages that are candidates in any case, in place of the worst that would be retrieved;
      NULL_PASSAGE where there are fewer.
    pool: those retrieved are drawn at random from so many of the best; 0: they are the best.
    rng: of the draw.

  Returns:
    [B, C] int32 passage numbers: the null passage, the given ones, then those retrieved, best first.
  """
  size = len(query_ids)
  none = np.full([size, 0], NULL_PASSAGE)
  own, given = (none if part is None else part for part in (own_passages, given))
  given = given[:, : num - null]
  excluded = np.concatenate([own, given], axis=1)
  found = np.full([size, num], NULL_PASSAGE, np.int32)  # what is missing counts as the null passage
  wanted = num - null
  if not wanted:
    return found
  depth = max(wanted, min(max(wanted, pool) + excluded.shape[1], indexed.num_rows))
  numbers = indexed.search(query_ids, depth).numbers
  kept = (numbers == index.MISSING) | ~examples.contains(excluded, numbers)
  for row, (near, keep, sure) in enumerate(zip(numbers, kept, given)):
    near, sure = near[keep], sure[sure != NULL_PASSAGE]
    if pool:
      num = min(wanted - len(sure), len(near[:pool]))
      near = near[np.sort(rng.choice(len(near[:pool]), num, replace=False))]
    chosen = np.concatenate([sure, near])[:wanted]
    found[row, null : null + len(chosen)] = chosen
  return found


def search_all(
  search: Callable[[slice], Found], num_queries: int, *, block: int = _QUERIES_AT_ONCE
) -> list[np.ndarray]:
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
