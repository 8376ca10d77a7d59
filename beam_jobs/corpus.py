"""What a corpus is to `make_passages`: files of articles in any of a few formats, whole or broken, and their sentences."""

import dataclasses
import gzip
import html
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from concurrent import futures

import sentencex
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from realm_tf import artifacts
from realm_tf.artifacts import gfile

FORMATS = ("auto", "wikiextractor", "jsonl", "text")

_CHUNK_BYTES = 4 << 20  # plain files are read in ranges of this size, in parallel
_MAX_ARTICLE_BYTES = 2_000_000  # the longest Wikipedia article has well under half of this
_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_DROPPED_TITLE = re.compile(r"(List|Index|Outline) of |.*\(disambiguation\)")
_DOC_TITLE = re.compile(rb'<doc .*?\btitle="(.*)">\s*')
_HEADING = re.compile(r"[^\s.!?]+( [^\s.!?]+){0,5}\.")  # WikiExtractor writes section titles as "Early life."


class CorpusError(ValueError):
  """A corpus that cannot be made into passages."""


class Rejected(Exception):
  """An article that is dropped; its text is the reason, as counted in info.json."""


# ------------------------------------------------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class Source:
  """One input file: what it holds, and a digest that tells whether it changed."""

  path: str
  format: str
  gzipped: bool
  size_bytes: int
  digest: str


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
    inputs: files, folders (walked) and globs, separated by commas.
    format: one of FORMATS; "auto" decides for each file by how it begins.

  Returns:
    Files in the order of their paths.

  Raises:
    CorpusError: an unknown format, a pattern that matches nothing, or only empty files.
  """
  if format not in FORMATS:
    raise CorpusError(f"--format={format!r} is unknown; wanted one of {', '.join(FORMATS)}.")
  paths = set()
  for pattern in filter(None, inputs.split(",")):
    found = [path for match in gfile.glob(pattern) for path in _walk(match)]
    if not found:
      raise CorpusError(f"--input {pattern!r} matches no file; wanted files, folders or globs, separated by commas.")
    paths.update(found)
  with futures.ThreadPoolExecutor() as pool:
    sources = list(pool.map(lambda path: _look_at(path, format=format), sorted(paths)))
  if not any(source.size_bytes for source in sources):
    raise CorpusError(
        f"--input {inputs!r} gives {len(sources)} files and all are empty; wanted articles ({', '.join(FORMATS[1:])}).")
  return sources


def _walk(path: str) -> list[str]:
  if not gfile.isdir(path):
    return [path]
  return [os.path.join(folder, name) for folder, _, names in gfile.walk(path) for name in names if not name.startswith(".")]


def _look_at(path: str, *, format: str) -> Source:
  with _open(path) as file:
    head = file.read(1 << 16)
  gzipped = head.startswith(_GZIP_MAGIC)
  if gzipped:
    try:
      head = zlib.decompressobj(wbits=31).decompress(head, 1 << 16)
    except zlib.error:
      head = b""  # read_articles rejects it
  if format == "auto":
    format = _guess_format(path, head.removeprefix(_BOM).lstrip())
  return Source(path, format, gzipped, gfile.stat(path).length, artifacts.file_digest(path))


def _guess_format(path: str, head: bytes) -> str:
  if head.startswith(b"<doc "):
    return "wikiextractor"
  name = path.removesuffix(".gz")
  return "jsonl" if re.match(rb'\{\s*"', head) or name.endswith((".jsonl", ".json")) else "text"


def split_into_chunks(sources: Iterable[Source]) -> list[Chunk]:
  """Ranges that can be read by themselves: gzip files and texts are one each."""
  ranges = []
  for source in sources:
    if source.gzipped or source.format == "text":
      ranges.append((source, 0, float("inf")))
    else:
      ranges.extend((source, start, start + _CHUNK_BYTES) for start in range(0, source.size_bytes, _CHUNK_BYTES))
  return [Chunk(number, *chunk) for number, chunk in enumerate(ranges)]


def _open(path: str):
  return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


# ---------------------------------------------------------------------------------------------------------- articles


@dataclasses.dataclass(frozen=True)
class Article:
  """One article as it stands in its file, or the reason why there is none.

  Attributes:
    at: byte offset in the (unzipped) file.
    title, text: as written; empty where they could not be read.
    reason: why it is rejected, or empty.
  """

  at: int
  title: str
  text: str
  reason: str = ""


def read_articles(chunk: Chunk) -> Iterator[Article]:
  """The articles of one chunk in order, the broken ones marked; never raises for what the file holds."""
  source, at = chunk.source, 0
  split, parse = _READERS[source.format]
  with _open(source.path) as plain:
    file = gzip.GzipFile(fileobj=plain) if source.gzipped else plain
    try:
      for at, raw in split(file, chunk):
        yield _article(at, raw, parse, source.path)
    except EOFError:
      yield Article(at, "", "", "truncated_gzip")
    except (zlib.error, gzip.BadGzipFile):
      yield Article(at, "", "", "broken_gzip")


def _article(at: int, raw: bytes, parse, path: str) -> Article:
  try:
    if len(raw) > _MAX_ARTICLE_BYTES:
      raise Rejected("too_long")
    title, text = (html.unescape(part).strip() for part in parse(raw, path))
    (title + text).encode()  # a lone surrogate, which JSON can spell, cannot be written
    return Article(at, " ".join(title.split()), text)
  except UnicodeError:
    reason = "bad_utf8"
  except Rejected as rejected:
    reason = str(rejected)
  return Article(at, "", raw[:1000].decode(errors="replace"), reason)


def _lines(file, start: int) -> Iterator[tuple[int, bytes]]:
  """(offset, line) of the lines that begin at `start` or later; a line that is too long for an article is cut."""
  limit = _MAX_ARTICLE_BYTES + 1
  at = max(start - 1, 0)
  file.seek(at)
  begins = start == 0  # otherwise the first piece is the end of the line before
  while line := file.readline(limit):
    if begins:
      yield at, line.removeprefix(_BOM) if at == 0 else line
    at += len(line)
    begins = line.endswith(b"\n")


def _split_lines(file, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
  for at, line in _lines(file, chunk.start):
    if at >= chunk.end:
      return
    if line.strip():
      yield at, line


def _split_docs(file, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
  """A chunk owns all lines from the first `<doc` in its range to the first `<doc` after it."""
  at, size, doc, owned = 0, 0, [], chunk.start == 0
  for offset, line in _lines(file, chunk.start):
    begins = line.startswith(b"<doc ")
    if begins and doc:
      yield at, b"".join(doc)
    if begins and offset >= chunk.end:
      return
    if begins or not doc:
      at, size, doc, owned = offset, 0, [], owned or begins
    if owned and (doc or line.strip()) and size <= _MAX_ARTICLE_BYTES:
      doc.append(line)
      size += len(line)
    if doc and line.startswith(b"</doc>"):
      yield at, b"".join(doc)
      doc = []
  if doc:
    yield at, b"".join(doc)


def _split_nothing(file, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
  """The whole file is one article."""
  del chunk
  yield 0, file.read(_MAX_ARTICLE_BYTES + 1).removeprefix(_BOM)


def _parse_doc(raw: bytes, path: str) -> tuple[str, str]:
  """WikiExtractor's `<doc id=".." url=".." title="..">`, the text, `</doc>`."""
  del path
  header, _, rest = raw.partition(b"\n")
  if not header.startswith(b"<doc "):
    raise Rejected("outside_doc")
  title, (body, closed, _) = _DOC_TITLE.fullmatch(header), rest.rpartition(b"</doc>")
  if not closed:
    raise Rejected("unclosed_doc")
  if not title:
    raise Rejected("bad_record")
  return title[1].decode(), body.decode()


