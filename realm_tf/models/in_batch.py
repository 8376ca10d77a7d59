"""Training retrievers with the other passages of a batch as negatives.

The tasks are the inverse cloze task and recurring spans.
"""

from keras import ops

from realm_tf.models import devices, losses
from realm_tf.models.measured import MeasuredModel
from realm_tf.models.retriever import Retriever


class InBatchModel(MeasuredModel):
  """A retriever that learns to find each query's own passage among those of the batch.

  The loss is ORQA's (section 4). `allowed` [B, B] of a batch marks the passages that count as wrong
  for a query; without it all others do. If a batch has `removed` [B], which marks sentences that
  were removed from their passages, accuracy is also measured separately for both kinds.
  """

  def __init__(self, retriever: Retriever, *, measures_removed: bool = False):
    measures = ["loss", "accuracy"]
    measures += ["accuracy_removed", "accuracy_kept", "removed"] if measures_removed else []
    super().__init__(measures, name="in_batch")
    self.retriever, self.measures_removed = retriever, measures_removed

  def call(self, inputs, training=False):
    return self.retriever(inputs, training=training, static=self.jit_compile)

  def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    everybody = devices.gather(y_pred["passages"])
    result = losses.in_batch(
      y_pred["queries"], everybody.rows, everybody.first, allowed=x.get("allowed")
    )
    loss = ops.mean(result.loss)
    self.means["loss"].update_state(loss)
    self.means["accuracy"].update_state(result.correct)
    if self.measures_removed:
      removed = x["removed"]
      self.means["accuracy_removed"].update_state(result.correct, removed)
      self.means["accuracy_kept"].update_state(result.correct, 1 - removed)
      self.means["removed"].update_state(removed)
    return loss / devices.count()
