"""The comparison of searchers on generated embeddings, at a small size."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import environments
from benchmarks.searchers import inputs
from tests.processes import REPOSITORY


def test_a_small_comparison():
  done = subprocess.run(
    [
      *(sys.executable, "-m", "benchmarks.searchers", "--searcher=partitioned", "--row_type=int8"),
      *("--num_rows=5000", "--dim=9", "--num=3", "--num_queries=64"),
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=True,
  )
  built, one, many, recall = done.stdout.splitlines()
  assert re.match(r"5,000 x 9: partitioned, 70 of 70 partitions, \d+ candidates .* built in", built)
  assert "a query, 1 at a time" in one and "a query, 32 at a time" in many
  assert recall == "recall@3 1.0000"


def test_best_rows_and_recall_are_those_of_all_scores():
  rows, chosen_by, queries = inputs.embeddings_and_queries(3000, 6, 20, seed=0)
  assert (rows.shape, chosen_by.shape, queries.shape) == ((3000, 6), (1000, 6), (20, 6))
  scores = queries.astype(np.float64) @ rows.T.astype(np.float64)
  wanted = np.argsort(-scores, axis=1)[:, :4]
  found = inputs.best(rows, queries, 4)
  np.testing.assert_array_equal(found, wanted)
  found[:, 0] = -1
  assert inputs.recall(wanted, found) == 0.75


def test_faiss_searches_the_same_embeddings(capfd):
  root = os.path.join(REPOSITORY, environments.ROOT)
  if not environments.exists(root, "faiss"):
    pytest.skip("run `python -m benchmarks.searchers --searcher=faiss` once: it installs FAISS")
  sizes = {"num_rows": 5000, "dim": 8, "num": 3, "recall": 0.9, "num_queries": 64, "seed": 0}
  subprocess.run(
    [
      *(environments.python_of(root, "faiss"), "-m", "benchmarks.searchers.peer_faiss"),
      json.dumps(sizes),
    ],
    cwd=REPOSITORY,
    check=True,
  )
  built, one, many, recall = capfd.readouterr().out.splitlines()
  assert re.match(r"5,000 x 8: FAISS .* IVF71,PQ4x4fs,RFlat, \d+ of 71 partitions", built)
  assert "a query, 1 at a time" in one and "a query, 32 at a time" in many
  assert float(recall.removeprefix("recall@3 ")) > 0.85
