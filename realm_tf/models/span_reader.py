"""The span reader p(y|z,x) of Open-QA: a score for every short span of a passage.

ORQA, section 3; REALM, section 3.1.
"""

import keras
import numpy as np
from keras import ops

from realm_tf.models import encoder

_LOWEST = float(np.finfo(np.float32).min)  # a score below all others


@keras.saving.register_keras_serializable("realm_tf")
class SpanReader(keras.Model):
  """BERT over `[CLS] question [SEP] passage [SEP]`, then an MLP over every span.

  The MLP reads [h_start; h_end] of the span.

  Args:
    architecture: architecture of the encoder (see `encoder.build_encoder`).
    query_length, length: word pieces of the packed question and of the whole input.
    max_span: W, most word pieces of an answer.
    span_dim: width of the span MLP (256 as published).
    norm_epsilon: epsilon of its layer norm.
  """

  def __init__(
    self,
    *,
    architecture: dict,
    query_length: int = 64,
    length: int = 320,
    max_span: int = 10,
    span_dim: int = 256,
    norm_epsilon: float = 1e-3,
    name: str = "reader",
  ):
    super().__init__(name=name)
    self._config = dict(
      architecture=dict(architecture),
      query_length=query_length,
      length=length,
      max_span=max_span,
      span_dim=span_dim,
      norm_epsilon=norm_epsilon,
    )
    self.query_length, self.length, self.max_span = query_length, length, max_span
    self.encoder = encoder.build_encoder(architecture, name="reader_encoder")
    self.encoder.pooled_dense.trainable = False  # unused here
    self.ends = keras.layers.Dense(2 * span_dim, name="span_ends")
    self.norm = keras.layers.LayerNormalization(epsilon=norm_epsilon, name="span_norm")
    self.score = keras.layers.Dense(1, name="span_score")
    self.ends.build([None, length, architecture["hidden_dim"]])
    for layer in (self.norm, self.score):
      layer.build([None, length, span_dim])
    self.built = True

  def call(self, inputs, training: bool = False):
    """Scores all spans: token_ids and segment_ids [N, L] → [N, L, W] float32.

    Entry [n, i, w] is the span of word pieces i .. i + w of the packed input. Spans outside the
    passage are scored too; `span_mask` marks those that count.
    """
    hidden = encoder.encode(
      self.encoder, inputs["token_ids"], inputs["segment_ids"], training=training
    )["sequence_output"]
    start, end = ops.split(self.ends(hidden), 2, axis=-1)  # [N, L, S]
    padded = ops.pad(end, [[0, 0], [0, self.max_span - 1], [0, 0]])
    scores = [
      self.score(self.norm(ops.relu(start + padded[:, width : width + self.length])))  # [N, L, 1]
      for width in range(self.max_span)
    ]
    return ops.cast(ops.concatenate(scores, axis=-1), "float32")  # [N, L, W]

  def get_config(self) -> dict:
    return dict(self._config)


def span_mask(token_ids, segment_ids, *, sep_id: int, max_span: int):
  """Mask that is 1 for spans entirely inside the passage text: [N, L] ids → [N, L, W] float32."""
  inside = ops.cast(
    ops.logical_and(ops.equal(segment_ids, 1), ops.not_equal(token_ids, sep_id)), "float32"
  )  # [N, L]
  return ops.expand_dims(inside, -1) * windows(inside, max_span=max_span)


def whole_word_mask(continues, *, max_span: int):
  """Mask of spans that neither begin nor end inside a word.

  Args:
    continues: [N, L] bool, whether a word piece continues a word.
    max_span: W, most word pieces of a span.

  Returns:
    [N, L, W] bool.
  """
  next_continues = ops.pad(continues[:, 1:], [[0, 0], [0, 1]])  # continued by the next piece
  goes_on = windows(next_continues, max_span=max_span)
  return ops.logical_not(ops.logical_or(ops.expand_dims(continues, -1), goes_on))


def windows(values, *, max_span: int):
  """Values at the last word piece of each span: [N, L] → [N, L, W].

  Entry [n, i, w] is values[n, i + w], 0 beyond the end.
  """
  length = values.shape[1]
  padded = ops.pad(values, [[0, 0], [0, max_span - 1]])
  return ops.stack([padded[:, width : width + length] for width in range(max_span)], axis=-1)


def best_span(scores, allowed):
  """Returns the best span; the first of several equal ones.

  Args:
    scores: [.., S] scores of the spans.
    allowed: [.., S] bool, which spans may be chosen.

  Returns:
    [..] int32, the span's number among the S; 0 if none may be chosen.
  """
  return ops.argmax(ops.where(allowed, scores, _LOWEST), axis=-1)
