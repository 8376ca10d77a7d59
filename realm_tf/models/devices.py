"""Devices that share each training batch, and the precision that they compute in.

A batch is spread over several devices of one machine; Keras' other backends use one device.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import keras

from realm_tf import errors

if keras.backend.backend() == "tensorflow":
  import tensorflow as tf


class Gathered(NamedTuple):
  """Rows gathered from all devices.

  Attributes:
    rows: [B', ...] of all devices.
    first: [] int32, number of this device's first row.
  """

  rows: object
  first: object


def are_tensorflow_cpus() -> bool:
  """Returns whether TensorFlow computes, and only on CPUs."""
  return keras.backend.backend() == "tensorflow" and not tf.config.list_physical_devices("GPU")


@contextlib.contextmanager
def on(num: int, *, mixed_precision: bool = False) -> Iterator[None]:
  """Scope for building a model that trains on the first `num` GPUs.

  Each device takes a share of the batch. If there is no GPU, CPU devices are used.

  Args:
    num: number of devices.
    mixed_precision: whether the model computes in bfloat16; weights stay float32.

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


@functools.cache  # all parts of a model must share one strategy
def _strategy(num: int):
  found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
  if len(found) < num:
    names = ", ".join(device.name for device in found)
    raise errors.UserError(f"num_devices is {num}, but this machine has {len(found)}: {names}.")
  return tf.distribute.MirroredStrategy([device.name for device in found[:num]])


def count() -> int:
  """Number of devices that share the current batch."""
  if keras.backend.backend() != "tensorflow":
    return 1
  replica = tf.distribute.get_replica_context()
  return replica.num_replicas_in_sync if replica else 1


def gather(rows) -> Gathered:
  """Gathers the rows [B, ...] of all devices that share the batch.

  Gradients flow back to the device that each row came from.
  """
  if count() == 1:
    return Gathered(rows, 0)
  replica = tf.distribute.get_replica_context()
  return Gathered(
    replica.all_gather(rows, axis=0), replica.replica_id_in_sync_group * tf.shape(rows)[0]
  )


def add_up(tensors: list) -> list:
  """Sums each tensor over the devices that share the batch."""
  return (
    tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tensors)
    if count() > 1
    else tensors
  )
