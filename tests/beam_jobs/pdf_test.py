"""beam_jobs/pdf.py: the text of PDF files, and why some have none."""

import gzip
import io
import json
import sys
import zlib

import pypdf
import pytest

from beam_jobs import corpus, make_passages, pdf, sources


def pdf_of(*pages: bytes, title: str = "", more: tuple[bytes, ...] = ()) -> bytes:
  """Returns a PDF file whose pages have these contents; 1 0 is its font, 2 0 its page tree.

  Objects in `more` are numbered from 5.
  """
  first = 5 + len(more)
  kids = [first + 2 * n for n in range(len(pages))]
  objects = [
    b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    b"<< /Type /Pages /Count %d /Kids [%s] >>"
    % (len(pages), b" ".join(b"%d 0 R" % kid for kid in kids)),
    b"<< /Type /Catalog /Pages 2 0 R >>",
    b"<< /Title (%s) >>" % title.encode(),
    *more,
  ]
  for number, contents in zip(kids, pages, strict=True):
    objects += [
      b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R /Resources"
      b" << /Font << /F 1 0 R >> /XObject << /X 5 0 R >> >> >>" % (number + 1),
      stream(contents),
    ]
  data, offsets = b"%PDF-1.4\n", []
  for number, one in enumerate(objects, 1):
    offsets.append(len(data))
    data += b"%d 0 obj\n%s\nendobj\n" % (number, one)
  rows = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
  size = len(objects) + 1
  return data + (
    b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 3 0 R /Info 4 0 R >>\n"
    b"startxref\n%d\n%%%%EOF\n" % (size, rows, size, len(data))
  )


def stream(data: bytes, entries: bytes = b"") -> bytes:
  return b"<< %s /Length %d >>\nstream\n%s\nendstream" % (entries, len(data), data)


def lines(*texts: str) -> bytes:
  """Returns the contents of a page with these lines."""
  shown = b"".join(b"(%s) Tj T*\n" % text.encode() for text in texts)
  return b"BT /F 12 Tf 14 TL 50 700 Td\n" + shown + b"ET"


def read(path) -> list[corpus.Article]:
  chunks = sources.split_into_chunks(sources.find_sources(str(path), format="auto"))
  return [article for chunk in chunks for article in corpus.Articles(chunk)]


def reasons(path, data: bytes) -> list[tuple[int, str, str]]:
  (path / "a.pdf").write_bytes(data)
  return [(one.line, one.reason, one.why) for one in read(path / "a.pdf") if one.reason]


MILL = pdf_of(
  lines("The Grey Mill was built by", "Ada in 1712. It was re-", "built later. It stands"),
  lines("on the Ost."),
  title="The Grey Mill",
)
TEXT = "The Grey Mill was built by Ada in 1712. It was rebuilt later. It stands on the Ost."


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_and_pages_are_joined(pack, tmp_path):
  (tmp_path / "report.pdf").write_bytes(pack(MILL))
  (article,) = read(tmp_path)
  assert (article.title, article.text, article.reason) == ("The Grey Mill", TEXT, "")


@pytest.mark.parametrize("title", ["", "x" * 301])
def test_without_a_title_it_has_the_name_of_the_file(title, tmp_path):
  (tmp_path / "Grey Mill.pdf").write_bytes(pdf_of(lines("It is old."), title=title))
  (article,) = read(tmp_path)
  assert (article.title, article.text) == ("Grey Mill", "It is old.")


def test_scans_are_named(tmp_path):
  ((line, reason, why),) = reasons(tmp_path, pdf_of(b"0 0 m 9 9 l S", b""))
  assert (line, reason) == (1, "scanned_pdf") and "no text" in why


def test_encrypted_files_are_named(tmp_path):
  for password, wanted in (("secret", [(1, "encrypted_pdf")]), ("", [])):
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(MILL))
    writer.encrypt(password, owner_password="owner", algorithm="RC4-128")
    with io.BytesIO() as file:
      writer.write(file)
      found = reasons(tmp_path, file.getvalue())
    assert [one[:2] for one in found] == wanted, f"password {password!r}"


