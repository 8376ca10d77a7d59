"""Writes the text of a released corpus, block_records.npy, as a TFRecord file.

    python -m realm_tf.block_records --input=block_records.npy --output=blocks.tfr

block_records.npy is a pickle, which NumPy would execute. Here `realm_tf.checkpoints.pickles` reads
it as data, with stand-ins for NumPy's array and type: nothing that it names is called, and no NumPy
array is made. `import_checkpoint` runs this in a separate process with limited memory: a passage
takes its bytes and about a hundred more.
"""

import io
import resource
import tokenize
from collections.abc import Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("input", None, "A block_records.npy.", required=True)
  flags.DEFINE_string(
    "output", None, "The TFRecord file to write, with one passage per record.", required=True
  )
  cli.start("realm_tf.block_records")

import numpy as np
import tensorflow as tf

from realm_tf.checkpoints import pickles
from realm_tf.checkpoints.tensor_files import CheckpointError
from realm_tf.storage import artifacts

# exceptions that NumPy raises for a damaged header, which it parses as Python source
_DAMAGED = (
  ValueError,
  TypeError,
  LookupError,
  AttributeError,
  EOFError,
  OverflowError,
  RecursionError,
  MemoryError,
  SyntaxError,
  tokenize.TokenError,
)
_SHOWN_CHARS = 200
_NEEDS = "NumPy arrays and bytes"
_MAX_LINE_BYTES = 1 << 12  # names in a pickle are lines
# In addition to the file: Python and TensorFlow with their libraries take 6 GB of addresses.
_FREE_BYTES, _BYTES_FOR_A_BYTE = 16 << 30, 30


class _Array(pickles.StandIn):
  """Stand-in for an array of objects.

  Attributes:
    shape, values: from the array's state, unchecked.
  """

  shape: object = None
  values: object = None

  def set_state(self, state) -> None:
    _version, self.shape, _dtype, _is_fortran, self.values = state


class _Dtype(pickles.StandIn):
  """Stand-in for a dtype; only objects are read here."""


def _new_array(*_) -> _Array:
  return _Array()


def _new_dtype(*_) -> _Dtype:
  return _Dtype()


_ALLOWED = {
  ("numpy.core.multiarray", "_reconstruct"): _new_array,
  ("numpy._core.multiarray", "_reconstruct"): _new_array,
  ("numpy", "ndarray"): "array",
  ("numpy", "dtype"): _new_dtype,
}


def read(path: str) -> list[bytes]:
  """Reads the passages of a block_records.npy, [N] bytes objects in UTF-8.

  Raises:
    CheckpointError: the file is not an array of bytes, or holds anything else.
  """
  with artifacts.gfile.GFile(path, "rb") as file:
    reader = _Reader(file, artifacts.gfile.stat(path).length)
    try:
      version = np.lib.format.read_magic(reader)
      read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
      )
      shape, _, dtype = read_header(reader)
      found = (
        pickles.load(reader, _ALLOWED, path=path, needs=_NEEDS)
        if dtype == np.dtype(object)
        else None
      )
    except pickles.PickleError as error:
      raise CheckpointError(_words(path, error)) from error
    except _DAMAGED as error:
      raise CheckpointError(
        f"{path!r} is not an array of passages as written by numpy.save: "
        f"{str(error)[:_SHOWN_CHARS]}"
      ) from error
  values = found.values if isinstance(found, _Array) and found.shape == shape else None
  if not isinstance(values, list) or shape != (len(values),):
    raise CheckpointError(
      f"{path!r} holds {type(found).__name__.strip('_')} of "
      f"{str(dtype)[:_SHOWN_CHARS]} {str(shape)[:_SHOWN_CHARS]}; "
      "wanted an array of bytes objects, [N]."
    )
  for number, record in enumerate(values):
    if not isinstance(record, bytes):
      raise CheckpointError(
        f"record {number} of {path!r} is {type(record).__name__}; wanted bytes."
      )
  return values


def _words(path: str, error: pickles.PickleError) -> str:
  """Describes the error of a damaged pickle; a pickle with other content has its own message."""
  told = str(error)
  return told if _NEEDS in told else f"{path!r} is not an array of passages: {told}"


class _Reader:
  """Wraps a `tf.io.gfile` file for pickle and NumPy; never reads more than is left."""

  def __init__(self, file, num_bytes: int):
    self._file = io.BufferedReader(_Raw(file), 1 << 20)
    self._left = num_bytes

  def read(self, size: int = -1) -> bytes:
    data = self._file.read(min(size, self._left) if size >= 0 else self._left)
    self._left -= len(data)
    return data

  def readline(self, size: int | None = -1) -> bytes:
    data = self._file.readline(_MAX_LINE_BYTES)
    self._left -= len(data)
    return data


class _Raw(io.RawIOBase):
  """Wraps a `tf.io.gfile` file for Python's buffered reader."""

  def __init__(self, file):
    self._file = file

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    data = self._file.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


def limit_memory(num_bytes: int) -> None:
  """Limits the memory of this process according to the size of the file that it reads."""
  wanted = _FREE_BYTES + _BYTES_FOR_A_BYTE * num_bytes
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  if hard == resource.RLIM_INFINITY or hard > wanted:
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def main(argv: Sequence[str]) -> None:
  del argv
  limit_memory(artifacts.gfile.stat(flags.FLAGS.input).length)
  records = read(flags.FLAGS.input)
  with tf.io.TFRecordWriter(flags.FLAGS.output) as writer:
    for record in records:
      writer.write(record)
