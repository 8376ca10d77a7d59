"""Reads the rows of tables in Parquet and Arrow, a few at a time.

A table has the columns `title` and `text`, and perhaps `id` and `url`; others are not read. Groups
of rows (Parquet's row groups, Arrow's record batches) can be read by different workers.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from beam_jobs import documents
from beam_jobs.documents import Document, Numbered
from beam_jobs.sources import Chunk
from realm_tf.storage import json_lines
from realm_tf.storage.json_lines import BadRecord

_BATCH_ROWS = 16  # held in memory at a time
_BUFFER_BYTES = 1 << 20  # read from a column at a time
_BROKEN = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, MemoryError)


class _Table(NamedTuple):
  """An open table.

  Attributes:
    num_groups: how many groups of rows it has.
    batches: reads a group.
    columns: the columns to read.
  """

  num_groups: int
  batches: Callable[[int], Iterator[pa.RecordBatch]]
  columns: list[str]


def parquet(file: BinaryIO, chunk: Chunk) -> Iterator[Numbered]:
  """Yields the documents in those row groups of a Parquet file that belong to the chunk."""
  return _rows(file, chunk, _open_parquet)


def arrow(file: BinaryIO, chunk: Chunk) -> Iterator[Numbered]:
  """Yields the documents in those record batches of an Arrow file that belong to the chunk."""
  return _rows(file, chunk, _open_arrow)


def arrow_stream(file: BinaryIO, chunk: Chunk) -> Iterator[Numbered]:
  """Yields the documents of an Arrow stream, which can only be read from its beginning."""
  return _rows(file, chunk, _open_arrow_stream)


def _open_parquet(file: pa.PythonFile) -> _Table:
  opened = pq.ParquetFile(
    file, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
  )
  columns = _columns(opened.schema_arrow)

  def batches(group: int) -> Iterator[pa.RecordBatch]:
    return opened.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)

  return _Table(opened.num_row_groups, batches, columns)


def _open_arrow(file: pa.PythonFile) -> _Table:
  schema = pa.ipc.open_file(file).schema
  columns = _columns(schema)
  file.seek(0)
  opened = pa.ipc.open_file(file, options=_options(schema, columns))
  return _Table(opened.num_record_batches, lambda group: iter([opened.get_batch(group)]), columns)


def _open_arrow_stream(file: pa.PythonFile) -> _Table:
  opened = pa.ipc.open_stream(file)
  return _Table(1, lambda _: iter(opened), _columns(opened.schema))


def _options(schema: pa.Schema, columns: list[str]) -> pa.ipc.IpcReadOptions:
  return pa.ipc.IpcReadOptions(
    use_threads=False, included_fields=[schema.get_field_index(name) for name in columns]
  )


def _columns(schema: pa.Schema) -> list[str]:
  """Returns the names of the columns to read.

  Raises:
    BadRecord: title or text is missing, occurs twice, or is not of strings.
  """
  texts = [field.name for field in schema if _is_text(field.type)]
  if texts.count("title") != 1 or texts.count("text") != 1:
    found = ", ".join(f"{field.name[:40]}: {field.type}" for field in itertools.islice(schema, 10))
    shown = json_lines.shown(found.encode(errors="replace"))
    raise BadRecord("bad_columns", f"wanted columns title and text of strings; found {shown}")
  ids = [field.name for field in schema if _is_text(field.type) or pa.types.is_integer(field.type)]
  wanted = {"id": ids, "url": texts}
  return ["title", "text", *(name for name, found in wanted.items() if found.count(name) == 1)]


def _is_text(kind: pa.DataType) -> bool:
  if pa.types.is_dictionary(kind):
    return _is_text(kind.value_type)
  return str(kind) in _BYTES


def _rows(
  file: BinaryIO, chunk: Chunk, open_: Callable[[pa.PythonFile], _Table]
) -> Iterator[Numbered]:
  number = 0
  try:
    table = open_(pa.PythonFile(file, mode="r"))
  except _BROKEN as error:
    if chunk.start == 0:  # else another chunk of the file says so
      yield 1, _bad(error, chunk)
    return
  for group in chunk.owned(table.num_groups):
    try:
      for batch in table.batches(group):
        for document in _documents(batch, table.columns):
          number += 1
          yield number, document
    except _BROKEN as error:
      number += 1
      yield number, _bad(error, chunk)


def _bad(error: BaseException, chunk: Chunk) -> BadRecord:
  """Returns why a table or a group of its rows cannot be read.

  Raises:
    OSError: the disk or the network failed, which is not the table's fault.
  """
  if isinstance(error, BadRecord):
    return error
  if isinstance(error, OSError) and error.errno:
    raise error
  why = " ".join(json_lines.shown(str(error).encode(errors="replace")).split())
  return BadRecord(f"broken_{chunk.source.format.removesuffix('_stream')}", why)


# Type of strings → the same type without the promise of UTF-8, which a file may break.
_BYTES = {
  "string": pa.binary(),
  "large_string": pa.large_binary(),
  "string_view": pa.binary_view(),
  "binary": pa.binary(),
  "large_binary": pa.large_binary(),
  "binary_view": pa.binary_view(),
}


def _documents(batch: pa.RecordBatch, columns: list[str]) -> Iterator[Document | BadRecord]:
  values = [_checked(batch.column(name)) for name in columns]
  for row in zip(*values, strict=True):
    try:
      yield _document({name: value.as_py() for name, value in zip(columns, row, strict=True)})
    except BadRecord as error:
      yield error


def _checked(column: pa.Array) -> pa.Array:
  """Returns a column with strings as bytes, whose offsets are known to lie inside their data.

  Raises:
    ArrowInvalid: they do not.
  """
  if pa.types.is_dictionary(column.type):
    values = _checked(column.dictionary)
    return pa.DictionaryArray.from_arrays(column.indices, values, safe=True)
  if _is_text(column.type):
    column = column.view(_BYTES[str(column.type)])
  column.validate(full=True)
  return column


def _document(raw: dict[str, bytes | int | None]) -> Document:
  record: dict[str, str | int | None] = {}
  for name, value in raw.items():
    if not isinstance(value, bytes):
      record[name] = value
      continue
    if len(value) > json_lines.MAX_RECORD_BYTES:
      raise BadRecord("too_long", f"{name} is longer than {json_lines.MAX_RECORD_BYTES:,} bytes")
    try:
      record[name] = value.decode()
    except UnicodeDecodeError:
      raise BadRecord("bad_utf8", f"{name} is not UTF-8: {json_lines.shown(value)}") from None
  text = raw["text"]
  return documents.of_record(record, num_bytes=len(text) if isinstance(text, bytes) else 0)
