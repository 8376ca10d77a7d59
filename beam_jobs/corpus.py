"""The articles of a corpus, in any of a few formats, whole or broken, and their sentences."""

import dataclasses
import html
import io
import itertools
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

import sentencex

from beam_jobs import sources
from realm_tf import json_lines
from realm_tf.json_lines import BadRecord, Piece

# the longest Wikipedia article has well under half of this; longer texts are read in parts
_MAX_ARTICLE_BYTES = 2_000_000
_DROPPED_TITLE = re.compile(r"(List|Index|Outline) of |.*\(disambiguation\)")
_EXTRACTED_URL = re.compile(r"\?curid=\d+$")  # WikiExtractor's, in every record that it writes
_ATTRIBUTE = re.compile(r'([A-Za-z_:-]+)="')
_LAST_ATTRIBUTE = re.compile(r'"\s+[A-Za-z_:-]+="[^"]*"$')
_MAX_HEADER_CHARS = 4000  # a Wikipedia title has at most 255 bytes
_HEADING = re.compile(
  r"[^\s.!?]+( [^\s.!?]+){0,5}\."
)  # WikiExtractor writes section titles as "Early life."


class Rejected(Exception):
  """An article that is dropped; its text is the reason, as counted in info.json."""


@dataclasses.dataclass(frozen=True)
class Article:
  """One article as it stands in its file, or a part of a very long one, or the reason why there is
  none.

  Attributes:
    at: byte offset in the (unpacked) file.
    line: the line that it begins on, from 1, counted from its chunk's beginning.
    title, text: as written; where it is rejected, the beginning of what was found.
    reason: why it is rejected, or empty.
    why: the same for people, with what was found, or empty.
    part: 0, or the number of a further part of the article before.
    is_extracted: WikiExtractor made it, so that its rules hold: some titles are dropped, and a
      title's own line.
  """

  at: int
  line: int
  title: str
  text: str
  reason: str = ""
  why: str = ""
  part: int = 0
  is_extracted: bool = False


@dataclasses.dataclass(frozen=True)
class _Document:
  title: str
  text: str
  is_extracted: bool = False


class Articles:
  """The articles of one chunk in order, the broken ones marked; raises for nothing that the file
  holds.

  Attributes:
    num_lines: how many lines begin in the chunk; known when the last article was read.
  """

  def __init__(self, chunk: sources.Chunk):
    self._chunk, self._at, self.num_lines = chunk, 0, 0

  def __iter__(self) -> Iterator[Article]:
    source = self._chunk.source
    if source.reason:
      yield Article(0, 1, "", "", source.reason)
      return
    with sources.open_(source.path) as plain:
      read = {
        "wikiextractor": self._docs,
        "jsonl": self._lines,
        "json": self._values,
        "text": self._text,
      }[source.format]
      try:
        for article in read(plain if source.is_plain else json_lines.unpacked(plain)):
          self._at = article.at
          yield article
      except json_lines.Unreadable as error:
        yield Article(self._at, max(self.num_lines, 1), "", "", str(error))

  def _lines(self, file: BinaryIO) -> Iterator[Article]:
    for piece in json_lines.lines(file, self._chunk.start):
      if piece.at >= self._chunk.end:
        return
      self.num_lines = piece.line
      if piece.raw.strip():
        yield from _articles(piece, _parse_json)

  def _values(self, file: io.BufferedReader) -> Iterator[Article]:
    for piece in json_lines.values(file):
      self.num_lines = piece.line
      yield from _articles(piece, _parse_json)

  def _docs(self, file: BinaryIO) -> Iterator[Article]:
    """A chunk owns all lines from the first `<doc` in its range to the first `<doc` after it."""
    doc, size, owned = [], 0, self._chunk.start == 0
    for piece in json_lines.lines(file, self._chunk.start, limit=_MAX_ARTICLE_BYTES):
      begins = piece.raw.startswith(b"<doc ")
      if begins and doc:
        yield from _articles(_joined(doc), _parse_doc)
      if piece.at < self._chunk.end:
        self.num_lines = piece.line
      elif begins:
        return
      if begins or not doc:
        doc, size, owned = [], 0, owned or begins
      if owned and (doc or piece.raw.strip()) and size <= _MAX_ARTICLE_BYTES:
        doc.append(piece)
        size += len(piece.raw)
      if doc and piece.raw.startswith(b"</doc>"):
        yield from _articles(_joined(doc), _parse_doc)
        doc = []
    if doc:
      yield from _articles(_joined(doc), _parse_doc)

  def _text(self, file: BinaryIO) -> Iterator[Article]:
    """The whole file is one article, titled by the file's name."""
    title = os.path.splitext(sources.PACKED.sub("", os.path.basename(self._chunk.source.path)))[0]
    at, self.num_lines = 0, 1
    for part, raw in enumerate(_parts(file)):
      place = {"at": at, "line": self.num_lines, "part": part}
      at, self.num_lines = at + len(raw), self.num_lines + raw.count(b"\n")
      try:
        text = raw.removeprefix(b"" if part else json_lines.BOM).decode().strip()
        reason = "binary_file" if sources.is_binary(raw) else ""
      except UnicodeDecodeError:
        text, reason = json_lines.shown(raw), "bad_utf8"
      yield Article(title=" ".join(title.split()), text=text, reason=reason, **place)


