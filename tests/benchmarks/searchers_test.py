"""The comparison of searchers on generated embeddings, at a small size."""

import re
import subprocess
import sys

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
