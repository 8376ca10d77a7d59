"""Retrievers that learn from the other passages of a batch: the inverse cloze task and recurring spans."""

import keras
from keras import ops

from realm_tf import devices, losses
from realm_tf.models.retriever import Retriever


class InBatchModel(keras.Model):
  """A retriever that learns to find each query's own passage among those of the batch.

  The loss is ORQA's (section 4). A batch may say in `allowed` [B, B] which passages count as wrong for a query;
  without it all others do. If it says in `removed` [B] where the sentence was taken out of its passage, accuracy is
  measured apart for both kinds.
  """

  def __init__(self, retriever: Retriever, *, measures_removed: bool = False):
    super().__init__(name="in_batch")
    self.retriever, self.measures_removed = retriever, measures_removed
    names = ["loss", "accuracy"]
    names += ["accuracy_removed", "accuracy_kept", "removed"] if measures_removed else []
    self.means = {name: keras.metrics.Mean(name) for name in names}
    self.built = True  # its weights are the retriever's

  def call(self, inputs, training=False):
    return self.retriever(inputs, training=training)

  def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    everybody = devices.gather(y_pred["passages"])
    result = losses.in_batch(
      y_pred["queries"], everybody.rows, everybody.first, allowed=x.get("allowed"))
    loss = ops.mean(result.loss)
    self.means["loss"].update_state(loss)
    self.means["accuracy"].update_state(result.correct)
    if self.measures_removed:
      removed = x["removed"]
      self.means["accuracy_removed"].update_state(result.correct, removed)
      self.means["accuracy_kept"].update_state(result.correct, 1 - removed)
      self.means["removed"].update_state(removed)
    return loss / devices.count()

  @property
  def metrics(self):
    return list(self.means.values())
