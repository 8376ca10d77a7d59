"""Opens the tensors of PyTorch files: zip archives of a pickle, read as data, and of values."""

import dataclasses
import io
import math
import struct
import zipfile

import numpy as np

from realm_tf.checkpoints import pickles
from realm_tf.checkpoints.tensor_files import (
  DAMAGED,
  DTYPES,
  SHOWN_CHARS,
  CheckpointError,
  Tensor,
  Tensors,
  stored,
)
from realm_tf.storage.artifacts import gfile

_STORAGES = {
  "DoubleStorage": "F64",
  "FloatStorage": "F32",
  "HalfStorage": "F16",
  "BFloat16Storage": "BF16",
  "LongStorage": "I64",
  "IntStorage": "I32",
  "ShortStorage": "I16",
  "CharStorage": "I8",
  "ByteStorage": "U8",
  "BoolStorage": "BOOL",
}
_MAX_DIMS = 8
_MAX_SIZE = 1 << 48
_MAX_PICKLE_BYTES = 4 << 20  # a thousand tensors take a quarter of a megabyte
_MOST_SHARED = 2  # how many of a file's tensors may share a value


@dataclasses.dataclass(frozen=True)
class _Storage:
  """A storage of a PyTorch file.

  Attributes:
    key: name of the file's part that holds it.
    dtype: name of the type in safetensors.
  """

  key: str
  dtype: str


@dataclasses.dataclass(frozen=True)
class _View:
  """A tensor of a PyTorch file: a part of a storage, in C order."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]


def _storage(saved_id: tuple) -> _Storage:
  _, dtype, key, *_ = saved_id
  if not isinstance(key, str) or dtype not in DTYPES:
    raise ValueError("a tensor has no storage of numbers")
  return _Storage(key, dtype)


def _rebuild_tensor(storage, offset, shape, stride, *_) -> _View:
  sizes = [offset, *shape, *stride]
  if not isinstance(storage, _Storage) or len(shape) != len(stride) or len(shape) > _MAX_DIMS:
    raise ValueError("a tensor has no storage, or not a stride for each dimension")
  if not all(type(size) is int and 0 <= size < _MAX_SIZE for size in sizes):
    raise ValueError("a tensor's sizes are not valid counts")
  wanted = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
  if not all(
    size == 1 or got == step for size, got, step in zip(shape, stride, wanted, strict=True)
  ):
    raise ValueError("a tensor is not contiguous")
  return _View(storage, offset, tuple(shape))


def _rebuild_parameter(data, *_):
  return data


_WEIGHTS = {
  ("collections", "OrderedDict"): pickles.ordered_dict,
  ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
  ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
  **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


def read_pytorch(path: str) -> Tensors:
  """Opens the tensors of a file that torch.save wrote, without PyTorch.

  Supports the zip archives that PyTorch 1.6 and later write.

  Raises:
    CheckpointError: if the file has another format, is damaged, or holds more than contiguous
      tensors.
  """
  size, found = gfile.stat(path).length, {}
  with gfile.GFile(path, "rb") as file:
    try:
      archive = zipfile.ZipFile(_ReadsAreSmall(file))
      parts = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
      offsets = {name: _offset_of(file, info) for name, info in parts.items()}
      file.seek(offsets["data.pkl"])
      pickled = io.BytesIO(file.read(min(parts["data.pkl"].file_size, _MAX_PICKLE_BYTES)))
      views = pickles.load(pickled, _WEIGHTS, path=path, needs="tensors", persistent=_storage)
      if not isinstance(views, dict):
        raise ValueError("its pickle is not a dict")
      for name, view in views.items():
        if not isinstance(view, _View):
          raise ValueError(f"{name[:80]!r} is not a tensor")
        dtype = np.dtype(DTYPES[view.storage.dtype])
        start = offsets[part := f"data/{view.storage.key}"]
        offset = start + view.offset * dtype.itemsize
        end = min(size, start + parts[part].file_size)  # other parts follow
        found[name] = stored(path, offset, view.shape, dtype, file_bytes=end, name=name)
    except pickles.PickleError as error:
      raise CheckpointError(f"{error} Save the weights as safetensors.") from error
    except CheckpointError:
      raise
    except (*DAMAGED, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
      raise CheckpointError(
        f"{path!r} is not a weights file of PyTorch 1.6 or later "
        f"({str(error)[:SHOWN_CHARS]}). "
        "Open it with PyTorch and save it as safetensors."
      ) from error
  return _not_larger_than_file(found, path, file_bytes=size)


class _ReadsAreSmall(io.RawIOBase):
  """A file for `zipfile` that limits each read; `zipfile` reads a list of parts in one call."""

  def __init__(self, file):
    self._file = file

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = 0) -> int:
    self._file.seek(offset, whence)
    return self._file.tell()

  def tell(self) -> int:
    return self._file.tell()

  def read(self, size: int = -1) -> bytes:
    if not 0 <= size <= _MAX_PICKLE_BYTES:
      size = _MAX_PICKLE_BYTES
    return self._file.read(size)


def _offset_of(file, info: zipfile.ZipInfo) -> int:
  """Returns where the bytes of a part begin: after its local header, which has its own lengths."""
  if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
    raise ValueError(f"its part {info.filename[:80]!r} is compressed; PyTorch does not do that")
  file.seek(info.header_offset + 26)
  name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
  return info.header_offset + 30 + name_bytes + extra_bytes


def _not_larger_than_file(tensors: dict[str, Tensor], path: str, *, file_bytes: int) -> Tensors:
  """Rejects tensors that overlap, except weights that two layers share.

  Raises:
    CheckpointError: if the tensors together are larger than the file.
  """
  total = sum(math.prod(tensor.shape) for tensor in tensors.values())
  if total > _MOST_SHARED * file_bytes:
    raise CheckpointError(
      f"{path!r} has {file_bytes:,} bytes, but its {len(tensors):,} tensors have {total:,} values: "
      "they overlap. Save the weights as safetensors."
    )
  return tensors
