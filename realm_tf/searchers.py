"""Maximum inner product search, exact or by ScaNN, and how wide ScaNN searches.

Both searchers are TensorFlow modules. Their `search` works eagerly, in a tf.function and in a SavedModel.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from realm_tf import artifacts, paths

MISSING = -1  # number where ScaNN found fewer candidates than asked for (the null passage's); its score is -inf
NUM_QUERIES = 1000  # sentences, about so many, by which a ScaNN search is measured
MIN_ROWS = (
  4096  # fewer cannot train its codebooks well, and take well under a millisecond without them
)
_ALL_LEAVES_ROWS = 100_000  # fewer are scored in under a millisecond or so with all partitions
_SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32
_MEASURED_AT = (
  10,
  100,
  1000,
  5000,
)  # passages asked for: by a trainer, a server, fine-tuning and evaluation
_NEIGHBOURS = 200_000  # of all queries, at most: where each has 5000, forty queries tell enough
_LEAVES_GROWTH = 1.25  # from one number of partitions that is tried to the next
_REORDER_TIMES = (
  2,
  3,
  4,
  5,
  7,
  10,
  15,
  20,
  30,
  50,
  100,
  200,
)  # candidates scored exactly that are tried, for each passage asked for

# Every index that is opened brings functions of its own to compile; TensorFlow takes that for a mistake.
tf.get_logger().addFilter(
  lambda record: "triggered tf.function retracing" not in record.getMessage()
)


class SearchResult(NamedTuple):
  """The best passages of each query, best first.

  Attributes:
    numbers: [B, num] int32 passage numbers.
    scores: [B, num] float32 inner products f(x, z).
  """

  numbers: tf.Tensor
  scores: tf.Tensor


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  """How an index is made and searched.

  Attributes:
    searcher: "exact" or "scann".
    recall: for ScaNN, the wanted share of the exact best k passages that a search for k finds, at any k.
    num_leaves: ScaNN's partitions of the embeddings; None is the square root of their number.
    leaves_to_search: partitions looked into for a query. None: all of fewer than 100,000 passages; of more,
      as few as give the wanted recall.
    reorder: candidates whose inner product is computed exactly, at least twice as many as are asked for. None:
      as few as give the wanted recall.
    dimensions_per_block: dimensions that share a code of asymmetric hashing.
    mixed_precision: the embeddings are computed in bfloat16.

  Raises:
    UserError: a value that there is not.
  """

  searcher: str = "exact"
  recall: float = 0.98
  num_leaves: int | None = None
  leaves_to_search: int | None = None
  reorder: int | None = None
  dimensions_per_block: int = 2
  mixed_precision: bool = False

  def __post_init__(self):
    if self.searcher not in ("exact", "scann"):
      raise artifacts.UserError(f"searcher is {self.searcher!r}; use 'exact' or 'scann'.")
    if not 0 < self.recall <= 1:
      raise artifacts.UserError(
        f"the wanted recall is {self.recall}; give a share above 0, at most 1."
      )
    for name in ("num_leaves", "leaves_to_search", "reorder", "dimensions_per_block"):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise artifacts.UserError(f"{name} is {getattr(self, name)}; wanted at least 1.")
    if self.num_leaves and self.leaves_to_search and self.leaves_to_search > self.num_leaves:
      raise artifacts.UserError(
        f"leaves_to_search is {self.leaves_to_search} of {self.num_leaves} leaves; lower it, or "
        "raise num_leaves."
      )


# ---------------------------------------------------------------------------------------------------------- searchers


class ExactSearcher(tf.Module):
  """Scores every passage, a block of rows at a time, so that memory stays bounded however many there are.

  Args:
    embeddings: [N, D] float32.
  """

  def __init__(self, embeddings: np.ndarray):
    super().__init__()
    self.embeddings = tf.Variable(
      embeddings, trainable=False
    )  # a variable: a SavedModel's graph cannot hold gigabytes
    self.num_rows = len(embeddings)

  def describe(self, num: int) -> str:
    """A search for `num` passages in words."""
    del num
    return "exact"

  def search(self, queries: tf.Tensor, num: int) -> SearchResult:
    """The `num` passages of highest inner product with each query; the lower number first among equals.

    Args:
      queries: [B, D] float32.
      num: at most the number of passages.

    Raises:
      UserError: more are asked for than there are.
    """
    _check_num(num, self.num_rows)
    return self._search(queries, num)

  @tf.function(reduce_retracing=True)
  def _search(self, queries, num):
    batch = tf.shape(queries)[0]
    block = tf.maximum(_SCORES_AT_ONCE // tf.maximum(batch, 1), num)

    def search_block(start, numbers, scores):
      rows = self.embeddings[start : start + block]  # no copy: a slice of whole rows
      block_scores = tf.matmul(queries, rows, transpose_b=True)  # [B, block]
      best = tf.math.top_k(block_scores, tf.minimum(num, tf.shape(rows)[0]))
      scores = tf.concat([scores, best.values], axis=1)
      numbers = tf.concat([numbers, best.indices + start], axis=1)
      best = tf.math.top_k(scores, tf.minimum(num, tf.shape(scores)[1]))
      return start + block, tf.gather(numbers, best.indices, batch_dims=1), best.values

    nothing = (tf.constant(0), tf.zeros([batch, 0], tf.int32), tf.zeros([batch, 0], tf.float32))
    _, numbers, scores = tf.while_loop(
      lambda start, *_: start < self.num_rows,
      search_block,
      nothing,
      parallel_iterations=1,
      shape_invariants=(
        tf.TensorShape([]),
        tf.TensorShape([None, None]),
        tf.TensorShape([None, None]),
      ),
    )
    return SearchResult(tf.ensure_shape(numbers, [None, num]), tf.ensure_shape(scores, [None, num]))


@dataclasses.dataclass(frozen=True)
class Width:
  """How wide ScaNN searches for up to so many passages.

  Attributes:
    num: passages asked for, at most.
    leaves: partitions looked into.
    reorder: candidates whose inner product is computed exactly.
    recall: the measured share of the exact best `num` passages that is found; None if nothing was measured.
  """

  num: int
  leaves: int
  reorder: int
  recall: float | None = None


class ScannSearcher(tf.Module):
  """ScaNN (Guo et al. 2020): partitions, anisotropic codes, and exact scores for the best candidates.

  Args:
    state: the searcher's tensors, as `scann_ops` serialises them.
    num_rows: number of passages.
    num_leaves: number of partitions; 0 where every passage is scored exactly, without partitions and codes.
    widths: of the search, by ascending `num`; none are needed without partitions.
    num_queries: how many queries the recall of `widths` was measured with.
  """

  def __init__(
    self,
    state: tf.Module,
    *,
    num_rows: int,
    num_leaves: int,
    widths: Sequence[Width],
    num_queries: int,
  ):
    super().__init__()
    self.state = state
    self.num_rows, self.num_leaves, self.widths, self.num_queries = (
      num_rows,
      num_leaves,
      tuple(widths),
      num_queries,
    )

  @classmethod
  def build(
    cls, embeddings: np.ndarray, config: IndexConfig, queries: np.ndarray | None = None
  ) -> "ScannSearcher":
    """Trains ScaNN on embeddings, and chooses the width of its search.

    Some queries are searched for exactly and by ScaNN. Under a few thousand rows ScaNN scores all of them instead.

    Args:
      embeddings: [N, D] float32.
      queries: [Q, D] float32, like those that will be searched for; without them the search is as wide as it
        can be.

    Raises:
      UserError: more partitions than rows.
    """
    num_rows, scann_ops = len(embeddings), _scann_ops()
    if num_rows < MIN_ROWS:
      state = (
        scann_ops.builder(embeddings, 1, "dot_product")
        .score_brute_force()
        .build()
        .serialize_to_module()
      )
      return cls(state, num_rows=num_rows, num_leaves=0, widths=(), num_queries=0)
    num_leaves = config.num_leaves or math.isqrt(num_rows)
    if num_leaves > num_rows:
      raise artifacts.UserError(
        f"num_leaves is {num_leaves}, there are {num_rows} passages; lower it."
      )
    samples = _samples(embeddings, queries)  # before ScaNN takes memory
    builder = scann_ops.builder(embeddings, 1, "dot_product")
    builder.tree(num_leaves, num_leaves, training_sample_size=min(num_rows, 250_000))
    builder.score_ah(config.dimensions_per_block, anisotropic_quantization_threshold=0.2)
    searcher = builder.reorder(_REORDER_TIMES[0]).build()
    widths = [
      _choose_width(sample, searcher, config, num_rows=num_rows, num_leaves=num_leaves)
      for sample in samples
    ]
    return cls(
      searcher.serialize_to_module(),
      num_rows=num_rows,
      num_leaves=num_leaves,
      widths=widths,
      num_queries=0 if queries is None else len(queries),
    )

  @property
  def settings(self) -> dict:
    """What `load` needs beside the state."""
    return {
      "num_rows": self.num_rows,
      "num_leaves": self.num_leaves,
      "widths": [dataclasses.asdict(width) for width in self.widths],
      "num_queries": self.num_queries,
    }

  def save(self, folder: str) -> None:
    tf.saved_model.save(
      self.state, folder, options=tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    )

  @classmethod
  def load(cls, folder: str, *, widths: Sequence[dict], **settings) -> "ScannSearcher":
    _scann_ops()  # registers the op that the SavedModel holds
    return cls(tf.saved_model.load(paths.literal(folder)), widths=[Width(**width) for width in widths], **settings)

  def width(self, num: int) -> Width | None:
    """How wide a search for `num` passages is; None if it scores every passage."""
    if not self.num_leaves:
      return None
    width = next((width for width in self.widths if width.num >= num), self.widths[-1])
    return (
      width
      if width.num >= num
      else Width(num, width.leaves, min(max(width.reorder, 2 * num), self.num_rows))
    )

  def describe(self, num: int) -> str:
    """A search for `num` passages in words."""
    width = self.width(num)
    if width is None:
      return "scann, every passage scored exactly"
    measured = (
      "" if width.recall is None else f", measured recall {width.recall:.4f} at {width.num}"
    )
    return f"scann, {width.leaves} of {self.num_leaves} partitions, {width.reorder} candidates reordered{measured}"

  def search(self, queries: tf.Tensor, num: int) -> SearchResult:
    """Like `ExactSearcher.search`, but a near neighbour may be missed.

    Where the partitions searched hold fewer than `num` passages, the row ends with number MISSING and score -inf.
    """
    _check_num(num, self.num_rows)
    width = self.width(num) or Width(num, -1, -1)
    numbers, scores = self._search(queries, *map(tf.constant, (num, width.leaves, width.reorder)))
    return SearchResult(tf.ensure_shape(numbers, [None, num]), tf.ensure_shape(scores, [None, num]))

  @tf.function(reduce_retracing=True)
  def _search(self, queries, num, leaves, reorder):
    # Inside a tf.function, the op keeps its searcher between calls; eagerly it would be made anew each time. The numbers
    # are tensors, so that searches of every width share it.
    numbers, scores = (
      _scann_ops()
      .searcher_from_module(self.state)
      .search_batched_parallel(
        queries, final_num_neighbors=num, pre_reorder_num_neighbors=reorder, leaves_to_search=leaves
      )
    )
    missing = tf.math.is_nan(scores)
    numbers, scores = tf.where(missing, MISSING, numbers), tf.where(missing, -np.inf, scores)
    padding = [
      [0, 0],
      [0, num - tf.shape(scores)[1]],
    ]  # ScaNN returns as many columns as its fullest row has
    return tf.pad(numbers, padding, constant_values=MISSING), tf.pad(
      scores, padding, constant_values=-np.inf
    )


# ------------------------------------------------------------------------------------------- the width of ScaNN's search


class _Sample(NamedTuple):
  """Queries [Q, D] and the scores of their exact best passages, [Q, num]; None if there are no queries."""

  num: int
  queries: np.ndarray | None
  exact: np.ndarray | None


def _samples(embeddings: np.ndarray, queries: np.ndarray | None) -> list[_Sample]:
  """For each number of passages that may be asked for, the queries to measure with."""
  nums = sorted({min(num, len(embeddings)) for num in _MEASURED_AT})
  if queries is None:
    return [_Sample(num, None, None) for num in nums]
  parts = [queries[: max(_NEIGHBOURS // num, 1)] for num in nums]
  return [_Sample(num, part, _best_scores(embeddings, part, num)) for num, part in zip(nums, parts)]


def _best_scores(embeddings: np.ndarray, queries: np.ndarray, num: int) -> np.ndarray:
  """The `num` highest inner products of each query, descending: [Q, num]; the rows are not copied."""
  best, block = np.empty([len(queries), 0], np.float32), max(_SCORES_AT_ONCE // len(queries), num)
  for start in range(0, len(embeddings), block):
    scores = tf.matmul(queries, embeddings[start : start + block], transpose_b=True)
    both = tf.concat([best, scores], axis=1)
    best = tf.math.top_k(both, min(num, both.shape[1])).values
  return best.numpy()


def share_found(scores: np.ndarray, exact: np.ndarray) -> float:
  """The share of the exact best passages that a search found, by score: of equal passages each is right.

  Args:
    scores: [Q, K] float32 of what was found.
    exact: [Q, K] float32 of the exact best, descending.
  """
  worst = exact[:, -1:]
  return float(np.mean(scores >= worst - 1e-5 * np.maximum(np.abs(worst), 1)))


def _choose_width(
  sample: _Sample, searcher, config: IndexConfig, *, num_rows: int, num_leaves: int
) -> Width:
  """The fewest partitions, then the fewest candidates to reorder, that give the wanted recall; else the most.

  Args:
    searcher: of `scann_ops`.
  """
  tried = [config.reorder] if config.reorder else [times * sample.num for times in _REORDER_TIMES]
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
  if sample.queries is None:
    return Width(sample.num, all_leaves[-1], all_reorder[-1])

  @functools.cache
  def recall(leaves: int, reorder: int) -> float:
    _, scores = searcher.search_batched_parallel(
      sample.queries,
      final_num_neighbors=sample.num,
      pre_reorder_num_neighbors=reorder,
      leaves_to_search=leaves,
    )
    scores = np.nan_to_num(scores.numpy(), nan=-np.inf)
    return share_found(
      np.pad(scores, [[0, 0], [0, sample.num - scores.shape[1]]], constant_values=-np.inf),
      sample.exact,
    )

  lost = (1 - config.recall) / 2  # by partitions, and as much by codes
  leaves = _first(all_leaves, lambda leaves: recall(leaves, all_reorder[-1]) >= 1 - lost)
  reorder = _first(all_reorder, lambda reorder: recall(leaves, reorder) >= config.recall)
  return Width(sample.num, leaves, reorder, round(recall(leaves, reorder), 4))


def _first(ascending: Sequence[int], enough: Callable[[int], bool]) -> int:
  """The first value that is enough, where all later ones are; the last, if none is."""
  return ascending[bisect.bisect_left(ascending, True, hi=len(ascending) - 1, key=enough)]


def _check_num(num: int, num_rows: int) -> None:
  if not 0 < num <= num_rows:
    raise artifacts.UserError(
      f"{num} candidates asked for, the index has {num_rows} passages. Ask for fewer, or index more passages."
    )


def _scann_ops():
  """ScaNN's TensorFlow ops; imported late, because exact search needs no ScaNN."""
  try:
    from scann.scann_ops.py import scann_ops
  except (ImportError, tf.errors.NotFoundError) as error:
    raise artifacts.ArtifactError(
      f"searcher 'scann' needs the scann package built for TensorFlow {tf.__version__} ({error}). "
      "Install the versions of "
      "requirements.txt, or use searcher 'exact'."
    ) from error
  return scann_ops
