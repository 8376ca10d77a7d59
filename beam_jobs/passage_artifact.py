"""Publishing passages: their counts, warnings and list of what was rejected."""

import collections
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from beam_jobs import blocking, rejections
from beam_jobs.passage_plan import Base, Plan
from realm_tf.corpus import passages, segments, tokenization
from realm_tf.storage import artifacts, json_lines, paths, publishing

REJECTED = "rejected.jsonl"
DUPLICATE = "duplicate"
_MOST_UNKNOWN = 0.01  # a greater share of word pieces that are [UNK] causes a warning


def finish(
  publication: publishing.Publication,
  plan: Plan,
  read: Iterable,
  repeated: Iterable,
  written: Iterable[tuple[str, dict]],
  *,
  details: Mapping,
  base: Base | None = None,
) -> None:
  """Writes the list of rejected articles, and publishes the passages if there are any.

  With a base, publishes it with the new passages and without those that are deleted.
  """
  rows = [
    {**row, "line": row["line"] + plan.lines_before[key[0]]}
    for key, row in sorted([*read, *repeated], key=lambda item: item[0])
  ]
  is_staged = artifacts.gfile.exists(publication.path)  # else this step runs again
  if is_staged:
    earlier = _rejected_earlier(base) if base else ""
    artifacts.write_text(
      os.path.join(publication.path, REJECTED), earlier + "".join(map(json_lines.dumps, rows))
    )
  files, dropped = dict(written), collections.Counter(row["reason"] for row in rows)
  counts = {
    "passages": plan.num_passages,
    "articles": plan.num_articles,
    "deleted": len(plan.deleted),
    "dropped": dict(sorted(dropped.items())),
    **plan.counts,
  }
  if base:
    before = artifacts.read_info(base.folder)
    kept = [os.path.basename(path) for path in passages.shard_paths(base.folder, passages.KIND)]
    if is_staged:
      paths.link_files(base.folder, kept, to=publication.path)
      if len(plan.deleted):
        segments.write_deleted(publication.path, plan.deleted)
    files |= {name: before["files"][name] for name in kept}
    counts = _sum_of(before["counts"], counts)
  if base or plan.num_passages:
    examples = {**rejections.first_by_reason(rows), **plan.examples}
    told = {"first_of_each": examples, "warnings": list(_warnings(plan, rows))}
    publish(publication, counts, details={**details, **told}, files=files, deleted=plan.deleted)


def publish(
  publication: publishing.Publication,
  counts: Mapping,
  *,
  details: Mapping,
  files: Mapping[str, dict],
  deleted: np.ndarray | None = None,
) -> None:
  """Publishes passages.

  Args:
    publication: the artifact being written.
    counts: counts for info.json.
    details: further entries for info.json.
    files: name -> description of each record file.
    deleted: sorted numbers of the deleted passages, whose file is written.
  """
  digests = [files[name]["sha256"] for name in sorted(files)]
  if deleted is not None and len(deleted):
    digests.append(artifacts.fingerprint_of(deleted.tolist()))
  publication.finish(
    counts, content=artifacts.fingerprint_of(digests), details=details, files=files
  )


def _rejected_earlier(base: Base) -> str:
  """Returns the lines about what earlier jobs rejected; an imported corpus has none."""
  if REJECTED not in artifacts.read_info(base.folder)["files"]:
    return ""
  return artifacts.read_text(os.path.join(base.folder, REJECTED))


def _sum_of(before: Mapping, added: Mapping) -> dict:
  """Returns the counts of a corpus after an update."""
  found = {
    name: value if name == "deleted" else before.get(name, 0) + value
    for name, value in added.items()
    if name != "dropped"
  }
  dropped = collections.Counter(before.get("dropped")) + collections.Counter(added["dropped"])
  return {**before, **found, "dropped": dict(sorted(dropped.items()))}


def _warnings(plan: Plan, rows: Sequence[Mapping]) -> Iterator[str]:
  """Yields warnings: about mostly rejected files, titles cut, unknown words and unknown names."""
  if plan.unmatched:
    yield (
      f"{len(plan.unmatched)} of the names to delete are of no document, first "
      f"{json_lines.shown(plan.unmatched[0].encode())}"
    )
  lost = [row for row in rows if row["reason"] != DUPLICATE]
  rejected = collections.Counter(row["file"] for row in lost)
  poor = {file for file, num in rejected.items() if num > plan.kept.get(file, 0)}
  if poor:
    reasons = rejections.reasons([row for row in lost if row["file"] in poor])
    yield f"most articles of {len(poor)} of {len(plan.kept)} files are rejected: {reasons}"
  if plan.counts[blocking.CUT_TITLES] > plan.num_articles / 2:
    first = rejections.place(plan.examples[blocking.CUT_TITLES])
    yield f"most titles were too long and have been cut, first {first}"
  share = plan.counts[blocking.UNKNOWN] / max(plan.counts[blocking.WORD_PIECES], 1)
  if share > _MOST_UNKNOWN:
    first = rejections.place(plan.examples[blocking.UNKNOWN])
    yield (
      f"{share:.1%} of all word pieces are {tokenization.UNK}, words that the vocabulary does not "
      f"cover, first {first}"
    )


def told(info: dict, *, command: str = "make_passages") -> dict:
  """Prints the warnings of the artifact, on the last line of output."""
  if info.get("warnings"):
    print(
      f"{command}: WARNING: {'; '.join(info['warnings'])}; for the full list see "
      f"{REJECTED} and {artifacts.INFO}"
    )
  return info
