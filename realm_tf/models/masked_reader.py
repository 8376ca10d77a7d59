"""The masked reader p(y|z,x): the knowledge-augmented encoder. REALM, section 3.1."""

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
  """

  def __init__(self, *, architecture: dict, query_length: int = 96, length: int = 384, max_masks: int = 10,
               name: str = "reader"):
    super().__init__(name=name)
    self._config = dict(architecture=dict(architecture), query_length=query_length, length=length, max_masks=max_masks)
    self.query_length, self.length, self.max_masks = query_length, length, max_masks
    self.encoder = encoder.build_encoder(architecture, name="reader_encoder")
    self.encoder.pooled_dense.trainable = False  # not read here
    self.head = keras_hub.layers.MaskedLMHead(
        token_embedding=self.encoder.token_embedding, layer_norm_epsilon=encoder.layer_norm_epsilon(architecture), dtype="float32",
        intermediate_activation=encoder.activation(architecture),
        kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02), name="mlm_head")
    ids = ops.zeros([1, length], "int32")
    self({"token_ids": ids, "segment_ids": ids, "mask_positions": ops.zeros([1, max_masks], "int32")})

  def call(self, inputs, training: bool = False):
    """Vocabulary logits at the masked positions.

    Args:
      inputs: token_ids and segment_ids [N, L], mask_positions [N, M] (positions in the packed input).

    Returns:
      [N, M, V] float32.
    """
    outputs = encoder.encode(self.encoder, inputs["token_ids"], inputs["segment_ids"], training=training)
    return ops.cast(self.head(outputs["sequence_output"], mask_positions=inputs["mask_positions"]), "float32")

  def get_config(self) -> dict:
    return dict(self._config)


def target_log_probs(logits, targets):
  """log p of each target word piece: logits [N, M, V], targets [N, M] → [N, M]."""
  picked = ops.squeeze(ops.take_along_axis(logits, ops.expand_dims(targets, -1), axis=-1), -1)
  return picked - ops.logsumexp(logits, axis=-1)
