"""The passage tower of a snapshot as a worker uses it: batches of similar length, compiled once."""

import functools
import os
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from realm_tf.corpus import passages
from realm_tf.examples import packing
from realm_tf.models import devices, fused, snapshots
from realm_tf.storage import artifacts
from realm_tf.storage.columns import Ragged

COUNTERS = ("passages", "tokens", "padded_tokens", "cut_passages", "cut_tokens")
_LENGTH_STEP = 16  # lengths are rounded up to multiples of this, to compile few programs


class Embedder:
  """The passage tower of a snapshot, compiled for few input shapes.

  Args:
    snapshot: the snapshot folder.
    batch_size: passages in a batch.
    jit_compile: compile with XLA on a GPU. CPUs run `fused.encode`, which is faster there.
    mixed_precision: compute in bfloat16; weights and embeddings stay float32.
  """

  def __init__(self, snapshot: str, *, batch_size: int, jit_compile: bool, mixed_precision: bool):
    self.batch_size = batch_size
    on_cpu = devices.are_tensorflow_cpus()
    self._fills_batches = not on_cpu  # each new shape is compiled anew
    policy = keras.config.dtype_policy()
    low = "mixed_bfloat16" if mixed_precision and not on_cpu else "float32"
    keras.config.set_dtype_policy(low)
    try:
      self.retriever = snapshots.load_retriever(snapshot)
    finally:
      keras.config.set_dtype_policy(policy)
    self.tokenizer = snapshots.load_tokenizer(snapshot)
    self._snapshot = artifacts.read_info(snapshot)["fingerprint"]
    self._embed = (
      self._fused("bfloat16" if mixed_precision else "float32")
      if on_cpu
      else tf.function(self.retriever.embed_passages, autograph=False, jit_compile=jit_compile)
    )
    # Too few queries to be worth compiling with XLA.
    self._embed_queries = tf.function(
      lambda tokens: self.retriever.embed_queries(tokens),
      autograph=False,
      input_signature=[tf.TensorSpec([None, self.retriever.query_length], tf.int32)],
    )

  def _fused(self, dtype: str) -> Callable:
    """Returns the passage tower as one graph for all lengths, for a CPU."""
    tower, ids = self.retriever.passage_tower, tf.TensorSpec([None, None], tf.int32)

    @tf.function(autograph=False, input_signature=[ids, ids])
    def embed(tokens, segments):
      return tower.embed(functools.partial(fused.encode, dtype=dtype), tokens, segments)

    return embed

  def use(self, snapshot: str) -> None:
    """Loads the weights of another snapshot of the same models; compiled functions are kept."""
    fingerprint = artifacts.read_info(snapshot)["fingerprint"]
    if fingerprint != self._snapshot:
      snapshots.load_weights(self.retriever, os.path.join(snapshot, "retriever.weights.h5"))
      self._snapshot = fingerprint

  def __call__(
    self,
    title_ids: tf.RaggedTensor,
    text_ids: tf.RaggedTensor,
    *,
    after_batch: Callable[[int], object] = lambda num: None,
  ) -> tuple[np.ndarray, dict[str, int]]:
    """Embeds N passages in batches of similar length.

    Args:
      title_ids: [N, None] word pieces.
      text_ids: [N, None] word pieces.
      after_batch: called after each batch with its number of passages.

    Returns:
      Embeddings [N, D] float32 in the given order, and counts by the names of COUNTERS.
    """
    # Title tokens that the retriever leaves out by design do not count as cut.
    if self.retriever.title_length is not None:
      title_ids = title_ids[:, : self.retriever.title_length]
    packed = packing.pack_passages(
      title_ids, text_ids, tokenizer=self.tokenizer, length=self.retriever.passage_length
    )
    tokens, segments = packed.token_ids.numpy(), packed.segment_ids.numpy()  # [N, L]
    lengths = np.count_nonzero(tokens, axis=1)
    order = np.argsort(lengths, kind="stable")
    batches, computed = [], 0
    for start in range(0, len(order), self.batch_size):
      rows = order[start : start + self.batch_size]
      length = min(
        -(-lengths[rows[-1]] // _LENGTH_STEP) * _LENGTH_STEP, self.retriever.passage_length
      )
      num_rows = self.batch_size if self._fills_batches else len(rows)
      filler = [[0, num_rows - len(rows)], [0, 0]]
      batches.append(
        self._embed(np.pad(tokens[rows, :length], filler), np.pad(segments[rows, :length], filler))
      )
      computed += num_rows * length
      after_batch(len(rows))
    embeddings = np.empty([len(order), self.retriever.dim], np.float32)
    embeddings[order] = tf.concat(batches, axis=0)[: len(order)].numpy()
    whole = (title_ids.row_lengths() + text_ids.row_lengths()).numpy() + passages.SPECIAL_TOKENS
    num_cut = int(np.count_nonzero(whole > self.retriever.passage_length))
    num_tokens = int(lengths.sum())
    counts = (len(order), num_tokens, computed - num_tokens, num_cut, int(whole.sum()) - num_tokens)
    return embeddings, dict(zip(COUNTERS, map(int, counts), strict=True))

  def embed_queries(self, ids: Ragged) -> np.ndarray:
    """Embeds the word pieces of N queries as [N, D] float32."""
    packed = packing.pack_queries(
      ids.tensor(), tokenizer=self.tokenizer, length=self.retriever.query_length
    )
    batches = [
      self._embed_queries(packed[start : start + self.batch_size])
      for start in range(0, len(ids), self.batch_size)
    ]
    return (
      tf.concat(batches, axis=0).numpy()
      if batches
      else np.empty([0, self.retriever.dim], np.float32)
    )
