"""False checkpoints are refused in one sentence, before memory of their size is allocated."""

import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import time
import zipfile

import h5py
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from safetensors import numpy as safetensors

from benchmarks.attack.file_mutations import damaged_index
from realm_tf.checkpoints import (
  huggingface_files,
  keras_hub_presets,
  published,
  published_models,
  tensor_files,
  tensorflow_files,
)
from realm_tf.checkpoints.tensor_files import CheckpointError
from realm_tf.corpus.vocabularies import VocabularyError
from tests.processes import REPOSITORY

FIXTURES = pathlib.Path(REPOSITORY) / "testdata" / "transformers_realm"
PIECES = (FIXTURES / "bert" / "vocab.txt").read_text().split("\n")[:-1]


@pytest.fixture(autouse=True)
def at_once():
  """No test takes long: a file is refused before its tensors are made."""
  started = time.monotonic()
  yield
  assert time.monotonic() - started < 30  # on busy cores


def copy_of(name: str, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(FIXTURES / name, tmp_path / "copy"))


def load(folder: pathlib.Path, name: str):
  source = published.find(str(folder))
  if name == "bert":
    return published_models.load_masked_reader(source)
  if name == "embedder":
    return published_models.load_retriever((source, ""), (source, ""))
  return published_models.load_span_reader(source)


# ====================================================================================== safetensors


def packed(header, values: bytes) -> bytes:
  text = json.dumps(header).encode() if not isinstance(header, bytes) else header
  return struct.pack("<Q", len(text)) + text + values


def entry(start: int, end: int, shape=(2, 2), dtype="F32") -> dict:
  return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


