"""The masked reader p(y|z,x): the knowledge-augmented encoder. REALM, section 3.1."""

from typing import NamedTuple

import keras
import keras_hub
from keras import ops

from realm_tf.models import encoder


@keras.saving.register_keras_serializable("realm_tf")
class MaskedReader(keras.Model):
  """BERT over `[CLS] masked query [SEP] passage [SEP]` and a masked-LM head tied to its word embeddings.

  Args:
    architecture: of the encoder (see `encoder.build_encoder`).
    query_length, length: word pieces of the packed query and of the whole input.
    max_masks: M.
    copies: a masked word piece may also be copied from the passage (`Pointer`). The paper's reader has no such part; a small
      one learns with it much sooner to use what it reads.
  """

  def __init__(self, *, architecture: dict, query_length: int = 96, length: int = 384, max_masks: int = 10,
               copies: bool = False, name: str = "reader"):
    super().__init__(name=name)
    self._config = dict(
        architecture=dict(architecture), query_length=query_length, length=length, max_masks=max_masks, copies=copies)
    self.query_length, self.length, self.max_masks = query_length, length, max_masks
    self.encoder = encoder.build_encoder(architecture, name="reader_encoder")
    self.encoder.pooled_dense.trainable = False  # not read here
    self.head = keras_hub.layers.MaskedLMHead(
        token_embedding=self.encoder.token_embedding, layer_norm_epsilon=encoder.layer_norm_epsilon(architecture), dtype="float32",
        intermediate_activation=encoder.activation(architecture),
        kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02), name="mlm_head")
    self.pointer = Pointer(architecture["hidden_dim"], dtype="float32", name="pointer") if copies else None
    ids = ops.zeros([1, length], "int32")
    self({"token_ids": ids, "segment_ids": ids, "mask_positions": ops.zeros([1, max_masks], "int32")})

  def call(self, inputs, training: bool = False):
    """Vocabulary logits at the masked positions.

    Args:
      inputs: token_ids and segment_ids [N, L], mask_positions [N, M] (positions in the packed input).

    Returns:
      [N, M, V] float32; log-probabilities where the reader copies.
    """
    logits, copying = self._read(inputs, training)
    if copying is None:
      return logits
    token_ids, attention = inputs["token_ids"], copying.attention  # [N, L], [N, M, L]
    num, masks, _ = ops.shape(attention)
    rows = ops.reshape(ops.arange(num * masks), (num, masks, 1)) * logits.shape[-1]
    places = rows + ops.cast(ops.expand_dims(token_ids, 1), rows.dtype)  # [N, M, L], in [N * M * V]
    copied = ops.segment_sum(
      ops.reshape(attention, (-1,)), ops.reshape(places, (-1,)), num_segments=ops.size(logits))
    return copying.mix(ops.log_softmax(logits, axis=-1), ops.reshape(copied, ops.shape(logits)))

  def log_likelihoods(self, inputs, targets, training: bool = False):
    """log p of word pieces at the masked positions: targets [N, M] int32 → [N, M] float32; `inputs` as for a call."""
    inputs, targets = keras.tree.map_structure(ops.convert_to_tensor, (inputs, targets))
    logits, copying = self._read(inputs, training)
    found = target_log_probs(logits, targets)
    if copying is None:
      return found
    same = ops.expand_dims(inputs["token_ids"], 1) == ops.expand_dims(targets, -1)  # [N, M, L]
    copied = ops.sum(copying.attention * ops.cast(same, "float32"), axis=-1)
    return copying.mix(found, copied)

  def _read(self, inputs, training: bool):
    """Logits of the vocabulary [N, M, V], and what is copied."""
    hidden = encoder.encode(self.encoder, inputs["token_ids"], inputs["segment_ids"], training=training)["sequence_output"]
    positions = inputs["mask_positions"]
    logits = ops.cast(self.head(hidden, mask_positions=positions), "float32")
    if self.pointer is None:
      return logits, None
    return logits, self.pointer(hidden, positions, inputs["segment_ids"])

  def get_config(self) -> dict:
    return dict(self._config)


class Copying(NamedTuple):
  """How each masked word piece is made.

  Attributes:
    attention: [N, M, L] over the passage's word pieces, 0 elsewhere; its sum is 0 where there is no passage, else 1.
    log_copy, log_write: [N, M, 1] log-probabilities that it is copied, or written from the vocabulary.
  """

  attention: object
  log_copy: object
  log_write: object

  def mix(self, log_written, copied):
    """log p of some word pieces, from log p in the vocabulary and p among those copied, both [N, M] or [N, M, V]."""
    parts = self.log_copy, self.log_write
    if len(log_written.shape) == 2:
      parts = tuple(ops.squeeze(part, -1) for part in parts)
    return ops.logaddexp(parts[1] + log_written, parts[0] + ops.log(ops.maximum(copied, 1e-9)))


class Pointer(keras.layers.Layer):
  """Attention from masked positions to the passage's word pieces, and a gate between copying and writing.

  See et al. 2017, section 2.2.
  """

  def __init__(self, hidden_dim: int, **kwargs):
    super().__init__(**kwargs)
    self.hidden_dim = hidden_dim
    start = keras.initializers.TruncatedNormal(stddev=0.02)
    self.queries, self.keys = (
      keras.layers.Dense(hidden_dim, kernel_initializer=start, dtype="float32", name=name) for name in ("queries", "keys"))
    self.gate = keras.layers.Dense(1, kernel_initializer=start, dtype="float32", name="gate")

  def call(self, hidden, mask_positions, segment_ids) -> Copying:
    """hidden [N, L, H], mask_positions [N, M], segment_ids [N, L] → `Copying`."""
    hidden = ops.cast(hidden, "float32")
    masked = ops.take_along_axis(hidden, ops.expand_dims(mask_positions, -1), axis=1)  # [N, M, H]
    scores = ops.matmul(self.queries(masked), ops.transpose(self.keys(hidden), (0, 2, 1))) / self.hidden_dim**0.5
    inside = segment_ids * ops.pad(segment_ids[:, 1:], [[0, 0], [0, 1]])  # without the last [SEP]
    inside = ops.expand_dims(ops.cast(inside, "float32"), 1)  # [N, 1, L]
    attention = ops.softmax(scores + (1 - inside) * -1e9, axis=-1) * inside
    gate = self.gate(masked)  # [N, M, 1]
    empty = ops.max(inside, axis=-1, keepdims=True) == 0
    log_copy = ops.where(empty, -1e9, -ops.softplus(-gate))
    log_write = ops.where(empty, 0.0, -ops.softplus(gate))
    return Copying(attention, log_copy, log_write)


def target_log_probs(logits, targets):
  """log p of each target word piece: logits [N, M, V], targets [N, M] → [N, M]."""
  picked = ops.squeeze(ops.take_along_axis(logits, ops.expand_dims(targets, -1), axis=-1), -1)
  return picked - ops.logsumexp(logits, axis=-1)
