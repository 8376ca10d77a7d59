"""Tiny random REALM models in the format of the 2020 release.

Their outputs come from BERT in plain TensorFlow 1 graphs.

This module shares no code with realm_tf, so that models imported from these files can be compared
number by number.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1

# Each hub.Module around another one adds a "module/" to its variables' names; loading the embedder
# to fine-tune it adds one more.
EMBEDDER_SCOPE = "module/module"
FINE_TUNED_EMBEDDER_SCOPE = "module/" + EMBEDDER_SCOPE
INPUTS = ("input_ids", "input_mask", "segment_ids")


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of all models here.

  Attributes:
    vocab, positions: rows of the embedding tables.
    hidden, layers, heads, intermediate: of the BERTs.
    projection: of the retriever's embeddings.
    span: width of the reader's hidden layer.
    keras_norm: whether the embedder's norm is Keras' (ORQA's modules) or BERT's own (REALM's).
  """

  vocab: int
  hidden: int = 16
  layers: int = 2
  heads: int = 4
  intermediate: int = 32
  positions: int = 48
  projection: int = 8
  span: int = 6
  keras_norm: bool = False


def write_embedder_module(folder: str, pieces: Sequence[str], sizes: Sizes, *, seed: int) -> None:
  """Writes a TF1 Hub module with the signatures `projected` and `tokenization_info`.

  Args:
    folder: new.
    pieces: sizes.vocab word pieces.
    sizes: of the embedder.
    seed: of all weights.
  """

  def build(training: bool) -> dict:
    inputs = _placeholders(INPUTS)
    embedding = _embedder(inputs, sizes, EMBEDDER_SCOPE, training=training)
    return {"projected": (inputs, {"default": embedding})}

  _write_module(folder, pieces, build, seed=seed)


def write_bert_module(folder: str, pieces: Sequence[str], sizes: Sizes, *, seed: int) -> None:
  """Writes a TF1 Hub module with the signatures `tokens`, `mlm` and `tokenization_info`.

  The arguments are those of `write_embedder_module`.
  """

  def build(training: bool) -> dict:
    inputs, masked = _placeholders(INPUTS), _placeholders(["mlm_positions"])
    outputs = _bert(inputs, sizes, training=training, **masked)
    logits = {"mlm_logits": outputs.pop("mlm_logits")}
    return {"tokens": (inputs, outputs), "mlm": (inputs | masked, outputs | logits)}

  _write_module(folder, pieces, build, seed=seed)


def write_orqa_model_dir(folder: str, sizes: Sizes, *, seed: int, num_blocks: int) -> None:
  """Writes a fine-tuned model's directory.

  It holds model.ckpt-1000 of embedder, reader and optimizer, and encoded/encoded.ckpt.

  Args:
    folder: new or empty.
    sizes: of embedder and reader.
    seed: of all weights and block embeddings.
    num_blocks: rows of the block embeddings.
  """
  os.makedirs(os.path.join(folder, "encoded"))
  with tf.Graph().as_default(), _session() as session:
    inputs = _placeholders(INPUTS)
    _embedder(inputs, sizes, FINE_TUNED_EMBEDDER_SCOPE)
    _reader(inputs, sizes, max_width=1)
    for variable in tf1.trainable_variables():
      if "/layer_" not in variable.op.name and "/cls/" not in variable.op.name:  # enough of them
        for slot in ("adam_m", "adam_v"):
          tf1.get_variable(
            f"{variable.op.name}/{slot}", variable.shape, trainable=False, use_resource=False
          )
    _initialize(session, seed)
    session.run(tf1.assign(tf1.train.create_global_step(), 1000))
    tf1.train.Saver(save_relative_paths=True).save(
      session, os.path.join(folder, "model.ckpt"), global_step=1000
    )
  with tf.Graph().as_default(), _session() as session:
    _variable("block_emb", num_blocks, sizes.projection)
    _initialize(session, seed + 1)
    tf1.train.Saver().save(session, os.path.join(folder, "encoded", "encoded.ckpt"))


def _write_module(
  folder: str, pieces: Sequence[str], build: Callable[[bool], dict], *, seed: int
) -> None:
  """Writes the graphs for training and for use.

  `build(training)` gives signature name: (inputs, outputs), tensors by name.
  """
  builder = tf1.saved_model.Builder(folder)
  with tempfile.TemporaryDirectory() as temporary:
    vocab_path = os.path.join(temporary, "vocab.txt")
    with open(vocab_path, "w", encoding="utf-8") as file:
      file.writelines(f"{piece}\n" for piece in pieces)
    for training in (True, False):
      with tf.Graph().as_default(), _session() as session:
        signatures = build(training)
        vocab_file = tf.constant(vocab_path, name="vocab_file")
        signatures["tokenization_info"] = (
          {},
          {"vocab_file": vocab_file, "do_lower_case": tf.constant(True)},
        )
        definitions = {
          name: tf1.saved_model.build_signature_def(
            *(
              {key: tf1.saved_model.build_tensor_info(tensor) for key, tensor in side.items()}
              for side in sides
            )
          )
          for name, sides in signatures.items()
        }
        options = dict(
          signature_def_map=definitions, assets_collection=[vocab_file], strip_default_attrs=True
        )
        if training:
          _initialize(session, seed)
          builder.add_meta_graph_and_variables(session, ["train"], **options)
        else:
          builder.add_meta_graph([], **options)
    builder.save()
  with open(os.path.join(folder, "tfhub_module.pb"), "wb") as file:
    file.write(b"\x08\x03")


