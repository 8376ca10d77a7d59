"""Index folders for maximum inner product search: writing, building and loading.

An index folder holds `embeddings-*.npy`, one file per record file of its passages and in the same
order, so every index can be searched exactly. Their type is float32, float16 or bfloat16. For
another searcher the folder also holds that searcher's state, in a folder for each segment of the
passages, and `queries-*.npy`, embedded sentences with which the width of its search was chosen.
Like the passages, it lists the deleted ones.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from realm_tf.corpus import segments
from realm_tf.retrieval import approximate
from realm_tf.retrieval.approximate import Width
from realm_tf.retrieval.exact import ExactSearcher
from realm_tf.retrieval.index_config import EMBEDDING_TYPES, IndexConfig
from realm_tf.retrieval.partitioned import PartitionedSearcher
from realm_tf.retrieval.scann import ScannSearcher
from realm_tf.retrieval.segmented import SegmentedSearcher
from realm_tf.storage import array_files, artifacts, integrity, paths

KIND = "index"
PartSearcher = ExactSearcher | PartitionedSearcher | ScannSearcher  # of a segment
Searcher = PartSearcher | SegmentedSearcher
_SETTINGS = "settings.json"  # of a segment's searcher; written last
_SHARD = r"embeddings(-\d{5,})?-\d{5,}-of-\d{5,}\.npy"
_AGAIN = "Delete it and embed the passages again."


class Version(NamedTuple):
  """An index folder, and when it was completed, in nanoseconds since the epoch."""

  folder: str
  completed_ns: int


# --------------------------------------------------------------------------------------- embeddings


def shard_name(shard: int, num_shards: int, *, segment: int | None = None) -> str:
  part = "" if segment is None else f"-{segment:05d}"
  return f"embeddings{part}-{shard:05d}-of-{num_shards:05d}.npy"


def shard_paths(folder: str) -> list[str]:
  """Returns the embedding files of a folder (complete or being written), in row order."""
  return integrity.files_of(folder, _SHARD)


def is_shard(name: str) -> bool:
  """Returns whether a file name is that of embeddings of passages."""
  return re.fullmatch(_SHARD, name) is not None


def segments_of(folder: str) -> list[int]:
  """Returns the numbers of the segments of a folder (complete or being written), in row order."""
  return [number for number, _ in _segments(folder)]


def _segments(folder: str) -> list[tuple[int, list[str]]]:
  """Returns (number, embedding files) of each segment of a folder, in row order."""
  groups = itertools.groupby(shard_paths(folder), segments.number_of)
  return [(number, list(shards)) for number, shards in groups]


def files_of_segment(names: Iterable[str], number: int) -> list[str]:
  """Returns those of an index's files that belong to a segment."""
  in_folder = re.compile(rf"[a-z]+-{number:05d}/.*")
  return [
    name
    for name in names
    if (name.endswith(".npy") and name != segments.DELETED and segments.number_of(name) == number)
    or in_folder.fullmatch(name)
  ]


def queries_path(shard: str) -> str:
  """Returns the path, beside one embedding file, of embedded sentences from its passages."""
  folder, name = os.path.split(shard)
  return os.path.join(folder, f"queries-{name.removeprefix('embeddings-')}")


def write_shard(path: str, embeddings: np.ndarray, *, embedding_type: str = "float32") -> None:
  """Writes one file of embeddings ([n, D], stored as `embedding_type`) atomically.

  Raises:
    UserError: an embedding is finite, but too large for this type.
  """
  with np.errstate(over="ignore"):
    stored = embeddings.astype(embedding_type, copy=False)
  if not np.isfinite(stored).all() and np.isfinite(embeddings).all():
    raise artifacts.UserError(
      f"an embedding has the number {np.abs(embeddings).max():.4g}, which is too large for "
      f"{embedding_type}; use embedding_type bfloat16 or float32."
    )
  with paths.whole(path) as partial:
    array_files.write(partial, stored)


def read_shard(path: str) -> np.ndarray:
  """Reads one file of embeddings: [n, D] of one of `EMBEDDING_TYPES`.

  Raises:
    ArtifactError: the file has changed since it was published, or holds no such array.
  """
  folder, name = os.path.split(path)
  integrity.check_digests(folder, [name])
  rows = array_files.read(path, advice=_AGAIN)
  if rows.ndim != 2 or rows.dtype.name not in EMBEDDING_TYPES:
    raise artifacts.ArtifactError(
      f"{path!r} holds an array {list(rows.shape)} of {rows.dtype}; wanted [n, D] of "
      f"{' or '.join(EMBEDDING_TYPES)}. {_AGAIN}"
    )
  return rows


def shard_shape(path: str) -> tuple[int, int]:
  """Returns (rows, D) of one file of embeddings from its header."""
  (rows, dim), _ = array_files.header(path, advice=_AGAIN)
  return rows, dim


