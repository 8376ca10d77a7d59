"""Measures memory and time of converting the embeddings of a released corpus to an index.

    python -m benchmarks.import_embeddings --folder=EMPTY --rows=13353718

Those of the released corpus are 13,353,718 x 128, in `encoded/encoded.ckpt`; here random values are
used. Writes them and the index below --folder, 6.8 GB each, and compares a few rows; the files are
not deleted. Each step runs in its own process. The figure is the peak resident memory of that
process, including the third of a gigabyte that TensorFlow takes.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("folder", None, "Folder to write to, empty or new.", required=True)
  flags.DEFINE_integer("rows", 13_353_718, "Number of passages.")
  cli.start("benchmarks.import_embeddings")

import numpy as np

DIM, SEED = 128, 0
_CHUNK = 100_000


def _rows(start: int, stop: int) -> np.ndarray:
  """Returns rows [start, stop) within one chunk; deterministic."""
  return np.random.default_rng([SEED, start // _CHUNK]).standard_normal([_CHUNK, DIM], np.float32)[
    start % _CHUNK :
  ][: stop - start]


def write(folder: str, num_rows: int) -> None:
  """Writes the embeddings with TensorFlow, which needs all of them in memory."""
  import tensorflow as tf

  values = np.empty([num_rows, DIM], np.float32)
  for start in range(0, num_rows, _CHUNK):
    values[start : start + _CHUNK] = _rows(start, min(start + _CHUNK, num_rows))
  os.makedirs(os.path.join(folder, "encoded"))
  tf.raw_ops.SaveV2(
    prefix=os.path.join(folder, "encoded", "encoded.ckpt"),
    tensor_names=["block_emb"],
    shape_and_slices=[""],
    tensors=[tf.convert_to_tensor(values)],
  )


def convert(folder: str, num_rows: int) -> None:
  """Converts them as import_checkpoint does, with placeholders for snapshot and passages."""
  from realm_tf import import_checkpoint
  from realm_tf.checkpoints import tensorflow_files
  from realm_tf.storage import publishing

  inputs = {
    "snapshot": os.path.join(folder, "snapshots", "00000000"),
    "passages": os.path.join(folder, "passages"),
  }
  for kind, path in inputs.items():
    with publishing.publish(path, kind=kind, config={}, inputs={}):
      pass
  embeddings = tensorflow_files.open_tensorflow(os.path.join(folder, "encoded", "encoded.ckpt"))[
    "block_emb"
  ]
  import_checkpoint.write_index(
    embeddings,
    os.path.join(folder, "index"),
    snapshot=inputs["snapshot"],
    passages_folder=inputs["passages"],
  )


def compare(folder: str, num_rows: int) -> None:
  from realm_tf import export_checkpoint

  written = export_checkpoint.read_index(os.path.join(folder, "index"))
  assert written.shape == (num_rows, DIM)
  for start in {0, num_rows // 2, num_rows - 1}:
    np.testing.assert_array_equal(written.rows(start, start + 1), _rows(start, start + 1))


def _measured(connection, step: Callable, *args) -> None:
  cli.set_switches()
  started = time.time()
  step(*args)
  connection.send(
    (time.time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
  )


def main(argv: Sequence[str]) -> None:
  del argv
  folder, num_rows = flags.FLAGS.folder, flags.FLAGS.rows
  context = multiprocessing.get_context("spawn")
  for step in (write, convert, compare):
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(theirs, step, folder, num_rows))
    process.start()
    process.join()
    if process.exitcode:
      raise SystemExit(f"{step.__name__} ended with {process.exitcode}")
    secs, gibibytes = ours.recv()
    print(
      f"{step.__name__}: {num_rows:,} x {DIM} in {secs:.0f} s, peak memory {gibibytes:.2f} GiB",
      flush=True,
    )
