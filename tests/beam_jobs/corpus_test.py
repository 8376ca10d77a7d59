"""The files that users have in their folders, one by one.

Tests which are read, and which are rejected for what reason.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import time
import zipfile

import numpy as np
import pytest

from beam_jobs import blocking, corpus, documents, sources
from realm_tf.corpus import tokenization
from realm_tf.storage import artifacts, input_files

TEXT = "The Grey Mill was built by Ada in 1712. It stands on the Ost."


def read(path, *, format: str = "auto") -> list[corpus.Article]:
  """The articles of a file or folder."""
  chunks = sources.split_into_chunks(sources.find_sources(str(path), format=format))
  return [article for chunk in chunks for article in corpus.Articles(chunk)]


def names(path) -> list[str]:
  return [os.path.relpath(found, path) for found in input_files.find(str(path))]


# ---------------------------------------------------------------------------- which files are meant


def test_a_path_that_exists_is_no_pattern(tmp_path):
  for name in ("[v2]/a.txt", "[v2]/b.txt", "what?/a*.txt", "a,b/x,y.txt", "c.txt", "v/a.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(TEXT)

  def found(*parts: str) -> list[str]:
    paths = input_files.find(",".join(f"{tmp_path}/{part}" for part in parts))
    return [os.path.relpath(path, tmp_path) for path in paths]

  assert found("[v2]") == found("[v2]/*.txt") == found("[v2]/?.txt") == ["[v2]/a.txt", "[v2]/b.txt"]
  assert found("[v]/a.txt") == ["v/a.txt"], "it is still a pattern"
  assert found("what?") == found("what?/a*.txt") == ["what?/a*.txt"]
  assert found("a,b") == found("a,b/x,y.txt") == found("a,b/*") == ["a,b/x,y.txt"]
  assert found("a,b/x,y.txt", "c.txt", "[v2]/a.txt") == ["[v2]/a.txt", "a,b/x,y.txt", "c.txt"]
  assert found("**/a.txt") == ["[v2]/a.txt", "v/a.txt"]
  with pytest.raises(artifacts.UserError, match="no file '.*absent.txt'"):
    found("c.txt", "absent.txt")


def test_hidden_files_and_folders_are_passed_over_unless_named(tmp_path):
  for name in ("a.txt", ".b.txt", ".git/c.txt", "d/.ipynb_checkpoints/a.txt", "d/e.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(TEXT)
  assert names(tmp_path) == ["a.txt", "d/e.txt"]
  assert names(tmp_path / "d/.ipynb_checkpoints") == ["a.txt"] and names(tmp_path / ".b.txt") == [
    "."
  ]
  hidden = tmp_path / ".all"
  hidden.mkdir()
  (hidden / "f.txt").write_text(TEXT)
  assert names(hidden) == ["f.txt"]


def test_links_and_odd_names_reject_that_file_only(tmp_path):
  (tmp_path / "good.txt").write_text(TEXT)
  os.symlink("/nowhere/at/all", tmp_path / "dangling.txt")
  os.symlink(tmp_path, tmp_path / "loop")
  os.mkfifo(tmp_path / "pipe")
  with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"), "wb") as file:
    file.write(TEXT.encode())
  got = {
    source.path.rpartition("/")[2]: source.reason
    for source in sources.find_sources(str(tmp_path), format="auto")
  }
  assert got == {
    "good.txt": "",
    "dangling.txt": "unreadable",
    "pipe": "not_a_file",
    "caf\\xe9.txt": "name_not_utf8",
  }
  assert [article.reason for article in read(tmp_path)].count("") == 1


# ------------------------------------------------------------------------------------ what is prose


def tar_of(data: bytes) -> bytes:
  with io.BytesIO() as packed, tarfile.open(fileobj=packed, mode="w") as file:
    member = tarfile.TarInfo("a.txt")
    member.size = len(data)
    file.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def zip_of(data: bytes) -> bytes:
  with io.BytesIO() as packed:
    with zipfile.ZipFile(packed, "w") as file:
      file.writestr("a.txt", data)
    return packed.getvalue()


NO_PROSE = {
  "a.tar": (tar_of(TEXT.encode()), "tar_file"),
  "a.tar.gz": (gzip.compress(tar_of(TEXT.encode())), "tar_file"),
  "a.docx": (zip_of(TEXT.encode()), "zip_file"),
  "a.pdf": (b"%PDF-1.4\n" + TEXT.encode(), "broken_pdf"),
  "a.parquet": (b"PAR1" + bytes(50), "broken_parquet"),
  "b.parquet": (TEXT.encode(), "broken_parquet"),
  "a.arrow": (b"ARROW1\0\0" + bytes(50), "broken_arrow"),
  "b.feather": (TEXT.encode(), "broken_arrow"),
  "old.feather": (b"FEA1" + bytes(50), "old_feather_file"),
  "a.png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "image_file"),
  "picture": (b"\xff\xd8\xff\xe0" + bytes(50), "image_file"),
  "icon": (b"\0\0\1\0" + bytes(50), "image_file"),
  "a.gif": (b"GIF89a\1\0\1\0" + bytes(50), "binary_file"),
  "film": (b"\0\0\0\x18ftypmp42" + bytes(50), "video_file"),
  "letters.ttf": (b"\0\1\0\0" + bytes(50), "font_file"),
  "page.md": (b"# Title\n" + bytes(50), "binary_file"),
  "page.html": (b"<p>" + bytes(50), "binary_file"),
  "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "git_lfs_file"),
  "a.npy": (np.arange(9.0).tobytes(), "binary_file"),
  "integers": (np.arange(1, 50, dtype=np.int32).tobytes(), "binary_file"),
  "random": (
    np.random.default_rng(0).bytes(5000)[:1] + b"\0" + np.random.default_rng(1).bytes(5000),
    "binary_file",
  ),
  "zeros.txt": (TEXT.encode() + bytes(3) + TEXT.encode(), "binary_file"),
  "control.txt": (TEXT.encode() * 2 + b"\x01\x02\x03\x04", "binary_file"),
  "table": (b"1\tThe mill\tMill\n2\tThe Ost\tOst\n3\tAda\tAda\n", "table_file"),
  "a.tsv": (b"id\ttext\n", "table_file"),
  "a.csv.gz": (gzip.compress(b"id,text\n"), "table_file"),
  "dump.xml.bz2": (bz2.compress(b'<mediawiki xmlns="x"><page/></mediawiki>'), "xml_file"),
  "drawing": (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "xml_file"),
  "latin1.txt": ("Die Mühle gehört Ada.".encode("latin-1"), "bad_utf8"),
  "broken.bz2": (bz2.compress(TEXT.encode())[:20] + b"\xff" * 30, "broken_bz2"),
  "cut.xz": (lzma.compress(TEXT.encode())[:-20], "truncated_xz"),
}


@pytest.mark.parametrize("name", NO_PROSE)
def test_no_prose_is_rejected_with_a_reason(name, tmp_path):
  data, reason = NO_PROSE[name]
  (tmp_path / name).write_bytes(data)
  assert [article.reason for article in read(tmp_path) if article.reason] == [reason]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_texts_in_any_encoding_and_packing(encoding, pack, tmp_path):
  text = "The mill of \u015alusarz\u0142 stands.\x0cIt \x1b[1mturns\x1b[0m."
  (tmp_path / "Grey Mill.txt.gz").write_bytes(pack(text.encode(encoding)))
  (article,) = read(tmp_path)
  assert (article.title, article.text, article.reason) == ("Grey Mill", text, "")


def test_prose_that_looks_odd_is_prose(tmp_path):
  texts = {
    "list": "[1] Smith wrote it. [2] So did Ada.",
    "brace": "{ is a brace.",
    "tabs": "a\tb\nno tab\nc\td\nEnd.",
    "indented": "One line.\n\tTwo lines.\n\tThree.",
    "mails": "<ada@example.org> wrote this.",
  }
  for name, text in texts.items():
    (tmp_path / name).write_text(text)
  assert {article.title: article.text for article in read(tmp_path)} == texts


# ------------------------------------------------------------------------------------------ records


def test_own_documents_are_taken_as_they_are(tmp_path):
  text = "See ?id=7&section=2&copy=1 and f(&param, &times). Write &amp;lt; there."
  (tmp_path / "manual.txt").write_text(text)
  titles = [
    "Index of refraction",
    "List of suppliers",
    "Outline of the plan",
    "Mercury (disambiguation)",
    "A &amp; B",
  ]
  (tmp_path / "own.json").write_text(
    json.dumps([{"_id": 1, "title": title, "text": text} for title in titles], indent=1)
  )
  got = read(tmp_path)
  assert [article.title for article in got] == ["manual", *titles] and {
    article.text for article in got
  } == {text}
  assert all(len(corpus.sentences_of(article)) == 2 for article in got)
  alone = corpus.Article(0, 1, "Hamlet", "Hamlet")
  assert corpus.sentences_of(alone) == ["Hamlet"], "a text equal to its title is kept"


HEADERS = {
  '<doc id="1" url="u" title="Grey Mill">': "Grey Mill",
  '<doc id="1" url="u" title="Grey Mill" language="en" revision="88">': "Grey Mill",
  '<doc title="Grey Mill" url="u" id="1" revid="7">': "Grey Mill",
  '<doc id="1" revid="2" url="u" title="The "Old" Mill &amp; Bakery">': 'The "Old" Mill & Bakery',
  '<doc id="1" url="u" title=""Old"" language="en">': '"Old"',
  '<doc id="1" url="u" title="a > b" and "c"" language="en"  revision="8">': 'a > b" and "c"',
  '<doc id="1" url="u" title="x="1" y">': 'x="1" y',
  '<doc id="1" url="u" title="">': "",
  '<doc id="1" url="u" title="A &lt;b&gt; &quot;c&quot;" x-y="&amp;">': 'A <b> "c"',
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_of_every_wikiextractor(header, tmp_path):
  (tmp_path / "wiki_00").write_text(f"{header}\nTitle\n\nR&amp;D was there.\n\n</doc>\n")
  (article,) = read(tmp_path)
  assert (article.title, article.text, article.reason) == (
    HEADERS[header],
    "Title\n\nR&D was there.",
    "",
  )


def test_broken_headers_are_quick_and_counted(tmp_path):
  bad = [
    "<doc>",
    '<doc id="1">',
    "<doc title=>",
    '<doc title="x>',
    '<doc title="' + 'a="b" ' * 200_000 + '">',
  ]
  (tmp_path / "wiki_00").write_text("".join(f"{header}\nText.\n</doc>\n" for header in bad))
  assert {article.reason for article in read(tmp_path, format="wikiextractor")} == {
    "bad_record",
    "outside_doc",
  }


def test_wikiextractors_json_has_its_rules(tmp_path):
  record = {
    "id": "1",
    "revid": "2",
    "url": "https://en.wikipedia.org/wiki?curid=1",
    "text": "R&amp;D\n\nIt is &lt;b&gt;.",
  }
  (tmp_path / "wiki_00").write_text(
    "".join(json.dumps({**record, "title": title}) + "\n" for title in ("R&amp;D", "List of x"))
  )
  first, second = read(tmp_path)
  assert (first.title, corpus.sentences_of(first)) == ("R&D", ["It is <b>."])
  with pytest.raises(corpus.Rejected, match="dropped_title"):
    corpus.sentences_of(second)


def test_a_bad_record_says_what_was_found(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"title": "a", "text": "Good."}\n\n{"_id": 3, "body": "x"}\n')
  good, bad = read(tmp_path)
  assert (good.line, bad.line, bad.reason) == (1, 3, "bad_record")
  assert bad.why == "wanted title and text as strings; found _id: int, body: str"


def test_very_long_texts_come_in_parts_and_nothing_is_lost(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, "MAX_ARTICLE_BYTES", 1000)
  texts = {
    "lines": "\n".join(f"Line {n} is here." for n in range(300)),
    "sentences": " ".join(f"Sentence {n} is here." for n in range(300)),
    "words": " ".join(f"w{n}" for n in range(900)),
    "letters": "\u6f22\u00e9x" * 900,
  }
  for name, text in texts.items():
    (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"title": name, "text": text}) + "\n")
  for name, text in texts.items():
    for ending in ("txt", "jsonl"):
      got = read(tmp_path / f"{name}.{ending}")
      assert len(got) > 3 and [article.part for article in got] == list(range(len(got))), name
      assert "".join("".join(article.text.split()) for article in got) == "".join(text.split()), (
        name,
        ending,
      )
      assert max(len(article.text.encode()) for article in got) <= 1000 and {
        article.title for article in got
      } == {name}
  ends = [article.text[-1] for article in read(tmp_path / "sentences.txt")]
  assert set(ends) == {"."}, "parts end with a sentence if possible"


# ----------------------------------------------------------------------------------------- blocking

WORDS = [
  "mill",
  "##s",
  "##ing",
  "grind",
  "ost",
  ".",
  "-",
  "b",
  "##b",
  "x",
  "##x",
  "\u6f22",
  "\u0e01",
  "##\u0e01",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> tokenization.Tokenizer:
  path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
  path.write_text("\n".join([*tokenization.SPECIAL, *WORDS]) + "\n")
  return tokenization.Tokenizer(str(path))


@pytest.mark.parametrize(
  "text",
  [
    "mill grinding mills ost " * 100,
    "x" * 90 + " mill " + "b" * 90,
    "mill-" * 200,
    "\u6f22" * 500,
    "\u0e01" * 30 + " " + "\u0e01" * 33,
    "\u00e9 caf\u00e9 " * 200,
    "unknown words only here " * 90,
    "e" * 60_000 + " mill",
  ],
  ids=[
    "words",
    "long words",
    "one word",
    "chinese",
    "thai",
    "unknown",
    "all unknown",
    "a megabyte of nothing",
  ],
)
def test_sentences_longer_than_a_passage_are_split(tokenizer, text):
  text = " ".join(text.split())
  blocker = blocking.Blocker(tokenizer, max_tokens=32)
  (made,) = blocker([corpus.Article(0, 1, "mill", text)])
  parts = [sentence for block in made.blocks for sentence in block]
  assert "".join(parts).replace(" ", "") == text.replace(" ", ""), "no letter is lost"
  if max(map(len, text.split())) < 25:
    assert " ".join(parts) == text, "and words stay whole"
  sizes = tokenizer.lengths([" ".join(block) for block in made.blocks])
  assert sizes.max() <= 32 - 3 - 1 and max(len(" ".join(block)) for block in made.blocks) <= 64 * 32
  assert blocker.counts[blocking.SPLIT] == 1 and blocker.first[blocking.SPLIT][0] is made.article


def test_titles_leave_room_and_unknown_words_are_counted(tokenizer):
  blocker = blocking.Blocker(tokenizer, max_tokens=32)
  long, short = blocker(
    [corpus.Article(0, 1, "mill " * 40, "ost ."), corpus.Article(9, 2, "ost", "mill of ost .")]
  )
  assert (
    long.title == " ".join(["mill"] * 16) and long.blocks == [["ost ."]] and short.title == "ost"
  )
  assert blocker.counts == {
    blocking.SPLIT: 0,
    blocking.CUT_TITLES: 1,
    blocking.WORD_PIECES: 40 + 2 + 1 + 4,
    blocking.UNKNOWN: 1,
  }
  assert (
    blocker.first[blocking.UNKNOWN] == (short.article, "of")
    and blocker.first[blocking.CUT_TITLES][0] is long.article
  )


HEADER_PATTERNS = {
  "one long header": "<doc " + 'a="" ' * 300_000 + 'title="x">\n',
  "titles": "<doc " + '<doc  title="' * 100_000 + '">\n',
  "many headers": ('<doc title="' + '" a="' * 790 + '">\nText.\n</doc>\n') * 400,
  "spaces": ('<doc title="' + ('"' + " " * 40) * 90 + '">\nText.\n</doc>\n') * 400,
}


@pytest.mark.parametrize("text", HEADER_PATTERNS.values(), ids=HEADER_PATTERNS)
def test_time_grows_with_a_header_not_with_its_square(text, tmp_path):
  good = '<doc title="Good">\nGood\n\nText is here.\n</doc>\n'
  (tmp_path / "wiki_00").write_text(text + "Text.\n</doc>\n" + good)
  started = time.process_time()
  found = read(tmp_path, format="wikiextractor")
  assert found[-1].title == "Good" and time.process_time() - started < 2


def test_records_that_nobody_can_write_are_rejected_and_named(tmp_path):
  hostile = [
    '{"title": "a", "text": ' + "[" * 1000 + "]" * 1000 + "}",
    '{"title": "a", "text": "b", "more": ' + '{"x":' * 900 + "1" + "}" * 901,
    '{"title": "a", "text": "b", "n": ' + "9" * 4301 + "}",
    '{"title": "a", "text": "b", "n": 1e999}',
  ]
  rows = [*hostile, '{"title": "Good", "text": "It is good."}']
  (tmp_path / "a.jsonl").write_text("".join(f"{row}\n" for row in rows))
  *bad, good = read(tmp_path)
  assert [(article.reason, article.line) for article in bad] == [
    ("bad_json", line) for line in range(1, 5)
  ]
  assert good.title == "Good" and not good.reason and all(article.text for article in bad)
