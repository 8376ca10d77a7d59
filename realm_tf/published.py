"""Published BERT and REALM checkpoints: which one a folder holds, and where each of its tensors stands in our models.

Known are Hugging Face's folders (BertModel and the Realm classes of transformers 4.39), sentence-transformers' folders around such a
one, TF1 Hub modules, TF1 checkpoints (the original BERT's, ORQA's model directories) and KerasHub presets. Names below are Hugging Face's; TF1's are translated.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import keras
import keras_hub
import numpy as np

from realm_tf import artifacts, checkpoints, paths, vocabularies
from realm_tf.artifacts import gfile
from realm_tf.characters import WordRules
from realm_tf.checkpoints import KERAS_NORM, CheckpointError, Tensor, Tensors
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever, Tower
from realm_tf.models.span_reader import SpanReader
from realm_tf.vocabularies import Vocabulary

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_TF1_HEAD_DIM = 64  # of every released BERT
_KERAS_EPSILON = 1e-3
BLOCK_EMBEDDINGS = "block_emb"

# ================================================================================================================ names


@dataclasses.dataclass(frozen=True)
class Slot:
  """A variable of ours as a checkpoint stores it.

  Attributes:
    variable: ours.
    shape: of the published tensor: kernels are [outputs, inputs], and attention heads are one dimension.
  """

  variable: keras.Variable
  shape: tuple[int, ...]

  @classmethod
  def of(cls, variable: keras.Variable) -> "Slot":
    shape, name = tuple(variable.shape), variable.path
    if not name.endswith("/kernel"):
      return cls(variable, shape if name.endswith("/embeddings") else (math.prod(shape),))
    num_inputs = math.prod(shape[:-1]) if "/attention_output/" in name else shape[0]
    return cls(variable, (math.prod(shape) // num_inputs, num_inputs))

  def put(self, array: np.ndarray) -> None:
    self.variable.assign((array.T if self._is_kernel else array).reshape(self.variable.shape))

  def get(self) -> np.ndarray:
    array = keras.ops.convert_to_numpy(self.variable)
    return np.ascontiguousarray(array.reshape(self.shape[::-1]).T) if self._is_kernel else array.reshape(self.shape)

  @property
  def _is_kernel(self) -> bool:
    return self.variable.path.endswith("/kernel")


_BERT_NAMES = (  # ours -> theirs
    (r"token_embedding/", "embeddings.word_embeddings."), (r"position_embedding/", "embeddings.position_embeddings."),
    (r"segment_embedding/", "embeddings.token_type_embeddings."), (r"embeddings_layer_norm/", "embeddings.LayerNorm."),
    (r"transformer_layer_(\d+)/", r"encoder.layer.\1."), (r"self_attention_layer/attention_output/", "attention.output.dense."),
    (r"self_attention_layer/(query|key|value)/", r"attention.self.\1."), (r"self_attention_layer_norm/", "attention.output.LayerNorm."),
    (r"feedforward_intermediate_dense/", "intermediate.dense."), (r"feedforward_output_dense/", "output.dense."),
    (r"feedforward_layer_norm/", "output.LayerNorm."), (r"pooled_dense/", "pooler.dense."),
    (r"(kernel|gamma|embeddings)$", "weight"), (r"(bias|beta)$", "bias"))
Slots = Mapping[str, Slot]


def bert_slots(bert: keras.Model, prefix: str = "") -> Slots:
  """Published name -> place, of an encoder."""
  found = {}
  for variable in bert.weights:
    name = variable.path
    if not name.split("/")[-1].startswith("seed"):
      for pattern, replacement in _BERT_NAMES:
        name = re.sub(pattern, replacement, name)
      found[prefix + name] = Slot.of(variable)
  return found


def _layer_slots(layers: Mapping[str, keras.Layer]) -> Slots:
  kinds = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}
  return {f"{name}.{kinds[variable.name]}": Slot.of(variable) for name, layer in layers.items() for variable in layer.weights}


def embedder_slots(tower: Tower, prefix: str = "") -> Slots:
  """RealmEmbedder: BERT, and a projection of its pooled output."""
  return bert_slots(tower.encoder, f"{prefix}realm.") | _layer_slots(
      {f"{prefix}cls.dense": tower.projection, f"{prefix}cls.LayerNorm": tower.norm})


def masked_reader_slots(reader: MaskedReader, bert: str = "realm.") -> Slots:
  """RealmKnowledgeAugEncoder, or a BERT with its masked-LM head."""
  weights = {variable.path.split("mlm_head/")[-1]: Slot.of(variable) for variable in reader.head.weights}
  names = {"output_bias": "bias", "intermediate_dense/kernel": "transform.dense.weight", "intermediate_dense/bias": "transform.dense.bias",
           "intermediate_layer_norm/gamma": "transform.LayerNorm.weight", "intermediate_layer_norm/beta": "transform.LayerNorm.bias"}
  return bert_slots(reader.encoder, bert) | {f"cls.predictions.{theirs}": weights[ours] for ours, theirs in names.items()}


def span_reader_slots(reader: SpanReader, prefix: str = "") -> Slots:
  """RealmReader."""
  return bert_slots(reader.encoder, f"{prefix}realm.") | _layer_slots({
      f"{prefix}qa_outputs.dense_intermediate": reader.ends, f"{prefix}qa_outputs.layer_normalization": reader.norm,
      f"{prefix}qa_outputs.dense_output": reader.score})


_EVERYWHERE_UNUSED = rf".*position_ids|.*cls\.seq_relationship\..*|{BLOCK_EMBEDDINGS}"  # buffers, and BERT's next-sentence head
_HEAD = r"cls\.predictions\..*"  # of an embedder or a span reader: REALM does not use it there


def fill(slots: Slots, tensors: Tensors, *, source: str, unused: str = "$^") -> list[str]:
  """Puts every tensor into its variable, or raises before any is changed.

  Args:
    slots, tensors: by published name.
    source: where the tensors are from, for messages.
    unused: pattern of names that may be left over.

  Returns:
    The names left over.

  Raises:
    CheckpointError: a tensor is missing, unexpected or of another shape.
  """
  left_over = sorted(set(tensors) - set(slots))
  unexpected = [name for name in left_over if not re.fullmatch(f"{_EVERYWHERE_UNUSED}|{unused}", name)]
  missing = sorted(set(slots) - set(tensors))
  for what, names in (("lacks", missing), ("holds unexpected", unexpected)):
    if names:
      raise CheckpointError(f"{source!r} {what} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") +
                            f". It has {len(tensors)} tensors, {len(slots)} are wanted: see realm_tf/published.py for their names.")
  for name, slot in slots.items():
    if tensors[name].shape != slot.shape:
      raise CheckpointError(f"{name} in {source!r} has shape {tensors[name].shape}, wanted {slot.shape}, as the config and the other "
                            "tensors say.")
  for name, slot in slots.items():
    slot.put(tensors[name].read())
  return left_over


def with_tied_head(tensors: Tensors, word_embeddings: str) -> Tensors:
  """Each tensor that a masked-LM head shares under one name: files keep either of the two, or both.

  Raises:
    CheckpointError: the head has word embeddings of its own.
  """
  found = dict(tensors)
  for kept, other in ((word_embeddings, "cls.predictions.decoder.weight"), ("cls.predictions.bias", "cls.predictions.decoder.bias")):
    if other in found:
      tied = found.pop(other)
      if not np.array_equal(found.setdefault(kept, tied).read(), tied.read()):
        raise CheckpointError(f"{other} in {tied.path!r} differs from {kept}: that head is not tied to the word embeddings, ours is.")
  return found


def under(tensors: Tensors, prefix: str) -> Tensors:
  """The tensors below a prefix, without it."""
  return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# ============================================================================================================== sources


@dataclasses.dataclass(frozen=True)
class Source:
  """A published checkpoint.

  Attributes:
    path: as given.
    kind: "bert", "embedder", "scorer", "encoder", "reader" or "openqa", as transformers calls them.
    tensors: by Hugging Face's names.
    config: as transformers' config.json names the values; what the checkpoint does not tell is not there.
    vocabulary: its own, or None.
    blocks: path of the text of the passages that it has embeddings of, or None.
    notes: what a user should know of it, in sentences.
  """

  path: str
  kind: str
  tensors: Tensors
  config: Mapping
  vocabulary: Vocabulary | None
  blocks: str | None = None
  notes: tuple[str, ...] = ()

  def with_pad_first(self, pad_row: int) -> "Source":
    """The same with the word pieces in the order of a `Vocabulary` with this `pad_row`."""
    return dataclasses.replace(self, tensors=with_pieces_swapped(self.tensors, pad_row))


_OF_PIECES = ("embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.weight",
              "cls.predictions.decoder.bias")  # a row for each word piece


def with_pieces_swapped(tensors: Tensors, row: int) -> Tensors:
  """The tensors with the first word piece and another one in each other's place."""
  return {name: _swapped(tensor, row) if row and name.endswith(_OF_PIECES) else tensor for name, tensor in tensors.items()}


