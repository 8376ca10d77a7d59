"""One writer at a time, and nobody waits for a dead one."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from beam_jobs import make_passages
from realm_tf import pretrain_ict
from realm_tf.corpus import passages
from realm_tf.models import snapshots
from realm_tf.storage import artifacts, integrity, ownership, paths, publishing, writers
from realm_tf.storage.artifacts import ArtifactError
from realm_tf.training import loop
from tests.processes import REPOSITORY, wait_until
from tests.storage.artifacts_test import make, names

_HOLDER = """
import sys, time
from realm_tf.storage import ownership, writers
{before}
ownership.claim(sys.argv[1]{writer})
print("claimed", flush=True)
time.sleep(100)
"""
_NO_LOCKS = """
import errno, fcntl
def flock(*args):
  raise OSError(errno.ENOLCK, "no locks")
fcntl.flock = flock
"""


def holder(folder, *, before: str = "", writer: str = "") -> subprocess.Popen:
  """Another process that has claimed a folder."""
  process = subprocess.Popen(
    [sys.executable, "-c", _HOLDER.format(before=before, writer=writer), str(folder)],
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "claimed\n"
  return process


def no_locks(monkeypatch) -> None:
  def flock(*unused_args):
    raise OSError(errno.ENOLCK, "no locks")

  monkeypatch.setattr(fcntl, "flock", flock)


# ------------------------------------------------------------------------------------- who is it


def test_a_process_is_known_by_number_host_and_birth(tmp_path):
  path, here = str(tmp_path / "w"), writers.this_process()
  writers.leave(path, here)
  assert writers.read(path) == here and names(tmp_path) == ["w"]
  assert writers.is_alive(here) and writers.is_this_process(here)
  gone = subprocess.Popen(["true"])
  gone.wait()
  zombie = subprocess.Popen(["true"])
  wait_until(lambda: not writers.is_running(zombie.pid), "the end of a process not waited for")
  boot, ticks = here["born"].split("/")
  for change, alive in (
    ({"pid": gone.pid}, False),
    ({"pid": zombie.pid}, False),
    ({"pid": 1}, False),
    ({"born": f"{boot}/{int(ticks) + 1}"}, False),
    ({"born": f"0/{ticks}"}, False),
    ({"born": None}, False),
    ({"host": "elsewhere"}, True),
    ({"pid": None}, True),
    ({"since": here["since"] + 1e7}, True),
  ):
    other = {**here, **change}
    assert writers.is_alive(other) == alive, change
    assert writers.is_this_process(other) == (set(change) == {"since"}), change
  zombie.wait()


@pytest.mark.parametrize(
  "text",
  [
    "",
    "{",
    "[]",
    "7",
    "{}",
    '{"host": 3}',
    '{"host": "h", "pid": -1}',
    '{"host": "h", "pid": true}',
  ],
)
def test_what_tells_of_no_process(text, tmp_path):
  (tmp_path / "w").write_text(text)
  assert writers.read(str(tmp_path / "w")) is None
  assert writers.read(str(tmp_path / "absent")) is None


@pytest.mark.parametrize("since", [0.0, 1e300, "x", None, [], float("nan")])
def test_any_time_can_be_told(since):
  assert "process 7 on h" in writers.words({"pid": 7, "host": "h", "since": since})


# ------------------------------------------------------------------------------------- artifacts


@pytest.mark.parametrize("before", ["", _NO_LOCKS])
def test_the_second_says_who_writes_and_a_dead_writer_is_passed_over(before, tmp_path, monkeypatch):
  if before:
    no_locks(monkeypatch)
  staging = tmp_path / ".staging-A"
  first = holder(staging, before=before)
  with pytest.raises(
    ArtifactError, match=f"another process is writing to .*process {first.pid} on"
  ):
    make(tmp_path / "A")
  assert first.poll() is None and list(staging.iterdir()) == [staging / ".writer.json"]
  first.kill()
  first.wait()
  make(tmp_path / "A")
  assert names(tmp_path) == ["A"] and names(tmp_path / "A") == ["COMPLETE", "data.txt", "info.json"]


def test_a_submitted_job_keeps_others_out_although_its_process_has_ended(tmp_path):
  first = holder(tmp_path / ".staging-A", writer=", writers.submitted()")
  first.kill()
  first.wait()
  with pytest.raises(ArtifactError, match="submitted on .*since.*delete '.*writer.json'"):
    make(tmp_path / "A")
  os.remove(tmp_path / ".staging-A/.writer.json")
  make(tmp_path / "A")


def test_a_submitted_job_is_finished_by_another_process(tmp_path):
  publication = publishing.begin(
    str(tmp_path / "A"), kind="things", config={}, inputs={}, outlives=True
  )
  ownership.release(publication.path)  # the process that submitted it exits
  publication.finish({})
  assert names(tmp_path) == ["A"] and artifacts.is_complete(publication.folder)


def test_who_lost_the_staging_folder_publishes_nothing(tmp_path):
  first = publishing.begin(str(tmp_path / "A"), kind="things", config={}, inputs={})
  ownership.release(first.path)
  second = holder(first.path)
  with pytest.raises(ArtifactError, match=f"was taken by process {second.pid} on .*Nothing was"):
    first.finish({})
  publishing.discard(first)
  assert os.path.exists(first.path), "the second one's"
  second.kill()
  second.wait()
  with pytest.raises(ArtifactError, match="is gone"):
    os.remove(f"{first.path}/.writer.json")
    first.finish({})


def move(source: str, target: str, overwrite: bool = False) -> None:
  """Moves a folder as object stores do, file by file; TensorFlow's ram:// moves only files."""
  for folder, _, files in artifacts.gfile.walk(source):
    for name in files:
      place = folder.replace(source, target, 1)
      artifacts.gfile.makedirs(place)
      _copy(os.path.join(folder, name), os.path.join(place, name))
  if artifacts.gfile.isdir(source):
    artifacts.gfile.rmtree(source)
  else:
    assert overwrite or not artifacts.gfile.exists(target), target
    _copy(source, target)
    artifacts.gfile.remove(source)


