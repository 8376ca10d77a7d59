"""Columns in Arrow IPC files, which pandas, Polars and Hugging Face datasets also open.

The columns are not compressed, so that they can be used where they are mapped. A record batch has
at most 65,536 rows, and no column of it more than 2**30 elements, so that 32 bits hold all offsets.
"""

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from realm_tf.errors import ArtifactError
from realm_tf.storage import mapped_files
from realm_tf.storage.columns import Chunk, Fixed, Ragged, Texts, splits_of

ROWS_PER_BATCH = 1 << 16
_MOST_ELEMENTS = 1 << 30  # of one column of a record batch
_DTYPES = {pa.uint16(): np.uint16, pa.int32(): np.int32, pa.int64(): np.int64}
_INTEGERS = tuple(_DTYPES)  # from the narrowest

Columns = dict[str, Any]  # name -> Texts, Ragged or Fixed


# ------------------------------------------------------------------------------------------ writing


def write(path: str, schema: pa.Schema, parts: Iterable[Mapping[str, Sequence]]) -> int:
  """Writes columns as one file. Its bytes depend only on the schema and the rows.

  Args:
    path: where to write. The caller makes sure that the file appears whole.
    schema: names of the columns and their least types: string, binary of one size, integer, or list
      of integers. An integer type is widened (uint16, int32, int64) to hold all values of the file.
    parts: the next rows: name -> their values.

  Returns:
    The number of rows.
  """
  columns = [_Written(field) for field in schema]
  for part in parts:
    for column in columns:
      column.add(part[column.name])
  for column in columns:
    column.join()
  types = pa.schema([pa.field(column.name, column.type, nullable=False) for column in columns])
  num_rows = columns[0].num_rows
  with tf.io.gfile.GFile(path, "wb") as file, pa.ipc.new_file(_Sink(file), types) as writer:
    start = 0
    while start < num_rows:
      end = min(start + ROWS_PER_BATCH, *(column.room(start) for column in columns))
      arrays = [column.array(start, end) for column in columns]
      writer.write_batch(pa.record_batch(arrays, schema=types))
      start = end
  return num_rows


class _Sink(io.RawIOBase):
  """Gives Arrow a file of TensorFlow's to write to."""

  def __init__(self, file: tf.io.gfile.GFile):
    self._file = file

  def writable(self) -> bool:
    return True

  def write(self, data) -> int:
    self._file.write(bytes(data))
    return len(data)


class _Written:
  """A column that is being written.

  Args:
    field: name and least type of the column.

  Attributes:
    type: type of the column; after `join`, it holds all values.
    num_rows: number of rows; known after `join`.
  """

  def __init__(self, field: pa.Field):
    self.name, self.type, self.num_rows = field.name, field.type, 0
    self._is_bytes = pa.types.is_string(field.type) or pa.types.is_fixed_size_binary(field.type)
    self._varies = pa.types.is_string(field.type) or pa.types.is_list(field.type)  # in size
    self._parts: list[np.ndarray] = []
    self._sizes: list[np.ndarray] = []

  def add(self, rows: Sequence) -> None:
    """Copies the next rows."""
    if pa.types.is_string(self.type):
      rows = [row.encode() for row in rows]
    if self._is_bytes:
      self._parts.append(np.frombuffer(b"".join(rows), np.uint8))
    else:
      values = itertools.chain.from_iterable(rows) if self._varies else rows
      self._parts.append(_narrow(np.fromiter(values, np.int64)))
    if self._varies:
      self._sizes.append(np.fromiter(map(len, rows), np.int64, len(rows)))
    self.num_rows += len(rows)

  def join(self) -> None:
    """Joins the parts, after the last row; widens the type to hold all values."""
    integer = self.type.value_type if pa.types.is_list(self.type) else self.type
    dtype = np.uint8 if self._is_bytes else _DTYPES[integer]
    self._values = np.concatenate([np.zeros([0], dtype), *self._parts])
    self._parts.clear()
    if self._varies:
      self._splits = splits_of(np.concatenate([np.zeros([0], np.int64), *self._sizes]))
    if not self._is_bytes:
      found = pa.from_numpy_dtype(self._values.dtype)
      self.type = pa.list_(found) if pa.types.is_list(self.type) else found

  def room(self, start: int) -> int:
    """Returns where a record batch ends, at the latest, that begins with row `start`."""
    if not self._varies:
      return self.num_rows
    end = np.searchsorted(self._splits, self._splits[start] + _MOST_ELEMENTS, side="right") - 1
    return max(int(end), start + 1)

  def array(self, start: int, end: int) -> pa.Array:
    """Returns the rows [start, end)."""
    if not self._varies:
      size = self.type.byte_width // self._values.itemsize
      return _array(self.type, end - start, self._values[start * size : end * size])
    splits = self._splits[start : end + 1]
    offsets = pa.py_buffer((splits - splits[0]).astype(np.int32))
    values = self._values[splits[0] : splits[-1]]
    if pa.types.is_string(self.type):
      return _array(self.type, end - start, values, offsets)
    return pa.Array.from_buffers(
      self.type,
      end - start,
      [None, offsets],
      children=[_array(self.type.value_type, len(values), values)],
    )


