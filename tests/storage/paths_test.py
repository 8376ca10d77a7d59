"""paths.py: existing paths are not patterns, and one path can be written in many ways."""

import os

import pytest
import tensorflow as tf

from realm_tf.storage import paths


@pytest.fixture
def files(tmp_path, monkeypatch):
  """Files whose names look like patterns and lists."""
  for name in (
    "a[1].txt",
    "a1.txt",
    "what?.txt",
    "b,c.txt",
    "my [v2] run, final?*/x.txt",
    "my [v2] run, final?*/y.txt",
    "d/x.txt",
  ):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def found(text: str) -> list[list[str]]:
  return [paths.matching(part) for part in paths.split(text)]


@pytest.mark.parametrize(
  "text, wanted",
  [
    ("a[1].txt", [["a[1].txt"]]),
    ("a?.txt", [["a1.txt"]]),
    ("what?.txt", [["what?.txt"]]),
    ("b,c.txt", [["b,c.txt"]]),
    ("b,c.txt,a1.txt", [["b,c.txt"], ["a1.txt"]]),
    ("a1.txt,b,c.txt,", [["a1.txt"], ["b,c.txt"]]),
    ("my [v2] run, final?*", [["my [v2] run, final?*"]]),
    ("my [v2] run, final?*/*.txt", [["my [v2] run, final?*/x.txt", "my [v2] run, final?*/y.txt"]]),
    ("*/x.txt,d", [["d/x.txt", "my [v2] run, final?*/x.txt"], ["d"]]),
    ("file://d/x.txt,a1.txt", [["d/x.txt"], ["a1.txt"]]),
    ("nowhere,a1.txt", [[], ["a1.txt"]]),
    ("nowhere/*", [[]]),
    ("", []),
  ],
)
def test_commas_and_patterns(files, text, wanted):
  assert found(text) == wanted, text


def test_listed(files):
  folder = "my [v2] run, final?*"
  assert paths.listed(folder, r"x\..*") == [f"{folder}/x.txt"]
  assert paths.listed("nowhere", ".*") == paths.listed("a1.txt", ".*") == []


def test_one_place_written_in_many_ways(files):
  os.symlink(files / "d", files / "link")
  for one in ("d", "d/", "./d", "d/../d", "link", "link/", str(files / "d"), f"file://{files}/d"):
    assert paths.resolve(one) == str(files / "d"), one
    assert paths.holds("link", os.path.join(one, "x.txt")) and not paths.holds(
      os.path.join(one, "x.txt"), "d"
    ), one
  assert not paths.holds("d", "d2") and paths.holds("/", "d")
  assert paths.resolve("gs://b/x/../y/") == "gs://b/y" and paths.resolve("gs://b") == "gs://b"
  assert paths.holds("gs://b/x", "gs://b/x/y") and not paths.holds("gs://b/x", "gs://b/xy")
  assert not paths.holds("gs://b", "gs://c/x")


def test_relative():
  assert paths.relative("/a/passages", "/a/realm/indexes/3") == "../../../passages"
  assert paths.relative("gs://b/a/passages", "gs://b/a/spans") == "../passages"
  assert paths.relative("gs://b/x", "gs://c/x") is None and paths.relative("/x", "gs://c/x") is None


def test_saved_models_load_from_such_folders(files):
  folder = str(files / "my [v2] run, final?*" / "model")
  model = tf.Module()
  model.weight = tf.Variable([1.0, 2.0])
  tf.saved_model.save(model, folder)
  loaded = tf.saved_model.load(paths.literal(folder))
  assert loaded.weight.numpy().tolist() == [1.0, 2.0]
  reader = tf.train.load_checkpoint(paths.literal(f"{folder}/variables/variables"))
  assert "weight/.ATTRIBUTES/VARIABLE_VALUE" in reader.get_variable_to_shape_map()
  assert paths.literal("d/x.txt") == "d/x.txt"
