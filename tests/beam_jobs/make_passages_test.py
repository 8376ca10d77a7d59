"""beam_jobs/make_passages.py: every format and every kind of bad input in one corpus.

Also determinism, crashes and a full disk.
"""

import gzip
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from beam_jobs import make_passages, sources
from beam_jobs.passage_artifact import REJECTED
from realm_tf.corpus import passages
from realm_tf.storage import artifacts

ROOT = pathlib.Path(__file__).parents[2]
WIKIPEDIA = ROOT.parent / "shared/data/wikipedia_2014"
TWO_WORKERS = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")

WORDS = (
  "the river rose in spring and old stone bridges carried traders over it before winter closed "
  "every road"
).split()


def prose(sentences: int, seed: int = 0) -> str:
  """Sentences of 15 words, no two alike."""
  return " ".join(
    " ".join(
      [
        f"Town {seed} number {n}",
        *(WORDS[(n * 7 + seed + k * (1 + n % 5)) % len(WORDS)] for k in range(11)),
      ]
    )
    + "."
    for n in range(sentences)
  )


def doc(title: str, text: str) -> str:
  return f'<doc id="1" url="u" title="{title}">\n{title}\n\n{text}\n\n</doc>\n'


def write_corpus(folder: pathlib.Path) -> None:
  """A corpus with all formats and most kinds of faults.

  Three big files are read in several chunks or zipped.
  """
  folder.mkdir()
  (folder / "a_wiki").write_bytes(
    (
      doc("AT&amp;T", "AT&amp;T was founded in 1885.\nHistory.\nIt  grew\tfast. Then it split.")
      + doc("Timberlea", "")
      + doc("List of rivers", "One river.")
      + doc("Mercury (disambiguation)", "It may be a god.")
      + "text outside any article\n"
      + '<doc id="2" url="u" title="Cut off">\nCut off\n\nThis article never ends.\n'
      + '<doc id="3">\nno title\n</doc>\n'
      + doc("5 MB", "x" * 5_000_000)
      + doc("Long", prose(60))
    ).encode()
    + b'<doc id="4" url="u" title="Bytes">\nBroken \xff\xfe bytes.\n</doc>\n'
  )
  records = [
    json.dumps({"title": "Röntgen", "text": "Röntgen, of Germany, won it. He was born in 1845."}),
    # the same passage
    json.dumps({"title": "Röntgen", "text": "Röntgen, of Germany, won it.  He was born in 1845."}),
    '{"title": "Broken", "text": ',
    '["no", "object"]',
    '{"title": "No text"}',
    '{"title": "Number", "text": 3}',
    '{"title": "Surrogate", "text": "half a pair \\ud800 here"}',
    '{"title": "Title alone", "text": "Title alone"}',
    json.dumps({"title": "word " * 400, "text": "A long title."}),
    json.dumps({"title": "Last", "text": "The last line has no line end."}),
  ]
  (folder / "b.jsonl").write_text("\n".join(records))
  (folder / "c_text.txt").write_text(
    "\ufeffA plain text is one article.\n\nIts title is the file's name."
  )
  whole = gzip.compress(
    "".join(doc(f"Zipped {n}", prose(3, seed=1000 + n)) for n in range(200)).encode()
  )
  (folder / "d_whole.gz").write_bytes(whole)
  (folder / "e_truncated.gz").write_bytes(
    gzip.compress(
      "".join(
        json.dumps({"title": f"Kept {n}", "text": prose(4, seed=2000 + n)}) + "\n"
        for n in range(500)
      ).encode()
    )[:-4000]
  )
  (folder / "f_broken.gz").write_bytes(whole[:40] + b"\x00" * 40 + whole[80:])
  (folder / "g_empty").write_bytes(b"")
  (folder / "sub").mkdir()
  (folder / "sub" / "wiki_00").write_text(
    "".join(doc(f"Place {n}", prose(24, seed=n)) for n in range(3000))
  )


def command(*args: str, job: str = "make_passages") -> list[str]:
  return [sys.executable, "-m", f"beam_jobs.{job}", *args]


def run_command(*args: str, **options) -> subprocess.CompletedProcess:
  return subprocess.run(
    command(*args), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options
  )


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
  """Returns what two runs must share: all but info.json, which has the time, and its digest."""
  return {
    path.name: path.read_bytes()
    for path in sorted(folder.iterdir())
    if path.name not in (artifacts.INFO, artifacts.COMPLETE)
  }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("corpus") / "corpus"
  write_corpus(folder)
  return folder


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory) -> pathlib.Path:
  """The corpus made in this process."""
  folder = tmp_path_factory.mktemp("made") / "P"
  make_passages.run(
    str(corpus), str(folder), vocab_size=1000, max_tokens=128, passages_per_shard=1500
  )
  return folder