def read_embeddings(folder: str, *, num_rows: int) -> np.ndarray:
  """Reads all embeddings of a folder: [num_rows, D] of their type; row i is passage i.

  Raises:
    ArtifactError: wrong number of rows, or a row that is not finite.
  """
  _check_rows(folder, num_rows)
  return _read_shards(shard_paths(folder))


def _read_shards(shards: Sequence[str], *, first: int = 0) -> np.ndarray:
  """Reads embedding files: [N, D] of their type, without a second copy of the whole.

  `first` is the number of the first passage, for messages.
  """
  num_rows = sum(shard_shape(path)[0] for path in shards)
  (_, dim), dtype = array_files.header(shards[0], advice=_AGAIN)
  embeddings, start = np.empty([num_rows, dim], dtype), 0
  for path in shards:
    rows = _read_finite(path, first=first + start)
    embeddings[start : start + len(rows)] = rows
    start += len(rows)
  return embeddings


def read_queries(shards: Sequence[str]) -> np.ndarray | None:
  """Reads the embedded sentences beside embedding files, [Q, D] float32; None if there are none."""
  files = [queries_path(path) for path in shards]
  parts = [read_shard(path) for path in files if artifacts.gfile.exists(path)]
  return np.concatenate(parts) if parts else None


def _read_finite(path: str, *, first: int) -> np.ndarray:
  """Reads an embedding file; `first` is the number of its first passage, for the message."""
  rows = read_shard(path)
  bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
  if bad.size:
    raise artifacts.ArtifactError(
      f"the embedding of passage {first + bad[0]} in {path!r} is not finite (nor are "
      f"{bad.size - 1} others): training had diverged at this snapshot. Use an earlier snapshot."
    )
  return rows


def _check_rows(folder: str, num_rows: int) -> None:
  """Raises ArtifactError unless a folder has this number of embeddings."""
  found = sum(shard_shape(path)[0] for path in shard_paths(folder))
  if found != num_rows or found == 0:
    raise artifacts.ArtifactError(
      f"{folder!r} holds {found} embeddings; wanted {num_rows}, one for each passage. Embed the "
      "passages again."
    )


# ----------------------------------------------------------------------------------- build and load


def build(folder: str, config: IndexConfig, *, num_rows: int) -> dict:
  """Checks the embeddings in a folder that is being published, and adds the searchers' files.

  Args:
    folder: a `Staged.path` with all embedding files, and those of queries if it has any. Segments
      whose searcher was built before are left as they are; see `build_segment`.
    config: configuration of the index.
    num_rows: number of passages.

  Returns:
    Details for info.json, which `load` reads.

  Raises:
    ArtifactError: wrong number of embeddings, or one that is not finite.
  """
  _check_rows(folder, num_rows)
  found = {}
  for number in segments_of(folder):
    build_segment(folder, config, number)
    if config.searcher != "exact":
      path = os.path.join(folder, _state(config.searcher, number), _SETTINGS)
      found[str(number)] = json.loads(artifacts.read_text(path))
  return {"searchers": found}


def build_segment(folder: str, config: IndexConfig, number: int) -> None:
  """Checks the embeddings of a segment, and adds its searcher's files unless they are there.

  The segments of an index can be built by different processes.

  Args:
    folder: see `build`; it has all embedding files of this segment and of those before it.
    config: configuration of the index.
    number: number of the segment.

  Raises:
    ArtifactError: an embedding is not finite.
  """
  shards, first = dict(_segments(folder))[number], _first_passage(folder, number)
  if config.searcher == "exact":
    for path in shards:
      first += len(_read_finite(path, first=first))
    return
  if is_built(folder, config, number):
    return
  state = os.path.join(folder, _state(config.searcher, number))
  if artifacts.gfile.isdir(state):  # half written
    artifacts.gfile.rmtree(state)
  searcher = build_approximate(_read_shards(shards, first=first), config, read_queries(shards))
  searcher.save(state)
  artifacts.write_text(os.path.join(state, _SETTINGS), json.dumps(searcher.settings) + "\n")


def is_built(folder: str, config: IndexConfig, number: int) -> bool:
  """Returns whether a segment has all files of its approximate searcher."""
  path = os.path.join(folder, _state(config.searcher, number), _SETTINGS)
  return artifacts.gfile.exists(path)


def _first_passage(folder: str, segment: int) -> int:
  """Returns the number of the first passage of a segment."""
  before = [shards for number, shards in _segments(folder) if number < segment]
  return sum(shard_shape(path)[0] for path in itertools.chain(*before))


def _state(kind: str, segment: int) -> str:
  """Returns the name of the folder with the state of a segment's searcher."""
  return f"{kind}-{segment:05d}"


