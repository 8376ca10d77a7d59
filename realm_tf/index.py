"""Maximum inner product search over passage embeddings, exact or by ScaNN: what is built, kept in a folder and searched.

An index folder holds `embeddings-*.npy`, one file per record file of its passages and in the same order. So
every index can be searched exactly. For ScaNN it also holds ScaNN's state, and `queries-*.npy`: embedded
sentences, by which the width of its search was chosen.
"""

import os
from collections.abc import Iterator

import numpy as np

from realm_tf import artifacts, paths, searchers
from realm_tf.searchers import MISSING, ExactSearcher, IndexConfig, ScannSearcher, Width  # noqa: F401

KIND = "index"
_SCANN = "scann"  # folder of ScaNN's state


# --------------------------------------------------------------------------------------------------------- embeddings


def shard_name(shard: int, num_shards: int) -> str:
  return f"embeddings-{shard:05d}-of-{num_shards:05d}.npy"


def shard_paths(folder: str) -> list[str]:
  """The embedding files of a folder (complete or being written), in order of their rows."""
  return paths.listed(folder, r"embeddings-\d{5,}-of-\d{5,}\.npy")


def queries_path(shard: str) -> str:
  """Where the embedded sentences of the passages of one embedding file stand, beside it."""
  folder, name = os.path.split(shard)
  return os.path.join(folder, f"queries-{name.removeprefix('embeddings-')}")


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


def read_queries(folder: str) -> np.ndarray | None:
  """The embedded sentences that the folder holds, [Q, D] float32; None without any."""
  files = [queries_path(path) for path in shard_paths(folder)]
  parts = [read_shard(path) for path in files if artifacts.gfile.exists(path)]
  return np.concatenate(parts) if parts else None


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


# ------------------------------------------------------------------------------------------------------ build and load


def build(folder: str, config: IndexConfig, *, num_rows: int) -> dict:
  """Checks the embeddings in a folder that is being published, and adds what the searcher needs.

  Args:
    folder: a `Staged.path` with all embedding files, and for ScaNN the files of queries.
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
  searcher = ScannSearcher.build(
    read_embeddings(folder, num_rows=num_rows), config, read_queries(folder)
  )
  searcher.save(os.path.join(folder, _SCANN))
  return {"scann": searcher.settings}


def share_queried(config: IndexConfig, num_rows: int) -> float:
  """The share of passages of which a sentence is needed, to measure the index by; 0 if nothing is measured."""
  if config.searcher == "exact" or num_rows < searchers.MIN_ROWS:
    return 0.0
  return min(searchers.NUM_QUERIES / num_rows, 1.0)


def measured_recall(info: dict) -> str:
  """What an index's info.json says of ScaNN's recall, in words; "" for exact search.

  Begins with WARNING where it is less than was wanted.
  """
  if "scann" not in info:
    return ""
  measured = [Width(**width) for width in info["scann"]["widths"] if width["recall"] is not None]
  if not measured:
    return "" if info["scann"]["num_leaves"] else "ScaNN scores every passage exactly"
  wanted = info["config"]["recall"]
  said = (
    "ScaNN's recall "
    + ", ".join(f"{width.recall:.4f} at {width.num}" for width in measured)
    + f" ({info['scann']['num_queries']} queries, wanted {wanted}; {info['scann']['num_leaves']} partitions, searched "
    f"{', '.join(str(width.leaves) for width in measured)}; reordered {', '.join(str(width.reorder) for width in measured)})"
  )
  short = any(width.recall < wanted for width in measured)
  return (
    f"WARNING: {said}. It is less than wanted: set leaves_to_search and reorder higher, or search exactly"
    if short
    else said
  )


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
  if "widths" not in info.get("scann", ()):
    raise artifacts.ArtifactError(f"index {folder!r} was made for exact search. Make it again with --searcher=scann.")
  return ScannSearcher.load(os.path.join(folder, _SCANN), **info["scann"])
