"""Reads the text of HTML and Markdown pages by section.

Every heading begins a document: its title is "Page > Section > Subsection". Markdown is turned into
HTML first.
"""

import codecs
import contextlib
import io
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

import markdown_it
from lxml import etree
from lxml.html import defs

from beam_jobs import documents, file_formats
from beam_jobs.documents import Document, Numbered
from beam_jobs.outlines import END_MARK, MAX_HEADING_CHARS, Outline, Section
from beam_jobs.sources import Chunk
from realm_tf.storage import packed_files
from realm_tf.storage.json_lines import BadRecord

_MAX_PAGE_BYTES = 20_000_000  # a page is read in one piece
_MAX_MARKDOWN_CHARS = 1_000_000  # parsed at a time
# Levels of Markdown: a list is two, a quote is one. The parser passes over what is deeper.
_MAX_DEPTH = 50

_FRONT_MATTER = re.compile(
  r"\A(?P<mark>---|\+\+\+)[ \t]*\n(?P<settings>(?>[^\n]*\n){0,1000}?)(?P=mark)[ \t]*(\n|\Z)"
)
_TITLE = re.compile(r"^title[ \t]*[:=][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
# In prose "the <title> tag" and "<your-name>" mean themselves. Such a title would hide the rest.
_TAGS_IN_PROSE = defs.tags - {
  *("title", "textarea", "style", "xmp", "iframe", "noembed", "noframes", "script", "plaintext")
}
_TAG = re.compile(r"</?([a-zA-Z][\w:-]*)")
_END_OF_BODY = re.compile(r"</(body|html)\s*>", re.IGNORECASE)
_CHARSET = re.compile(
  rb"<(?:meta|\?xml)\b[^>]{0,300}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.I
)
_MAX_CHARSET_AT = 4096
# Python's names of the charsets that browsers know.
_CHARSETS = re.compile(
  r"ascii|cp(125\d|866|874|932|949|950)|iso8859-\d+|koi8-[ru]|mac-(roman|cyrillic)"
  r"|gb2312|gbk|gb18030|big5(hkscs)?|euc_(jp|kr)|shift_jis|iso2022_jp|tis-620"
)
_WIDER = {  # browsers read the second where a page declares the first
  **dict.fromkeys(("ascii", "iso8859-1"), "cp1252"),
  **dict.fromkeys(("iso8859-11", "tis-620"), "cp874"),
  **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
  "iso8859-9": "cp1254",
  "shift_jis": "cp932",
  "euc_kr": "cp949",
}
_PARTS_OF_TITLE = re.compile(r"\s+[|·•–—»-]\s+|:\s+")


def html(file: BinaryIO, chunk: Chunk) -> Iterator[Numbered]:
  """Yields the sections of an HTML page, numbered from 1.

  Raises:
    BadRecord: it is too long, nested too deep, binary, or neither UTF-8 nor what it declares.
  """
  page = _Page()
  page.feed(_read(file, is_html=True))
  return _numbered(page.close(), name=chunk.source.title)


def markdown(file: BinaryIO, chunk: Chunk) -> Iterator[Numbered]:
  """Yields the sections of a Markdown page, numbered from 1.

  Raises:
    BadRecord: it is too long, nested too deep, binary or not UTF-8.
  """
  text = _read(file).replace("\r\n", "\n").replace("\r", "\n")
  title = ""
  if front := _FRONT_MATTER.match(text):
    title, text = _title_in(front["settings"]), text[front.end() :]
  page = _Page()
  for part in _parts(text):
    page.feed(_rendered(part))
  return _numbered(page.close(), title=title, name=chunk.source.title)


def _read(file: BinaryIO, *, is_html: bool = False) -> str:
  data = documents.read_whole(file, limit=_MAX_PAGE_BYTES)
  if file_formats.is_binary(data):
    raise BadRecord("binary_file", "it has zero bytes or control characters")
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    why = f"byte {error.start} is not UTF-8; save it in UTF-8"
  if is_html and (declared := _CHARSET.search(data[:_MAX_CHARSET_AT])):
    name = declared[1].decode()
    why = f"{why}, or declare the right charset: it is not {name}"
    with contextlib.suppress(UnicodeDecodeError, LookupError):
      return data.decode(_decoder(name))
  raise BadRecord("bad_utf8", why)


def _decoder(name: str) -> str:
  """Returns Python's codec for a charset that a page declares.

  Raises:
    LookupError: there is none, or it is no charset.
  """
  name = name.lower().removeprefix("x-").replace("windows-", "cp")
  codec = codecs.lookup(name).name
  if not _CHARSETS.fullmatch(codec):
    raise LookupError(name)
  return _WIDER.get(codec, codec)


class _Page:
  """Parses HTML in pieces."""

  def __init__(self) -> None:
    # without its limits the parser would end a comment of 10 MB early, as text
    self._parser = etree.HTMLParser(target=Outline(), encoding="utf-8", huge_tree=True)
    self._parser.feed(b"<html>")  # an empty page is no error

  def feed(self, text: str) -> None:
    data = io.BytesIO(_END_OF_BODY.sub("", text).encode())  # the body ends where the page ends
    for block in packed_files.blocks(data.read):  # an error is raised at the end of a block
      self._parser.feed(block)

  def close(self) -> Outline:
    self._parser.feed(END_MARK.encode())
    return self._parser.close()


# ---------------------------------------------------------------------------------------- Markdown


def _title_in(settings: str) -> str:
  """Returns the title in the settings at the beginning of a page (YAML or TOML), or nothing."""
  found = _TITLE.search(settings)
  title = found[1] if found else ""
  if title.startswith('"'):
    try:
      title = str(json.loads(title))
    except ValueError:
      title = title.strip('"')
  elif title.startswith("'"):
    title = title.strip("'").replace("''", "'")
  is_usable = len(title) <= MAX_HEADING_CHARS and title not in ("|", ">", "|-", ">-")
  return title if is_usable else ""


def _parts(text: str) -> Iterator[str]:
  """Splits a page into parts: before a heading if possible, else after a paragraph or line."""
  start = 0
  while start < len(text):
    end = start + _MAX_MARKDOWN_CHARS
    if end < len(text):
      marks = (text.rfind(mark, start + 1, end) for mark in ("\n# ", "\n\n", "\n"))
      end = next((found + 1 for found in marks if found >= 0), end)
    yield text[start:end]
    start = end


def _rendered(text: str) -> str:
  """Returns the HTML of a Markdown text.

  Raises:
    BadRecord: quotes or lists are nested too deep.
  """
  parser = markdown_it.MarkdownIt("commonmark", {"maxNesting": _MAX_DEPTH})
  parser.enable(["table", "strikethrough"])
  tokens = parser.parse(text)
  if any(token.level >= _MAX_DEPTH - 1 for token in tokens):
    raise BadRecord("too_deep", "quotes or lists are nested too deep (24 lists, 48 quotes)")
  for token in tokens:
    for child in token.children or ():
      if child.type == "html_inline" and (tag := _TAG.match(child.content)):
        child.type = "html_inline" if tag[1].lower() in _TAGS_IN_PROSE else "text"
  return parser.renderer.render(tokens, parser.options, {})


# ---------------------------------------------------------------------------------------- sections


def _numbered(outline: Outline, *, name: str, title: str = "") -> Iterator[Numbered]:
  """Yields the sections that have a text, and headings with nothing below them, as documents.

  Args:
    outline: the page.
    name: the title if the page has none.
    title: the title that Markdown's settings give it, or empty.
  """
  sections = outline.sections
  first = next((section.heading for section in sections if section.level == 1), "")
  title = title or outline.title or first or name
  names = {part.casefold() for part in (title, *_PARTS_OF_TITLE.split(title))}
  path: list[Section] = []
  number = 0
  for place, section in enumerate(sections):
    while path and path[-1].level >= section.level:
      path.pop()
    if section.level > 1 or section.heading and section.heading.casefold() not in names:
      path.append(section)
    is_last = place + 1 == len(sections)
    has_below = not is_last and sections[place + 1].level > section.level
    if section.text or not has_below and (section.level or is_last):
      number += 1
      heading = " > ".join([title, *(one.heading for one in path)])
      yield number, Document(heading, section.text, id=title)
  if not outline.is_whole:
    what, num_chars = outline.hides_end
    lost = "what follows" if num_chars is None else f"{num_chars:,} characters"
    why = f"{what} is never closed: {lost}, up to the end of the page, cannot be read"
    yield number + 1, BadRecord("unclosed_element", why)