def run_module(folder: str, signature: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Runs a signature of a written module, without dropout.

  Args:
    folder: of the module.
    signature: one of `projected`, `tokens`, `mlm` and `tokenization_info`.
    inputs: [B, L] int32 by INPUTS, for `mlm` mlm_positions [B, M] int32 too; none for
      `tokenization_info`.

  Returns:
    projected: default [B, projection].
    tokens: sequence_output [B, L, hidden], pooled_output [B, hidden].
    mlm: these and mlm_logits [B, M, vocab].
    tokenization_info: vocab_file (its path in the folder) and do_lower_case, scalars.
  """
  with tf.Graph().as_default(), _session() as session:
    meta_graph = tf1.saved_model.load(session, [], folder)
    definition = meta_graph.signature_def[signature]
    assert inputs.keys() == set(definition.inputs), (
      f"{signature} takes {sorted(definition.inputs)}, not {sorted(inputs)}"
    )
    feeds = {definition.inputs[name].name: value for name, value in inputs.items()}
    for packed in meta_graph.collection_def[tf1.saved_model.ASSETS_KEY].any_list.value:
      asset = meta_graph.asset_file_def.add()
      packed.Unpack(asset)
      feeds[asset.tensor_info.name] = os.path.join(folder, "assets", asset.filename)
    return session.run({name: info.name for name, info in definition.outputs.items()}, feeds)


def run_embedder(model_dir: str, sizes: Sizes, input_ids, input_mask, segment_ids) -> np.ndarray:
  """Runs the fine-tuned embedder: [N, L] int32 each → [N, projection]."""
  return _run_checkpoint(
    model_dir,
    lambda inputs: _embedder(inputs, sizes, FINE_TUNED_EMBEDDER_SCOPE),
    input_ids,
    input_mask,
    segment_ids,
  )


def run_reader(
  model_dir: str, sizes: Sizes, input_ids, input_mask, segment_ids, *, max_width: int
) -> np.ndarray:
  """Runs the fine-tuned reader.

  [N, L] int32 each → [N, L, max_width] logits of the spans from i to i + w, NaN where i + w ≥ L.
  """
  return _run_checkpoint(
    model_dir,
    lambda inputs: _reader(inputs, sizes, max_width=max_width),
    input_ids,
    input_mask,
    segment_ids,
  )


def _run_checkpoint(model_dir: str, build: Callable[[dict], tf.Tensor], *values) -> np.ndarray:
  with tf.Graph().as_default(), _session() as session:
    inputs = _placeholders(INPUTS)
    output = build(inputs)
    tf1.train.Saver().restore(session, tf1.train.latest_checkpoint(model_dir))
    return session.run(output, dict(zip(inputs.values(), values, strict=True)))


def _embedder(inputs: dict, sizes: Sizes, scope: str, *, training: bool = False) -> tf.Tensor:
  """[B, L] by INPUTS → [B, projection]."""
  with tf1.variable_scope(scope):
    with tf1.variable_scope("module"):
      pooled = _bert(inputs, sizes, training=training)["pooled_output"]
    projected = _dense(pooled, sizes.projection)
    return (
      _layer_norm(projected, "layer_normalization", epsilon=1e-3)
      if sizes.keras_norm
      else _layer_norm(projected)
    )


def _reader(inputs: dict, sizes: Sizes, *, max_width: int) -> tf.Tensor:
  """[B, L] by INPUTS → span logits [B, L, max_width]."""
  with tf1.variable_scope("reader"):
    with tf1.variable_scope("module"):
      sequence = _bert(inputs, sizes)["sequence_output"]
    start, end = tf.split(_dense(sequence, 2 * sizes.span), 2, axis=-1)
    ends = tf.stack(
      [tf.roll(end, -width, axis=1) for width in range(max_width)], axis=2
    )  # [B, L, W, span]
    hidden = _layer_norm(tf.nn.relu(start[:, :, None] + ends), "layer_normalization", epsilon=1e-3)
    logits = tf.squeeze(_dense(hidden, 1, "dense_1"), -1)
  length = tf.shape(sequence)[1]
  return tf.where(tf.range(length)[:, None] + tf.range(max_width) < length, logits, math.nan)


def _bert(
  inputs: dict, sizes: Sizes, *, mlm_positions: tf.Tensor | None = None, training: bool = False
) -> dict[str, tf.Tensor]:
  """Computes BERT for [B, L] by INPUTS.

  The outputs: sequence_output [B, L, hidden], pooled_output [B, hidden], mlm_logits [B, M, vocab].
  """

  def dropout(x):
    return tf.nn.dropout(x, rate=0.1) if training else x

  with tf1.variable_scope("bert"):
    with tf1.variable_scope("embeddings"):
      words = _variable("word_embeddings", sizes.vocab, sizes.hidden)
      segments = _variable("token_type_embeddings", 2, sizes.hidden)
      positions = _variable("position_embeddings", sizes.positions, sizes.hidden)[
        : tf.shape(inputs["input_ids"])[1]
      ]
      x = (
        tf.gather(words, inputs["input_ids"])
        + tf.gather(segments, inputs["segment_ids"])
        + positions
      )
      x = dropout(_layer_norm(x))
    penalty = (1 - tf.cast(inputs["input_mask"], tf.float32)) * -10000
    for layer in range(sizes.layers):
      with tf1.variable_scope(f"encoder/layer_{layer}"):
        with tf1.variable_scope("attention"):
          context = _attention(x, penalty, sizes)
          with tf1.variable_scope("output"):
            x = _layer_norm(x + dropout(_dense(context, sizes.hidden)))
        with tf1.variable_scope("intermediate"):
          wide = _gelu(_dense(x, sizes.intermediate))
        with tf1.variable_scope("output"):
          x = _layer_norm(x + dropout(_dense(wide, sizes.hidden)))
    with tf1.variable_scope("pooler"):
      pooled = tf.tanh(_dense(x[:, 0], sizes.hidden))
  with tf1.variable_scope("cls/predictions"):
    masked = x if mlm_positions is None else tf.gather(x, mlm_positions, axis=1, batch_dims=1)
    with tf1.variable_scope("transform"):
      masked = _layer_norm(_gelu(_dense(masked, sizes.hidden)))
    logits = tf.tensordot(masked, words, [[-1], [1]]) + _variable("output_bias", sizes.vocab)
  return {"sequence_output": x, "pooled_output": pooled, "mlm_logits": logits}


def _attention(x: tf.Tensor, penalty: tf.Tensor, sizes: Sizes) -> tf.Tensor:
  """Computes self-attention without its output layer.

  Takes [B, L, hidden], and [B, L] added to the scores of the attended → [B, L, hidden].
  """
  shape = tf.shape(x)
  by_head = tf.concat([shape[:2], [sizes.heads, sizes.hidden // sizes.heads]], 0)
  with tf1.variable_scope("self"):
    query, key, value = (
      tf.reshape(_dense(x, sizes.hidden, name), by_head) for name in ("query", "key", "value")
    )
  scores = tf.einsum("bfhd,bthd->bhft", query, key) / math.sqrt(sizes.hidden // sizes.heads)
  weights = tf.nn.softmax(scores + penalty[:, None, None])
  return tf.ensure_shape(tf.reshape(tf.einsum("bhft,bthd->bfhd", weights, value), shape), x.shape)


def _gelu(x: tf.Tensor) -> tf.Tensor:
  return 0.5 * x * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _dense(x: tf.Tensor, units: int, name: str = "dense") -> tf.Tensor:
  """[..., n] → [..., units]."""
  with tf1.variable_scope(name):
    return tf.tensordot(x, _variable("kernel", x.shape[-1], units), 1) + _variable("bias", units)


def _layer_norm(x: tf.Tensor, name: str = "LayerNorm", *, epsilon: float = 1e-12) -> tf.Tensor:
  """Normalises over the last axis."""
  with tf1.variable_scope(name):
    gamma, beta = _variable("gamma", x.shape[-1]), _variable("beta", x.shape[-1])
  mean, variance = tf.nn.moments(x, [-1], keepdims=True)
  return (x - mean) / tf.sqrt(variance + epsilon) * gamma + beta


def _placeholders(names: Sequence[str]) -> dict[str, tf.Tensor]:
  return {name: tf1.placeholder(tf.int32, [None, None], name) for name in names}


def _variable(name: str, *shape: int) -> tf.Variable:
  return tf1.get_variable(name, shape, tf.float32, use_resource=False)


def _initialize(session: tf1.Session, seed: int) -> None:
  """Draws every variable of the default graph, biases too.

  Their spread is so wide that a transposed or swapped variable shows.
  """
  rng = np.random.default_rng(seed)
  values = {}
  for variable in tf1.global_variables():
    mean = 1 if variable.op.name.endswith("/gamma") else 0
    values[variable.initial_value] = rng.normal(mean, 0.3, variable.shape.as_list())
  session.run(tf1.global_variables_initializer(), values)


def _session() -> tf1.Session:
  """Returns a session on the CPU, in full float32."""
  return tf1.Session(config=tf1.ConfigProto(device_count={"GPU": 0}))