def _copy(source: str, target: str) -> None:
  if artifacts.gfile.exists(target):  # ram:// would append to it
    artifacts.gfile.remove(target)
  artifacts.gfile.copy(source, target)


def test_remote_writers_have_staging_folders_of_their_own(tmp_path, monkeypatch):
  monkeypatch.setattr(artifacts.gfile, "rename", move)

  def begin(text: str) -> publishing.Publication:
    publication = publishing.begin("ram://w/A", kind="things", config={"text": text}, inputs={})
    artifacts.write_text(f"{publication.path}/data.txt", text)
    return publication

  first, second = begin("first"), begin("second")
  assert first.path != second.path
  second.finish({})
  assert artifacts.read_info("ram://w/A")["config"] == {"text": "second"}
  first.finish({})
  assert artifacts.read_info("ram://w/A")["config"] == {"text": "first"}
  integrity.check_digests("ram://w/A")
  there = begin("third").path
  writers.leave(f"{there}/.writer.json", {**writers.this_process(), "pid": 1})
  begin("fourth")  # that writer is dead: another process has its number
  other = holder(tmp_path / "X")
  writers.leave(f"{there}/.writer.json", writers.read(str(tmp_path / "X/.writer.json")))
  with pytest.raises(
    ArtifactError, match=f"another process is writing to .*process {other.pid} on"
  ):
    begin("fifth")
  other.kill()
  other.wait()


def test_what_a_killed_job_had_moved_out_of_the_way_is_put_back(tmp_path):
  gone = subprocess.Popen(["true"])
  gone.wait()
  make(tmp_path / "A", text="old")
  os.rename(tmp_path / "A", tmp_path / f".replaced-A-{gone.pid}")
  publication = publishing.begin(str(tmp_path / "A"), kind="things", config={}, inputs={})
  assert (tmp_path / "A/data.txt").read_text() == "old"
  publishing.discard(publication)
  make(tmp_path / "B", text="older")
  os.rename(tmp_path / "B", tmp_path / f".replaced-A-{gone.pid}")
  make(tmp_path / "A", text="new")
  assert names(tmp_path) == ["A"] and (tmp_path / "A/data.txt").read_text() == "new"


