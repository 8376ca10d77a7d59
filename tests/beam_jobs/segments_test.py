"""An updated corpus is embedded and indexed by segments, and searched as if it were made anew."""

import dataclasses
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from beam_jobs import embedding, make_passages, refresh_index, update_passages
from realm_tf.corpus import passages
from realm_tf.retrieval import approximate, dense, index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts
from tests.folders import publish_snapshot
from tests.processes import REPOSITORY
from tests.towns import SIZES, TOWNS, town, write

SEARCHERS = ("exact", "partitioned", "scann")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A corpus P of 26 towns in two segments, and a snapshot."""
  root = tmp_path_factory.mktemp("made")
  everything = write(root / "all.jsonl", TOWNS)
  make_passages.run(everything, str(root / "all"), vocab_size=300, **SIZES)
  first = write(root / "first.jsonl", TOWNS[:26])
  make_passages.run(first, str(root / "P"), vocab=str(root / "all"), **SIZES)
  publish_snapshot(str(root / "snapshots"), 7, vocab=str(root / "P"))
  return root


@pytest.fixture
def corpus(made, tmp_path) -> str:
  return shutil.copytree(made / "P", str(tmp_path / "P"))


def embed(made, corpus: str, output: str, *, searcher: str = "exact") -> dict:
  return embedding.embed(
    output,
    snapshot=str(made / "snapshots/00000007"),
    passages_folder=corpus,
    config=IndexConfig(searcher=searcher),
    jit_compile=False,
  )


def change(corpus: str, tmp_path) -> None:
  """Adds four towns, replaces one, and deletes two."""
  new = [*TOWNS[26:], town(5, "Town 5 was moved to the sea. Nobody knows why.")]
  update_passages.update(corpus, add=write(tmp_path / "new.jsonl", new), replace=True)
  update_passages.update(corpus, delete=["T2", "25"])


def inodes(folder: str) -> dict[str, int]:
  return {
    os.path.relpath(os.path.join(at, name), folder): os.stat(os.path.join(at, name)).st_ino
    for at, _, names in os.walk(folder)
    for name in names
  }


def found(corpus: str, folder: str, *, num: int = 10) -> list[list[tuple[str, float]]]:
  """Returns the text and score of each passage found for some queries."""
  texts, searcher = passages.load(corpus).texts, index.load(folder)
  queries = np.random.default_rng(1).normal(size=[5, 8]).astype(np.float32)
  numbers, scores = searcher.search(tf.constant(queries), num)
  return [
    [(texts[number], round(float(score), 5)) for number, score in zip(*row, strict=True)]
    for row in zip(numbers.numpy(), scores.numpy(), strict=True)
  ]


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_only_new_segments_are_embedded(searcher, made, corpus, tmp_path):
  output = str(tmp_path / "E")
  info = embed(made, corpus, output, searcher=searcher)
  assert info["counts"]["embedded_now"] == 26
  before = inodes(output)
  change(corpus, tmp_path)
  info = embed(made, corpus, output, searcher=searcher)
  assert (info["counts"]["embedded_now"], info["counts"]["passages"]) == (5, 31)
  after = inodes(output)
  kept = [name for name in before if name not in ("info.json", "COMPLETE")]
  assert [name for name in kept if after[name] != before[name]] == []
  assert len(after) > len(before) and all(artifacts.read_info(output)["files"])


def test_a_corpus_that_becomes_large_leaves_its_segments_as_they_are(
  made, corpus, tmp_path, monkeypatch
):
  """Their searchers were built without queries, and need none."""
  monkeypatch.setattr(approximate, "MIN_ROWS", 28)
  output = str(tmp_path / "E")
  before = set(embed(made, corpus, output, searcher="partitioned")["files"])
  change(corpus, tmp_path)
  after = set(embed(made, corpus, output, searcher="partitioned")["files"])
  old = {name for number in (0, 1) for name in index.files_of_segment(after, number)}
  assert old == before
  assert any(name.startswith("queries-") for name in after - before), after - before


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_search_equals_that_of_a_compacted_corpus(searcher, made, corpus, tmp_path):
  embed(made, corpus, str(tmp_path / "E"), searcher=searcher)
  change(corpus, tmp_path)
  embed(made, corpus, str(tmp_path / "E"), searcher=searcher)
  segmented = found(corpus, str(tmp_path / "E"))
  assert len(passages.segments_of(corpus)) == 3
  update_passages.compact(corpus)
  embed(made, corpus, str(tmp_path / "E"), searcher=searcher)
  assert found(corpus, str(tmp_path / "E")) == segmented
  whole = found(corpus, str(tmp_path / "E"), num=28)
  assert not [row for row in whole if "Queen 2 " in str(row) or "Queen 5 " in str(row)]


@pytest.mark.parametrize(
  "before, searcher", [("exact", "partitioned"), ("partitioned", "scann"), ("scann", "exact")]
)
def test_another_searcher_needs_no_new_embeddings(
  before, searcher, made, corpus, tmp_path, monkeypatch, capfd
):
  """It is the same as one that was made at once, with the same queries and widths."""
  monkeypatch.setattr(approximate, "MIN_ROWS", 10)
  wanted = embed(made, corpus, str(tmp_path / "wanted"), searcher=searcher)
  output = str(tmp_path / "E")
  embed(made, corpus, output, searcher=before)
  kept = {name: inode for name, inode in inodes(output).items() if index.is_shard(name)}
  capfd.readouterr()
  info = embed(made, corpus, output, searcher=searcher)
  assert (info["counts"]["embedded_now"], info["config"]) == (0, wanted["config"])
  assert len(kept) == 5 and kept.items() <= inodes(output).items(), "files of embeddings"
  said = f"embeddings are kept, searchers built anew, because of searcher {before} → {searcher}"
  out = capfd.readouterr().out
  assert said in out and "26 passages, none embedded anew" in out, out
  assert info["searchers"] == wanted["searchers"]
  assert info["files"].keys() == wanted["files"].keys()
  assert found(corpus, output) == found(corpus, str(tmp_path / "wanted"))
  shards = index.shard_paths(output), index.shard_paths(str(tmp_path / "wanted"))
  queries, as_wanted = (index.read_queries(paths) for paths in shards)
  if searcher == "exact":
    assert queries is None and as_wanted is None
  else:
    np.testing.assert_array_equal(queries, as_wanted)


def test_an_index_of_other_weights_or_types_is_not_taken_over(made, corpus, tmp_path, capfd):
  output = str(tmp_path / "E")
  embed(made, corpus, output)
  before = inodes(output)
  info = embedding.embed(
    output,
    snapshot=str(made / "snapshots/00000007"),
    passages_folder=corpus,
    config=IndexConfig(embedding_type="float16", searcher="partitioned"),
    jit_compile=False,
  )
  assert info["counts"]["embedded_now"] == 26
  assert "everything is embedded anew, because of searcher" in capfd.readouterr().out
  publish_snapshot(str(tmp_path / "others"), 8, vocab=corpus)
  info = embedding.embed(
    output,
    snapshot=str(tmp_path / "others/00000008"),
    passages_folder=corpus,
    jit_compile=False,
  )
  assert info["counts"]["embedded_now"] == 26 and inodes(output) != before


def test_a_refresh_keeps_the_settings_of_the_newest_index(made, corpus, tmp_path):
  """Flags that are given change them; a trainer's job has only its flags."""
  config = IndexConfig(searcher="partitioned", recall=0.99, embedding_type="float16")
  embedding.embed(
    str(tmp_path / "indexes/00000007"),
    snapshot=str(made / "snapshots/00000007"),
    passages_folder=corpus,
    config=config,
    jit_compile=False,
  )
  change(corpus, tmp_path)

  def refresh(*given: str) -> tuple[str, dict]:
    done = subprocess.run(
      [
        *(sys.executable, "-m", "beam_jobs.refresh_index", "--nojit_compile"),
        *(f"--snapshots={made}/snapshots", f"--passages={corpus}"),
        *(f"--indexes={tmp_path}/indexes", *given),
      ],
      cwd=REPOSITORY,
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    return done.stdout, artifacts.read_info(str(tmp_path / "indexes/00000007"))

  said, info = refresh()
  assert info["config"] == dataclasses.asdict(config) and info["counts"]["embedded_now"] == 5
  assert "was made: --searcher=partitioned --embedding_type=float16 --recall=0.99" in said
  (shard, *_) = index.shard_paths(str(tmp_path / "indexes/00000007"))
  os.truncate(shard, 99)  # a damaged index is made again
  said, info = refresh()
  assert info["config"] == dataclasses.asdict(config) and info["counts"]["embedded_now"] == 31
  said, info = refresh("--recall=0.5", f"--parent_pid={os.getpid()}")
  assert info["config"] == dataclasses.asdict(IndexConfig(recall=0.5))
  assert info["counts"]["embedded_now"] == 31 and "embedded anew, because of searcher" in said


def test_damaged_segments_are_not_taken_over(made, corpus, tmp_path):
  output = str(tmp_path / "E")
  embed(made, corpus, output)
  wanted = found(corpus, output)
  path = index.shard_paths(output)[0]
  with open(path, "r+b") as file:
    file.seek(-3, os.SEEK_END)
    file.write(b"\x01")
  info = embed(made, corpus, output)
  assert info["counts"]["embedded_now"] == 25, "the second segment, of one passage, is intact"
  assert found(corpus, output) == wanted
  os.remove(path)
  assert embed(made, corpus, output)["counts"]["embedded_now"] == 26
  assert found(corpus, output) == wanted


class Enough(Exception):
  """Ends `refresh_index.watch`."""


def test_a_watching_job_takes_an_update_over(made, corpus, tmp_path, monkeypatch):
  """It waits for the first snapshot, and makes its index anew, from the new segments."""
  snapshots, indexes = str(tmp_path / "snapshots"), str(tmp_path / "indexes")
  monkeypatch.setattr(
    refresh_index.time,
    "sleep",
    lambda _: shutil.copytree(made / "snapshots", snapshots, dirs_exist_ok=True),
  )
  snapshot, folder = f"{snapshots}/00000007", f"{indexes}/00000007"
  refreshed, tables = [], []

  def refresh() -> str:
    if len(refreshed) == 2:
      raise Enough
    made = refresh_index.refresh_newest(
      snapshots=snapshots,
      passages=corpus,
      indexes=indexes,
      config=IndexConfig(),
      keep=2,
      embed=lambda output, **what: embedding.embed(output, **what, jit_compile=False),
    )
    refreshed.append(artifacts.read_info(made)["counts"])
    tables.append(passages.load(corpus))
    change(corpus, tmp_path)
    if len(refreshed) == 1:
      with pytest.raises(artifacts.ArtifactError, match="was made from passages"):
        dense.load(folder, table=passages.load(corpus), snapshot=snapshot)
    return made

  with pytest.raises(Enough):
    refresh_index.watch(refresh, snapshots=snapshots, passages=corpus, poll_secs=0.01)
  assert [counts["passages"] for counts in refreshed] == [26, 31]
  assert refreshed[1]["embedded_now"] == 5
  table = tables[1]
  indexed = dense.load(folder, table=table, snapshot=snapshot)
  query = np.array([[*table.text_ids[30][:8], *[0] * 8]], np.int32)
  numbers = indexed.search(query, 28).numbers[0]
  assert sorted(numbers.tolist()) == table.numbers.tolist()


def test_a_trainer_takes_an_update_over_but_no_other_numbers(made, corpus, tmp_path, capfd):
  """A newer index brings the updated passages with it, even one of the same snapshot."""
  root, output = str(made / "snapshots"), str(tmp_path / "indexes/00000007")
  embed(made, corpus, output)
  table = passages.load(corpus)
  first = dense.load(output, table=table, snapshot=f"{root}/00000007")
  versions = [index.Version(output, 0)]
  swapper = dense.Swapper(first, newest_index=lambda: versions[-1], snapshots_root=root)

  def advanced() -> bool:
    """Returns whether the newest index is used once it has been looked at."""
    assert not swapper.advance()
    swapper._loading.exception()  # waits until it is done
    return swapper.advance()

  assert not advanced() and swapper.current is first, "the same index, of the same passages"
  change(corpus, tmp_path)
  embed(made, corpus, output)
  versions.append(index.Version(output, 1))
  assert advanced() and len(swapper.current.table) == 31 and swapper.current.num_rows == 28
  assert "there are 28 now" in capfd.readouterr().out
  assert len(table) == 26, "batches that are under way keep theirs"
  updated = swapper.current
  update_passages.compact(corpus)
  embed(made, corpus, output)
  versions.append(index.Version(output, 2))
  assert not advanced() and swapper.current is updated
  assert "is not used: the passages were compacted or made anew" in capfd.readouterr().out


def test_numbers_are_compared_with_the_corpus_in_use(made, tmp_path, capfd):
  """After an update is taken over, a compaction of what it added is not, whatever came first."""
  corpus, root, output = (str(tmp_path / name) for name in ("P", "snapshots", "indexes/00000007"))
  first = write(tmp_path / "first.jsonl", TOWNS[:25])  # a full segment, which compaction keeps
  make_passages.run(first, corpus, vocab=str(made / "all"), **SIZES)
  shutil.copytree(made / "snapshots", root)
  embed(tmp_path, corpus, output)
  indexed = dense.load(output, table=passages.load(corpus), snapshot=f"{root}/00000007")
  versions = [index.Version(output, 1)]
  swapper = dense.Swapper(indexed, newest_index=lambda: versions[-1], snapshots_root=root)
  for number in (25, 26):
    added = write(tmp_path / "new.jsonl", [TOWNS[number]])
    update_passages.update(corpus, add=added)
  update_passages.update(corpus, delete=["25"])
  for taken in (True, False):
    embed(tmp_path, corpus, output)
    versions.append(index.Version(output, 1 + len(versions)))
    swapper.advance()
    swapper._loading.exception()  # waits until it is done
    assert swapper.advance() == taken
    update_passages.compact(corpus)
  assert index.segments_of(output) == [0, 1] and len(swapper.current.table) == 27
  assert "is not used: the passages were compacted or made anew" in capfd.readouterr().out
