"""The span reader p(y|z,x) of Open-QA: a score for every short span of a passage. ORQA, section 3; REALM, section 3.1."""

import keras
from keras import ops

from realm_tf.models import encoder


@keras.saving.register_keras_serializable("realm_tf")
class SpanReader(keras.Model):
  """BERT over `[CLS] question [SEP] passage [SEP]`, then an MLP over [h_start; h_end] of every span.

  Args:
    architecture: of the encoder (see `encoder.build_encoder`).
    query_length, length: word pieces of the packed question and of the whole input.
    max_span: W, most word pieces of an answer.
    span_dim: width of the span MLP (256 as published).
    norm_epsilon: of its layer norm.
  """

  def __init__(self, *, architecture: dict, query_length: int = 64, length: int = 320, max_span: int = 10, span_dim: int = 256,
               norm_epsilon: float = 1e-3, name: str = "reader"):
    super().__init__(name=name)
    self._config = dict(architecture=dict(architecture), query_length=query_length, length=length, max_span=max_span,
                        span_dim=span_dim, norm_epsilon=norm_epsilon)
    self.query_length, self.length, self.max_span = query_length, length, max_span
    self.encoder = encoder.build_encoder(architecture, name="reader_encoder")
    self.encoder.pooled_dense.trainable = False  # not read here
    self.ends = keras.layers.Dense(2 * span_dim, name="span_ends")
    self.norm = keras.layers.LayerNormalization(epsilon=norm_epsilon, name="span_norm")
    self.score = keras.layers.Dense(1, name="span_score")
    ids = ops.zeros([1, length], "int32")
    self({"token_ids": ids, "segment_ids": ids})

  def call(self, inputs, training: bool = False):
    """Scores of all spans: token_ids and segment_ids [N, L] → [N, L, W] float32.

    Entry [n, i, w] is the span of word pieces i .. i + w of the packed input. The score of a span outside the passage is
    computed all the same: `span_mask` says which count.
    """
    hidden = encoder.encode(self.encoder, inputs["token_ids"], inputs["segment_ids"], training=training)["sequence_output"]
    start, end = ops.split(self.ends(hidden), 2, axis=-1)  # [N, L, S]
    padded = ops.pad(end, [[0, 0], [0, self.max_span - 1], [0, 0]])
    scores = [
        self.score(self.norm(ops.relu(start + padded[:, width:width + self.length])))  # [N, L, 1]
        for width in range(self.max_span)
    ]
    return ops.cast(ops.concatenate(scores, axis=-1), "float32")  # [N, L, W]

  def get_config(self) -> dict:
    return dict(self._config)


def span_mask(token_ids, segment_ids, *, sep_id: int, max_span: int):
  """1 for spans wholly inside the passage text: [N, L] ids → [N, L, W] float32."""
  inside = ops.cast(ops.logical_and(ops.equal(segment_ids, 1), ops.not_equal(token_ids, sep_id)), "float32")  # [N, L]
  length = inside.shape[1]
  padded = ops.pad(inside, [[0, 0], [0, max_span - 1]])
  ends = ops.stack([padded[:, width:width + length] for width in range(max_span)], axis=-1)  # [N, L, W]
  return ops.expand_dims(inside, -1) * ends
