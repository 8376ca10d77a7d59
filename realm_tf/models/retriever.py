"""The retriever: f(x, z) = Embed_input(x)ᵀ Embed_doc(z). REALM, section 3.1; ORQA, section 3."""

import functools
from collections.abc import Callable

import keras
from keras import ops

from realm_tf.models import encoder, lengths


@keras.saving.register_keras_serializable("realm_tf")
class Retriever(keras.Model):
  """Query tower and passage tower, each an encoder → pooled vector → Dense(D) → LayerNorm.

  Args:
    architecture: architecture of the encoder (see `encoder.build_encoder`).
    projection_dim: D.
    query_length, passage_length: word pieces of packed queries and passages.
    title_length: most word pieces of a passage's title that are packed; None means half of the
      passage.
    pooling: "cls" (the pooled [CLS] output, as published) or "mean" (over word pieces, as sentence
      encoders are trained).
    shared: whether both sides share one tower (as published) or have one each.
    segments: whether segment ids distinguish a passage's title from its text, as published.
      Sentence encoders were trained without segments, and retrieve worse with them.
    dropout: dropout rate of embeddings in training.
    scale: initial gain of LayerNorm; 1 as published. At first, f(x, z) is at most D * scale**2.
    norm_epsilon: epsilon of the projection's LayerNorm; None means the encoder's.
  """

  def __init__(
    self,
    *,
    architecture: dict,
    projection_dim: int = 128,
    query_length: int = 96,
    passage_length: int = 288,
    title_length: int | None = None,
    pooling: str = "cls",
    shared: bool = True,
    segments: bool = True,
    dropout: float = 0.1,
    scale: float = 1.0,
    norm_epsilon: float | None = None,
    name: str = "retriever",
  ):
    super().__init__(name=name)
    if pooling not in ("cls", "mean"):
      raise ValueError(f"pooling is {pooling!r}; use 'cls' or 'mean'.")
    self._config = dict(
      architecture=dict(architecture),
      projection_dim=projection_dim,
      query_length=query_length,
      passage_length=passage_length,
      title_length=title_length,
      pooling=pooling,
      shared=shared,
      segments=segments,
      dropout=dropout,
      scale=scale,
      norm_epsilon=norm_epsilon,
    )
    self.dim, self.pooling = projection_dim, pooling
    self.query_length, self.passage_length, self.title_length = (
      query_length,
      passage_length,
      title_length,
    )
    self.query_tower = Tower(self._config, name="query_tower")
    self.passage_tower = self.query_tower if shared else Tower(self._config, name="passage_tower")
    self.built = True  # because the towers are

  @property
  def towers(self) -> list["Tower"]:
    """The distinct towers."""
    return [self.query_tower] if self._config["shared"] else [self.query_tower, self.passage_tower]

  def embed_queries(self, token_ids, *, training: bool = False, static: bool = True):
    """Embeds packed queries [N, Lq] as [N, D] float32; `static` is as in `lengths.by_length`."""
    return _embed(self.query_tower, {"token_ids": token_ids}, training=training, static=static)

  def embed_passages(self, token_ids, segment_ids, *, training: bool = False, static: bool = True):
    """Embeds packed passages [N, Lp] as [N, D] float32; `static` is as in `lengths.by_length`."""
    packed = {"token_ids": token_ids, "segment_ids": segment_ids}
    return _embed(self.passage_tower, packed, training=training, static=static)

  def call(self, inputs, training: bool = False, static: bool = True):
    """Embeds `query_ids`, `passage_ids`, `passage_segments` as `queries`, `passages` [B, D]."""
    how = {"training": training, "static": static}
    return {
      "queries": self.embed_queries(inputs["query_ids"], **how),
      "passages": self.embed_passages(inputs["passage_ids"], inputs["passage_segments"], **how),
    }

  def get_config(self) -> dict:
    return dict(self._config)


def _embed(tower: "Tower", packed: dict, *, training: bool, static: bool):
  def embed(**group):
    return tower(*group.values(), training=training)

  return lengths.by_length(embed, packed, static=static)


class Tower(keras.Model):
  """One side of the retriever: packed ids [N, L] int32 → vectors [N, D] float32."""

  def __init__(self, config: dict, *, name: str):
    super().__init__(name=name)
    self.pooling, self.segments = config["pooling"], config["segments"]
    self.encoder = encoder.build_encoder(config["architecture"], name=f"{name}_encoder")
    if self.pooling == "mean":
      self.encoder.pooled_dense.trainable = False  # unused here
    # An orthogonal projection initially preserves the angles of pre-trained vectors.
    self.projection = keras.layers.Dense(
      config["projection_dim"], kernel_initializer="orthogonal", name="projection"
    )
    self.norm = keras.layers.LayerNormalization(
      epsilon=config["norm_epsilon"] or encoder.layer_norm_epsilon(config["architecture"]),
      gamma_initializer=keras.initializers.Constant(config["scale"]),
      dtype="float32",
      name="norm",
    )
    self.dropout = keras.layers.Dropout(config["dropout"], name="dropout")
    self.projection.build([None, config["architecture"]["hidden_dim"]])
    self.norm.build([None, config["projection_dim"]])
    self.built = True

  def call(self, token_ids, segment_ids=None, training: bool = False):
    encode = functools.partial(encoder.encode, training=training)
    return self.embed(encode, token_ids, segment_ids, training=training)

  def embed(self, encode: Callable, token_ids, segment_ids=None, *, training: bool = False):
    """Embeds packed ids as [N, D] float32; `encode` runs the encoder as `encoder.encode` does."""
    outputs = encode(self.encoder, token_ids, segment_ids if self.segments else None)
    if self.pooling == "cls":
      pooled = outputs["pooled_output"]
    else:
      mask = ops.expand_dims(
        ops.cast(encoder.padding_mask(token_ids), outputs["sequence_output"].dtype), -1
      )  # [N, L, 1]
      pooled = ops.sum(outputs["sequence_output"] * mask, axis=1) / ops.maximum(
        ops.sum(mask, axis=1), 1
      )
    return ops.cast(
      self.dropout(self.norm(self.projection(pooled)), training=training), "float32"
    )  # [N, D]
