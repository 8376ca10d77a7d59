"""The token classifier that finds names.

REALM, section 3.4: "a BERT-based tagger trained on CoNLL-2003 data".
"""

import keras
from keras import ops

from realm_tf.models import encoder

OUTSIDE, BEGIN, INSIDE = range(3)  # bounds of names
NUM_BOUNDS = 3


@keras.saving.register_keras_serializable("realm_tf")
class Tagger(keras.Model):
  """BERT over `[CLS] sentence [SEP]` and a linear layer.

  The layer scores bounds and types of each word piece.

  Bounds are predicted separately from types because REALM needs spans: a name whose words look like
  different types is still one name. Segment ids mark capitalised words, because an uncased
  vocabulary loses capitals and a single sentence has no other use for segments.

  Args:
    architecture: architecture of the encoder (see `encoder.build_encoder`).
    num_types: T.
  """

  def __init__(self, *, architecture: dict, num_types: int, name: str = "tagger"):
    super().__init__(name=name)
    self._config = dict(architecture=dict(architecture), num_types=num_types)
    self.encoder = encoder.build_encoder(architecture, name="tagger_encoder")
    self.encoder.pooled_dense.trainable = False  # unused here
    self.dropout = keras.layers.Dropout(architecture["dropout"])
    self.head = keras.layers.Dense(NUM_BOUNDS + num_types, name="tags")
    ids = ops.zeros([1, 2], "int32")
    self({"token_ids": ids, "capitals": ids})

  def call(self, inputs, training: bool = False):
    """Logits of each word piece: first its bounds, then its types.

    Args:
      inputs: token_ids and capitals (1 if the word piece has a capital letter) [N, L] int32.
      training: whether dropout is on.

    Returns:
      [N, L, 3 + T] float32.
    """
    outputs = encoder.encode(
      self.encoder, inputs["token_ids"], inputs["capitals"], training=training
    )
    hidden = self.dropout(outputs["sequence_output"], training=training)
    return ops.cast(self.head(hidden), "float32")

  def get_config(self) -> dict:
    return dict(self._config)
