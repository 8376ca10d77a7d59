"""The fused forward pass gives the encoder's outputs, and its gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from realm_tf.models import encoder, fused


def build(activation: str, dropout: float = 0.0):
  """Returns an encoder whose biases and gains are not 0 and 1, and inputs with padding."""
  keras.utils.set_random_seed(0)
  rng = np.random.default_rng(0)
  bert = encoder.build_encoder(
    dict(
      vocabulary_size=60,
      num_layers=2,
      num_heads=4,
      hidden_dim=32,
      intermediate_dim=64,
      max_sequence_length=24,
      dropout=dropout,
      activation=activation,
    ),
    name="bert",
  )
  for weight in bert.weights:
    weight.assign(np.asarray(weight) + rng.normal(0, 0.1, weight.shape))
  ids = rng.integers(1, 60, [5, 20])
  ids[np.arange(20) >= np.array([20, 3, 1, 11, 19])[:, None]] = 0
  segments = rng.integers(0, 2, [5, 20])
  return bert, tf.constant(ids, tf.int32), tf.constant(segments, tf.int32)


@pytest.fixture
def by_keras(monkeypatch):
  """Runs a function with Keras' own layers."""

  def run(function, *args, **kwargs):
    with monkeypatch.context() as patch:
      patch.setattr(encoder, "_can_be_fused", lambda *unused: False)
      return function(*args, **kwargs)

  return run


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype, most", [("float32", 1e-5), ("bfloat16", 0.06)])
def test_it_gives_what_the_encoder_gives(activation, dtype, most, by_keras):
  bert, ids, segments = build(activation, dropout=0.1)
  wanted = by_keras(encoder.encode, bert, ids, segments)
  got = tf.function(lambda ids, segments: fused.encode(bert, ids, segments, dtype=dtype))(
    ids, segments
  )
  there = ids.numpy() != 0
  for name, where in (("sequence_output", there), ("pooled_output", slice(None))):
    assert got[name].dtype == tf.float32
    np.testing.assert_allclose(
      got[name].numpy()[where], wanted[name].numpy()[where], rtol=0, atol=most, err_msg=name
    )
  without = fused.encode(bert, ids, dtype=dtype)["pooled_output"]
  wanted = by_keras(encoder.encode, bert, ids)["pooled_output"]
  np.testing.assert_allclose(without, wanted, atol=most)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_training_gives_the_same_gradients(activation, by_keras):
  bert, ids, segments = build(activation)
  used = tf.cast(ids != 0, tf.float32)[..., None] * tf.random.stateless_normal([5, 20, 32], [1, 2])

  def gradients():
    with tf.GradientTape() as tape:
      outputs = encoder.encode(bert, ids, segments, training=True)
      loss = tf.reduce_sum(outputs["sequence_output"] * used) + tf.reduce_sum(
        outputs["pooled_output"] ** 2
      )
    found = tape.gradient(loss, [weight.value for weight in bert.trainable_weights])
    return loss, [tf.convert_to_tensor(each) for each in found]

  loss, found = gradients()
  wanted_loss, wanted = by_keras(gradients)
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
  for weight, got, want in zip(bert.trainable_weights, found, wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4, err_msg=weight.path)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gradients_of_the_activations(activation):
  """Against central differences in float64."""
  at = np.linspace(-6, 6, 241)
  function = encoder.activation({"activation": activation})
  x = tf.constant(at, tf.float64)
  with tf.GradientTape() as tape:
    tape.watch(x)
    y = function(x)
  step = 1e-5
  differences = (function(x + step) - function(x - step)) / (2 * step)
  np.testing.assert_allclose(tape.gradient(y, x), differences, atol=1e-8)


def test_dropout_and_low_precision_are_left_to_keras(monkeypatch):
  monkeypatch.setattr(fused, "encode", lambda *unused: pytest.fail("it was fused"))
  bert, ids, segments = build("gelu", dropout=0.1)
  encoder.encode(bert, ids, segments, training=True)
  keras.config.set_dtype_policy("mixed_bfloat16")
  try:
    bert, ids, segments = build("gelu")
    encoder.encode(bert, ids, segments)
  finally:
    keras.config.set_dtype_policy("float32")
