"""What searchers that may miss near neighbours share: partitions, and the width of a search.

The embeddings are divided into partitions (leaves). A search computes approximate scores in the
most promising ones, and exact scores of the best candidates. Its width is chosen by measured
recall.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np
import tensorflow as tf

from realm_tf.corpus.candidates import NULL_PASSAGE, Found
from realm_tf.retrieval.exact import SCORES_AT_ONCE, ExactSearcher, check_num
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts

NUM_QUERIES = 1000  # approximate number of sentences that a search is measured with
# fewer rows are not partitioned: scoring all of them takes well under a millisecond
MIN_ROWS = 4096
SAMPLE_ROWS = 250_000  # that partitions are trained on, at most
_ALL_LEAVES_ROWS = 100_000  # with all partitions, fewer rows are scored in about a millisecond
# passages requested by a trainer, a server, fine-tuning and evaluation
_MEASURED_AT = (
  10,
  100,
  1000,
  5000,
)
_MOST_REORDERED = 50_000  # candidates
_NEIGHBOURS = 200_000  # of all queries, at most: with 5000 each, forty queries are enough
_LEAVES_GROWTH = 1.25  # ratio of successive numbers of partitions tried


@dataclasses.dataclass(frozen=True)
class Width:
  """Width of a search for up to `num` passages.

  Attributes:
    num: most passages requested.
    leaves: partitions searched.
    reorder: candidates whose inner product is computed exactly.
    recall: the measured share of the exact best `num` passages that is found; None if nothing was
      measured.
  """

  num: int
  leaves: int
  reorder: int
  recall: float | None = None


# ------------------------------------------------------------------------------- the base searcher


class ApproximateSearcher(tf.Module):
  """A searcher over partitions of the embeddings, which may miss near neighbours.

  A subclass finds candidates by codes of the embeddings. Their scores are computed from the
  embeddings themselves. It has `kind`, `build`, `save`, `load`, and `_search(queries, num, leaves,
  reorder)`.

  Args:
    embeddings: [N, D] float32, float16 or bfloat16.
    num_leaves: number of partitions; 0 if every passage is scored exactly, without partitions.
    widths: search widths by ascending `num`; not needed without partitions.
    num_queries: number of queries that the recall of `widths` was measured with.
  """

  kind: str  # as in `IndexConfig.searcher`

  def __init__(
    self, embeddings: np.ndarray, *, num_leaves: int, widths: Sequence[Width], num_queries: int
  ):
    super().__init__()
    with tf.device("CPU"):
      self.exact = ExactSearcher(embeddings)
    self.num_rows = len(embeddings)
    self.num_leaves = num_leaves
    self.widths = tuple(widths)
    self.num_queries = num_queries

  @classmethod
  def build(
    cls, embeddings: np.ndarray, config: IndexConfig, queries: np.ndarray | None = None
  ) -> Self:
    """Divides embeddings into partitions, and chooses the width of the search.

    The width is chosen by comparing results with exact search on sample queries. With fewer than a
    few thousand rows, all of them are scored exactly instead.

    Args:
      embeddings: [N, D] float32, float16 or bfloat16.
      config: configuration of the index.
      queries: [Q, D] float32, similar to those of later searches; None makes the search as wide as
        possible.

    Raises:
      UserError: more partitions than rows.
    """
    raise NotImplementedError

  @property
  def settings(self) -> dict:
    """Arguments of `load` in addition to the files, for info.json."""
    return {
      "num_leaves": self.num_leaves,
      "widths": [dataclasses.asdict(width) for width in self.widths],
      "num_queries": self.num_queries,
    }

  def save(self, folder: str) -> None:
    """Writes the codes; not the embeddings, which the index folder has."""
    raise NotImplementedError

  @classmethod
  def load(cls, folder: str, embeddings: np.ndarray, *, widths: Sequence[dict], **settings) -> Self:
    """Opens what `save` wrote, with the embeddings of the same index and its `settings`.

    Raises:
      ArtifactError: a file does not hold what it should.
    """
    raise NotImplementedError

  def width(self, num: int) -> Width | None:
    """Returns the width of a search for `num` passages; None if it scores every passage."""
    if not self.num_leaves:
      return None
    width = next((width for width in self.widths if width.num >= num), self.widths[-1])
    return (
      width
      if width.num >= num
      else Width(num, width.leaves, min(max(width.reorder, 2 * num), self.num_rows))
    )

  def describe(self, num: int) -> str:
    """Describes a search for `num` passages."""
    width = self.width(num)
    if width is None:
      return f"{self.kind}, every passage scored exactly"
    measured = (
      "" if width.recall is None else f", measured recall {width.recall:.4f} at {width.num}"
    )
    return (
      f"{self.kind}, {width.leaves} of {self.num_leaves} partitions, "
      f"{width.reorder} candidates reordered{measured}"
    )

  def search(self, queries: tf.Tensor, num: int) -> Found:
    """Searches like `ExactSearcher.search`, but may miss near neighbours.

    If the searched partitions hold fewer than `num` passages, the row ends with NULL_PASSAGE and
    scores of -inf.
    """
    check_num(num, self.num_rows)
    width = self.width(num)
    if width is None:
      return self.exact.search(queries, num)
    # tensors, so that searches of every width share one trace
    numbers, scores = self._search(queries, *map(tf.constant, (num, width.leaves, width.reorder)))
    return Found(tf.ensure_shape(numbers, [None, num]), tf.ensure_shape(scores, [None, num]))

  def _search(self, queries, num, leaves, reorder):
    raise NotImplementedError

  def best(self, queries: tf.Tensor, candidates: tf.Tensor, num: int | tf.Tensor) -> Found:
    """Returns the best of the candidates by exact score; the lower number comes first among equals.

    Args:
      queries: [B, D] float32.
      candidates: [B, R] int32, ascending; `num_rows` where there is none.
      num: number of passages to return.
    """
    # A gather from a variable, unlike one from its value, would make every other read copy it.
    embeddings = self.exact.embeddings.read_value()

    def exact_scores(row):
      numbers, query = row
      vectors = tf.gather(embeddings, tf.minimum(numbers, self.num_rows - 1))
      vectors = tf.cast(vectors, tf.float32)
      return tf.matmul(query[tf.newaxis], vectors, transpose_b=True)[0]

    scores = tf.cond(
      tf.size(candidates) > 0,  # map_fn cannot stack nothing
      lambda: tf.map_fn(exact_scores, (candidates, queries), fn_output_signature=tf.float32),
      lambda: tf.zeros_like(candidates, tf.float32),
    )
    scores = tf.where(candidates < self.num_rows, scores, -np.inf)
    best = tf.math.top_k(scores, tf.minimum(num, tf.shape(scores)[1]))
    numbers = tf.gather(candidates, best.indices, batch_dims=1)
    numbers = tf.where(numbers < self.num_rows, numbers, NULL_PASSAGE)
    padding = [[0, 0], [0, num - tf.shape(numbers)[1]]]
    return Found(
      tf.pad(numbers, padding, constant_values=NULL_PASSAGE),
      tf.pad(best.values, padding, constant_values=-np.inf),
    )


def num_leaves_of(config: IndexConfig, num_rows: int) -> int:
  """Returns the number of partitions: by default, the square root of the number of rows.

  Raises:
    UserError: more partitions than rows.
  """
  num_leaves = config.num_leaves or math.isqrt(num_rows)
  if num_leaves > num_rows:
    raise artifacts.UserError(
      f"num_leaves is {num_leaves}, but there are {num_rows} passages; lower it."
    )
  return num_leaves


# ---------------------------------------------------------------------------- the width of a search


class Sample(NamedTuple):
  """Queries [Q, D] and the scores [Q, num] of their exact best passages.

  Both are None if there are no queries.
  """

  num: int
  queries: np.ndarray | None
  exact: np.ndarray | None


def samples(embeddings: np.ndarray, queries: np.ndarray | None) -> list[Sample]:
  """Returns the queries to measure with, for each number of requested passages."""
  nums = sorted({min(num, len(embeddings)) for num in _MEASURED_AT})
  if queries is None:
    return [Sample(num, None, None) for num in nums]
  parts = [queries[: max(_NEIGHBOURS // num, 1)] for num in nums]
  return [
    Sample(num, part, _best_scores(embeddings, part, num))
    for num, part in zip(nums, parts, strict=True)
  ]


def _best_scores(embeddings: np.ndarray, queries: np.ndarray, num: int) -> np.ndarray:
  """Returns the `num` highest inner products of each query, descending: [Q, num].

  At most `SCORES_AT_ONCE` scores are held at once.
  """
  best = tf.zeros([len(queries), 0], tf.float32)
  block = max(SCORES_AT_ONCE // len(queries), num)
  for start in range(0, len(embeddings), block):
    rows = np.asarray(embeddings[start : start + block], np.float32)
    scores = tf.matmul(queries, rows, transpose_b=True)
    both = tf.concat([best, scores], axis=1)
    best = tf.math.top_k(both, min(num, both.shape[1])).values
  return best.numpy()


def share_found(scores: np.ndarray, exact: np.ndarray) -> float:
  """Returns the share of the exact best passages that a search found, by score.

  Passages with equal scores are interchangeable.

  Args:
    scores: [Q, K] float32, of the passages found.
    exact: [Q, K] float32, of the exact best passages, descending.
  """
  worst = exact[:, -1:]
  return float(np.mean(scores >= worst - 1e-5 * np.maximum(np.abs(worst), 1)))


def choose_widths(measured: Sequence[Sample], *how, **limits) -> tuple[Width, ...]:
  """Returns the width for each number of requested passages; see `_choose_width`."""
  return tuple(_choose_width(sample, *how, **limits) for sample in measured)


def _choose_width(
  sample: Sample,
  search: Callable[[np.ndarray, int, int, int], np.ndarray],
  config: IndexConfig,
  *,
  num_rows: int,
  num_leaves: int,
  reorder_times: Sequence[int],
) -> Width:
  """Returns the narrowest search with the wanted recall.

  The narrowest search has the fewest partitions, then the fewest candidates to reorder. If even the
  widest search finds less than is wanted, a search that finds almost as much is as good and much
  faster: one that misses half as much more as a search with the wanted recall may miss.

  Args:
    sample: the queries to measure with.
    search: returns scores [Q, num] float32, given queries [Q, D] float32, num, the number of
      partitions and the number of candidates to reorder; -inf where nothing was found.
    config: configuration of the index; has the wanted recall.
    num_rows: number of embeddings.
    num_leaves: number of partitions.
    reorder_times: ascending numbers of candidates to reorder that are tried, per requested passage.
  """
  tried = [config.reorder] if config.reorder else [times * sample.num for times in reorder_times]
  if not config.reorder:  # scoring more would take as long as scoring all
    tried = [min(reorder, _MOST_REORDERED) for reorder in tried]
  all_reorder = sorted({min(max(reorder, 2 * sample.num), num_rows) for reorder in tried})
  if config.leaves_to_search:
    all_leaves = [min(config.leaves_to_search, num_leaves)]
  elif num_rows < _ALL_LEAVES_ROWS:
    all_leaves = [num_leaves]
  else:
    steps = math.ceil(math.log(num_leaves, _LEAVES_GROWTH))
    all_leaves = sorted(
      {min(math.ceil(_LEAVES_GROWTH**step), num_leaves) for step in range(steps + 1)}
    )
  if sample.queries is None or sample.exact is None:
    return Width(sample.num, all_leaves[-1], all_reorder[-1])

  queries, exact = sample.queries, sample.exact

  @functools.cache
  def recall(leaves: int, reorder: int) -> float:
    return share_found(search(queries, sample.num, leaves, reorder), exact)

  limit = recall(all_leaves[-1], all_reorder[-1])
  goal = config.recall if limit >= config.recall else limit - (1 - config.recall) / 2
  half_way = (goal + limit) / 2  # partitions lose half of what may be lost, codes the rest
  leaves = _first(all_leaves, lambda leaves: recall(leaves, all_reorder[-1]) >= half_way)
  reorder = _first(all_reorder, lambda reorder: recall(leaves, reorder) >= goal)
  return Width(sample.num, leaves, reorder, round(recall(leaves, reorder), 4))


def _first(ascending: Sequence[int], enough: Callable[[int], bool]) -> int:
  """Returns the first value that is enough, if all later ones are; the last one if none is."""
  return ascending[bisect.bisect_left(ascending, True, hi=len(ascending) - 1, key=enough)]