def rejected(folder: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (folder / REJECTED).read_text().splitlines()]


def test_counts_and_reasons(made):
  info = artifacts.read_info(str(made))
  counts = info["counts"]
  assert counts["dropped"] == {
    "bad_json": 1,
    "bad_record": 4,
    "bad_utf8": 2,
    "broken_gzip": 1,
    "dropped_title": 2,
    "duplicate": 1,
    "empty": 2,
    "outside_doc": 1,
    "too_long": 1,
    "truncated_gzip": 1,
    "unclosed_doc": 1,
  }
  rows = rejected(made)
  assert len(rows) == sum(counts["dropped"].values())
  assert all(row["file"] and len(row["text"]) <= 200 for row in rows)
  (duplicate,) = [row for row in rows if row["reason"] == "duplicate"]
  assert (duplicate["title"], os.path.basename(duplicate["file"]), duplicate["line"]) == (
    "Röntgen",
    "b.jsonl",
    2,
  )
  assert counts["cut_titles"] == 1 and info["first_of_each"]["cut_titles"]["text"].startswith(
    "word word"
  )
  lines = [
    row["line"] for row in rows if row["file"].endswith("b.jsonl") and row["reason"] != "duplicate"
  ]
  assert lines == [3, 4, 5, 6, 7], "each rejected line is named"


def test_passages_are_as_written(made, corpus):
  table = passages.load(str(made))
  by_title = {}
  for title, text in zip(table.titles, table.texts, strict=True):
    by_title.setdefault(title, []).append(text)
  assert by_title["AT&T"] == ["AT&T was founded in 1885. History. It grew fast. Then it split."]
  assert by_title["Röntgen"] == ["Röntgen, of Germany, won it. He was born in 1845."]
  assert by_title["c_text"] == ["A plain text is one article. Its title is the file's name."]
  assert by_title["Last"] == ["The last line has no line end."]
  assert " ".join(by_title["Long"]) == prose(60) and len(by_title["Long"]) > 1
  places = [int(title.split()[1]) for title in table.titles if title.startswith("Place")]
  # 3000 articles over several chunks, in order, none twice
  assert places == sorted(places) and set(places) == set(range(3000))
  assert all(" ".join(by_title[f"Place {n}"]) == prose(24, seed=n) for n in range(0, 3000, 50))
  kept = [title for title in by_title if title.startswith("Kept")]
  # what came before the cut
  assert 100 < len(kept) < 500 and kept == [f"Kept {n}" for n in range(len(kept))]
  assert list(table.titles[:1]) == ["AT&T"] and table.titles[-1] == "Place 2999"


def test_blocks_fill_the_room_and_sentences_are_whole(made):
  table = passages.load(str(made))
  sizes = [len(table.title_ids[i]) + len(table.text_ids[i]) + 3 for i in range(len(table))]
  assert 110 < max(sizes) <= 128
  for i in range(0, len(table), 97):
    text = table.texts[i].encode()
    sentences = [
      text[a:b].decode()
      for a, b in zip(table.sentence_starts[i], table.sentence_ends[i], strict=True)
    ]
    assert " ".join(sentences) == table.texts[i] and all(
      sentence.strip() == sentence for sentence in sentences
    )


def test_two_workers_write_the_same_bytes(made, corpus, tmp_path):
  result = run_command(
    f"--input={corpus}",
    f"--output={tmp_path}/P",
    "--vocab_size=1000",
    "--max_tokens=128",
    "--passages_per_shard=1500",
    "--",
    *TWO_WORKERS,
  )
  assert result.returncode == 0, result.stderr[-2000:]
  one, two = files_of(made), files_of(tmp_path / "P")
  assert one == two and sum(name.endswith(".arrow") for name in one) > 2
  assert (
    artifacts.read_info(str(made))["fingerprint"]
    == artifacts.read_info(str(tmp_path / "P"))["fingerprint"]
  )


def test_unchanged_corpus_is_not_made_again(tmp_path, capsys):
  source = tmp_path / "a.jsonl"
  source.write_text(json.dumps({"title": "A", "text": prose(5)}))
  arguments = {"inputs": str(source), "output": str(tmp_path / "P"), "vocab_size": 200}
  first = make_passages.run(**arguments)
  assert make_passages.run(**arguments) == first and "already made" in capsys.readouterr().out
  moved = tmp_path / "elsewhere" / "a.jsonl"
  moved.parent.mkdir()
  moved.write_bytes(source.read_bytes())
  # the same content in another place
  assert make_passages.run(**{**arguments, "inputs": str(moved)}) == first
  source.write_text(json.dumps({"title": "A", "text": prose(6)}))
  assert make_passages.run(**arguments)["fingerprint"] != first["fingerprint"]


