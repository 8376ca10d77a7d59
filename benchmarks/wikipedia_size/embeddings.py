"""Embeddings and indexes of a large corpus, and the measurement of searches."""

import dataclasses
import os
import time
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from beam_jobs.embedder import Embedder
from benchmarks.wikipedia_size import corpus, measuring
from realm_tf.corpus import passages
from realm_tf.examples import sentences
from realm_tf.retrieval import index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts, paths, publishing

NUM = 8  # passages searched for
_MEASURED_ROWS = 256  # whose nearest neighbours are looked for
_NUM_QUERIES = 2000  # every other one measures recall; widths are chosen with the rest
_BATCHES = (1, 32)


def embed(snapshot: str, source: str, output: str) -> dict:
  """Embeds the passages of the small corpus, and sentences of them as queries."""
  embedder = Embedder(snapshot, batch_size=64, jit_compile=False, mixed_precision=False)
  table = passages.load(source)
  parts = []
  for start in range(0, len(table), 4096):
    rows = slice(start, start + 4096)
    parts.append(embedder(table.title_ids[rows].tensor(), table.text_ids[rows].tensor())[0])
  drawn = sentences.draw_sentences(
    table.text_ids,
    table.token_starts,
    table.sentence_starts,
    share=min(1.0, 1.1 * _NUM_QUERIES / len(table)),
    rng=np.random.default_rng(0),
  )
  queries = embedder.embed_queries(drawn)[:_NUM_QUERIES]
  np.savez(output, embeddings=np.concatenate(parts), queries=queries)
  return {"passages": len(table), "queries": len(queries)}


def write(real: str, output: str, num_rows: int, embedding_type: str) -> None:
  """Writes the embedding files of the large corpus, and of some queries.

  Those of the first copy are the real ones. To the others noise is added that moves them as far as
  the nearest neighbour of a real one is, so that they have the clusters and the density of a larger
  corpus, and no near copies.
  """
  found = np.load(real)
  rows, queries = found["embeddings"], found["queries"][::2]
  spreads = rows.std(axis=0)
  noise = spreads * _nearest(rows) / np.linalg.norm(spreads)
  os.makedirs(output, exist_ok=True)
  num_segments = -(-num_rows // corpus.SIZES.segment)
  for segment, number, size in corpus.SIZES.shards(num_rows):
    start = segment * corpus.SIZES.segment + number * corpus.SIZES.shard
    name = index.shard_name(number, corpus.SIZES.num_shards(num_rows, segment), segment=segment)
    parts = [rows[first : first + taken] for first, taken in corpus.cut(len(rows), start, size)]
    made, rng = np.concatenate(parts), np.random.default_rng([0, segment, number])
    is_copy = np.arange(start, start + size) >= len(rows)
    made[is_copy] += noise * rng.standard_normal([is_copy.sum(), rows.shape[1]], np.float32)
    path = os.path.join(output, name)
    index.write_shard(path, made, embedding_type=embedding_type)
    if number == 0:  # as many as embed_passages draws from a segment of such a corpus
      index.write_shard(index.queries_path(path), queries[segment::num_segments])


def _nearest(rows: np.ndarray) -> float:
  """Returns the median distance between an embedding and the one nearest to it."""
  drawn = np.random.default_rng(0).choice(len(rows), min(_MEASURED_ROWS, len(rows)), replace=False)
  found = []
  for row in drawn:
    distances = np.linalg.norm(rows - rows[row], axis=1)
    distances[row] = np.inf
    found.append(distances.min())
  return float(np.median(found))


def build(embeddings: str, snapshot: str, folder: str, output: str, config: IndexConfig) -> dict:
  """Publishes an index, with the searcher of each segment."""
  num_rows = artifacts.read_info(folder)["counts"]["passages"]
  with publishing.publish(
    output,
    kind=index.KIND,
    config=dataclasses.asdict(config),
    inputs={"snapshot": snapshot, "passages": folder},
  ) as staged:
    paths.link_files(embeddings, sorted(os.listdir(embeddings)), to=staged.path)
    staged.details = index.build(staged.path, config, num_rows=num_rows) | {
      "segments": passages.fingerprints_of_segments(folder),
      "snapshot_step": artifacts.read_info(snapshot)["step"],
    }
    staged.counts = {"passages": num_rows}
  return {"recall": index.measured_recall(artifacts.read_info(output))}


def _blocks(folder: str) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (number of its first passage, [n, D]) for each embedding file."""
  first = 0
  for path in index.shard_paths(folder):
    rows = index.read_shard(path)
    yield first, rows
    first += len(rows)


def exact(embeddings: str, real: str, output: str) -> None:
  """Searches for the other queries exactly: writes their best passages and scores."""
  queries = tf.constant(np.load(real)["queries"][1::2])
  scores, numbers = tf.zeros([len(queries), 0]), tf.zeros([len(queries), 0], tf.int32)
  for first, rows in _blocks(embeddings):
    part = tf.math.top_k(
      tf.matmul(queries, tf.cast(rows, tf.float32), transpose_b=True), min(NUM, len(rows))
    )
    scores = tf.concat([scores, part.values], axis=1)
    numbers = tf.concat([numbers, part.indices + first], axis=1)
    best = tf.math.top_k(scores, min(NUM, scores.shape[1]))
    scores, numbers = best.values, tf.gather(numbers, best.indices, batch_dims=1)
  np.savez(output, numbers=numbers.numpy(), scores=scores.numpy())


def search(folder: str, real: str, wanted: str) -> dict:
  """Opens an index to serve, and measures recall and time of its searches."""
  before, started = measuring.own_gib(), time.monotonic()
  searcher = index.load(folder)
  queries = np.load(real)["queries"][1::2]
  searcher.search(tf.constant(queries[:1]), NUM)  # the first one builds what a search needs
  found = {
    "loaded in s": round(time.monotonic() - started, 1),
    "loaded GiB": round(measuring.own_gib() - before, 2),
  }
  numbers = np.concatenate(
    [
      searcher.search(tf.constant(queries[start : start + 32]), NUM).numbers.numpy()
      for start in range(0, len(queries), 32)
    ]
  )
  right = np.load(wanted)["numbers"]
  found[f"recall@{NUM}"] = round(
    float(np.mean([np.isin(*pair).mean() for pair in zip(right, numbers, strict=True)])), 4
  )
  for batch in _BATCHES:
    secs = []
    for start in range(0, min(len(queries), 200 * batch), batch):
      part, started = tf.constant(queries[start : start + batch]), time.perf_counter()
      searcher.search(part, NUM).numbers.numpy()
      secs.append((time.perf_counter() - started) / len(part))
    found[f"ms a query, {batch} at a time"] = round(1e3 * float(np.median(secs)), 2)
  return found
