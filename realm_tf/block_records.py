"""The text of a released corpus: block_records.npy, which is a pickle, written out as a TFRecord file.

    python -m realm_tf.block_records --input=block_records.npy --output=blocks.tfr

A pickle can run anything on the machine that opens it. `import_checkpoint --trust_pickle` starts this as a process of its own, which
knows NumPy arrays and bytes and nothing else. It takes as much memory as the file.
"""

import io
import pickle
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import flags

from realm_tf import artifacts, settings
from realm_tf.checkpoints import CheckpointError, Unpickler

_reconstruct = np.empty(0, object).__reduce__()[0]  # what a pickled array calls
_ALLOWED = {("numpy.core.multiarray", "_reconstruct"): _reconstruct, ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}


def read(path: str) -> Sequence[bytes]:
  """The passages of a block_records.npy, as UTF-8.

  Raises:
    CheckpointError: not an array of bytes, or more than that.
  """
  with artifacts.gfile.GFile(path, "rb") as file:
    reader = io.BufferedReader(_Raw(file), 1 << 20)
    try:
      version = np.lib.format.read_magic(reader)
      read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
      shape, _, dtype = read_header(reader)
      records = Unpickler(reader, _ALLOWED, path=path, needs="NumPy arrays and bytes").load() if dtype == object else None
    except CheckpointError:
      raise
    except (ValueError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, IndexError) as error:
      raise CheckpointError(f"{path!r} is no array of passages as numpy.save writes it: {error}") from error
  if not isinstance(records, np.ndarray) or records.shape != shape or records.ndim != 1:
    raise CheckpointError(f"{path!r} holds {type(records).__name__} of {dtype} {shape}; wanted an array of bytes objects, [N].")
  for number, record in enumerate(records):
    if not isinstance(record, bytes):
      raise CheckpointError(f"record {number} of {path!r} is {type(record).__name__}, wanted bytes.")
  return records


class _Raw(io.RawIOBase):
  """A `tf.io.gfile` file as Python's own readers want it."""

  def __init__(self, file):
    self._file = file

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    data = self._file.read(len(buffer))
    buffer[:len(data)] = data
    return len(data)


def main(argv: Sequence[str]) -> None:
  del argv
  records = read(flags.FLAGS.input)
  with tf.io.TFRecordWriter(flags.FLAGS.output) as writer:
    for record in records:
      writer.write(record)


if __name__ == "__main__":
  flags.DEFINE_string("input", None, "A block_records.npy.", required=True)
  flags.DEFINE_string("output", None, "The TFRecord file to write, a passage in each record.", required=True)
  settings.start(main)
