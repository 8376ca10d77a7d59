"""Memory and time of converting a released corpus' embeddings, 13,353,718 x 128, from `encoded/encoded.ckpt` to an index.

    python -m benchmarks.import_embeddings --folder=EMPTY --rows=13353718

Random values; writes them and the index below --folder, 6.8 GB each, and compares a few rows; delete them yourself. Each step is a process of
its own, and the figure is the peak of its resident memory, TensorFlow's own third of a gigabyte included.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import app, flags

DIM, SEED = 128, 0
_CHUNK = 100_000


def _rows(start: int, stop: int) -> np.ndarray:
  """Rows [start, stop) of one chunk: the same whenever they are asked for."""
  return np.random.default_rng([SEED, start // _CHUNK]).standard_normal([_CHUNK, DIM], np.float32)[start % _CHUNK:][:stop - start]


def write(folder: str, num_rows: int) -> None:
  """As TensorFlow writes it: this takes all the memory."""
  import tensorflow as tf

  values = np.empty([num_rows, DIM], np.float32)
  for start in range(0, num_rows, _CHUNK):
    values[start:start + _CHUNK] = _rows(start, min(start + _CHUNK, num_rows))
  os.makedirs(os.path.join(folder, "encoded"))
  tf.raw_ops.SaveV2(prefix=os.path.join(folder, "encoded", "encoded.ckpt"), tensor_names=["block_emb"], shape_and_slices=[""],
                    tensors=[tf.convert_to_tensor(values)])


def convert(folder: str, num_rows: int) -> None:
  """What import_checkpoint does with them, between a snapshot and passages that stand for any."""
  from realm_tf import artifacts, checkpoints, import_checkpoint

  inputs = {"snapshot": os.path.join(folder, "snapshots", "00000000"), "passages": os.path.join(folder, "passages")}
  for kind, path in inputs.items():
    with artifacts.publish(path, kind=kind, config={}, inputs={}):
      pass
  embeddings = checkpoints.open_tensorflow(os.path.join(folder, "encoded", "encoded.ckpt"))["block_emb"]
  import_checkpoint.write_index(embeddings, os.path.join(folder, "index"), snapshot=inputs["snapshot"], passages_folder=inputs["passages"])


def compare(folder: str, num_rows: int) -> None:
  from realm_tf import export_checkpoint

  written = export_checkpoint.read_index(os.path.join(folder, "index"))
  assert written.shape == (num_rows, DIM)
  for start in {0, num_rows // 2, num_rows - 1}:
    np.testing.assert_array_equal(written.rows(start, start + 1), _rows(start, start + 1))


def _measured(connection, step: Callable, *args) -> None:
  started = time.time()
  step(*args)
  connection.send((time.time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


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
    print(f"{step.__name__}: {num_rows:,} x {DIM} in {secs:.0f} s, at most {gibibytes:.2f} GiB of memory", flush=True)


if __name__ == "__main__":
  flags.DEFINE_string("folder", None, "A folder to write into, empty or new.", required=True)
  flags.DEFINE_integer("rows", 13_353_718, "Passages.")
  app.run(main)