def test_another_process_that_replaces_the_artifact_meanwhile_does_no_harm(tmp_path, monkeypatch):
  """At three moments: a folder's info is read, its staging folder and the old one vanish."""
  folder = str(tmp_path / "A")
  make(tmp_path / "A", size=1)
  moments = {"info": 0, "staging": 0, "replaced": 0}

  def once(moment: str) -> bool:
    moments[moment] += 1
    return moments[moment] == 1

  def own_info(path, real=ownership.own_info):
    # moved away, while the files are counted it is back
    return None if path == folder and once("info") else real(path)

  def makedirs(path, *args, real=os.makedirs, **kwargs):
    if os.path.basename(path).startswith(".staging-") and once("staging"):
      raise FileExistsError(path)  # and then it is gone
    return real(path, *args, **kwargs)

  def listed(path, pattern, real=paths.listed):
    gone = [f"{path}/.replaced-A-{2**22 + 1}"]
    return gone if "replaced" in pattern and once("replaced") else real(path, pattern)

  monkeypatch.setattr(ownership, "own_info", own_info)
  monkeypatch.setattr(os, "makedirs", makedirs)
  monkeypatch.setattr(paths, "listed", listed)
  make(tmp_path / "A", size=2)
  assert min(moments.values()) >= 1, moments
  assert names(tmp_path) == ["A"]


def test_a_kill_before_a_job_says_whose_its_staging_is_stops_no_other(tmp_path):
  for leave in (
    lambda staging: None,
    lambda staging: (staging / ".writer.json").write_text("{"),
    lambda staging: (staging / ".partial-7-info.json").write_text("{"),
    lambda staging: (staging / ".partial-7-.writer.json").write_text("{"),
  ):
    (tmp_path / ".staging-A").mkdir()
    leave(tmp_path / ".staging-A")
    make(tmp_path / "A")
    assert names(tmp_path) == ["A"]
    (tmp_path / ".staging-A").mkdir()
    leave(tmp_path / ".staging-A")
    ownership.tidy(str(tmp_path))
    assert names(tmp_path) == ["A"]


@pytest.mark.parametrize("vocabularies", [(300, 300), (300, 200)])
def test_two_make_passages_at_once(vocabularies, tmp_path):
  with open(tmp_path / "a.jsonl", "w") as file:
    for n in range(400):
      text = f"The mill of Anna Berg was built in {n}. It stands in Orla."
      file.write(json.dumps({"title": f"Mill {n}", "text": text}) + "\n")
  jobs = [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "beam_jobs.make_passages", f"--input={tmp_path}/a.jsonl"),
        *(f"--output={tmp_path}/P", f"--vocab_size={size}", "--passages_per_shard=20"),
      ],
      cwd=REPOSITORY,
      stderr=subprocess.PIPE,
      text=True,
    )
    for size in vocabularies
  ]
  said = [job.communicate(timeout=120)[1] for job in jobs]
  assert 0 in [job.returncode for job in jobs]
  for job, words in zip(jobs, said, strict=True):
    assert job.returncode == 0 or "another process is writing to" in words, words
  table = passages.load(str(tmp_path / "P"))
  info = artifacts.read_info(str(tmp_path / "P"))
  assert len(table) == 400
  assert info["vocab_fingerprint"] == passages.load_tokenizer(str(tmp_path / "P")).fingerprint
  size = info["config"]["vocab"].rpartition(" ")[2]
  made = make_passages.run(
    str(tmp_path / "a.jsonl"), str(tmp_path / "Q"), vocab_size=int(size), passages_per_shard=20
  )
  assert info["files"] == made["files"]


# -------------------------------------------------------------------------------------- trainers


def test_two_trainers_do_not_share_a_workdir(toy, tmp_path):
  workdir = tmp_path / "W"
  config = toy.config(ict__steps=4)
  command = [sys.executable, "-m", "realm_tf.pretrain_ict", f"--config={toy.config_path}"]
  command += ["--config.ict.steps=4", f"--workdir={workdir}"]
  first = holder(workdir)
  was = sorted(workdir.rglob("*"))
  with pytest.raises(
    ArtifactError, match=f"another process is writing to .*process {first.pid} on"
  ):
    pretrain_ict.pretrain_ict(config, str(workdir))
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert f"process {first.pid} on" in done.stderr.splitlines()[-1]
  assert sorted(workdir.rglob("*")) == was
  first.kill()
  first.wait()
  snapshot = pretrain_ict.pretrain_ict(config, str(workdir))
  assert artifacts.is_complete(snapshot) and not (workdir / ownership.WRITER).exists()


