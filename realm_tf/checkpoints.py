"""Other people's checkpoints as tensors by name: safetensors, PyTorch's and TensorFlow's files, read a few rows at a time.

Opening a file runs nothing that it holds: a PyTorch file is a pickle, and its unpickler here knows tensors and nothing else.
"""

import collections
import dataclasses
import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np
import tensorflow as tf

from realm_tf import artifacts, paths
from realm_tf.artifacts import gfile

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
           "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}  # as safetensors call them
_STORAGES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
             "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL"}
_ROWS_AT_ONCE = 10_000


class CheckpointError(artifacts.UserError):
  """A checkpoint that cannot be read, or does not hold what was looked for."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file.

  Attributes:
    shape: of the whole.
    path: of its file, for messages.
    rows: (start, stop) -> rows [start, stop) as they are stored.
  """

  shape: tuple[int, ...]
  path: str
  rows: Callable[[int, int], np.ndarray]

  def read(self) -> np.ndarray:
    """All of it, in float32."""
    return np.asarray(self.rows(0, self.shape[0]), np.float32)

  def blocks(self, num_rows: int) -> Iterator[np.ndarray]:
    """All of it in float32, so many rows at a time."""
    for start in range(0, self.shape[0], num_rows):
      yield np.asarray(self.rows(start, min(start + num_rows, self.shape[0])), np.float32)

  @classmethod
  def of(cls, array: np.ndarray) -> "Tensor":
    """An array as it would be read from a file."""
    return cls(array.shape, "", lambda start, stop: array[start:stop])

  @property
  def transposed(self) -> "Tensor":
    return Tensor(self.shape[::-1], self.path, lambda start, stop: self.rows(0, self.shape[0]).T[start:stop])


Tensors = Mapping[str, Tensor]


def _stored(path: str, offset: int, shape: tuple[int, ...], dtype, *, file_bytes: int) -> Tensor:
  """A tensor whose values lie in a file in C order, from a byte offset."""
  dtype = np.dtype(dtype)
  row_bytes = math.prod(shape[1:]) * dtype.itemsize
  wanted = offset + math.prod(shape) * dtype.itemsize
  if wanted > file_bytes:
    raise CheckpointError(f"{path!r} ends at byte {file_bytes}, its last tensor at {wanted}: it is cut short. Download it again.")

  def rows(start: int, stop: int) -> np.ndarray:
    with gfile.GFile(path, "rb") as file:
      file.seek(offset + start * row_bytes)
      return np.frombuffer(file.read((stop - start) * row_bytes), dtype).reshape(stop - start, *shape[1:])

  return Tensor(shape, path, rows)


# ======================================================================================================== Hugging Face


def open_huggingface(folder: str) -> Tensors:
  """The tensors of a Hugging Face folder: model.safetensors or pytorch_model.bin, whole or in several files.

  Raises:
    CheckpointError: neither is there, or a file is damaged or holds more than tensors.
  """
  for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pytorch)):
    path = os.path.join(folder, name)
    if gfile.exists(f"{path}.index.json"):
      files = sorted(set(json.loads(artifacts.read_text(f"{path}.index.json"))["weight_map"].values()))
      return {key: tensor for file in files for key, tensor in read(os.path.join(folder, file)).items()}
    if gfile.exists(path):
      return read(path)
  raise CheckpointError(f"{folder!r} has a config.json and neither model.safetensors nor pytorch_model.bin: the weights are missing.")


def read_safetensors(path: str) -> Tensors:
  """The tensors of a safetensors file: a length, a JSON header with byte ranges, the values."""
  size = gfile.stat(path).length
  with gfile.GFile(path, "rb") as file:
    try:
      header_bytes, = struct.unpack("<Q", file.read(8))
      header = json.loads(file.read(min(header_bytes, size)))
      entries = {name: (8 + header_bytes + entry["data_offsets"][0], tuple(entry["shape"]), _DTYPES[entry["dtype"]])
                 for name, entry in header.items() if name != "__metadata__"}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
      raise CheckpointError(f"{path!r} does not begin like a safetensors file ({error!r}). Download it again.") from error
  return {name: _stored(path, offset, shape, dtype, file_bytes=size) for name, (offset, shape, dtype) in entries.items()}


