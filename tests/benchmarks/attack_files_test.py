"""benchmarks/attack/files.py: every reader reads a damaged file or refuses it in one sentence."""

import json
import subprocess
import sys

from benchmarks.attack import file_kinds, files
from tests.processes import REPOSITORY

NUM_FILES = 200


def test_no_damaged_file_ends_a_reader(tmp_path):
  """Runs a short part of what otherwise runs overnight."""
  path = tmp_path / "report.jsonl"
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "benchmarks.attack.files",
      f"--files={NUM_FILES}",
      "--seed=0",
      "--processes=1",
      "--limit_secs=20",  # on busy cores
      f"--report={path}",
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert f"0 failures among {NUM_FILES} files" in done.stdout
  outcomes = [json.loads(line) for line in path.read_text().splitlines()]
  assert [one["kind"] for one in outcomes] == files.plan(
    NUM_FILES, seed=0, kinds=list(file_kinds.KINDS)
  )
  assert {one["result"] for one in outcomes} == {"read", "refused"}
  assert {one["kind"] for one in outcomes} == set(file_kinds.KINDS), "each kind is tried"
