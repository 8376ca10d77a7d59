"""Compares searchers on generated embeddings: time and memory of building, and time of searching.

    python -m benchmarks.searchers --searcher=partitioned [--num_rows=1000000] [--recall=0.99]

One searcher a call, because the greatest memory is that of the process. The embeddings lie in
clusters of about 200, which lie in topics, and have different norms; queries lie near clusters. The
width of the search is chosen with 1,000 queries. Recall and times (median, least and greatest) are
those of others. On a busy machine, compare the time of a core.
"""

import resource
import time
from collections.abc import Sequence

from absl import flags

from realm_tf import cli
from realm_tf.retrieval.index_config import ROW_TYPES, SEARCHERS, IndexConfig

if __name__ == "__main__":
  flags.DEFINE_enum("searcher", None, SEARCHERS, "The searcher.", required=True)
  flags.DEFINE_integer("num_rows", 1_000_000, "Embeddings.", lower_bound=1000)
  flags.DEFINE_integer("dim", 128, "Their dimensions.", lower_bound=2)
  flags.DEFINE_integer("num", 8, "Passages to search for.", lower_bound=1)
  flags.DEFINE_float("recall", 0.99, "The wanted recall.")
  flags.DEFINE_integer("num_leaves", None, "Partitions.")
  flags.DEFINE_enum("row_type", IndexConfig.row_type, ROW_TYPES, "Type of partitioned rows.")
  flags.DEFINE_integer("num_queries", 256, "Queries to time and to compute recall with.")
  flags.DEFINE_integer("seed", 0, "Seed of the embeddings.")
  cli.start("benchmarks.searchers")

import numpy as np
import tensorflow as tf

from realm_tf.retrieval import index
from realm_tf.retrieval.exact import ExactSearcher

_BATCHES = (1, 32)
_ROWS_OF_CLUSTER = 200
_CLUSTERS_OF_TOPIC = 20
_ROWS_AT_ONCE = 1 << 16


def clusters(num_rows: int, dim: int, rng: np.random.Generator) -> np.ndarray:
  """Draws centres of clusters: [C, dim] float32."""
  count = max(num_rows // _ROWS_OF_CLUSTER, 1)
  topics = rng.standard_normal([max(count // _CLUSTERS_OF_TOPIC, 1), dim], np.float32)
  return topics[rng.integers(len(topics), size=count)] + 0.7 * rng.standard_normal(
    [count, dim], np.float32
  )


def draw(
  centres: np.ndarray, num: int, rng: np.random.Generator, *, noise: float, norm_noise: float
) -> np.ndarray:
  """Draws vectors around centres, with log-normal factors on their norms: [num, D] float32."""
  vectors = np.empty([num, centres.shape[1]], np.float32)
  for start in range(0, num, _ROWS_AT_ONCE):
    part = vectors[start : start + _ROWS_AT_ONCE]
    part[:] = centres[rng.integers(len(centres), size=len(part))]
    part += noise * rng.standard_normal(part.shape, np.float32)
    part *= np.exp(norm_noise * rng.standard_normal([len(part), 1], np.float32))
  return vectors


def peak_gib() -> float:
  """Returns the greatest memory that this process has had."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def query_time(searcher: index.Searcher, queries: np.ndarray, num: int, *, batch: int) -> str:
  """Describes the time of a query in batches of `batch`, and that of the processor."""
  secs, processor_started = [], time.process_time()
  for start in range(0, len(queries) - batch + 1, batch):
    part, started = tf.constant(queries[start : start + batch]), time.perf_counter()
    searcher.search(part, num).numbers.numpy()
    secs.append((time.perf_counter() - started) / batch)
  processor_secs = (time.process_time() - processor_started) / len(secs) / batch
  return (
    f"{1e3 * np.median(secs):.2f} ms [{1e3 * min(secs):.2f}, {1e3 * max(secs):.2f}] a query, "
    f"{batch} at a time; {1e3 * processor_secs:.2f} ms of a core"
  )


def main(argv: Sequence[str]) -> None:
  del argv
  args, rng = flags.FLAGS, np.random.default_rng(flags.FLAGS.seed)
  centres = clusters(args.num_rows, args.dim, rng)
  rows = draw(centres, args.num_rows, rng, noise=1.0, norm_noise=0.1)
  chosen_by = draw(centres, 1000, rng, noise=1.3, norm_noise=0.0)
  queries = draw(centres, args.num_queries, rng, noise=1.3, norm_noise=0.0)
  config = IndexConfig(
    searcher=args.searcher,
    recall=args.recall,
    num_leaves=args.num_leaves,
    row_type=args.row_type,
  )
  before_gib, started, processor_started = peak_gib(), time.perf_counter(), time.process_time()
  exact = args.searcher == "exact"
  searcher = ExactSearcher(rows) if exact else index.build_approximate(rows, config, chosen_by)
  print(
    f"{args.num_rows:,} x {args.dim}: {searcher.describe(args.num)}; built in "
    f"{time.perf_counter() - started:.1f} s, {time.process_time() - processor_started:.1f} s of a "
    f"core; memory at most {peak_gib():.2f} GiB, "
    f"{before_gib:.2f} before"
  )
  searcher.search(tf.constant(queries[:2]), args.num)
  for batch in _BATCHES:
    print(query_time(searcher, queries, args.num, batch=batch))
  wanted = ExactSearcher(rows).search(tf.constant(queries), args.num).numbers.numpy()
  found = searcher.search(tf.constant(queries), args.num).numbers.numpy()
  recall = np.mean([np.isin(*pair).mean() for pair in zip(wanted, found, strict=True)])
  print(f"recall@{args.num} {recall:.4f}")
