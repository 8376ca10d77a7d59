"""The models against NumPy: pooling, spans, masked word pieces.

Also tests snapshots, published BERT folders and Keras' JAX backend.
"""

import json
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import config_dict
from safetensors import numpy as safetensors

from realm_tf import settings
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.corpus.vocabularies import SPECIAL
from realm_tf.models import encoder, masked_reader, snapshots, span_reader
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader
from realm_tf.storage import artifacts, publishing
from realm_tf.training import new_models
from tests.processes import REPOSITORY

VOCABULARY = 30
ARCHITECTURE = dict(
  vocabulary_size=VOCABULARY,
  num_layers=1,
  num_heads=2,
  hidden_dim=16,
  intermediate_dim=32,
  max_sequence_length=24,
  dropout=0.1,
)
RNG = np.random.default_rng


def randomize(model: keras.Model, seed: int = 0) -> keras.Model:
  """Moves every weight from its initial value, biases and gains too."""
  rng = RNG(seed)
  for weight in model.weights:
    if "seed" not in weight.path:
      weight.assign(
        rng.normal(size=weight.shape, scale=0.5) + (1.0 if weight.name == "gamma" else 0.0)
      )
  return model


def packed(
  num: int, length: int, *, seed: int = 0, padded: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns random ids with two segments, zero-padded: the same rows for every `padded` length."""
  rng = RNG(seed)
  ids, segments = np.zeros([2, num, padded or length], np.int32)
  for row in range(num):
    size = rng.integers(5, length + 1)
    ids[row, :size] = rng.integers(5, VOCABULARY, size)
    ids[row, [0, size // 2, size - 1]] = 2, 3, 3  # [CLS] .. [SEP] .. [SEP]
    segments[row, size // 2 + 1 : size] = 1
  return ids, segments


def layer_norm(x: np.ndarray, norm, epsilon: float) -> np.ndarray:
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * np.float64(
    norm.gamma
  ) + np.float64(norm.beta)


def outputs_of(model, ids, segments) -> dict[str, np.ndarray]:
  ids, segments = (
    None if part is None else keras.ops.convert_to_tensor(part) for part in (ids, segments)
  )
  return {
    name: np.array(value, np.float64)
    for name, value in encoder.encode(model, ids, segments).items()
  }


def close(got, wanted, what: str, *, tolerance: float = 2e-5) -> None:
  got, wanted = np.asarray(got), np.asarray(wanted)
  np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance, err_msg=what)


# ---------------------------------------------------------------------------------------- retriever


def make_retriever(**settings_) -> Retriever:
  return randomize(
    Retriever(
      architecture=ARCHITECTURE, projection_dim=8, query_length=12, passage_length=20, **settings_
    )
  )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_projection_and_norm(pooling):
  retriever = make_retriever(pooling=pooling, shared=False)
  ids, segments = packed(5, 20)
  for tower, embed, args in (
    (retriever.query_tower, retriever.embed_queries, (ids[:, :12], None)),
    (retriever.passage_tower, retriever.embed_passages, (ids, segments)),
  ):
    outputs = outputs_of(tower.encoder, *args)
    if pooling == "cls":
      pooled = outputs["pooled_output"]
    else:
      pooled = np.stack(
        [
          np.mean([vector for vector, i in zip(row, ids, strict=True) if i != 0], axis=0)
          for row, ids in zip(outputs["sequence_output"], args[0], strict=True)
        ]
      )
    kernel, bias = (np.float64(weight) for weight in tower.projection.get_weights())
    close(
      embed(*(arg for arg in args if arg is not None)),
      layer_norm(pooled @ kernel + bias, tower.norm, 1e-12),
      f"{pooling}, {tower.name}",
    )


def test_bert_pooled_output_is_tanh_of_the_first_position():
  model = make_retriever().query_tower.encoder
  ids, segments = packed(3, 12)
  outputs = outputs_of(model, ids, segments)
  kernel, bias = model.pooled_dense.get_weights()
  close(
    outputs["pooled_output"],
    np.tanh(outputs["sequence_output"][:, 0] @ kernel + bias),
    "pooled output",
  )


@pytest.mark.parametrize("shared", [True, False])
def test_towers(shared):
  retriever = make_retriever(shared=shared)
  ids, segments = packed(4, 12)
  same = [
    np.array(retriever.embed_queries(ids)),
    np.array(retriever.embed_passages(ids, np.zeros_like(segments))),
  ]
  assert len(retriever.towers) == (1 if shared else 2)
  assert retriever.count_params() == sum(tower.count_params() for tower in retriever.towers)
  assert np.allclose(*same, atol=1e-6) == shared, np.abs(same[0] - same[1]).max()
  both = retriever({"query_ids": ids, "passage_ids": ids, "passage_segments": segments})
  np.testing.assert_allclose(both["queries"], same[0], atol=1e-6)
  np.testing.assert_allclose(both["passages"], retriever.embed_passages(ids, segments), atol=1e-6)
  assert np.abs(both["passages"] - same[1]).max() > 1e-2, "segment ids must matter"


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_nothing(pooling):
  retriever = make_retriever(pooling=pooling)
  short, long = packed(4, 12), packed(4, 12, padded=20)
  close(
    retriever.embed_passages(*long),
    retriever.embed_passages(*short),
    f"{pooling}, 12 and 20 word pieces",
    tolerance=1e-5,
  )


def test_dropout_only_while_training_and_scale_of_fresh_vectors():
  retriever = Retriever(
    architecture=ARCHITECTURE, projection_dim=8, query_length=12, passage_length=20, scale=0.5
  )
  ids, _ = packed(6, 12)
  first, second = np.array(retriever.embed_queries(ids)), np.array(retriever.embed_queries(ids))
  trained = np.array(retriever.embed_queries(ids, training=True))
  np.testing.assert_array_equal(first, second)
  assert np.abs(trained - first).max() > 0.05
  # so f(x, z) is at most D * scale²
  np.testing.assert_allclose((first**2).sum(-1), 8 * 0.5**2, rtol=1e-4)


@pytest.mark.parametrize("segments", [True, False])
def test_segment_ids_are_read_if_the_retriever_has_segments(segments):
  keras.utils.set_random_seed(0)
  model = make_retriever(segments=segments)
  ids = np.array([[2, 7, 3, 8, 9, 3]], np.int32)
  ones, zeros = np.array([[0, 0, 0, 1, 1, 1]], np.int32), np.zeros_like(ids)
  far = np.abs(np.array(model.embed_passages(ids, ones) - model.embed_passages(ids, zeros))).max()
  assert (far > 1e-3) == segments, f"embeddings with and without segment ids differ by {far}"


def test_unknown_pooling_is_refused():
  with pytest.raises(ValueError, match="pooling is 'max'; use 'cls' or 'mean'"):
    make_retriever(pooling="max")


# ------------------------------------------------------------------------------------------ readers


def make_masked_reader() -> MaskedReader:
  return randomize(MaskedReader(architecture=ARCHITECTURE, query_length=8, length=20, max_masks=3))


def test_masked_reader():
  reader = make_masked_reader()
  ids, segments = packed(4, 20)
  positions, targets = (
    RNG(1).integers(0, 5, [4, 3]).astype(np.int32),
    RNG(2).integers(0, VOCABULARY, [4, 3]).astype(np.int32),
  )
  logits = np.array(
    reader({"token_ids": ids, "segment_ids": segments, "mask_positions": positions})
  )
  hidden = np.take_along_axis(
    outputs_of(reader.encoder, ids, segments)["sequence_output"], positions[:, :, None], axis=1
  )
  dense, norm = reader.head._intermediate_dense, reader.head._intermediate_layer_norm
  hidden = hidden @ np.float64(dense.kernel) + np.float64(dense.bias)
  # BERT's gelu
  hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
  embeddings = np.float64(reader.encoder.token_embedding.embeddings)  # tied
  wanted = layer_norm(hidden, norm, 1e-12) @ embeddings.T + np.float64(reader.head._bias)
  close(logits, wanted, "masked-LM logits", tolerance=1e-4)
  log_softmax = (
    wanted
    - np.log(np.exp(wanted - wanted.max(-1, keepdims=True)).sum(-1, keepdims=True))
    - wanted.max(-1, keepdims=True)
  )
  by_hand = [[log_softmax[n, m, targets[n, m]] for m in range(3)] for n in range(4)]
  close(
    masked_reader.target_log_probs(logits, targets), by_hand, "log p of the targets", tolerance=1e-4
  )


def test_a_reader_that_copies_mixes_the_vocabulary_with_the_passage():
  """Probabilities are computed by hand, one masked word piece at a time.

  Without a passage, the vocabulary has all the mass.
  """
  reader = randomize(
    MaskedReader(architecture=ARCHITECTURE, query_length=8, length=20, max_masks=3, copies=True)
  )
  plain = make_masked_reader()
  (
    plain.encoder.set_weights(reader.encoder.get_weights()),
    plain.head.set_weights(reader.head.get_weights()),
  )
  ids, segments = packed(4, 20)
  ids[3, 6:], segments[3] = 0, 0  # a null passage: only its [SEP]
  ids[3, 5:7], segments[3, 6] = 3, 1
  positions, targets = (
    RNG(1).integers(0, 5, [4, 3]).astype(np.int32),
    RNG(2).integers(0, VOCABULARY, [4, 3]).astype(np.int32),
  )
  targets[0, 0] = ids[0, segments[0] > 0][0]  # certainly in the passage
  inputs = {"token_ids": ids, "segment_ids": segments, "mask_positions": positions}
  hidden = outputs_of(reader.encoder, ids, segments)["sequence_output"]
  written = np.array(plain(inputs), np.float64)
  written = np.exp(written) / np.exp(written).sum(-1, keepdims=True)

  def dense(layer, x):
    return x @ np.float64(layer.kernel) + np.float64(layer.bias)

  wanted = np.zeros([4, 3, VOCABULARY])
  for n in range(4):
    text = np.flatnonzero(segments[n])[:-1]  # without the last [SEP]
    for m in range(3):
      masked = hidden[n, positions[n, m]]
      copy = 1 / (1 + np.exp(-dense(reader.pointer.gate, masked)[0])) if len(text) else 0.0
      scores = np.array(
        [
          dense(reader.pointer.queries, masked) @ dense(reader.pointer.keys, hidden[n, at]) / 4
          for at in text
        ]
      )
      wanted[n, m] = (1 - copy) * written[n, m]
      for at, weight in zip(text, np.exp(scores) / np.exp(scores).sum(), strict=True):
        wanted[n, m, ids[n, at]] += copy * weight
  np.testing.assert_allclose(wanted.sum(-1), 1)
  np.testing.assert_allclose(np.exp(np.array(reader(inputs), np.float64)), wanted, atol=1e-5)
  signature = [
    {
      name: tf.TensorSpec([None, None] if name == "mask_positions" else [None, 20], tf.int32)
      for name in inputs
    }
  ]
  served = tf.function(lambda inputs: reader(inputs), input_signature=signature)
  np.testing.assert_allclose(
    np.exp(served(inputs).numpy()),
    wanted,
    atol=1e-5,
    err_msg="in a graph of any number of rows and masks",
  )
  got = np.exp(np.array(reader.log_likelihoods(inputs, targets), np.float64))
  np.testing.assert_allclose(
    got, np.take_along_axis(wanted, targets[..., None], 2)[..., 0], atol=1e-5
  )
  np.testing.assert_allclose(wanted[3], written[3], err_msg="without a passage")
  assert np.abs(wanted[:3] - written[:3]).max() > 0.1


def test_masked_reader_reads_the_passage():
  reader = make_masked_reader()
  ids, segments = packed(1, 20)
  other = ids.copy()
  other[segments == 1] = 7
  positions = np.array([[1, 2, 0]], np.int32)
  first, second = (
    np.array(reader({"token_ids": x, "segment_ids": segments, "mask_positions": positions}))
    for x in (ids, other)
  )
  assert np.abs(first - second).max() > 0.05


def make_span_reader() -> SpanReader:
  return randomize(
    SpanReader(architecture=ARCHITECTURE, query_length=8, length=14, max_span=4, span_dim=6)
  )


def test_span_scores_and_mask():
  reader = make_span_reader()
  ids, segments = packed(3, 14)
  scores = np.array(reader({"token_ids": ids, "segment_ids": segments}))
  mask = np.array(span_reader.span_mask(ids, segments, sep_id=3, max_span=4))
  hidden = outputs_of(reader.encoder, ids, segments)["sequence_output"]
  (ends_kernel, ends_bias), (score_kernel, score_bias) = (
    [np.float64(weight) for weight in layer.get_weights()] for layer in (reader.ends, reader.score)
  )
  start, end = np.split(hidden @ ends_kernel + ends_bias, 2, axis=-1)
  wanted, wanted_mask = np.zeros([3, 14, 4]), np.zeros([3, 14, 4])
  for n in range(3):
    for i in range(14):
      for w in range(4):
        if i + w < 14:
          layer = np.maximum(start[n, i] + end[n, i + w], 0)
          wanted[n, i, w] = (layer_norm(layer, reader.norm, 1e-3) @ score_kernel + score_bias)[0]
          wanted_mask[n, i, w] = all(
            segments[n, at] == 1 and ids[n, at] != 3 for at in range(i, i + w + 1)
          )
  inside = np.add.outer(np.arange(14), np.arange(4)) < 14
  close(scores[:, inside], wanted[:, inside], "span scores", tolerance=1e-4)
  np.testing.assert_array_equal(mask, wanted_mask)
  assert 10 < mask.sum() < mask.size / 2


# ---------------------------------------------------------------------------------------- snapshots


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
  path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
  path.write_text("\n".join([*SPECIAL, *(f"w{i}" for i in range(VOCABULARY - 5))]) + "\n")
  return Tokenizer(str(path))


def outputs(model) -> list[np.ndarray]:
  if isinstance(model, Retriever):
    ids, segments = packed(3, 12)
    return [np.array(model.embed_queries(ids)), np.array(model.embed_passages(ids, segments))]
  ids, segments = packed(3, model.length)
  return [
    np.array(
      model(
        {"token_ids": ids, "segment_ids": segments, "mask_positions": np.ones([3, 3], np.int32)}
      )
    )
  ]


@pytest.mark.parametrize(
  "make",
  [
    make_retriever,
    lambda: make_retriever(shared=False, pooling="mean"),
    make_masked_reader,
    make_span_reader,
  ],
)
def test_snapshot_gives_equal_outputs(make, tokenizer, tmp_path):
  model = make()
  name = "retriever" if isinstance(model, Retriever) else "reader"
  folder = snapshots.publish(
    str(tmp_path), 7, {name: model}, tokenizer=tokenizer, made_by="test", details={"fact": 1}
  )
  again = snapshots.load_model(folder, name)
  assert type(again) is type(model) and again.get_config() == model.get_config()
  for got, wanted in zip(outputs(again), outputs(model), strict=True):
    np.testing.assert_array_equal(got, wanted)
  info = artifacts.read_info(folder)
  assert folder.endswith("/00000007") and (info["step"], info["made_by"], info["fact"]) == (
    7,
    "test",
    1,
  )
  assert (
    snapshots.load_tokenizer(folder).fingerprint
    == tokenizer.fingerprint
    == info["vocab_fingerprint"]
  )


def test_fingerprint_follows_the_weights(tokenizer, tmp_path):
  model = make_masked_reader()

  def publish(step):
    return artifacts.read_info(
      snapshots.publish(str(tmp_path), step, {"reader": model}, tokenizer=tokenizer, made_by="t")
    )["fingerprint"]

  first = publish(1)
  weight = model.trainable_weights[0]
  weight.assign(weight + 1e-3)
  assert first != publish(2)


def test_wrong_kinds_are_refused(tokenizer, tmp_path):
  folder = snapshots.publish(
    str(tmp_path), 7, {"retriever": make_retriever()}, tokenizer=tokenizer, made_by="test"
  )
  with publishing.publish(str(tmp_path / "index"), kind="index", config={}, inputs={}):
    pass
  for path, words in (
    (folder, "holds retriever; wanted reader"),
    (str(tmp_path / "index"), "holds index, wanted snapshot"),
    (str(tmp_path / "nothing"), "snapshot folder .* does not exist"),
  ):
    with pytest.raises(artifacts.ArtifactError, match=words) as caught:
      snapshots.load_model(path, "reader")
    assert path in str(caught.value)


# ---------------------------------------------------------------------------------- published BERTs


def write_bert(folder, tokenizer: Tokenizer, *, positions: int = 24) -> dict[str, np.ndarray]:
  """Writes a BERT folder in Hugging Face's format: config.json, model.safetensors, vocab.txt."""
  width, inner, rng = 16, 32, RNG(0)
  shapes = {
    "embeddings.word_embeddings.weight": (tokenizer.size, width),
    "embeddings.position_embeddings.weight": (positions, width),
    "embeddings.token_type_embeddings.weight": (2, width),
    "embeddings.LayerNorm.weight": (width,),
    "embeddings.LayerNorm.bias": (width,),
    "pooler.dense.weight": (width, width),
    "pooler.dense.bias": (width,),
  }
  for name, (rows, columns) in {
    "attention.self.query": (width, width),
    "attention.self.key": (width, width),
    "attention.self.value": (width, width),
    "attention.output.dense": (width, width),
    "intermediate.dense": (inner, width),
    "output.dense": (width, inner),
  }.items():
    shapes |= {
      f"encoder.layer.0.{name}.weight": (rows, columns),
      f"encoder.layer.0.{name}.bias": (rows,),
    }
  for name in ("attention.output", "output"):
    shapes |= {
      f"encoder.layer.0.{name}.LayerNorm.weight": (width,),
      f"encoder.layer.0.{name}.LayerNorm.bias": (width,),
    }
  tensors = {
    name: rng.normal(size=shape, scale=0.4).astype(np.float32) for name, shape in shapes.items()
  }
  folder.mkdir()
  safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / "config.json").write_text(
    json.dumps(
      {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": tokenizer.size,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": width,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
      }
    )
  )
  (folder / "vocab.txt").write_text("\n".join(tokenizer.pieces) + "\n")
  return tensors


