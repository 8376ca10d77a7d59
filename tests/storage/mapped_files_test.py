"""Mapped files are compared with their digests; remote ones are copied once."""

import os
import tempfile
import threading

import pytest

from realm_tf.corpus import passages
from realm_tf.storage import artifacts, integrity, mapped_files, paths
from realm_tf.storage.artifacts import ArtifactError
from tests import folders
from tests.storage.artifacts_test import make
from tests.storage.integrity_test import flip


def wait() -> None:
  for thread in threading.enumerate():
    if thread.name == "digests":
      thread.join(timeout=60)


def test_a_difference_is_found_at_once(tmp_path):
  make(tmp_path / "A", text="some text")
  path = str(tmp_path / "A/data.txt")
  (contents,), check = mapped_files.open_all([path])
  check()
  assert contents.to_pybytes() == b"some text"
  flip(path)
  with pytest.raises(ArtifactError, match="things folder .* damaged: its file 'data.txt' has SHA"):
    mapped_files.open_all([path])
  os.remove(path)
  with pytest.raises(ArtifactError, match="its file 'data.txt' is missing"):
    mapped_files.open_all([path])
  with pytest.raises(ArtifactError, match="'x' is not in its file list"):
    mapped_files.open_all([str(tmp_path / "A/x")])


def test_files_of_a_folder_that_is_being_written_are_not_compared(tmp_path):
  (tmp_path / "a").write_text("")
  (tmp_path / "b").write_text("b")
  found, check = mapped_files.open_all([str(tmp_path / name) for name in "ab"])
  check()
  assert [part.to_pybytes() for part in found] == [b"", b"b"]


def test_of_large_files_a_difference_is_found_in_the_background(tmp_path, monkeypatch):
  folder = folders.make_passages(str(tmp_path / "P"))
  size = sum(os.path.getsize(path) for path in passages.shard_paths(folder, passages.KIND))
  monkeypatch.setattr(mapped_files, "CHECKED_AT_ONCE_BYTES", size - 1)
  table = passages.load(folder)
  wait()
  text = table.texts[80]
  # What was mapped is what is compared: another file under this name changes nothing.
  path = passages.shard_paths(folder, passages.KIND)[1]
  whole = open(path, "rb").read()
  os.remove(path)
  assert table.texts[80] == text
  with open(path, "wb") as file:
    file.write(whole.replace(b"w1", b"w2", 1))
  table = passages.load(folder)
  wait()
  for read in (
    lambda: table.texts[80],
    lambda: table.text_ids.take([80]),
    lambda: table.titles[:2],
  ):
    with pytest.raises(ArtifactError, match="is damaged: its file 'passages-00001-of-00003.arrow'"):
      read()
  monkeypatch.setattr(mapped_files, "CHECKED_AT_ONCE_BYTES", size)
  with pytest.raises(ArtifactError, match="is damaged: its file 'passages-00001-of-00003.arrow'"):
    passages.load(folder)


@pytest.fixture
def remote(tmp_path, monkeypatch) -> str:
  """A passages folder in TensorFlow's memory, and an empty temporary folder."""
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
  os.mkdir(tmp_path / "tmp")
  local = folders.make_passages(str(tmp_path / "P"))
  folder = f"ram://mapped/{tmp_path.name}"
  for path in paths.listed(local, ".+"):
    artifacts.gfile.makedirs(folder)
    artifacts.gfile.copy(path, f"{folder}/{os.path.basename(path)}", overwrite=True)
  return folder


def copies_of(folder: str) -> dict[str, int]:
  """Names of the record files that have local copies, and when these were made."""
  cache = os.path.join(tempfile.gettempdir(), f"realm_tf-{os.getuid()}")
  files = artifacts.read_info(folder)["files"]
  return {
    name: os.stat(path).st_mtime_ns
    for name in sorted(files)
    if os.path.exists(path := f"{cache}/{files[name]['sha256']}.arrow")
  }


def test_remote_files_are_copied_once(remote, tmp_path, capsys):
  table, local = passages.load(remote), passages.load(str(tmp_path / "P"))
  assert table.texts[:] == local.texts[:] and table.fingerprint == local.fingerprint
  assert capsys.readouterr().err.startswith(f"copying 3 files of {remote} to {tempfile.tempdir}")
  copies = copies_of(remote)
  assert list(copies) == [
    os.path.basename(path) for path in passages.shard_paths(remote, "passages")
  ]
  assert passages.load(remote).texts[:] == local.texts[:] and copies_of(remote) == copies
  assert not capsys.readouterr().err


def test_a_damaged_copy_is_made_again(remote, tmp_path):
  passages.load(remote)
  name = list(copies_of(remote))[1]
  digest = artifacts.read_info(remote)["files"][name]["sha256"]
  (copy,) = (tmp_path / "tmp").glob(f"*/{digest}.arrow")
  os.truncate(copy, 9)  # as if a process had been killed, though those leave no such file
  passages.load(remote)
  whole = copy.read_bytes()
  flip(str(copy))
  with pytest.raises(ArtifactError, match=f"{remote}.* is damaged: its file '{name}' .copied to"):
    passages.load(remote)
  assert passages.load(remote).short_uids.size == 90 and copy.read_bytes() == whole


def test_jobs_read_remote_files_without_copies(remote, tmp_path):
  path = passages.shard_paths(remote, passages.KIND)[2]
  rows = list(passages.read_shard(path, passages.Passage))
  assert rows == list(
    passages.read_shard(f"{tmp_path}/P/{os.path.basename(path)}", passages.Passage)
  )
  assert not os.listdir(tmp_path / "tmp")
  artifacts.gfile.remove(path)
  with pytest.raises(ArtifactError, match="is missing"):
    list(passages.read_shard(path, passages.Passage))


def test_record_files_are_written_to_remote_folders(tmp_path):
  rows = list(
    passages.read_shard(
      passages.shard_paths(folders.make_passages(str(tmp_path / "P")), passages.KIND)[0],
      passages.Passage,
    )
  )
  path = f"ram://written/{tmp_path.name}/{passages.shard_name('passages', 0, 1)}"
  artifacts.gfile.makedirs(os.path.dirname(path))
  described = passages.write_shard(path, rows, passages.Passage)
  assert list(passages.read_shard(path, passages.Passage)) == rows
  assert described == integrity.describe(path, records=30)
