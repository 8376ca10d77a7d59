"""A corpus in segments is searched as one, and deleted passages are never found."""

import numpy as np
import pytest
import tensorflow as tf

from realm_tf.corpus.candidates import NULL_PASSAGE, Found
from realm_tf.errors import UserError
from realm_tf.retrieval.exact import ExactSearcher
from realm_tf.retrieval.segmented import SegmentedSearcher

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=[60, 8]).astype(np.float32)
QUERIES = RNG.normal(size=[5, 8]).astype(np.float32)
SPLITS = {"one segment": [60], "seven": [20, 1, 9, 5, 5, 15, 5], "some of one row": [1] * 8 + [52]}
DELETED = {
  "none": [],
  "some": [0, 19, 20, 33, 59],
  "a whole segment": [*range(20, 30)],
  "nearly all": [*range(2, 60)],
}


def expected(deleted, num):
  """Returns (numbers, scores) of the best rows in float64."""
  scores = QUERIES.astype(np.float64) @ ROWS.T.astype(np.float64)
  scores[:, deleted] = -np.inf
  best = np.argsort(-scores, axis=1, kind="stable")[:, :num]
  return best, np.take_along_axis(scores, best, axis=1)


def searcher(sizes, deleted) -> SegmentedSearcher:
  parts = np.split(ROWS, np.cumsum(sizes)[:-1])
  return SegmentedSearcher([ExactSearcher(part) for part in parts], np.array(deleted, np.int64))


@pytest.mark.parametrize("deleted", DELETED.values(), ids=DELETED)
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_finds_what_one_search_of_the_passages_left_finds(sizes, deleted):
  made = searcher(sizes, deleted)
  assert made.num_rows == 60 - len(deleted)
  num = min(10, made.num_rows)
  numbers, scores = expected(deleted, num)
  for search in (made.search, tf.function(made.search)):
    found = search(tf.constant(QUERIES), num)
    np.testing.assert_array_equal(found.numbers, numbers)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5, atol=1e-5)


def test_equal_scores_in_the_order_of_their_numbers():
  same = [ExactSearcher(np.ones([size, 4], np.float32)) for size in (3, 2, 4)]
  made = SegmentedSearcher(same, np.array([1]))
  numbers = made.search(tf.ones([1, 4]), 6).numbers.numpy()
  assert numbers.tolist() == [[0, 2, 3, 4, 5, 6]]


def test_a_segment_that_finds_too_few_leaves_the_row_short():
  class Narrow(ExactSearcher):
    """Finds its first passage only."""

    def search(self, queries, num):
      found = super().search(queries, self.num_rows)
      order = tf.argsort(found.numbers, axis=1)[:, :num]
      scores = tf.gather(found.scores, order, batch_dims=1)
      first = tf.range(num)[tf.newaxis] == 0
      return Found(tf.where(first, 0, NULL_PASSAGE), tf.where(first, scores, -np.inf))

  made = SegmentedSearcher([Narrow(ROWS[:10]), Narrow(ROWS[10:])], np.zeros([0], np.int64))
  found = made.search(tf.constant(QUERIES[:1]), 3)
  assert sorted(found.numbers.numpy()[0].tolist()) == [NULL_PASSAGE, 0, 10]
  assert np.isneginf(found.scores.numpy()[0]).tolist() == [False, False, True]


def test_asks_for_no_more_than_there_are():
  with pytest.raises(UserError, match="5 candidates asked for, the index has 2 passages"):
    searcher([60], DELETED["nearly all"]).search(tf.constant(QUERIES), 5)