def write_safetensors(path: str, tensors: Tensors) -> None:
  """Writes tensors in float32, a few rows at a time, and the file whole: under a temporary name, then renamed."""
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, tensor in tensors.items():
    start, end = end, end + 4 * math.prod(tensor.shape)
    header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # values begin at a multiple of eight bytes
  partial = f"{path}.partial-{os.getpid()}"
  with gfile.GFile(partial, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
      for block in tensor.blocks(_ROWS_AT_ONCE):
        file.write(np.ascontiguousarray(block).tobytes())
  gfile.rename(partial, path, overwrite=True)


@dataclasses.dataclass(frozen=True)
class _Storage:
  """A storage of a PyTorch file: the name of the file's part that holds it, and its dtype as safetensors call it."""

  key: str
  dtype: str


@dataclasses.dataclass(frozen=True)
class _View:
  """What a tensor is in a PyTorch file."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  stride: tuple[int, ...]

  @property
  def is_contiguous(self) -> bool:
    wanted = [math.prod(self.shape[at + 1:]) for at in range(len(self.shape))]
    return all(size == 1 or got == want for size, got, want in zip(self.shape, self.stride, wanted))


class Unpickler(pickle.Unpickler):
  """Opens a pickle that calls nothing but what it is allowed to.

  Args:
    file: the pickle.
    allowed: (module, name) -> what stands for it.
    path: for messages.
    needs: what such a file needs at most, for messages.

  Raises:
    CheckpointError: while it loads: the pickle wants to call something else.
  """

  def __init__(self, file, allowed: Mapping[tuple[str, str], object], *, path: str, needs: str):
    super().__init__(file)
    self._allowed, self._path, self._needs = allowed, path, needs

  def find_class(self, module: str, name: str):
    if (module, name) not in self._allowed:
      raise CheckpointError(f"{self._path!r} wants to call {module}.{name}; such a file needs no more than {self._needs}. It was not "
                            "opened: do not load it with anything else either.")
    return self._allowed[module, name]


_WEIGHTS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"):
        lambda storage, offset, shape, stride, *_: _View(storage, offset, tuple(shape), tuple(stride)),
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()}}


class _WeightsUnpickler(Unpickler):
  """Makes dicts of `_View`s."""

  def persistent_load(self, saved_id):
    _, dtype, key, *_ = saved_id
    return _Storage(key, dtype)


def read_pytorch(path: str) -> Tensors:
  """The tensors of a file that torch.save wrote (PyTorch 1.6 or later: a zip archive); needs no PyTorch.

  Raises:
    CheckpointError: another format, damaged, or it holds more than contiguous tensors.
  """
  size, found = gfile.stat(path).length, {}
  with gfile.GFile(path, "rb") as file:
    try:
      archive = zipfile.ZipFile(file)
      parts = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
      with archive.open(parts["data.pkl"]) as pickled:
        views = dict(_WeightsUnpickler(pickled, _WEIGHTS, path=path, needs="tensors").load())
    except CheckpointError:
      raise
    except (zipfile.BadZipFile, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError, tf.errors.OpError) as error:
      raise CheckpointError(f"{path!r} is not a file of weights as PyTorch 1.6 and later write it ({error}). Open it with PyTorch and "
                            "save it as safetensors.") from error
    for name, view in views.items():
      if not isinstance(view, _View) or not isinstance(view.storage, _Storage) or not view.is_contiguous:
        raise CheckpointError(f"{name!r} in {path!r} is no contiguous tensor. Save it as safetensors.")
      info, dtype = parts[f"data/{view.storage.key}"], np.dtype(_DTYPES[view.storage.dtype])
      if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path!r} is compressed; PyTorch does not do that. Save it as safetensors.")
      file.seek(info.header_offset + 26)  # past the local header: its name and extra field have their own lengths
      name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
      offset = info.header_offset + 30 + name_bytes + extra_bytes + view.offset * dtype.itemsize
      found[name] = _stored(path, offset, view.shape, dtype, file_bytes=size)
  return found


# ========================================================================================================== TensorFlow


def open_tensorflow(prefix: str) -> Tensors:
  """The variables of a TensorFlow checkpoint, TF1's included; a checkpoint of one big variable is read a few rows at a time.

  Args:
    prefix: path of the checkpoint without ".index".

  Raises:
    CheckpointError: not a checkpoint, or damaged.
  """
  try:
    reader = tf.train.load_checkpoint(paths.literal(prefix))
  except (tf.errors.OpError, ValueError) as error:
    raise CheckpointError(f"{prefix!r} is no TensorFlow checkpoint: {error}") from error
  shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
  data = f"{prefix}.data-00000-of-00001"
  if len(shapes) == 1 and gfile.exists(data):
    (name, shape), = shapes.items()
    size, dtype = gfile.stat(data).length, dtypes[name].as_numpy_dtype
    if size == math.prod(shape) * np.dtype(dtype).itemsize:  # its values and nothing else
      return {name: _stored(data, 0, tuple(shape), dtype, file_bytes=size)}
  return {name: Tensor(tuple(shape), prefix, lambda start, stop, name=name: reader.get_tensor(name)[start:stop])
          for name, shape in shapes.items()}


_OF_OPTIMIZERS = re.compile(r"(.*/)?(adam_[mv]|global_step|beta[12]_power|Adam(WeightDecayOptimizer)?(_1)?)")
KERAS_NORM = "layer_normalization"  # as Keras names it, whose epsilon is 1e-3; BERT's own, LayerNorm, has 1e-12
_RENAMED = (  # TF1's names -> Hugging Face's
    (r"^(module/)*", ""), (r"^reader/(module/)*", "reader/"),
    (r"^(reader/)?bert/", r"\1realm/"), (r"^(reader/)?(dense|LayerNorm)/", r"\1cls/\2/"),
    (rf"^{KERAS_NORM}/", f"cls/{KERAS_NORM}/"),  # of a projection, in ORQA's modules
    (r"^reader/cls/dense/", "reader/qa_outputs/dense_intermediate/"), (r"^reader/dense_1/", "reader/qa_outputs/dense_output/"),
    (r"^reader/layer_normalization/", "reader/qa_outputs/layer_normalization/"),
    (r"layer_(\d+)", r"layer/\1"), (r"_embeddings$", "_embeddings/weight"), (r"(kernel|gamma)$", "weight"), (r"(output_bias|beta)$", "bias"))


def with_huggingface_names(variables: Tensors) -> Tensors:
  """TF1 variables of BERT and REALM, as Hub modules and ORQA's model directories name them, under Hugging Face's names.

  Optimizers' variables are left out, kernels are transposed.
  """
  renamed = {}
  for name, tensor in variables.items():
    if not _OF_OPTIMIZERS.fullmatch(name):
      theirs = name
      for pattern, replacement in _RENAMED:
        theirs = re.sub(pattern, replacement, theirs)
      renamed[theirs.replace("/", ".")] = tensor.transposed if name.endswith("/kernel") else tensor
  return renamed
