"""Adds documents to a corpus, replaces them and deletes them, without touching the others.

    python -m beam_jobs.update_passages --passages=P --add='new/*.jsonl' --replace

New passages go into a new segment. Deleted ones keep their rows, and with them every other passage
its number, but no search returns them. A document is known by its id or url where the input has
one, else by its title. Passages that the corpus already has are not added again.

The updated corpus replaces the former one in one step, so that a killed update leaves the former
one. Run the same command again to finish it; an update that was the last one is not done twice.
Then run `refresh_index` or `embed_passages`, which embed the new segments only.

With --compact, the rows of deleted passages are dropped and small segments are merged, which
changes the numbers of the passages.
"""

import dataclasses
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence

from absl import flags

from beam_jobs import file_formats
from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("passages", None, "The passages folder to update.", required=True)
  flags.DEFINE_string("add", "", "Files, folders and globs to add, separated by commas.")
  flags.DEFINE_enum(
    "format",
    "auto",
    file_formats.FORMATS,
    "Format of the files; auto detects it for each file by its contents. pdf needs pypdf.",
  )
  flags.DEFINE_bool("replace", False, "Delete the earlier passages of the documents to add.")
  flags.DEFINE_string(
    "delete", "", "A text file with an id or title of a document to delete on each line."
  )
  flags.DEFINE_bool("compact", False, "Afterwards, drop deleted rows and merge small segments.")
  cli.start_job("beam_jobs.update_passages")

import numpy as np

from beam_jobs import passage_artifact, passage_plan, passage_shards, pipelines, sources
from beam_jobs.sources import CorpusError
from realm_tf.corpus import passages, segments
from realm_tf.corpus.passages import Passage
from realm_tf.corpus.segments import Segment, Sizes
from realm_tf.corpus.vocabularies import VOCAB
from realm_tf.storage import artifacts, ownership, paths, publishing

_DEFAULTS = {  # for a corpus that was imported
  "max_tokens": 288,
  "passages_per_shard": Sizes().shard,
  "segment_passages": Sizes().segment,
}
# what publishing writes to info.json, and what a job counts
_CHANGED = {*ownership.KEYS, "created", "wall_secs", "warnings", "first_of_each"}


def update(
  folder: str,
  *,
  add: str = "",
  delete: Sequence[str] = (),
  replace: bool = False,
  format: str = "auto",
  beam_args: Sequence[str] = (),
) -> dict:
  """Publishes a corpus with documents added and deleted, in place of the former one.

  Args:
    folder: a complete passages folder.
    add: files, folders and globs, separated by commas; "" adds nothing.
    delete: ids or titles of the documents to delete.
    replace: whether documents that are added replace their earlier passages.
    format: one of file_formats.FORMATS.
    beam_args: Beam's options.

  Returns:
    The info of the artifact.

  Raises:
    ArtifactError: `folder` is no complete passages folder, or another process writes it.
    CorpusError: there is no input, or nothing to do.
  """
  if not add and not delete:
    raise CorpusError("there is nothing to do: give --add, --delete or --compact.")
  if pipelines.is_left_running(beam_args):
    raise CorpusError("an update waits for its job; leave out --no_wait_until_finish.")
  files = sources.find_sources(add, format=format) if add else []
  started, before = time.monotonic(), artifacts.read_info(folder, kind=passages.KIND)
  change = {
    "add": sources.fingerprint_of(files),
    "delete": artifacts.fingerprint_of(sorted(delete)),
    "replace": replace,
  }
  changes = before["config"].get("updates", [])
  if changes[-1:] == [change]:
    print(f"update_passages: this was the last update of {folder}; nothing is done.")
    return before
  publication = _begin(
    folder, before, [*changes, change], reads=sources.paths_of(add) if add else []
  )
  with pipelines.published(publication):
    tokenizer, config = passages.load_tokenizer(folder), _DEFAULTS | before["config"]
    paths.link_files(folder, [VOCAB], to=publication.path)
    with pipelines.pipeline(beam_args) as root:
      passage_shards.build(
        root,
        sources.split_into_chunks(files),
        publication,
        details=_details(before),
        rules=tokenizer.rules,
        max_tokens=config["max_tokens"],
        sizes=Sizes(config["passages_per_shard"], config["segment_passages"]),
        base=passage_plan.Base(folder, replace=replace, delete=tuple(delete)),
      )
  info = artifacts.read_info(folder)
  _say_done(folder, before["counts"], info["counts"], secs=time.monotonic() - started)
  return passage_artifact.told(info, command="update_passages")


