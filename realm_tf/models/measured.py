"""Base class of trained models, which measure themselves while they compute their loss."""

from collections.abc import Iterable

import keras


class MeasuredModel(keras.Model):
  """A model that computes its own loss and keeps running means of its measures.

  It starts without weights other than those of the models that it trains.

  Args:
    measures: names of the means.
    kwargs: arguments of `keras.Model`.

  Attributes:
    means: name → mean since the last reset, updated by `compute_loss`; a row of metrics.jsonl.
  """

  def __init__(self, measures: Iterable[str], **kwargs):
    super().__init__(**kwargs)
    self.means = {name: keras.metrics.Mean(name) for name in measures}
    self.built = True

  @property
  def metrics(self) -> list[keras.metrics.Metric]:
    return list(self.means.values())
