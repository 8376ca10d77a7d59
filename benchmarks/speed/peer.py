"""Runs a peer's side of a comparison in the peer's own environment.

`benchmarks.speed` starts it as a process, and speaks with it as `benchmarks.speed.jobs` says:

    python -m benchmarks.speed.peer peer_torch JSON
"""

import importlib
import sys

from benchmarks.speed import jobs

if __name__ == "__main__":
  module = importlib.import_module(f"benchmarks.speed.{sys.argv[1]}")
  jobs.serve(jobs.Job.from_json(sys.argv[2]), module.open_side)
