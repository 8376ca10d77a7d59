"""beam_jobs/file_formats.py: formats are recognised by contents, then by names, or are forced."""

import gzip
import io
import json
import pathlib
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from apache_beam.io import filesystem

from beam_jobs import corpus, file_formats, make_passages, sources
from realm_tf.corpus import passages

ROOT = pathlib.Path(__file__).parents[2]
TEXT = "The Grey Mill was built by Ada in 1712."
TABLE = pa.table({"title": ["Grey Mill"], "text": [TEXT]})


def parquet() -> bytes:
  with io.BytesIO() as file:
    pq.write_table(TABLE, file)
    return file.getvalue()


def arrow(new) -> bytes:
  with io.BytesIO() as file:
    with new(file, TABLE.schema) as writer:
      writer.write_table(TABLE)
    return file.getvalue()


# name → (contents, format)
FILES = {
  "wiki_00": (b'<doc id="1" url="u" title="Grey Mill">\n' + TEXT.encode(), "wikiextractor"),
  "lines": (b'{"title": "a", "text": "b"}\n', "jsonl"),
  "list": (b'[{"title": "a", "text": "b"}]', "json"),
  "a.txt": (TEXT.encode(), "text"),
  "named.txt": (b"# A comment\n\nText.", "text"),
  "list.txt": (b"<p> is a tag.", "text"),
  "saved": (b"<!-- saved --> <!-- twice -->\n<HTML><p>Hello.</html>", "html"),
  "saved.txt": (b"<!DOCTYPE html>\n<p>Hello.", "html"),
  "xhtml.xml": (b'<?xml version="1.0"?>\n<html xmlns="x"><p>Hello.</p></html>', "html"),
  "part": (b'<div class="x">The <b>mill</b> stands.</div>', "html"),
  "a.HTM": (TEXT.encode(), "html"),
  "a.html.gz": (gzip.compress(b"<b>Hello."), "html"),
  "README.md": (b'<p align="center">Hello.</p>', "markdown"),
  "README": (b"# Mill\n\nText.", "markdown"),
  "settings": (b"---\ntitle: Mill\n---\nText.", "markdown"),
  "a.markdown": (TEXT.encode(), "markdown"),
  "rule": (b"--- a rule\nText.", "text"),
  "table": (parquet(), "parquet"),
  "misnamed.txt": (parquet(), "parquet"),
  "arrow": (arrow(pa.ipc.new_file), "arrow"),
  "a.arrow": (arrow(pa.ipc.new_stream), "arrow_stream"),
  "stream.txt.gz": (gzip.compress(arrow(pa.ipc.new_stream)), "arrow_stream"),
  "printed": (b"%PDF-1.7\n", "pdf"),
  "late.pdf": (b"\n\nx %PDF-1.7\n", "pdf"),
  "late.txt": (b"A PDF begins with %PDF-1.7", "text"),
}


@pytest.mark.parametrize("name", FILES)
def test_formats_are_recognised(name, tmp_path):
  data, wanted = FILES[name]
  (tmp_path / name).write_bytes(data)
  (source,) = sources.find_sources(str(tmp_path), format="auto")
  assert (source.format, source.reason) == (wanted, "")


class RamFileSystem(filesystem.FileSystem):
  """Opens TensorFlow's ram:// for Beam as Beam opens gs://: a buffered stream that can seek."""

  @classmethod
  def scheme(cls) -> str:
    return "ram"

  def open(self, path, mime_type=None, compression_type=None):
    return io.BufferedReader(RamStream(path))

  def _unused(self, *_, **__):
    raise NotImplementedError

  join = split = mkdirs = has_dirs = _list = create = copy = rename = exists = size = _unused
  last_updated = checksum = metadata = delete = _unused


class RamStream(io.RawIOBase):
  def __init__(self, path: str):
    with tf.io.gfile.GFile(path, "rb") as file:
      self._data = io.BytesIO(file.read())

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    return self._data.readinto(buffer)

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    return self._data.seek(offset, whence)


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_read_from_an_object_store(name, tmp_path):
  (tmp_path / name).write_bytes(FILES[name][0])
  folder = f"ram://corpus/{name}.d"
  tf.io.gfile.makedirs(folder)
  tf.io.gfile.copy(str(tmp_path / name), f"{folder}/{name}")
  here, there = (
    [
      (article.title, article.text, article.reason, article.why)
      for chunk in sources.split_into_chunks(sources.find_sources(place, format="auto"))
      for article in corpus.Articles(chunk)
    ]
    for place in (str(tmp_path), f"{folder}/*")
  )
  assert here == there and here