def _swapped(tensor: Tensor, row: int) -> Tensor:

  def rows(start: int, stop: int) -> np.ndarray:
    found = np.array(tensor.rows(start, stop))
    for here, other in ((0, row), (row, 0)):
      if start <= here < stop:
        found[here - start] = tensor.rows(other, other + 1)[0]
    return found

  return Tensor(tensor.shape, tensor.path, rows)


def find(path: str, **config) -> Source:
  """Looks at what a folder holds.

  Args:
    path: the folder, or the name or handle of a KerasHub preset.
    config: values that the checkpoint does not tell, as in transformers' config.json.

  Raises:
    CheckpointError: nothing that is known here, or it is damaged.
    VocabularyError: its tokenizer is not of BERT's kind.
  """
  notes = _sentence_transformer_notes(path)
  path = vocabularies.transformer_in(path)
  told = _read_json(os.path.join(path, "config.json"))
  if not gfile.exists(path) or "registered_name" in told:
    return _find_keras_hub(path)
  if told:
    tensors = checkpoints.open_huggingface(path)
  else:
    variables = checkpoints.open_tensorflow(_tensorflow_prefix(path))
    encoded = os.path.join(path, "encoded", "encoded.ckpt")  # in an ORQA model_dir
    if gfile.exists(f"{encoded}.index"):
      variables = {**variables, **checkpoints.open_tensorflow(encoded)}
    tensors = checkpoints.with_huggingface_names(variables)
    told = _read_json(os.path.join(path, "bert_config.json")) | {"hidden_act": "gelu_new"}  # what TF1's code calls "gelu"
  if any(name.startswith("reader.") for name in tensors):
    tensors = {name if name.startswith(("reader.", "embedder.", BLOCK_EMBEDDINGS)) else f"embedder.{name}": tensor
               for name, tensor in tensors.items()}
  tensors = {re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)): tensor
             for name, tensor in tensors.items()}  # of before 2019
  return Source(
      path, _kind(path, tensors), tensors, told | config, vocabulary=_vocabulary(path),
      blocks=_first_file(path, "blocks.tfr", "block_records.npy"), notes=notes)


