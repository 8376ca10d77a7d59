"""Damages files of every kind that this project reads, and reads them.

    python -m benchmarks.attack.files --files=10000 --seed=0

The kinds include corpora in all formats, questions, clozes, published question sets, CoNLL,
vocabularies, checkpoints of all kinds, block records and info.json. A file may be read, or be
rejected with a message. A failure is a traceback, a process that dies, or too much time or memory:
it is listed with its number, and `--only=NUMBER` tries that file again. The exit code is 1 if there
is a failure.
"""

import collections
import dataclasses
import json
import operator
import queue
import random
import sys
import threading
import time
from collections.abc import Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_integer("files", 10_000, "How many files to damage and read.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Seed of all damage.")
  flags.DEFINE_integer("only", None, "Number of a single file to try.")
  flags.DEFINE_list("kinds", None, "Kinds of files to try; all by default.")
  flags.DEFINE_integer("processes", 2, "Number of processes that read.", lower_bound=1)
  flags.DEFINE_float("limit_secs", 5.0, "Maximum processor time for a file.")
  flags.DEFINE_float("limit_mb", 500.0, "Maximum memory for a file, in megabytes.")
  flags.DEFINE_string("report", None, "File to write all outcomes to, as lines of JSON.")
  cli.start("benchmarks.attack.files")

import tabulate

from benchmarks.attack import file_kinds
from benchmarks.attack.file_workers import Limits, Outcome, Worker
from realm_tf import errors

_SHOWN_FAILURES = 20
_RESULTS = ("read", "refused", "crashed", "died", "slow", "large")


def plan(num_files: int, *, seed: int, kinds: Sequence[str]) -> list[str]:
  """Returns the kind of each file, drawn at random by weight."""
  weights = [file_kinds.KINDS[name].weight for name in kinds]
  return random.Random(seed).choices(list(kinds), weights, k=num_files)


def attack(
  planned: Sequence[tuple[int, str]], *, seed: int, limits: Limits, num_processes: int
) -> list[Outcome]:
  """Tries files in several processes.

  Args:
    planned: number and kind of each file.
    seed: seed of the damage.
    limits: limits for each file.
    num_processes: how many processes run concurrently.

  Returns:
    Their outcomes by number.
  """
  waiting: queue.SimpleQueue = queue.SimpleQueue()
  for one in planned:
    waiting.put(one)
  found: list[Outcome] = []

  def work() -> None:
    worker = Worker(seed=seed, limits=limits)
    try:
      while True:
        found.append(worker.try_file(*waiting.get_nowait()))
    except queue.Empty:
      pass
    finally:
      worker.stop()

  threads = [threading.Thread(target=work) for _ in range(num_processes)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if len(found) < len(planned):
    raise errors.UserError(f"only {len(found)} of {len(planned)} files were tried.")
  return sorted(found, key=operator.attrgetter("number"))


def report(outcomes: Sequence[Outcome]) -> str:
  """Formats a table of results by kind, and the failures."""
  by_kind: dict[str, collections.Counter] = {}
  for outcome in outcomes:
    by_kind.setdefault(outcome.kind, collections.Counter())[outcome.result] += 1
  rows = [
    [kind, sum(counts.values()), *(counts[result] for result in _RESULTS)]
    for kind, counts in sorted(by_kind.items())
  ]
  counts = collections.Counter(outcome.result for outcome in outcomes)
  rows.append(["all", len(outcomes), *(counts[result] for result in _RESULTS)])
  table = tabulate.tabulate(rows, ["kind", "files", *_RESULTS], intfmt=",")
  slowest = max(outcomes, key=operator.attrgetter("secs"))
  largest = max(outcomes, key=operator.attrgetter("megabytes"))
  failures = [outcome for outcome in outcomes if outcome.is_failure]
  told = [
    f"file {bad.number} ({bad.kind}, {bad.how}): {bad.result}, {bad.secs:.1f} s, "
    f"{bad.megabytes:,.0f} MB\n{bad.words}"
    for bad in failures[:_SHOWN_FAILURES]
  ]
  return "\n".join(
    [
      table,
      f"slowest: {slowest.secs:.2f} s, file {slowest.number} ({slowest.kind}, {slowest.how})",
      f"largest: {largest.megabytes:.0f} MB, file {largest.number} ({largest.kind}, {largest.how})",
      *told,
      f"{len(failures)} failures among {len(outcomes)} files",
    ]
  )


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  kinds = args.kinds or list(file_kinds.KINDS)
  if unknown := sorted(set(kinds) - set(file_kinds.KINDS)):
    raise errors.UserError(
      f"unknown kinds {', '.join(unknown)}; wanted some of {', '.join(file_kinds.KINDS)}."
    )
  planned = list(enumerate(plan(args.files, seed=args.seed, kinds=kinds)))
  if args.only is not None:
    planned = planned[args.only : args.only + 1]
  limits = Limits(args.limit_secs, args.limit_mb)
  started = time.monotonic()
  outcomes = attack(planned, seed=args.seed, limits=limits, num_processes=args.processes)
  if args.report:
    with open(args.report, "w", encoding="utf-8") as file:
      file.writelines(json.dumps(dataclasses.asdict(outcome)) + "\n" for outcome in outcomes)
  print(report(outcomes))
  print(f"seed {args.seed}, {time.monotonic() - started:.0f} s")
  sys.exit(any(outcome.is_failure for outcome in outcomes))
