"""KerasHub's BERT presets.

Folders are read as data, because KerasHub itself imports any module that a config.json names.
"""

import math
import os
from typing import NamedTuple

import h5py
import keras
import keras_hub

from realm_tf.checkpoints.published_limits import check_limits, shown, values_of_encoder
from realm_tf.checkpoints.tensor_files import CheckpointError
from realm_tf.corpus import vocabularies
from realm_tf.corpus.characters import WordRules
from realm_tf.corpus.vocabularies import Vocabulary
from realm_tf.storage import json_files
from realm_tf.storage.artifacts import gfile

_CLASSES = {f"{package}>{{}}" for package in ("keras_hub", "keras_nlp")}
# what h5py and Keras raise on damaged files
_DAMAGED = (ValueError, TypeError, LookupError, OSError, RuntimeError, SystemError)
_SHOWN_CHARS = 300  # of another program's message
_WEIGHTS = "model.weights.h5"
_VOCABULARY = os.path.join("assets", "tokenizer", "vocabulary.txt")
_NAMES = {  # KerasHub's -> transformers'
  "vocabulary_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "hidden_dim": "hidden_size",
  "intermediate_dim": "intermediate_size",
  "dropout": "hidden_dropout_prob",
  "max_sequence_length": "max_position_embeddings",
  "num_segments": "type_vocab_size",
}


class Preset(NamedTuple):
  """A BERT with its weights and its vocabulary."""

  bert: keras.Model
  vocabulary: Vocabulary


def read(path: str) -> Preset:
  """Reads a preset's folder, or loads a preset by name through KerasHub.

  Args:
    path: a folder, or a name or handle that KerasHub downloads and opens itself.

  Raises:
    CheckpointError: if the preset is not a BERT, or is damaged.
    VocabularyError: if its vocabulary is not a BERT vocabulary.
  """
  if not gfile.exists(path):
    return _by_name(path)
  for name in (_VOCABULARY, _WEIGHTS):
    if not gfile.exists(os.path.join(path, name)):
      raise CheckpointError(f"{path!r} has no {name}. Download the preset again.")
  weights = os.path.join(path, _WEIGHTS)
  sizes = _sizes(path, num_bytes=_check_weights(weights))
  lower_case = _config(path, "tokenizer.json", "BertTokenizer").get("lowercase", False)
  if not isinstance(lower_case, bool):
    raise CheckpointError(
      f"tokenizer.json in {path!r} has a 'lowercase' that is not true or false."
    )
  pieces = vocabularies.read_lines(os.path.join(path, _VOCABULARY))
  vocabulary = vocabularies.of(pieces, _rules(lower_case), path=path)
  try:
    bert = keras_hub.models.BertBackbone(**sizes)
    bert.load_weights(weights)
  except _DAMAGED as error:
    raise CheckpointError(
      f"{weights!r} does not fit its config.json: {str(error)[:_SHOWN_CHARS]}"
    ) from error
  return Preset(bert, vocabulary)


def _sizes(path: str, *, num_bytes: int) -> dict:
  """Returns the sizes in config.json by KerasHub's names, checked against the weights file."""
  config = _config(path, "config.json", "BertBackbone")
  sizes = {ours: config[ours] for ours in _NAMES if ours in config}
  if missing := sorted(set(_NAMES) - {"dropout", "num_segments"} - set(sizes)):
    raise CheckpointError(f"{path!r} has a config.json that lacks {', '.join(missing)}.")
  theirs = {_NAMES[ours]: value for ours, value in sizes.items()}
  check_limits(theirs, source=path)
  if values_of_encoder(theirs, source=path) > num_bytes:
    raise CheckpointError(
      f"{path!r} has a config.json for a larger BERT than {_WEIGHTS} holds. Download it again."
    )
  if sizes["hidden_dim"] % sizes["num_heads"]:
    raise CheckpointError(
      f"{path!r} says {sizes['num_heads']} heads, which do not divide {sizes['hidden_dim']} "
      "dimensions."
    )
  return sizes


def _by_name(name: str) -> Preset:
  try:
    bert = keras_hub.models.BertBackbone.from_preset(name)
    tokenizer = keras_hub.models.BertTokenizer.from_preset(name)
  except (ValueError, OSError) as error:
    raise CheckpointError(
      f"there is no folder {name!r}, and KerasHub has no BERT of that name: {error}"
    ) from error
  rules = _rules(tokenizer.lowercase)
  return Preset(bert, vocabularies.of(tokenizer.get_vocabulary(), rules, path=name))


def _rules(lower_case: bool) -> WordRules:
  """Returns BERT's rules, with which the weights were trained; KerasHub's keep accents."""
  return WordRules.for_case(lower_case)


def _config(path: str, name: str, class_name: str) -> dict:
  """Returns the config of a KerasHub class from a JSON file of the preset."""
  told = json_files.read(os.path.join(path, name), dict, error=CheckpointError)
  config = told.get("config")
  if told.get("registered_name") not in [form.format(class_name) for form in _CLASSES]:
    raise CheckpointError(f"{name} in {path!r} is not a config of KerasHub's {class_name}.")
  if not isinstance(config, dict):
    raise CheckpointError(f"{name} in {path!r} has no config. Download the preset again.")
  return config


def _check_weights(path: str) -> int:
  """Returns the size of an HDF5 file after checking that it holds only plain arrays.

  Links and external storage could read other files on this machine, and filters and unwritten
  parts could expand to any size.

  Raises:
    CheckpointError: if the file is damaged or holds more than plain arrays.
  """
  try:
    num_bytes = os.stat(path).st_size
    with h5py.File(path, "r") as file:
      total = _bytes_in(file, path)
  except CheckpointError:
    raise
  except _DAMAGED as error:
    raise CheckpointError(
      f"{path!r} is not a complete HDF5 file ({str(error)[:_SHOWN_CHARS]})."
    ) from error
  if total > num_bytes:
    raise CheckpointError(f"{path!r} holds fewer values than it declares.")
  return num_bytes


def _bytes_in(file: h5py.File, path: str) -> int:
  """Returns the bytes of all arrays in a file.

  Raises:
    CheckpointError: if the file holds anything but plain arrays.
  """
  links: list[tuple[str, object]] = []
  # Collected first, because h5py does not propagate errors raised inside the visitor.
  file.visititems_links(lambda name, link: links.append((name, link)))
  total = 0
  for name, link in links:
    if not isinstance(link, h5py.HardLink):
      raise CheckpointError(f"{path!r} has a link to elsewhere at {shown(name)}.")
    item = file[name]
    if isinstance(item, h5py.Dataset):
      plain = item.id.get_create_plist().get_nfilters() == 0
      if not plain or item.external or item.is_virtual or item.dtype.kind != "f":
        raise CheckpointError(f"{path!r} holds more than plain arrays at {shown(name)}.")
      total += math.prod(item.shape) * item.dtype.itemsize
  return total
