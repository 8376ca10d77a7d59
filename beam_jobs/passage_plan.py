"""Which number each block of a corpus gets, and which passages an update deletes."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from beam_jobs import sources
from realm_tf.corpus import passages


@dataclasses.dataclass(frozen=True)
class Tally:
  """The counts of one chunk.

  Attributes:
    chunk, file: the number of the chunk, and its file.
    num_articles, num_blocks: how many were kept.
    num_lines: how many lines begin in the chunk.
    counts: see blocking.Blocker.
    first: for each of these counts, the first article as a row of rejected.jsonl.
  """

  chunk: int
  file: str
  num_articles: int
  num_blocks: int
  num_lines: int
  counts: Mapping[str, int]
  first: Mapping[str, dict]


@dataclasses.dataclass(frozen=True)
class Base:
  """The corpus that an update adds to and deletes from.

  Attributes:
    folder: a complete passages folder.
    replace: whether documents that are added replace their earlier passages.
    delete: documents to delete, by id or title.
  """

  folder: str
  replace: bool = False
  delete: Sequence[str] = ()

  def deleted(
    self, table: passages.PassageTable, added: Iterable[str]
  ) -> tuple[np.ndarray, list[str]]:
    """Returns which passages are deleted after the update, and which names match none.

    Args:
      table: the passages before the update.
      added: the documents that are added.

    Returns:
      Their sorted numbers ([M] int64), and the names of `delete` that are of no document.
    """
    named, replaced = set(self.delete), set(added) if self.replace else set()
    gone, found, unmatched = set(table.deleted.tolist()), [], set(named)
    for number, (document, title) in enumerate(zip(table.documents, table.titles, strict=True)):
      if (document in replaced or document in named or title in named) and number not in gone:
        found.append(number)
        unmatched -= {document, title}
    return np.union1d(table.deleted, np.array(found, np.int64)), sorted(unmatched)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Where the blocks of each chunk go, and the counts of the whole corpus.

  Attributes:
    base, segment: number of the first passage, and of its segment; 0 for a new corpus.
    first: chunk -> number of its first passage, counted from `base`.
    duplicates: chunk -> its blocks (ascending positions in the chunk) that already occurred earlier
      in the corpus.
    lines_before: chunk -> lines of its file before it.
    num_articles, num_passages: how many are new.
    deleted: sorted numbers of all deleted passages: [M] int64.
    unmatched: the names to delete that are of no document.
    kept: file -> articles that were kept.
    counts, examples: sums and first examples of all tallies.
  """

  base: int
  segment: int
  first: dict[int, int]
  duplicates: dict[int, list[int]]
  lines_before: dict[int, int]
  num_articles: int
  num_passages: int
  deleted: np.ndarray
  unmatched: Sequence[str]
  kept: dict[str, int]
  counts: collections.Counter[str]
  examples: dict[str, dict]


def known_places(
  uids: Iterable[tuple[bytes, tuple[int, int]]], known: np.ndarray
) -> set[tuple[int, int]]:
  """Returns (chunk, position) of each block whose short uid is among the `known` ones."""
  found = list(uids)
  short = np.array([int.from_bytes(uid[:8]) for uid, _ in found], np.uint64)
  return {found[row][1] for row in np.flatnonzero(np.isin(short, known)).tolist()}


def make_plan(
  _,
  tallies: Iterable[Tally],
  duplicates: Iterable[tuple[int, int]],
  uids: Iterable[tuple[bytes, tuple[int, int]]] = (),
  documents: Iterable[str] = (),
  *,
  base: Base | None = None,
) -> Plan:
  """Returns the plan of a job from what its workers have counted.

  Args:
    tallies: of all chunks.
    duplicates: (chunk, position) of each block that duplicates an earlier one of the job.
    uids: (uid, (chunk, position)) of each block; needed with a base.
    documents: the documents of the blocks; needed with a base.
    base: the corpus to add to; None for a new one.
  """
  num_before = segment = 0
  places, deleted = set(duplicates), np.zeros([0], np.int64)
  unmatched: list[str] = []
  if base:
    table = passages.load(base.folder)
    num_before, (deleted, unmatched) = len(table), base.deleted(table, documents)
    segment = passages.segments_of(base.folder)[-1].number + 1
    places |= known_places(uids, np.delete(table.short_uids, deleted))
  dropped = collections.defaultdict(list)
  for chunk, place in sorted(places):
    dropped[chunk].append(place)
  first, lines_before, num_passages = {}, {}, 0
  kept: collections.Counter[str] = collections.Counter()
  lines: collections.Counter[str] = collections.Counter()
  counts: collections.Counter[str] = collections.Counter()
  examples: dict[str, dict] = {}
  tallies = sorted(tallies, key=lambda tally: tally.chunk)
  for tally in tallies:
    first[tally.chunk], lines_before[tally.chunk] = num_passages, lines[tally.file]
    num_passages += tally.num_blocks - len(dropped.get(tally.chunk, ()))
    for what, row in tally.first.items():
      examples.setdefault(what, {**row, "line": row["line"] + lines[tally.file]})
    kept[tally.file] += tally.num_articles
    lines[tally.file] += tally.num_lines
    counts.update(tally.counts)
  if base and num_before + num_passages == len(deleted):
    raise sources.CorpusError(
      f"the update would delete all {num_before} passages of {base.folder!r}; wanted some to stay. "
      "To begin anew, delete the folder."
    )
  return Plan(
    num_before,
    segment,
    first,
    dict(dropped),
    lines_before,
    num_articles=sum(kept.values()),
    num_passages=num_passages,
    deleted=deleted,
    unmatched=unmatched,
    kept=dict(kept),
    counts=counts,
    examples=examples,
  )
