"""realm_tf/storage/saved_models.py: nothing in a SavedModel is random."""

import tensorflow as tf
from tensorflow.core.protobuf import fingerprint_pb2

from realm_tf.storage import saved_models


class Doubling(tf.Module):
  def __init__(self):
    super().__init__()
    self.factor = tf.Variable(2.0)

  @tf.function(input_signature=[tf.TensorSpec([None])], autograph=False)
  def __call__(self, x):
    return self.factor * x


def test_the_fingerprint_is_not_random_and_the_model_loads(tmp_path):
  module = Doubling()
  saved_models.save(module, str(tmp_path), signatures={"double": module.__call__})
  written = fingerprint_pb2.FingerprintDef.FromString((tmp_path / "fingerprint.pb").read_bytes())
  read = tf.saved_model.experimental.read_fingerprint(str(tmp_path))
  assert written.uuid == str(read.saved_model_checksum) and read.singleprint()
  assert tf.saved_model.load(str(tmp_path))(tf.constant([3.0])).numpy() == [6.0]
