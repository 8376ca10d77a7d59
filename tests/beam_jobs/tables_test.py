"""beam_jobs/tables.py: rows of Parquet and Arrow, good, bad, damaged and split among workers."""

import gzip
import io
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_jobs import corpus, documents, make_passages, sources
from realm_tf.corpus import passages

ROOT = pathlib.Path(__file__).parents[2]
NUM_ROWS = 1000
TITLES = [f"Mill {n}" for n in range(NUM_ROWS)]
TEXTS = [
  f"Mill {n} was built in {n}. " + "It stands on the Ost. " * (n % 7) for n in range(NUM_ROWS)
]
TABLE = pa.table({"id": list(range(NUM_ROWS)), "url": TITLES, "title": TITLES, "text": TEXTS})
GROUP = 90  # rows


def write(path: pathlib.Path, table: pa.Table = TABLE, *, group: int = GROUP, **options) -> None:
  """Writes a table in the format that the name of the file says."""
  if path.suffix == ".parquet":
    pq.write_table(table, path, row_group_size=group, **options)
    return
  new = pa.ipc.new_stream if path.suffix == ".stream" else pa.ipc.new_file
  with io.BytesIO() as file:
    with new(file, table.schema, **options) as writer:
      writer.write_table(table, max_chunksize=group)
    path.write_bytes(file.getvalue())


def read(path, *, format: str = "auto") -> list[corpus.Article]:
  chunks = sources.split_into_chunks(sources.find_sources(str(path), format=format))
  return [article for chunk in chunks for article in corpus.Articles(chunk)]


def reasons(path) -> list[tuple[int, str, str]]:
  return [(article.line, article.reason, article.why) for article in read(path) if article.reason]


@pytest.fixture(params=["parquet", "arrow", "stream"])
def path(request, tmp_path) -> pathlib.Path:
  return tmp_path / f"a.{request.param}"


def test_every_row_is_an_article(path):
  write(path)
  got = read(path)
  assert [article.title for article in got] == TITLES
  assert [article.text for article in got] == [text.strip() for text in TEXTS]
  assert [article.line for article in got] == list(range(1, NUM_ROWS + 1))


