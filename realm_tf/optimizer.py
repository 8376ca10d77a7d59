"""BERT's optimizer and learning rate schedule."""

from collections.abc import Sequence

import keras
from keras import ops

from realm_tf import devices


@keras.saving.register_keras_serializable("realm_tf")
class LinearWarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
  """BERT's schedule: up from 0 over `warmup_steps`, then down to 0 at `steps`."""

  def __init__(self, *, peak: float, steps: int, warmup_steps: int):
    self.peak, self.steps, self.warmup_steps = peak, steps, warmup_steps

  def __call__(self, step):
    step = ops.cast(step, "float32") + 1
    up, down = step / max(self.warmup_steps, 1), (self.steps + 1 - step) / max(self.steps + 1 - self.warmup_steps, 1)
    return self.peak * ops.maximum(ops.minimum(up, down), 0.0)

  def get_config(self) -> dict:
    return {"peak": self.peak, "steps": self.steps, "warmup_steps": self.warmup_steps}


class BertAdamW(keras.optimizers.AdamW):
  """AdamW as BERT uses it, with a learning rate of their own for some variables.

  Args:
    slow: the variables whose learning rate is multiplied by `slow_factor`.
  """

  def __init__(self, *args, slow: Sequence[keras.Variable] = (), slow_factor: float = 1.0, **kwargs):
    super().__init__(*args, **kwargs)
    self._slow, self._slow_factor = {id(variable) for variable in slow}, slow_factor

  def update_step(self, gradient, variable, learning_rate):
    index = self._get_variable_index(variable)
    if id(self._trainable_variables[index]) in self._slow:
      learning_rate = learning_rate * self._slow_factor
    super().update_step(gradient, variable, learning_rate)

  def _clip_gradients(self, grads):
    """By the norm of the whole batch's gradient; Keras clips each device's share before it adds them up."""
    return [grad / devices.count() for grad in super()._clip_gradients(devices.add_up(grads))]


def bert_optimizer(*, learning_rate: float, steps: int, slow: Sequence[keras.Variable] = (), slow_factor: float = 1.0) -> BertAdamW:
  """AdamW, decay 0.01 except on biases and LayerNorm, global norm clipped at 1, warm-up min(10k, max(100, steps/10)).

  Runs of under 1,000 steps warm up for a tenth of them.
  """
  warmup_steps = min(10_000, max(100, steps // 10)) if steps >= 1_000 else max(1, steps // 10)
  optimizer = BertAdamW(
      LinearWarmupDecay(peak=learning_rate, steps=steps, warmup_steps=warmup_steps), weight_decay=0.01, epsilon=1e-6,
      global_clipnorm=1.0, slow=slow, slow_factor=slow_factor)
  optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
  return optimizer
