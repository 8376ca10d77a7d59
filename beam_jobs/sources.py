"""The files of a corpus.

Finds them, and splits them into ranges that are read in parallel.
"""

import dataclasses
import os
import stat
from collections.abc import Iterable, Sequence
from concurrent import futures
from typing import BinaryIO

import tensorflow as tf
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from beam_jobs import file_formats
from beam_jobs.file_formats import FORMATS, HEAD_BYTES, PACKED
from realm_tf.storage import artifacts, input_files, json_lines, packed_files, paths

WANTED = (
  'wanted lines or lists of {"title", "text"}, tables with these columns in Parquet or Arrow, '
  "WikiExtractor's files, HTML, Markdown, PDF, or plain text in UTF-8"
)

_CHUNK_BYTES = 4 << 20  # plain files are read in ranges of this size, in parallel
_SPLIT = ("wikiextractor", "jsonl", "parquet", "arrow")  # formats that can be read in ranges
_FIRST_BYTES = 512  # as stored; enough for every mark that names a kind of file


class CorpusError(artifacts.UserError):
  """Raised for a corpus from which no passages can be made."""


@dataclasses.dataclass(frozen=True)
class Source:
  """An input file: its format, and a digest to detect changes.

  Attributes:
    format: one of FORMATS except auto, or "json": an array, or objects that span several lines; or
      "arrow_stream": Arrow's format without an index at the end.
    is_plain: whether it is uncompressed UTF-8, so that reading can start in the middle.
    reason: why the file cannot be read at all, or empty.
  """

  path: str
  format: str
  is_plain: bool
  size_bytes: int
  digest: str
  reason: str = ""

  @property
  def title(self) -> str:
    """The name of the file, without folders and endings."""
    name = os.path.splitext(PACKED.sub("", os.path.basename(self.path)))[0]
    return " ".join(name.split())


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The articles of one file that begin in the byte range [start, end)."""

  number: int
  source: Source
  start: int
  end: float

  def owned(self, num_groups: int) -> range:
    """Returns which of a table's groups of rows belong to the chunk.

    Group i of n counts as beginning at i/n of the file.
    """
    size = max(self.source.size_bytes, 1)
    first, end = (-(-min(at, size) * num_groups // size) for at in (self.start, self.end))
    return range(int(first), int(end))


def find_sources(inputs: str, *, format: str) -> list[Source]:
  """Finds and inspects all input files.

  Args:
    inputs: a path, or files, folders (walked) and globs separated by commas.
    format: one of FORMATS; "auto" detects the format of each file by its beginning.

  Returns:
    Files in the order of their paths, including those that cannot be read or hold no prose.

  Raises:
    CorpusError: the format is unknown, a pattern matches nothing, or all files are empty.
  """
  if format not in FORMATS:
    raise CorpusError(f"--format={format!r} is unknown; wanted one of {', '.join(FORMATS)}.")
  try:
    files = input_files.find(inputs)
  except artifacts.UserError as error:
    raise CorpusError(f"--input {inputs!r} matches no file: {error}") from error
  with futures.ThreadPoolExecutor() as pool:
    sources = list(pool.map(lambda path: _look_at(path, format=format), files))
  if not any(source.size_bytes or source.reason for source in sources):
    raise CorpusError(
      f"--input {inputs!r} matches {len(sources)} files, all of them empty; wanted text in one of "
      f"the formats {', '.join(FORMATS[1:])}."
    )
  return sources


def _look_at(path: str, *, format: str) -> Source:
  if not json_lines.is_writable(path):
    return Source(
      os.fsencode(path).decode(errors="backslashreplace"), "text", True, 0, "", "name_not_utf8"
    )
  try:
    if not paths.is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
      return Source(path, "text", True, 0, "", "not_a_file")  # a pipe would never end
    with open_(path) as file:
      first = file.read(_FIRST_BYTES)
      file.seek(0)
      head = _head_of(file)
    size_bytes, digest = artifacts.gfile.stat(path).length, artifacts.file_digest(path)
  except (OSError, tf.errors.OpError):
    return Source(path, "text", True, 0, "", "unreadable")
  found, reason = file_formats.detect(path, first, head, format=format)
  return Source(path, found, packed_files.is_plain(first), size_bytes, digest, reason)


def _head_of(file: BinaryIO) -> bytes:
  try:
    head = packed_files.unpacked(file).peek(HEAD_BYTES)[:HEAD_BYTES]
    return head.removeprefix(packed_files.BOM)
  except packed_files.Unreadable:
    return b""  # `Articles` rejects it


def split_into_chunks(sources: Iterable[Source]) -> list[Chunk]:
  """Splits files into ranges that can be read independently.

  A file that can only be read from its beginning is a single range.
  """
  ranges = []
  for source in sources:
    if source.reason or not source.is_plain or source.format not in _SPLIT:
      ranges.append((source, 0, float("inf")))
    else:
      ranges.extend(
        (source, start, start + _CHUNK_BYTES) for start in range(0, source.size_bytes, _CHUNK_BYTES)
      )
  return [Chunk(number, *chunk) for number, chunk in enumerate(ranges)]


def open_(path: str) -> BinaryIO:
  return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def paths_of(inputs: str) -> list[str]:
  """Returns the files and folders that are given, separated by commas."""
  return [path for part in paths.split(inputs) for path in paths.matching(part)]


def fingerprint_of(files: Sequence[Source]) -> str:
  """Returns the fingerprint of the contents and formats of a corpus's files."""
  return artifacts.fingerprint_of(
    [(os.path.basename(file.path), file.format, file.size_bytes, file.digest) for file in files]
  )
