"""A file that is lost, cut or changed is an error of one sentence for every reader."""

import json
import os
import random
import shutil

import numpy as np
import pytest

from beam_jobs import annotate_spans, embed_passages, make_passages
from realm_tf.corpus import passages
from realm_tf.models import snapshots
from realm_tf.retrieval import index
from realm_tf.spans import holders, rules
from realm_tf.storage import artifacts, integrity, ownership, paths, publishing
from realm_tf.storage.artifacts import COMPLETE, INFO, ArtifactError
from tests.storage import artifacts_test
from tests.storage.artifacts_test import make

# ---------------------------------------------------------------------------------------- the list


def test_info_lists_files_with_sizes_and_digests(tmp_path):
  info = make(tmp_path / "A", text="some text")
  path = str(tmp_path / "A/data.txt")
  assert info["files"] == {"data.txt": {"bytes": 9, "sha256": artifacts.file_digest(path)}}
  assert integrity.describe(path, records=3) == {**info["files"]["data.txt"], "records": 3}


def test_what_killed_workers_left_is_not_published(tmp_path):
  with publishing.publish(str(tmp_path / "A"), kind="things", config={}, inputs={}) as staged:
    os.mkdir(os.path.join(staged.path, "deep"))
    for name in ("data.txt", "deep/data.txt"):
      artifacts.write_text(os.path.join(staged.path, name), "whole")
      with paths.whole(os.path.join(staged.path, name)) as partial:
        artifacts.write_text(partial, "half")
        shutil.copy(partial, f"{partial}2")
        os.rename(f"{partial}2", partial.replace(str(os.getpid()), "7"))
  info = artifacts.read_info(str(tmp_path / "A"))
  assert list(info["files"]) == ["data.txt", "deep/data.txt"]
  assert artifacts_test.names(tmp_path / "A") == ["COMPLETE", "data.txt", "deep", "info.json"]
  assert os.listdir(tmp_path / "A/deep") == ["data.txt"]


@pytest.mark.parametrize("change", [os.remove, lambda path: open(path, "a").write("x")])
def test_what_changes_before_it_is_published_is_not_published(change, tmp_path):
  with pytest.raises(ArtifactError, match="not as its job wrote it: its file 'data.txt'"):
    with publishing.publish(str(tmp_path / "A"), kind="things", config={}, inputs={}) as staged:
      path = os.path.join(staged.path, "data.txt")
      artifacts.write_text(path, "text")
      staged.files["data.txt"] = integrity.describe(path)
      change(path)
  assert not (tmp_path / "A").exists()


def cut(path):
  os.truncate(path, os.path.getsize(path) - 1)


def grow(path):
  with open(path, "ab") as file:
    file.write(b"x")


def flip(path, rng=random):
  with open(path, "r+b") as file:
    at = rng.randrange(os.path.getsize(path))
    file.seek(at)
    (byte,) = file.read(1)
    file.seek(at)
    file.write(bytes([byte ^ 1 << rng.randrange(8)]))


@pytest.mark.parametrize("change", [os.remove, cut, grow])
def test_a_file_that_is_lost_cut_or_longer_is_found_by_whoever_opens_the_artifact(change, tmp_path):
  folder = str(tmp_path / "A")
  make(folder, size=3)
  change(f"{folder}/data.txt")
  with pytest.raises(ArtifactError, match="damaged: its file 'data.txt'.*make the things again"):
    artifacts.read_info(folder)
  with pytest.raises(ArtifactError, match="damaged"):
    make(tmp_path / "B", inputs={"things": folder})
  assert not artifacts.is_current(folder, kind="things", config={"size": 3}, inputs={})
  make(folder, size=3)  # so the same job makes it again
  assert artifacts.is_current(folder, kind="things", config={"size": 3}, inputs={})


def test_a_flipped_bit_is_found_by_whoever_reads_the_file(tmp_path):
  folder = str(tmp_path / "A")
  make(folder, size=3)
  flip(f"{folder}/data.txt")
  with pytest.raises(ArtifactError, match="'data.txt' has SHA-256 .*instead of"):
    integrity.check_digests(folder)
  assert not artifacts.is_current(folder, kind="things", config={"size": 3}, inputs={})


