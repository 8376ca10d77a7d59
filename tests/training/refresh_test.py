"""The background refresh with real processes.

Tests what is published, what is ignored, and which process ends with which.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from beam_jobs import embed_passages, refresh_index
from realm_tf.retrieval import index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts, writers
from realm_tf.training import refresh
from tests.folders import embeddings_of, make_passages, publish_index, publish_snapshot
from tests.processes import REPOSITORY, is_running, wait_until


class Work:
  """A trainer's folders with a tiny corpus and snapshot 100."""

  def __init__(self, root: str):
    self.passages = make_passages(os.path.join(root, "passages"), num_passages=30, num_shards=3)
    self.snapshots, self.indexes, self.log = (
      os.path.join(root, name) for name in ("snapshots", "indexes", "refresh.log")
    )
    self.publish(100)

  def publish(self, step: int) -> str:
    return publish_snapshot(self.snapshots, step, vocab=self.passages)

  def index(self, step: int) -> str:
    return artifacts.step_folder(self.indexes, step)

  def make_index(self, step: int, *, passages: str | None = None) -> None:
    """Writes an index of random embeddings without the job."""
    publish_index(
      self.index(step),
      np.random.default_rng(step).normal(size=[30, 8]),
      passages=passages or self.passages,
      snapshot=artifacts.step_folder(self.snapshots, step),
    )

  def refresher(self, **job) -> refresh.Refresher:
    return refresh.Refresher(
      refresh.RefreshJob(self.passages, **job),
      snapshots=self.snapshots,
      indexes=self.indexes,
      log=self.log,
    )


@pytest.fixture
def work(tmp_path, monkeypatch) -> Work:
  monkeypatch.chdir(REPOSITORY)  # where trainers, and therefore their jobs, are started
  return Work(str(tmp_path))


def wait_for_index(refresher: refresh.Refresher, step: int) -> tuple[float, bool]:
  """Polls as a trainer does until the index is there.

  Returns the longest poll in seconds, and whether a refresh was seen running.
  """
  longest, seen_running, deadline = 0.0, False, time.monotonic() + 60
  while (newest := refresher.newest_index()) is None or artifacts.step_of(newest.folder) < step:
    assert time.monotonic() < deadline, artifacts.read_text(refresher.log)
    started = time.monotonic()
    refresher.poll()
    longest = max(longest, time.monotonic() - started)
    seen_running |= refresher.running
    time.sleep(0.01)
  return longest, seen_running


def test_watching_job_follows_the_newest_snapshot_and_outlives_kills(work, capfd):
  with work.refresher(args=("--poll_secs=0.1", "--keep=2")) as refresher:
    _, seen_running = wait_for_index(refresher, 100)
    assert seen_running
    work.publish(200)
    wait_for_index(refresher, 200)
    killed = refresher._job.pid
    os.kill(killed, signal.SIGKILL)
    work.publish(300)
    longest, _ = wait_for_index(refresher, 300)
    wait_until(lambda: not refresher.running, "the end of the refresh")
    assert refresher.restarts == 1 and longest < 0.05
    assert refresher.snapshots_in_use() == {200, 300}
    restarted = refresher._job.pid
  assert not is_running(killed) and not is_running(restarted)
  assert "WARNING: the refresh job ended with code -9" in capfd.readouterr().err
  info = artifacts.read_info(work.index(300), kind=index.KIND)
  assert info["snapshot_step"] == 300 and info["refresh_secs"] > 0 and info["passages_per_sec"] > 0
  embed_passages.embed(
    work.index(400),
    snapshot=artifacts.step_folder(work.snapshots, 300),
    passages_folder=work.passages,
  )
  np.testing.assert_allclose(
    embeddings_of(work.index(300)), embeddings_of(work.index(400)), atol=1e-5
  )


def test_job_dies_with_a_killed_trainer(work):
  trainer = subprocess.Popen(
    [
      sys.executable,
      "-c",
      f"""if True:
      import time
      from realm_tf import cli
      cli.set_switches()
      from realm_tf.training import refresh
      refresher = refresh.Refresher(
          refresh.RefreshJob({work.passages!r}),
          snapshots={work.snapshots!r}, indexes={work.indexes!r}, log={work.log!r})
      refresher.start()
      print(refresher._job.pid, flush=True)
      time.sleep(100)""",
    ],
    stdout=subprocess.PIPE,
  )
  job = int(trainer.stdout.readline())
  wait_until(lambda: artifacts.is_complete(work.index(100)), "the first index")
  assert is_running(job)
  trainer.kill()
  trainer.wait()
  wait_until(lambda: not is_running(job), "the end of the job", timeout_secs=10)


def test_job_that_cannot_start_is_tried_again_with_growing_pauses(work, monkeypatch, capfd):
  now = 0.0
  monkeypatch.setattr(refresh.time, "monotonic", lambda: now)
  monkeypatch.setattr(sys, "executable", "false")
  starts = []
  with work.refresher() as refresher:
    for now in np.arange(0.0, 200.0, 0.5):
      refresher._job.wait()
      restarts = refresher.restarts
      refresher.poll()
      if refresher.restarts > restarts:
        starts.append(float(now))
  pauses = np.diff([0.0, *starts])
  # noticed at the next poll
  np.testing.assert_allclose(pauses[:8], [1, 2.5, 4.5, 8.5, 16.5, 32.5, 60.5, 60.5])
  assert "(its log is empty)" in capfd.readouterr().err