def test_a_workdir_is_claimed_once_by_blocks_within_blocks(tmp_path):
  with ownership.only_writer(str(tmp_path)), ownership.only_writer(f"{tmp_path}/."):
    assert (tmp_path / ownership.WRITER).exists()
    assert ownership.strays(str(tmp_path), "") == []
    loop.check_workdir(str(tmp_path), 1)
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(KeyError), ownership.only_writer(str(tmp_path / "new")):
    raise KeyError
  assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------- other users, and other clocks


def as_another_user(program: str, *args: str) -> subprocess.CompletedProcess:
  """Runs a program as a user who may read everything here and write nothing."""

  def become_nobody() -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)

  return subprocess.run(
    [sys.executable, "-c", program, *args],
    cwd=REPOSITORY,
    preexec_fn=become_nobody if os.getuid() == 0 else None,
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    timeout=120,
  )


_READ = """
import sys
from realm_tf.corpus import passages
from realm_tf.models import snapshots
from realm_tf.retrieval import index
from realm_tf.storage import ownership
root = sys.argv[1]
passages.load(root + "/passages")
snapshots.load_retriever(root + "/ict/snapshots/00000000")
index.load(root + "/ict/indexes/00000000", searcher="exact")
"""
_COMMAND = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_a_read_only_run_can_be_read_and_is_not_written_to(toy, tmp_path):
  if not _is_readable(toy.root):
    pytest.skip("another user may not enter the folder of the tests, or of Python")
  done = as_another_user(_READ, toy.root)
  assert done.returncode == 0, done.stderr
  for command in (
    ["beam_jobs.annotate_spans", f"--passages={toy.root}/passages", f"--output={toy.root}/new"],
    [
      *("beam_jobs.refresh_index", f"--snapshots={toy.root}/ict/snapshots", "--searcher=exact"),
      *(f"--passages={toy.root}/passages-pretraining", f"--indexes={toy.root}/ict/indexes"),
    ],
    ["realm_tf.pretrain_ict", f"--config={toy.config_path}", f"--workdir={toy.root}/ict"],
  ):
    done = as_another_user(_COMMAND, *command)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "ermission denied" in done.stderr.splitlines()[-1], done.stderr
  assert not os.path.exists(f"{toy.root}/new")
  assert not [name for name in os.listdir(toy.root) if name.startswith(".")]


def _is_readable(folder: str) -> bool:
  """Lets other users enter a folder of pytest's, if it is ours."""
  while os.stat(folder).st_uid == os.getuid() and folder not in ("/", "/tmp"):
    os.chmod(folder, os.stat(folder).st_mode | 0o555)
    folder = os.path.dirname(folder)
  try:
    return as_another_user("import os, sys; os.listdir(sys.argv[1])", folder).returncode == 0
  except PermissionError:  # the interpreter is in a folder of ours
    return False


def test_a_clock_that_jumps_back_changes_nothing(toy, tmp_path, monkeypatch):
  config = toy.config(ict__steps=4)
  whole = pretrain_ict.pretrain_ict(config, str(tmp_path / "whole"))
  now, clock = [time.time()], time.time

  def backwards() -> float:
    now[0] -= 3600
    return now[0]

  monkeypatch.setattr(time, "time", backwards)
  again = pretrain_ict.pretrain_ict(config, str(tmp_path / "jumped"))
  made = make_passages.run(
    config.corpus.knowledge, str(tmp_path / "P"), vocab=config.passages, max_tokens=64
  )
  monkeypatch.setattr(time, "time", clock)
  one, two = (snapshots.load_retriever(folder).get_weights() for folder in (whole, again))
  for before, after in zip(one, two, strict=True):
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
  assert artifacts.read_info(again)["wall_secs"] >= 0 and made["wall_secs"] >= 0
