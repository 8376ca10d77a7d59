"""The formats of the files of a corpus, recognised by their first bytes, then by their names."""

import importlib.util
import re
import unicodedata

from realm_tf.storage import json_values, packed_files

FORMATS = (
  "auto",
  "wikiextractor",
  "jsonl",
  "text",
  "html",
  "markdown",
  "parquet",
  "arrow",
  "pdf",
)
PACKED = re.compile(r"\.(gz|bz2|xz)$", re.IGNORECASE)
HEAD_BYTES = 1 << 16
NO_PDF = "pdf_file"
ADVICE = {  # reason → what to do
  NO_PDF: "PDF needs pypdf: pip install 'realm-tf[pdf]'",
  "git_lfs_file": "it only points to the file: git lfs pull",
  "packed_parquet": "it cannot be read from its end: unpack it",
  "packed_arrow": "it cannot be read from its end: unpack it",
}

_MAGIC = (  # (offset, bytes at that offset, kind of file)
  (0, b"PAR1", "parquet"),
  (0, b"PARE", "parquet"),  # encrypted
  (0, b"ARROW1", "arrow"),
  (0, b"%PDF-", "pdf"),
  (0, b"FEA1", "old_feather"),
  (0, b"PK\x03\x04", "zip"),
  (0, b"PK\x05\x06", "zip"),
  (257, b"ustar", "tar"),
  (0, b"\x28\xb5\x2f\xfd", "zstd"),
  (0, b"7z\xbc\xaf\x27\x1c", "7z"),
  (0, b"Rar!\x1a", "rar"),
  (0, b"\xd0\xcf\x11\xe0", "old_office"),
  (0, b"{\\rtf", "rtf"),
  (0, b"SQLite format 3", "sqlite"),
  (0, b"\x89HDF", "hdf5"),
  (0, b"\x89PNG\r\n", "image"),
  (0, b"\xff\xd8\xff", "image"),
  (0, b"II*\0", "image"),
  (0, b"MM\0*", "image"),
  (0, b"\0\0\1\0", "image"),
  (0, b"\0\1\0\0", "font"),
  (0, b"\0\0\0\x18ftyp", "video"),
  (0, b"\0\0\0\x1cftyp", "video"),
  (0, b"\0\0\0\x20ftyp", "video"),
  (0, b"version https://git-lfs", "git_lfs"),
)
# A message of an Arrow stream: a mark and a length below 1 MiB; the schema comes first.
_ARROW_STREAM = re.compile(rb"\xff{4}..[\0-\x0f]\0", re.DOTALL)
_BINARY_FORMATS = ("parquet", "arrow", "arrow_stream", "pdf")
_NAMES = (  # (ends of names, format)
  ((".jsonl", ".json", ".ndjson"), "jsonl"),
  ((".html", ".htm", ".xhtml"), "html"),
  ((".md", ".markdown", ".mkd", ".mdx", ".qmd", ".rmd"), "markdown"),
  ((".parquet",), "parquet"),
  ((".arrow", ".feather"), "arrow_stream"),  # a file would have its first bytes
  ((".pdf",), "pdf"),
  ((".txt", ".text", ".tsv", ".csv", ".xml", ".svg"), "text"),
)
# Comments and a declaration may come first.
_FIRST = rb"(?>\s+|<!--.*?-->|<\?xml.*?\?>)*+"
_HTML = re.compile(_FIRST + rb"<(!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL)
_HTML_PART = re.compile(
  _FIRST
  + rb"<(head|body|meta|title|main|article|section|header|nav|div|h[1-6]|p|table|ul|ol)\b[^<]*>",
  re.IGNORECASE | re.DOTALL,
)
_MARKDOWN = re.compile(
  rb"(---[ \t]*\r?\n(?>[^\n]*\n){0,100}?---[ \t]*\r?\n|#{1,6} +\S[^\n]*\n\s*\n)"
)
_XML = re.compile(rb"<(\?xml|!doctype|mediawiki|rss|feed|svg)\b", re.IGNORECASE)
_CONTROL = bytes({*range(32), 127} - {*b"\t\n\v\f\r\x1b"})


def detect(path: str, first: bytes, head: bytes, *, format: str) -> tuple[str, str]:
  """Returns the format of a file, and why it is rejected or an empty string.

  Args:
    path: of the file; its ending decides if its contents do not.
    first: its first bytes as stored.
    head: up to HEAD_BYTES of its contents, unpacked, in UTF-8.
    format: one of FORMATS; "auto" recognises it.

  Returns:
    One of FORMATS except auto, or "json": an array, or objects that span several lines; or
    "arrow_stream". Rejected files may have any.
  """
  kind = _kind(first) or _kind(head)
  name = PACKED.sub("", path).lower()
  if kind not in _BINARY_FORMATS and name.endswith(".pdf") and b"%PDF-" in head[:1024]:
    kind = "pdf"  # readers of PDF pass over what comes before
  if kind and (kind not in _BINARY_FORMATS or format not in ("auto", kind.removesuffix("_stream"))):
    return "text", f"{kind}_file"
  is_packed = packed_files.packing_of(first) != ""
  found = kind or (_guess(name, head) if format == "auto" else format)
  if found == "arrow" and not kind:
    found = "arrow_stream"
  if found in ("parquet", "arrow") and is_packed:
    return found, f"packed_{found}"
  if found == "pdf" and importlib.util.find_spec("pypdf") is None:
    return "text", NO_PDF
  if found == "jsonl" and not json_values.is_lines(head):
    return "json", ""
  reason = _no_prose(name, head, is_forced=format != "auto") if found == "text" else ""
  if not reason and found in ("text", "html", "markdown"):
    is_plain = packed_files.is_plain(first)
    reason = "binary_file" if is_binary(head) or not is_plain and _is_gibberish(head) else ""
  return found, reason


def _kind(data: bytes) -> str:
  if _ARROW_STREAM.match(data):
    return "arrow_stream"
  return next((kind for at, magic, kind in _MAGIC if data.startswith(magic, at)), "")


def _guess(name: str, head: bytes) -> str:
  begin = head.lstrip()
  if begin.startswith(b"<doc "):
    return "wikiextractor"
  if re.match(rb'(\[\s*)?\{\s*["}]', begin):
    return "jsonl"
  if _HTML.match(begin):
    return "html"
  if named := next((format for ends, format in _NAMES if name.endswith(ends)), ""):
    return named
  if _HTML_PART.match(begin):
    return "html"
  return "markdown" if _MARKDOWN.match(begin) else "text"


def _no_prose(name: str, head: bytes, *, is_forced: bool) -> str:
  if is_forced:
    return ""
  begin = head.lstrip()
  if _XML.match(begin) or name.endswith((".xml", ".svg")):
    return "xml_file"
  return "table_file" if _is_table(name, begin) else ""


def _is_table(name: str, begin: bytes) -> bool:
  """Returns whether a file is tab-separated or comma-separated.

  It is if its name says so, or if it begins with three or more lines with the same number of tabs.
  """
  whole = begin.rpartition(b"\n")[0].splitlines()
  tabs = [line.strip().count(b"\t") for line in whole if line.strip()]
  return name.endswith((".tsv", ".csv")) or (len(tabs) >= 3 and tabs[0] > 0 and len(set(tabs)) == 1)


def is_binary(data: bytes) -> bool:
  """Returns whether bytes are not text: any zero byte, or more than 1 % control characters."""
  return b"\0" in data or len(data) - len(data.translate(None, _CONTROL)) > len(data) / 100


def _is_gibberish(head: bytes) -> bool:
  """Returns whether a decoded text has many unassigned characters, as if wrongly read as UTF-16."""
  text = head[: HEAD_BYTES - 8].decode(errors="replace")
  odd = sum(letter == "\ufffd" or unicodedata.category(letter) in ("Cn", "Co") for letter in text)
  return odd > len(text) / 100
