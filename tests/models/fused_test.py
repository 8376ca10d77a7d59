"""The fused forward pass gives the encoder's outputs."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from realm_tf.models import encoder, fused


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype, most", [("float32", 1e-5), ("bfloat16", 0.06)])
def test_it_gives_what_the_encoder_gives(activation, dtype, most):
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
      dropout=0.1,
      activation=activation,
    ),
    name="bert",
  )
  for weight in bert.weights:  # fresh biases and gains are all 0 and 1
    weight.assign(np.asarray(weight) + rng.normal(0, 0.1, weight.shape))
  ids = rng.integers(1, 60, [5, 20])
  ids[np.arange(20) >= np.array([20, 3, 1, 11, 19])[:, None]] = 0
  ids, segments = tf.constant(ids, tf.int32), tf.constant(rng.integers(0, 2, [5, 20]), tf.int32)
  wanted = encoder.encode(bert, ids, segments)
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
  np.testing.assert_allclose(without, encoder.encode(bert, ids)["pooled_output"], atol=most)
