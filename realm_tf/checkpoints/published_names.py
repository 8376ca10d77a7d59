"""Maps the tensors of published checkpoints to the variables of this project's models.

Names are Hugging Face's (BertModel and the Realm classes of transformers 4.39).
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import keras
import numpy as np

from realm_tf.checkpoints.tensor_files import CheckpointError, Tensor, Tensors
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Tower
from realm_tf.models.span_reader import SpanReader

BLOCK_EMBEDDINGS = "block_emb"


@dataclasses.dataclass(frozen=True)
class Slot:
  """A variable of a model, in the layout in which a published checkpoint stores it.

  Attributes:
    variable: the model's variable.
    shape: shape of the published tensor: kernels are [outputs, inputs], and attention heads are one
      dimension.
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
    return (
      np.ascontiguousarray(array.reshape(self.shape[::-1]).T)
      if self._is_kernel
      else array.reshape(self.shape)
    )

  @property
  def _is_kernel(self) -> bool:
    return self.variable.path.endswith("/kernel")


_BERT_NAMES = (  # ours -> theirs
  (r"token_embedding/", "embeddings.word_embeddings."),
  (r"position_embedding/", "embeddings.position_embeddings."),
  (r"segment_embedding/", "embeddings.token_type_embeddings."),
  (r"embeddings_layer_norm/", "embeddings.LayerNorm."),
  (r"transformer_layer_(\d+)/", r"encoder.layer.\1."),
  (r"self_attention_layer/attention_output/", "attention.output.dense."),
  (r"self_attention_layer/(query|key|value)/", r"attention.self.\1."),
  (r"self_attention_layer_norm/", "attention.output.LayerNorm."),
  (r"feedforward_intermediate_dense/", "intermediate.dense."),
  (r"feedforward_output_dense/", "output.dense."),
  (r"feedforward_layer_norm/", "output.LayerNorm."),
  (r"pooled_dense/", "pooler.dense."),
  (r"(kernel|gamma|embeddings)$", "weight"),
  (r"(bias|beta)$", "bias"),
)
Slots = dict[str, Slot]


def bert_slots(bert: keras.Model, prefix: str = "") -> Slots:
  """Returns published name -> slot for an encoder."""
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
  return {
    f"{name}.{kinds[variable.name]}": Slot.of(variable)
    for name, layer in layers.items()
    for variable in layer.weights
  }


def embedder_slots(tower: Tower, prefix: str = "") -> Slots:
  """Returns the slots of RealmEmbedder: BERT, and a projection of its pooled output."""
  return bert_slots(tower.encoder, f"{prefix}realm.") | _layer_slots(
    {f"{prefix}cls.dense": tower.projection, f"{prefix}cls.LayerNorm": tower.norm}
  )


def masked_reader_slots(reader: MaskedReader, bert: str = "realm.") -> Slots:
  """Returns the slots of RealmKnowledgeAugEncoder, or of a BERT with its masked-LM head."""
  weights = {
    variable.path.split("mlm_head/")[-1]: Slot.of(variable) for variable in reader.head.weights
  }
  names = {
    "output_bias": "bias",
    "intermediate_dense/kernel": "transform.dense.weight",
    "intermediate_dense/bias": "transform.dense.bias",
    "intermediate_layer_norm/gamma": "transform.LayerNorm.weight",
    "intermediate_layer_norm/beta": "transform.LayerNorm.bias",
  }
  return bert_slots(reader.encoder, bert) | {
    f"cls.predictions.{theirs}": weights[ours] for ours, theirs in names.items()
  }


def span_reader_slots(reader: SpanReader, prefix: str = "") -> Slots:
  """Returns the slots of RealmReader."""
  return bert_slots(reader.encoder, f"{prefix}realm.") | _layer_slots(
    {
      f"{prefix}qa_outputs.dense_intermediate": reader.ends,
      f"{prefix}qa_outputs.layer_normalization": reader.norm,
      f"{prefix}qa_outputs.dense_output": reader.score,
    }
  )


# buffers, and BERT's next-sentence head
_EVERYWHERE_UNUSED = rf".*position_ids|.*cls\.seq_relationship\..*|{BLOCK_EMBEDDINGS}"


def fill(slots: Slots, tensors: Tensors, *, source: str, unused: str = "$^") -> list[str]:
  """Assigns every tensor to its variable.

  Args:
    slots: the variables, by published name.
    tensors: their values, by published name.
    source: origin of the tensors, for messages.
    unused: pattern of names that may be left over.

  Returns:
    The names left over.

  Raises:
    CheckpointError: if a tensor is missing, unexpected or of another shape, before any variable is
      changed; or if its values are not finite.
  """
  left_over = sorted(set(tensors) - set(slots))
  unexpected = [
    name for name in left_over if not re.fullmatch(f"{_EVERYWHERE_UNUSED}|{unused}", name)
  ]
  missing = sorted(set(slots) - set(tensors))
  for what, names in (("lacks", missing), ("holds unexpected", unexpected)):
    if names:
      raise CheckpointError(
        f"{source!r} {what} {names[0]}"
        + (f" and {len(names) - 1} more" if names[1:] else "")
        + f". It has {len(tensors)} tensors, {len(slots)} are wanted: see "
        "realm_tf/checkpoints/published_names.py for their names."
      )
  for name, slot in slots.items():
    if tensors[name].shape != slot.shape:
      raise CheckpointError(
        f"{name} in {source!r} has shape {tensors[name].shape}, wanted {slot.shape}, as the "
        "config and the other tensors say."
      )
  for name, slot in slots.items():
    slot.put(tensors[name].read())
  return left_over


def with_tied_head(tensors: Tensors, word_embeddings: str) -> Tensors:
  """Keeps each tensor that a masked-LM head shares under one name; files have either name, or both.

  Raises:
    CheckpointError: if the head has separate word embeddings.
  """
  found = dict(tensors)
  for kept, other in (
    (word_embeddings, "cls.predictions.decoder.weight"),
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
  ):
    if other in found:
      tied = found.pop(other)
      if not np.array_equal(found.setdefault(kept, tied).read(), tied.read()):
        raise CheckpointError(
          f"{other} in {tied.path!r} differs from {kept}: the head is not tied to the word "
          "embeddings, but only tied heads are supported."
        )
  return found


def under(tensors: Tensors, prefix: str) -> Tensors:
  """Returns the tensors below a prefix, with the prefix removed."""
  return {
    name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
  }


# tensors with a row for each word piece
_OF_PIECES = (
  "embeddings.word_embeddings.weight",
  "cls.predictions.bias",
  "cls.predictions.decoder.weight",
  "cls.predictions.decoder.bias",
)


def with_pieces_swapped(tensors: Tensors, row: int) -> Tensors:
  """Returns the tensors with the rows of the first word piece and another one swapped."""
  return {
    name: _swapped(tensor, row) if row and name.endswith(_OF_PIECES) else tensor
    for name, tensor in tensors.items()
  }


def _swapped(tensor: Tensor, row: int) -> Tensor:

  def rows(start: int, stop: int) -> np.ndarray:
    found = np.array(tensor.rows(start, stop))
    for here, other in ((0, row), (row, 0)):
      if start <= here < stop:
        found[here - start] = tensor.rows(other, other + 1)[0]
    return found

  return dataclasses.replace(tensor, rows=rows)