def test_broken_files_are_named(tmp_path):
  for data in (MILL[:300], b"%PDF-1.4\n", MILL[:9] + bytes(500), b"%PDF-1.4\n" + b"[" * 100_000):
    ((line, reason, why),) = reasons(tmp_path, data)
    assert (line, reason) == (1, "broken_pdf") and why and "\n" not in why


def test_a_broken_page_leaves_the_others(tmp_path):
  letters = lines("\\001\\002\\003")
  data = pdf_of(lines("It is"), letters, lines("on the Ost."))
  assert reasons(tmp_path, data) == [
    (2, "broken_pdf_page", "page 2: its text is not letters"),
  ]
  assert [one.text for one in read(tmp_path) if not one.reason] == ["It is on the Ost."]


def test_without_pypdf_the_job_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / "a.txt").write_text("It is old.")
  (tmp_path / "b.pdf").write_bytes(MILL)
  found = sources.find_sources(str(tmp_path), format="auto")
  monkeypatch.setitem(sys.modules, "pypdf", None)
  wanted = ("pdf_file", "PDF needs pypdf: pip install 'realm-tf[pdf]'")
  got = [(one.reason, one.why) for one in read(tmp_path / "b.pdf")]
  assert got == [wanted]
  worker = [list(corpus.Articles(chunk)) for chunk in sources.split_into_chunks(found)]
  assert [(one.reason, one.why) for one in worker[1]] == [wanted], "a worker may lack it, too"
  info = make_passages.run(f"{tmp_path}/[ab].*", str(tmp_path / "P"), vocab_size=50)
  assert info["counts"]["dropped"] == {"pdf_file": 1}
  (row,) = [json.loads(line) for line in (tmp_path / "P/rejected.jsonl").open()]
  assert (row["file"], row["why"]) == (str(tmp_path / "b.pdf"), wanted[1])
  monkeypatch.undo()
  again = make_passages.run(f"{tmp_path}/[ab].*", str(tmp_path / "P"), vocab_size=50)
  assert again["counts"]["dropped"] == {}, "once it is installed, the passages are made again"


# ------------------------------------------------------------------------------------------- limits


def test_files_that_are_too_large_are_named(tmp_path, monkeypatch):
  monkeypatch.setattr(pdf, "_MAX_TEXT_CHARS", 50)
  assert reasons(tmp_path, MILL) == [
    (1, "too_long", "its text has over 50 characters; split it"),
  ]
  monkeypatch.setattr(pdf, "_MAX_BYTES", 500)
  assert reasons(tmp_path, MILL) == [
    (1, "too_long", "the file is longer than 500 bytes; split it"),
  ]


def test_forms_that_repeat_forms_end_in_time(tmp_path, monkeypatch):
  """Each draws the next one 100 times, so that there are 100 ** 9 words."""
  monkeypatch.setattr(pdf, "_MAX_SECS", 1.0)
  forms = [
    stream(
      b"/X Do " * 100,
      b"/Type /XObject /Subtype /Form /BBox [0 0 9 9]"
      b" /Resources << /XObject << /X %d 0 R >> >>" % number,
    )
    for number in range(6, 14)
  ]
  forms.append(stream(lines("word"), b"/Type /XObject /Subtype /Form /BBox [0 0 9 9]"))
  pages = [lines("Text.") + b" /X Do"] * 50
  found = reasons(tmp_path, pdf_of(*pages, more=tuple(forms)))
  assert found == [(1, "too_slow", "reading it takes over 1 seconds; split it")]


def test_a_page_that_unpacks_to_200_megabytes_is_named(tmp_path):
  bomb = zlib.compressobj(9)
  packed = b"".join(bomb.compress(b"q " * (1 << 19)) for _ in range(200)) + bomb.flush()
  data = pdf_of(lines("It is old."), b"")
  data = data.replace(stream(b""), stream(packed, b"/Filter /FlateDecode"))
  ((line, reason, why),) = reasons(tmp_path, data)
  assert (line, reason) == (2, "broken_pdf_page") and "imit" in why
