"""BERT's optimizer and learning rate schedule, those of google-research/bert's `optimization.py`."""

from collections.abc import Sequence

import keras
from keras import ops

from realm_tf import devices

_NOT_DECAYED = ("bias", "gamma", "beta")  # parts of names: biases and LayerNorm


@keras.saving.register_keras_serializable("realm_tf")
class LinearWarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
  """BERT's schedule: straight down from `peak` at step 0 to 0 at `steps`.

  Before `warmup_steps` it goes up from 0 to `peak` instead: the first step has rate 0. After the
  warm-up the rate falls to where the line has come by then.
  """

  def __init__(self, *, peak: float, steps: int, warmup_steps: int):
    self.peak, self.steps, self.warmup_steps = peak, steps, warmup_steps

  def __call__(self, step):
    step = ops.cast(step, "float32")
    up = step / max(self.warmup_steps, 1)
    down = 1 - ops.minimum(step, self.steps) / self.steps
    return self.peak * ops.where(step < self.warmup_steps, up, down)

  def get_config(self) -> dict:
    return {"peak": self.peak, "steps": self.steps, "warmup_steps": self.warmup_steps}


class BertAdamW(keras.optimizers.Adam):
  """BERT's AdamWeightDecayOptimizer; some variables may have a slower rate.

  A variable moves by rate * (m / (sqrt(v) + epsilon) + decay * variable), where m and v are Adam's
  averages of the gradient and of its square.

  Args:
    decay: of the weights; biases and LayerNorm have none.
    bias_correction: of Adam's averages. BERT's has none: its first updates are three times as large.
    slow: the variables whose learning rate is multiplied by `slow_factor`, that of their decay too.
  """

  def __init__(
    self,
    learning_rate,
    *,
    decay: float,
    bias_correction: bool = False,
    slow: Sequence[keras.Variable] = (),
    slow_factor: float = 1.0,
    **kwargs,
  ):
    super().__init__(learning_rate, **kwargs)
    self._decay, self._bias_correction = decay, bias_correction
    self._slow, self._slow_factor = {id(variable) for variable in slow}, slow_factor

  def update_step(self, gradient, variable, learning_rate):
    index = self._get_variable_index(variable)
    known = self._trainable_variables[index]  # `variable` may be one device's part of it
    first, second = self._momentums[index], self._velocities[index]
    gradient = ops.cast(gradient, known.dtype)
    self.assign_add(first, ops.multiply(ops.subtract(gradient, first), 1 - self.beta_1))
    self.assign_add(
      second, ops.multiply(ops.subtract(ops.square(gradient), second), 1 - self.beta_2)
    )
    update = ops.divide(first, ops.add(ops.sqrt(second), self.epsilon))
    if self._bias_correction:
      step = ops.cast(self.iterations + 1, known.dtype)
      update *= ops.sqrt(1 - ops.power(self.beta_2, step)) / (1 - ops.power(self.beta_1, step))
    if not any(part in known.name for part in _NOT_DECAYED):
      update = ops.add(update, ops.multiply(variable, self._decay))
    rate = learning_rate * (self._slow_factor if id(known) in self._slow else 1.0)
    self.assign_sub(variable, ops.multiply(update, ops.cast(rate, known.dtype)))

  def _clip_gradients(self, grads):
    """By the norm of the whole batch's gradient; Keras clips each device's share before it adds them up."""
    return [grad / devices.count() for grad in super()._clip_gradients(devices.add_up(grads))]


def bert_optimizer(
  *,
  learning_rate: float,
  steps: int,
  bias_correction: bool = False,
  min_warmup_steps: int = 100,
  slow: Sequence[keras.Variable] = (),
  slow_factor: float = 1.0,
) -> BertAdamW:
  """The optimizer of every training of the released ORQA and REALM.

  `BertAdamW` with decay 0.01, gradients clipped to a global norm of 1, and a warm-up over a tenth of
  the steps, but at least `min_warmup_steps` and at most 10,000.

  Args:
    learning_rate: the peak of the schedule.
    steps: of the whole training.
    bias_correction, slow, slow_factor: see `BertAdamW`.
    min_warmup_steps: 100 as released.
  """
  warmup_steps = min(10_000, max(min_warmup_steps, steps // 10))
  schedule = LinearWarmupDecay(peak=learning_rate, steps=steps, warmup_steps=warmup_steps)
  return BertAdamW(
    schedule,
    decay=0.01,
    bias_correction=bias_correction,
    epsilon=1e-6,
    global_clipnorm=1.0,
    slow=slow,
    slow_factor=slow_factor,
  )
