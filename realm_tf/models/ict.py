"""The inverse cloze task. ORQA, section 4."""

import keras
from keras import ops

from realm_tf import devices, losses
from realm_tf.models.retriever import Retriever


class IctModel(keras.Model):
  """A retriever that learns by in-batch inverse cloze."""

  def __init__(self, retriever: Retriever):
    super().__init__(name="ict")
    self.retriever = retriever
    self.means = {name: keras.metrics.Mean(name) for name in ("loss", "accuracy", "accuracy_removed", "accuracy_kept", "removed")}
    self.built = True  # its weights are the retriever's

  def call(self, inputs, training=False):
    return self.retriever(inputs, training=training)

  def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    everybody = devices.gather(y_pred["passages"])
    result = losses.in_batch_ict(y_pred["queries"], everybody.rows, everybody.first)
    loss, removed = ops.mean(result.loss), x["removed"]
    self.means["loss"].update_state(loss)
    self.means["accuracy"].update_state(result.correct)
    self.means["accuracy_removed"].update_state(result.correct, removed)
    self.means["accuracy_kept"].update_state(result.correct, 1 - removed)
    self.means["removed"].update_state(removed)
    return loss / devices.count()

  @property
  def metrics(self):
    return list(self.means.values())