def test_half_written_and_foreign_indexes_are_ignored_with_one_warning(work, tmp_path, capfd):
  refresher = work.refresher(start=False)
  refresher.start()
  assert refresher.newest_index() is None
  work.make_index(100)
  for step in (200, 300, 400, 500):
    work.publish(step)
  other = make_passages(str(tmp_path / "other"), num_passages=20, num_shards=2, seed=1)
  work.make_index(200, passages=other)
  work.make_index(300)
  os.remove(os.path.join(work.index(300), artifacts.COMPLETE))
  work.make_index(400)
  artifacts.write_text(os.path.join(work.index(400), artifacts.INFO), "not json")
  work.make_index(500)
  os.rename(artifacts.step_folder(work.snapshots, 400), artifacts.step_folder(work.snapshots, 600))
  os.rename(work.index(500), work.index(600))  # index 600 names snapshot 500
  capfd.readouterr()
  assert [refresher.newest_index().folder for _ in range(3)] == [work.index(100)] * 3
  warnings = capfd.readouterr().err.strip().splitlines()
  assert [os.path.basename(line.split(" is ignored")[0]) for line in warnings] == [
    "00000600",
    "00000400",
    "00000200",
  ]
  refresher.poll()
  refresher.stop()


def test_stale_status_files_do_not_count(work):
  refresher = work.refresher(start=False)
  status = {**writers.this_process(), "snapshot_step": 700}
  os.makedirs(work.indexes)
  gone = subprocess.Popen(["true"])
  gone.wait()
  before = status["born"].rpartition("/")[0]
  for change, running in (
    ({}, True),
    ({"pid": gone.pid}, False),
    ({"pid": gone.pid, "host": "elsewhere"}, True),
    # its number is in use again: in a container it is often the same, even this process's own
    ({"born": f"{before}/1"}, False),
    ({"pid": 1}, False),
    ({"born": status["born"].replace(before, "another boot")}, False),
    ({"since": time.time() + 1e6}, True),  # a clock that jumped back
    ({"since": "yesterday"}, True),
  ):
    artifacts.write_text(os.path.join(work.indexes, refresh.STATUS), json.dumps(status | change))
    assert refresher.running == running
    assert refresher.snapshots_in_use() == ({700} if running else set())


@pytest.mark.parametrize(
  "text",
  [
    "",
    "{",
    "[]",
    "null",
    '{"pid": 1}',
    '{"pid": "x", "host": "h", "snapshot_step": 1}',
    "[" * 9999,
  ],
)
def test_broken_status_files_do_not_count_and_stop_no_refresh(text, work):
  artifacts.gfile.makedirs(work.indexes)
  artifacts.write_text(os.path.join(work.indexes, refresh.STATUS), text)
  assert refresh.under_way(work.indexes) is None
  with refresh_index._announced(work.indexes, 100):
    assert refresh.under_way(work.indexes)["snapshot_step"] == 100
  assert os.listdir(work.indexes) == []


def test_a_killed_job_of_another_container_stops_no_refresh(work):
  os.makedirs(work.indexes)
  status = {**writers.this_process(), "host": "elsewhere", "snapshot_step": 7}
  artifacts.write_text(os.path.join(work.indexes, refresh.STATUS), json.dumps(status))
  with refresh_index._announced(work.indexes, 100):
    assert refresh.under_way(work.indexes)["snapshot_step"] == 100


def test_snapshot_deleted_while_it_is_read_gives_way_to_the_newest(work):
  seen = []

  def embed(folder, *, snapshot, passages_folder, config):
    seen.append(artifacts.step_of(snapshot))
    assert refresh.under_way(work.indexes)["snapshot_step"] == seen[-1]
    if len(seen) == 1:
      work.publish(200)
      artifacts.prune(work.snapshots, newest=1)
      raise RuntimeError("as Beam wraps whatever a worker met")
    embed_passages.embed(
      folder, snapshot=snapshot, passages_folder=passages_folder, config=config, jit_compile=False
    )

  def once():
    return refresh_index.refresh_newest(
      snapshots=work.snapshots,
      passages=work.passages,
      indexes=work.indexes,
      config=IndexConfig(),
      keep=2,
      embed=embed,
    )

  assert [once(), once()] == [work.index(200)] * 2
  assert seen == [100, 200] and os.listdir(work.indexes) == ["00000200"]


def test_an_index_in_bfloat16_does_not_count_for_one_in_float32(work):
  def embed(folder, *, snapshot, passages_folder, config):
    return embed_passages.embed(
      folder, snapshot=snapshot, passages_folder=passages_folder, config=config, jit_compile=False
    )

  found = {}
  for mixed in (True, False):
    folder = refresh_index.refresh_newest(
      snapshots=work.snapshots,
      passages=work.passages,
      indexes=work.indexes,
      config=IndexConfig(mixed_precision=mixed),
      keep=2,
      embed=embed,
    )
    found[mixed] = embeddings_of(folder)
  embed(
    work.index(0),
    snapshot=artifacts.latest(work.snapshots),
    passages_folder=work.passages,
    config=IndexConfig(),
  )
  np.testing.assert_array_equal(
    found[False], embeddings_of(work.index(0)), "made again, in float32"
  )
  assert np.abs(found[True] - found[False]).max() > 1e-5, "in bfloat16 before"


def test_no_snapshot_and_a_second_job_are_refused(work):
  settings = dict(
    passages=work.passages, indexes=work.indexes, config=IndexConfig(), keep=2, embed=None
  )
  with pytest.raises(artifacts.ArtifactError, match="no complete snapshot under '/nowhere'"):
    refresh_index.refresh_newest(snapshots="/nowhere", **settings)
  with (
    refresh_index._announced(work.indexes, 100),
    pytest.raises(artifacts.ArtifactError, match="is making an index in"),
  ):
    refresh_index.refresh_newest(snapshots=work.snapshots, **settings)
