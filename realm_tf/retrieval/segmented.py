"""Search of a corpus in segments: the best passages of each, without those that were deleted."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tensorflow as tf

from realm_tf.corpus.candidates import NULL_PASSAGE, Found
from realm_tf.retrieval.exact import check_num


class Searcher(Protocol):
  """A searcher of embeddings, as a `tf.Module`; its rows are numbered from 0."""

  num_rows: int

  def describe(self, num: int) -> str: ...

  def search(self, queries: tf.Tensor, num: int) -> Found: ...


class SegmentedSearcher(tf.Module):
  """Searches every segment, and merges the best of each.

  Each segment is asked for as many passages more as it has deleted ones, so that enough are left.
  Compaction (`beam_jobs.update_passages --compact`) ends this extra work.

  Args:
    segments: the segments' searchers, in the order of their passages.
    deleted: sorted numbers of the deleted passages: [M] int64.
  """

  def __init__(self, segments: Sequence[Searcher], deleted: np.ndarray):
    super().__init__()
    self.segments = tuple(segments)
    self._bases = np.cumsum([0, *(segment.num_rows for segment in segments)]).tolist()
    self.num_rows = self._bases[-1] - len(deleted)  # that a search can find
    ends = np.searchsorted(deleted, self._bases)
    self._deleted = [
      tf.constant(deleted[start:stop] - base, tf.int32)
      for start, stop, base in zip(ends[:-1], ends[1:], self._bases, strict=False)
    ]

  def describe(self, num: int) -> str:
    """Describes a search for `num` passages."""
    ways = dict.fromkeys(segment.describe(num) for segment in self.segments)
    return f"{len(self.segments)} segments: {'; '.join(ways)}"

  def search(self, queries: tf.Tensor, num: int) -> Found:
    """Returns the `num` passages that score highest among all segments.

    Among equal scores the lower number comes first. If the segments' searchers find fewer, the row
    ends with NULL_PASSAGE and scores of -inf.

    Args:
      queries: [B, D] float32.
      num: at most the number of passages that are not deleted.

    Raises:
      UserError: more passages are requested than there are.
    """
    check_num(num, self.num_rows)
    return self._search(queries, num)

  @tf.function(autograph=False, reduce_retracing=True)  # so that segments are searched in parallel
  def _search(self, queries, num):
    found = [
      self._search_one(queries, num, segment, base, deleted)
      for segment, base, deleted in zip(self.segments, self._bases, self._deleted, strict=False)
    ]
    numbers, scores = (tf.concat(parts, axis=1) for parts in zip(*found, strict=True))
    best = tf.math.top_k(scores, num)
    return Found(tf.gather(numbers, best.indices, batch_dims=1), best.values)

  @staticmethod
  def _search_one(
    queries: tf.Tensor, num: int, segment: Searcher, base: int, deleted: tf.Tensor
  ) -> Found:
    """Returns at least `num` passages of a segment, or all; deleted ones have scores of -inf."""
    num_deleted = int(deleted.shape[0])
    numbers, scores = segment.search(queries, min(num + num_deleted, segment.num_rows))
    if num_deleted:
      at = tf.searchsorted(deleted, tf.reshape(numbers, [-1]))
      at = tf.reshape(tf.minimum(at, num_deleted - 1), tf.shape(numbers))
      scores = tf.where(tf.gather(deleted, at) == numbers, -np.inf, scores)
    missing = tf.math.is_inf(scores)
    return Found(tf.where(missing, NULL_PASSAGE, numbers + base), scores)
