"""Exact maximum inner product search.

A searcher is a TensorFlow module. Its `search` works eagerly, in a tf.function and in a SavedModel.
"""

import numpy as np
import tensorflow as tf

from realm_tf.corpus.candidates import Found
from realm_tf.storage import artifacts

SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32
_CAST_AT_ONCE = 1 << 16  # rows that are made float32


def check_num(num: int, num_rows: int) -> None:
  """Checks how many passages are requested.

  Raises:
    UserError: more passages are requested than the index has.
  """
  if not 0 < num <= num_rows:
    raise artifacts.UserError(
      f"{num} candidates asked for, the index has {num_rows} passages. Ask for fewer, or index "
      "more passages."
    )


class ExactSearcher(tf.Module):
  """Scores every passage, a block of rows at a time to bound memory.

  Args:
    embeddings: [N, D] float32, float16 or bfloat16. Products are computed in float32.
  """

  def __init__(self, embeddings: np.ndarray):
    super().__init__()
    # a variable: a SavedModel's graph cannot hold gigabytes
    self.embeddings = tf.Variable(embeddings, trainable=False)
    self.num_rows = len(embeddings)

  def describe(self, num: int) -> str:
    """Describes a search for `num` passages."""
    del num
    return "exact"

  def search(self, queries: tf.Tensor, num: int) -> Found:
    """Returns the `num` passages with the highest inner product with each query.

    Among equal scores the lower number comes first.

    Args:
      queries: [B, D] float32.
      num: at most the number of passages.

    Raises:
      UserError: more passages are requested than the index has.
    """
    check_num(num, self.num_rows)
    return self._search(queries, num)

  @tf.function(autograph=False, reduce_retracing=True)
  def _search(self, queries, num):
    batch = tf.shape(queries)[0]
    block = SCORES_AT_ONCE // tf.maximum(batch, 1)
    if self.embeddings.dtype != tf.float32:
      block = tf.minimum(block, _CAST_AT_ONCE)
    block = tf.maximum(block, num)

    def search_block(start, numbers, scores):
      rows = self.embeddings[start : start + block]  # no copy: a slice of whole rows
      rows = tf.cast(rows, tf.float32)  # a copy, if they are of another type
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
    return Found(tf.ensure_shape(numbers, [None, num]), tf.ensure_shape(scores, [None, num]))
