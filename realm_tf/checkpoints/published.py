"""Published BERT and REALM checkpoints: detects the kind of a folder, and opens its tensors.

Supported are Hugging Face folders (BertModel and the Realm classes of transformers 4.39),
sentence-transformers folders that contain one, TF1 Hub modules, TF1 checkpoints (the original BERT,
ORQA's model directories) and KerasHub presets. Names below are Hugging Face's; TF1 names are
translated.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

from realm_tf.checkpoints import (
  huggingface_files,
  keras_hub_presets,
  tensorflow_files,
)
from realm_tf.checkpoints.published_limits import check_limits, shown
from realm_tf.checkpoints.published_names import BLOCK_EMBEDDINGS, bert_slots, with_pieces_swapped
from realm_tf.checkpoints.tensor_files import CheckpointError, Tensor, Tensors
from realm_tf.corpus import vocabularies
from realm_tf.corpus.vocabularies import Vocabulary
from realm_tf.storage import json_files, paths
from realm_tf.storage.artifacts import gfile

_MAX_NAME_CHARS = 300


@dataclasses.dataclass(frozen=True)
class Source:
  """A published checkpoint.

  Attributes:
    path: path as given.
    kind: "bert", "embedder", "scorer", "encoder", "reader" or "openqa", as in transformers.
    tensors: tensors by Hugging Face's names.
    config: values by the names of transformers' config.json; values that the checkpoint does not
      give are absent.
    vocabulary: vocabulary of the checkpoint, or None.
    blocks: path of the text of the passages whose embeddings it has, or None.
    notes: sentences for the user about the checkpoint.
  """

  path: str
  kind: str
  tensors: Tensors
  config: Mapping
  vocabulary: Vocabulary | None
  blocks: str | None = None
  notes: tuple[str, ...] = ()

  def with_pad_first(self, pad_row: int) -> "Source":
    """Returns the same source with word pieces in the order of a `Vocabulary` with `pad_row`."""
    return dataclasses.replace(self, tensors=with_pieces_swapped(self.tensors, pad_row))


def find(path: str, **config) -> Source:
  """Opens the published checkpoint in a folder.

  Args:
    path: the folder, or the name or handle of a KerasHub preset.
    config: values that the checkpoint does not give, as in transformers' config.json.

  Raises:
    CheckpointError: if there is no supported checkpoint, or it is damaged.
    VocabularyError: if its tokenizer is not a BERT tokenizer.
  """
  notes = _sentence_transformer_notes(path)
  path = vocabularies.transformer_in(path)
  told = _read_json(os.path.join(path, "config.json"))
  if not gfile.exists(path) or "registered_name" in told:
    return _keras_hub(path)
  if told:
    tensors = huggingface_files.open_huggingface(path)
  else:
    variables = tensorflow_files.open_tensorflow(_tensorflow_prefix(path))
    encoded = os.path.join(path, "encoded", "encoded.ckpt")  # in an ORQA model_dir
    if gfile.exists(f"{encoded}.index"):
      variables = {**variables, **tensorflow_files.open_tensorflow(encoded)}
    tensors = tensorflow_files.with_huggingface_names(variables)
    # the "gelu" of TF1's code
    told = _read_json(os.path.join(path, "bert_config.json")) | {"hidden_act": "gelu_new"}
  if any(name.startswith("reader.") for name in tensors):
    tensors = {
      name
      if name.startswith(("reader.", "embedder.", BLOCK_EMBEDDINGS))
      else f"embedder.{name}": tensor
      for name, tensor in tensors.items()
    }
  told = {name: value for name, value in told.items() if value is not None} | config
  check_limits(told, source=path)
  _check_names(path, tensors)
  # names from before 2019
  tensors = {
    re.sub(
      r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    ): tensor
    for name, tensor in tensors.items()
  }
  return Source(
    path,
    _kind(path, tensors),
    tensors,
    told,
    vocabulary=_vocabulary(path),
    blocks=_first_file(path, "blocks.tfr", "block_records.npy"),
    notes=notes,
  )


def _vocabulary(path: str) -> Vocabulary | None:
  found = _first_file(
    path, vocabularies.VOCAB, os.path.join("assets", vocabularies.VOCAB), vocabularies.TOKENIZER
  )
  return vocabularies.read(found) if found else None


def _sentence_transformer_notes(path: str) -> tuple[str, ...]:
  """Returns notes on how a sentence-transformers model makes its vectors.

  Raises:
    CheckpointError: if the retriever does not support the way they are made.
  """
  notes = []
  for kind, folder in vocabularies.modules_of(path):
    if kind in vocabularies.ENCODERS:
      length = _read_json(os.path.join(folder, "sentence_bert_config.json")).get("max_seq_length")
      notes += [f"it was trained on texts of at most {length} word pieces"] if length else []
    elif kind == "Pooling":
      pooling = _pooling(folder)
      notes.append(
        f"its vectors are pooled by {pooling!r}: train a retriever on it with "
        f"retriever.pooling={pooling!r} and retriever.segments=False"
      )
    elif kind != "Normalize":
      notes.append(f"its module {kind} is left out: the retriever's own projection replaces it")
  return tuple(notes)


def _pooling(folder: str) -> str:
  """Returns the pooling of a sentence-transformers model: "mean" or "cls"."""
  config = _read_json(os.path.join(folder, "config.json"))
  modes = [
    name for name, used in config.items() if name.startswith("pooling_mode_") and used is True
  ]
  modes = modes or [f"pooling_mode_{config.get('pooling_mode', 'mean_tokens')}"]
  known = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_cls": "cls",
  }
  if len(modes) != 1 or modes[0] not in known:
    raise CheckpointError(
      f"{folder!r} pools by {' and '.join(modes)}; a retriever pools by the mean of all word "
      "pieces or by [CLS]."
    )
  return known[modes[0]]


def _read_json(path: str) -> dict:
  return json_files.read(path, dict, error=CheckpointError)


def _check_names(path: str, tensors: Tensors) -> None:
  """Rejects unusual tensor names, because names appear in messages and logs."""
  for name in tensors:
    if len(name) > _MAX_NAME_CHARS or not name.isprintable():
      raise CheckpointError(f"{path!r} holds a tensor named {shown(name)}; BERT has no such name.")


def _first_file(folder: str, *names: str) -> str | None:
  return next((path for name in names if gfile.exists(path := os.path.join(folder, name))), None)


def _keras_hub(path: str) -> Source:
  preset = keras_hub_presets.read(path)
  bert = preset.bert
  return Source(
    path,
    "bert",
    {
      name: dataclasses.replace(Tensor.of(slot.get()), path=path, name=name)
      for name, slot in bert_slots(bert).items()
    },
    {"num_attention_heads": bert.num_heads, "hidden_dropout_prob": bert.dropout},
    vocabulary=preset.vocabulary,
  )


def _tensorflow_prefix(path: str) -> str:
  """Returns the prefix of the TensorFlow checkpoint in a folder.

  The checkpoint is a Hub module's variables, or the newest one in a model directory.
  """
  module = os.path.join(path, "variables", "variables")
  if gfile.exists(f"{module}.index"):
    return module

  def step_of(name):
    return int((re.findall(r"-(\d+)\.index$", name) or [-1])[0])

  indexes = sorted(paths.listed(path, r".*\.index"), key=step_of)
  if not indexes:
    raise CheckpointError(
      f"no supported checkpoint in {path!r}; wanted a Hugging Face folder (config.json and "
      "weights), a TF1 Hub module (saved_model.pb and variables/), a TF1 checkpoint (*.index) or "
      "a KerasHub preset."
    )
  return indexes[-1].removesuffix(".index")


def _kind(path: str, tensors: Tensors) -> str:
  def has(pattern):
    return any(re.match(pattern, name) for name in tensors)

  for kind, pattern in (
    ("openqa", r"reader\."),
    ("scorer", r"(query_)?embedder\."),
    ("reader", r"qa_outputs\."),
    ("embedder", r"cls\.dense\."),
    ("encoder", r"realm\."),
    ("bert", r"(bert\.)?embeddings\."),
  ):
    if has(pattern):
      return kind
  raise CheckpointError(
    f"{path!r} is neither BERT nor REALM: its tensors are named like "
    f"{', '.join(sorted(tensors)[:3])}."
  )