def build_approximate(
  embeddings: np.ndarray, config: IndexConfig, queries: np.ndarray | None
) -> PartitionedSearcher | ScannSearcher:
  """Builds the searcher of a config whose searcher is not "exact".

  Args:
    embeddings: [N, D] float32, float16 or bfloat16.
    config: configuration of the index.
    queries: [Q, D] float32, to choose the width of the search with; None makes it as wide as
      possible.
  """
  return _approximate(config.searcher).build(embeddings, config, queries)


def _approximate(kind: str) -> type[PartitionedSearcher] | type[ScannSearcher]:
  return PartitionedSearcher if kind == "partitioned" else ScannSearcher


def share_queried(config: IndexConfig, num_rows: int) -> float:
  """Returns the share of passages that provide a sentence for measuring the index.

  The share is 0 if nothing is measured.
  """
  if config.searcher == "exact" or num_rows < approximate.MIN_ROWS:
    return 0.0
  return min(approximate.NUM_QUERIES / num_rows, 1.0)


def measured_recall(info: Mapping) -> str:
  """Describes the searchers' recall from an index's info.json; "" for exact search.

  The text begins with WARNING if the recall of a segment is less than wanted.
  """
  settings, wanted = list(info.get("searchers", {}).values()), info["config"]["recall"]
  measured = [
    each for each in settings if any(width["recall"] is not None for width in each["widths"])
  ]
  if not measured:
    scored = settings and not any(each["num_leaves"] for each in settings)
    return "every passage is scored exactly" if scored else ""
  least = min(measured, key=lambda each: min(width.recall or 0 for width in _measured(each)))
  widths = _measured(least)
  said = (
    ("" if len(settings) == 1 else f"of {len(settings)} segments, the least ")
    + "measured recall "
    + ", ".join(f"{width.recall:.4f} at {width.num}" for width in widths)
    + f" ({least['num_queries']} queries, wanted {wanted}; "
    f"{least['num_leaves']} partitions, "
    f"searched {', '.join(str(width.leaves) for width in widths)}; "
    f"reordered {', '.join(str(width.reorder) for width in widths)})"
  )
  return (
    f"WARNING: {said}. It is less than wanted: raise leaves_to_search and reorder, or search "
    "exactly"
    if any((width.recall or 0) < wanted for width in widths)
    else said
  )


def _measured(settings: Mapping) -> list[Width]:
  """Returns the widths of a searcher whose recall was measured."""
  return [Width(**width) for width in settings["widths"] if width["recall"] is not None]


def folder_of(workdir: str, snapshot: str) -> str:
  """Returns the folder of the index of a workdir's snapshot."""
  return artifacts.step_folder(os.path.join(workdir, "indexes"), artifacts.step_of(snapshot))


def load(
  folder: str,
  *,
  snapshot: str | None = None,
  passages: str | None = None,
  searcher: str | None = None,
) -> Searcher:
  """Opens an index.

  Args:
    folder: a complete index.
    snapshot: if given, the folder of the snapshot that the index must have been made from.
    passages: if given, the folder of the passages that the index must have been made from.
    searcher: "exact", "partitioned" or "scann"; None uses the searcher that the index was made for.
      "exact" works with every index.

  Raises:
    ArtifactError: the index is incomplete, damaged, made from another snapshot or other passages,
      or was not made for this searcher.
  """
  info = artifacts.read_info(folder, kind=KIND)
  for name, wanted in (("snapshot", snapshot), ("passages", passages)):
    if wanted is not None:
      artifacts.check_input(folder, name, wanted)
  made_for = info["config"]["searcher"]
  kind = searcher or made_for
  if kind not in ("exact", made_for):
    raise artifacts.ArtifactError(
      f"index {folder!r} was made for searcher {made_for!r}, wanted {kind!r}. Make it again with "
      f"--searcher={kind}."
    )
  _check_rows(folder, info["counts"]["passages"])
  found = [
    _load_segment(folder, info, kind, number, shards) for number, shards in _segments(folder)
  ]
  return merged(found, segments.read_deleted(folder))


def merged(parts: Sequence[PartSearcher], deleted: np.ndarray) -> Searcher:
  """Returns the searcher of all segments, without the deleted passages ([M] sorted numbers)."""
  return parts[0] if len(parts) == 1 and not len(deleted) else SegmentedSearcher(parts, deleted)


def _load_segment(
  folder: str, info: Mapping, kind: str, number: int, shards: Sequence[str]
) -> PartSearcher:
  """Opens the searcher of a segment."""
  embeddings = _read_shards(shards, first=_first_passage(folder, number))
  if kind == "exact":
    return ExactSearcher(embeddings)
  name, settings = _state(kind, number), info["searchers"][str(number)]
  integrity.check_digests(folder, [file for file in info["files"] if file.startswith(f"{name}/")])
  state = os.path.join(folder, name)
  return _approximate(kind).load(state, embeddings, **settings)
