"""Embeddings are those of the passage tower, for any batches, workers and runners.

They stay the same however often the job is killed.
"""

import collections
import json
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

from beam_jobs import embed_passages, embedding
from realm_tf import progress
from realm_tf.corpus import passages
from realm_tf.examples import packing
from realm_tf.models import snapshots
from realm_tf.retrieval import approximate, index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts, publishing
from tests.folders import PASSAGE_LENGTH, embeddings_of, make_passages, publish_snapshot
from tests.processes import REPOSITORY, wait_until


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
  return make_passages(str(tmp_path_factory.mktemp("corpus") / "passages"))


@pytest.fixture(scope="module")
def snapshot(corpus, tmp_path_factory) -> str:
  return publish_snapshot(str(tmp_path_factory.mktemp("snapshots")), 100, vocab=corpus)


@pytest.fixture(scope="module")
def one_by_one(corpus, snapshot) -> np.ndarray:
  """Returns each passage packed and embedded by itself."""
  retriever, tokenizer, table = (
    snapshots.load_retriever(snapshot),
    snapshots.load_tokenizer(snapshot),
    passages.load(corpus),
  )
  rows = []
  for number in range(len(table)):
    ids = packing.gather_passages(table, [number])
    packed = packing.pack_passages(*ids, tokenizer=tokenizer, length=PASSAGE_LENGTH)
    rows.append(retriever.embed_passages(packed.token_ids, packed.segment_ids)[0])
  return np.stack(rows)


def check_close(got: np.ndarray, wanted: np.ndarray, what: str) -> None:
  np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5, err_msg=what)


def test_mixed_precision_computes_in_bfloat16(corpus, snapshot, one_by_one, tmp_path):
  embed_passages.embed(
    str(tmp_path / "index"),
    snapshot=snapshot,
    passages_folder=corpus,
    jit_compile=False,
    config=IndexConfig(mixed_precision=True),
  )
  got = embeddings_of(str(tmp_path / "index"))
  far = np.abs(got - one_by_one).max()
  assert got.dtype == np.float32 and 1e-5 < far < 0.1
  assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize("batch_size, jit_compile", [(7, False), (64, False), (64, True)])
def test_batches_do_not_change_embeddings(
  batch_size, jit_compile, corpus, snapshot, one_by_one, tmp_path
):
  info = embed_passages.embed(
    str(tmp_path / "index"),
    snapshot=snapshot,
    passages_folder=corpus,
    batch_size=batch_size,
    jit_compile=jit_compile,
  )
  check_close(
    embeddings_of(str(tmp_path / "index")),
    one_by_one,
    f"batches of {batch_size}, jit_compile={jit_compile}",
  )
  assert info["counts"]["passages"] == info["counts"]["embedded_now"] == 90
  assert 0 < info["padded_share"] < 1


def test_embeddings_are_stored_in_the_type_asked_for(corpus, snapshot, one_by_one, tmp_path):
  folder = str(tmp_path / "index")
  embed_passages.embed(
    folder,
    snapshot=snapshot,
    passages_folder=corpus,
    jit_compile=False,
    config=IndexConfig(embedding_type="float16"),
  )
  got = embeddings_of(folder)
  assert got.dtype == np.float16
  np.testing.assert_allclose(got, one_by_one, rtol=1e-3, atol=1e-4)


def test_progress_counts_batches(corpus, snapshot, tmp_path, monkeypatch):
  """A corpus may be one file: its progress would be none until the end."""
  counted = []

  class Counted(collections.Counter):
    def update(self, num_by_file=()):
      counted.extend(dict(num_by_file or {}).values())

  monkeypatch.setattr(embedding, "_num_embedded", Counted())
  embed_passages.embed(
    str(tmp_path / "index"),
    snapshot=snapshot,
    passages_folder=corpus,
    batch_size=8,
    jit_compile=False,
  )
  assert sum(counted) == 90 and max(counted) == 8, counted


def test_progress_is_the_larger_of_batches_and_files(tmp_path, monkeypatch):
  added = []
  monkeypatch.setattr(progress.Rate, "add", lambda rate, num: added.append(num))
  targets = [str(tmp_path / index.shard_name(i, 4)) for i in range(4)]

  class Ended:
    """Lets the progress be looked at twice."""

    def __init__(self):
      self.looks = 0

    def wait(self, secs):
      self.looks += 1
      if self.looks == 2:
        for target in targets[:2]:  # of another process
          index.write_shard(target, np.zeros([5, 2], np.float32))
      return self.looks > 2

  monkeypatch.setattr(embedding, "_num_embedded", collections.Counter({targets[2]: 3}))
  embedding._show_progress(str(tmp_path), targets, 20, Ended())
  assert added == [3, 10]


def test_passages_longer_than_the_retriever_reads_are_told(corpus, snapshot, tmp_path, capfd):
  info = embed_passages.embed(
    str(tmp_path / "index"), snapshot=snapshot, passages_folder=corpus, jit_compile=False
  )
  table = passages.load(corpus)
  sizes = np.diff(table.title_ids.splits) + np.diff(table.text_ids.splits) + passages.SPECIAL_TOKENS
  cut = np.maximum(sizes - PASSAGE_LENGTH, 0)
  assert (cut > 0).any()
  assert info["counts"]["cut_passages"] == np.count_nonzero(cut)
  assert info["counts"]["cut_tokens"] == cut.sum()
  assert info["counts"]["tokens"] == sizes.sum() - cut.sum()
  last = capfd.readouterr().out.splitlines()[-1]
  assert f"WARNING: {np.count_nonzero(cut)} of 90 passages are longer than the retriever" in last
  assert f"and {cut.sum() / sizes.sum():.1%} of all word pieces are not embedded" in last


