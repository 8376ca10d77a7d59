"""ICT's and REALM's loss of given weights and batches, on whichever backend Keras has."""

import os

import keras
import numpy as np

from realm_tf.models.in_batch import InBatchModel
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.realm import DISTILLATION, RealmModel
from realm_tf.models.retriever import Retriever

_ARCHITECTURE = {
  "vocabulary_size": 40,
  "num_layers": 1,
  "num_heads": 2,
  "hidden_dim": 8,
  "intermediate_dim": 16,
  "max_sequence_length": 12,
  "dropout": 0.0,
}


def compute(folder: str) -> dict[str, float]:
  """Returns the losses of the weights in `folder`; draws and saves weights there if it has none."""
  retriever = Retriever(
    architecture=_ARCHITECTURE, projection_dim=6, query_length=12, passage_length=12, dropout=0.0
  )
  reader = MaskedReader(architecture=_ARCHITECTURE, query_length=12, length=12, max_masks=2)
  rng = np.random.default_rng(0)
  for model in (retriever, reader):
    path = os.path.join(folder, f"{model.name}.npz")
    if not os.path.exists(path):
      shapes = [weight.shape for weight in model.get_weights()]
      np.savez(path, *[rng.normal(scale=0.3, size=shape).astype(np.float32) for shape in shapes])
    model.set_weights(list(np.load(path).values()))
  ict = {
    "query_ids": _ids(1, 4, 12),
    "passage_ids": _ids(2, 4, 12),
    "passage_segments": _ids(3, 4, 12) % 2,
    "removed": np.ones(4, np.float32),
  }
  realm = {
    "query_ids": _ids(4, 2, 12),
    "passage_ids": _ids(5, 2, 2, 12),
    "passage_segments": _ids(6, 2, 2, 12) % 2,
    "reader_ids": _ids(7, 2, 2, 12),
    "reader_segments": _ids(8, 2, 2, 12) % 2,
    "mask_positions": _ids(9, 2, 2) % 8,
    "targets": _ids(10, 2, 2),
    "target_mask": np.ones([2, 2], np.float32),
  }
  return {
    "ict": _loss(InBatchModel(retriever, measures_removed=True), ict),
    "recurring_spans": _loss(
      InBatchModel(retriever), {**ict, "allowed": np.triu(np.ones([4, 4], np.float32))}
    ),
    "realm": _loss(RealmModel(retriever, reader), realm),
    "batch_candidates": _loss(
      RealmModel(retriever, reader, batch_candidates=True, retriever_loss=DISTILLATION),
      {**realm, "unread": np.array([[0, 0, 0, 1], [0, 1, 0, 0]], np.float32)},
    ),
  }


def _ids(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(1, 40, shape).astype(np.int32)


def _loss(model: keras.Model, inputs: dict) -> float:
  inputs = {name: keras.ops.convert_to_tensor(value) for name, value in inputs.items()}
  return float(model.compute_loss(inputs, None, model(inputs, training=True)))
