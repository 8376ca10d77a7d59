"""Segments, the immutable parts of a corpus, and the passages that were deleted from it.

A corpus can be added to and deleted from without touching what it has: new passages make a new
segment, and the numbers of deleted ones are listed in a file. So a passage keeps its number, and an
index needs work for the new segments only.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from realm_tf.storage import artifacts, integrity, paths

DELETED = "deleted.npy"  # of passages and indexes


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How many passages a record file has, and how many a segment, except for the last ones."""

  shard: int = 10_000
  segment: int = 1_000_000

  def num_shards(self, num_rows: int, segment: int) -> int:
    """Returns the number of record files of a segment (from 0), of `num_rows` new passages."""
    return -(-min(self.segment, num_rows - segment * self.segment) // self.shard)

  def shards(self, num_rows: int) -> Iterator[tuple[int, int, int]]:
    """Yields (segment, number in the segment, size) of each record file of `num_rows` passages.

    Segments and record files are numbered from 0.
    """
    for start in range(0, num_rows, self.segment):
      end = min(start + self.segment, num_rows)
      for shard, first in enumerate(range(start, end, self.shard)):
        yield start // self.segment, shard, min(self.shard, end - first)


@dataclasses.dataclass(frozen=True)
class Segment:
  """An immutable part of a corpus.

  Attributes:
    number: its number in the names of its files. Segments are in the order of their numbers.
    paths: its record files, in row order.
    fingerprint: identifies its content.
  """

  number: int
  paths: Sequence[str]
  fingerprint: str


def number_of(path: str) -> int:
  """Returns the number of the segment in the name of a file; 0 if it has none."""
  found = re.fullmatch(r"[a-z]+-(\d+)-\d+-of-\d+\..*", os.path.basename(path))
  return int(found[1]) if found else 0


def grouped(folder: str, shards: Sequence[str]) -> list[Segment]:
  """Returns the segments of a complete folder.

  Args:
    folder: a passages folder.
    shards: its record files, in row order.
  """
  files = artifacts.read_info(folder)["files"]
  found = []
  for number, group in itertools.groupby(shards, number_of):
    paths_ = list(group)
    digests = [files[os.path.basename(path)]["sha256"] for path in paths_]
    found.append(Segment(number, paths_, artifacts.fingerprint_of(digests)))
  return found


def write_deleted(folder: str, numbers: np.ndarray) -> None:
  """Writes the sorted numbers of the passages that were deleted from a corpus."""
  with paths.whole(os.path.join(folder, DELETED)) as partial:
    with artifacts.gfile.GFile(partial, "wb") as file:
      np.save(file, np.asarray(numbers, np.int64), allow_pickle=False)


def read_deleted(folder: str) -> np.ndarray:
  """Returns the sorted numbers of the deleted passages of a complete folder: [M] int64.

  The folder has passages or an index of them.

  Raises:
    ArtifactError: if the file is not as it was published.
  """
  if DELETED not in artifacts.read_info(folder)["files"]:
    return np.zeros([0], np.int64)
  integrity.check_digests(folder, [DELETED])
  with artifacts.gfile.GFile(os.path.join(folder, DELETED), "rb") as file:
    return np.load(file, allow_pickle=False)