@pytest.mark.parametrize(
  "arguments, words",
  [
    ({"inputs": "{tmp}/absent*"}, "matches no file"),
    ({"inputs": "{tmp}/empty"}, "all of them empty"),
    ({"inputs": "{tmp}/stubs.jsonl"}, "gives no passage"),
    ({"inputs": "{tmp}/stubs.jsonl", "format": "xml"}, "wanted one of auto"),
    ({"inputs": "{tmp}/stubs.jsonl", "max_tokens": 3}, "wanted at least 16"),
    ({"inputs": "{tmp}/stubs.jsonl", "vocab": "{tmp}/absent"}, "no vocabulary at"),
  ],
)
def test_unusable_input_is_explained(arguments, words, tmp_path):
  (tmp_path / "empty").write_bytes(b"")
  (tmp_path / "stubs.jsonl").write_text('{"title": "A", "text": ""}\n')
  given = {
    name: value.format(tmp=tmp_path) if isinstance(value, str) else value
    for name, value in arguments.items()
  }
  with pytest.raises(ValueError, match=words):
    make_passages.run(output=str(tmp_path / "P"), vocab_size=100, **given)
  assert [path.name for path in tmp_path.iterdir() if "P" in path.name] == []


def test_an_error_is_one_line_on_the_command_line(tmp_path):
  result = run_command(f"--input={tmp_path}/absent", f"--output={tmp_path}/P")
  last = result.stderr.strip().splitlines()[-1]
  assert (
    result.returncode == 1
    and "Traceback" not in result.stderr
    and last.startswith("make_passages: --input")
  ), result.stderr


def test_full_disk_keeps_the_earlier_passages(made, corpus, tmp_path):
  source = tmp_path / "a.jsonl"
  source.write_text(json.dumps({"title": "A", "text": prose(5)}))
  make_passages.run(str(source), str(tmp_path / "P"), vocab=str(made))
  before = files_of(tmp_path / "P")

  def limit():
    return resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

  result = run_command(
    f"--input={corpus}", f"--output={tmp_path}/P", f"--vocab={made}", preexec_fn=limit
  )
  last = result.stderr.strip().splitlines()[-1]
  assert result.returncode == 1 and "File too large" in last, last
  assert files_of(tmp_path / "P") == before and sorted(p.name for p in tmp_path.iterdir()) == [
    "P",
    "a.jsonl",
  ]


