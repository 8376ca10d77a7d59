"""Writer processes: the record that each leaves in a file, and checks that it is still alive.

A process is identified by its pid, its host and its start time. The pid alone is not enough:
another process may reuse it, and in containers pids often coincide.
"""

import json
import os
import socket
import time

import tensorflow as tf

from realm_tf.storage import paths

gfile = tf.io.gfile

_NO_PROCESS = None  # `pid` of a job that outlives the process that submitted it


def this_process() -> dict:
  """Returns the record of this process.

  Returns:
    "pid", "host", "born" (see `_born`), and "since", seconds since the epoch, which is for display
    only, because clocks may jump.
  """
  pid = os.getpid()
  return {"pid": pid, "host": socket.gethostname(), "born": _born(pid), "since": time.time()}


def submitted() -> dict:
  """Returns the record of a job that outlives this process; nothing shows whether it is alive."""
  return {**this_process(), "pid": _NO_PROCESS, "born": None}


def _born(pid: int) -> str | None:
  """Returns when a process started: boot id and clock ticks since boot. None if it has ended."""
  try:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
      state, *fields = file.read().rpartition(")")[2].split()
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
      boot = file.read().strip()
  except OSError:
    return None
  return None if state in "ZX" else f"{boot}/{fields[18]}"


def read(path: str) -> dict | None:
  """Reads the record that a process left in a JSON file; None if there is no valid record."""
  try:
    with gfile.GFile(path, "r") as file:
      writer = json.loads(file.read())
  except (tf.errors.OpError, OSError, ValueError, RecursionError):
    return None
  if not isinstance(writer, dict) or not isinstance(writer.get("host"), str):
    return None
  pid = writer.get("pid", 0)
  return writer if pid is _NO_PROCESS or (type(pid) is int and pid > 0) else None


def is_alive(writer: dict) -> bool:
  """Returns whether a writer is alive.

  A writer on another host cannot be checked, and counts as alive.
  """
  if writer["pid"] is _NO_PROCESS or writer["host"] != socket.gethostname():
    return True
  born = _born(writer["pid"])
  return born is not None and born == writer.get("born")


def is_known_to_live(writer: dict) -> bool:
  """Returns whether a writer is another process on this host that is still alive."""
  return (
    writer["pid"] is not _NO_PROCESS
    and writer["host"] == socket.gethostname()
    and is_alive(writer)
    and not is_this_process(writer)
  )


def is_this_process(writer: dict | None) -> bool:
  """Returns whether a writer is the calling process."""
  if writer is None:
    return False
  this = this_process()
  return all(writer.get(name) == this[name] for name in ("pid", "host", "born"))


def is_running(pid: int) -> bool:
  """Returns whether a process with this pid is running on this machine."""
  return _born(pid) is not None


def words(writer: dict | None) -> str:
  """Describes a writer, for display."""
  if writer is None:
    return "unknown process"
  try:
    since = f" since {time.ctime(writer['since'])}"
  except (KeyError, TypeError, ValueError, OverflowError, OSError):
    since = ""
  who = "submitted" if writer["pid"] is _NO_PROCESS else f"process {writer['pid']}"
  return f"{who} on {writer['host']}{since}"


def leave(path: str, writer: dict) -> None:
  """Writes a record to a file for `read`."""
  with paths.whole(path) as partial, gfile.GFile(partial, "w") as file:
    file.write(json.dumps(writer) + "\n")
