"""New models for training, whose encoders start from fresh, published or warm-started weights."""

import dataclasses
import os
from collections.abc import Mapping

import keras

from realm_tf import errors
from realm_tf.checkpoints import published_models
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing
from realm_tf.models import encoder, snapshots
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader
from realm_tf.storage import artifacts
from realm_tf.training.loop import Setup

SIZES = ("num_layers", "num_heads", "hidden_dim", "intermediate_dim", "max_sequence_length")


@dataclasses.dataclass(frozen=True)
class EncoderStart:
  """Initial weights of an encoder.

  Attributes:
    preset: a published BERT; "" for fresh weights.
    sizes: `num_layers` and the other sizes of a fresh encoder; ignored with a preset.
    dropout: dropout rate in training.
    init_std: standard deviation of fresh weights.
  """

  preset: str
  sizes: Mapping[str, int]
  dropout: float
  init_std: float


@dataclasses.dataclass(frozen=True)
class ModelStart:
  """Initial weights of a model.

  Attributes:
    encoder: initial weights of the encoder, or of each tower's encoder.
    arguments: the other arguments of the model's class.
    warm_start: workdir of a trainer whose masked reader's weights take precedence; "" for none.
    setup: devices and precision.
  """

  encoder: EncoderStart
  arguments: Mapping
  warm_start: str
  setup: Setup


def new_retriever(start: ModelStart, tokenizer: Tokenizer) -> Retriever:
  """Builds a retriever with fresh, published or warm-started encoder weights.

  Raises:
    EncoderError: the encoder has another vocabulary, or takes fewer word pieces.
    ArtifactError: there is no warm start in the workdir.
    UserError: the warm start has other sizes.
  """
  architecture, published_bert = new_encoder(
    start.encoder, tokenizer, start.arguments["passage_length"]
  )
  with start.setup.scope():
    retriever = Retriever(architecture=architecture, **start.arguments)
  warm = _warm_reader(start.warm_start, tokenizer) or published_bert
  if warm and _sizes(warm.get_config()["architecture"]) != _sizes(architecture):
    raise errors.UserError(
      f"the masked-LM warm start {start.warm_start!r} has the sizes of config.reader_encoder, "
      "which are not those of config.encoder. Set ict.from_mlm to False."
    )
  for tower in retriever.towers:
    start_encoder(tower.encoder, warm, start.encoder.init_std)
  return retriever


def new_masked_reader(start: ModelStart, tokenizer: Tokenizer) -> MaskedReader:
  """Builds a masked reader with fresh, published or warm-started weights.

  Raises:
    EncoderError: the encoder has another vocabulary, or takes fewer word pieces.
    ArtifactError: there is no warm start in the workdir.
  """
  architecture, published_bert = new_encoder(start.encoder, tokenizer, start.arguments["length"])
  with start.setup.scope():
    reader = MaskedReader(architecture=architecture, **start.arguments)
  if warm := _warm_reader(start.warm_start, tokenizer) or published_bert:
    reader.encoder.set_weights(warm.encoder.get_weights())
    reader.head.set_weights(warm.head.get_weights())
    if reader.pointer is not None and warm.pointer is not None:
      reader.pointer.set_weights(warm.pointer.get_weights())
  else:
    start_encoder(reader.encoder, None, start.encoder.init_std)
  return reader


def new_span_reader(start: ModelStart, tokenizer: Tokenizer) -> SpanReader:
  """Builds a span reader with the encoder of a trained masked reader or of `start.encoder`.

  Raises:
    ArtifactError: no snapshot in the workdir, or one with another vocabulary.
    EncoderError: the encoder has another vocabulary, or takes fewer word pieces.
  """
  if not start.warm_start:
    architecture, published_bert = new_encoder(start.encoder, tokenizer, start.arguments["length"])
    with start.setup.scope():
      reader = SpanReader(architecture=architecture, **start.arguments)
    start_encoder(reader.encoder, published_bert, start.encoder.init_std)
    return reader
  snapshot = snapshots.newest(start.warm_start, advice="run realm_tf.pretrain first.")
  packing.check_vocabulary(artifacts.read_info(snapshot), snapshot, tokenizer)
  masked = snapshots.load_model(snapshot, "reader")
  with start.setup.scope():
    reader = SpanReader(architecture=masked.get_config()["architecture"], **start.arguments)
  reader.encoder.set_weights(masked.encoder.get_weights())
  return reader


def _sizes(architecture: Mapping) -> dict:
  return {name: architecture[name] for name in SIZES if name != "num_heads"}


def _warm_reader(workdir: str, tokenizer: Tokenizer) -> MaskedReader | None:
  """Loads the masked reader of a `realm_tf.pretrain_mlm` workdir; None if the workdir is ""."""
  if not workdir:
    return None
  snapshot = snapshots.newest(
    workdir, advice="run realm_tf.pretrain_mlm first, or set mlm.steps to 0."
  )
  packing.check_vocabulary(artifacts.read_info(snapshot), snapshot, tokenizer)
  return snapshots.load_model(snapshot, "reader")


def new_encoder(
  start: EncoderStart, tokenizer: Tokenizer, length: int
) -> tuple[dict, MaskedReader | None]:
  """Returns the architecture of an encoder, and the published BERT that it starts from, if any.

  Args:
    start: a preset, or the sizes of a fresh encoder.
    tokenizer: tokenizer whose vocabulary the encoder must have.
    length: number of word pieces that the encoder must take.

  Raises:
    EncoderError: the encoder has another vocabulary, or takes fewer word pieces.
  """
  if start.preset:
    published_bert = _published_bert(start.preset)
    architecture = dict(published_bert.get_config()["architecture"])
  else:
    published_bert = None
    architecture = {**start.sizes, "vocabulary_size": tokenizer.size}
  architecture["dropout"] = start.dropout
  if architecture["vocabulary_size"] != tokenizer.size:
    raise encoder.EncoderError(
      f"encoder.preset {start.preset!r} has {architecture['vocabulary_size']} word pieces, "
      f"but {tokenizer.path!r} has {tokenizer.size}. Use the encoder's vocabulary: make_passages "
      f"--vocab={start.preset} (for a tagger, vocab)."
    )
  if architecture["max_sequence_length"] < length:
    raise encoder.EncoderError(
      f"the encoder takes {architecture['max_sequence_length']} word pieces, but the config asks "
      f"for {length}. Lower retriever.passage_length and reader.length (for a tagger, length), or "
      "raise encoder.max_sequence_length."
    )
  return architecture, published_bert


def _published_bert(preset: str) -> MaskedReader:
  """Loads a BERT from a realm_tf.import_checkpoint workdir or a published checkpoint."""
  imported = artifacts.latest(os.path.join(preset, "snapshots"))
  if imported:
    model = snapshots.load_model(imported, "reader")
    fresh = artifacts.read_info(imported).get("fresh", {}).get("reader", [])
  else:
    model, _, fresh = published_models.load_bert(preset)
  if fresh:
    print(
      f"encoder.preset {preset} lacks {' and '.join(fresh)}: a model that needs them starts with "
      "fresh ones."
    )
  return model


def start_encoder(model: keras.Model, warm: MaskedReader | None, init_std: float) -> None:
  """Gives an encoder a masked reader's weights, or fresh ones of this standard deviation."""
  if warm is not None:
    model.set_weights(warm.encoder.get_weights())
  else:
    encoder.rescale_fresh(model, init_std)