def test_killed_job_leaves_nothing_that_looks_complete(made, corpus, tmp_path):
  arguments = [
    f"--input={corpus}",
    f"--output={tmp_path}/P",
    "--vocab_size=1000",
    "--max_tokens=128",
    "--passages_per_shard=1500",
  ]
  job = subprocess.Popen(
    command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  while not list(tmp_path.glob(".staging-*/*.arrow")):  # in the middle of writing
    assert job.poll() is None, "the job ended before it was killed"
    time.sleep(0.005)
  job.send_signal(signal.SIGKILL)
  job.wait()
  left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
  assert not (tmp_path / "P").exists() and not any(artifacts.COMPLETE in name for name in left), (
    left
  )
  with pytest.raises(artifacts.ArtifactError, match="does not exist"):
    passages.load(str(tmp_path / "P"))
  assert run_command(*arguments).returncode == 0
  assert files_of(tmp_path / "P") == files_of(made)


# ----------------------------------------------------------------------- nothing is lost in silence


def last_line(result: subprocess.CompletedProcess) -> str:
  return (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()[-1]


def test_the_last_line_tells_what_was_lost(made, tmp_path):
  folder = tmp_path / "docs [v2], mine"
  folder.mkdir()
  (folder / "a.json").write_text(
    json.dumps([{"title": f"Mill {n}", "text": prose(3, seed=n)} for n in range(3)], indent=2)
  )
  (folder / "b.jsonl").write_text(
    '{"title": "Good", "text": "It is used."}\n{"body": 1}\n\n{"body": "two"}\n'
  )
  (folder / "c.tar").write_bytes(b"a.txt".ljust(257, b"\0") + b"ustar" + bytes(250))
  (folder / "talk.txt").write_text(
    " ".join(f"{word} then said {n}" for n, word in enumerate(WORDS * 20))
    + " \u0e01\u0e02 \u0e03" * 30
  )
  result = run_command(
    f"--input={folder}", f"--output={tmp_path}/P", f"--vocab={made}", "--max_tokens=64"
  )
  assert result.returncode == 0, result.stderr[-2000:]
  info = artifacts.read_info(f"{tmp_path}/P")
  counts = info["counts"]
  assert (
    counts["articles"],
    counts["dropped"],
    counts["split_sentences"],
    counts["cut_titles"],
  ) == (5, {"bad_record": 2, "tar_file": 1}, 1, 0)
  share = counts["unknown_word_pieces"] / counts["word_pieces"]
  assert share > 0.01
  assert last_line(result) == (
    "make_passages: WARNING: most articles of 2 of 4 files are rejected: "
    f"2 bad_record, first {folder}/b.jsonl:2 "
    "('wanted title and text as strings; found body: int'); "
    f"1 tar_file, first {folder}/c.tar:1; "
    f"{share:.1%} of all word pieces are [UNK], words that the vocabulary does not cover, "
    f"first {folder}/talk.txt:1 ('\u0e01\u0e02'); "
    "for the full list see rejected.jsonl and info.json"
  )
  assert [(os.path.basename(row["file"]), row["line"]) for row in rejected(tmp_path / "P")] == [
    ("b.jsonl", 2),
    ("b.jsonl", 4),
    ("c.tar", 1),
  ]
  table = passages.load(f"{tmp_path}/P")
  talk = " ".join(
    text for title, text in zip(table.titles, table.texts, strict=True) if title == "talk"
  )
  assert talk == " ".join((folder / "talk.txt").read_text().split()), "no word is lost"
  assert max(len(table.title_ids[i]) + len(table.text_ids[i]) + 3 for i in range(len(table))) <= 64
  for i, text in enumerate(table.texts):
    sentences = passages.sentences_of(text, table.sentence_starts[i], table.sentence_ends[i])
    assert " ".join(sentences) == text, "offsets of the parts"


@pytest.mark.parametrize(
  "files, words",
  [
    (
      {"a.jsonl": b'{"body": "x"}\n{"title": \n', "b.zip": b"PK\x03\x04..."},
      "gives no passage: 1 bad_record, first .*a.jsonl:1 .*found body: str.*; "
      "1 bad_json, first .*a.jsonl:2 .*; 1 zip_file, first .*b.zip:1; "
      "wanted lines or lists of",
    ),
    ({"a.txt": "caf\u00e9".encode("latin-1")}, "gives no passage: 1 bad_utf8, first .*a.txt:1"),
    ({"a.json": b'[{"title": "", "text": ""}]'}, "gives no passage: 1 empty, first .*a.json:1"),
  ],
)
def test_nothing_usable_fails_with_the_reasons(files, words, tmp_path):
  (tmp_path / "in").mkdir()
  for name, data in files.items():
    (tmp_path / "in" / name).write_bytes(data)
  with pytest.raises(artifacts.UserError, match=words) as caught:
    make_passages.run(str(tmp_path / "in"), str(tmp_path / "P"), vocab_size=100)
  assert "\n" not in str(caught.value) and sorted(path.name for path in tmp_path.iterdir()) == [
    "in"
  ]


def test_a_vocabulary_without_room_is_explained(tmp_path):
  (tmp_path / "a.txt").write_text(prose(3))
  with pytest.raises(artifacts.UserError, match="no word piece can be learned with --vocab_size=6"):
    make_passages.run(str(tmp_path / "a.txt"), str(tmp_path / "P"), vocab_size=6)


def test_lines_are_counted_over_chunks(made, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "_CHUNK_BYTES", 500)
  rows = [
    json.dumps({"title": f"T{n}", "text": prose(2, seed=n)}) if n % 7 else "{" for n in range(60)
  ]
  (tmp_path / "a.jsonl").write_text("\n\n".join(rows))
  make_passages.run(str(tmp_path / "a.jsonl"), str(tmp_path / "P"), vocab=str(made))
  assert [row["line"] for row in rejected(tmp_path / "P")] == [2 * n + 1 for n in range(0, 60, 7)]
  docs = [doc(f"T{n}", prose(1, seed=n) if n % 7 else "") for n in range(60)]
  (tmp_path / "wiki").write_text("".join(docs))
  make_passages.run(str(tmp_path / "wiki"), str(tmp_path / "W"), vocab=str(made))
  assert [row["line"] for row in rejected(tmp_path / "W")] == [6 * n + 1 for n in range(0, 60, 7)]


@pytest.mark.skipif(not WIKIPEDIA.exists(), reason=f"{WIKIPEDIA} is not on this machine")
def test_wikipedia_as_it_is(made, tmp_path):
  files = sorted(WIKIPEDIA.glob("AA/wiki_*"))[:3]
  info = make_passages.run(",".join(map(str, files)), str(tmp_path / "P"), vocab_size=5000)
  num_docs = sum(file.read_text().count("<doc id=") for file in files)
  assert (
    info["counts"]["articles"]
    + sum(info["counts"]["dropped"].values())
    - info["counts"]["dropped"].get("duplicate", 0)
    == num_docs
  ), info["counts"]
  table = passages.load(str(tmp_path / "P"))
  assert "Chen Zhili" in table.titles or len(table) > 1000
  assert not any(
    text.startswith(f"{title} {title} ")
    for title, text in zip(table.titles, table.texts, strict=True)
  )
