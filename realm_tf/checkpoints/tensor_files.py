"""Tensors of published checkpoints by name, read a few rows at a time.

`huggingface_files`, `pytorch_files` and `tensorflow_files` open safetensors, PyTorch and TensorFlow
files.

Opening a file never runs code from it: a PyTorch file is a pickle, which `pickles` reads as data.
The sizes that a file declares are checked against its bytes before they are used.
"""

import dataclasses
import math
import struct
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import tensorflow as tf

from realm_tf.storage import artifacts
from realm_tf.storage.artifacts import gfile

# by their names in safetensors
DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
SHOWN_CHARS = 200  # of another program's message
# what Python's own readers raise on damaged bytes
DAMAGED = (
  ValueError,
  TypeError,
  LookupError,
  OverflowError,
  MemoryError,
  OSError,
  struct.error,
  tf.errors.OpError,
)


class CheckpointError(artifacts.UserError):
  """Raised for a checkpoint that cannot be read, or lacks what is needed."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file.

  Attributes:
    shape: shape of the whole tensor.
    path: path of its file, for messages.
    rows: (start, stop) -> rows [start, stop) as stored.
    name: name in that file, for messages.
  """

  shape: tuple[int, ...]
  path: str
  rows: Callable[[int, int], np.ndarray]
  name: str = ""

  def read(self) -> np.ndarray:
    """Reads the whole tensor in float32.

    Raises:
      CheckpointError: if a value is not finite, or the file is damaged.
    """
    return self._checked(0, self.shape[0])

  def blocks(self, num_rows: int) -> Iterator[np.ndarray]:
    """Reads the tensor in float32, `num_rows` rows at a time.

    Raises:
      CheckpointError: see `read`.
    """
    for start in range(0, self.shape[0], num_rows):
      yield self._checked(start, min(start + num_rows, self.shape[0]))

  def _checked(self, start: int, stop: int) -> np.ndarray:
    what = f"{self.name or 'a tensor'} in {self.path!r}"
    try:
      with np.errstate(over="ignore"):  # an overflow becomes infinite, which is rejected below
        values = np.asarray(self.rows(start, stop), np.float32)
    except (safetensors.SafetensorError, *DAMAGED) as error:
      raise CheckpointError(
        f"{what} cannot be read ({str(error)[:SHOWN_CHARS]}). Download it again."
      ) from error
    if not np.isfinite(values).all():
      raise CheckpointError(f"{what} holds values that are not finite numbers in float32.")
    return values

  @classmethod
  def of(cls, array: np.ndarray) -> "Tensor":
    """Wraps an array as if it were read from a file."""
    return cls(array.shape, "", lambda start, stop: array[start:stop])

  @property
  def transposed(self) -> "Tensor":
    return dataclasses.replace(
      self,
      shape=self.shape[::-1],
      rows=lambda start, stop: self.rows(0, self.shape[0]).T[start:stop],
    )


Tensors = Mapping[str, Tensor]


def stored(
  path: str, offset: int, shape: tuple[int, ...], dtype, *, file_bytes: int, name: str
) -> Tensor:
  """Returns a tensor whose values are in a file in C order, from a byte offset."""
  dtype = np.dtype(dtype)
  row_bytes = math.prod(shape[1:]) * dtype.itemsize
  wanted = offset + math.prod(shape) * dtype.itemsize
  if wanted > file_bytes:
    raise CheckpointError(
      f"{path!r} ends at byte {file_bytes}, but its last tensor ends at {wanted}: the file is "
      "truncated. Download it again."
    )

  def rows(start: int, stop: int) -> np.ndarray:
    with gfile.GFile(path, "rb") as file:
      file.seek(offset + start * row_bytes)
      return np.frombuffer(file.read((stop - start) * row_bytes), dtype).reshape(
        stop - start, *shape[1:]
      )

  return Tensor(shape, path, rows, name)
