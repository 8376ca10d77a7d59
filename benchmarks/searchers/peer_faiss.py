"""FAISS' inverted file with product quantisation and refinement; runs where FAISS is installed.

    python -m benchmarks.searchers.peer_faiss '{"num_rows": 1000000, "dim": 128, ..}'

The vectors are coded with 4 bits for two dimensions and scored with FAISS' fast scan, as ScaNN
does it. The fewest partitions, then the fewest refined candidates, that give the wanted recall for
1,000 queries are chosen.
"""

import json
import sys
import time

import faiss
import numpy as np

from benchmarks.searchers import inputs

_PROBES = (1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 135, 200)
_REFINED = (2, 3, 5, 10, 20, 50)  # times the number of wanted passages
_SAMPLE = 250_000


def main(*, num_rows: int, dim: int, num: int, recall: float, num_queries: int, seed: int) -> None:
  rows, chosen_by, queries = inputs.embeddings_and_queries(num_rows, dim, num_queries, seed)
  before_gib = inputs.peak_gib()
  started, processor_started = time.perf_counter(), time.process_time()
  leaves = round(num_rows**0.5)
  factory = f"IVF{leaves},PQ{dim // 2}x4fs,RFlat"
  index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
  rng = np.random.default_rng(seed)
  index.train(rows[np.sort(rng.choice(num_rows, min(num_rows, _SAMPLE), replace=False))])
  index.add(rows)
  built_secs = time.perf_counter() - started
  processor_secs = time.process_time() - processor_started
  inverted = faiss.extract_index_ivf(index)

  def search(part: np.ndarray) -> np.ndarray:
    return index.search(part, num)[1]

  def choose(values, change, enough: float) -> None:
    for value in values:
      change(value)
      if inputs.recall(right, search(chosen_by)) >= enough:
        return

  def probe(value: int) -> None:
    inverted.nprobe = min(value, leaves)

  def refine(value: int) -> None:
    index.k_factor = value

  right = inputs.best(rows, chosen_by, num)
  index.k_factor = _REFINED[-1]
  choose(_PROBES, probe, 1 - (1 - recall) / 2)
  choose(_REFINED, refine, recall)
  print(
    f"{num_rows:,} x {dim}: FAISS {faiss.__version__} {factory}, {inverted.nprobe} of {leaves} "
    f"partitions, {index.k_factor:.0f} x {num} refined; built in {built_secs:.1f} s, "
    f"{processor_secs:.1f} s of a core; memory at most {inputs.peak_gib():.2f} GiB, "
    f"{before_gib:.2f} before"
  )
  for batch in inputs.BATCHES:
    print(inputs.query_time(search, queries, batch))
  print(f"recall@{num} {inputs.recall(inputs.best(rows, queries, num), search(queries)):.4f}")


if __name__ == "__main__":
  main(**json.loads(sys.argv[1]))