def compact(folder: str) -> dict:
  """Publishes a corpus without the rows of deleted passages, and with as few segments as possible.

  The first segments are kept as they are if they are full and have no deleted rows. The passages
  keep their order; those that are written again get new numbers.

  Args:
    folder: a complete passages folder.

  Returns:
    The info of the artifact.

  Raises:
    ArtifactError: `folder` is no complete passages folder, or another process writes it.
  """
  started, before = time.monotonic(), artifacts.read_info(folder, kind=passages.KIND)
  publication = _begin(folder, before, before["config"].get("updates", []))
  with pipelines.published(publication):
    config, deleted = _DEFAULTS | before["config"], segments.read_deleted(folder)
    sizes = Sizes(config["passages_per_shard"], config["segment_passages"])
    kept, rewritten, num_kept = _split(passages.segments_of(folder), sizes.segment, deleted)
    shards = [path for segment in kept for path in segment.paths]
    names = [os.path.basename(path) for path in shards]
    others = {VOCAB, passage_artifact.REJECTED} & set(before["files"])
    paths.link_files(folder, [*others, *names], to=publication.path)
    num_rows = before["counts"]["passages"] - len(deleted)
    rows = _alive(rewritten, set(deleted.tolist()), first=num_kept)
    files = {name: before["files"][name] for name in names}
    segment = kept[-1].number + 1 if kept else 0
    files |= _write(publication.path, rows, num_rows - num_kept, sizes, segment=segment)
    passage_artifact.publish(
      publication,
      {**before["counts"], "passages": num_rows, "deleted": 0},
      details=_details(before),
      files=files,
    )
  info = artifacts.read_info(folder)
  _say_done(folder, before["counts"], info["counts"], secs=time.monotonic() - started)
  return info


def _split(
  every: Sequence[Segment], full: int, deleted: np.ndarray
) -> tuple[list[Segment], list[Segment], int]:
  """Returns the segments that compaction keeps, those that it writes again, and the rows kept.

  Kept are the first segments if they are full (of `full` rows) and have no deleted rows.
  """
  kept, num_rows = 0, 0
  for segment in every:
    rows = len(passages.read_all(segment.paths, Passage)["number"])
    if rows != full or np.any((num_rows <= deleted) & (deleted < num_rows + rows)):
      break
    kept, num_rows = kept + 1, num_rows + rows
  return list(every[:kept]), list(every[kept:]), num_rows


def _alive(parts: Sequence[Segment], deleted: set[int], *, first: int) -> Iterator[Passage]:
  """Yields the passages of segments that are not deleted, numbered from `first` on."""
  paths_ = [path for part in parts for path in part.paths]
  rows = itertools.chain.from_iterable(passages.read_shard(path, Passage) for path in paths_)
  alive = (row for row in rows if row.number not in deleted)
  for number, row in enumerate(alive, first):
    yield dataclasses.replace(row, number=number)


def _write(
  folder: str, rows: Iterator[Passage], num_rows: int, sizes: Sizes, *, segment: int
) -> dict[str, dict]:
  """Writes the record files of new segments, from `segment` on; returns their entries by name."""
  files = {}
  for number, shard, size in sizes.shards(num_rows):
    num_shards = sizes.num_shards(num_rows, number)
    name = passages.shard_name(passages.KIND, shard, num_shards, segment=segment + number)
    part = itertools.islice(rows, size)
    files[name] = passages.write_shard(os.path.join(folder, name), part, Passage)
  return files


def _begin(
  folder: str, before: Mapping, changes: Sequence[Mapping], *, reads: Sequence[str] = ()
) -> publishing.Publication:
  """Creates the staging folder of the next version of a corpus, after these updates."""
  config = {**before["config"], "updates": list(changes)}
  publication = publishing.begin(folder, kind=passages.KIND, config=config, inputs={}, reads=reads)
  if artifacts.read_info(folder)["fingerprint"] != before["fingerprint"]:
    publishing.discard(publication)
    raise artifacts.ArtifactError(
      f"another process has changed {folder!r} meanwhile. Run the command again."
    )
  return publication


def _details(before: Mapping) -> dict:
  """Returns the details of the next version's info.json: the former ones, and its lineage."""
  kept = {name: before[name] for name in before if name not in _CHANGED}
  return kept | {passages.VERSIONS: [*before.get(passages.VERSIONS, []), before["fingerprint"]]}


def _say_done(folder: str, before: Mapping, counts: Mapping, *, secs: float) -> None:
  deleted = counts["deleted"]
  print(
    f"update_passages: {before['passages'] - before.get('deleted', 0)} passages before, "
    f"{counts['passages'] - deleted} now, and {deleted} deleted rows, in {secs:.0f} s; {folder}"
  )


def _names_in(path: str) -> list[str]:
  """Returns the lines of a text file that are not empty.

  Raises:
    CorpusError: it is not UTF-8, or has no such line.
  """
  try:
    found = [line.strip() for line in artifacts.read_text(path).splitlines()]
  except UnicodeDecodeError:
    raise CorpusError(f"--delete={path!r} is not UTF-8; wanted a text file.") from None
  if not any(found):
    raise CorpusError(f"--delete={path!r} has no id and no title; wanted one on each line.")
  return list(filter(None, found))


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  if args.add or args.delete or not args.compact:
    update(
      args.passages,
      add=args.add,
      delete=_names_in(args.delete) if args.delete else (),
      replace=args.replace,
      format=args.format,
      beam_args=argv[1:],
    )
  if args.compact:
    compact(args.passages)
