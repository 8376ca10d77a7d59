"""Reads the articles of a corpus in any format, and splits them into sentences."""

import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

import sentencex

from beam_jobs import documents, file_formats, pages, pdf, sources, tables
from beam_jobs.documents import Document
from realm_tf.storage import json_lines, json_values, packed_files
from realm_tf.storage.json_lines import BadRecord
from realm_tf.storage.json_values import Piece

_DROPPED_TITLE = re.compile(r"(List|Index|Outline) of |.*\(disambiguation\)")
# WikiExtractor writes section titles as "Early life."
_HEADING = re.compile(r"[^\s.!?]+( [^\s.!?]+){0,5}\.")


class Rejected(Exception):
  """Raised for an article that is dropped; the message is the reason counted in info.json."""


@dataclasses.dataclass(frozen=True)
class Article:
  """An article as read from its file, a part of a very long one, or the reason for rejecting it.

  Attributes:
    at: byte offset in the (unpacked) file; for rows, sections and pages the same as line.
    line: the line on which it begins, from 1, counted from the beginning of its chunk. For tables
      it is the row, for HTML and Markdown the section, for PDF the page.
    title, text: as written; for a rejected article, the beginning of what was found.
    reason: why it is rejected, or empty.
    why: the reason as a readable message that shows what was found, or empty.
    part: 0, or the number of a further part of the preceding article.
    is_extracted: whether WikiExtractor wrote it. If so, articles with certain titles are dropped,
      and so is a first line that repeats the title.
    document: what identifies it when the corpus is updated: an id, or the title.
  """

  at: int
  line: int
  title: str
  text: str
  reason: str = ""
  why: str = ""
  part: int = 0
  is_extracted: bool = False
  document: str = ""


_READERS = {
  "html": pages.html,
  "markdown": pages.markdown,
  "parquet": tables.parquet,
  "arrow": tables.arrow,
  "arrow_stream": tables.arrow_stream,
  "pdf": pdf.read,
}


class Articles:
  """Iterates over the articles of a chunk in order; broken ones are marked, not raised.

  Attributes:
    num_lines: how many lines (or rows, sections) begin in the chunk; final once the last article
      has been read.
  """

  def __init__(self, chunk: sources.Chunk):
    self._chunk, self._at, self.num_lines = chunk, 0, 0

  def __iter__(self) -> Iterator[Article]:
    source = self._chunk.source
    if source.reason:
      yield Article(0, 1, "", "", source.reason, file_formats.ADVICE.get(source.reason, ""))
      return
    with sources.open_(source.path) as plain:
      read = {
        "wikiextractor": self._docs,
        "jsonl": self._lines,
        "json": self._values,
        "text": self._text,
      }.get(source.format, self._numbered)
      try:
        for article in read(plain if source.is_plain else packed_files.unpacked(plain)):
          self._at = article.at
          yield article
      except packed_files.Unreadable as error:
        yield Article(self._at, max(self.num_lines, 1), "", "", str(error))

  def _lines(self, file: BinaryIO) -> Iterator[Article]:
    for piece in json_values.lines(file, self._chunk.start):
      if piece.at >= self._chunk.end:
        return
      self.num_lines = piece.line
      if piece.raw.strip():
        yield from _parsed(piece, documents.parse_json)

  def _values(self, file) -> Iterator[Article]:
    for piece in json_values.values(file):
      self.num_lines = piece.line
      yield from _parsed(piece, documents.parse_json)

  def _docs(self, file: BinaryIO) -> Iterator[Article]:
    """Yields the articles of a chunk: from the first `<doc` in its range to the first after it."""
    doc: list[Piece] = []
    size, owned = 0, self._chunk.start == 0
    for piece in json_values.lines(file, self._chunk.start, limit=documents.MAX_ARTICLE_BYTES):
      begins = piece.raw.startswith(b"<doc ")
      if begins and doc:
        yield from _parsed(_joined(doc), documents.parse_doc)
      if piece.at < self._chunk.end:
        self.num_lines = piece.line
      elif begins:
        return
      if begins or not doc:
        doc, size, owned = [], 0, owned or begins
      if owned and (doc or piece.raw.strip()) and size <= documents.MAX_ARTICLE_BYTES:
        doc.append(piece)
        size += len(piece.raw)
      if doc and piece.raw.startswith(b"</doc>"):
        yield from _parsed(_joined(doc), documents.parse_doc)
        doc = []
    if doc:
      yield from _parsed(_joined(doc), documents.parse_doc)

  def _text(self, file: BinaryIO) -> Iterator[Article]:
    """Yields the whole file as one article, whose title is the name of the file."""
    at, self.num_lines = 0, 1
    for part, raw in enumerate(_parts(file)):
      begin, line = at, self.num_lines
      at, self.num_lines = at + len(raw), self.num_lines + raw.count(b"\n")
      try:
        text = raw.removeprefix(b"" if part else packed_files.BOM).decode().strip()
        reason = "binary_file" if file_formats.is_binary(raw) else ""
      except UnicodeDecodeError:
        text, reason = json_lines.shown(raw), "bad_utf8"
      title = self._chunk.source.title
      yield Article(begin, line, title, text, reason, part=part, document=title)

  def _numbered(self, file: BinaryIO) -> Iterator[Article]:
    """Yields the rows, sections or pages of a file."""
    try:
      for number, found in _READERS[self._chunk.source.format](file, self._chunk):
        self.num_lines = number
        yield from _articles(number, number, found)
    except BadRecord as error:  # of the whole file
      yield from _articles(self.num_lines + 1, self.num_lines + 1, error)


