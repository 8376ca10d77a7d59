"""Whose files these are: what a job wrote and may replace or delete, and what is somebody else's.

An artifact's `info.json` lists its files. Nothing else is ever deleted: neither a folder that only
looks like an artifact, nor a file that a user put into one.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence

import tensorflow as tf

from realm_tf import paths
from realm_tf.errors import ArtifactError

gfile = tf.io.gfile

INFO = "info.json"
COMPLETE = "COMPLETE"
_KEYS = {
  "kind",
  "format_version",
  "config",
  "inputs",
  "seed",
}  # of every info.json, from the beginning of a job


def contents_of(folder: str) -> list[str]:
  """Relative paths of all files and links below a folder; empty folders end with a slash."""
  return sorted(_contents(folder)) if paths.is_folder(folder) else []


def _contents(folder: str, prefix: str = "") -> Iterator[str]:
  for name in paths.names(folder):
    path = os.path.join(folder, name)
    if paths.is_folder(path) and not os.path.islink(path):
      yield from list(_contents(path, f"{prefix}{name}/")) or [f"{prefix}{name}/"]
    else:
      yield prefix + name


def own_info(folder: str) -> dict | None:
  """The info.json of an artifact, complete or not; None if there is none, or another program's."""
  try:
    with gfile.GFile(os.path.join(folder, INFO), "r") as file:
      info = json.loads(file.read())
  except (tf.errors.OpError, OSError, ValueError):
    return None
  return info if isinstance(info, dict) and _KEYS <= set(info) else None


# ------------------------------------------------------------------------------- where to write


def check_output(folder: str, *, kind: str, reads: Sequence[str] = ()) -> str:
  """Checks, before any work is done, that writing an artifact to a folder destroys nothing.

  Args:
    folder: may be absent, empty, or an artifact of this kind with nothing added to it.
    kind: what will be written.
    reads: files and folders that the work reads; none of them may be, hold or lie in the folder.

  Returns:
    The folder as it will be written: no last slash, and where it is a link what that leads to.

  Raises:
    ArtifactError: with what stands there and what to do.
  """
  given = folder
  folder = folder.rstrip("/")
  if not folder:
    raise ArtifactError(f"{kind} cannot be written to {given!r}; give a new or empty folder.")
  check_apart(folder, reads)
  if os.path.islink(folder) or os.path.basename(folder) in (".", ".."):
    folder = paths.resolve(folder)
  above = os.path.dirname(folder)
  while above and not paths.exists(above) and os.path.dirname(above) != above:
    above = os.path.dirname(above)
  for path in (above, folder):
    if path and paths.exists(path) and not paths.is_folder(path):
      raise ArtifactError(
        f"{path!r} is a file, so {kind} cannot be written to {given!r}; give a new or empty folder."
      )
  check_replaceable(folder, kind)
  return folder


def check_apart(output: str, reads: Sequence[str]) -> None:
  """Raises ArtifactError if an output is, holds or lies in one of the paths that are read."""
  for path in reads:
    if (inside := paths.holds(path, output)) or paths.holds(output, path):
      how = (
        "is" if paths.resolve(path) == paths.resolve(output) else "lies in" if inside else "holds"
      )
      raise ArtifactError(
        f"the output {output!r} {how} the input {path!r}, which could be lost; write elsewhere."
      )


def check_file(path: str, *, reads: Sequence[str] = ()) -> None:
  """Checks, before any work is done, that a file can be written there, and makes its folder.

  Raises:
    ArtifactError: it is or would be a folder, or an input.
  """
  check_apart(path, reads)
  if path.endswith("/") or paths.is_folder(path):
    raise ArtifactError(f"{path!r} is a folder; give the name of a file to write.")
  gfile.makedirs(os.path.dirname(path) or ".")


def check_replaceable(folder: str, kind: str) -> None:
  """Raises ArtifactError if a folder holds anything but an artifact of this kind."""
  info, found = own_info(folder), contents_of(folder)
  if found and (info is None or info["kind"] != kind):
    what = some(found) if info is None else f"{info['kind']} of an earlier run"
    raise ArtifactError(
      f"{folder!r} holds {what}; wanted a new or empty folder, or {kind} of an earlier "
      f"run, to write {kind} to. Write elsewhere, or move away what is there."
    )
  if added := strays(folder, "") if found else []:
    raise ArtifactError(
      f"{folder!r} holds {some(added)} beside its {kind}, and would be replaced as a whole. "
      "Move that away, or write elsewhere."
    )


def check_numbered(root: str, *, kind: str) -> None:
  """Raises ArtifactError if a numbered folder under `root`, where a run writes its own, is not."""
  for folder in paths.listed(root, r"\d+"):
    info, found = own_info(folder), contents_of(folder)
    if found and (info is None or info["kind"] != kind):
      raise ArtifactError(
        f"{folder!r} holds {some(found)}, which is no {kind}, where the run writes its own. "
        "Move it away, or give another workdir."
      )


def some(names: Sequence[str]) -> str:
  return repr(names[0]) + (f" and {len(names) - 1} more" if names[1:] else "")


_claims: dict[str, int] = {}  # folder -> the descriptor that holds its lock


def claim(folder: str) -> None:
  """Locks a folder for this process until it ends or calls `release`; remote ones have no locks.

  Raises:
    ArtifactError: another process has it.
  """
  release(folder)
  if paths.is_remote(folder):
    return
  claimed = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(claimed)
    raise ArtifactError(
      f"another process is writing to {folder!r}; wait until it ends, or write elsewhere."
    ) from None
  except OSError:  # a file system without locks
    os.close(claimed)
    return
  _claims[folder] = claimed


def release(folder: str) -> None:
  """Gives up what `claim` locked, if this process did."""
  if folder in _claims:
    os.close(_claims.pop(folder))


# ------------------------------------------------------------------------------------- deleting


def remove(folder: str) -> None:
  """Deletes what an artifact's info.json lists, and the folder if nothing else is in it.

  The artifact stops being complete first.
  """
  listed = (own_info(folder) or {}).get("contents")
  if listed is not None:
    there = contents_of(folder)
    for name in [COMPLETE, *sorted(set(listed)), INFO]:
      if name in there and not name.endswith("/"):
        gfile.remove(os.path.join(folder, name))
  if all(name.endswith("/") for name in contents_of(folder)):
    gfile.rmtree(folder)


def tidy(root: str) -> None:
  """Deletes what killed jobs left half written or half deleted under `root`."""
  for folder in paths.listed(root, r"\.staging-.*"):
    with contextlib.suppress(ArtifactError):  # another process is writing to it
      if own_info(folder):
        claim(folder)
        gfile.rmtree(folder)
        release(folder)
  for folder in paths.listed(root, r"\.replaced-.*"):
    remove(folder)


def strays(folder: str, known: str, prefix: str = "") -> list[str]:
  """What lies below a folder and was not written by a job: relative paths, after `prefix`.

  Args:
    known: regular expression of the relative paths that are expected outside of artifacts.
  """
  if info := own_info(folder):
    found = contents_of(folder)
    own = {
      INFO,
      COMPLETE,
      *info.get("contents", () if "fingerprint" in info else found),
    }  # a draft is ours as a whole
    return [prefix + name for name in found if name not in own]
  found = []
  for path in paths.listed(folder, ".*"):
    name = prefix + os.path.basename(path)
    if paths.is_folder(path) and not os.path.islink(path):
      found += strays(path, known, f"{name}/")
    elif not re.fullmatch(known, name):
      found.append(name)
  return found
