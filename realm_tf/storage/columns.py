"""Columns of a table in few large arrays: strings, lists of integers, and values of one size.

A column has one or more chunks, for example the record batches of `storage.arrow_files`. Chunks are
never joined unless a method says so, so a column may be larger than memory if its arrays are mapped
files.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from realm_tf.errors import ArtifactError

if TYPE_CHECKING:
  import tensorflow as tf

# A chunk costs about as much as this many rows; see `Ragged.take`.
_ROWS_PER_CHUNK = 64
_AGAIN = "Delete its folder and make it again."


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
  """Rows of different lengths in one flat array: row i is `values[splits[i]:splits[i + 1]]`.

  Attributes:
    values: [V] elements of all rows, or UTF-8 bytes.
    splits: [N + 1] integers, not descending.
  """

  values: np.ndarray
  splits: np.ndarray

  def __len__(self) -> int:
    return len(self.splits) - 1

  def take(self, rows: np.ndarray) -> "Chunk":
    """Copies rows ([N] int)."""
    starts = self.splits[rows].astype(np.int64)
    sizes = self.splits[rows + 1] - starts
    if len(rows) and (
      starts.min() < 0 or sizes.min() < 0 or (starts + sizes).max() > len(self.values)
    ):
      raise ArtifactError(f"a record file has offsets outside of its data. {_AGAIN}")
    splits = splits_of(sizes)
    at = np.arange(splits[-1]) + np.repeat(starts - splits[:-1], sizes)
    return Chunk(self.values[at], splits)


def _healthy() -> None:
  """Raises nothing: the check of a column that is not from a file."""


class _Column:
  """The chunks of a column, and where each begins.

  Args:
    chunks: one or more chunks, in order.
    check: raises ArtifactError if the column's files have turned out to be damaged. It is called
      whenever rows are read.
  """

  def __init__(self, chunks: Iterable, check: Callable[[], None] = _healthy):
    self.chunks = list(chunks)
    self._check = check
    self._starts = splits_of([len(chunk) for chunk in self.chunks])
    self._firsts = self._starts.tolist()  # for looking up one row

  def __len__(self) -> int:
    return self._firsts[-1]

  def _place(self, row: int | np.integer) -> tuple:
    """Returns the chunk of a row, and the row's number there. Counts from the end if negative."""
    self._check()
    number = range(len(self))[row]  # raises IndexError
    chunk = bisect.bisect_right(self._firsts, number) - 1
    return self.chunks[chunk], number - self._firsts[chunk]

  def _cut(self, rows: slice) -> Iterator[tuple]:
    """Yields each chunk that has some of these rows, and their range [first, last) there."""
    self._check()
    start, stop, step = rows.indices(len(self))
    if step != 1:
      raise ValueError(f"got a slice with step {step}; wanted step 1.")
    for chunk, first in zip(self.chunks, self._firsts, strict=False):
      low, high = max(start - first, 0), min(stop - first, len(chunk))
      if low < high:
        yield chunk, low, high


class Texts(_Column, Sequence[str]):
  """Strings; the values of a `Chunk` are UTF-8 bytes.

  As Python objects they would take about twice the memory.
  """

  @overload
  def __getitem__(self, row: int | np.integer) -> str: ...

  @overload
  def __getitem__(self, row: slice) -> list[str]: ...

  def __getitem__(self, row):
    if isinstance(row, slice):
      return [text for part in self._cut(row) for text in _decoded(*part)]
    chunk, at = self._place(row)
    return next(_decoded(chunk, at, at + 1))

  def __iter__(self) -> Iterator[str]:
    for chunk in self.chunks:
      self._check()
      yield from _decoded(chunk, 0, len(chunk))


def _decoded(chunk: Chunk, first: int, last: int) -> Iterator[str]:
  """Yields the strings [first, last) of a chunk."""
  data = chunk.values.data
  for start, end in itertools.pairwise(chunk.splits[first : last + 1].tolist()):
    try:
      yield str(data[start:end], "utf-8")
    except UnicodeDecodeError as error:
      raise ArtifactError(f"a record file has text that is not UTF-8. {_AGAIN}") from error


class Fixed(_Column):
  """Values of one size: the chunks are arrays [n], or [n, bytes] uint8."""

  def __getitem__(self, rows: slice) -> np.ndarray:
    """Copies a range of rows."""
    return np.concatenate([self.chunks[0][:0], *(part[a:b] for part, a, b in self._cut(rows))])

  def joined(self) -> np.ndarray:
    """Copies all rows."""
    return self[:]


