"""Maximum inner product search over passage embeddings, exact or by ScaNN: what is built, kept in a folder and searched.

An index folder holds `embeddings-*.npy`, one file per record file of its passages and in the same order, and for ScaNN also
its serialised state. So every index can be searched exactly, and an index without more than that is what `embed_passages`
writes. Both searchers are TensorFlow modules whose `search` works eagerly, in a tf.function and in a SavedModel.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from realm_tf import artifacts, paths

KIND = "index"
MISSING = -1  # number where ScaNN found fewer candidates than asked for (the null passage's); its score is -inf

_SCANN = "scann"  # folder of ScaNN's state
_SCANN_MIN_ROWS = 4096  # fewer cannot train its codebooks well, and take well under a millisecond without them
_SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32


class SearchResult(NamedTuple):
  """The best passages of each query, best first.

  Attributes:
    numbers: [B, num] int32 passage numbers.
    scores: [B, num] float32 inner products f(x, z).
  """

  numbers: tf.Tensor
  scores: tf.Tensor


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  """How an index is made and searched; all but the first are ScaNN's.

  Attributes:
    searcher: "exact" or "scann".
    num_leaves: partitions of the embeddings; None is the square root of their number.
    leaves_to_search: partitions looked into for a query; None is a tenth of them.
    reorder: candidates whose inner product is computed exactly; at least twice as many as are asked for.
    dimensions_per_block: dimensions that share a code of asymmetric hashing.
  """

  searcher: str = "exact"
  num_leaves: int | None = None
  leaves_to_search: int | None = None
  reorder: int = 100
  dimensions_per_block: int = 2

  def __post_init__(self):
    if self.searcher not in ("exact", "scann"):
      raise artifacts.UserError(f"searcher is {self.searcher!r}; use 'exact' or 'scann'.")


# --------------------------------------------------------------------------------------------------------- embeddings


def shard_name(shard: int, num_shards: int) -> str:
  return f"embeddings-{shard:05d}-of-{num_shards:05d}.npy"


def shard_paths(folder: str) -> list[str]:
  """The embedding files of a folder (complete or being written), in order of their rows."""
  return paths.listed(folder, r"embeddings-\d{5,}-of-\d{5,}\.npy")


def write_shard(path: str, embeddings: np.ndarray) -> None:
  """Writes one file of embeddings ([n, D] float32) whole: under a temporary name, then renamed."""
  folder, name = os.path.split(path)
  partial = os.path.join(folder, f".partial-{os.getpid()}-{name}")
  with artifacts.gfile.GFile(partial, "wb") as file:
    np.save(file, np.asarray(embeddings, np.float32), allow_pickle=False)
  artifacts.gfile.rename(partial, path, overwrite=True)


def read_shard(path: str) -> np.ndarray:
  with artifacts.gfile.GFile(path, "rb") as file:
    return np.load(file, allow_pickle=False)


def shard_shape(path: str) -> tuple[int, int]:
  """(rows, D) of one file of embeddings, from its header."""
  with artifacts.gfile.GFile(path, "rb") as file:
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)[0]


def read_embeddings(folder: str, *, num_rows: int) -> np.ndarray:
  """All embeddings of a folder: [num_rows, D] float32, row i is passage i.

  Raises:
    ArtifactError: another number of rows, or a row that is not finite.
  """
  embeddings = None
  for start, rows in _checked_shards(folder, num_rows):
    if embeddings is None:
      embeddings = np.empty([num_rows, rows.shape[1]], np.float32)
    embeddings[start:start + len(rows)] = rows
  return embeddings


def _checked_shards(folder: str, num_rows: int) -> Iterator[tuple[int, np.ndarray]]:
  """(number of the first row, rows) of each file."""
  start = 0
  for path in shard_paths(folder):
    rows = read_shard(path)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
      raise artifacts.ArtifactError(
          f"the embedding of passage {start + bad[0]} in {path!r} is not finite (nor are {bad.size - 1} more there): the "
          "snapshot's training has diverged. Use an earlier snapshot.")
    if start + len(rows) <= num_rows:
      yield start, rows
    start += len(rows)
  if start != num_rows or start == 0:
    raise artifacts.ArtifactError(
        f"{folder!r} holds {start} embeddings, wanted {num_rows}, one for each passage. Embed the passages again.")


# ---------------------------------------------------------------------------------------------------------- searchers


class ExactSearcher(tf.Module):
  """Scores every passage, a block of rows at a time, so that memory stays bounded however many there are.

  Args:
    embeddings: [N, D] float32.
  """

  def __init__(self, embeddings: np.ndarray):
    super().__init__()
    self.embeddings = tf.Variable(embeddings, trainable=False)  # a variable: a SavedModel's graph cannot hold gigabytes
    self.num_rows = len(embeddings)

  def search(self, queries: tf.Tensor, num: int) -> SearchResult:
    """The `num` passages of highest inner product with each query; the lower number first among equals.

    Args:
      queries: [B, D] float32.
      num: at most the number of passages.

    Raises:
      UserError: more are asked for than there are.
    """
    _check_num(num, self.num_rows)
    return self._search(queries, num)

  @tf.function(reduce_retracing=True)
  def _search(self, queries, num):
    batch = tf.shape(queries)[0]
    block = tf.maximum(_SCORES_AT_ONCE // tf.maximum(batch, 1), num)

    def search_block(start, numbers, scores):
      rows = self.embeddings[start:start + block]  # no copy: a slice of whole rows
      block_scores = tf.matmul(queries, rows, transpose_b=True)  # [B, block]
      best = tf.math.top_k(block_scores, tf.minimum(num, tf.shape(rows)[0]))
      scores = tf.concat([scores, best.values], axis=1)
      numbers = tf.concat([numbers, best.indices + start], axis=1)
      best = tf.math.top_k(scores, tf.minimum(num, tf.shape(scores)[1]))
      return start + block, tf.gather(numbers, best.indices, batch_dims=1), best.values

    nothing = (tf.constant(0), tf.zeros([batch, 0], tf.int32), tf.zeros([batch, 0], tf.float32))
    _, numbers, scores = tf.while_loop(
        lambda start, *_: start < self.num_rows, search_block, nothing, parallel_iterations=1,
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None]), tf.TensorShape([None, None])))
    return SearchResult(tf.ensure_shape(numbers, [None, num]), tf.ensure_shape(scores, [None, num]))


class ScannSearcher(tf.Module):
  """ScaNN (Guo et al. 2020): partitions, anisotropic codes, and exact scores for the best candidates.

  Args:
    state: the searcher's tensors, as `scann_ops` serialises them.
    num_rows: number of passages.
    leaf_rows: average number of passages in a partition; None where everything is scored without partitions and codes.
    leaves_to_search, reorder: see `IndexConfig`.
  """

  def __init__(self, state: tf.Module, *, num_rows: int, leaf_rows: float | None, leaves_to_search: int, reorder: int):
    super().__init__()
    self.state = state
    self.num_rows, self.leaf_rows, self.leaves_to_search, self.reorder = num_rows, leaf_rows, leaves_to_search, reorder

  @classmethod
  def build(cls, embeddings: np.ndarray, config: IndexConfig) -> "ScannSearcher":
    """Trains ScaNN on embeddings [N, D]; under a few thousand rows it scores all of them instead."""
    scann_ops = _scann_ops()
    num_rows = len(embeddings)
    builder = scann_ops.builder(embeddings, 1, "dot_product")
    if num_rows < _SCANN_MIN_ROWS:
      state = builder.score_brute_force().build().serialize_to_module()
      return cls(state, num_rows=num_rows, leaf_rows=None, leaves_to_search=0, reorder=0)
    num_leaves = config.num_leaves or math.isqrt(num_rows)
    leaves_to_search = config.leaves_to_search or math.ceil(num_leaves / 10)
    builder.tree(num_leaves, leaves_to_search, training_sample_size=min(num_rows, 250_000))
    builder.score_ah(config.dimensions_per_block, anisotropic_quantization_threshold=0.2)
    state = builder.reorder(config.reorder).build().serialize_to_module()
    return cls(state, num_rows=num_rows, leaf_rows=num_rows / num_leaves, leaves_to_search=leaves_to_search,
               reorder=config.reorder)

  @property
  def settings(self) -> dict:
    """What `load` needs beside the state."""
    return {name: getattr(self, name) for name in ("num_rows", "leaf_rows", "leaves_to_search", "reorder")}

  def save(self, folder: str) -> None:
    tf.saved_model.save(self.state, folder, options=tf.saved_model.SaveOptions(namespace_whitelist=["Scann"]))

  @classmethod
  def load(cls, folder: str, **settings) -> "ScannSearcher":
    _scann_ops()  # registers the op that the SavedModel holds
    return cls(tf.saved_model.load(paths.literal(folder)), **settings)

  def search(self, queries: tf.Tensor, num: int) -> SearchResult:
    """Like `ExactSearcher.search`, but a near neighbour may be missed.

    Where the partitions searched hold fewer than `num` passages, the row ends with number MISSING and score -inf.
    """
    _check_num(num, self.num_rows)
    return self._search(queries, num)

  @tf.function(reduce_retracing=True)
  def _search(self, queries, num):
    # Inside a tf.function, the op keeps its searcher between calls; eagerly it would be made anew each time.
    searcher = _scann_ops().searcher_from_module(self.state)
    if self.leaf_rows is None:
      numbers, scores = searcher.search_batched_parallel(queries, final_num_neighbors=num)
    else:
      reorder = min(max(self.reorder, 2 * num), self.num_rows)
      num_leaves = round(self.num_rows / self.leaf_rows)
      leaves = min(max(self.leaves_to_search, math.ceil(4 * reorder / self.leaf_rows)), num_leaves)
      numbers, scores = searcher.search_batched_parallel(
          queries, final_num_neighbors=num, pre_reorder_num_neighbors=reorder, leaves_to_search=leaves)
    missing = tf.math.is_nan(scores)
    numbers, scores = tf.where(missing, MISSING, numbers), tf.where(missing, -np.inf, scores)
    padding = [[0, 0], [0, num - tf.shape(scores)[1]]]  # ScaNN returns as many columns as its fullest row has
    numbers, scores = tf.pad(numbers, padding, constant_values=MISSING), tf.pad(scores, padding, constant_values=-np.inf)
    return SearchResult(tf.ensure_shape(numbers, [None, num]), tf.ensure_shape(scores, [None, num]))


def _check_num(num: int, num_rows: int) -> None:
  if not 0 < num <= num_rows:
    raise artifacts.UserError(
        f"{num} candidates asked for, the index has {num_rows} passages. Ask for fewer, or index more passages.")


def _scann_ops():
  """ScaNN's TensorFlow ops; imported late, because exact search needs no ScaNN."""
  try:
    from scann.scann_ops.py import scann_ops
  except (ImportError, tf.errors.NotFoundError) as error:
    raise artifacts.ArtifactError(
        f"searcher 'scann' needs the scann package built for TensorFlow {tf.__version__} ({error}). Install the versions of "
        "requirements.txt, or use searcher 'exact'.") from error
  return scann_ops


