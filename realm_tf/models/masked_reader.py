"""The masked reader p(y|z,x): the knowledge-augmented encoder. REALM, section 3.1."""

from typing import NamedTuple

import keras
import keras_hub
from keras import ops

from realm_tf.models import encoder, lengths
from realm_tf.models.equations import NEVER


@keras.saving.register_keras_serializable("realm_tf")
class MaskedReader(keras.Model):
  """BERT over `[CLS] masked query [SEP] passage [SEP]` and a masked-LM head.

  The head is tied to BERT's word embeddings.

  Args:
    architecture: architecture of the encoder (see `encoder.build_encoder`).
    query_length, length: word pieces of the packed query and of the whole input.
    max_masks: M, most masked word pieces.
    copies: whether a masked word piece may also be copied from the passage (`Pointer`). The paper's
      reader cannot copy; with it, a small reader learns much sooner to use what it reads.
  """

  def __init__(
    self,
    *,
    architecture: dict,
    query_length: int = 96,
    length: int = 384,
    max_masks: int = 10,
    copies: bool = False,
    name: str = "reader",
  ):
    super().__init__(name=name)
    self._config = dict(
      architecture=dict(architecture),
      query_length=query_length,
      length=length,
      max_masks=max_masks,
      copies=copies,
    )
    self.query_length, self.length, self.max_masks = query_length, length, max_masks
    self.encoder = encoder.build_encoder(architecture, name="reader_encoder")
    self.encoder.pooled_dense.trainable = False  # unused here
    self.head = keras_hub.layers.MaskedLMHead(
      token_embedding=self.encoder.token_embedding,
      layer_norm_epsilon=encoder.layer_norm_epsilon(architecture),
      dtype="float32",
      intermediate_activation=encoder.activation(architecture),
      kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
      name="mlm_head",
    )
    self.pointer = (
      Pointer(architecture["hidden_dim"], dtype="float32", name="pointer") if copies else None
    )
    shape = [None, length, architecture["hidden_dim"]]
    self.head.build(shape)
    if self.pointer is not None:
      self.pointer.build(shape)
    self.built = True

  def call(self, inputs, training: bool = False):
    """Vocabulary logits at the masked positions.

    Args:
      inputs: token_ids and segment_ids [N, L], mask_positions [N, M] (positions in the packed
        input).
      training: whether dropout is on.

    Returns:
      [N, M, V] float32; log-probabilities if the reader copies.
    """
    token_ids, segment_ids = inputs["token_ids"], inputs["segment_ids"]
    hidden = self._encode(token_ids, segment_ids, training)
    logits = self._logits(hidden, inputs["mask_positions"])
    if self.pointer is None:
      return logits
    attention, gate = self.pointer(hidden, inputs["mask_positions"], segment_ids)  # [N, M, L]
    num, masks, _ = ops.shape(attention)
    rows = ops.reshape(ops.arange(num * masks), (num, masks, 1)) * logits.shape[-1]
    places = rows + ops.cast(ops.expand_dims(token_ids, 1), rows.dtype)  # [N, M, L], in [N * M * V]
    copied = ops.segment_sum(
      ops.reshape(attention, (-1,)), ops.reshape(places, (-1,)), num_segments=ops.size(logits)
    )
    return gate.mix(ops.log_softmax(logits, axis=-1), ops.reshape(copied, ops.shape(logits)))

  def log_likelihoods(self, inputs, targets, *, training: bool = False, static: bool = True):
    """log p of the target word pieces at the masked positions.

    Args:
      inputs: as in `call`.
      targets: [N, M] int32; 0 where a row has fewer masked word pieces.
      training: whether dropout is on.
      static: as in `lengths.by_length`.

    Returns:
      [N, M] float32; values where targets are 0 have no meaning.
    """
    inputs, targets = keras.tree.map_structure(ops.convert_to_tensor, (inputs, targets))
    sequences = {name: inputs[name] for name in ("token_ids", "segment_ids")}

    def read(token_ids, segment_ids, mask_positions, targets):
      hidden = self._encode(token_ids, segment_ids, training)
      at = ops.expand_dims(mask_positions, -1)
      masked = ops.take_along_axis(hidden, at, axis=1)  # [n, M, H]
      if self.pointer is None:
        return (masked,)
      attention, gate = self.pointer(hidden, mask_positions, segment_ids)
      same = ops.expand_dims(token_ids, 1) == ops.expand_dims(targets, -1)  # [n, M, L]
      return masked, ops.sum(attention * ops.cast(same, "float32"), axis=-1), gate

    rows = {"mask_positions": inputs["mask_positions"], "targets": targets}
    # The head runs once for all: its gradient is as large as the vocabulary.
    masked, *copied_and_gate = lengths.by_length(read, sequences, rows, static=static)
    written = self._log_written(masked, targets, static=static)
    if self.pointer is None:
      return written
    copied, gate = copied_and_gate
    return gate.mix(written, copied)

  def _log_written(self, masked, targets, *, static: bool):
    """log p in the vocabulary: masked [N, M, H]; targets [N, M] → [N, M] float32.

    Unless shapes are static, the head sees only the masks in use; the others get 0.
    """
    wanted, rows = ops.reshape(targets, (-1,)), ops.reshape(masked, (-1, masked.shape[-1]))
    if static or keras.backend.backend() != "tensorflow":
      return ops.reshape(self._log_probs(rows, wanted), ops.shape(targets))
    (used,) = ops.nonzero(wanted)  # [K], of N * M
    log_probs = self._log_probs(ops.take(rows, used, axis=0), ops.take(wanted, used))  # [K]
    return ops.reshape(
      ops.scatter(ops.expand_dims(used, 1), log_probs, ops.shape(wanted)), ops.shape(targets)
    )

  def _log_probs(self, hidden, targets):
    """log p of one word piece at each masked position: hidden [K, H], targets [K] → [K]."""
    logits = self._logits(ops.expand_dims(hidden, 1), ops.zeros_like(targets)[:, None])  # [K, 1, V]
    return target_log_probs(logits, ops.expand_dims(targets, 1))[:, 0]

  def _encode(self, token_ids, segment_ids, training: bool):
    """Encodes ids [N, L] int32 as vectors [N, L, H]."""
    outputs = encoder.encode(self.encoder, token_ids, segment_ids, training=training)
    return outputs["sequence_output"]

  def _logits(self, hidden, positions):
    """Vocabulary logits: hidden [N, L, H], positions [N, M] → [N, M, V] float32."""
    return ops.cast(self.head(hidden, mask_positions=positions), "float32")

  def get_config(self) -> dict:
    return dict(self._config)


