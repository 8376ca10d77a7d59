"""SavedModels whose files are the same in every run."""

import os

import tensorflow as tf
from tensorflow.core.protobuf import fingerprint_pb2

from realm_tf.storage.artifacts import gfile

_FINGERPRINT = "fingerprint.pb"


def save(module: tf.Module, folder: str, **how) -> None:
  """Saves a SavedModel; `how` are arguments of `tf.saved_model.save`.

  TensorFlow gives each one a random number as well. It becomes the checksum of the model.
  """
  tf.saved_model.save(module, folder, **how)
  path = os.path.join(folder, _FINGERPRINT)
  with gfile.GFile(path, "rb") as file:
    fingerprint = fingerprint_pb2.FingerprintDef.FromString(file.read())
  fingerprint.uuid = str(fingerprint.saved_model_checksum)
  with gfile.GFile(path, "wb") as file:
    file.write(fingerprint.SerializeToString(deterministic=True))