LYING = {
  "dtype": packed({"a": entry(0, 16, dtype="F16")}, bytes(16)),
  "offsets": packed({"a": entry(16, 0)}, bytes(16)),
  "overlap": packed({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
  "gap": packed({"a": entry(0, 16), "b": entry(24, 40)}, bytes(40)),
  "rest": packed({"a": entry(0, 16)}, bytes(40)),
  "shape": packed({"a": entry(0, 16, shape=(1 << 62, 4))}, bytes(16)),
  "negative": packed({"a": entry(0, 16, shape=(-2, -2))}, bytes(16)),
  "deep": packed(b"[" * 100_000, b""),
  "unknown type": packed({"a": entry(0, 4, dtype="F8_E4M3")}, bytes(4)),
  "long": struct.pack("<Q", 1 << 62) + b"{}",
}


@pytest.mark.parametrize("data", LYING.values(), ids=LYING)
def test_safetensors_that_lie(data, tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(data)
  with pytest.raises(CheckpointError, match="Download it again|supported are F64"):
    huggingface_files.read_safetensors(str(path))


def test_written_as_the_library_reads_them(tmp_path):
  tensors = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.ones([5], np.float32),
    "empty": np.zeros([0, 3], np.float32),
  }
  given = {name: tensor_files.Tensor.of(array) for name, array in tensors.items()}
  huggingface_files.write_safetensors(str(tmp_path / "x.safetensors"), given)
  got = safetensors.load_file(tmp_path / "x.safetensors")
  assert set(got) == set(tensors) and os.listdir(tmp_path) == ["x.safetensors"]
  for name, array in tensors.items():
    np.testing.assert_array_equal(got[name], array, err_msg=name)


# ======================================================================= values that are not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300], ids=str)
@pytest.mark.parametrize("name", ["embedder", "bert"])
def test_values_that_are_not_finite(value, name, tmp_path):
  folder = copy_of(name, tmp_path)
  tensors = {
    key: tensor.read().astype(np.float64)
    for key, tensor in huggingface_files.open_huggingface(str(folder)).items()
  }
  for path in [*folder.glob("*.bin"), *folder.glob("*.safetensors")]:
    path.unlink()
  (key,) = (key for key in tensors if key.endswith("layer.1.output.dense.bias"))
  tensors[key][3] = value
  safetensors.save_file(tensors, folder / "model.safetensors")
  with pytest.raises(CheckpointError, match=f"{key} in .* holds values that are not finite"):
    load(folder, name)


def test_embeddings_that_are_not_finite_are_not_read_by_rows_either():
  rows = np.zeros([5, 2], np.float16)
  rows[4, 1] = np.inf
  tensor = tensor_files.Tensor.of(rows)
  with pytest.raises(CheckpointError, match="not finite"):
    list(tensor.blocks(2))


# ========================================================================================== PyTorch


def rewritten(path: pathlib.Path, change, method: int = zipfile.ZIP_STORED) -> None:
  """Rewrites a PyTorch file with another data.pkl."""
  old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
  with zipfile.ZipFile(path, "w", method) as archive:
    for info in old.infolist():
      part = old.read(info)
      archive.writestr(info.filename, change(part) if info.filename.endswith("data.pkl") else part)


PICKLES = {
  "memo index": b"\x80\x02]r\xff\xff\xff\xff.",
  "numpy": pickle.dumps({"a": np.zeros(3)}, 2),
  "large": b"\x80\x02}" + b"N0" * (5 << 20) + b".",
  "numbers": pickle.dumps({"a": 5}, 2),
  "list": pickle.dumps([1], 2),
}


@pytest.mark.parametrize("data", PICKLES.values(), ids=PICKLES)
def test_pickles_of_other_things(data, tmp_path):
  folder = copy_of("reader", tmp_path)
  rewritten(folder / "pytorch_model.bin", lambda part: data)
  with pytest.raises(CheckpointError):
    load(folder, "reader")


def test_a_packed_pickle_is_not_unpacked(tmp_path):
  folder = copy_of("reader", tmp_path)
  large = b"\x80\x02" + b"(" * (1 << 26)  # of 64 MB, in a few kilobytes
  rewritten(folder / "pytorch_model.bin", lambda part: large, zipfile.ZIP_DEFLATED)
  with pytest.raises(CheckpointError, match="data.pkl' is compressed"):
    load(folder, "reader")


def views(shapes: dict[str, tuple]) -> bytes:
  """Returns the pickle of tensors that are all in the first storage."""
  parts = [b"\x80\x02}("]
  for name, shape in shapes.items():
    stride = tuple(int(np.prod(shape[at + 1 :])) for at in range(len(shape)))
    storage = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\1tQ"
    parts += [
      b"X" + struct.pack("<I", len(name)) + name.encode(),
      b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage,
      b"K\0" + pickle.dumps(shape, 2)[2:-1] + pickle.dumps(stride, 2)[2:-1] + b"\x89NtR",
    ]
  return b"".join([*parts, b"u."])


def torch_folder(tmp_path, shapes: dict[str, tuple], num_bytes: int) -> pathlib.Path:
  folder = copy_of("bert", tmp_path)
  with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
    archive.writestr("x/data.pkl", views(shapes))
    archive.writestr("x/data/0", bytes(num_bytes))
  return folder


def bert_of(*, layers: int, hidden: int, words: int = 40) -> dict[str, tuple]:
  shapes = {
    "embeddings.word_embeddings.weight": (words, hidden),
    "embeddings.position_embeddings.weight": (48, hidden),
  }
  for layer in range(layers):
    shapes[f"encoder.layer.{layer}.intermediate.dense.weight"] = (hidden, hidden)
  return shapes


def test_what_the_hand_made_pickle_holds(tmp_path):
  folder = torch_folder(tmp_path, {"a": (2, 3), "b": (4,)}, 40)
  got = huggingface_files.open_huggingface(str(folder))
  assert {name: tensor.shape for name, tensor in got.items()} == {"a": (2, 3), "b": (4,)}
  assert not got["a"].read().any()


def test_a_tensor_beyond_its_storage(tmp_path):
  folder = torch_folder(tmp_path, {"a": (11,)}, 40)
  with pytest.raises(CheckpointError, match="the file is truncated"):
    huggingface_files.open_huggingface(str(folder))


def test_tensors_over_each_other(tmp_path):
  shapes = {f"t{number}": (100, 100) for number in range(30)}
  with pytest.raises(CheckpointError, match="they overlap"):
    huggingface_files.open_huggingface(str(torch_folder(tmp_path, shapes, 40_000)))


@pytest.mark.parametrize(
  "shapes, message",
  [
    (bert_of(layers=3000, hidden=1), "num_hidden_layers=3000; wanted a number from 1 to 100"),
    (bert_of(layers=1, hidden=0), "hidden_size=0"),
    ({"embeddings.word_embeddings.weight": (10**9, 0)}, "lacks|wanted"),
    (bert_of(layers=2, hidden=16) | {"embeddings.word_embeddings.weight": (5,)}, "wanted a matrix"),
  ],
  ids=["layers", "nothing wide", "many rows of nothing", "vector"],
)
def test_sizes_that_no_bert_has(shapes, message, tmp_path):
  folder = torch_folder(tmp_path, shapes, 4_000_000)
  (folder / "config.json").write_text('{"model_type": "bert"}')
  with pytest.raises(CheckpointError, match=message):
    load(folder, "bert")


def test_a_hidden_size_of_a_million(tmp_path):
  shapes = bert_of(layers=1, hidden=1) | {
    "embeddings.word_embeddings.weight": (1, 10**6),
    "embeddings.position_embeddings.weight": (8, 1),
  }
  folder = torch_folder(tmp_path, shapes, 8_000_000)
  (folder / "config.json").write_text('{"model_type": "bert"}')
  with pytest.raises(CheckpointError, match="hidden_size=1000000; wanted a number from 1 to 8192"):
    load(folder, "bert")


def test_a_large_bert_of_few_values(tmp_path):
  shapes = bert_of(layers=10, hidden=8000)
  shapes = {
    name: (1, 1) if "layer." in name and ".0." not in name else shape
    for name, shape in shapes.items()
  }
  shapes["encoder.layer.0.intermediate.dense.weight"] = (8000, 1)
  folder = torch_folder(tmp_path, shapes, 4_000_000)
  (folder / "config.json").write_text('{"model_type": "bert"}')
  with pytest.raises(CheckpointError, match="but holds only"):
    load(folder, "bert")


# =========================================================================================== config


@pytest.mark.parametrize(
  "name, values",
  [
    ("reader", {"max_span_width": 10_000}),
    ("reader", {"max_span_width": "10"}),
    ("reader", {"reader_seq_len": 10**9}),
    ("reader", {"reader_beam_size": 10**9}),
    ("reader", {"reader_layer_norm_eps": [1]}),
    ("reader", {"num_attention_heads": 0}),
    ("reader", {"num_attention_heads": 3}),
    ("reader", {"num_hidden_layers": 3000}),
    ("reader", {"num_hidden_layers": 3}),
    ("reader", {"hidden_size": 32}),
    ("reader", {"vocab_size": 10**12}),
    ("reader", {"hidden_act": ["gelu"]}),
    ("reader", {"hidden_act": "\x1b[31m" + "x" * 10_000}),
    ("embedder", {"hidden_dropout_prob": 1.5}),
    ("embedder", {"layer_norm_eps": True}),
    ("embedder", {"intermediate_size": 31}),
  ],
  ids=str,
)
def test_configs_that_lie(name, values, tmp_path):
  folder = copy_of(name, tmp_path)
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | values))
  with pytest.raises((CheckpointError, VocabularyError)) as caught:
    load(folder, name)
  assert len(str(caught.value)) < 500 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
  "text",
  ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, '{"a": ' + "9" * 5000 + "}", "[]", "\xff"],
  ids=["deep", "nested", "digits", "list", "bytes"],
)
def test_a_config_that_is_none(text, tmp_path):
  folder = copy_of("bert", tmp_path)
  (folder / "config.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(CheckpointError, match="is not a JSON object"):
    load(folder, "bert")


def test_an_index_of_weights_names_files_beside_it(tmp_path):
  folder = copy_of("embedder", tmp_path)
  told = {"weight_map": {"a": f"../../{FIXTURES.name}/embedder/model.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(told))
  with pytest.raises(CheckpointError, match="does not name the files beside it"):
    load(folder, "embedder")


# ======================================================================================= TensorFlow


def tensorflow_checkpoint(folder: pathlib.Path) -> pathlib.Path:
  values = {"a/kernel": np.eye(3, dtype=np.float32), "b": np.arange(4, dtype=np.float32)}
  tf.raw_ops.SaveV2(
    prefix=str(folder / "model.ckpt"),
    tensor_names=list(values),
    shape_and_slices=["", ""],
    tensors=list(values.values()),
  )
  return folder / "model.ckpt.index"


def test_an_index_that_would_end_the_process(tmp_path):
  """A dimension is negative although the checksum is right; TensorFlow would abort."""
  index = tensorflow_checkpoint(tmp_path)
  got = tensorflow_files.open_tensorflow(str(tmp_path / "model.ckpt"))
  np.testing.assert_array_equal(got["a/kernel"].read(), np.eye(3))
  np.testing.assert_array_equal(got["b"].read(), np.arange(4))

  class Chosen:
    """Random draws that set the first dimension's byte, and the following ones, to 0xff."""

    def __init__(self, place: int):
      self.place = place

    def choice(self, options):
      return 1 if len(options) == 4 else 0xFF

    def randrange(self, end: int) -> int:
      return min(self.place, end - 1)

  data, refused = index.read_bytes(), 0
  for place in range(80):
    index.write_bytes(damaged_index(data, Chosen(place)))
    try:
      tensorflow_files.open_tensorflow(str(tmp_path / "model.ckpt"))
    except CheckpointError:
      refused += 1
  assert refused > 20


def test_a_checkpoint_whose_values_are_cut_short(tmp_path):
  tensorflow_checkpoint(tmp_path)
  path = tmp_path / "model.ckpt.data-00000-of-00001"
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(CheckpointError, match="truncated"):
    tensorflow_files.open_tensorflow(str(tmp_path / "model.ckpt"))


# ========================================================================================= KerasHub


@pytest.fixture
def preset(tmp_path) -> pathlib.Path:
  folder = tmp_path / "preset"
  keras_hub.models.BertBackbone(
    vocabulary_size=len(PIECES),
    num_layers=1,
    num_heads=2,
    hidden_dim=8,
    intermediate_dim=8,
    max_sequence_length=16,
  ).save_to_preset(str(folder))
  keras_hub.models.BertTokenizer(vocabulary=PIECES, lowercase=True).save_to_preset(str(folder))
  return folder


def test_a_preset_imports_nothing(preset, tmp_path, monkeypatch):
  (tmp_path / "evil_module_of_a_preset.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
  monkeypatch.syspath_prepend(tmp_path)
  told = json.loads((preset / "tokenizer.json").read_text())
  told |= {"module": "evil_module_of_a_preset", "class_name": "X", "registered_name": "X"}
  (preset / "tokenizer.json").write_text(json.dumps(told))
  with pytest.raises(CheckpointError, match="is not a config of KerasHub's BertTokenizer"):
    published.find(str(preset))
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
  "values", [{"hidden_dim": 8000}, {"num_layers": 3000}, {"num_heads": 3}, {"hidden_dim": "8"}]
)
def test_a_preset_that_lies(values, preset):
  told = json.loads((preset / "config.json").read_text())
  told["config"] |= values
  (preset / "config.json").write_text(json.dumps(told))
  with pytest.raises(CheckpointError):
    keras_hub_presets.read(str(preset))


@pytest.mark.parametrize("name", [{"a": 1}, ["keras_hub>BertTokenizer"], 1, None])
def test_a_preset_whose_class_is_no_name(name, preset):
  told = json.loads((preset / "tokenizer.json").read_text())
  (preset / "tokenizer.json").write_text(json.dumps(told | {"registered_name": name}))
  with pytest.raises(CheckpointError, match="is not a config of KerasHub's BertTokenizer"):
    keras_hub_presets.read(str(preset))


@pytest.mark.parametrize("value", ["true", 1, None, {}])
def test_a_preset_that_does_not_say_whether_it_is_uncased(value, preset):
  told = json.loads((preset / "tokenizer.json").read_text())
  told["config"]["lowercase"] = value
  (preset / "tokenizer.json").write_text(json.dumps(told))
  with pytest.raises(CheckpointError, match="'lowercase' that is not true or false"):
    keras_hub_presets.read(str(preset))


@pytest.mark.parametrize("how", ["link", "packed", "unwritten"])
def test_weights_of_a_preset_are_plain_arrays(how, preset, tmp_path):
  with h5py.File(preset / "model.weights.h5", "a") as file:
    if how == "link":
      file["other"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/")
    elif how == "packed":
      file.create_dataset("other", data=np.zeros(10**6, np.float32), compression="gzip")
    else:
      file.create_dataset("other", shape=(10**9,), dtype=np.float32, chunks=(1000,))
  with pytest.raises(CheckpointError, match="link to elsewhere|plain arrays|fewer values"):
    keras_hub_presets.read(str(preset))