def bert_by_hand(
  tensors: dict[str, np.ndarray], ids: np.ndarray, segments: np.ndarray
) -> np.ndarray:
  """Computes one layer of BERT over one row without padding."""

  def weight(name):
    return tensors[name].astype(np.float64)

  def dense(x, name):
    return x @ weight(f"encoder.layer.0.{name}.weight").T + weight(f"encoder.layer.0.{name}.bias")

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * weight(
      f"{name}.LayerNorm.weight"
    ) + weight(f"{name}.LayerNorm.bias")

  x = (
    weight("embeddings.word_embeddings.weight")[ids]
    + weight("embeddings.position_embeddings.weight")[: len(ids)]
  )
  x = norm(x + weight("embeddings.token_type_embeddings.weight")[segments], "embeddings")
  query, key, value = (
    dense(x, f"attention.self.{name}").reshape(len(ids), 2, 8) for name in ("query", "key", "value")
  )
  heads = []
  for head in range(2):
    scores = query[:, head] @ key[:, head].T / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, head])
  x = norm(
    x + dense(np.concatenate(heads, -1), "attention.output.dense"),
    "encoder.layer.0.attention.output",
  )
  inner = dense(x, "intermediate.dense")
  inner = 0.5 * inner * (1 + np.vectorize(math.erf)(inner / np.sqrt(2)))
  return norm(x + dense(inner, "output.dense"), "encoder.layer.0.output")