def _joined(doc: list[Piece]) -> Piece:
  return doc[0]._replace(raw=b"".join(piece.raw for piece in doc))


def _parsed(piece: Piece, parse: Callable[[bytes], Document]) -> Iterator[Article]:
  """Yields the article of a record."""
  found: Document | BadRecord
  try:
    found = parse(piece.raw)
  except BadRecord as error:
    found = error
  yield from _articles(piece.at, piece.line, found, raw=piece.raw)


def _articles(
  at: int, line: int, found: Document | BadRecord, *, raw: bytes = b""
) -> Iterator[Article]:
  """Yields an article, in parts if it is very long."""
  if isinstance(found, Document) and not json_lines.is_writable(
    found.title + found.text + found.id
  ):
    found = BadRecord("bad_utf8", json_lines.HALF_A_PAIR)
  if isinstance(found, BadRecord):
    yield Article(at, line, "", json_lines.shown(raw), found.code, str(found))
    return
  title, text = " ".join(found.title.split()), found.text.strip()
  for part, data in enumerate(_parts(io.BytesIO(text.encode()))):
    yield Article(
      at,
      line,
      title,
      data.decode(),
      part=part,
      is_extracted=found.is_extracted,
      document=found.id or title,
    )


def _parts(file: BinaryIO) -> Iterator[bytes]:
  """Splits a text into parts of at most documents.MAX_ARTICLE_BYTES.

  A part ends at the end of a line if possible, else of a sentence, a word, or a character.
  """
  data, more = b"", None
  while more != b"":
    try:
      more = file.read(documents.MAX_ARTICLE_BYTES)
    except packed_files.Unreadable:
      if data:
        yield data
      raise
    data += more
    while len(data) > documents.MAX_ARTICLE_BYTES:
      end = _end_of_part(data)
      yield data[:end]
      data = data[end:]
  yield data


def _end_of_part(data: bytes) -> int:
  limit = documents.MAX_ARTICLE_BYTES
  for mark in (b"\n", b". ", b" "):
    if (found := data.rfind(mark, limit // 2, limit)) >= 0:
      return found + len(mark)
  end = limit
  while end > 1 and data[end] & 0xC0 == 0x80:  # inside a character
    end -= 1
  return end


def sentences_of(article: Article) -> list[str]:
  """Splits an article into whole sentences, each with single spaces.

  A section title ("Early life.") is prepended to the first sentence under it: alone it would be
  meaningless as a query.

  Raises:
    Rejected: the article is broken, of a kind that holds no prose, or only a title.
  """
  if article.reason:
    raise Rejected(article.reason)
  if article.is_extracted and _DROPPED_TITLE.match(article.title):
    raise Rejected("dropped_title")
  lines = [line for line in (" ".join(line.split()) for line in article.text.splitlines()) if line]
  if (
    not article.part
    and lines
    and lines[0] == article.title
    and (article.is_extracted or len(lines) > 1)
  ):
    lines.pop(0)
  sentences: list[str] = []
  heading = ""
  for line, after in itertools.zip_longest(lines, lines[1:], fillvalue=""):
    if after and _HEADING.fullmatch(line) and not _HEADING.fullmatch(after):
      heading = f"{line} "
    else:
      sentences.extend(
        sentence.strip() for sentence in sentencex.segment("en", heading + line) if sentence.strip()
      )
      heading = ""
  if not sentences:
    raise Rejected("empty")
  return sentences
