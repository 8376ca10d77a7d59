"""Reads the text of PDF files, if pypdf is installed."""

import io
import logging
import re
import time
from collections.abc import Iterator
from typing import BinaryIO

from beam_jobs import documents, file_formats
from beam_jobs.documents import Document, Numbered
from beam_jobs.sources import Chunk
from realm_tf.storage import json_lines
from realm_tf.storage.json_lines import BadRecord

_MAX_BYTES = 100_000_000  # a PDF is read in one piece
_MAX_TEXT_CHARS = 20_000_000
_MAX_SECS = 300.0  # of this thread; a book of 1000 pages takes about a minute
_MAX_TITLE_CHARS = 300
_HYPHEN = re.compile(r"(?<=[^\W\d_])[-\u00ad]\n(?=[^\W\d_])")  # inside a word, at the end of a line
_LINE_END = re.compile(r"(?<!\n)\n(?!\n)")


def read(file: BinaryIO, chunk: Chunk) -> Iterator[Numbered]:
  """Yields the file as one document, and the pages that cannot be read.

  Raises:
    BadRecord: pypdf is not installed; or the file is encrypted, broken, without text, too long, or
      takes too much time.
  """
  try:
    import pypdf
  except ImportError:
    reason = file_formats.NO_PDF
    raise BadRecord(reason, file_formats.ADVICE[reason]) from None
  data = documents.read_whole(file, limit=_MAX_BYTES)
  logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what is broken is counted instead
  try:
    opened = pypdf.PdfReader(io.BytesIO(data))
    texts, bad = _texts(opened.pages)
    title = _title(opened) or chunk.source.title
  except BadRecord:
    raise
  except (pypdf.errors.FileNotDecryptedError, pypdf.errors.DependencyError):
    raise BadRecord("encrypted_pdf", "it is encrypted; save it without a password") from None
  except Exception as error:  # a broken file may raise anything
    raise BadRecord("broken_pdf", _shown(error)) from None
  text = _flowing("\n".join(filter(None, texts)))
  if text:
    yield 1, Document(title, text)
  elif not bad:
    raise BadRecord("scanned_pdf", "it has no text; recognise the letters in its pictures first")
  yield from bad


def _texts(pages) -> tuple[list[str], list[tuple[int, BadRecord]]]:
  """Returns the texts of pages, and which pages are broken and why.

  Raises:
    BadRecord: all pages together have too much text or take too much time.
  """
  started, num_chars = time.thread_time(), 0
  texts, bad = [], []

  def check_time(*_) -> None:
    if time.thread_time() - started > _MAX_SECS:
      raise BadRecord("too_slow", f"reading it takes over {_MAX_SECS:.0f} seconds; split it")

  for number, page in enumerate(pages, 1):
    try:
      text = page.extract_text(visitor_operand_before=check_time)
      if not json_lines.is_writable(text) or file_formats.is_binary(text.encode()):
        raise ValueError("its text is not letters")
      texts.append(text.strip())
      num_chars += len(text)
    except Exception as error:
      bad.append((number, BadRecord("broken_pdf_page", f"page {number}: {_shown(error)}")))
    check_time()
    if num_chars > _MAX_TEXT_CHARS:
      raise BadRecord("too_long", f"its text has over {_MAX_TEXT_CHARS:,} characters; split it")
  return texts, bad


def _title(opened) -> str:
  """Returns the title that the file gives itself, or an empty string."""
  try:
    title = " ".join(str((opened.metadata or {}).get("/Title", "")).split())
  except Exception:  # the title is broken, not the text
    return ""
  usable = json_lines.is_writable(title) and len(title) <= _MAX_TITLE_CHARS
  return title if usable and not file_formats.is_binary(title.encode()) else ""


def _flowing(text: str) -> str:
  """Joins the lines of paragraphs, and words that are hyphenated at the end of a line."""
  return _LINE_END.sub(" ", _HYPHEN.sub("", text)).strip()


def _shown(error: Exception) -> str:
  return " ".join(json_lines.shown(f"{error}".encode(errors="replace")).split()) or str(type(error))