def _vocabulary(path: str) -> Vocabulary | None:
  found = _first_file(path, vocabularies.VOCAB, os.path.join("assets", vocabularies.VOCAB), vocabularies.TOKENIZER)
  return vocabularies.read(found) if found else None


def _sentence_transformer_notes(path: str) -> tuple[str, ...]:
  """What a sentence-transformers folder tells of how its vectors are made.

  Raises:
    CheckpointError: they are made in a way that our retriever does not know.
  """
  notes = []
  for kind, folder in vocabularies.modules_of(path):
    if kind in vocabularies.ENCODERS:
      length = _read_json(os.path.join(folder, "sentence_bert_config.json")).get("max_seq_length")
      notes += [f"it was trained on texts of at most {length} word pieces"] if length else []
    elif kind == "Pooling":
      notes.append(f"its vectors are pooled by {_pooling(folder)!r}: train a retriever on it with retriever.pooling={_pooling(folder)!r}")
    elif kind != "Normalize":
      notes.append(f"its module {kind} is left out: the retriever's own projection takes its place")
  return tuple(notes)


def _pooling(folder: str) -> str:
  """"mean" or "cls", as a sentence-transformers model pools."""
  config = _read_json(os.path.join(folder, "config.json"))
  modes = [name for name, used in config.items() if name.startswith("pooling_mode_") and used is True]
  modes = modes or [f"pooling_mode_{config.get('pooling_mode', 'mean_tokens')}"]
  known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_mean": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_cls": "cls"}
  if len(modes) != 1 or modes[0] not in known:
    raise CheckpointError(f"{folder!r} pools by {' and '.join(modes)}; a retriever pools by the mean of all word pieces or by [CLS].")
  return known[modes[0]]


def _read_json(path: str) -> dict:
  if not gfile.exists(path):
    return {}
  try:
    return dict(json.loads(artifacts.read_text(path)))
  except (ValueError, TypeError) as error:
    raise CheckpointError(f"{path!r} is not a JSON object: {error}. Download it again.") from error


