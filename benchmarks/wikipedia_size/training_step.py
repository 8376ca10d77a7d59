"""Trains REALM with a large corpus, to measure what the trainer needs."""

import os
import subprocess
import sys
import time

from benchmarks.wikipedia_size import measuring
from realm_tf import progress
from realm_tf.storage import artifacts

CONFIG = "configs/own_corpus.py"
_POLL_SECS = 1.0


def annotate(passages: str, output: str) -> dict[str, float]:
  """Finds the salient spans of all passages, in one process."""
  gib = measuring.command(
    "beam_jobs.annotate_spans", f"--passages={passages}", f"--output={output}"
  )
  return {"command's GiB": round(gib, 2)}


def train(
  snapshot: str, passages: str, spans: str, index: str, folder: str, num_steps: int
) -> dict[str, float]:
  """Trains with the index of a snapshot, until `num_steps` steps are done.

  The reader has fresh weights and is not warmed up.
  """
  init, workdir = os.path.join(folder, "init"), os.path.join(folder, "realm")
  for name, source in (("snapshots", snapshot), ("indexes", index)):
    os.makedirs(os.path.join(init, name), exist_ok=True)
    link = os.path.join(init, name, os.path.basename(snapshot))
    if not os.path.exists(link):
      os.symlink(source, link)
  made = artifacts.read_info(index)["config"]
  values = {
    "passages": passages,
    "knowledge_spans": spans,
    "spans": spans,
    "searcher": made["searcher"],
    "mlm.steps": 0,
    "warmup.steps": 0,
    "realm.init": init,
    "realm.steps": 1000 * num_steps,  # the last index would be of another snapshot
    "realm.log_every": num_steps,
    "realm.checkpoint_every": 1000 * num_steps,
    "refresh.every_steps": 1000 * num_steps,
    "refresh.job_args": tuple(f"--{name}={made[name]}" for name in ("embedding_type", "recall")),
  }
  started = time.monotonic()
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "realm_tf.pretrain", f"--config={CONFIG}", f"--workdir={workdir}"),
      *(f"--config.{name}={value}" for name, value in values.items()),
    ]
  )
  try:
    with measuring.Peak(process.pid) as peak:
      while not (rows := progress.read_metrics(workdir)) and process.poll() is None:
        time.sleep(_POLL_SECS)
  finally:
    process.terminate()
    process.wait()
  if not rows:
    sys.exit(f"realm_tf.pretrain failed with exit code {process.returncode}.")
  return {
    "trainer's GiB": round(peak.gib, 2),
    f"step {num_steps} after s": round(time.monotonic() - started, 1),
    "examples a second": round(rows[0]["examples_per_sec"], 2),
  }
