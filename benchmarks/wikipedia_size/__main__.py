"""Measures every step of a corpus of the size of Wikipedia on this machine.

    python -m benchmarks.wikipedia_size --passages=RUN/passages --workdir=RUN/realm \\
        --questions=Q.jsonl --folder=EMPTY [--rows=13353718] [--searchers=scann,partitioned]

The passages are those of RUN/passages, written again and again as those of other documents, so that
their texts and lengths are real. Their embeddings are those of the newest snapshot of the workdir,
with noise for every copy. Each step runs in its own process, and prints its time and the memory
that it needs beside file pages. Steps that have run are skipped, so an interrupted run can be
resumed. Needs 60 GB of disk for 13 million passages; the files are not deleted.
"""

import os
import sys
from collections.abc import Callable, Sequence

from absl import flags

from realm_tf import cli
from realm_tf.retrieval.index_config import EMBEDDING_TYPES, IndexConfig

if __name__ == "__main__":
  flags.DEFINE_string("passages", None, "Real passages.", required=True)
  flags.DEFINE_string("workdir", None, "Workdir of realm_tf.pretrain or finetune.", required=True)
  flags.DEFINE_string("questions", None, "File of questions to ask the server.", required=True)
  flags.DEFINE_string("folder", None, "Folder to write to, empty or new.", required=True)
  flags.DEFINE_integer("rows", 13_353_718, "Number of passages.", lower_bound=1)
  flags.DEFINE_list("searchers", ["scann", "partitioned"], "Searchers; the first one is served.")
  flags.DEFINE_enum(
    "embedding_type", "float16", EMBEDDING_TYPES, "Type in which embeddings are stored."
  )
  flags.DEFINE_integer("num_questions", 1000, "Questions to ask.", lower_bound=1)
  flags.DEFINE_integer("num_added", 10_000, "Passages to add at the end; 0: none.", lower_bound=0)
  flags.DEFINE_integer(
    "train_steps", 0, "Steps of REALM to train, after all passages were annotated.", lower_bound=0
  )
  flags.DEFINE_bool("compact", False, "At the end, delete some documents, and drop their rows.")
  cli.start("benchmarks.wikipedia_size.__main__")

import tabulate

from benchmarks.wikipedia_size import (
  corpus,
  embeddings,
  measuring,
  serving_steps,
  training_step,
)
from realm_tf.models import snapshots


def table(steps: Sequence[measuring.Measured]) -> str:
  """Formats the steps that have run."""
  rows = [
    [
      step.name,
      step.secs,
      step.gib,
      step.load,
      "; ".join(f"{name}: {value}" for name, value in step.found.items()),
    ]
    for step in steps
  ]
  return tabulate.tabulate(rows, ["step", "s", "GiB", "load before", "found"], tablefmt="github")


def make_corpus(steps: measuring.Steps, args, at: Callable[[str], str], snapshot: str) -> None:
  """Writes the passages and their embeddings, and searches these exactly."""
  real = at("real.npz")
  steps.run(
    "write the corpus",
    corpus.write,
    source=args.passages,
    folder=at("passages"),
    num_rows=args.rows,
  )
  steps.run("open the corpus", corpus.open_corpus, folder=at("passages"))
  steps.run(
    "embed the real passages",
    embeddings.embed,
    snapshot=snapshot,
    source=args.passages,
    output=real,
  )
  steps.run(
    "write the embeddings",
    embeddings.write,
    real=real,
    output=at("rows"),
    num_rows=args.rows,
    embedding_type=args.embedding_type,
  )
  steps.run(
    "search exactly", embeddings.exact, embeddings=at("rows"), real=real, output=at("exact.npz")
  )


def search(steps: measuring.Steps, args, at: Callable[[str], str], snapshot: str) -> None:
  """Builds an index for each searcher, and searches it."""
  for searcher in args.searchers:
    steps.run(
      f"build {searcher}",
      embeddings.build,
      embeddings=at("rows"),
      snapshot=snapshot,
      folder=at("passages"),
      output=at(searcher),
      config=IndexConfig(searcher=searcher, recall=0.99, embedding_type=args.embedding_type),
    )
    steps.run(
      f"search with {searcher}",
      embeddings.search,
      folder=at(searcher),
      real=at("real.npz"),
      wanted=at("exact.npz"),
    )


def train(steps: measuring.Steps, args, at: Callable[[str], str], snapshot: str) -> None:
  """Annotates the passages, and trains with the first searcher's index."""
  if args.train_steps:
    passages, spans = at("passages"), at("spans")
    steps.run("annotate", training_step.annotate, passages=passages, output=spans)
    steps.run(
      "train",
      training_step.train,
      snapshot=snapshot,
      passages=passages,
      spans=spans,
      index=at(args.searchers[0]),
      folder=at("training"),
      num_steps=args.train_steps,
    )


def serve(steps: measuring.Steps, args, at: Callable[[str], str], snapshot: str) -> None:
  """Exports the first searcher's index, asks a model server, and adds passages."""
  where = dict(
    workdir=os.path.abspath(args.workdir), passages=at("passages"), index=at(args.searchers[0])
  )
  output = at("servable")
  steps.run("export", serving_steps.export, output=output, **where)
  steps.run(
    "serve", serving_steps.serve, output=output, questions=args.questions, num=args.num_questions
  )
  if args.num_added:
    steps.run(
      "add passages",
      serving_steps.update,
      output=output,
      snapshot=snapshot,
      num=args.num_added,
      **where,
    )


def compact(steps: measuring.Steps, args, at: Callable[[str], str], snapshot: str) -> None:
  """Deletes documents and drops their rows.

  Runs last: the passages get new numbers, so the index no longer fits.
  """
  if args.compact:
    steps.run("compact", corpus.compact, folder=at("passages"))


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  os.makedirs(args.folder, exist_ok=True)
  snapshot = snapshots.newest(os.path.abspath(args.workdir), advice="train it first.")

  def at(name: str) -> str:
    return os.path.join(os.path.abspath(args.folder), name)

  steps = measuring.Steps(at("steps.json"))
  for part in (make_corpus, search, train, serve, compact):
    part(steps, args, at, snapshot)
  text = table(list(steps.done.values()))
  with open(at("table.txt"), "w") as file:
    file.write(text + "\n")
  print(text)
  sys.stdout.flush()