def test_any_change_of_info_or_of_its_mark_is_one_sentence(tmp_path):
  folder, rng = str(tmp_path / "A"), random.Random(0)
  make(folder)
  whole = {name: open(f"{folder}/{name}", "rb").read() for name in (INFO, COMPLETE)}
  for number in range(300):
    name = (INFO, COMPLETE)[number % 2]
    change = (flip, cut, grow)[number // 2 % 3]
    change(f"{folder}/{name}", rng) if change is flip else change(f"{folder}/{name}")
    if change is not cut or name == INFO:  # a mark without its last newline is the same mark
      with pytest.raises(ArtifactError) as caught:
        artifacts.read_info(folder)
      assert "\n" not in str(caught.value)
    with open(f"{folder}/{name}", "wb") as file:
      file.write(whole[name])
  artifacts.read_info(folder)


@pytest.mark.parametrize(
  "text",
  ["", "{", "[]", "null", "7", "[" * 9999, '{"a": ' * 9999, "9" * 5000, "\udcff", '{"kind": 1}']
  + [
    json.dumps(
      dict(kind="things", format_version=artifacts.FORMAT_VERSION, config={}, inputs={}, seed=None)
      | change
    )
    for change in (
      {},
      {"config": []},
      {"inputs": [1]},
      {"inputs": {"a": "b"}},
      {"format_version": "two"},
      {"fingerprint": "x", "counts": {}, "files": []},
      {"fingerprint": "x", "counts": {}, "files": {"data.txt": 3}},
      {"fingerprint": "x", "counts": {}, "files": {"../../x": {"bytes": 1, "sha256": ""}}},
    )
  ],
)
def test_an_info_of_anything_is_one_sentence(text, tmp_path):
  folder = str(tmp_path / "A")
  make(folder)
  with open(f"{folder}/{INFO}", "wb") as file:
    file.write(text.encode(errors="surrogateescape"))
  for mark in (False, True):
    if mark and text.startswith("{") and "format_version" in text:  # as if it had been published
      publishing.write_info(folder, json.loads(text))
    with pytest.raises(ArtifactError) as caught:
      artifacts.read_info(folder, kind="things")
    assert "\n" not in str(caught.value)
    assert ownership.own_info(folder) is None or "files" in text or "fingerprint" not in text


def test_an_artifact_of_an_earlier_version_says_what_to_make_again(tmp_path):
  folder = str(tmp_path / "A")
  info = make(folder, kind="passages")
  publishing.write_info(folder, {**info, "format_version": artifacts.FORMAT_VERSION - 1})
  with pytest.raises(ArtifactError, match="earlier version.*make the passages again"):
    artifacts.read_info(folder)


# --------------------------------------------------------------------------------- every reader


def read_spans(folder: str) -> None:
  artifacts.read_info(folder, kind=rules.KIND)
  for path in passages.shard_paths(folder, rules.KIND):
    list(passages.read_shard(path, passages.Sentence))


READERS = {
  "passages": (passages.load, passages.load_tokenizer),
  "spans-knowledge": (holders.Holders.load, read_spans),
  "ict/snapshots/00000000": (snapshots.load_retriever, snapshots.load_tokenizer),
  "ict/indexes/00000000": (lambda folder: index.load(folder, searcher="exact"),),
  "warm/snapshots/00000000": (
    lambda folder: snapshots.load_model(folder, "reader"),
    snapshots.load_tokenizer,
  ),
}
UNREAD = {"rejected.jsonl"}


def refusals(folder: str, name: str) -> int:
  """Returns how many readers of an artifact refuse it; none may fail in another way."""
  refused = 0
  for read in READERS[name]:
    try:
      read(folder)
    except ArtifactError as error:
      assert "damaged" in str(error) and "\n" not in str(error)
      refused += 1
  return refused


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("change", [os.remove, cut, flip])
def test_readers_refuse_every_damaged_file(name, change, toy, tmp_path):
  folder = str(tmp_path / "copy")
  shutil.copytree(toy.path(name), folder)
  assert refusals(folder, name) == 0
  for file in artifacts.read_info(folder)["files"]:
    whole = open(os.path.join(folder, file), "rb").read()
    if not whole or (file in UNREAD and change is flip):
      continue
    change(os.path.join(folder, file))
    refused = refusals(folder, name)
    assert refused == len(READERS[name]) if change is not flip else refused >= 1, file
    with open(os.path.join(folder, file), "wb") as copy:
      copy.write(whole)
  assert refusals(folder, name) == 0


@pytest.mark.parametrize("change", [os.remove, cut, flip])
def test_jobs_publish_nothing_of_damaged_passages_and_make_them_again(change, tmp_path, toy):
  texts = [f"The mill of Anna Berg was built in {1800 + n}. It stands in Orla." for n in range(40)]
  with open(tmp_path / "a.jsonl", "w") as file:
    file.writelines(
      json.dumps({"title": f"Mill {n}", "text": t}) + "\n" for n, t in enumerate(texts)
    )
  folder = str(tmp_path / "P")

  def make_them() -> dict:
    return make_passages.run(
      str(tmp_path / "a.jsonl"), folder, vocab=toy.config().passages, passages_per_shard=10
    )

  whole = make_them()
  shard = passages.shard_paths(folder, passages.KIND)[2]
  change(shard)
  # not in its list: a file that an earlier job left there
  shutil.copy(passages.shard_paths(folder, passages.KIND)[0], f"{folder}/.partial-7-passages")
  for job in (
    lambda: annotate_spans.run(folder, str(tmp_path / "S")),
    lambda: embed_passages.embed(
      str(tmp_path / "I"),
      snapshot=toy.path("ict/snapshots/00000000"),
      passages_folder=folder,
      jit_compile=False,
    ),
  ):
    with pytest.raises(Exception, match=f"damaged: its file '{os.path.basename(shard)}'"):
      job()
  assert not (tmp_path / "S").exists() and not (tmp_path / "I").exists()
  assert make_them()["files"] == whole["files"]
  assert make_them()["created"] and len(passages.load(folder)) == whole["counts"]["passages"]


def test_a_foreign_record_file_is_not_read(toy, tmp_path):
  folder = str(tmp_path / "P")
  shutil.copytree(toy.config().passages, folder)
  shard = passages.shard_paths(folder, passages.KIND)[0]
  shutil.copy(shard, shard.replace("00000-of", "00001-of"))
  assert passages.shard_paths(folder, passages.KIND) == [shard]
  with pytest.raises(ArtifactError, match="not in its file list"):
    list(passages.read_shard(shard.replace("00000-of", "00001-of"), passages.Passage))


@pytest.mark.parametrize(
  "content", [b"", b"\x93NUMPY", b"no array", np.zeros(3, np.float32), np.zeros([2, 2])]
)
def test_embeddings_that_are_none_are_one_sentence(content, tmp_path):
  path = str(tmp_path / index.shard_name(0, 1))
  with open(path, "wb") as file:
    file.write(content) if isinstance(content, bytes) else np.save(file, content)
  with pytest.raises(ArtifactError, match="Delete it and embed the passages again"):
    index.read_shard(path)
