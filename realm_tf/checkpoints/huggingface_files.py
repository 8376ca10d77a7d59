"""Reads and writes the tensors of Hugging Face folders: safetensors, or PyTorch files."""

import atexit
import functools
import os
import re
import shutil
import tempfile

import numpy as np
import safetensors
import safetensors.numpy

from realm_tf.checkpoints import pytorch_files
from realm_tf.checkpoints.tensor_files import (
  DAMAGED,
  DTYPES,
  SHOWN_CHARS,
  CheckpointError,
  Tensor,
  Tensors,
)
from realm_tf.storage import json_files, paths
from realm_tf.storage.artifacts import gfile

_ROWS_AT_ONCE = 10_000

_PART = re.compile(r"[\w-][\w.-]*")  # a file name


def open_huggingface(folder: str) -> Tensors:
  """Opens the tensors of a Hugging Face folder.

  They are in model.safetensors or pytorch_model.bin, or in several such files with an index.

  Raises:
    CheckpointError: if neither exists, or a file is damaged or holds more than tensors.
  """
  for name, read in (
    ("model.safetensors", read_safetensors),
    ("pytorch_model.bin", pytorch_files.read_pytorch),
  ):
    path = os.path.join(folder, name)
    if gfile.exists(f"{path}.index.json"):
      return {
        key: tensor
        for file in _parts_of(f"{path}.index.json")
        for key, tensor in read(os.path.join(folder, file)).items()
      }
    if gfile.exists(path):
      return read(path)
  raise CheckpointError(
    f"{folder!r} has a config.json but neither model.safetensors nor pytorch_model.bin: "
    "the weights are missing."
  )


def _parts_of(index_path: str) -> list[str]:
  """Returns the names of the files that a weight index lists."""
  told = json_files.read(index_path, dict, error=CheckpointError).get("weight_map")
  names = list(told.values()) if isinstance(told, dict) else []
  # Files in other folders are not part of the checkpoint.
  if not names or not all(isinstance(name, str) and _PART.fullmatch(name) for name in names):
    raise CheckpointError(
      f"{index_path!r} does not name the files beside it that hold the weights. Download it again."
    )
  return sorted(set(names))


def read_safetensors(path: str) -> Tensors:
  """Opens the tensors of a safetensors file, which the safetensors library reads and checks.

  Raises:
    CheckpointError: if the library rejects the file, or the file holds an unsupported type.
  """
  try:
    file = safetensors.safe_open(_on_disk(path), framework="np")
    parts = {name: file.get_slice(name) for name in file.keys()}
    unknown = {part.get_dtype() for part in parts.values()} - set(DTYPES)
  except (safetensors.SafetensorError, *DAMAGED) as error:
    raise CheckpointError(
      f"{path!r} is not a complete safetensors file ({str(error)[:SHOWN_CHARS]}). "
      "Download it again."
    ) from error
  if unknown:
    raise CheckpointError(
      f"{path!r} holds values of type {min(unknown)}; supported are {', '.join(DTYPES)}."
    )

  def rows_of(name: str, start: int, stop: int) -> np.ndarray:
    return parts[name][start:stop]

  return {
    name: Tensor(tuple(part.get_shape()), path, functools.partial(rows_of, name), name)
    for name, part in parts.items()
  }


def _on_disk(path: str) -> str:
  """Returns a local path that can be memory-mapped; copies a remote file until the process ends."""
  if not paths.is_remote(path):
    return path
  folder = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  gfile.copy(path, copied := os.path.join(folder, "model.safetensors"))
  return copied


def write_safetensors(path: str, tensors: Tensors) -> None:
  """Writes tensors in float32.

  Memory holds a few rows at a time, because the values go through scratch files beside the output.
  The output appears atomically: it is written under another name, then renamed.
  """
  with tempfile.TemporaryDirectory(
    dir=None if paths.is_remote(path) else os.path.dirname(path) or "."
  ) as scratch:
    arrays = {}
    for number, (name, tensor) in enumerate(tensors.items()):
      arrays[name] = _mapped(os.path.join(scratch, f"{number}.npy"), tensor)
    written = os.path.join(scratch, "model.safetensors")
    safetensors.numpy.save_file(arrays, written, metadata={"format": "pt"})
    if paths.is_remote(path):  # a remote copy is atomic
      gfile.copy(written, path, overwrite=True)
    else:
      os.replace(written, path)


def _mapped(path: str, tensor: Tensor) -> np.ndarray:
  """Returns the values in float32, memory-mapped to a new file."""
  array = np.lib.format.open_memmap(path, "w+", np.float32, tensor.shape)
  at = 0
  for block in tensor.blocks(_ROWS_AT_ONCE):
    array[at : at + len(block)] = block
    at += len(block)
  return array
