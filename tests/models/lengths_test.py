"""Running rows of similar length together changes no value and no gradient."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from realm_tf.models import lengths
from realm_tf.models.in_batch import InBatchModel
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.realm import RealmModel
from realm_tf.models.retriever import Retriever

VOCABULARY, QUERY, PASSAGE, READ, MASKS = 50, 12, 20, 32, 4
ARCHITECTURE = dict(
  vocabulary_size=VOCABULARY,
  num_layers=2,
  num_heads=2,
  hidden_dim=16,
  intermediate_dim=32,
  max_sequence_length=READ,
  dropout=0.0,
)


def packed(rng, used, length: int) -> np.ndarray:
  """Random word pieces [N, length] int32, zero after the first used[i] of row i."""
  used = np.asarray(used)
  ids = rng.integers(5, VOCABULARY, [len(used), length])
  return np.where(np.arange(length) < used[:, None], ids, 0).astype(np.int32)


def segments(ids: np.ndarray) -> np.ndarray:
  """Makes the second half of each row's word pieces segment 1."""
  used = np.count_nonzero(ids, axis=1)[:, None]
  places = np.arange(ids.shape[1])
  return ((places >= used // 2) & (places < used)).astype(np.int32)


@pytest.mark.parametrize("num", [1, 3, 4, 9])
def test_rows_come_back_in_order(num, monkeypatch):
  monkeypatch.setattr(lengths, "_WORTH", 0)
  rng = np.random.default_rng(num)
  used = rng.integers(0, PASSAGE + 1, num)
  ids, seen = packed(rng, used, PASSAGE), []

  def count(token_ids, weights):
    seen.append(token_ids.shape[1])
    return tf.reduce_sum(token_ids, axis=1) * weights

  weights = rng.integers(1, 9, num).astype(np.int32)
  got = lengths.by_length(
    count, {"token_ids": tf.constant(ids)}, {"weights": tf.constant(weights)}, static=False
  )
  np.testing.assert_array_equal(got, ids.sum(1) * weights)
  assert (
    seen == sorted(seen) and seen[-1] >= used.max() and all(n % 8 == 0 or n == 20 for n in seen)
  )


@pytest.mark.parametrize("static, worth", [(True, 0), (False, 10_000)])
def test_static_shapes_and_small_batches_run_as_they_are(static, worth, monkeypatch):
  monkeypatch.setattr(lengths, "_WORTH", worth)
  seen = []
  ids = tf.zeros([8, PASSAGE], tf.int32)
  lengths.by_length(
    lambda token_ids: seen.append(token_ids.shape) or token_ids, {"token_ids": ids}, static=static
  )
  assert seen == [(8, PASSAGE)]


def in_batch():
  rng = np.random.default_rng(0)
  passages = packed(rng, [20, 3, 7, 8, 12, 1, 19], PASSAGE)
  batch = {
    "query_ids": packed(rng, [3, 12, 5, 5, 9, 1, 2], QUERY),
    "passage_ids": passages,
    "passage_segments": segments(passages),
  }
  return InBatchModel(retriever()), batch


def retriever() -> Retriever:
  return Retriever(
    architecture=ARCHITECTURE,
    projection_dim=8,
    query_length=QUERY,
    passage_length=PASSAGE,
    dropout=0.0,
    pooling="mean",
  )


def realm(*, copies: bool):
  rng = np.random.default_rng(1)
  count, num = 3, 4
  passages = packed(rng, rng.integers(3, PASSAGE + 1, count * num), PASSAGE)
  read = packed(rng, rng.integers(8, READ + 1, count * num), READ)
  num_masks = np.array([1, 4, 2])
  used = np.arange(MASKS) < num_masks[:, None]
  batch = {
    "query_ids": packed(rng, [4, 12, 7], QUERY),
    "passage_ids": passages.reshape(count, num, -1),
    "passage_segments": segments(passages).reshape(count, num, -1),
    "reader_ids": read.reshape(count, num, -1),
    "reader_segments": segments(read).reshape(count, num, -1),
    "mask_positions": np.where(used, rng.integers(1, 4, used.shape), 0).astype(np.int32),
    "targets": np.where(used, rng.integers(5, VOCABULARY, used.shape), 0).astype(np.int32),
    "target_mask": used.astype(np.float32),
  }
  reader = MaskedReader(
    architecture=ARCHITECTURE,
    query_length=QUERY,
    length=READ,
    max_masks=MASKS,
    copies=copies,
  )
  return RealmModel(retriever(), reader), batch


@pytest.mark.parametrize(
  "make",
  [in_batch, lambda: realm(copies=False), lambda: realm(copies=True)],
  ids=["in-batch", "realm", "realm that copies"],
)
def test_losses_and_gradients_are_those_of_whole_batches(make, monkeypatch):
  keras.utils.set_random_seed(0)
  model, batch = make()
  model.compile(jit_compile=False)
  batch = {name: tf.constant(value) for name, value in batch.items()}

  def learn():
    with tf.GradientTape() as tape:
      outputs = model(batch, training=True)
      loss = model.compute_loss(batch, None, outputs)
    return loss, tape.gradient(
      loss, model.trainable_variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )

  monkeypatch.setattr(lengths, "_WORTH", 10**9)
  loss, gradients = tf.function(learn)()
  monkeypatch.setattr(lengths, "_WORTH", 0)
  got_loss, got_gradients = tf.function(learn)()
  np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
  for variable, got, wanted in zip(
    model.trainable_variables, got_gradients, gradients, strict=True
  ):
    np.testing.assert_allclose(
      tf.convert_to_tensor(got),
      tf.convert_to_tensor(wanted),
      rtol=2e-4,
      atol=2e-6,
      err_msg=variable.path,
    )
