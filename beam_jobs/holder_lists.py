"""Builds the inverted lists of spans on Beam: which passages hold each span."""

import itertools
import os
from collections.abc import Iterable

import apache_beam as beam
import numpy as np

from realm_tf.corpus import passages
from realm_tf.spans import holders


def union(arrays: Iterable[np.ndarray]) -> np.ndarray:
  """Returns the distinct phrases of some arrays: [P] int64, ascending."""
  return np.unique(np.concatenate([np.zeros([0], np.int64), *arrays]))


class FindHolders(beam.DoFn):
  """(record file of the knowledge's passages, all phrases) -> (bucket, arrays) for each bucket.

  The arrays are [M] phrases and [M] passages that hold them. All phrases are a side input: 13
  million passages have about 20 million phrases, which take 160 MB in each worker process.
  """

  def __init__(self, num_buckets: int):
    self._num_buckets = num_buckets

  def process(self, path: str, phrases: np.ndarray):
    parts = passages.read_columns(path, passages.Passage, ["number", "text"])
    found, numbers = holders.pairs(
      holders.find(phrases, rows["text"], rows["number"]) for rows in parts
    )
    few = np.ones([len(found)], bool)
    most = holders.MAX_HOLDERS + 2  # with this many, a phrase has too many holders already
    few[most:] = found[most:] != found[:-most]
    found, numbers = found[few], numbers[few]
    bounds = np.searchsorted(
      holders.bucket_of(found, self._num_buckets), np.arange(self._num_buckets + 1)
    )
    for bucket, (start, end) in enumerate(itertools.pairwise(bounds)):
      yield bucket, (found[start:end], numbers[start:end])


class WriteHolders(beam.DoFn):
  """(bucket, pairs of arrays) -> (name, counts, description).

  Writes the record file of the bucket's phrases, under the returned name.

  Args:
    folder: where to write.
    num_buckets: the number of files.
    num_own: 1 if the sentences' own passages are among the holders, otherwise 0.
  """

  def __init__(self, folder: str, num_buckets: int, *, num_own: int):
    self._folder, self._num_buckets, self._num_own = folder, num_buckets, num_own

  def process(self, item):
    bucket, parts = item
    phrases, numbers = holders.pairs(parts)
    starts = np.flatnonzero(np.diff(phrases, prepend=holders.NO_PHRASE))
    sizes = np.diff(starts, append=len(phrases))
    kept = sizes <= holders.MAX_HOLDERS + 1
    rows = (
      holders.HeldPhrase(int(phrases[start]), numbers[start : start + size].tolist())
      for start, size in zip(starts[kept], sizes[kept], strict=True)
    )
    name = passages.shard_name(holders.KIND, bucket, self._num_buckets)
    path = os.path.join(self._folder, name)
    described = passages.write_shard(path, rows, holders.HeldPhrase)
    others = sizes - self._num_own
    num_useful = int(np.sum((others >= 1) & (others <= holders.MAX_HOLDERS)))
    yield name, {"phrases_with_holders": num_useful}, described
