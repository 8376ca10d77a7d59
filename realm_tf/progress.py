"""Progress of long work: rates, time left, metrics.jsonl and TensorBoard."""

import json
import os
import sys
import time
from collections.abc import Mapping

import tensorflow as tf

from realm_tf.storage import artifacts, json_values, packed_files

METRICS = "metrics.jsonl"


class MetricsLog:
  """Appends rows to W/metrics.jsonl and scalars to W/tensorboard.

  Both continue the logs of an interrupted run.

  Args:
    workdir: W.
    start_step: step that training resumes from; later rows, left by a run that was killed after its
      last checkpoint, are dropped.
  """

  def __init__(self, workdir: str, *, start_step: int):
    self.path = os.path.join(workdir, METRICS)
    rows = [row for row in read_metrics(workdir) if row["step"] <= start_step]
    artifacts.gfile.makedirs(workdir)
    artifacts.write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
    self._writer = tf.summary.create_file_writer(os.path.join(workdir, "tensorboard"))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    values = {name: float(value) for name, value in values.items()}
    with artifacts.gfile.GFile(self.path, "a") as file:
      file.write(json.dumps({"step": step, **values}) + "\n")
    with self._writer.as_default(step=step):
      for name, value in values.items():
        tf.summary.scalar(name, value)
    self._writer.flush()


def read_metrics(workdir: str) -> list[dict]:
  """Returns the rows of W/metrics.jsonl; leaves out a half-written last line."""
  path = os.path.join(workdir, METRICS)
  if not artifacts.gfile.exists(path):
    return []
  rows = []
  with artifacts.gfile.GFile(path, "rb") as file:
    for line in json_values.lines(packed_files.unpacked(file)):
      try:
        rows.append(json.loads(line.raw))  # not json_lines.parse: a metric may be NaN
      except ValueError:
        break
  return rows


class Rate:
  """Prints done/total, rate and time left, at most every `every_secs`.

  Args:
    what: name of what is counted ("passages").
    total: the total count, or None.
    every_secs: least seconds between two lines.
  """

  def __init__(self, what: str, total: int | None = None, *, every_secs: float = 10.0):
    self.what, self.total, self.every_secs = what, total, every_secs
    self.done, self.started, self._shown = 0, time.monotonic(), time.monotonic()

  def add(self, count: int) -> None:
    self.done += count
    if time.monotonic() - self._shown >= self.every_secs:
      self._shown = time.monotonic()
      print(self.line(), file=sys.stderr, flush=True)

  def line(self) -> str:
    rate = self.done / max(time.monotonic() - self.started, 1e-9)
    total = "" if self.total is None else f"/{self.total:,}"
    left = (
      ""
      if self.total is None or not self.done
      else f", {(self.total - self.done) / rate:,.0f} s left"
    )
    return f"{self.done:,}{total} {self.what}, {rate:,.0f}/s{left}"
