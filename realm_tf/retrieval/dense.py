"""Dense retrieval during training.

The steps are: embed → search → drop the query's own passage → prepend the null passage.

The query tower and the searcher always come from the same snapshot and change together, between two
batches.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from realm_tf.corpus import metrics, passages
from realm_tf.corpus.candidates import NULL_PASSAGE, Found
from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import masking, packing, sentences
from realm_tf.models import snapshots
from realm_tf.models.retriever import Retriever
from realm_tf.retrieval import index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts

_QUERIES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class IndexedRetriever:
  """A query tower, the searcher over embeddings of the same snapshot, and their passages.

  Attributes:
    retriever: the retriever of the snapshot.
    searcher: the searcher.
    table: the passages that were embedded.
    step: training step of the snapshot.
    folder: folder of the index.
  """

  retriever: Retriever
  searcher: index.Searcher
  table: PassageTable
  step: int
  folder: str

  @property
  def num_rows(self) -> int:
    """Number of passages."""
    return self.searcher.num_rows

  def search(self, query_ids: np.ndarray, num: int) -> Found:
    """Returns the `num` best passages for packed queries [B, Lq] int32."""
    return self.find(self.retriever.query_tower.predict_on_batch(query_ids), num)

  def find(self, queries: np.ndarray, num: int) -> Found:
    """Returns the `num` best passages for query vectors [B, D] float32."""
    result = self.searcher.search(tf.constant(queries), num)
    return Found(result.numbers.numpy(), result.scores.numpy())


def load(index_folder: str, *, table: PassageTable, snapshot: str) -> IndexedRetriever:
  """Opens an index together with the snapshot that it was made from.

  Args:
    index_folder: a complete index.
    table: the passages that it must have been made from.
    snapshot: the folder of the snapshot.

  Raises:
    ArtifactError: the index was made from other passages or another snapshot.
  """
  searcher = index.load(index_folder, snapshot=snapshot)
  artifacts.check_version(index_folder, "passages", table.folder, table.fingerprint)
  return IndexedRetriever(
    retriever=snapshots.load_retriever(snapshot),
    searcher=searcher,
    table=table,
    step=artifacts.step_of(snapshot),
    folder=index_folder,
  )


def sample_queries(
  retriever: Retriever, table: PassageTable, *, tokenizer: Tokenizer, config: IndexConfig
) -> np.ndarray | None:
  """Embeds sentences of the passages, [Q, D] float32, for measuring an index.

  Returns None if the index needs no measurement.

  Args:
    retriever: the retriever whose passage tower embedded the passages.
    table: the passages.
    tokenizer: the retriever's tokenizer.
    config: configuration of the index.
  """
  share = index.share_queried(config, len(table))
  if not share:
    return None
  drawn = sentences.draw_sentences(
    table.text_ids,
    table.token_starts,
    table.sentence_starts,
    share=share,
    rng=np.random.default_rng(0),
  )
  packed = packing.pack_queries(drawn.tensor(), tokenizer=tokenizer, length=retriever.query_length)
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
  """Finds the candidates of each query (REALM, sections 3.3 and 3.4).

  Args:
    indexed: the index to search.
    query_ids: [B, Lq] int32.
    num: C, including the null passage.
    own_passages: [B, K] passages that must not be retrieved, because they hold the answer unmasked;
      NULL_PASSAGE where there are fewer; or None.
    null: whether the null passage comes first.
    given: [B, G] passages that are always candidates, in place of the worst retrieved ones;
      NULL_PASSAGE where there are fewer.
    pool: number of best passages from which the retrieved ones are drawn at random; 0 takes the
      best.
    rng: random generator of the draw.

  Returns:
    [B, C] int32 passage numbers: the null passage, the given ones, then those retrieved, best
      first.
  """
  size = len(query_ids)
  none = np.full([size, 0], NULL_PASSAGE)
  own, given = (none if part is None else part for part in (own_passages, given))
  given = np.where(np.isin(given, indexed.table.deleted), NULL_PASSAGE, given)[:, : num - null]
  excluded = np.concatenate([own, given], axis=1)
  found = np.full([size, num], NULL_PASSAGE, np.int32)  # missing ones count as the null passage
  wanted = num - null
  if not wanted:
    return found
  depth = max(wanted, min(max(wanted, pool) + excluded.shape[1], indexed.num_rows))
  numbers = indexed.search(query_ids, depth).numbers
  kept = (numbers == NULL_PASSAGE) | ~masking.contains(excluded, numbers)
  for row, (near, keep, sure) in enumerate(zip(numbers, kept, given, strict=True)):
    near, sure = near[keep], sure[sure != NULL_PASSAGE]
    if pool:
      assert rng is not None, "a pool is drawn from at random"
      num = min(wanted - len(sure), len(near[:pool]))
      near = near[np.sort(rng.choice(len(near[:pool]), num, replace=False))]
    chosen = np.concatenate([sure, near])[:wanted]
    found[row, null : null + len(chosen)] = chosen
  return found


def search_all(
  search: Callable[[slice], Found], num_queries: int, *, block: int = _QUERIES_AT_ONCE
) -> list[np.ndarray]:
  """Returns the passage numbers [K] found for each query, best first.

  Args:
    search: a slice of the queries → the passages found for them.
    num_queries: total number of queries.
    block: queries searched at once.
  """
  return [
    numbers
    for start in range(0, num_queries, block)
    for numbers in search(slice(start, start + block)).numbers
  ]


def recall(
  search: Callable[[slice], Found],
  answers: Sequence[Sequence[str]],
  matcher: metrics.AnswerMatcher,
  *,
  ks: Sequence[int],
) -> dict[str, float]:
  """Measures recall@k: the share of queries with an answer in the first k passages.

  Args:
    search: a slice of the queries → the passages found for them, at least max(ks) if the corpus has
      that many.
    answers: the answers of every query.
    matcher: decides which passages hold an answer.
    ks: the values of k.

  Returns:
    "recall_at_k" -> share of the queries, 0 to 1.
  """
  found = [
    matcher.has_answer(numbers, wanted)
    for numbers, wanted in zip(search_all(search, len(answers)), answers, strict=True)
  ]
  return metrics.recall_at(found, ks)


class Swapper:
  """Opens newer indexes in the background and switches to them between two batches.

  If the passages were updated, the newer index comes with the updated passages.

  Args:
    first: the index to start with.
    newest_index: returns the newest usable index or None; must be cheap
      (`Refresher.newest_index`).
    snapshots_root: W/snapshots.
    prepare: applied to each index in the background before it is used; None for no preparation.
  """

  def __init__(
    self,
    first: IndexedRetriever,
    *,
    newest_index: Callable[[], index.Version | None],
    snapshots_root: str,
    prepare: Callable[[IndexedRetriever], IndexedRetriever] | None = None,
  ):
    self.current, self.swaps = prepare(first) if prepare else first, 0
    self._newest_index, self._snapshots_root, self._prepare = newest_index, snapshots_root, prepare
    self._segments = _segments_of(first.folder)
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="index-loader")
    self._loading: concurrent.futures.Future | None = None
    self._tried = index.Version(first.folder, -1)  # no index that exists

  def advance(self) -> bool:
    """Switches to a newer index if one has finished loading; never waits.

    Starts loading a newer index if one has appeared.

    Returns:
      Whether the index was switched.
    """
    swapped = False
    if self._loading is not None and self._loading.done():
      loading, self._loading = self._loading, None
      if (error := loading.exception()) is not None:
        print(f"index {self._tried.folder} is not used: {error}")
      elif (newer := loading.result()) is not None:
        self.current, swapped = newer, True
        self.swaps += 1
    newest = self._newest_index() if self._loading is None else None
    if newest is not None and newest != self._tried:
      self._tried = newest
      self._loading = self._pool.submit(self._load, newest.folder)
    return swapped

  def _load(self, folder: str) -> IndexedRetriever | None:
    """Opens an index; returns None if it is of the current snapshot or an earlier one.

    The current snapshot has a newer index if the passages were updated.
    """
    table, newer = self.current.table, artifacts.step_of(folder) - self.current.step
    updated, segments = not is_of(folder, table), _segments_of(folder)
    if newer < 0 or (newer == 0 and not updated):
      return None
    if updated:
      if not self._segments.items() <= segments.items():
        raise artifacts.ArtifactError(
          "the passages were compacted or made anew since training began, so they have other "
          "numbers. To train on them, annotate their spans again, and run the trainer again."
        )
      table = passages.load(table.folder)
      print(f"{table.folder}: the passages were updated; there are {table.num_alive:,} now.")
    snapshot = artifacts.step_folder(self._snapshots_root, artifacts.step_of(folder))
    loaded = load(folder, table=table, snapshot=snapshot)
    loaded = self._prepare(loaded) if self._prepare else loaded
    self._segments = segments
    return loaded


def is_of(index_folder: str, table: PassageTable) -> bool:
  """Returns whether an index was made from these passages, in this version."""
  made_from = artifacts.read_info(index_folder)["inputs"]["passages"]
  return made_from["fingerprint"] == table.fingerprint


def _segments_of(index_folder: str) -> dict[str, str]:
  """Returns number -> fingerprint of the segments of the passages of an index."""
  return artifacts.read_info(index_folder)["segments"]
