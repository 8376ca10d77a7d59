"""The retriever: f(x, z) = Embed_input(x)ᵀ Embed_doc(z). REALM, section 3.1; ORQA, section 3."""

import keras
from keras import ops

from realm_tf.models import encoder


@keras.saving.register_keras_serializable("realm_tf")
class Retriever(keras.Model):
  """Query tower and passage tower, each encoder → pooled vector → Dense(D) → LayerNorm.

  Args:
    architecture: of the encoder (see `encoder.build_encoder`).
    projection_dim: D.
    query_length, passage_length: word pieces of packed queries and passages.
    title_length: most word pieces of a passage's title that are packed; None: half of the passage.
    pooling: "cls" (the pooled [CLS] output, as published) or "mean" (over word pieces, as sentence encoders are trained).
    shared: one tower for both sides (as published), or two.
    dropout: of embeddings while training.
    scale: LayerNorm's first gain; 1 as published. f(x, z) is at most D * scale**2 then.
    norm_epsilon: of the projection's LayerNorm; None: the encoder's.
  """

  def __init__(self, *, architecture: dict, projection_dim: int = 128, query_length: int = 96, passage_length: int = 288,
               title_length: int | None = None, pooling: str = "cls", shared: bool = True, dropout: float = 0.1, scale: float = 1.0,
               norm_epsilon: float | None = None, name: str = "retriever"):
    super().__init__(name=name)
    if pooling not in ("cls", "mean"):
      raise ValueError(f"pooling is {pooling!r}; use 'cls' or 'mean'.")
    self._config = dict(
        architecture=dict(architecture), projection_dim=projection_dim, query_length=query_length,
        passage_length=passage_length, title_length=title_length, pooling=pooling, shared=shared, dropout=dropout, scale=scale,
        norm_epsilon=norm_epsilon)
    self.dim, self.pooling = projection_dim, pooling
    self.query_length, self.passage_length, self.title_length = query_length, passage_length, title_length
    self.query_tower = Tower(self._config, name="query_tower")
    self.passage_tower = self.query_tower if shared else Tower(self._config, name="passage_tower")
    self.embed_queries(ops.zeros([1, query_length], "int32"))
    self.embed_passages(*[ops.zeros([1, passage_length], "int32")] * 2)
    self.built = True

  @property
  def towers(self) -> list["Tower"]:
    """The distinct towers."""
    return [self.query_tower] if self._config["shared"] else [self.query_tower, self.passage_tower]

  def embed_queries(self, token_ids, *, training: bool = False):
    """Packed queries [N, Lq] int32 to vectors [N, D] float32."""
    return self.query_tower(token_ids, training=training)

  def embed_passages(self, token_ids, segment_ids, *, training: bool = False):
    """Packed passages [N, Lp] int32 to vectors [N, D] float32."""
    return self.passage_tower(token_ids, segment_ids, training=training)

  def call(self, inputs, training: bool = False):
    """`query_ids`, `passage_ids`, `passage_segments` to `queries` [B, D] and `passages` [B, D]."""
    return {
        "queries": self.embed_queries(inputs["query_ids"], training=training),
        "passages": self.embed_passages(inputs["passage_ids"], inputs["passage_segments"], training=training),
    }

  def get_config(self) -> dict:
    return dict(self._config)


class Tower(keras.Model):
  """One side of the retriever: packed ids [N, L] int32 to vectors [N, D] float32."""

  def __init__(self, config: dict, *, name: str):
    super().__init__(name=name)
    self.pooling = config["pooling"]
    self.encoder = encoder.build_encoder(config["architecture"], name=f"{name}_encoder")
    if self.pooling == "mean":
      self.encoder.pooled_dense.trainable = False  # not read here
    # Orthogonal: a projection of pre-trained vectors starts out keeping their angles.
    self.projection = keras.layers.Dense(config["projection_dim"], kernel_initializer="orthogonal", name="projection")
    self.norm = keras.layers.LayerNormalization(
        epsilon=config["norm_epsilon"] or encoder.layer_norm_epsilon(config["architecture"]), gamma_initializer=keras.initializers.Constant(config["scale"]),
        dtype="float32", name="norm")
    self.dropout = keras.layers.Dropout(config["dropout"], name="dropout")

  def call(self, token_ids, segment_ids=None, training: bool = False):
    outputs = encoder.encode(self.encoder, token_ids, segment_ids, training=training)
    if self.pooling == "cls":
      pooled = outputs["pooled_output"]
    else:
      mask = ops.expand_dims(ops.cast(encoder.padding_mask(token_ids), outputs["sequence_output"].dtype), -1)  # [N, L, 1]
      pooled = ops.sum(outputs["sequence_output"] * mask, axis=1) / ops.maximum(ops.sum(mask, axis=1), 1)
    return ops.cast(self.dropout(self.norm(self.projection(pooled)), training=training), "float32")  # [N, D]