KINDS = {
  "large": pa.large_string(),
  "views": pa.string_view(),
  "bytes": pa.binary(),
  "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_strings_of_any_type(kind, path):
  table = pa.table(
    {name: pa.array(["a", "b", "a"]).cast(KINDS[kind]) for name in ("text", "title")}
  )
  write(path, table)
  assert [(article.title, article.text) for article in read(path)] == [
    ("a", "a"),
    ("b", "b"),
    ("a", "a"),
  ]


@pytest.mark.parametrize("codec", ["zstd", "lz4", "snappy", "gzip"])
def test_compressed_columns(codec, tmp_path):
  write(tmp_path / "a.parquet", compression=codec, data_page_version="2.0")
  assert [article.title for article in read(tmp_path / "a.parquet")] == TITLES
  if codec in ("zstd", "lz4"):
    write(tmp_path / "a.arrow", options=pa.ipc.IpcWriteOptions(compression=codec))
    assert [article.title for article in read(tmp_path / "a.arrow")] == TITLES


def test_a_packed_stream_is_read_to_where_it_is_cut(tmp_path):
  write(tmp_path / "a.stream")
  data = gzip.compress((tmp_path / "a.stream").read_bytes())
  (tmp_path / "a.stream").unlink()
  (tmp_path / "a.gz").write_bytes(data)
  assert [article.title for article in read(tmp_path / "a.gz")] == TITLES
  (tmp_path / "a.gz").write_bytes(data[:-2000])
  *kept, last = read(tmp_path / "a.gz")
  assert [article.title for article in kept] == TITLES[: len(kept)] and len(kept) >= GROUP
  assert last.reason == "truncated_gzip"


# ------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("chunk_bytes", [100, 3000, 20_000])
def test_chunks_share_the_groups_of_rows(chunk_bytes, path, monkeypatch):
  monkeypatch.setattr(sources, "_CHUNK_BYTES", chunk_bytes)
  write(path)
  chunks = sources.split_into_chunks(sources.find_sources(str(path), format="auto"))
  if path.suffix == ".stream":
    assert len(chunks) == 1, "a stream is read from its beginning"
  else:
    assert len(chunks) == -(-path.stat().st_size // chunk_bytes)
  shares = [list(corpus.Articles(chunk)) for chunk in chunks]
  assert [article.title for share in shares for article in share] == TITLES
  if chunk_bytes == 3000 and len(chunks) > 1:
    largest = max(map(len, shares))
    assert largest <= 2 * GROUP, f"a share has {largest} rows, so the work is not spread"


def test_groups_are_owned_once():
  source = sources.Source("a.parquet", "parquet", True, 1001, "")
  for num_groups in (0, 1, 2, 7, 100, 5000):
    ends = [*range(0, 1001, 130), float("inf")]
    owned = [
      group
      for start, end in zip(ends, ends[1:], strict=False)
      for group in sources.Chunk(0, source, start, end).owned(num_groups)
    ]
    assert owned == list(range(num_groups))
  assert list(sources.Chunk(0, source, 0, float("inf")).owned(3)) == [0, 1, 2]


def test_rows_are_numbered_over_chunks_in_rejected_jsonl(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "_CHUNK_BYTES", 3000)
  texts = [None if n % 100 == 50 else text for n, text in enumerate(TEXTS)]
  write(tmp_path / "a.parquet", pa.table({"title": TITLES, "text": texts}))
  info = make_passages.run(str(tmp_path / "a.parquet"), str(tmp_path / "P"), vocab_size=300)
  assert info["counts"]["dropped"] == {"bad_record": 10}
  assert len(passages.load(str(tmp_path / "P")).titles) == NUM_ROWS - 10
  rows = (tmp_path / "P/rejected.jsonl").read_text().splitlines()
  assert [f'"line": {n}, ' in row for n, row in zip(range(51, 1000, 100), rows, strict=True)] == [
    True
  ] * 10, rows


# ------------------------------------------------------------------------------------------- faults


def test_bad_rows_are_rejected_alone(path, monkeypatch):
  monkeypatch.setattr("realm_tf.storage.json_lines.MAX_RECORD_BYTES", 1000)
  values = {
    "title": [b"Good", None, b"No text", b"\xffTitle", b"Text", b"Long", b"Last"],
    "text": [b"It is.", b"It has no title.", None, b"x", b"caf\xe9", b"x" * 1001, b"It is last."],
  }
  write(path, pa.table({name: pa.array(them).view(pa.string()) for name, them in values.items()}))
  assert [article.title for article in read(path) if not article.reason] == ["Good", "Last"]
  assert reasons(path) == [
    (2, "bad_record", "wanted title and text as strings; found title: NoneType, text: str"),
    (3, "bad_record", "wanted title and text as strings; found title: str, text: NoneType"),
    (4, "bad_utf8", "title is not UTF-8: \ufffdTitle"),
    (5, "bad_utf8", "text is not UTF-8: caf\ufffd"),
    (6, "too_long", "text is longer than 1,000 bytes"),
  ]


BAD_TABLES = {
  "missing": (pa.table({"text": ["a"]}), "text: string"),
  "numbers": (pa.table({"title": ["a"], "text": [1]}), "title: string, text: int64"),
  "lists": (pa.table({"title": ["a"], "text": [["b"]]}), "text: list<"),
  "nested": (pa.table({"row": [{"title": "a", "text": "b"}]}), "row: struct<"),
  "twice": (
    pa.Table.from_arrays([pa.array(["a"])] * 3, names=["title", "text", "text"]),
    "title: string, text: string, text: string",
  ),
  "none": (pa.table({}), "strings; found "),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_without_the_columns_is_rejected_once(name, path, monkeypatch):
  monkeypatch.setattr(sources, "_CHUNK_BYTES", 300)
  table, words = BAD_TABLES[name]
  write(path, table)
  ((line, reason, why),) = reasons(path)
  assert (line, reason) == (1, "bad_columns") and words in why, why


def test_wikiextractors_rules_hold_for_its_tables(path):
  rows = {
    "title": ["R&amp;D", "List of mills", "R&amp;D"],
    "text": ["It is &lt;b&gt;."] * 3,
    "url": ["https://en.wikipedia.org/wiki?curid=1"] * 2 + ["https://en.wikipedia.org/wiki/R"],
  }
  write(path, pa.table(rows))
  first, second, own = read(path)
  assert (first.title, first.text, own.title) == ("R&D", "It is <b>.", "R&amp;D")
  with pytest.raises(corpus.Rejected, match="dropped_title"):
    corpus.sentences_of(second)


def test_long_texts_come_in_parts(path, monkeypatch):
  monkeypatch.setattr(documents, "MAX_ARTICLE_BYTES", 1000)
  text = " ".join(f"Sentence {n} is here." for n in range(200))
  write(path, pa.table({"title": ["Long"], "text": [text]}))
  got = read(path)
  assert [article.part for article in got] == list(range(len(got))) and len(got) > 3
  assert " ".join(article.text.strip() for article in got) == text


def test_a_file_that_is_cut_off_is_rejected_or_used_to_the_cut(path, monkeypatch):
  """Without its end, Parquet and Arrow's file have no index; a stream needs none."""
  monkeypatch.setattr(sources, "_CHUNK_BYTES", 3000)
  write(path)
  path.write_bytes(path.read_bytes()[:-4000])
  *kept, last = read(path)
  if path.suffix == ".stream":
    assert len(kept) >= GROUP and len(kept) % GROUP == 0
    assert [article.title for article in kept] == TITLES[: len(kept)]
  else:
    assert kept == []
  assert last.reason == ("broken_parquet" if path.suffix == ".parquet" else "broken_arrow")
  assert last.why


def test_a_broken_group_of_rows_leaves_the_others(tmp_path):
  path = tmp_path / "a.parquet"
  write(path, compression="none", write_page_checksum=True, use_dictionary=False)
  data = bytearray(path.read_bytes())
  at = data.index(b"Mill 477 was built")
  data[at] ^= 1
  path.write_bytes(data)
  got = read(path)
  assert [article.reason for article in got if article.reason] == ["broken_parquet"]
  titles = [article.title for article in got if not article.reason]
  assert [title for title in TITLES if title not in titles] == TITLES[450:540]


def test_offsets_outside_the_data_are_refused(tmp_path):
  """They would otherwise be read from the memory of the process."""
  path = tmp_path / "a.arrow"
  write(path, pa.table({"title": ["a"] * 5, "text": ["bcd"] * 5}))
  data = path.read_bytes()
  offsets = np.arange(0, 18, 3, dtype=np.int32).tobytes()
  hostile = np.array([0, 3, 6, 9, 12, 2**31 - 1], np.int32).tobytes()
  assert data.count(offsets) == 1
  path.write_bytes(data.replace(offsets, hostile))
  ((_, reason, why),) = reasons(path)
  assert reason == "broken_arrow" and "offset" in why.lower()


def test_a_failing_disk_is_not_a_broken_file(tmp_path, monkeypatch):
  class Failing(io.BytesIO):
    def read(self, *_):
      raise OSError(5, "Input/output error")

  write(tmp_path / "a.parquet")
  (chunk,) = sources.split_into_chunks(
    sources.find_sources(str(tmp_path / "a.parquet"), format="auto")
  )
  monkeypatch.setattr(sources, "open_", lambda path: Failing((tmp_path / "a.parquet").read_bytes()))
  with pytest.raises(OSError, match="Input/output error"):
    list(corpus.Articles(chunk))


PEAK_OF_READING = """
import itertools, resource, sys
from beam_jobs import corpus, sources

def read(path, num):
  chunks = sources.split_into_chunks(sources.find_sources(path, format="auto"))
  rows = itertools.chain.from_iterable(corpus.Articles(chunk) for chunk in chunks)
  assert sum(1 for row in itertools.islice(rows, num) if not row.reason) == num

def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000

read(sys.argv[1], 1)  # loads what stays in memory
before = peak()
read(sys.argv[2], int(sys.argv[3]))
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
  """A group of 200 MB takes no more than a part of it; 800 MB may come in a small file."""
  write(tmp_path / "small.parquet", TABLE)
  letters = np.random.default_rng(0).integers(97, 123, 100_000, dtype=np.uint8).tobytes().decode()
  texts = pa.array([letters[n:] + letters[:n] for n in range(2000)])
  write(
    tmp_path / "large.parquet",
    pa.table({"title": ["a"] * 2000, "text": texts}),
    group=2000,
    compression="none",
    use_dictionary=False,
  )
  same = pa.DictionaryArray.from_arrays(np.zeros(8000, np.int32), ["Mill. " * 17_000])
  write(tmp_path / "bomb.parquet", pa.table({"title": ["a"] * 8000, "text": same}), group=8000)
  assert (tmp_path / "large.parquet").stat().st_size > 200_000_000
  assert (tmp_path / "bomb.parquet").stat().st_size < 1_000_000
  for name, num_rows in (("large", 2000), ("bomb", 100)):
    done = subprocess.run(
      [
        *(sys.executable, "-c", PEAK_OF_READING, str(tmp_path / "small.parquet")),
        *(str(tmp_path / f"{name}.parquet"), str(num_rows)),
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120, f"reading {name}.parquet took {done.stdout.strip()} MB more"