def _first_file(folder: str, *names: str) -> str | None:
  return next((path for name in names if gfile.exists(path := os.path.join(folder, name))), None)


def _find_keras_hub(path: str) -> Source:
  try:
    bert = keras_hub.models.BertBackbone.from_preset(path)
    tokenizer = keras_hub.models.BertTokenizer.from_preset(path)
  except (ValueError, OSError) as error:
    raise CheckpointError(f"there is no folder {path!r}, and KerasHub has no BERT of that name: {error}") from error
  tensors = {name: Tensor.of(slot.get()) for name, slot in bert_slots(bert).items()}
  rules = WordRules.for_case(tokenizer.lowercase)  # KerasHub keeps accents, but the weights are of BERT's, which strips them
  return Source(path, "bert", tensors, {"num_attention_heads": bert.num_heads, "hidden_dropout_prob": bert.dropout},
                vocabulary=vocabularies.of(tokenizer.get_vocabulary(), rules, path=path))


def _tensorflow_prefix(path: str) -> str:
  """Of the TensorFlow checkpoint in a folder: a Hub module's variables, or the newest of a model directory."""
  module = os.path.join(path, "variables", "variables")
  if gfile.exists(f"{module}.index"):
    return module
  step_of = lambda name: int((re.findall(r"-(\d+)\.index$", name) or [-1])[0])
  indexes = sorted(paths.listed(path, r".*\.index"), key=step_of)
  if not indexes:
    raise CheckpointError(
        f"nothing that is known in {path!r}; wanted a Hugging Face folder (config.json and weights), a TF1 Hub module (saved_model.pb "
        "and variables/), a TF1 checkpoint (*.index) or a KerasHub preset.")
  return indexes[-1].removesuffix(".index")


def _kind(path: str, tensors: Tensors) -> str:
  has = lambda pattern: any(re.match(pattern, name) for name in tensors)
  for kind, pattern in (("openqa", r"reader\."), ("scorer", r"(query_)?embedder\."), ("reader", r"qa_outputs\."),
                        ("embedder", r"cls\.dense\."), ("encoder", r"realm\."), ("bert", r"(bert\.)?embeddings\.")):
    if has(pattern):
      return kind
  raise CheckpointError(f"{path!r} is neither BERT nor REALM: its tensors are named like {', '.join(sorted(tensors)[:3])}.")


