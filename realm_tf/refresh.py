"""The background job that keeps the index fresh, as the trainer sees it. REALM, section 3.3: asynchronous MIPS refreshes.

The trainer starts it, glances at it between two steps, and looks for the newest index; it never waits. The job's only other
end is folders: snapshots in, indexes out, and a small file beside the indexes while a refresh is under way.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import tensorflow as tf

from realm_tf import artifacts, index

STATUS = "refreshing.json"  # beside the indexes while one is being made: snapshot_step, started, pid, host
_LONGEST_PAUSE_SECS = 60.0


def under_way(indexes: str) -> dict | None:
  """What `refreshing.json` says of the refresh under way; None without one, or when the process that wrote it is gone.

  A process on another machine cannot be asked, and counts as alive.
  """
  try:
    status = json.loads(artifacts.read_text(os.path.join(indexes, STATUS)))
  except tf.errors.NotFoundError:
    return None
  return status if status["host"] != socket.gethostname() or _is_alive(status["pid"]) else None


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


class Refresher:
  """Runs `python -m beam_jobs.refresh_index --watch` beside a trainer, and finds its newest index.

  Use as a context manager: the job ends with the block, and with this process, however that ends.

  Args:
    snapshots, indexes: the roots that the job watches and writes to.
    passages: folder.
    log: file that the job's output is appended to.
    searcher: "exact" or "scann".
    start_job: False where the job runs elsewhere, started by the user.
    job_args: further flags of the job, then "--" and Beam's options.
    job_env: environment variables for the job, such as the CUDA_VISIBLE_DEVICES of an accelerator of its own.

  Attributes:
    restarts: how often the job was found dead and started again.
  """

  def __init__(self, *, snapshots: str, passages: str, indexes: str, log: str, searcher: str = "exact", start_job: bool = True,
               job_args: Sequence[str] = (), job_env: Mapping[str, str] | None = None):
    self.snapshots, self.passages, self.indexes, self.log = snapshots, passages, indexes, log
    self.restarts = 0
    self._command = [
        sys.executable, "-m", "beam_jobs.refresh_index", "--watch", f"--snapshots={snapshots}", f"--passages={passages}",
        f"--indexes={indexes}", f"--searcher={searcher}", f"--parent_pid={os.getpid()}", *job_args]
    self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **(job_env or {})}
    self._start_job = start_job
    self._job: subprocess.Popen | None = None
    self._start_at: float | None = None  # time.monotonic() of the next start of a dead job
    self._passages_fingerprint = artifacts.read_info(passages)["fingerprint"]
    self._usable: dict[tuple[str, int], bool] = {}  # (index folder, when it was completed) -> whether it may be used

  def __enter__(self) -> "Refresher":
    self.start()
    return self

  def __exit__(self, *unused_error) -> None:
    self.stop()

  def start(self) -> None:
    """Starts the job in a process group of its own."""
    if self._start_job:
      with open(self.log, "ab") as log:
        self._job = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._env, start_new_session=True)

  def poll(self) -> None:
    """Starts a dead job again, after a pause that doubles each time up to a minute; call it between training steps."""
    if self._job is None or self._job.poll() is None:
      return
    if self._start_at is None:
      self._kill_group()  # Beam's workers, should any have outlived it
      pause_secs = min(2.0 ** self.restarts, _LONGEST_PAUSE_SECS)
      self._start_at = time.monotonic() + pause_secs
      _warn(f"the refresh job ended with code {self._job.returncode} ({self._last_log_line()}); starting it again in "
            f"{pause_secs:.0f} s. Training goes on with the index it has. Log: {self.log}")
    elif time.monotonic() >= self._start_at:
      self._start_at = None
      self.restarts += 1
      self.start()

  def stop(self) -> None:
    """Ends the job with all its processes, at once: what it has not published does not count."""
    if self._job is not None:
      self._kill_group()
      self._job.wait()
      self._job = None

  def _kill_group(self) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._job.pid, signal.SIGKILL)

  @property
  def running(self) -> bool:
    """Whether a refresh is under way now."""
    return under_way(self.indexes) is not None

  def snapshots_in_use(self) -> set[int]:
    """Steps of the snapshots that an index or the refresh under way was made from: they must be kept."""
    status = under_way(self.indexes)
    return {artifacts.step_of(folder) for folder in artifacts.complete_folders(self.indexes)} | (
        {status["snapshot_step"]} if status else set())

  def newest_index(self) -> str | None:
    """The newest complete index of these passages and of these snapshots; others are passed over with one warning each."""
    for folder in reversed(artifacts.complete_folders(self.indexes)):
      with contextlib.suppress(tf.errors.NotFoundError):  # deleted while we look
        version = folder, artifacts.gfile.stat(os.path.join(folder, artifacts.COMPLETE)).mtime_nsec
        if version not in self._usable:
          self._usable[version] = self._check(folder)
        if self._usable[version]:
          return folder
    return None

  def _check(self, folder: str) -> bool:
    try:
      inputs = artifacts.read_info(folder, kind=index.KIND)["inputs"]
      wanted = {"passages": self._passages_fingerprint}
      snapshot = artifacts.step_folder(self.snapshots, artifacts.step_of(folder))
      if artifacts.is_complete(snapshot):
        wanted["snapshot"] = artifacts.read_info(snapshot)["fingerprint"]
      for name, fingerprint in wanted.items():
        if inputs[name]["fingerprint"] != fingerprint:
          raise artifacts.ArtifactError(f"it was made from {name} {inputs[name]['fingerprint']}, wanted {fingerprint}.")
    except (KeyError, TypeError, ValueError) as error:  # an info.json that is not ours raises any of these
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
