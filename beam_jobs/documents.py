"""Documents: a title and a text, parsed from one record of a file."""

import dataclasses
import html
import itertools
import re
from collections.abc import Mapping
from typing import BinaryIO

from realm_tf.storage import json_lines
from realm_tf.storage.json_lines import BadRecord

# the longest Wikipedia article is well under half of this; longer texts are read in parts
MAX_ARTICLE_BYTES = 2_000_000

_EXTRACTED_URL = re.compile(r"\?curid=\d+$")  # in every record that WikiExtractor writes
_ATTRIBUTE = re.compile(r'\s*([A-Za-z_:-]+)="')
_ID = re.compile(r'<doc id="([^"]*)"')  # WikiExtractor writes it first
_FURTHER_NAME = re.compile(r"\s+[A-Za-z_:-]+=")
_MAX_HEADER_CHARS = 4000  # a Wikipedia title has at most 255 bytes
_MAX_ID_CHARS = 4000


@dataclasses.dataclass(frozen=True)
class Document:
  """A title and a text as written.

  Attributes:
    is_extracted: whether WikiExtractor wrote it.
    id: its `id` or `url` in the input, or the title of the page that it is a section of; empty if
      only its title identifies it.
  """

  title: str
  text: str
  is_extracted: bool = False
  id: str = ""


# What the reader of a format yields: a number from 1 that grows through the chunk (of the row,
# section or page), and a document, or why there is none.
Numbered = tuple[int, Document | BadRecord]


def parse_doc(raw: bytes) -> Document:
  """Parses WikiExtractor's `<doc id=".." url=".." title="..">`, the text, `</doc>`.

  Raises:
    BadRecord: it is too long, not closed, not UTF-8, or has no title.
  """
  if len(raw) > MAX_ARTICLE_BYTES:
    raise BadRecord("too_long", f"it is longer than {MAX_ARTICLE_BYTES:,} bytes")
  header, _, rest = raw.partition(b"\n")
  if not header.startswith(b"<doc "):
    raise BadRecord("outside_doc", "it is outside of <doc>")
  body, closed, _ = rest.rpartition(b"</doc>")
  if not closed:
    raise BadRecord("unclosed_doc", "</doc> is missing")
  try:
    found = _ID.match(text := header.decode())
    return _extracted(_title_of(text), body.decode(), id=found[1] if found else "")
  except UnicodeDecodeError:
    raise BadRecord("bad_utf8", "it is not UTF-8") from None


def _extracted(title: str, text: str, *, id: str) -> Document:
  """Returns an article with the entities unescaped that WikiExtractor writes for &, < and >."""
  return Document(html.unescape(title), html.unescape(text), is_extracted=True, id=id)


def _title_of(header: str) -> str:
  """Returns the title in `<doc id=".." title="..">`; other attributes may surround it.

  Quotes inside the title are not escaped.

  Raises:
    BadRecord: there is no title.
  """
  rest = header.strip().removeprefix("<doc ").removesuffix(">").strip()
  attribute = None
  if len(header) <= _MAX_HEADER_CHARS and rest.endswith('"'):
    attribute = _ATTRIBUTE.match(rest)
  while attribute and attribute[1] != "title":
    end = rest.find('"', attribute.end())
    attribute = _ATTRIBUTE.match(rest, end + 1) if end >= 0 else None
  if not attribute:
    raise BadRecord("bad_record", "<doc> has no title")
  *parts, _ = rest[attribute.end() :].split('"')
  # Pairs of a name and a value may follow the title.
  while len(parts) > 2 and _FURTHER_NAME.fullmatch(parts[-2]):
    del parts[-2:]
  return '"'.join(parts)


def parse_json(raw: bytes) -> Document:
  """Parses `{"title": str, "text": str}`, which `WikiExtractor --json` writes too.

  Raises:
    BadRecord: it is not such an object.
  """
  return of_record(json_lines.parse(raw), num_bytes=len(raw))


def of_record(record: Mapping, *, num_bytes: int) -> Document:
  """Returns the document in a record of `num_bytes` with title, text and perhaps id and url.

  Raises:
    BadRecord: title or text is not a string, or an article from WikiExtractor is too long.
  """
  title, text = record.get("title"), record.get("text")
  if not isinstance(title, str) or not isinstance(text, str):
    found = ", ".join(
      f"{json_lines.keys_of({name: value})}: {type(value).__name__}"
      for name, value in itertools.islice(record.items(), 10)
    )
    raise BadRecord("bad_record", f"wanted title and text as strings; found {found or 'nothing'}")
  url = record.get("url")
  url = url if isinstance(url, str) else ""
  id = _id_of(record) or url
  if _EXTRACTED_URL.search(url):
    if num_bytes > MAX_ARTICLE_BYTES:
      raise BadRecord("too_long", f"it is longer than {MAX_ARTICLE_BYTES:,} bytes")
    return _extracted(title, text, id=id)
  return Document(title, text, id=id)


def _id_of(record: Mapping) -> str:
  """Returns a record's id, which may be an integer; empty if it has none.

  Raises:
    BadRecord: it is too long.
  """
  id = record.get("id")
  found = str(id) if isinstance(id, str | int) and not isinstance(id, bool) else ""
  if len(found) > _MAX_ID_CHARS:
    raise BadRecord("bad_record", f"its id is longer than {_MAX_ID_CHARS:,} characters")
  return found


def read_whole(file: BinaryIO, *, limit: int) -> bytes:
  """Returns the contents of a file that cannot be read in parts.

  Raises:
    BadRecord: it has more than `limit` bytes.
  """
  data = file.read(limit + 1)
  if len(data) > limit:
    raise BadRecord("too_long", f"the file is longer than {limit:,} bytes; split it")
  return data
