"""BERT encoders from KerasHub: a fresh one of any size, or a published one."""

from collections.abc import Mapping

import keras
import keras_hub
import numpy as np
from keras import ops

from realm_tf import artifacts

_PUBLISHED_STD = 0.02  # of every BERT kernel and embedding
_ARCHITECTURE = ("vocabulary_size", "num_layers", "num_heads", "hidden_dim", "intermediate_dim", "max_sequence_length", "dropout")


class EncoderError(artifacts.UserError):
  """An encoder that does not fit the vocabulary or the lengths it is asked for."""


def build_encoder(architecture: Mapping, *, name: str) -> keras_hub.models.BertBackbone:
  """A BERT of this architecture with fresh weights.

  Args:
    architecture: vocabulary_size, num_layers, num_heads, hidden_dim, intermediate_dim, max_sequence_length, dropout.
    name: of the Keras model.
  """
  return keras_hub.models.BertBackbone(**architecture, name=name)


def load_preset(preset: str) -> keras_hub.models.BertBackbone:
  """A published encoder: a KerasHub preset name or handle, or a folder with Hugging Face's or KerasHub's files."""
  return keras_hub.models.BertBackbone.from_preset(preset)


def architecture_of(encoder: keras_hub.models.BertBackbone) -> dict:
  """What `build_encoder` takes to make one like it."""
  return {name: getattr(encoder, name) for name in _ARCHITECTURE}


def rescale_fresh(encoder: keras_hub.models.BertBackbone, std: float) -> None:
  """Gives fresh kernels and embeddings another standard deviation, and positions the shape of sinusoids.

  BERT's 0.02 suits 768 wide layers; a narrow encoder trained from scratch starts faster near 1 / sqrt(width).
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

  Args:
    token_ids: [N, L] int32.
    segment_ids: [N, L] int32; zeros when absent.

  Returns:
    sequence_output [N, L, H], pooled_output [N, H].
  """
  segment_ids = ops.zeros_like(token_ids) if segment_ids is None else segment_ids
  return encoder({"token_ids": token_ids, "segment_ids": segment_ids, "padding_mask": padding_mask(token_ids)}, training=training)


def padding_mask(token_ids):
  """1 where there is a word piece: [N, L] int32. Padding is id 0 in every BERT vocabulary (`Tokenizer` checks it)."""
  return ops.cast(ops.not_equal(token_ids, 0), "int32")