@pytest.mark.parametrize("format", sources.FORMATS[1:])
def test_a_format_can_be_forced(format, tmp_path):
  """Bytes that are not text are never read as text."""
  (tmp_path / "a.txt").write_text(TEXT)
  (tmp_path / "b").write_bytes(parquet())
  (tmp_path / "c").write_bytes(b"PK\x03\x04")
  found = sources.find_sources(str(tmp_path), format=format)
  text, table, packed = [(source.format.removesuffix("_stream"), source.reason) for source in found]
  assert text == (format, "")
  assert table == (("parquet", "") if format == "parquet" else ("text", "parquet_file"))
  assert packed == ("text", "zip_file")
  reasons = {
    article.reason
    for chunk in sources.split_into_chunks(found)
    for article in corpus.Articles(chunk)
    if chunk.source.path.endswith("a.txt")
  }
  wanted = {
    "wikiextractor": "outside_doc",
    "jsonl": "bad_json",
    "parquet": "broken_parquet",
    "arrow": "broken_arrow",
    "pdf": "broken_pdf",
  }
  assert reasons == {wanted.get(format, "")}


def test_tables_that_need_their_end_are_not_read_packed(tmp_path):
  (tmp_path / "a.gz").write_bytes(gzip.compress(parquet()))
  (tmp_path / "b.gz").write_bytes(gzip.compress(arrow(pa.ipc.new_file)))
  chunks = sources.split_into_chunks(sources.find_sources(str(tmp_path), format="auto"))
  got = [(article.reason, article.why) for chunk in chunks for article in corpus.Articles(chunk)]
  assert got == [
    ("packed_parquet", "it cannot be read from its end: unpack it"),
    ("packed_arrow", "it cannot be read from its end: unpack it"),
  ]


def test_every_place_lists_the_same_formats():
  listed = '"auto", "wikiextractor", "jsonl", "text", "html", "markdown", "parquet", "arrow", "pdf"'
  assert tuple(json.loads(f"[{listed}]")) == file_formats.FORMATS == sources.FORMATS
  for config in ROOT.glob("configs/*.py"):
    if comment := re.search(r"# of the articles: (.*?)\n\s*format=", config.read_text(), re.DOTALL):
      names = tuple(re.findall(r'"(\w+)"', comment[1]))
      assert names == file_formats.FORMATS, f"{config} should list each format"
  parameters = json.loads((ROOT / "deploy/template_metadata.json").read_text())["parameters"]
  (format,) = [one for one in parameters if one["name"] == "format"]
  assert format["regexes"] == [f"^({'|'.join(file_formats.FORMATS)})$"]


def test_a_folder_of_all_formats_becomes_passages(tmp_path):
  """Passages are in the order of the files; what is no text is counted, named and kept."""
  folder = tmp_path / "in"
  folder.mkdir()
  contents = {
    "a.html": b"<title>Ost</title><h2>Course</h2>The Ost flows south.",
    "b.md": b"# Talvik\n\nTalvik is a town.\n\n## History\n\nIt was built in 1712.",
    "c.parquet": parquet(),
    "d.arrow": arrow(pa.ipc.new_stream),  # the same row again
    "e.txt": b"The sea is near.",
    "f.jsonl": b'{"title": "Gorneth", "text": "The Gorneth is a river."}\n',
    "g.docx": b"PK\x03\x04" + bytes(50),
    "h.png": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "i": bytes(range(256)),
  }
  for name, data in contents.items():
    (folder / name).write_bytes(data)
  info = make_passages.run(f"{folder}/*", str(tmp_path / "P"), vocab_size=200)
  table = passages.load(str(tmp_path / "P"))
  assert list(zip(table.titles, table.texts, strict=True)) == [
    ("Ost > Course", "The Ost flows south."),
    ("Talvik", "Talvik is a town."),
    ("Talvik > History", "It was built in 1712."),
    ("Grey Mill", TEXT),
    ("e", "The sea is near."),
    ("Gorneth", "The Gorneth is a river."),
  ]
  wanted = {"duplicate": 1, "zip_file": 1, "image_file": 1, "binary_file": 1}
  assert info["counts"]["dropped"] == wanted
  rows = [json.loads(line) for line in (tmp_path / "P/rejected.jsonl").read_text().splitlines()]
  got = [(pathlib.Path(row["file"]).name, row["reason"]) for row in rows]
  assert got == [
    ("d.arrow", "duplicate"),
    ("g.docx", "zip_file"),
    ("h.png", "image_file"),
    ("i", "binary_file"),
  ]
