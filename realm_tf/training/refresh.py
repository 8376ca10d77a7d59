"""The trainer's side of the background job that refreshes the index.

REALM, section 3.3: asynchronous MIPS refreshes.

The trainer starts the job, polls it between two steps, and looks for the newest index; it never
waits. The job communicates only through folders: it reads snapshots and writes indexes, with a
small file beside the indexes while a refresh is running.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time

import tensorflow as tf

from realm_tf.retrieval import index
from realm_tf.storage import artifacts, writers

# Beside the indexes while one is being made: snapshot_step, and `writers`' fields of the process.
STATUS = "refreshing.json"
_LONGEST_PAUSE_SECS = 60.0


def under_way(indexes: str) -> dict | None:
  """Reads `refreshing.json` of the refresh that is running.

  Returns None if no refresh is running, or if the process that wrote the file is gone. A process on
  another machine cannot be checked and counts as alive.
  """
  status = writers.read(os.path.join(indexes, STATUS))
  if status is None or not isinstance(status.get("snapshot_step"), int):
    return None
  return status if writers.is_alive(status) else None


@dataclasses.dataclass(frozen=True)
class RefreshJob:
  """The job `python -m beam_jobs.refresh_index` that a trainer starts.

  Attributes:
    passages: folder of the knowledge corpus.
    searcher: "exact", "partitioned" or "scann".
    start: whether the trainer starts the job; False if the user runs it elsewhere.
    args: further flags of the job, then "--" and Beam's options.
  """

  passages: str
  searcher: str = "exact"
  start: bool = True
  args: tuple[str, ...] = ()

  def command(self, flag: str, *, snapshots: str, indexes: str) -> list[str]:
    """Returns the command line, with one more flag after `args` and before Beam's options."""
    end = self.args.index("--") if "--" in self.args else len(self.args)
    return [
      sys.executable,
      "-m",
      "beam_jobs.refresh_index",
      f"--snapshots={snapshots}",
      f"--passages={self.passages}",
      f"--indexes={indexes}",
      f"--searcher={self.searcher}",
      f"--parent_pid={os.getpid()}",
      *self.args[:end],
      flag,
      *self.args[end:],
    ]


def make_index(job: RefreshJob, workdir: str) -> None:
  """Makes the index of the newest of W/snapshots in W/indexes, in a subprocess, and waits for it.

  Returns at once if the index exists. The index serves for resuming or evaluation, so it is always
  computed in float32, regardless of `job.args`.

  Raises:
    UserError: the job failed; see its output above.
  """
  command = job.command(
    "--nomixed_precision",
    snapshots=os.path.join(workdir, "snapshots"),
    indexes=os.path.join(workdir, "indexes"),
  )
  # It has its own process group, and ends with this process, however that ends.
  done = subprocess.run(command, check=False, start_new_session=True)
  if done.returncode:
    raise artifacts.UserError(
      f"the refresh job ended with code {done.returncode}; see its output above."
    )


class Refresher:
  """Runs `python -m beam_jobs.refresh_index --watch` beside a trainer, and finds its newest index.

  Use it as a context manager: the job ends with the block, and with this process, however it ends.

  Args:
    job: the job to run.
    snapshots, indexes: the roots that the job watches and writes to.
    log: file that the job's output is appended to.

  Attributes:
    restarts: number of times that the job had died and was started again.
  """

  def __init__(self, job: RefreshJob, *, snapshots: str, indexes: str, log: str):
    self.snapshots, self.indexes, self.log = snapshots, indexes, log
    self.restarts = 0
    self._command = job.command("--watch", snapshots=snapshots, indexes=indexes)
    self._env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    self._start_job = job.start
    self._job: subprocess.Popen | None = None
    self._start_at: float | None = None  # time.monotonic() of the next start of a dead job
    self._passages = job.passages
    self._usable: dict[index.Version, bool] = {}

  def __enter__(self) -> "Refresher":
    self.start()
    return self

  def __exit__(self, *unused_error) -> None:
    self.stop()

  def start(self) -> None:
    """Starts the job in its own process group."""
    if self._start_job:
      with open(self.log, "ab") as log:
        self._job = subprocess.Popen(
          self._command, stdout=log, stderr=log, env=self._env, start_new_session=True
        )

  def poll(self) -> None:
    """Restarts the job if it has died, after a pause that doubles each time up to a minute.

    Call this between training steps.
    """
    if self._job is None or self._job.poll() is None:
      return
    if self._start_at is None:
      self._kill_group(self._job)  # Beam's workers, if any have outlived it
      pause_secs = min(2.0**self.restarts, _LONGEST_PAUSE_SECS)
      self._start_at = time.monotonic() + pause_secs
      _warn(
        f"the refresh job ended with code {self._job.returncode} ({self._last_log_line()}); "
        f"restarting it in {pause_secs:.0f} s. Training continues with the current index. Log: "
        f"{self.log}"
      )
    elif time.monotonic() >= self._start_at:
      self._start_at = None
      self.restarts += 1
      self.start()

  def stop(self) -> None:
    """Kills the job and all its processes at once; unpublished output is lost."""
    if self._job is not None:
      self._kill_group(self._job)
      self._job.wait()
      self._job = None

  @staticmethod
  def _kill_group(job: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(job.pid, signal.SIGKILL)

  @property
  def running(self) -> bool:
    """Whether a refresh is running now."""
    return under_way(self.indexes) is not None

  def snapshots_in_use(self) -> set[int]:
    """Returns the steps of snapshots that must be kept.

    These are the snapshots of the indexes and of the refresh that is running.
    """
    status = under_way(self.indexes)
    return {artifacts.step_of(folder) for folder in artifacts.complete_folders(self.indexes)} | (
      {status["snapshot_step"]} if status else set()
    )

  def newest_index(self) -> index.Version | None:
    """Returns the newest complete index of the snapshots and of the passages as they are now.

    Returns None if there is none.
    Other indexes are ignored with one warning each.
    """
    for folder in reversed(artifacts.complete_folders(self.indexes)):
      with contextlib.suppress(tf.errors.NotFoundError):  # deleted meanwhile
        completed = artifacts.gfile.stat(os.path.join(folder, artifacts.COMPLETE))
        version = index.Version(folder, completed.mtime_nsec)
        if version not in self._usable:
          self._usable[version] = self._check(folder)
        if self._usable[version]:
          return version
    return None

  def _check(self, folder: str) -> bool:
    try:
      inputs = artifacts.read_info(folder, kind=index.KIND)["inputs"]
      wanted = {"passages": artifacts.read_info(self._passages)["fingerprint"]}
      snapshot = artifacts.step_folder(self.snapshots, artifacts.step_of(folder))
      if artifacts.is_complete(snapshot):
        wanted["snapshot"] = artifacts.read_info(snapshot)["fingerprint"]
      for name, fingerprint in wanted.items():
        if inputs[name]["fingerprint"] != fingerprint:
          raise artifacts.ArtifactError(
            f"it was made from {name} {inputs[name]['fingerprint']}, wanted {fingerprint}."
          )
    except (
      KeyError,
      TypeError,
      ValueError,
    ) as error:  # an info.json of other origin raises any of these
      _warn(f"index {folder} is ignored: {error}")
      return False
    return True

  def _last_log_line(self) -> str:
    with open(self.log, "rb") as log:
      log.seek(max(0, os.path.getsize(self.log) - 4096))
      lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")


def _warn(message: str) -> None:
  print(f"WARNING: {message}", file=sys.stderr, flush=True)