class Ragged(_Column):
  """Lists of integers. A row of 16-bit integers is read as 32-bit integers."""

  @classmethod
  def of(cls, rows: Iterable[Sequence[int] | np.ndarray], dtype) -> "Ragged":
    """Copies lists of integers."""
    arrays = [np.asarray(row, dtype) for row in rows]
    values = np.concatenate([np.zeros([0], dtype), *arrays])
    return cls([Chunk(values, splits_of([len(row) for row in arrays]))])

  @overload
  def __getitem__(self, row: int | np.integer) -> np.ndarray: ...

  @overload
  def __getitem__(self, row: slice) -> "Ragged": ...

  def __getitem__(self, row):
    if isinstance(row, slice):
      parts = [
        Chunk(chunk.values, chunk.splits[low : high + 1]) for chunk, low, high in self._cut(row)
      ]
      return Ragged(parts or [_no_rows(self.chunks[0])], self._check)
    chunk, at = self._place(row)
    values = chunk.values[chunk.splits[at] : chunk.splits[at + 1]]
    return values.astype(np.promote_types(values.dtype, np.int32), copy=False)

  def __iter__(self) -> Iterator[np.ndarray]:
    return (self[row] for row in range(len(self)))

  @property
  def values(self) -> np.ndarray:
    """Elements of all rows, [V]. Copied if there are several chunks."""
    self._check()
    return _joined([chunk.values[chunk.splits[0] : chunk.splits[-1]] for chunk in self.chunks])

  @property
  def splits(self) -> np.ndarray:
    """Where each row begins in `values`, and its end: [N + 1] int64. Copied unless it is that."""
    if len(self.chunks) == 1 and self.chunks[0].splits[0] == 0:
      return self.chunks[0].splits.astype(np.int64, copy=False)
    return splits_of(self.sizes())

  def sizes(self) -> np.ndarray:
    """Returns the number of elements of each row, [N]."""
    return _joined([np.diff(chunk.splits) for chunk in self.chunks])

  def take(self, rows) -> "Ragged":
    """Copies rows ([N] int)."""
    rows = np.asarray(rows, np.int64)
    self._check()
    if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
      raise IndexError(f"got rows {rows.min()} to {rows.max()}; there are {len(self)}.")
    if len(self.chunks) == 1:
      return Ragged([self.chunks[0].take(rows)])
    chunks = np.searchsorted(self._starts, rows, side="right") - 1
    at = rows - self._starts[chunks]
    if len(rows) < _ROWS_PER_CHUNK * len(self.chunks):
      return self._take_one_by_one(chunks, at)
    return self._take_by_chunk(chunks, at)

  def _take_one_by_one(self, chunks: np.ndarray, at: np.ndarray) -> "Ragged":
    """Copies some rows of chunks."""
    parts = [self.chunks[0].values[:0]]
    for number, row in zip(chunks.tolist(), at.tolist(), strict=True):
      chunk = self.chunks[number]
      parts.append(chunk.values[chunk.splits[row] : chunk.splits[row + 1]])
    return Ragged([Chunk(np.concatenate(parts), splits_of(list(map(len, parts[1:]))))])

  def _take_by_chunk(self, chunks: np.ndarray, at: np.ndarray) -> "Ragged":
    """Copies many rows of chunks."""
    order = np.argsort(chunks, kind="stable")
    bounds = np.searchsorted(chunks[order], np.arange(len(self.chunks) + 1))
    taken = Ragged(
      chunk.take(at[order[start:end]])
      for chunk, (start, end) in zip(self.chunks, itertools.pairwise(bounds), strict=True)
    )
    joined = Ragged([Chunk(taken.values, taken.splits)])
    in_order = np.array_equal(order, np.arange(len(order)))
    return joined if in_order else joined.take(np.argsort(order))

  def tensor(self) -> "tf.RaggedTensor":
    """Returns all rows as a ragged int32 tensor."""
    import tensorflow as tf  # the only use of it here

    return tf.RaggedTensor.from_row_splits(
      self.values.astype(np.int32), self.splits, validate=False
    )

  def gather(self, rows) -> "tf.RaggedTensor":
    """Returns rows ([N] int) as a ragged int32 tensor [N, None]."""
    return self.take(rows).tensor()


class Picked(Sequence[np.ndarray]):
  """Some rows of a column, which are not copied.

  Args:
    column: the column.
    rows: [N] their numbers.
  """

  def __init__(self, column: Ragged, rows: np.ndarray):
    self._column, self._rows = column, rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, row):
    return self._column[self._rows[row]]


def _no_rows(chunk: Chunk) -> Chunk:
  return Chunk(chunk.values[:0], chunk.splits[:1])


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
  """Joins one or more arrays; copies nothing if there is one."""
  return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def splits_of(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
  """Returns where rows of these sizes begin, and where the last one ends: [N + 1] int64."""
  return np.concatenate([np.zeros([1], np.int64), np.cumsum(sizes, dtype=np.int64)])