def config_with(
  preset: str, *, passage_length: int = 20, reader_length: int = 20
) -> config_dict.ConfigDict:
  encoder_section = dict(preset=preset, dropout=0.0, init_std=0.1)
  return config_dict.ConfigDict(
    dict(
      encoder=encoder_section,
      reader_encoder=encoder_section,
      mlm=dict(steps=0),
      ict=dict(from_mlm=True),
      num_devices=1,
      mixed_precision=False,
      jit_compile=False,
      optimizer=dict(bias_correction=False, min_warmup_steps=100),
      retriever=dict(projection_dim=8, query_length=12, passage_length=passage_length),
      reader=dict(length=reader_length, max_masks=3),
    )
  )


def test_hugging_face_folder(tokenizer, tmp_path):
  tensors = write_bert(tmp_path / "bert", tokenizer)
  config = config_with(str(tmp_path / "bert"))
  retriever, reader = (
    new_models.new_retriever(settings.retriever_start(config), tokenizer),
    new_models.new_masked_reader(settings.masked_reader_start(config), tokenizer),
  )
  ids, segments = packed(3, 20)
  for name, model in (("retriever", retriever.query_tower.encoder), ("reader", reader.encoder)):
    got = outputs_of(model, ids, segments)["sequence_output"]
    for row in range(3):
      size = int((ids[row] != 0).sum())
      close(
        got[row, :size],
        bert_by_hand(tensors, ids[row, :size], segments[row, :size]),
        f"{name}, row of {size}",
      )
  assert retriever.get_config()["architecture"]["hidden_dim"] == 16
  folder = snapshots.publish(
    str(tmp_path / "S"), 1, {"retriever": retriever}, tokenizer=tokenizer, made_by="test"
  )
  np.testing.assert_array_equal(
    snapshots.load_retriever(folder).embed_queries(ids), retriever.embed_queries(ids)
  )


