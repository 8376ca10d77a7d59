"""Helpers that ask a servable in this process, and make the shared one."""

import numpy as np
import tensorflow as tf

from serving import signatures

NUM_ANSWERS = 4
NUM_CANDIDATES = 4
STEPS = 30  # of fine-tuning


def ask(model, name: str, texts) -> dict[str, np.ndarray]:
  """Sends one request; strings are decoded strictly, so bad UTF-8 fails."""
  (field,) = signatures.SIGNATURES[name].inputs
  outputs = model.signatures[name](**{field.name: tf.constant(texts, tf.string)})

  def decode(value):
    return np.array([text.decode() for text in value.ravel()], dtype=object).reshape(value.shape)

  return {
    key: decode(value.numpy()) if value.dtype == tf.string else value.numpy()
    for key, value in outputs.items()
  }


def joined(parts) -> dict[str, np.ndarray]:
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