def _joined(doc: list[Piece]) -> Piece:
  return doc[0]._replace(raw=b"".join(piece.raw for piece in doc))


def _articles(piece: Piece, parse) -> Iterator[Article]:
  """The article that a record holds, in parts where it is very long."""
  try:
    document = parse(piece.raw)
    if not json_lines.is_writable(document.title + document.text):
      raise BadRecord("bad_utf8", json_lines.HALF_A_PAIR)
  except BadRecord as error:
    yield Article(piece.at, piece.line, "", json_lines.shown(piece.raw), error.code, str(error))
    return
  title, text = " ".join(document.title.split()), document.text.strip()
  for part, raw in enumerate(_parts(io.BytesIO(text.encode()))):
    yield Article(
      piece.at, piece.line, title, raw.decode(), part=part, is_extracted=document.is_extracted
    )


def _parts(file: BinaryIO) -> Iterator[bytes]:
  """A text in parts of at most _MAX_ARTICLE_BYTES that end with a line, else with a sentence, a
  word, a character.
  """
  data, more = b"", None
  while more != b"":
    try:
      more = file.read(_MAX_ARTICLE_BYTES)
    except json_lines.Unreadable:
      if data:
        yield data
      raise
    data += more
    while len(data) > _MAX_ARTICLE_BYTES:
      end = _end_of_part(data)
      yield data[:end]
      data = data[end:]
  yield data


def _end_of_part(data: bytes) -> int:
  for mark in (b"\n", b". ", b" "):
    if (found := data.rfind(mark, _MAX_ARTICLE_BYTES // 2, _MAX_ARTICLE_BYTES)) >= 0:
      return found + len(mark)
  end = _MAX_ARTICLE_BYTES
  while end > 1 and data[end] & 0xC0 == 0x80:  # inside a character
    end -= 1
  return end


def _parse_doc(raw: bytes) -> _Document:
  """WikiExtractor's `<doc id=".." url=".." title="..">`, the text, `</doc>`."""
  if len(raw) > _MAX_ARTICLE_BYTES:
    raise BadRecord("too_long", f"it is longer than {_MAX_ARTICLE_BYTES:,} bytes")
  header, _, rest = raw.partition(b"\n")
  if not header.startswith(b"<doc "):
    raise BadRecord("outside_doc", "it stands outside of <doc>")
  body, closed, _ = rest.rpartition(b"</doc>")
  if not closed:
    raise BadRecord("unclosed_doc", "</doc> is missing")
  try:
    return _extracted(_title_of(header.decode()), body.decode())
  except UnicodeDecodeError:
    raise BadRecord("bad_utf8", "it is not UTF-8") from None


def _extracted(title: str, text: str) -> _Document:
  """WikiExtractor writes &, < and > as entities."""
  return _Document(html.unescape(title), html.unescape(text), is_extracted=True)


def _title_of(header: str) -> str:
  """The title in `<doc id=".." title="..">`, whatever attributes stand around it; quotes inside it
  are not escaped.

  Raises:
    BadRecord: there is none.
  """
  rest = header.strip().removeprefix("<doc ").removesuffix(">").strip()
  while (attribute := _ATTRIBUTE.match(rest)) and attribute[1] != "title":
    rest = rest[attribute.end() :].partition('"')[2].lstrip()
  if not attribute or not rest.endswith('"') or len(header) > _MAX_HEADER_CHARS:
    raise BadRecord("bad_record", "<doc> has no title")
  rest = rest[attribute.end() :]
  while after := _LAST_ATTRIBUTE.search(rest):
    rest = rest[: after.start() + 1]
  return rest[:-1]


def _parse_json(raw: bytes) -> _Document:
  """`{"title": str, "text": str}`, which is also what `WikiExtractor --json` writes."""
  record = json_lines.parse(raw)
  title, text = record.get("title"), record.get("text")
  if not isinstance(title, str) or not isinstance(text, str):
    found = ", ".join(
      f"{name}: {type(value).__name__}" for name, value in itertools.islice(record.items(), 10)
    )
    raise BadRecord("bad_record", f"wanted title and text, both text; found {found or 'nothing'}")
  if isinstance(url := record.get("url"), str) and _EXTRACTED_URL.search(url):
    if len(raw) > _MAX_ARTICLE_BYTES:
      raise BadRecord("too_long", f"it is longer than {_MAX_ARTICLE_BYTES:,} bytes")
    return _extracted(title, text)
  return _Document(title, text)


def sentences_of(article: Article) -> list[str]:
  """Whole sentences of an article, each with single spaces.

  A section title ("Early life.") is put before the first sentence under it: alone it would say
  nothing as a query.

  Raises:
    Rejected: the article is broken, of a kind that holds no prose, or a title alone.
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
  sentences, heading = [], ""
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
