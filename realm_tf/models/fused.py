"""BERT's forward pass on CPUs, without dropout: the same weights in fewer, larger operations.

In a graph, TensorFlow fuses a product, its bias and GELU into one oneDNN operation if they follow
each other as they do here. oneDNN multiplies bfloat16 in the processor's matrix units if it has
them. Layer norms and the residual stream stay float32.
"""

import keras
import tensorflow as tf

_NEVER = -1e4  # attention to padding; bfloat16 holds it


def encode(bert, token_ids: tf.Tensor, segment_ids: tf.Tensor | None = None, *, dtype="float32"):
  """Runs an encoder without dropout.

  Args:
    bert: an encoder from `encoder.build_encoder`.
    token_ids: [N, L] int32, zero-padded.
    segment_ids: [N, L] int32; None means zeros.
    dtype: dtype of the products, "float32" or "bfloat16".

  Returns:
    sequence_output [N, L, H] and pooled_output [N, H], float32.
  """
  segment_ids = tf.zeros_like(token_ids) if segment_ids is None else segment_ids
  num, length = (
    known or found
    for known, found in zip(token_ids.shape, tf.unstack(tf.shape(token_ids)), strict=True)
  )
  x = bert.get_layer("token_embedding")(token_ids)
  x += bert.get_layer("segment_embedding")(segment_ids)
  x += bert.position_embedding.position_embeddings[:length]
  x = bert.get_layer("embeddings_layer_norm")(x)  # [N, L, H]
  hidden = x.shape[-1]
  x = tf.reshape(x, (-1, hidden))  # [N * L, H]: a bias fuses with matrix products only
  padding = tf.cast(token_ids == 0, dtype)[:, None, None, :] * tf.cast(_NEVER, dtype)
  for number in range(bert.num_layers):
    layer = bert.get_layer(f"transformer_layer_{number}")
    read = _attend(layer._self_attention_layer, tf.cast(x, dtype), padding, num, length)
    x = layer._self_attention_layer_norm(x + tf.cast(read, "float32"))
    wide = _dense(layer._feedforward_intermediate_dense, tf.cast(x, dtype))
    narrow = _dense(layer._feedforward_output_dense, wide)
    x = layer._feedforward_layer_norm(x + tf.cast(narrow, "float32"))
  x = tf.reshape(x, (num, length, hidden))
  return {"sequence_output": x, "pooled_output": bert.pooled_dense(x[:, 0])}


def _attend(attention, x, padding, num, length):
  """Self-attention: x [N * L, H], padding [N, 1, 1, L] → [N * L, H]."""
  hidden = x.shape[-1]
  heads = attention._query_dense.kernel.shape[1]
  parts = (attention._query_dense, attention._key_dense, attention._value_dense)
  kernel = tf.concat([tf.reshape(part.kernel, (hidden, hidden)) for part in parts], axis=1)
  bias = tf.concat([tf.reshape(part.bias, (hidden,)) for part in parts], axis=0)
  split = tf.reshape(_affine(x, kernel, bias), (num, length, 3, heads, hidden // heads))
  query, key, value = tf.unstack(tf.transpose(split, (2, 0, 3, 1, 4)))  # [N, heads, L, H / heads]
  scale = tf.cast((hidden // heads) ** -0.5, x.dtype)
  weights = tf.nn.softmax(tf.matmul(query * scale, key, transpose_b=True) + padding)
  read = tf.reshape(tf.transpose(tf.matmul(weights, value), (0, 2, 1, 3)), (-1, hidden))
  output = attention._output_dense
  return _affine(read, tf.reshape(output.kernel, (hidden, hidden)), output.bias)


def _dense(layer: keras.layers.Dense, x):
  """A Dense layer on [N * L, H] in the dtype of x."""
  return layer.activation(_affine(x, layer.kernel, layer.bias))


def _affine(x, kernel, bias):
  return tf.nn.bias_add(tf.matmul(x, tf.cast(kernel, x.dtype)), tf.cast(bias, x.dtype))
