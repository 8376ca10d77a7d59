"""Embeddings are the passage tower's, whichever batches, workers and runners made them, however often killed."""

import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

from beam_jobs import embed_passages
from realm_tf import artifacts, examples, index, passages, searchers, snapshots
from realm_tf.index import IndexConfig
from realm_tf.models.retriever import Retriever
from realm_tf.tokenization import SPECIAL, Tokenizer
from tests.processes import REPOSITORY, wait_until

WORDS = [f"w{i}" for i in range(50)]
PASSAGE_LENGTH = 40  # not a multiple of the length step


def make_passages(folder: str, *, num_passages: int = 90, num_shards: int = 3, seed: int = 0) -> str:
  """A passages folder of random words, some passages empty and some too long."""
  rng = np.random.default_rng(seed)
  with artifacts.publish(folder, kind=passages.KIND, config={}, inputs={}, seed=seed) as staged:
    artifacts.write_text(os.path.join(staged.path, "vocab.txt"), "\n".join([*SPECIAL, *WORDS]) + "\n")
    tokenizer = Tokenizer(staged.path)
    texts = [" ".join(rng.choice(WORDS, rng.integers(0, 2 * PASSAGE_LENGTH))) for _ in range(num_passages)]
    rows = passages.make_passages(tokenizer, [(rng.choice(WORDS), [text]) for text in texts], range(num_passages))
    for shard, numbers in enumerate(np.array_split(np.arange(num_passages), num_shards)):
      path = os.path.join(staged.path, passages.shard_name("passages", shard, num_shards))
      passages.write_shard(path, [rows[number] for number in numbers])
    staged.counts = {"passages": num_passages}
    staged.details = {"vocab_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.size, "lower_case": True}
  return folder


def publish_snapshot(root: str, step: int, *, vocab: str) -> str:
  """A snapshot of a retriever with fresh weights."""
  tokenizer = Tokenizer(vocab)
  keras.utils.set_random_seed(step)
  retriever = Retriever(
      architecture=dict(vocabulary_size=tokenizer.size, num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32,
                        max_sequence_length=PASSAGE_LENGTH, dropout=0.1),
      projection_dim=8, query_length=16, passage_length=PASSAGE_LENGTH)
  return snapshots.publish(root, step, {"retriever": retriever}, tokenizer=tokenizer, made_by="test")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
  return make_passages(str(tmp_path_factory.mktemp("corpus") / "passages"))


@pytest.fixture(scope="module")
def snapshot(corpus, tmp_path_factory) -> str:
  return publish_snapshot(str(tmp_path_factory.mktemp("snapshots")), 100, vocab=corpus)


@pytest.fixture(scope="module")
def one_by_one(corpus, snapshot) -> np.ndarray:
  """Each passage packed and embedded by itself."""
  retriever, tokenizer, table = snapshots.load_retriever(snapshot), snapshots.load_tokenizer(snapshot), passages.load(corpus)
  rows = []
  for number in range(len(table)):
    ids = examples.gather_passages(table, [number])
    packed = examples.pack_passages(*ids, tokenizer=tokenizer, length=PASSAGE_LENGTH)
    rows.append(retriever.embed_passages(packed.token_ids, packed.segment_ids)[0])
  return np.stack(rows)


def embeddings_of(folder: str) -> np.ndarray:
  return index.read_embeddings(folder, num_rows=artifacts.read_info(folder)["counts"]["passages"])


def check_close(got: np.ndarray, wanted: np.ndarray, what: str) -> None:
  print(f"{what}: {got.shape} rows, largest difference {np.abs(got - wanted).max():.1e}")
  np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


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
  print(f"bfloat16 and float32 differ by at most {far:.4f}")
  assert got.dtype == np.float32 and 1e-4 < far < 0.1
  assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize("batch_size, jit_compile", [(7, False), (64, False), (64, True)])
def test_batches_do_not_change_embeddings(batch_size, jit_compile, corpus, snapshot, one_by_one, tmp_path):
  info = embed_passages.embed(
      str(tmp_path / "index"), snapshot=snapshot, passages_folder=corpus, batch_size=batch_size, jit_compile=jit_compile)
  check_close(embeddings_of(str(tmp_path / "index")), one_by_one, f"batches of {batch_size}, jit_compile={jit_compile}")
  assert info["counts"]["passages"] == info["counts"]["embedded_now"] == 90
  assert 0 < info["padded_share"] < 1


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


def test_scann_is_measured_by_embedded_sentences(snapshot, tmp_path, monkeypatch, capfd):
  """Of some passages one sentence, as the query tower embeds it; exact search needs none."""
  monkeypatch.setattr(searchers, "MIN_ROWS", 100)
  monkeypatch.setattr(searchers, "NUM_QUERIES", 150)
  corpus = make_passages(str(tmp_path / "passages"), num_passages=600, num_shards=3)
  info = embed_passages.embed(
    str(tmp_path / "index"),
    snapshot=snapshot,
    passages_folder=corpus,
    jit_compile=False,
    config=IndexConfig(searcher="scann"),
  )
  queries, table = index.read_queries(str(tmp_path / "index")), passages.load(corpus)
  assert 100 < len(queries) < 200 and info["scann"]["num_queries"] == len(queries), (
    f"{len(queries)} of about 150"
  )
  packed = examples.pack_queries(
    table.text_ids.tensor(), tokenizer=snapshots.load_tokenizer(snapshot), length=16
  )  # one sentence each
  wanted = snapshots.load_retriever(snapshot).embed_queries(packed).numpy()
  nearest = np.abs(queries[:, None] - wanted[None]).max(axis=-1).min(axis=1)
  assert nearest.max() < 1e-5, (
    f"a query is the sentence of a passage; the farthest is {nearest.max()}"
  )
  widths = info["scann"]["widths"]
  assert [width["num"] for width in widths] == [10, 100, 600] and all(
    width["recall"] >= 0.98 for width in widths
  ), widths
  last, _ = capfd.readouterr().out.strip().splitlines()[-2:]  # then the passages that were cut
  assert (
    f"ScaNN's recall {widths[0]['recall']:.4f} at 10, {widths[1]['recall']:.4f} at 100" in last
    and "wanted 0.98" in last
  ), last
  again = embed_passages.embed(
    str(tmp_path / "again"),
    snapshot=snapshot,
    passages_folder=corpus,
    jit_compile=False,
    config=IndexConfig(searcher="scann"),
  )
  np.testing.assert_array_equal(
    index.read_queries(str(tmp_path / "again")), queries, "the same sentences every time"
  )
  assert [width["leaves"] for width in again["scann"]["widths"]] == [
    width["leaves"] for width in widths
  ]
  embed_passages.embed(
    str(tmp_path / "exact"), snapshot=snapshot, passages_folder=corpus, jit_compile=False
  )
  assert index.read_queries(str(tmp_path / "exact")) is None


def test_next_snapshot_brings_its_own_weights(corpus, snapshot, one_by_one, tmp_path):
  newer = publish_snapshot(str(tmp_path), 200, vocab=corpus)
  for name, folder in (("first", snapshot), ("second", newer), ("third", snapshot)):
    embed_passages.embed(str(tmp_path / name), snapshot=folder, passages_folder=corpus)
  first, second, third = (embeddings_of(str(tmp_path / name)) for name in ("first", "second", "third"))
  print(f"another snapshot moves rows by {np.abs(second - first).mean():.2f}; the first again, by {np.abs(third - first).max()}")
  assert np.abs(second - first).mean() > 0.1
  np.testing.assert_array_equal(first, third)


def test_killed_job_goes_on_where_it_stopped(snapshot, tmp_path):
  corpus, output = make_passages(str(tmp_path / "passages"), num_passages=200, num_shards=50), str(tmp_path / "index")
  finished = lambda: {path: os.stat(path).st_ino for path in tmp_path.glob(".staging-index-*/embeddings-*.npy")}
  job = run_job("--snapshot", snapshot, "--passages", corpus, "--output", output)
  wait_until(finished, "the first embeddings")
  os.killpg(job.pid, signal.SIGKILL)
  job.wait()
  before = {path.name: inode for path, inode in finished().items()}
  assert 0 < len(before) < 50 and not artifacts.is_complete(output)
  info = embed_passages.embed(output, snapshot=snapshot, passages_folder=corpus)
  after = {os.path.basename(path): os.stat(path).st_ino for path in index.shard_paths(output)}
  print(f"killed after {len(before)} of 50 files; embedded then: {info['counts']['embedded_now']} of 200 passages")
  assert before.items() <= after.items() and len(after) == 50
  assert info["counts"]["embedded_now"] == 200 - 4 * len(before)


def test_another_vocabulary_is_refused(snapshot, tmp_path):
  corpus = make_passages(str(tmp_path / "passages"), num_passages=3, num_shards=1)
  info_path = os.path.join(corpus, artifacts.INFO)
  vocabulary = snapshots.load_tokenizer(snapshot).fingerprint
  artifacts.write_text(info_path, artifacts.read_text(info_path).replace(vocabulary, "another"))
  with pytest.raises(artifacts.ArtifactError, match="was made with vocabulary another"):
    embed_passages.embed(str(tmp_path / "index"), snapshot=snapshot, passages_folder=corpus)


# ------------------------------------------------------------------------------------------------------------ processes


def run_job(*args: str) -> subprocess.Popen:
  """The job as people start it, in a process group of its own."""
  return subprocess.Popen([sys.executable, "-m", "beam_jobs.embed_passages", *args], cwd=REPOSITORY, start_new_session=True)
