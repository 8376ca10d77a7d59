"""Loads the weights of published checkpoints into this project's models."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import keras

from realm_tf.checkpoints.published import Source, find
from realm_tf.checkpoints.published_limits import check_limits, shown, values_of_encoder
from realm_tf.checkpoints.published_names import (
  embedder_slots,
  fill,
  masked_reader_slots,
  span_reader_slots,
  under,
  with_tied_head,
)
from realm_tf.checkpoints.tensor_files import CheckpointError, Tensors
from realm_tf.checkpoints.tensorflow_files import KERAS_NORM
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_TF1_HEAD_DIM = 64  # in every released BERT
_KERAS_EPSILON = 1e-3
# A model whose tensors are mostly absent is rejected before it is built. A small one may lack more,
# because building it gives a better message.
_MOST_LACKING, _SMALL_VALUES = 2, 10_000_000
_HEAD = r"cls\.predictions\..*"  # REALM does not use this head in an embedder or a span reader


class Loaded(NamedTuple):
  """A model with published weights.

  Attributes:
    model: the loaded model.
    unused: names of tensors that have no place in it.
    fresh: optional parts that the checkpoint lacks, which are freshly initialised.
  """

  model: keras.Model
  unused: list[str]
  fresh: list[str] = []


def load_bert(path: str, **config) -> Loaded:
  """Loads a BERT as a masked reader; see `find`."""
  source = find(path, **config)
  return load_masked_reader(
    source.with_pad_first(source.vocabulary.pad_row) if source.vocabulary else source
  )


def _new_masked_reader(architecture: Mapping) -> MaskedReader:
  length = min(384, architecture["max_sequence_length"])
  return MaskedReader(
    architecture=dict(architecture), query_length=min(96, length // 2), length=length
  )


def load_masked_reader(source: Source) -> Loaded:
  """Loads the knowledge-augmented encoder or a BERT; its masked-LM head and pooler may be fresh.

  Raises:
    CheckpointError: if the source is of another kind, or its tensors do not fit.
  """
  prefix = {
    "encoder": "realm.",
    "bert": "bert." if any(name.startswith("bert.") for name in source.tensors) else "",
  }.get(source.kind)
  if prefix is None:
    raise CheckpointError(f"{source.path!r} holds REALM's {source.kind}; wanted a BERT.")
  tensors = with_tied_head(source.tensors, f"{prefix}embeddings.word_embeddings.weight")
  reader = _new_masked_reader(
    architecture_of(source.config, under(tensors, prefix), source=source.path)
  )
  fresh = [
    part
    for part in (f"{prefix}pooler.", "cls.predictions.")
    if not any(name.startswith(part) for name in tensors)
  ]
  slots = {
    name: slot
    for name, slot in masked_reader_slots(reader, prefix).items()
    if not name.startswith(tuple(fresh))
  }
  names = {"cls.predictions.": "a masked-LM head"}
  return Loaded(
    reader,
    fill(slots, tensors, source=source.path),
    [names.get(part, "a pooler") for part in fresh],
  )


def load_retriever(query: tuple[Source, str], passage: tuple[Source, str]) -> Loaded:
  """Loads a retriever from the embedders of its towers.

  Args:
    query: source and prefix of the query tower's tensors.
    passage: source and prefix of the passage tower's tensors; equal to `query` for a shared tower.

  Raises:
    CheckpointError: if the tensors do not fit.
  """
  (source, prefix), unused = passage, []
  tensors, epsilon = _projection(under(source.tensors, prefix))
  architecture = architecture_of(source.config, under(tensors, "realm."), source=source.path)
  projection_dim = _shape(tensors, "cls.dense.weight", source)[0]
  check_limits({"retriever_proj_size": projection_dim}, source=source.path)
  length = architecture["max_sequence_length"]
  retriever = Retriever(
    architecture=architecture,
    projection_dim=projection_dim,
    query_length=min(96, length),
    passage_length=min(288, length),
    shared=query == passage,
    norm_epsilon=epsilon,
  )
  # Not strict: a shared tower is listed once, and then both pairs are equal.
  for tower, (source, prefix) in zip(retriever.towers, (query, passage), strict=False):
    unused += fill(
      embedder_slots(tower),
      _projection(under(source.tensors, prefix))[0],
      source=source.path,
      unused=_HEAD,
    )
  return Loaded(retriever, unused)


def _projection(embedder: Tensors) -> tuple[Tensors, float | None]:
  """Returns an embedder with its layer norm under one name, and that norm's epsilon.

  The epsilon is None if it is the encoder's.

  REALM's released modules use BERT's own layer norm there, and ORQA's use Keras' layer norm
  (google-research/language, `orqa/models/ict_model.py`).
  """
  theirs = f"cls.{KERAS_NORM}."
  renamed = {name.replace(theirs, "cls.LayerNorm."): tensor for name, tensor in embedder.items()}
  return renamed, _KERAS_EPSILON if f"{theirs}weight" in embedder else None


def load_span_reader(source: Source, prefix: str = "") -> Loaded:
  """Loads the reader of Open-QA, whose tensors may be below a prefix.

  Raises:
    CheckpointError: if the tensors do not fit.
  """
  tensors, config = under(source.tensors, prefix), source.config
  architecture = architecture_of(config, under(tensors, "realm."), source=source.path)
  length = min(config.get("reader_seq_len", 320), architecture["max_sequence_length"])
  span_dim = _shape(tensors, "qa_outputs.dense_output.weight", source)[1]
  check_limits({"span_hidden_size": span_dim}, source=source.path)
  reader = SpanReader(
    architecture=architecture,
    query_length=min(64, length // 2),
    length=length,
    max_span=config.get("max_span_width", 10),
    span_dim=span_dim,
    norm_epsilon=config.get("reader_layer_norm_eps", 1e-3),
  )
  return Loaded(reader, fill(span_reader_slots(reader), tensors, source=source.path, unused=_HEAD))


def _shape(tensors: Tensors, name: str, source: Source) -> tuple[int, ...]:
  if name not in tensors or len(tensors[name].shape) != 2:
    raise CheckpointError(
      f"{source.path!r} lacks the matrix {name}, which every REALM {source.kind} has."
    )
  return tensors[name].shape


def architecture_of(config: Mapping, bert: Tensors, *, source: str) -> dict:
  """Returns an encoder's sizes from its tensors, and its other settings from its config.

  Raises:
    CheckpointError: if tensors and config differ, or a BERT of these sizes does not fit the
      tensors.
  """
  sizes = _sizes_of(bert, source=source)
  check_limits(sizes, source=source)
  for name, size in sizes.items():
    # Word embeddings may have spare rows, which `Vocabulary.with_rows` checks.
    if name != "vocab_size" and config.get(name, size) != size:
      raise CheckpointError(
        f"{source!r} says {name}={shown(config[name])}, but its tensors have {size}: they do "
        "not belong together."
      )
  hidden_dim = sizes["hidden_size"]
  num_heads = config.get("num_attention_heads", max(hidden_dim // _TF1_HEAD_DIM, 1))
  if hidden_dim % num_heads:
    raise CheckpointError(
      f"{source!r} says {num_heads} heads, which do not divide {hidden_dim} dimensions."
    )
  num_values = values_of_encoder(sizes, source=source)
  num_there = sum(math.prod(tensor.shape) for tensor in bert.values())
  if num_values > max(_MOST_LACKING * num_there, _SMALL_VALUES):
    raise CheckpointError(
      f"{source!r} has tensors of a BERT of {num_values:,} values, but holds only {num_there:,}. "
      "Download it again."
    )
  activation = config.get("hidden_act", "gelu_new")
  if not isinstance(activation, str) or activation not in _ACTIVATIONS:
    raise CheckpointError(
      f"{source!r} was trained with hidden_act={shown(activation)}; supported are "
      f"{', '.join(_ACTIVATIONS)}."
    )
  return {
    "vocabulary_size": sizes["vocab_size"],
    "hidden_dim": hidden_dim,
    "max_sequence_length": sizes["max_position_embeddings"],
    "num_layers": sizes["num_hidden_layers"],
    "intermediate_dim": sizes["intermediate_size"],
    "num_heads": num_heads,
    "dropout": config.get("hidden_dropout_prob", 0.1),
    "activation": _ACTIVATIONS[activation],
    "layer_norm_epsilon": config.get("layer_norm_eps", 1e-12),
  }


def _sizes_of(bert: Tensors, *, source: str) -> dict[str, int]:
  """Returns the sizes that an encoder's tensors give, by transformers' names."""
  shapes = {}
  for name in (
    "embeddings.word_embeddings",
    "embeddings.position_embeddings",
    "encoder.layer.0.intermediate.dense",
  ):
    if f"{name}.weight" not in bert:
      raise CheckpointError(f"{source!r} lacks {name}.weight, which every BERT has.")
    shapes[name] = bert[f"{name}.weight"].shape
    if len(shapes[name]) != 2:
      raise CheckpointError(
        f"{name}.weight in {source!r} has shape {shapes[name]}; wanted a matrix."
      )
  words, positions, feedforward = shapes.values()
  return {
    "vocab_size": words[0],
    "hidden_size": words[1],
    "max_position_embeddings": positions[0],
    "intermediate_size": feedforward[0],
    "num_hidden_layers": len(
      {name.split(".")[2] for name in bert if name.startswith("encoder.layer.")}
    ),
  }


def hidden_act_of(architecture: Mapping) -> str:
  """Returns the transformers name of an encoder's activation."""
  return {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[
    architecture.get("activation", "gelu_tanh")
  ]