def _parse_json(raw: bytes, path: str) -> tuple[str, str]:
  """`{"title": str, "text": str}`, which is also what `WikiExtractor --json` writes."""
  del path
  line = raw.decode()
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    raise Rejected("bad_json") from None
  if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in ("title", "text")):
    raise Rejected("bad_record")
  return record["title"], record["text"]


def _parse_text(raw: bytes, path: str) -> tuple[str, str]:
  """A plain text, titled by its file's name."""
  return os.path.splitext(os.path.basename(path).removesuffix(".gz"))[0], raw.decode()


_READERS = {"wikiextractor": (_split_docs, _parse_doc), "jsonl": (_split_lines, _parse_json), "text": (_split_nothing, _parse_text)}


def sentences_of(article: Article) -> list[str]:
  """Whole sentences of an article, each with single spaces.

  A section title ("Early life.") is put before the first sentence under it: alone it would say nothing as a query.

  Raises:
    Rejected: the article is broken, of a kind that holds no prose, or a title alone.
  """
  if article.reason:
    raise Rejected(article.reason)
  if _DROPPED_TITLE.match(article.title):
    raise Rejected("dropped_title")
  lines = [line for line in (" ".join(line.split()) for line in article.text.splitlines()) if line]
  if lines and lines[0] == article.title:
    lines.pop(0)
  sentences, heading = [], ""
  for line, after in itertools.zip_longest(lines, lines[1:], fillvalue=""):
    if after and _HEADING.fullmatch(line) and not _HEADING.fullmatch(after):
      heading = f"{line} "
    else:
      sentences.extend(sentence.strip() for sentence in sentencex.segment("en", heading + line) if sentence.strip())
      heading = ""
  if not sentences:
    raise Rejected("empty")
  return sentences
