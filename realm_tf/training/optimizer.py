"""BERT's optimizer and learning rate schedule, as in `optimization.py` of google-research/bert."""

from collections.abc import Sequence

import keras
from keras import ops

from realm_tf.models import devices

if keras.backend.backend() == "tensorflow":
  import tensorflow as tf

_NOT_DECAYED = ("bias", "gamma", "beta")  # parts of names: biases and LayerNorm


@keras.saving.register_keras_serializable("realm_tf")
class LinearWarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
  """BERT's schedule: linear decay from `peak` at step 0 to 0 at `steps`.

  Before `warmup_steps` the rate rises linearly from 0 towards `peak` instead; the first step has
  rate 0. After the warm-up it drops to the value of the decay line at that step.
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
  """BERT's AdamWeightDecayOptimizer, with an optional lower rate for some variables.

  A variable moves by rate * (m / (sqrt(v) + epsilon) + decay * variable), where m and v are Adam's
  averages of the gradient and of its square.

  Args:
    decay: weight decay; biases and LayerNorm have none.
    bias_correction: whether to correct the bias of Adam's averages. BERT does not: its first
      updates are three times as large.
    slow: variables whose learning rate, for their decay too, is multiplied by `slow_factor`.
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
    # Keras would number the optimizers of a process, and the name is in the checkpoints' bytes.
    super().__init__(learning_rate, **{"name": "bert_adam_w", **kwargs})
    self._decay, self._bias_correction = decay, bias_correction
    self._slow, self._slow_factor = {id(variable) for variable in slow}, slow_factor

  def update_step(self, gradient, variable, learning_rate):
    index = self._get_variable_index(variable)
    known = self._trainable_variables[index]  # `variable` may be its copy on one device
    rate = ops.cast(learning_rate, known.dtype)
    if id(known) in self._slow:
      rate *= self._slow_factor
    if not any(part in known.name for part in _NOT_DECAYED):
      self.assign_sub(variable, ops.multiply(variable, rate * self._decay))
    powers = (0.0, 0.0)  # of both betas
    if self._bias_correction:
      step = ops.cast(self.iterations + 1, known.dtype)
      powers = (ops.power(self.beta_1, step), ops.power(self.beta_2, step))
    move = self._move_in_one_op if keras.backend.backend() == "tensorflow" else self._move
    averages = self._momentums[index], self._velocities[index]
    move(variable, *averages, ops.cast(gradient, known.dtype), rate, powers)

  def _move(self, variable, first, second, gradient, rate, powers):
    """Updates both averages, and moves a variable by rate * m / (sqrt(v) + epsilon).

    The bias of m and v is corrected by 1 - powers.
    """
    self.assign_add(first, ops.multiply(ops.subtract(gradient, first), 1 - self.beta_1))
    self.assign_add(
      second, ops.multiply(ops.subtract(ops.square(gradient), second), 1 - self.beta_2)
    )
    rate *= ops.sqrt(1 - powers[1]) / (1 - powers[0])
    update = ops.divide(first, ops.add(ops.sqrt(second), self.epsilon))
    self.assign_sub(variable, ops.multiply(update, rate))

  def _move_in_one_op(self, variable, first, second, gradient, rate, powers):
    """Does the same as `_move` with one op, which reads and writes each value once."""
    tf.raw_ops.ResourceApplyAdam(
      var=variable.handle,
      m=first.value.handle,
      v=second.value.handle,
      beta1_power=powers[0],
      beta2_power=powers[1],
      lr=rate,
      beta1=self.beta_1,
      beta2=self.beta_2,
      epsilon=self.epsilon,
      grad=gradient,
    )

  def _clip_gradients(self, grads):
    """Clips by the norm of the whole batch's gradient.

    Keras would clip each device's share before adding them up.
    """
    clipped, num_devices = super()._clip_gradients(devices.add_up(grads)), devices.count()
    return clipped if num_devices == 1 else [grad / num_devices for grad in clipped]


def bert_optimizer(
  *,
  learning_rate: float,
  steps: int,
  bias_correction: bool = False,
  min_warmup_steps: int = 100,
  slow: Sequence[keras.Variable] = (),
  slow_factor: float = 1.0,
) -> BertAdamW:
  """Returns the optimizer that the released ORQA and REALM use in every training.

  This is `BertAdamW` with decay 0.01, gradients clipped to a global norm of 1, and a warm-up over a
  tenth of the steps, but at least `min_warmup_steps` and at most 10,000.

  Args:
    learning_rate: peak of the schedule.
    steps: steps of the whole training.
    bias_correction: see `BertAdamW`.
    min_warmup_steps: 100 as released.
    slow: see `BertAdamW`.
    slow_factor: see `BertAdamW`.
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