def _array(type_: pa.DataType, num_rows: int, values: np.ndarray, *offsets: pa.Buffer) -> pa.Array:
  return pa.Array.from_buffers(type_, num_rows, [None, *offsets, pa.py_buffer(values)])


def _narrow(values: np.ndarray) -> np.ndarray:
  """Returns integers as the narrowest of `_INTEGERS` that holds all of them."""
  least, most = values.min(initial=0), values.max(initial=0)
  for dtype in (np.uint16, np.int32):
    if np.iinfo(dtype).min <= least and most <= np.iinfo(dtype).max:
      return values.astype(dtype)
  return values


# ------------------------------------------------------------------------------------------ reading


def open_columns(files: Sequence[str], schema: pa.Schema, *, keep: bool = False) -> Columns:
  """Opens columns of some files of one folder, without copying them.

  Only headers are read here, and what the check of the files' digests reads.

  Args:
    files: paths of the files, in the order of their rows.
    schema: the columns wanted and their least types, as in `write`. Others are left out.
    keep: see `mapped_files.open_all`.

  Returns:
    Name -> column. Their chunks are the record batches.

  Raises:
    ArtifactError: if a file is missing or damaged, or has no such columns.
  """
  contents, check = mapped_files.open_all(files, keep=keep)
  chunks: dict[str, list] = {field.name: [] for field in schema}
  for path, buffer in zip(files, contents, strict=True):
    try:
      for batch in _batches(buffer, schema):
        for name in chunks:
          chunks[name].append(_chunk(batch.column(name)))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
      raise ArtifactError(
        f"{path!r} is not an Arrow file with the columns {', '.join(schema.names)} "
        f"({_one_line(error)}). Delete its folder and make it again."
      ) from None
  columns: Columns = {}
  for field in schema:
    kind = (
      Texts if pa.types.is_string(field.type) else Ragged if pa.types.is_list(field.type) else Fixed
    )
    columns[field.name] = kind(chunks[field.name] or [_chunk(pa.array([], field.type))], check)
  return columns


def _batches(buffer: pa.Buffer, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
  """Yields the record batches that have rows.

  Arrow checks that each buffer is inside the file and is large enough for its rows. NumPy checks
  the offsets of rows when they are read.
  """
  reader = pa.ipc.open_file(buffer)
  for field in schema:
    found = reader.schema.field(field.name).type
    if not _holds(found, field.type):
      raise ValueError(f"{field.name} is {found}, wanted {field.type} or wider")
  for number in range(reader.num_record_batches):
    batch = reader.get_batch(number)
    batch.validate()
    if batch.num_rows:
      yield batch


def _holds(found: pa.DataType, least: pa.DataType) -> bool:
  """Returns whether a type is the least type or a wider one."""
  if pa.types.is_list(found) and pa.types.is_list(least):
    found, least = found.value_type, least.value_type
  if found in _INTEGERS and least in _INTEGERS:
    return _INTEGERS.index(found) >= _INTEGERS.index(least)
  return found.equals(least)


def _chunk(array: pa.Array) -> Chunk | np.ndarray:
  """Returns the buffers of a column of a record batch as arrays, which are not copied."""
  num = len(array)
  validity, *buffers = array.buffers()
  if validity is not None or (pa.types.is_list(array.type) and buffers[1] is not None):
    raise ValueError("a value is missing")
  if pa.types.is_string(array.type):
    return _rows(buffers[0], _view(buffers[1], np.uint8), num)
  if pa.types.is_list(array.type):
    values = _view(buffers[2], _DTYPES[array.type.value_type], len(array.values))
    return _rows(buffers[0], values, num)
  if pa.types.is_fixed_size_binary(array.type):
    width = array.type.byte_width
    return _view(buffers[0], np.uint8, num * width).reshape(num, width)
  return _view(buffers[0], _DTYPES[array.type], num)


def _rows(offsets: pa.Buffer | None, values: np.ndarray, num: int) -> Chunk:
  return Chunk(values, _view(offsets, np.int32, num + 1) if num else np.zeros([1], np.int32))


def _view(buffer: pa.Buffer | None, dtype, num: int = -1) -> np.ndarray:
  """Returns the first `num` values of a buffer, or all."""
  if buffer is None or not buffer.size:
    return np.zeros([0], dtype)
  return np.frombuffer(buffer, dtype, num)


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:200]
