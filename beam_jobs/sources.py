"""The files of a corpus: what each holds, why some cannot be read, and the ranges that are read in
parallel.
"""

import dataclasses
import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from concurrent import futures
from typing import BinaryIO

import tensorflow as tf
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from realm_tf import artifacts, input_files, json_lines, paths

FORMATS = ("auto", "wikiextractor", "jsonl", "text")
WANTED = (
  'wanted lines or lists of {"title", "text"}, WikiExtractor\'s files, or plain text in UTF-8'
)

_CHUNK_BYTES = 4 << 20  # plain files are read in ranges of this size, in parallel
_HEAD_BYTES = 1 << 16
PACKED = re.compile(r"\.(gz|bz2|xz)$", re.IGNORECASE)
_NO_PROSE = (  # (offset, bytes, what a file is that has them there)
  (0, b"PK\x03\x04", "zip"),
  (0, b"PK\x05\x06", "zip"),
  (257, b"ustar", "tar"),
  (0, b"%PDF-", "pdf"),
  (0, b"PAR1", "parquet"),
  (0, b"ARROW1", "arrow"),
  (0, b"\x28\xb5\x2f\xfd", "zstd"),
  (0, b"7z\xbc\xaf\x27\x1c", "7z"),
  (0, b"Rar!\x1a", "rar"),
  (0, b"\xd0\xcf\x11\xe0", "old_office"),
  (0, b"{\\rtf", "rtf"),
  (0, b"SQLite format 3", "sqlite"),
  (0, b"\x89HDF", "hdf5"),
)
_MARKUP = re.compile(rb"<(\?xml|!doctype|html|mediawiki)\b", re.IGNORECASE)
_MARKUP_NAMES = (".html", ".htm", ".xhtml", ".xml")
_CONTROL = bytes({*range(32), 127} - {*b"\t\n\v\f\r\x1b"})


class CorpusError(artifacts.UserError):
  """A corpus that cannot be made into passages."""


@dataclasses.dataclass(frozen=True)
class Source:
  """One input file: what it holds, and a digest that tells whether it changed.

  Attributes:
    format: one of FORMATS but for auto, or "json": an array, or objects over many lines.
    is_plain: neither packed nor in another encoding than UTF-8, so that it can be read from the
      middle.
    reason: why nothing of it can be read, or empty.
  """

  path: str
  format: str
  is_plain: bool
  size_bytes: int
  digest: str
  reason: str = ""


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The articles of one file that begin in the byte range [start, end)."""

  number: int
  source: Source
  start: int
  end: float


def find_sources(inputs: str, *, format: str) -> list[Source]:
  """Looks at every input file.

  Args:
    inputs: a path, or files, folders (walked) and globs separated by commas.
    format: one of FORMATS; "auto" decides for each file by how it begins.

  Returns:
    Files in the order of their paths, those too that cannot be read or hold no prose.

  Raises:
    CorpusError: an unknown format, a pattern that matches nothing, or only empty files.
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
      f"--input {inputs!r} gives {len(sources)} files and all are empty; wanted ({', '.join(FORMATS[1:])})."
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
      is_plain = json_lines.is_plain(file.read(8))
      file.seek(0)
      head = _head_of(file)
    size_bytes, digest = artifacts.gfile.stat(path).length, artifacts.file_digest(path)
  except (OSError, tf.errors.OpError):
    return Source(path, "text", True, 0, "", "unreadable")
  found, reason = _format_of(path, head, format=format, is_plain=is_plain)
  return Source(path, found, is_plain, size_bytes, digest, reason)


def _head_of(file: BinaryIO) -> bytes:
  try:
    return json_lines.unpacked(file).peek(_HEAD_BYTES)[:_HEAD_BYTES].removeprefix(json_lines.BOM)
  except json_lines.Unreadable:
    return b""  # `Articles` rejects it


def _format_of(path: str, head: bytes, *, format: str, is_plain: bool) -> tuple[str, str]:
  """Format and reason of rejection of a file that begins so."""
  name = PACKED.sub("", path).lower()
  begin = head.lstrip()
  kind = next((kind for at, magic, kind in _NO_PROSE if head.startswith(magic, at)), "")
  if format == "auto":
    format = _guess_format(name, begin)
    if format == "text" and not kind:
      kind = "table" if _is_table(name, begin) else ""
      kind = "xml_or_html" if _MARKUP.match(begin) or name.endswith(_MARKUP_NAMES) else kind
  if format == "text" and not kind and (is_binary(head) or not is_plain and _is_gibberish(head)):
    kind = "binary"
  if format == "jsonl" and not json_lines.is_lines(head):
    format = "json"
  return format, f"{kind}_file" if kind else ""


def _guess_format(name: str, begin: bytes) -> str:
  if begin.startswith(b"<doc "):
    return "wikiextractor"
  if re.match(rb'(\[\s*)?\{\s*["}]', begin) or name.endswith((".jsonl", ".json", ".ndjson")):
    return "jsonl"
  return "text"


def _is_table(name: str, begin: bytes) -> bool:
  """Whether it is tab-separated or comma-separated: by its name, or three lines and more with the
  same number of tabs.
  """
  whole = begin.rpartition(b"\n")[0].splitlines()
  tabs = [line.strip().count(b"\t") for line in whole if line.strip()]
  return name.endswith((".tsv", ".csv")) or (len(tabs) >= 3 and tabs[0] > 0 and len(set(tabs)) == 1)


def is_binary(data: bytes) -> bool:
  """Whether bytes are no text in any encoding: a zero, or a control character among a hundred."""
  return b"\0" in data or len(data) - len(data.translate(None, _CONTROL)) > len(data) / 100


def _is_gibberish(head: bytes) -> bool:
  """Whether a text that was taken for UTF-16, say, holds many characters that no one writes."""
  text = head[: _HEAD_BYTES - 8].decode(errors="replace")
  odd = sum(letter == "\ufffd" or unicodedata.category(letter) in ("Cn", "Co") for letter in text)
  return odd > len(text) / 100


def split_into_chunks(sources: Iterable[Source]) -> list[Chunk]:
  """Ranges that can be read by themselves; files that are read from their beginning only are one
  each.
  """
  ranges = []
  for source in sources:
    if source.reason or not source.is_plain or source.format in ("text", "json"):
      ranges.append((source, 0, float("inf")))
    else:
      ranges.extend(
        (source, start, start + _CHUNK_BYTES) for start in range(0, source.size_bytes, _CHUNK_BYTES)
      )
  return [Chunk(number, *chunk) for number, chunk in enumerate(ranges)]


def open_(path: str) -> BinaryIO:
  return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)