def test_encoder_that_does_not_fit(tokenizer, tmp_path):
  write_bert(tmp_path / "bert", tokenizer)
  (tmp_path / "larger.txt").write_text("\n".join([*tokenizer.pieces, "more"]) + "\n")
  larger = Tokenizer(str(tmp_path / "larger.txt"))
  with pytest.raises(
    encoder.EncoderError, match="has 30 word pieces, .* has 31.*make_passages --vocab"
  ):
    new_models.new_retriever(settings.retriever_start(config_with(str(tmp_path / "bert"))), larger)
  for make, config in (
    (
      new_models.new_retriever,
      settings.retriever_start(config_with(str(tmp_path / "bert"), passage_length=25)),
    ),
    (
      new_models.new_masked_reader,
      settings.masked_reader_start(config_with(str(tmp_path / "bert"), reader_length=25)),
    ),
  ):
    with pytest.raises(
      encoder.EncoderError, match="the encoder takes 24 word pieces, but the config asks for 25"
    ):
      make(config, tokenizer)


def test_fresh_encoder_has_the_spread_asked_for(toy):
  config = toy.config(encoder__init_std=0.2)
  retriever = new_models.new_retriever(settings.retriever_start(config), Tokenizer(config.passages))
  model = retriever.query_tower.encoder
  spread = {
    "words": np.std(model.token_embedding.embeddings),
    "positions": np.std(model.position_embedding.position_embeddings),
  }
  assert 0.15 < spread["words"] < 0.22 and 0.1 < spread["positions"] < 0.25
  assert (
    retriever.query_tower.encoder.token_embedding.embeddings.shape[0]
    == Tokenizer(config.passages).size
  )


# ---------------------------------------------------------------------------------------------- JAX


def test_jax_backend_gives_the_same_outputs(tokenizer, tmp_path):
  models = {
    "retriever": make_retriever(),
    "reader": make_masked_reader(),
    "span": make_span_reader(),
  }
  for name, model in models.items():
    np.savez(tmp_path / f"{name}.npz", *outputs(model))
    snapshots.publish(
      str(tmp_path / name),
      1,
      {"retriever" if name == "retriever" else "reader": model},
      tokenizer=tokenizer,
      made_by="test",
    )
  program = f"""
import keras, numpy as np
assert keras.backend.backend() == "jax"
from realm_tf.models import snapshots
from tests.models import models_test
for name in ("retriever", "reader", "span"):
  part = "retriever" if name == "retriever" else "reader"
  model = snapshots.load_model({str(tmp_path)!r} + "/" + name + "/00000001", part)
  wanted = np.load({str(tmp_path)!r} + "/" + name + ".npz")
  for got, want in zip(models_test.outputs(model), wanted.values(), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4, err_msg=name)
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=REPOSITORY,
    env={**os.environ, "KERAS_BACKEND": "jax"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
