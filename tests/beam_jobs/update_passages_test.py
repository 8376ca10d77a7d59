"""Documents are added to a corpus, replaced and deleted; everything else stays as it was."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from beam_jobs import make_passages, update_passages
from realm_tf.checkpoints import released_corpus
from realm_tf.corpus import passages
from realm_tf.storage import artifacts, json_lines
from tests.processes import REPOSITORY
from tests.towns import SIZES, TOWNS, town, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
  """A corpus of all towns, made in one go."""
  root = tmp_path_factory.mktemp("whole")
  make_passages.run(write(root / "all.jsonl", TOWNS), str(root / "P"), vocab_size=300, **SIZES)
  return str(root / "P")


@pytest.fixture
def corpus(whole, tmp_path) -> str:
  """A corpus of the first ten towns, with the vocabulary of all."""
  folder = str(tmp_path / "P")
  make_passages.run(write(tmp_path / "first.jsonl", TOWNS[:10]), folder, vocab=whole, **SIZES)
  return folder


def alive(folder: str) -> list[tuple[str, str, str]]:
  """Returns (document, title, text) of each passage that is not deleted."""
  table = passages.load(folder)
  return [(table.documents[n], table.titles[n], table.texts[n]) for n in table.numbers]


def sizes_of_segments(folder: str) -> dict[int, int]:
  return {
    part.number: len(passages.read_all(part.paths, passages.Passage)["number"])
    for part in passages.segments_of(folder)
  }


def inodes(folder: str) -> dict[str, int]:
  return {
    os.path.basename(path): os.stat(path).st_ino
    for path in passages.shard_paths(folder, passages.KIND)
  }


def test_added_documents_go_into_a_new_segment(corpus, tmp_path):
  before, files = passages.load(corpus), inodes(corpus)
  add = write(tmp_path / "more.jsonl", [*TOWNS[10:20], TOWNS[3]])
  info = update_passages.update(corpus, add=add)
  assert (info["counts"]["passages"], info["counts"]["deleted"]) == (20, 0)
  assert info["counts"]["dropped"] == {"duplicate": 1}  # which the corpus had already
  after = passages.load(corpus)
  assert after.titles[:10] == before.titles[:] and after.titles[19] == "T19"
  assert sizes_of_segments(corpus) == {0: 10, 1: 10}
  assert {name: inode for name, inode in inodes(corpus).items() if name in files} == files


def test_three_updates_and_one_go_give_the_same_corpus(corpus, whole, tmp_path):
  for start in (10, 13, 21):
    stop = {10: 13, 13: 21, 21: 30}[start]
    update_passages.update(corpus, add=write(tmp_path / f"{start}.jsonl", TOWNS[start:stop]))
  assert len(passages.segments_of(corpus)) == 4
  one_go, updated = passages.load(whole), passages.load(corpus)
  assert np.array_equal(updated.uids.joined(), one_go.uids.joined())
  for field in dataclasses.fields(passages.PassageTable):
    if field.name not in ("folder", "uids", "fingerprint"):
      columns = [getattr(table, field.name) for table in (updated, one_go)]
      got, wanted = ([np.asarray(row).tolist() for row in column] for column in columns)
      assert got == wanted, field.name
  update_passages.compact(corpus)
  digests = [
    {name: file["sha256"] for name, file in artifacts.read_info(folder)["files"].items()}
    for folder in (whole, corpus)
  ]
  assert digests[1] == digests[0]  # byte for byte


def test_a_replaced_document_loses_its_earlier_passages(corpus, tmp_path):
  new = town(5, "Town 5 was moved to the sea. Nobody knows why.")
  info = update_passages.update(corpus, add=write(tmp_path / "new.jsonl", [new]), replace=True)
  assert (info["counts"]["passages"], info["counts"]["deleted"]) == (11, 1)
  assert passages.load(corpus).deleted.tolist() == [5]
  assert [text for document, _, text in alive(corpus) if document == "5"] == [new["text"]]


def test_without_replace_the_earlier_passages_stay(corpus, tmp_path):
  new = town(5, "Town 5 was moved to the sea.")
  update_passages.update(corpus, add=write(tmp_path / "new.jsonl", [new]))
  assert [document for document, _, _ in alive(corpus)].count("5") == 2


def test_a_replaced_document_may_be_what_it_was(corpus, tmp_path):
  before = alive(corpus)
  same = write(tmp_path / "same.jsonl", [TOWNS[5]])
  update_passages.update(corpus, add=same, replace=True)
  assert sorted(alive(corpus)) == sorted(before)


def test_documents_are_deleted_by_id_or_title(corpus):
  info = update_passages.update(corpus, delete=["7", "T2", "T99"])
  assert passages.load(corpus).deleted.tolist() == [2, 7]
  assert info["warnings"] == ["1 of the names to delete are of no document, first T99"]
  info = update_passages.update(corpus, delete=["T3", "T2"])  # T2 is gone already
  assert passages.load(corpus).deleted.tolist() == [2, 3, 7]


def test_an_update_that_was_the_last_one_is_not_done_twice(corpus, tmp_path):
  add = write(tmp_path / "new.jsonl", [town(5, "Town 5 was moved to the sea.")])
  info = update_passages.update(corpus, add=add, replace=True)
  assert update_passages.update(corpus, add=add, replace=True) == info
  update_passages.update(corpus, delete=["T2"])
  update_passages.update(corpus, add=write(tmp_path / "old.jsonl", [TOWNS[5]]), replace=True)
  assert update_passages.update(corpus, add=add, replace=True) != info


def test_deleted_passages_may_be_added_again(corpus, tmp_path):
  update_passages.update(corpus, delete=["T2"])
  update_passages.update(corpus, add=write(tmp_path / "again.jsonl", [TOWNS[2]]))
  assert [title for _, title, _ in alive(corpus)].count("T2") == 1


def test_compaction_drops_deleted_rows_and_merges_segments(corpus, tmp_path):
  update_passages.update(corpus, add=write(tmp_path / "more.jsonl", TOWNS[10:]), delete=["T2"])
  before = alive(corpus)
  info = update_passages.compact(corpus)
  assert (info["counts"]["passages"], info["counts"]["deleted"]) == (29, 0)
  assert alive(corpus) == before and len(passages.load(corpus)) == 29
  assert sizes_of_segments(corpus) == {0: 25, 1: 4}


def test_compaction_keeps_full_segments_without_deleted_rows(whole, tmp_path):
  folder = str(tmp_path / "P")
  make_passages.run(write(tmp_path / "a.jsonl", TOWNS), folder, vocab=whole, **SIZES)
  files = inodes(folder)
  update_passages.update(folder, delete=["T27"])
  update_passages.compact(folder)
  kept = {
    name: inode for name, inode in inodes(folder).items() if name.startswith("passages-00000")
  }
  assert kept == {name: inode for name, inode in files.items() if name in kept} and len(kept) == 4
  assert [title for _, title, _ in alive(folder)][-3:] == ["T26", "T28", "T29"]


@pytest.mark.parametrize(
  "row, document",
  [
    ({"id": "a7"}, "a7"),
    ({"id": 7}, "7"),
    ({"url": "https://x.org/7"}, "https://x.org/7"),
    ({"id": "a7", "url": "https://x.org/7"}, "a7"),
    ({"id": None}, "A title"),
    ({}, "A title"),
  ],
)
def test_what_identifies_a_document(row, document, whole, tmp_path):
  add = write(tmp_path / "a.jsonl", [{"title": "A  title", "text": "It has a text."} | row])
  make_passages.run(add, str(tmp_path / "P"), vocab=whole, **SIZES)
  assert passages.load(str(tmp_path / "P")).documents[:] == [document]


def test_an_imported_corpus_can_be_updated(whole, tmp_path):
  records, folder = str(tmp_path / "blocks.tfr"), str(tmp_path / "P")
  with tf.io.TFRecordWriter(records) as writer:
    for row in TOWNS[:3]:
      writer.write(row["text"].encode())
  tokenizer = passages.load_tokenizer(whole)
  released_corpus.write_passages(records, folder, tokenizer=tokenizer, num_passages=3)
  update_passages.update(folder, add=write(tmp_path / "a.jsonl", TOWNS[3:5]))
  info = update_passages.compact(folder)
  assert info["counts"]["passages"] == 5
  assert [text for _, _, text in alive(folder)] == [row["text"] for row in TOWNS[:5]]


def test_sections_of_a_page_are_one_document(corpus, tmp_path):
  page = tmp_path / "page.md"
  page.write_text("# Page\n\nIt has a text.\n\n## Part\n\nIt has another text.\n")
  update_passages.update(corpus, add=str(page))
  assert [title for document, title, _ in alive(corpus) if document == "Page"] == [
    "Page",
    "Page > Part",
  ]
  page.write_text("# Page\n\nIt has a new text.\n")
  update_passages.update(corpus, add=str(page), replace=True)
  assert [title for document, title, _ in alive(corpus) if document == "Page"] == ["Page"]


def test_rejected_articles_are_kept_from_all_updates(corpus, tmp_path):
  for number in (50, 51):
    bad = write(tmp_path / f"{number}.jsonl", [town(number), {"title": f"T{number}"}])
    info = update_passages.update(corpus, add=bad)
  assert info["counts"]["dropped"] == {"bad_record": 2}
  with open(os.path.join(corpus, "rejected.jsonl"), "rb") as file:
    rows = [record.row for record in json_lines.read(file)]
  assert [os.path.basename(row["file"]) for row in rows] == ["50.jsonl", "51.jsonl"]


@pytest.mark.parametrize(
  "what, words",
  [
    ({}, "there is nothing to do"),
    ({"add": "nowhere/*.jsonl"}, "nowhere"),
    ({"delete": [f"T{n}" for n in range(10)]}, "would delete all 10 passages"),
  ],
)
def test_what_cannot_be_done_changes_nothing(what, words, corpus):
  before = artifacts.read_info(corpus)
  with pytest.raises(Exception, match=words):
    update_passages.update(corpus, **what)
  assert artifacts.read_info(corpus) == before


def test_an_updated_corpus_is_not_made_anew_in_silence(corpus, whole, tmp_path):
  update_passages.update(corpus, delete=["T2"])
  with pytest.raises(artifacts.ArtifactError, match="has been updated since it was made"):
    make_passages.run(str(tmp_path / "first.jsonl"), corpus, vocab=whole, **SIZES)


def test_an_update_that_another_overtook_stops(corpus, monkeypatch):
  begin = update_passages.publishing.begin

  def overtaken(*args, **what):
    monkeypatch.setattr(update_passages.publishing, "begin", begin)
    update_passages.update(corpus, delete=["T1"])
    return begin(*args, **what)

  monkeypatch.setattr(update_passages.publishing, "begin", overtaken)
  with pytest.raises(artifacts.ArtifactError, match="another process has changed"):
    update_passages.update(corpus, delete=["T2"])
  assert passages.load(corpus).deleted.tolist() == [1]


HOLD = """
import sys
from beam_jobs import update_passages
from realm_tf.storage import artifacts
update_passages._begin(sys.argv[1], artifacts.read_info(sys.argv[1]), [])
print("begun", flush=True)
sys.stdin.read()
"""


def test_two_updates_at_once(corpus):
  """The second one stops with a clear line while the first is at work, but not after its death."""
  first = subprocess.Popen(
    [sys.executable, "-c", HOLD, corpus],
    cwd=REPOSITORY,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  with first:
    assert first.stdout.readline() == b"begun\n"
    with pytest.raises(artifacts.ArtifactError, match="another process is writing"):
      update_passages.update(corpus, delete=["T2"])
    first.kill()
  assert update_passages.update(corpus, delete=["T2"])["counts"]["deleted"] == 1
