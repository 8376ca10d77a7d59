"""From config sections to tokenizers and fresh models, and how entry points start: shared by the entry points only."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf
from absl import app, flags
from ml_collections import config_flags

from realm_tf import artifacts, devices, errors, examples, passages, published, snapshots
from realm_tf.models import encoder
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.tokenization import Tokenizer

_NUM_HELD_OUT = 1000  # sentences


def tokenizer(passages_folder: str) -> Tokenizer:
  """The tokenizer that passages were made with."""
  artifacts.read_info(passages_folder, kind=passages.KIND)
  return Tokenizer(passages_folder)


def masked_sentences(config, folder: str, table: passages.PassageTable, tokenizer: Tokenizer) -> examples.MaskedSentences:
  """The sentences of a spans folder, masked as `config.masking` says; 1,000 or so are held out, the same for every trainer."""
  return examples.MaskedSentences(
    folder,
    tokenizer=tokenizer,
    query_length=config.retriever.query_length,
    max_masks=config.reader.max_masks,
    knowledge=table,
    masking=config.masking,
    num_held_out=_NUM_HELD_OUT,
  )


def scope(config) -> contextlib.AbstractContextManager:
  """Scope to build models in that train: on `config.num_devices` devices, in bfloat16 where `config.mixed_precision` says so."""
  return devices.on(config.num_devices, mixed_precision=config.mixed_precision)


def new_retriever(config, tokenizer: Tokenizer) -> Retriever:
  """A retriever with fresh or published encoder weights, as `config.encoder`, `config.retriever` and `config.ict.from_mlm` say."""
  architecture, published_bert = new_encoder(config.encoder, tokenizer, config.retriever.passage_length)
  with scope(config):
    retriever = Retriever(architecture=architecture, **config.retriever)
  warm = (config.ict.from_mlm and _warm_reader(config, tokenizer)) or published_bert
  if warm and _sizes(warm.get_config()["architecture"]) != _sizes(architecture):
    raise errors.UserError(
      f"the masked-LM warm start {config.mlm.workdir!r} is of other sizes than config.encoder, because config.reader_encoder "
      "is. Set ict.from_mlm to False.")
  for tower in retriever.towers:
    start_encoder(tower.encoder, warm, config.encoder.init_std)
  return retriever


def new_masked_reader(config, tokenizer: Tokenizer, *, warm_start: bool = True) -> MaskedReader:
  """A masked reader with fresh or published weights, or with those of the masked-LM warm start where there is one."""
  section = config.reader_encoder
  architecture, published_bert = new_encoder(section, tokenizer, config.reader.length)
  with scope(config):
    reader = MaskedReader(architecture=architecture, query_length=config.retriever.query_length, **config.reader)
  if warm := (warm_start and _warm_reader(config, tokenizer)) or published_bert:
    reader.encoder.set_weights(warm.encoder.get_weights())
    reader.head.set_weights(warm.head.get_weights())
    if reader.pointer is not None and warm.pointer is not None:
      reader.pointer.set_weights(warm.pointer.get_weights())
  else:
    start_encoder(reader.encoder, None, section.init_std)
  return reader


def _sizes(architecture: dict) -> dict:
  return {name: architecture[name] for name in ("num_layers", "hidden_dim", "intermediate_dim", "max_sequence_length")}


def _warm_reader(config, tokenizer: Tokenizer) -> MaskedReader | None:
  """The masked reader that `realm_tf.pretrain_mlm` left in `config.mlm.workdir`; None where `config.mlm.steps` is 0."""
  if not config.mlm.steps:
    return None
  snapshot = snapshots.newest(config.mlm.workdir, advice="run realm_tf.pretrain_mlm first, or set mlm.steps to 0.")
  examples.check_vocabulary(artifacts.read_info(snapshot), snapshot, tokenizer)
  return snapshots.load_model(snapshot, "reader")


def new_encoder(section, tokenizer: Tokenizer, length: int) -> tuple[dict, MaskedReader | None]:
  """The architecture of an encoder, and the published BERT that it starts from, if any.

  Args:
    section: preset, or the sizes of a fresh one.
    length: most word pieces that it must take.

  Raises:
    EncoderError: it has another vocabulary, or takes fewer word pieces.
  """
  if section.preset:
    published_bert = _published_bert(section.preset)
    architecture = dict(published_bert.get_config()["architecture"])
  else:
    published_bert = None
    architecture = {name: section[name] for name in
                    ("num_layers", "num_heads", "hidden_dim", "intermediate_dim", "max_sequence_length")}
    architecture["vocabulary_size"] = tokenizer.size
  architecture["dropout"] = section.dropout
  if architecture["vocabulary_size"] != tokenizer.size:
    raise encoder.EncoderError(
        f"encoder.preset {section.preset!r} has {architecture['vocabulary_size']} word pieces, {tokenizer.path!r} has "
        f"{tokenizer.size}. Use the encoder's own: make_passages --vocab={section.preset} (a tagger's vocab).")
  if architecture["max_sequence_length"] < length:
    raise encoder.EncoderError(
        f"the encoder takes {architecture['max_sequence_length']} word pieces, the config asks for {length}. Shorten "
        "retriever.passage_length and reader.length (a tagger's length), or raise encoder.max_sequence_length.")
  return architecture, published_bert


def _published_bert(preset: str) -> MaskedReader:
  """From a workdir of realm_tf.import_checkpoint, or from a published checkpoint itself."""
  imported = artifacts.latest(os.path.join(preset, "snapshots"))
  if imported:
    model, fresh = snapshots.load_model(imported, "reader"), artifacts.read_info(imported).get("fresh", {}).get("reader", [])
  else:
    model, _, fresh = published.load_bert(preset)
  if fresh:
    print(f"encoder.preset {preset} lacks {' and '.join(fresh)}: a model that has them starts with fresh ones.")
  return model


def start_encoder(model: keras.Model, warm: MaskedReader | None, init_std: float) -> None:
  """Gives an encoder the weights of a masked reader's, or fresh ones of this standard deviation."""
  if warm is not None:
    model.set_weights(warm.encoder.get_weights())
  else:
    encoder.rescale_fresh(model, init_std)


def start(main: Callable[[Sequence[str]], None]) -> None:
  """Starts an entry point: a mistake of the user's ends with one clear line and exit code 1, not with a traceback."""
  def guarded(argv):
    try:
      main(argv)
    except UnicodeEncodeError as error:
      sys.exit(errors.words_of(error))
    except (artifacts.UserError, OSError, tf.errors.OpError) as error:
      sys.exit(f"{type(error).__name__}: {error}")

  app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
  """Absl's parser, with one line in place of ml_collections' traceback where the config has no such key."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:
    words = error.args[0]
    while isinstance(words, Exception):
      words = words.args[0]
    sys.exit(f"unknown config key: {'. '.join(str(words).splitlines())}")


def start_trainer(train: Callable, *, section: str) -> None:
  """Starts a trainer, `train(config, workdir)`, with --config and --workdir (default: `config.<section>.workdir`)."""
  config = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
  workdir = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and snapshots; run again, it goes on there.")
  flags.mark_flag_as_required("config")
  start(lambda argv: print(train(config.value, workdir.value or config.value[section].workdir)))
