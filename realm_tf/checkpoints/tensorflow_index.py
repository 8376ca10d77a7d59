"""Checks the index of a TensorFlow checkpoint before TensorFlow reads it.

TensorFlow aborts the whole process if an index has impossible values, such as a negative size. The
index is a table of TensorFlow's `lib/io/table_format`: blocks of sorted keys, each stored without
the prefix that it shares with the previous key, and a block with the positions of the blocks.
"""

import math
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import tensor_bundle_pb2

from realm_tf.storage import paths
from realm_tf.storage.artifacts import gfile

_MAX_BYTES = 64_000_000
_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_FOOTER_BYTES, _TRAILER_BYTES = 48, 5
_MAX_DIMS, _MAX_SHARDS = 8, 10_000


class Variable(NamedTuple):
  """The entry of a numeric variable in an index."""

  shape: tuple[int, ...]
  dtype: tf.DType


class DamagedIndex(ValueError):
  """Raised for an index that is damaged, or does not match the data files beside it."""


def read(prefix: str) -> dict[str, Variable]:
  """Returns the numeric variables of a checkpoint; others, such as strings, are left out.

  Args:
    prefix: path of the checkpoint without ".index".

  Raises:
    DamagedIndex: if the index is damaged, or does not match the data files beside it.
  """
  size = gfile.stat(f"{prefix}.index").length
  if size > _MAX_BYTES:
    raise DamagedIndex(f"its index has {size:,} bytes; at most {_MAX_BYTES:,}")
  with gfile.GFile(f"{prefix}.index", "rb") as file:
    data = file.read()
  try:
    entries = dict(_entries(data))
    header = tensor_bundle_pb2.BundleHeaderProto.FromString(entries.pop(b""))
    shard_bytes = _shards(prefix, header.num_shards)
    return {
      name.decode(): variable
      for name, value in entries.items()
      if (variable := _variable(value, shard_bytes))
    }
  except (LookupError, ValueError, TypeError, struct.error, DecodeError) as error:
    raise DamagedIndex(f"its index is damaged ({error})") from error


def _shards(prefix: str, num_shards: int) -> list[int]:
  """Returns the size in bytes of each data file."""
  if not 0 < num_shards <= _MAX_SHARDS:
    raise ValueError(f"it has {num_shards} data files")
  folder, name = os.path.split(prefix)
  there = set(paths.names(folder or "."))
  wanted = [f"{name}.data-{shard:05d}-of-{num_shards:05d}" for shard in range(num_shards)]
  if missing := [part for part in wanted if part not in there]:
    raise ValueError(f"{missing[0]} is missing")
  return [gfile.stat(os.path.join(folder, part)).length for part in wanted]


def _variable(value: bytes, shard_bytes: list[int]) -> Variable | None:
  entry = tensor_bundle_pb2.BundleEntryProto.FromString(value)
  shape = tuple(dim.size for dim in entry.shape.dim)
  if entry.shape.unknown_rank or len(shape) > _MAX_DIMS or any(size < 0 for size in shape):
    raise ValueError("a shape is unknown")
  if entry.slices:
    raise ValueError("a variable is in several parts")
  if not 0 <= entry.shard_id < len(shard_bytes) or entry.offset < 0 or entry.size < 0:
    raise ValueError("a variable is in no file")
  num_bytes = shard_bytes[entry.shard_id]
  if entry.offset + entry.size > num_bytes or math.prod(shape) > num_bytes:
    raise ValueError("a variable ends beyond its file, which may be truncated")
  dtype = tf.dtypes.as_dtype(entry.dtype)
  if not dtype.is_floating and not dtype.is_integer:
    return None
  if math.prod(shape) * dtype.size != entry.size:
    raise ValueError("the size of a variable does not match its shape")
  return Variable(shape, dtype)


# ======================================================================================= the table


def _entries(data: bytes) -> Iterator[tuple[bytes, bytes]]:
  """Yields the key and value of every entry of a table."""
  if len(data) < _FOOTER_BYTES or not data.endswith(_MAGIC):
    raise ValueError("it does not end like an index")
  _, at = _handle(data, len(data) - _FOOTER_BYTES)
  (start, size), _ = _handle(data, at)
  last = -1
  for _, place in _block(data, start, size):
    (start, size), _ = _handle(place, 0)
    if start <= last:
      raise ValueError("blocks are not in order")
    last = start
    yield from _block(data, start, size)


def _block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
  if start + size + _TRAILER_BYTES > len(data) or size < 4 or data[start + size] != 0:
    raise ValueError("a block ends beyond the file, or is compressed")
  block = data[start : start + size]
  (num_restarts,) = struct.unpack("<I", block[-4:])
  end, at, key = size - 4 * (num_restarts + 1), 0, b""
  while at < end:
    shared, at = _varint(block, at)
    key_bytes, at = _varint(block, at)
    value_bytes, at = _varint(block, at)
    if shared > len(key) or at + key_bytes + value_bytes > end:
      raise ValueError("a key or a value ends beyond its block")
    key = key[:shared] + block[at : at + key_bytes]
    at += key_bytes + value_bytes
    yield key, block[at - value_bytes : at]


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
  """Returns start and size of a block, and the position after the handle."""
  start, at = _varint(data, at)
  size, at = _varint(data, at)
  return (start, size), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 64, 7):
    value |= (data[at] & 0x7F) << shift
    at += 1
    if data[at - 1] < 0x80:
      return value, at
  raise ValueError("a number does not end")
