"""The benchmark of a corpus of the size of Wikipedia, on a tiny one."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.wikipedia_size import corpus, embeddings, measuring, training_step
from realm_tf.corpus import passages
from realm_tf.corpus.segments import Sizes
from realm_tf.retrieval import index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts
from tests.processes import REPOSITORY, processes_of_group, wait_until

ROWS = 130


@pytest.fixture(scope="module")
def large(toy, tmp_path_factory) -> str:
  """A corpus of the toy's passages, again and again, in segments of 50 passages."""
  folder = str(tmp_path_factory.mktemp("large") / "passages")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(corpus, "SIZES", Sizes(shard=20, segment=50))
    corpus.write(toy.path("passages"), folder, ROWS)
  return folder


def test_the_corpus_is_the_small_one_again_and_again(toy, large):
  small, table = passages.load(toy.path("passages")), passages.load(large)
  assert len(table) == ROWS > 2 * len(small), "more than two copies"
  assert [part.number for part in passages.segments_of(large)] == [0, 1, 2]
  for number in range(ROWS):
    source = number % len(small)
    assert (table.titles[number], table.texts[number]) == (
      small.titles[source],
      small.texts[source],
    )
    np.testing.assert_array_equal(table.text_ids[number], small.text_ids[source])
  assert len(np.unique(small.short_uids)) == len(small)
  assert len(np.unique(table.short_uids)) == ROWS, "the copies are different passages"
  assert table.documents[len(small)] == f"{small.documents[0]} (1)"


@pytest.mark.parametrize("searcher", ["exact", "partitioned"])
def test_an_index_of_the_corpus_is_searched(toy, large, tmp_path, monkeypatch, searcher):
  monkeypatch.setattr(corpus, "SIZES", Sizes(shard=20, segment=50))
  snapshot, real = toy.path("ict/snapshots/00000000"), str(tmp_path / "real.npz")
  rows, folder = str(tmp_path / "rows"), str(tmp_path / searcher)
  found = embeddings.embed(snapshot, toy.path("passages"), real)
  num = found["passages"]
  embeddings.write(real, rows, ROWS, "float16")
  embeddings.exact(rows, real, str(tmp_path / "exact.npz"))
  config = IndexConfig(searcher=searcher, embedding_type="float16")
  embeddings.build(rows, snapshot, large, folder, config)
  got = embeddings.search(folder, real, str(tmp_path / "exact.npz"))
  assert got["recall@8"] == 1.0, got
  read = index.read_embeddings(folder, num_rows=ROWS)
  wanted = np.load(real)["embeddings"].astype(np.float16)
  np.testing.assert_array_equal(read[:num], wanted, err_msg="the first copy")
  read = read.astype(np.float32)
  moved = np.linalg.norm(read[num : 2 * num] - read[:num], axis=1)
  nearest = [np.sort(np.linalg.norm(read[:num] - row, axis=1))[1] for row in read[:num]]
  assert 0.5 < np.mean(moved) / np.median(nearest) < 2, "copies are as far as real neighbours"
  assert artifacts.read_info(folder)["inputs"]["passages"]["path"] == large


def test_deleted_documents_are_compacted_away(large, tmp_path):
  folder = str(tmp_path / "passages")
  shutil.copytree(large, folder)
  got, before, after = corpus.compact(folder), passages.load(large), passages.load(folder)
  deleted = {before.documents[row] for row in range(0, ROWS, 100)}
  rows = range(ROWS)
  kept = [row for row in rows if not deleted & {before.documents[row], before.titles[row]}]
  assert 0 < len(kept) < ROWS
  assert (got["passages before"], got["passages"]) == (ROWS, len(kept)), got
  assert got["compact in s"] > 0 and got["compact's GiB"] > 0.05, got
  assert list(after.documents) == [before.documents[row] for row in kept]


def test_steps_that_have_run_are_skipped(large, tmp_path):
  path = str(tmp_path / "steps.json")
  first = measuring.Steps(path).run("open", corpus.open_corpus, folder=large)
  assert first.secs > 0 and first.gib > 0.05, first
  assert os.path.exists(path)
  again = measuring.Steps(path).run("open", corpus.open_corpus, folder="nothing is there")
  assert again == first


def test_a_step_that_fails_ends_the_program(tmp_path):
  steps = measuring.Steps(str(tmp_path / "steps.json"))
  with pytest.raises(SystemExit, match="open failed with exit code 1"):
    steps.run("open", corpus.open_corpus, folder=str(tmp_path / "nothing"))
  assert not steps.done


def test_a_killed_benchmark_takes_its_step_along(tmp_path):
  steps = f"measuring.Steps({str(tmp_path / 'steps.json')!r})"
  code = f"""
import subprocess
from benchmarks.wikipedia_size import measuring
if __name__ == "__main__":
  {steps}.run("wait", subprocess.run, args=["sleep", "600"])
"""
  (tmp_path / "program.py").write_text(code)
  program = subprocess.Popen(
    [sys.executable, str(tmp_path / "program.py")],
    env=os.environ | {"PYTHONPATH": REPOSITORY},
    start_new_session=True,
  )

  def steps_processes() -> list[int]:
    return [pid for pid in processes_of_group(program.pid) if pid != program.pid]

  try:
    # the step, the sleep that it waits for, and Python's resource tracker
    wait_until(lambda: len(steps_processes()) == 3, "the step")
    started = set(steps_processes())
    program.kill()
    wait_until(lambda: len(started & set(steps_processes())) <= 1, "the end of the step")
  finally:
    os.killpg(program.pid, signal.SIGKILL)
    program.wait()


def test_a_trainer_is_measured(toy, large, tmp_path, monkeypatch):
  """It trains with all passages and with the index that was given, which it does not make anew."""
  monkeypatch.setattr(training_step, "_POLL_SECS", 0.1)
  monkeypatch.setattr(corpus, "SIZES", Sizes(shard=20, segment=50))
  snapshot, real = toy.path("ict/snapshots/00000000"), str(tmp_path / "real.npz")
  rows, folder, spans = (str(tmp_path / name) for name in ("rows", "index", "spans"))
  embeddings.embed(snapshot, toy.path("passages"), real)
  embeddings.write(real, rows, ROWS, "float16")
  config = IndexConfig(embedding_type="float16", recall=0.99)
  embeddings.build(rows, snapshot, large, folder, config)
  completed = os.stat(os.path.join(folder, artifacts.COMPLETE)).st_mtime_ns
  assert training_step.annotate(large, spans)["command's GiB"] > 0.05
  got = training_step.train(snapshot, large, spans, folder, str(tmp_path / "training"), 2)
  assert got["trainer's GiB"] > 0.1 and got["examples a second"] > 0, got
  is_now = os.stat(os.path.join(folder, artifacts.COMPLETE)).st_mtime_ns
  assert is_now == completed, "the index is the one that was given"