@pytest.mark.parametrize("searcher", ["partitioned", "scann"])
def test_recall_is_measured_by_embedded_sentences(searcher, snapshot, tmp_path, monkeypatch, capfd):
  """The queries are one sentence each of some passages, as the query tower embeds it.

  Exact search needs none."""
  monkeypatch.setattr(approximate, "MIN_ROWS", 100)
  monkeypatch.setattr(approximate, "NUM_QUERIES", 150)
  corpus = make_passages(str(tmp_path / "passages"), num_passages=600, num_shards=3)
  info = embed_passages.embed(
    str(tmp_path / "index"),
    snapshot=snapshot,
    passages_folder=corpus,
    jit_compile=False,
    config=IndexConfig(searcher=searcher),
  )
  queries, table = (
    index.read_queries(index.shard_paths(str(tmp_path / "index"))),
    passages.load(corpus),
  )
  assert 100 < len(queries) < 200 and info["searchers"]["0"]["num_queries"] == len(queries), (
    f"{len(queries)} of about 150"
  )
  # one sentence each
  packed = packing.pack_queries(
    table.text_ids.tensor(), tokenizer=snapshots.load_tokenizer(snapshot), length=16
  )
  wanted = snapshots.load_retriever(snapshot).embed_queries(packed).numpy()
  nearest = np.abs(queries[:, None] - wanted[None]).max(axis=-1).min(axis=1)
  assert nearest.max() < 1e-5, (
    f"every query should be a sentence of a passage; the farthest is {nearest.max()}"
  )
  widths = info["searchers"]["0"]["widths"]
  assert [width["num"] for width in widths] == [10, 100, 600] and all(
    width["recall"] >= 0.98 for width in widths
  ), widths
  last, _ = capfd.readouterr().out.strip().splitlines()[-2:]  # then the cut passages
  assert (
    f"measured recall {widths[0]['recall']:.4f} at 10, {widths[1]['recall']:.4f} at 100" in last
    and "wanted 0.98" in last
  ), last
  again = embed_passages.embed(
    str(tmp_path / "again"),
    snapshot=snapshot,
    passages_folder=corpus,
    jit_compile=False,
    config=IndexConfig(searcher=searcher),
  )
  np.testing.assert_array_equal(
    index.read_queries(index.shard_paths(str(tmp_path / "again"))),
    queries,
    "the same sentences every time",
  )
  assert [width["leaves"] for width in again["searchers"]["0"]["widths"]] == [
    width["leaves"] for width in widths
  ]
  embed_passages.embed(
    str(tmp_path / "exact"), snapshot=snapshot, passages_folder=corpus, jit_compile=False
  )
  assert index.read_queries(index.shard_paths(str(tmp_path / "exact"))) is None


def test_next_snapshot_brings_its_own_weights(corpus, snapshot, one_by_one, tmp_path):
  newer = publish_snapshot(str(tmp_path), 200, vocab=corpus)
  for name, folder in (("first", snapshot), ("second", newer), ("third", snapshot)):
    embed_passages.embed(str(tmp_path / name), snapshot=folder, passages_folder=corpus)
  first, second, third = (
    embeddings_of(str(tmp_path / name)) for name in ("first", "second", "third")
  )
  assert np.abs(second - first).mean() > 0.1
  np.testing.assert_array_equal(first, third)


def test_killed_job_goes_on_where_it_stopped(snapshot, tmp_path):
  corpus, output = (
    make_passages(str(tmp_path / "passages"), num_passages=200, num_shards=50),
    str(tmp_path / "index"),
  )

  def finished():
    return {
      path: os.stat(path).st_ino for path in tmp_path.glob(".staging-index-*/embeddings-*.npy")
    }

  job = run_job("--snapshot", snapshot, "--passages", corpus, "--output", output)
  wait_until(finished, "the first embeddings")
  os.killpg(job.pid, signal.SIGKILL)
  job.wait()
  before = {path.name: inode for path, inode in finished().items()}
  assert 0 < len(before) < 50 and not artifacts.is_complete(output)
  info = embed_passages.embed(output, snapshot=snapshot, passages_folder=corpus)
  after = {os.path.basename(path): os.stat(path).st_ino for path in index.shard_paths(output)}
  assert before.items() <= after.items() and len(after) == 50
  assert info["counts"]["embedded_now"] == 200 - 4 * len(before)


def test_another_vocabulary_is_refused(snapshot, tmp_path):
  corpus = make_passages(str(tmp_path / "passages"), num_passages=3, num_shards=1)
  info, vocabulary = artifacts.read_info(corpus), snapshots.load_tokenizer(snapshot).fingerprint
  publishing.write_info(corpus, json.loads(json.dumps(info).replace(vocabulary, "another")))
  with pytest.raises(artifacts.ArtifactError, match="was made with vocabulary another"):
    embed_passages.embed(str(tmp_path / "index"), snapshot=snapshot, passages_folder=corpus)


# ---------------------------------------------------------------------------------------- processes


def run_job(*args: str) -> subprocess.Popen:
  """Starts the job as users do, in its own process group."""
  return subprocess.Popen(
    [sys.executable, "-m", "beam_jobs.embed_passages", *args],
    cwd=REPOSITORY,
    start_new_session=True,
  )
