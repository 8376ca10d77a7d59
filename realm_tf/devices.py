"""What training computes on and in: several devices of one machine sharing each batch (one on Keras' other backends), bfloat16."""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import keras

from realm_tf import errors

if keras.backend.backend() == "tensorflow":
  import tensorflow as tf


class Gathered(NamedTuple):
  """rows [B', ...] of all devices; first: [] int32, where this device's begin."""

  rows: object
  first: object


@contextlib.contextmanager
def on(num: int, *, mixed_precision: bool = False) -> Iterator[None]:
  """Scope to build a model in: it will train on the first `num` GPUs (CPU devices where there is none), each with a share of the batch.

  Args:
    num: of devices.
    mixed_precision: it will compute in bfloat16; weights stay float32.

  Raises:
    UserError: there are fewer devices.
  """
  before = keras.config.dtype_policy()
  keras.config.set_dtype_policy("mixed_bfloat16" if mixed_precision else "float32")
  try:
    with contextlib.nullcontext() if num == 1 else _strategy(num).scope():
      yield
  finally:
    keras.config.set_dtype_policy(before)


@functools.cache  # parts of a model must come from one
def _strategy(num: int):
  found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
  if len(found) < num:
    raise errors.UserError(f"num_devices is {num}, this machine has {len(found)}: {', '.join(device.name for device in found)}.")
  return tf.distribute.MirroredStrategy([device.name for device in found[:num]])


def count() -> int:
  """How many devices share the batch that is being computed on."""
  if keras.backend.backend() != "tensorflow":
    return 1
  replica = tf.distribute.get_replica_context()
  return replica.num_replicas_in_sync if replica else 1


def gather(rows) -> Gathered:
  """The rows [B, ...] of all devices that share the batch; gradients go back to where they came from."""
  if count() == 1:
    return Gathered(rows, 0)
  replica = tf.distribute.get_replica_context()
  return Gathered(replica.all_gather(rows, axis=0), replica.replica_id_in_sync_group * tf.shape(rows)[0])


def add_up(tensors: list) -> list:
  """The sums of each tensor over the devices that share the batch."""
  return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tensors) if count() > 1 else tensors
