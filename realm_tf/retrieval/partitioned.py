"""Maximum inner product search over partitions, with TensorFlow's own ops only.

An inverted file: the rows of a partition are contiguous and take one or two bytes a number. A
search reads the most promising partitions, and computes exact scores of the best rows. Any
TensorFlow, a stock TensorFlow Serving included, can run it.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from realm_tf.retrieval import approximate
from realm_tf.retrieval.approximate import ApproximateSearcher, Width
from realm_tf.retrieval.exact import SCORES_AT_ONCE
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import array_files, artifacts

# numbers of candidates to score exactly that are tried, per requested passage
_REORDER_TIMES = (2, 3, 5, 10)
_AGAIN = "Delete the index and make it again."
_TRAINING_STEPS = 10  # of k-means; more hardly move the centres
_MEASURED_AT_ONCE = 256  # queries; they share the reading of partitions
_ROWS_AT_ONCE = 1 << 16  # rows
_KEPT_AT_ONCE = 1 << 24  # approximate scores that are kept while partitions are read


class Partitions(NamedTuple):
  """Partitions of N embeddings of D dimensions. One file of the index folder each.

  Attributes:
    centres: [P, D] float32, the mean embedding of each partition.
    spreads: [P] float32, the root mean square distance from the centre, per dimension.
    splits: [P + 1] int32; partition p has rows splits[p] to splits[p + 1] - 1.
    numbers: [N] int32, the passage of each row; ascending within a partition.
    rows: [N, D] int8 or bfloat16; times `scales`, close to the embedding.
    scales: [N] float32; empty for bfloat16 rows, which need none.
  """

  centres: np.ndarray
  spreads: np.ndarray
  splits: np.ndarray
  numbers: np.ndarray
  rows: np.ndarray
  scales: np.ndarray


class PartitionedSearcher(ApproximateSearcher):
  """Searches an inverted file.

  Memory for 13.35 million passages of 128 dimensions: the partitions take 1.8 GB with int8 rows,
  and 3.5 GB with bfloat16 rows. The embeddings, from which the scores of the best candidates are
  computed, take 6.8 GB more, or half of that in float16 or bfloat16.

  Args:
    embeddings: see `ApproximateSearcher`.
    partitions: the partitions; None if every passage is scored exactly.
    settings: see `ApproximateSearcher`.
  """

  kind = "partitioned"

  def __init__(self, embeddings: np.ndarray, partitions: Partitions | None, **settings):
    super().__init__(embeddings, **settings)
    with tf.device("CPU"):
      # variables: a SavedModel's graph cannot hold gigabytes
      self.partitions = partitions and {
        name: tf.Variable(values, trainable=False) for name, values in partitions._asdict().items()
      }

  @classmethod
  def build(
    cls, embeddings: np.ndarray, config: IndexConfig, queries: np.ndarray | None = None
  ) -> "PartitionedSearcher":
    num_rows = len(embeddings)
    if num_rows < approximate.MIN_ROWS:
      return cls(embeddings, None, num_leaves=0, widths=(), num_queries=0)
    num_leaves = approximate.num_leaves_of(config, num_rows)
    searcher = cls(
      embeddings,
      divide(embeddings, num_leaves, row_type=config.row_type),
      num_leaves=num_leaves,
      widths=(),
      num_queries=0 if queries is None else len(queries),
    )
    searcher.widths = approximate.choose_widths(
      approximate.samples(embeddings, queries),
      searcher.scores_of,
      config,
      num_rows=num_rows,
      num_leaves=num_leaves,
      reorder_times=_REORDER_TIMES,
    )
    return searcher

  def save(self, folder: str) -> None:
    artifacts.gfile.makedirs(folder)
    for name, variable in (self.partitions or {}).items():
      array_files.write(os.path.join(folder, f"{name}.npy"), variable.numpy())

  @classmethod
  def load(
    cls, folder: str, embeddings: np.ndarray, *, widths: Sequence[dict], **settings
  ) -> "PartitionedSearcher":
    partitions = None
    if settings["num_leaves"]:
      files = {name: os.path.join(folder, f"{name}.npy") for name in Partitions._fields}
      partitions = Partitions(
        **{name: array_files.read(path, advice=_AGAIN) for name, path in files.items()}
      )
    return cls(embeddings, partitions, widths=[Width(**width) for width in widths], **settings)

  def scores_of(self, queries: np.ndarray, num: int, leaves: int, reorder: int) -> np.ndarray:
    """Returns the scores [Q, num] float32 of a search of some width."""
    parts = [
      self._search(
        tf.constant(queries[start : start + _MEASURED_AT_ONCE]),
        *map(tf.constant, (num, leaves, reorder)),
      )[1].numpy()
      for start in range(0, len(queries), _MEASURED_AT_ONCE)
    ]
    return np.concatenate(parts)

  @tf.function(autograph=False, reduce_retracing=True)
  def _search(self, queries, num, leaves, reorder):
    kept = tf.cast(leaves, tf.int64) * tf.cast(reorder, tf.int64)  # for a query, at most
    block = tf.cast(tf.maximum(_KEPT_AT_ONCE // tf.minimum(kept, self.num_rows), 1), tf.int32)

    def search_block(start, numbers, scores):
      part = queries[start : start + block]
      found = self.best(part, self._candidates(part, leaves, reorder), num)
      return (
        start + block,
        tf.concat([numbers, found.numbers], axis=0),
        tf.concat([scores, found.scores], axis=0),
      )

    with tf.device("CPU"):
      _, numbers, scores = tf.while_loop(
        lambda start, *_: start < tf.shape(queries)[0],
        search_block,
        (tf.constant(0), tf.zeros([0, num], tf.int32), tf.zeros([0, num], tf.float32)),
        parallel_iterations=1,
        shape_invariants=(
          tf.TensorShape([]),
          tf.TensorShape([None, None]),
          tf.TensorShape([None, None]),
        ),
      )
    return numbers, scores

  def _candidates(self, queries, leaves, reorder):
    """Returns the `reorder` passages with the best approximate scores: [B, R] int32.

    They are ascending; places where none was found have `num_rows`.
    """
    splits = self.partitions["splits"].read_value()
    promising = tf.math.top_k(self._promise(queries), leaves).indices  # [B, leaves]
    # A visit is a query in a partition. A partition is read once, for all of its visits.
    leaf_of_visit = tf.reshape(promising, [-1])  # [V], query by query
    by_leaf = tf.argsort(leaf_of_visit, stable=True)  # [V]
    visited, _, counts = tf.unique_with_counts(tf.gather(leaf_of_visit, by_leaf))
    limits = tf.cumsum(counts)

    def read(i, scores, rows):
      readers = by_leaf[limits[i] - counts[i] : limits[i]] // leaves
      start, end = splits[visited[i]], splits[visited[i] + 1]
      approximate_scores = self._approximate(tf.gather(queries, readers), start, end)
      best = tf.math.top_k(approximate_scores, tf.minimum(end - start, reorder), sorted=False)
      return (
        i + 1,
        scores.write(i, tf.reshape(best.values, [-1])),
        rows.write(i, tf.reshape(best.indices + start, [-1])),
      )

    _, scores, rows = tf.while_loop(
      lambda i, *_: i < tf.size(visited),
      read,
      (tf.constant(0), _lists(tf.float32, visited), _lists(tf.int32, visited)),
    )
    kept = tf.minimum(tf.gather(splits[1:] - splits[:-1], leaf_of_visit), reorder)  # [V]
    ends = tf.gather(tf.cumsum(tf.gather(kept, by_leaf)), tf.math.invert_permutation(by_leaf))
    order = tf.ragged.range(ends - kept, ends).values  # from partition by partition, to by query
    sizes = tf.reduce_sum(tf.reshape(kept, tf.shape(promising)), axis=1)
    all_scores = _table(tf.gather(scores.concat(), order), sizes, -np.inf)  # [B, M]
    all_rows = _table(tf.gather(rows.concat(), order), sizes, 0)
    best = tf.math.top_k(all_scores, tf.minimum(reorder, tf.shape(all_scores)[1]))
    numbers = tf.gather(
      self.partitions["numbers"].read_value(), tf.gather(all_rows, best.indices, batch_dims=1)
    )
    return tf.sort(tf.where(tf.math.is_inf(best.values), self.num_rows, numbers), axis=1)

  def _promise(self, queries):
    """Returns scores [B, P] for choosing partitions: what one of their best rows may reach.

    The scores of a partition's rows have the mean q . centre, and a standard deviation of about
    |q| spread. A good row is two of these above the mean.
    """
    means = tf.matmul(queries, self.partitions["centres"].read_value(), transpose_b=True)
    return means + 2 * tf.norm(queries, axis=1, keepdims=True) * self.partitions["spreads"]

  def _approximate(self, queries, start, end):
    """Returns approximate scores [B, end - start] of rows."""
    rows = self.partitions["rows"].read_value()[start:end]  # no copy: a slice of whole rows
    # not a product in bfloat16: for every new size of partition, it is compiled anew
    scores = tf.matmul(queries, tf.cast(rows, tf.float32), transpose_b=True)
    if rows.dtype == tf.int8:
      scores *= self.partitions["scales"].read_value()[start:end]
    return scores


def _lists(dtype: tf.DType, like: tf.Tensor) -> tf.TensorArray:
  """Returns an array for vectors of any size, one for each element of `like`."""
  return tf.TensorArray(dtype, tf.size(like), infer_shape=False, element_shape=[None])


def _table(values: tf.Tensor, sizes: tf.Tensor, missing: float) -> tf.Tensor:
  """Returns rows of these sizes, padded to the longest."""
  return tf.RaggedTensor.from_row_lengths(values, sizes, validate=False).to_tensor(missing)


# ----------------------------------------------------------------------------------- the partitions


def divide(embeddings: np.ndarray, num_leaves: int, *, row_type: str) -> Partitions:
  """Divides embeddings by direction: spherical k-means.

  Plain k-means gathers many rows around the origin in a few huge partitions, whose centres say
  little. By direction, the sizes of partitions are within a factor of two or three.

  Args:
    embeddings: [N, D] float32, float16 or bfloat16.
    num_leaves: number of partitions.
    row_type: "int8" or "bfloat16".
  """
  leaf_of_row = _nearest(embeddings, _directions(embeddings, num_leaves))
  centres, spreads = _moments(embeddings, leaf_of_row, num_leaves)
  numbers = np.argsort(leaf_of_row, kind="stable").astype(np.int32)
  ends = np.cumsum(np.bincount(leaf_of_row, minlength=num_leaves))
  rows, scales = _coded(embeddings, numbers, row_type)
  return Partitions(
    centres=centres,
    spreads=spreads,
    splits=np.append(0, ends).astype(np.int32),
    numbers=numbers,
    rows=rows,
    scales=scales,
  )


def _directions(embeddings: np.ndarray, num_leaves: int) -> np.ndarray:
  """Returns the directions of spherical k-means, [P, D] of length 1, from a sample of the rows."""
  rng = np.random.default_rng(0)
  num_rows = min(len(embeddings), max(approximate.SAMPLE_ROWS, num_leaves))
  sample = embeddings[np.sort(rng.choice(len(embeddings), num_rows, replace=False))]
  sample = _unit(np.asarray(sample, np.float32))
  directions = sample[rng.choice(num_rows, num_leaves, replace=False)]
  for _ in range(_TRAINING_STEPS):
    leaf_of_row = _nearest(sample, directions)
    sums = tf.math.unsorted_segment_sum(sample, leaf_of_row, num_leaves).numpy()
    empty = np.bincount(leaf_of_row, minlength=num_leaves) == 0  # keeps its direction
    directions = _unit(np.where(empty[:, np.newaxis], directions, sums))
  return directions


def _moments(
  embeddings: np.ndarray, leaf_of_row: np.ndarray, num_leaves: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the centres and spreads of `Partitions`."""
  sums = np.zeros([num_leaves, embeddings.shape[1]])
  squares = np.zeros(num_leaves)
  for start in range(0, len(embeddings), _ROWS_AT_ONCE):
    part = slice(start, start + _ROWS_AT_ONCE)
    vectors, leaves = np.asarray(embeddings[part], np.float32), leaf_of_row[part]
    sums += tf.math.unsorted_segment_sum(vectors, leaves, num_leaves).numpy()
    squares += np.bincount(leaves, np.square(vectors).sum(axis=1), minlength=num_leaves)
  sizes = np.maximum(np.bincount(leaf_of_row, minlength=num_leaves), 1)
  centres = sums / sizes[:, np.newaxis]
  variances = (squares / sizes - np.square(centres).sum(axis=1)) / embeddings.shape[1]
  spreads = np.sqrt(np.maximum(variances, 0))
  return centres.astype(np.float32), spreads.astype(np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
  """Returns vectors of length 1 in the same directions; 0 stays 0."""
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
  """Returns the centre that is nearest by angle to each vector: [N] int32."""
  nearest = np.empty(len(vectors), np.int32)
  block = max(SCORES_AT_ONCE // len(centres), 1)
  for start in range(0, len(vectors), block):
    part = np.asarray(vectors[start : start + block], np.float32)
    scores = tf.matmul(part, centres, transpose_b=True)
    nearest[start : start + block] = tf.argmax(scores, axis=1, output_type=tf.int32)
  return nearest


def _coded(
  embeddings: np.ndarray, numbers: np.ndarray, row_type: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the rows of `Partitions`, in the order of `numbers`, and their scales."""
  if row_type == "bfloat16":
    rows = np.empty(embeddings.shape, tf.bfloat16.as_numpy_dtype)
    scales = np.empty([0], np.float32)
  else:
    rows = np.empty(embeddings.shape, np.int8)
    scales = np.empty([len(rows)], np.float32)
  for start in range(0, len(rows), _ROWS_AT_ONCE):
    part = slice(start, start + _ROWS_AT_ONCE)
    vectors = np.asarray(embeddings[numbers[part]], np.float32)
    if row_type == "int8":
      scales[part] = np.maximum(np.abs(vectors).max(axis=1), 1e-30) / 127
      vectors = np.rint(vectors / scales[part, np.newaxis])
    rows[part] = vectors
  return rows, scales
