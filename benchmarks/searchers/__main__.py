"""Compares searchers on generated embeddings: time and memory of building, and time of searching.

    python -m benchmarks.searchers --searcher=partitioned [--num_rows=1000000] [--recall=0.99]
    python -m benchmarks.searchers --searcher=faiss    # in an environment that it makes with pip

One searcher a call, because the greatest memory is that of the process. The embeddings lie in
clusters of about 200, which lie in topics, and have different norms; queries lie near clusters. The
width of the search is chosen with 1,000 queries. Recall and times (median, least and greatest) are
those of others. On a busy machine, compare the time of a core.
"""

import json
import subprocess
import time
from collections.abc import Sequence

from absl import flags

from benchmarks import environments
from realm_tf import cli
from realm_tf.retrieval.index_config import EMBEDDING_TYPES, ROW_TYPES, SEARCHERS, IndexConfig

if __name__ == "__main__":
  flags.DEFINE_enum("searcher", None, (*SEARCHERS, "faiss"), "The searcher.", required=True)
  flags.DEFINE_integer("num_rows", 1_000_000, "Embeddings.", lower_bound=1000)
  flags.DEFINE_integer("dim", 128, "Their dimensions.", lower_bound=2)
  flags.DEFINE_integer("num", 8, "Passages to search for.", lower_bound=1)
  flags.DEFINE_float("recall", 0.99, "The wanted recall.")
  flags.DEFINE_integer("num_leaves", None, "Partitions.")
  flags.DEFINE_enum(
    "embedding_type",
    IndexConfig.embedding_type,
    EMBEDDING_TYPES,
    "Type of the embeddings; ScaNN and FAISS make them float32.",
  )
  flags.DEFINE_enum("row_type", IndexConfig.row_type, ROW_TYPES, "Type of partitioned rows.")
  flags.DEFINE_integer("num_queries", 256, "Queries to time and to compute recall with.")
  flags.DEFINE_integer("seed", 0, "Seed of the embeddings.")
  flags.DEFINE_string("environments", environments.ROOT, "Folder for FAISS' environment.")
  cli.start("benchmarks.searchers.__main__")

import numpy as np
import tensorflow as tf

from benchmarks.searchers import inputs
from realm_tf.retrieval import index
from realm_tf.retrieval.exact import ExactSearcher

FAISS = "faiss"


def run_faiss() -> None:
  """Runs FAISS in an environment of its own, on the same embeddings and queries."""
  args = flags.FLAGS
  environments.make(args.environments, FAISS)
  names = ("num_rows", "dim", "num", "recall", "num_queries", "seed")
  sizes = json.dumps({name: args[name].value for name in names})
  python = environments.python_of(args.environments, FAISS)
  subprocess.run([python, "-m", "benchmarks.searchers.peer_faiss", sizes], check=True)


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  if args.searcher == FAISS:
    run_faiss()
    return
  rows, chosen_by, queries = inputs.embeddings_and_queries(
    args.num_rows, args.dim, args.num_queries, args.seed
  )
  rows = rows.astype(args.embedding_type, copy=False)
  config = IndexConfig(
    searcher=args.searcher,
    embedding_type=args.embedding_type,
    recall=args.recall,
    num_leaves=args.num_leaves,
    row_type=args.row_type,
  )
  before_gib, started, processor_started = (
    inputs.peak_gib(),
    time.perf_counter(),
    time.process_time(),
  )
  exact = args.searcher == "exact"
  searcher = ExactSearcher(rows) if exact else index.build_approximate(rows, config, chosen_by)
  print(
    f"{args.num_rows:,} x {args.dim}: {searcher.describe(args.num)}; built in "
    f"{time.perf_counter() - started:.1f} s, {time.process_time() - processor_started:.1f} s of a "
    f"core; memory at most {inputs.peak_gib():.2f} GiB, "
    f"{before_gib:.2f} before"
  )

  def search(part: np.ndarray) -> np.ndarray:
    return searcher.search(tf.constant(part), args.num).numbers.numpy()

  search(queries[:2])
  for batch in inputs.BATCHES:
    print(inputs.query_time(search, queries, batch))
  wanted = ExactSearcher(rows).search(tf.constant(queries), args.num).numbers.numpy()
  print(f"recall@{args.num} {inputs.recall(wanted, search(queries)):.4f}")