# ------------------------------------------------------------------------------------------------------ build and load


def build(folder: str, config: IndexConfig, *, num_rows: int) -> dict:
  """Checks the embeddings in a folder that is being published, and adds what the searcher needs.

  Args:
    folder: a `Staged.path` with all embedding files.
    num_rows: number of passages.

  Returns:
    Details for info.json, which `load` reads.

  Raises:
    ArtifactError: another number of embeddings, or one that is not finite.
  """
  if config.searcher == "exact":
    for _ in _checked_shards(folder, num_rows):
      pass
    return {}
  searcher = ScannSearcher.build(read_embeddings(folder, num_rows=num_rows), config)
  searcher.save(os.path.join(folder, _SCANN))
  return {"scann": searcher.settings}


def folder_of(workdir: str, snapshot: str) -> str:
  """Where the index of a workdir's snapshot stands."""
  return artifacts.step_folder(os.path.join(workdir, "indexes"), artifacts.step_of(snapshot))


def passages_of(folder: str, *, advice: str | None = None) -> str:
  """The passages folder that an index was made from; `advice` is what to do where that is not found."""
  return artifacts.find_input(folder, "passages", advice=advice)


def of_snapshot(workdir: str, snapshot: str) -> str:
  """The index of a workdir's snapshot: the one that it was fine-tuned with, or its own below the workdir.

  Raises:
    ArtifactError: it was fine-tuned with one that is nowhere.
  """
  info = artifacts.read_info(snapshot)
  if "index" not in info["inputs"]:
    return folder_of(workdir, snapshot)
  return artifacts.find_input(  # whatever its searcher
      snapshot, "index", accept=lambda found: found["inputs"]["snapshot"]["fingerprint"] == info["index_snapshot"])


def load(folder: str, *, snapshot: str | None = None, passages: str | None = None,
         searcher: str | None = None) -> ExactSearcher | ScannSearcher:
  """Opens an index.

  Args:
    folder: a complete index.
    snapshot, passages: the folders that it must have been made from, where given.
    searcher: "exact" or "scann"; None is what the index was made for. "exact" works with every index.

  Raises:
    ArtifactError: incomplete, made from another snapshot or other passages, damaged, or without ScaNN's part.
  """
  info = artifacts.read_info(folder, kind=KIND)
  for name, wanted in (("snapshot", snapshot), ("passages", passages)):
    if wanted is not None:
      artifacts.check_input(folder, name, wanted)
  if (searcher or info["config"]["searcher"]) == "exact":
    return ExactSearcher(read_embeddings(folder, num_rows=info["counts"]["passages"]))
  if "scann" not in info:
    raise artifacts.ArtifactError(f"index {folder!r} was made for exact search. Make it again with --searcher=scann.")
  return ScannSearcher.load(os.path.join(folder, _SCANN), **info["scann"])