class Gate(NamedTuple):
  """Log-probabilities that a masked word piece is copied, or written from the vocabulary.

  Attributes:
    log_copy, log_write: [N, M, 1].
  """

  log_copy: object
  log_write: object

  def mix(self, log_written, copied):
    """log p of word pieces, from their log p in the vocabulary and their p among copied ones.

    Both are [N, M] or [N, M, V].
    """
    parts = self.log_copy, self.log_write
    if len(log_written.shape) == 2:
      parts = tuple(ops.squeeze(part, -1) for part in parts)
    return ops.logaddexp(parts[1] + log_written, parts[0] + ops.log(ops.maximum(copied, 1e-9)))


class Pointer(keras.layers.Layer):
  """Attention from masked positions to the passage's word pieces, and a gate.

  The gate chooses between copying and writing (See et al. 2017, section 2.2).
  """

  def __init__(self, hidden_dim: int, **kwargs):
    super().__init__(**kwargs)
    self.hidden_dim = hidden_dim
    start = keras.initializers.TruncatedNormal(stddev=0.02)
    self.queries, self.keys = (
      keras.layers.Dense(hidden_dim, kernel_initializer=start, dtype="float32", name=name)
      for name in ("queries", "keys")
    )
    self.gate = keras.layers.Dense(1, kernel_initializer=start, dtype="float32", name="gate")

  def build(self, hidden_shape, mask_positions_shape=None, segment_ids_shape=None):
    for layer in (self.queries, self.keys, self.gate):
      layer.build(hidden_shape)

  def call(self, hidden, mask_positions, segment_ids):
    """Maps hidden [N, L, H], mask_positions [N, M] and segment_ids [N, L] to attention and `Gate`.

    Attention [N, M, L] is over the passage's word pieces, and 0 elsewhere. Its sum is 0 if there is
    no passage, else 1.
    """
    hidden = ops.cast(hidden, "float32")
    masked = ops.take_along_axis(hidden, ops.expand_dims(mask_positions, -1), axis=1)  # [N, M, H]
    scores = (
      ops.matmul(self.queries(masked), ops.transpose(self.keys(hidden), (0, 2, 1)))
      / self.hidden_dim**0.5
    )
    inside = segment_ids * ops.pad(segment_ids[:, 1:], [[0, 0], [0, 1]])  # without the last [SEP]
    inside = ops.expand_dims(ops.cast(inside, "float32"), 1)  # [N, 1, L]
    attention = ops.softmax(scores + (1 - inside) * NEVER, axis=-1) * inside
    gate = self.gate(masked)  # [N, M, 1]
    empty = ops.max(inside, axis=-1, keepdims=True) == 0
    log_copy = ops.where(empty, NEVER, -ops.softplus(-gate))
    log_write = ops.where(empty, 0.0, -ops.softplus(gate))
    return attention, Gate(log_copy, log_write)


def target_log_probs(logits, targets):
  """log p of each target word piece: logits [N, M, V], targets [N, M] → [N, M]."""
  picked = ops.squeeze(ops.take_along_axis(logits, ops.expand_dims(targets, -1), axis=-1), -1)
  return picked - ops.logsumexp(logits, axis=-1)