def architecture_of(config: Mapping, bert: Tensors, *, source: str) -> dict:
  """An encoder's sizes from its tensors, and from its config what they do not tell."""
  try:
    shapes = {what: bert[f"{name}.weight"].shape for what, name in (
        ("words", "embeddings.word_embeddings"), ("positions", "embeddings.position_embeddings"),
        ("feedforward", "encoder.layer.0.intermediate.dense"))}
  except KeyError as error:
    raise CheckpointError(f"{source!r} lacks {error.args[0]}, which every BERT has.") from error
  activation = config.get("hidden_act", "gelu_new")
  if activation not in _ACTIVATIONS:
    raise CheckpointError(f"{source!r} was trained with hidden_act={activation!r}; known are {', '.join(_ACTIVATIONS)}.")
  (vocabulary_size, hidden_dim), num_positions = shapes["words"], shapes["positions"][0]
  return {
      "vocabulary_size": vocabulary_size, "hidden_dim": hidden_dim, "max_sequence_length": num_positions,
      "num_layers": len({name.split(".")[2] for name in bert if name.startswith("encoder.layer.")}),
      "intermediate_dim": shapes["feedforward"][0],
      "num_heads": config.get("num_attention_heads", max(hidden_dim // _TF1_HEAD_DIM, 1)),
      "dropout": config.get("hidden_dropout_prob", 0.1), "activation": _ACTIVATIONS[activation],
      "layer_norm_epsilon": config.get("layer_norm_eps", 1e-12)}


def hidden_act_of(architecture: Mapping) -> str:
  """An encoder's activation as transformers calls it."""
  return {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[architecture.get("activation", "gelu_tanh")]


# =============================================================================================================== models


class Loaded(NamedTuple):
  """A model with published weights.

  Attributes:
    model: ours.
    unused: names of tensors that have no place in it.
    fresh: what the checkpoint lacks and may lack.
  """

  model: keras.Model
  unused: list[str]
  fresh: list[str] = []


def load_bert(path: str, **config) -> Loaded:
  """A BERT as a masked reader; see `find`."""
  source = find(path, **config)
  return load_masked_reader(source.with_pad_first(source.vocabulary.pad_row) if source.vocabulary else source)


def _new_masked_reader(architecture: Mapping) -> MaskedReader:
  length = min(384, architecture["max_sequence_length"])
  return MaskedReader(architecture=dict(architecture), query_length=min(96, length // 2), length=length)


def load_masked_reader(source: Source) -> Loaded:
  """The knowledge-augmented encoder, or a BERT, whose masked-LM head and pooler may be fresh.

  Raises:
    CheckpointError: another kind, or tensors that do not fit.
  """
  prefix = {"encoder": "realm.", "bert": "bert." if any(name.startswith("bert.") for name in source.tensors) else ""}.get(source.kind)
  if prefix is None:
    raise CheckpointError(f"{source.path!r} holds REALM's {source.kind}; wanted a BERT.")
  tensors = with_tied_head(source.tensors, f"{prefix}embeddings.word_embeddings.weight")
  reader = _new_masked_reader(architecture_of(source.config, under(tensors, prefix), source=source.path))
  fresh = [part for part in (f"{prefix}pooler.", "cls.predictions.") if not any(name.startswith(part) for name in tensors)]
  slots = {name: slot for name, slot in masked_reader_slots(reader, prefix).items() if not name.startswith(tuple(fresh))}
  names = {"cls.predictions.": "a masked-LM head"}
  return Loaded(reader, fill(slots, tensors, source=source.path), [names.get(part, "a pooler") for part in fresh])


def load_retriever(query: tuple[Source, str], passage: tuple[Source, str]) -> Loaded:
  """A retriever from the embedders of its towers.

  Args:
    query, passage: where each tower's tensors are, and their prefix; the same for a shared tower.

  Raises:
    CheckpointError: tensors that do not fit.
  """
  (source, prefix), unused = passage, []
  tensors, epsilon = _projection(under(source.tensors, prefix))
  architecture = architecture_of(source.config, under(tensors, "realm."), source=source.path)
  projection_dim, length = _shape(tensors, "cls.dense.weight", source)[0], architecture["max_sequence_length"]
  retriever = Retriever(architecture=architecture, projection_dim=projection_dim, query_length=min(96, length),
                        passage_length=min(288, length), shared=query == passage, norm_epsilon=epsilon)
  for tower, (source, prefix) in zip(retriever.towers, (query, passage)):
    unused += fill(embedder_slots(tower), _projection(under(source.tensors, prefix))[0], source=source.path, unused=_HEAD)
  return Loaded(retriever, unused)


def _projection(embedder: Tensors) -> tuple[Tensors, float | None]:
  """An embedder with its layer norm under one name, and that norm's epsilon where it is not the encoder's.

  REALM's released modules have BERT's own layer norm there, ORQA's have Keras' (google-research/language,
  `orqa/models/ict_model.py`).
  """
  theirs = f"cls.{KERAS_NORM}."
  renamed = {name.replace(theirs, "cls.LayerNorm."): tensor for name, tensor in embedder.items()}
  return renamed, _KERAS_EPSILON if f"{theirs}weight" in embedder else None


def load_span_reader(source: Source, prefix: str = "") -> Loaded:
  """The reader of Open-QA, alone or below a prefix.

  Raises:
    CheckpointError: tensors that do not fit.
  """
  tensors, config = under(source.tensors, prefix), source.config
  architecture = architecture_of(config, under(tensors, "realm."), source=source.path)
  length = min(config.get("reader_seq_len", 320), architecture["max_sequence_length"])
  reader = SpanReader(
      architecture=architecture, query_length=min(64, length // 2), length=length, max_span=config.get("max_span_width", 10),
      span_dim=_shape(tensors, "qa_outputs.dense_output.weight", source)[1], norm_epsilon=config.get("reader_layer_norm_eps", 1e-3))
  return Loaded(reader, fill(span_reader_slots(reader), tensors, source=source.path, unused=_HEAD))


def _shape(tensors: Tensors, name: str, source: Source) -> tuple[int, ...]:
  if name not in tensors or len(tensors[name].shape) != 2:
    raise CheckpointError(f"{source.path!r} lacks the matrix {name}, which every REALM {source.kind} has.")
  return tensors[name].shape
