"""realm_tf/storage/artifacts.py: a whole folder or nothing, and what does not fit is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from realm_tf.storage import artifacts, ownership, publishing
from tests.folders import make
from tests.processes import REPOSITORY


def names(folder) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def test_published_folder(tmp_path):
  info = make(tmp_path / "A", size=3)
  assert names(tmp_path) == ["A"] and names(tmp_path / "A") == ["COMPLETE", "data.txt", "info.json"]
  assert (info["kind"], info["counts"], info["config"], info["inputs"]) == (
    "things",
    {"rows": 1},
    {"size": 3},
    {},
  )
  assert artifacts.read_info(str(tmp_path / "A"), kind="things") == info


def test_fingerprint_follows_config_inputs_and_content(tmp_path):
  one = make(tmp_path / "A", size=3)["fingerprint"]
  assert make(tmp_path / "B", size=3)["fingerprint"] == one
  others = [
    make(tmp_path / "C", size=4),
    make(tmp_path / "D", size=3, text="y"),
    make(tmp_path / "E", size=3, inputs={"a": str(tmp_path / "A")}),
    make(tmp_path / "F", kind="other", size=3),
  ]
  assert len({one, *(info["fingerprint"] for info in others)}) == 5
  assert artifacts.fingerprint_of({"a": 1, "b": 2}) == artifacts.fingerprint_of({"b": 2, "a": 1})


def test_failure_keeps_the_earlier_folder(tmp_path):
  first = make(tmp_path / "A", text="first")
  with (
    pytest.raises(RuntimeError),
    publishing.publish(str(tmp_path / "A"), kind="things", config={}, inputs={}) as staged,
  ):
    artifacts.write_text(os.path.join(staged.path, "data.txt"), "half")
    raise RuntimeError
  assert artifacts.read_info(str(tmp_path / "A")) == first and names(tmp_path) == ["A"]
  assert make(tmp_path / "A", text="second") != first
  assert (tmp_path / "A/data.txt").read_text() == "second" and names(tmp_path) == ["A"]


def test_kill_leaves_no_complete_folder(tmp_path):
  program = f"""
import time
from realm_tf import cli
cli.set_switches()
from realm_tf.storage import artifacts, publishing
with publishing.publish({str(tmp_path / "A")!r}, kind="things", config={{}}, inputs={{}}) as staged:
  artifacts.write_text(staged.path + "/data.txt", "half")
  time.sleep(60)
"""
  job = subprocess.Popen(
    [sys.executable, "-c", program],
    cwd=REPOSITORY,
    stderr=subprocess.DEVNULL,
  )
  while not list(tmp_path.glob(".staging-*/data.txt")):
    assert job.poll() is None
    time.sleep(0.02)
  job.send_signal(signal.SIGKILL)
  job.wait()
  assert not artifacts.is_complete(str(tmp_path / "A"))
  with pytest.raises(artifacts.ArtifactError, match="does not exist"):
    artifacts.read_info(str(tmp_path / "A"))
  assert make(tmp_path / "A")["counts"] == {"rows": 1}


def test_interrupted_folder_is_resumed_by_the_same_recipe_only(tmp_path):
  def begin(size, files):
    with publishing.publish(
      str(tmp_path / "A"), kind="things", config={"size": size}, inputs={}, resume=True
    ) as staged:
      own = {artifacts.INFO, ownership.WRITER}
      found = sorted(set(os.listdir(staged.path)) - own)
      artifacts.write_text(f"{staged.path}/{files}", "x")
      if files == "half":
        raise RuntimeError
    return found

  with pytest.raises(RuntimeError):
    begin(1, "half")
  assert begin(2, "rest") == [] and begin(1, "rest") == ["half"]


@pytest.mark.parametrize(
  "spoil, words",
  [
    (lambda folder: (folder / "COMPLETE").unlink(), "is not complete"),
    (
      lambda folder: (folder / "info.json").write_text(
        json.dumps({"kind": "other", "format_version": 1})
      ),
      "holds other, wanted things",
    ),
    (
      lambda folder: (folder / "info.json").write_text(
        json.dumps({"kind": "things", "format_version": 9})
      ),
      "has format 9",
    ),
  ],
)
def test_refused_folders(spoil, words, tmp_path):
  make(tmp_path / "A")
  spoil(tmp_path / "A")
  with pytest.raises(artifacts.ArtifactError, match=words):
    artifacts.read_info(str(tmp_path / "A"), kind="things")


def test_missing_input_and_foreign_input(tmp_path):
  with pytest.raises(artifacts.ArtifactError, match="does not exist"):
    make(tmp_path / "B", inputs={"a": str(tmp_path / "A")})
  make(tmp_path / "A", text="one")
  make(tmp_path / "B", inputs={"a": str(tmp_path / "A")})
  artifacts.check_input(str(tmp_path / "B"), "a", str(tmp_path / "A"))
  make(tmp_path / "A", text="two")
  with pytest.raises(artifacts.ArtifactError, match="was made from a .* wanted"):
    artifacts.check_input(str(tmp_path / "B"), "a", str(tmp_path / "A"))


def test_is_current(tmp_path):
  make(tmp_path / "A")
  make(tmp_path / "B", size=3, inputs={"a": str(tmp_path / "A")})
  given = {"kind": "things", "inputs": {"a": str(tmp_path / "A")}}
  assert artifacts.is_current(str(tmp_path / "B"), config={"size": 3}, **given)
  assert not artifacts.is_current(str(tmp_path / "B"), config={"size": 4}, **given)
  assert not artifacts.is_current(str(tmp_path / "absent"), config={"size": 3}, **given)
  make(tmp_path / "A", text="other")
  assert not artifacts.is_current(str(tmp_path / "B"), config={"size": 3}, **given)


def test_numbered_folders(tmp_path):
  root = str(tmp_path / "snapshots")
  assert artifacts.latest(root) is None
  for step in (5, 100, 20):
    os.makedirs(root, exist_ok=True)
    make(tmp_path / "snapshots" / f"{step:08d}")
  os.remove(os.path.join(root, "00000100", artifacts.COMPLETE))
  assert (
    artifacts.latest(root) == artifacts.step_folder(root, 20)
    and artifacts.step_of(artifacts.latest(root)) == 20
  )
  assert [artifacts.step_of(folder) for folder in artifacts.complete_folders(root)] == [5, 20]
