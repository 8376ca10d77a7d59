"""KerasHub's BERT encoders of any size.

Activation and layer norms are those that published weights were trained with.
"""

from collections.abc import Callable, Mapping

import keras
import keras_hub
import numpy as np
from keras import ops

from realm_tf import errors
from realm_tf.models import devices

if keras.backend.backend() == "tensorflow":
  from realm_tf.models import fused

_PUBLISHED_STD = 0.02  # standard deviation of every BERT kernel and embedding
_SIZES = (
  "vocabulary_size",
  "num_layers",
  "num_heads",
  "hidden_dim",
  "intermediate_dim",
  "max_sequence_length",
  "dropout",
)


# The gradients below read their input fewer times than those of the ops that make up a GELU.


@ops.custom_gradient
def _gelu_tanh(x):
  """GELU of Google's BERT and of REALM: x P(x), with P(x) = (1 + tanh(a x + b x³)) / 2."""
  a = (2 / np.pi) ** 0.5
  b = 0.044715 * a

  def grad(*upstream):
    square = x * x
    curve = ops.tanh(x * (a + b * square))
    slope = x * (1 - curve * curve) * (0.5 * a + 1.5 * b * square)
    return upstream[0] * (0.5 + 0.5 * curve + slope)

  return keras.activations.gelu(x, approximate=True), grad


@ops.custom_gradient
def _gelu(x):
  """Hugging Face's "gelu", x Φ(x), in a form that TensorFlow fuses with the preceding product."""

  def grad(*upstream):
    density = ops.exp(-0.5 * x * x) * (2 * np.pi) ** -0.5
    return upstream[0] * (0.5 + 0.5 * ops.erf(x * 0.5**0.5) + x * density)

  return (0.5 * x) * (1 + ops.erf(x * 0.5**0.5)), grad


_ACTIVATIONS = {"gelu_tanh": _gelu_tanh, "gelu": _gelu}  # of the feed-forward layers


class EncoderError(errors.UserError):
  """The encoder does not fit the vocabulary or the requested lengths."""


def build_encoder(architecture: Mapping, *, name: str) -> keras_hub.models.BertBackbone:
  """Builds a BERT of this architecture with fresh weights.

  Args:
    architecture: vocabulary_size, num_layers, num_heads, hidden_dim, intermediate_dim,
      max_sequence_length, dropout; if they differ from BERT's, also activation ("gelu_tanh" or
      "gelu") and layer_norm_epsilon.
    name: name of the Keras model.
  """
  bert = keras_hub.models.BertBackbone(**{name: architecture[name] for name in _SIZES}, name=name)
  for layer in bert._flatten_layers():  # BertBackbone takes neither as an argument
    if isinstance(layer, keras.layers.LayerNormalization):
      layer.epsilon = layer_norm_epsilon(architecture)
    elif layer.name == "feedforward_intermediate_dense":
      layer.activation = activation(architecture)
  return bert


def activation(architecture: Mapping) -> Callable:
  """Activation of the feed-forward layers and the masked-LM head."""
  return _ACTIVATIONS[architecture.get("activation", "gelu_tanh")]


def layer_norm_epsilon(architecture: Mapping) -> float:
  """Epsilon of the encoder's layer norms, and of those that were trained with it."""
  return architecture.get("layer_norm_epsilon", 1e-12)


def rescale_fresh(encoder: keras_hub.models.BertBackbone, std: float) -> None:
  """Rescales fresh kernels and embeddings to another standard deviation.

  Position embeddings become sinusoids. BERT's 0.02 suits layers of width 768; a narrow encoder
  trained from scratch learns faster at first near 1 / sqrt(width).
  """
  for weight in encoder.weights:
    if len(weight.shape) > 1:
      weight.assign(ops.multiply(weight, std / _PUBLISHED_STD))
  table = encoder.position_embedding.position_embeddings
  length, width = table.shape
  angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, width, 2) / width)[None]
  waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, -1)[:, :width]
  table.assign(waves * std * np.sqrt(2))


def encode(encoder: keras.Model, token_ids, segment_ids=None, *, training: bool = False) -> dict:
  """Runs the encoder on zero-padded ids.

  On CPUs, TensorFlow runs it as `fused.encode`, unless there is dropout or low precision.

  Args:
    encoder: an encoder from `build_encoder`.
    token_ids: [N, L] int32.
    segment_ids: [N, L] int32; None means zeros.
    training: whether dropout is on.

  Returns:
    sequence_output [N, L, H], pooled_output [N, H].
  """
  if _can_be_fused(encoder, training):
    return fused.encode(encoder, token_ids, segment_ids)
  segment_ids = ops.zeros_like(token_ids) if segment_ids is None else segment_ids
  return encoder(
    {"token_ids": token_ids, "segment_ids": segment_ids, "padding_mask": padding_mask(token_ids)},
    training=training,
  )


def _can_be_fused(encoder: keras.Model, training: bool) -> bool:
  return (
    devices.are_tensorflow_cpus()
    and encoder.compute_dtype == "float32"
    and not (training and encoder.dropout)
  )


def padding_mask(token_ids):
  """Mask that is 1 at word pieces and 0 at padding: [N, L] int32.

  Padding is id 0 in every BERT vocabulary (`Tokenizer` checks this).
  """
  return ops.cast(ops.not_equal(token_ids, 0), "int32")
