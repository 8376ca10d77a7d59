"""Generated embeddings and queries, and the timing of searches. Needs only NumPy."""

import resource
import time
from collections.abc import Callable

import numpy as np

BATCHES = (1, 32)
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


def embeddings_and_queries(
  num_rows: int, dim: int, num_queries: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws embeddings, queries to choose a search with, and others to measure it with."""
  rng = np.random.default_rng(seed)
  centres = clusters(num_rows, dim, rng)
  rows = draw(centres, num_rows, rng, noise=1.0, norm_noise=0.1)
  chosen_by = draw(centres, 1000, rng, noise=1.3, norm_noise=0.0)
  return rows, chosen_by, draw(centres, num_queries, rng, noise=1.3, norm_noise=0.0)


def best(rows: np.ndarray, queries: np.ndarray, num: int) -> np.ndarray:
  """Returns the `num` rows with the highest inner products, best first: [Q, num]."""
  found = []
  for query in np.array_split(queries, -(-len(queries) // 16)):
    scores = query @ rows.T
    top = np.argpartition(-scores, num - 1, axis=1)[:, :num]
    order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
    found.append(np.take_along_axis(top, order, axis=1))
  return np.concatenate(found)


def recall(wanted: np.ndarray, found: np.ndarray) -> float:
  """Returns the share of the wanted rows that were found."""
  return float(np.mean([np.isin(*pair).mean() for pair in zip(wanted, found, strict=True)]))


def peak_gib() -> float:
  """Returns the greatest memory that this process has had."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def query_time(search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray, batch: int) -> str:
  """Describes the time of a query in batches of `batch`, and that of the processor."""
  secs, processor_started = [], time.process_time()
  for start in range(0, len(queries) - batch + 1, batch):
    part, started = queries[start : start + batch], time.perf_counter()
    search(part)
    secs.append((time.perf_counter() - started) / batch)
  processor_secs = (time.process_time() - processor_started) / len(secs) / batch
  return (
    f"{1e3 * np.median(secs):.2f} ms [{1e3 * min(secs):.2f}, {1e3 * max(secs):.2f}] a query, "
    f"{batch} at a time; {1e3 * processor_secs:.2f} ms of a core"
  )
