"""Ownership of files: which ones a job wrote, and may therefore replace or delete.

An artifact's `info.json` lists its files. Nothing else is ever deleted: neither a folder that only
looks like an artifact, nor a file that a user put into one.

This module also ensures that only one process at a time writes to a folder.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeGuard

import tensorflow as tf

from realm_tf.errors import ArtifactError
from realm_tf.storage import paths, writers

gfile = tf.io.gfile

INFO = "info.json"
COMPLETE = "COMPLETE"
WRITER = ".writer.json"  # names the process that is writing to a folder
# keys of every info.json, from the start of a job
_KEYS: dict[str, type | tuple[type, ...]] = {
  "kind": str,
  "format_version": int,
  "config": dict,
  "inputs": dict,
  "seed": (int, type(None)),
}
# additional keys of a complete one
_COMPLETE_KEYS = {"fingerprint": str, "counts": dict, "files": dict}
KEYS = (*_KEYS, *_COMPLETE_KEYS)
_INPUT_KEYS = {"path": str, "fingerprint": str}
_FILE_KEYS = {"bytes": int, "sha256": str}


def contents_of(folder: str) -> list[str]:
  """Returns relative paths of all files and links below a folder; empty folders end with a slash.

  Excludes the files that writers keep only while they write.
  """
  found = sorted(_contents(folder)) if paths.is_folder(folder) else []
  return [name for name in found if not _is_a_writers(name)]


def _is_a_writers(path: str) -> bool:
  """Returns whether a file is one that a process keeps only while it writes."""
  return os.path.basename(path) == WRITER or paths.is_partial(path)


def _contents(folder: str, prefix: str = "") -> Iterator[str]:
  for name in paths.names(folder):
    path = os.path.join(folder, name)
    if paths.is_folder(path) and not os.path.islink(path):
      yield from list(_contents(path, f"{prefix}{name}/")) or [f"{prefix}{name}/"]
    else:
      yield prefix + name


def own_info(folder: str) -> dict | None:
  """Returns an artifact's info.json, complete or not; None if absent or from another program."""
  try:
    with gfile.GFile(os.path.join(folder, INFO), "r") as file:
      info = json.loads(file.read())
  except (tf.errors.OpError, OSError, ValueError, RecursionError):
    return None
  return info if is_info(info) else None


def is_info(info: object) -> bool:
  """Returns whether a value has the keys and types of an artifact's info.json, complete or not."""
  if not _has(info, _KEYS):
    return False
  if not all(_has(source, _INPUT_KEYS) for source in info["inputs"].values()):
    return False
  return "fingerprint" not in info or (
    _has(info, _COMPLETE_KEYS) and all(_has(file, _FILE_KEYS) for file in info["files"].values())
  )


def _has(value: object, types: Mapping) -> TypeGuard[dict]:
  return isinstance(value, dict) and all(
    name in value and isinstance(value[name], wanted) for name, wanted in types.items()
  )


# ----------------------------------------------------------------------------------- where to write


def check_output(folder: str, *, kind: str, reads: Sequence[str] = ()) -> str:
  """Checks, before any work is done, that writing an artifact to a folder destroys nothing.

  Args:
    folder: may be absent, empty, or an artifact of this kind with nothing added to it.
    kind: kind of artifact that will be written.
    reads: files and folders that the job reads; none of them may be, hold or lie in the folder.

  Returns:
    The folder to write to, without a trailing slash; if `folder` is a link, its target.

  Raises:
    ArtifactError: if the folder cannot be written; says what is there and what to do.
  """
  given = folder
  folder = folder.removeprefix("file://").rstrip("/")
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
  """Raises ArtifactError if an output is, holds or lies in one of the input paths."""
  for path in reads:
    if (inside := paths.holds(path, output)) or paths.holds(output, path):
      how = (
        "is" if paths.resolve(path) == paths.resolve(output) else "lies in" if inside else "holds"
      )
      raise ArtifactError(
        f"the output {output!r} {how} the input {path!r}, which could be lost; write elsewhere."
      )


def check_file(path: str, *, reads: Sequence[str] = ()) -> None:
  """Checks, before any work is done, that a file can be written, and creates its folder.

  Raises:
    ArtifactError: if `path` is or would be a folder, or is an input.
  """
  check_apart(path, reads)
  if path.endswith("/") or paths.is_folder(path):
    raise ArtifactError(f"{path!r} is a folder; give the name of a file to write.")
  gfile.makedirs(os.path.dirname(path) or ".")


def check_replaceable(folder: str, kind: str) -> None:
  """Raises ArtifactError if a folder holds anything but an artifact of this kind."""
  info, found = _info_and_contents(folder)
  if found and (info is None or info["kind"] != kind):
    what = some(found) if info is None else f"{info['kind']} of an earlier run"
    raise ArtifactError(
      f"{folder!r} holds {what}; wanted a new or empty folder, or {kind} of an earlier "
      "run. Write elsewhere, or move away what is there."
    )
  if added := strays(folder, "") if found else []:
    raise ArtifactError(
      f"{folder!r} holds {some(added)} besides its {kind}, and would be replaced as a whole. "
      "Move that away, or write elsewhere."
    )


def _info_and_contents(folder: str) -> tuple[dict | None, list[str]]:
  """Both of the same artifact, although another process may replace it in between."""
  while True:
    with contextlib.suppress(*paths.GONE):
      info, found = own_info(folder), contents_of(folder)
      if own_info(folder) == info:
        return info, found


def check_numbered(root: str, *, kind: str) -> None:
  """Raises ArtifactError if a numbered folder under `root` holds anything but a `kind` artifact."""
  for folder in paths.listed(root, r"\d+"):
    info, found = _info_and_contents(folder)
    if found and (info is None or info["kind"] != kind):
      raise ArtifactError(
        f"{folder!r} holds {some(found)}, which is not a {kind}, but the run writes its own there. "
        "Move it away, or give another workdir."
      )


def some(names: Sequence[str]) -> str:
  return repr(names[0]) + (f" and {len(names) - 1} more" if names[1:] else "")


# ---------------------------------------------------------------------------- one writer at a time

_claims: dict[str, int | None] = {}  # folder -> descriptor that holds its lock; None without locks


def claim(folder: str, writer: Mapping | None = None) -> None:
  """Reserves a folder for this process to write to, until it ends or calls `release`.

  The operating system's lock shows whether a writer is alive, and `.writer.json` which process it
  is. On a file system without locks, that file shows both. For a remote folder, a writer on another
  host is ignored, because nothing shows whether it is alive; if it is, `Publication.finish` detects
  it.

  Args:
    folder: created if it does not exist.
    writer: the writer if it is not this process: `writers.submitted()`.

  Raises:
    ArtifactError: if another process has claimed the folder; the message says which.
  """
  release(folder)
  path, remote = os.path.join(folder, WRITER), paths.is_remote(folder)
  # TensorFlow fails so if the folder's writer moves it away just then; `_lock` makes it again
  with contextlib.suppress(tf.errors.FailedPreconditionError, *paths.GONE):
    gfile.makedirs(folder)
  locked = None if remote else _lock(folder)
  other = writers.read(path)
  is_taken = writers.is_known_to_live if remote else writers.is_alive
  if other and is_taken(other) and (locked is None or other["pid"] is None):
    if locked is not None:
      os.close(locked)
    raise ArtifactError(
      f"{_is_written(folder, other)}; wait until it ends, or, if you know that it has, delete "
      f"{path!r}."
    )
  _claims[paths.resolve(folder)] = locked
  try:
    writers.leave(path, dict(writer or writers.this_process()))
  except BaseException:
    release(folder)
    raise


def _lock(folder: str) -> int | None:
  """Locks a folder; returns the descriptor, or None on a file system without locks."""
  while True:
    try:
      with contextlib.suppress(FileExistsError):  # also if it vanishes just then
        os.makedirs(folder)
      locked = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
      continue  # its writer has just moved it away
    try:
      fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(locked)
      other = writers.read(os.path.join(folder, WRITER))
      raise ArtifactError(
        f"{_is_written(folder, other)}; wait until it ends, or write elsewhere."
      ) from None
    except OSError:
      os.close(locked)
      return None
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(locked), os.stat(folder)):
        return locked
    os.close(locked)  # of a folder that its writer has just moved away


def _is_written(folder: str, writer: dict | None) -> str:
  return f"another process is writing to {folder!r} ({writers.words(writer)})"


def release(folder: str) -> None:
  """Releases a folder that this process claimed with `claim`; does nothing otherwise."""
  folder = paths.resolve(folder)
  if folder not in _claims:
    return
  locked = _claims.pop(folder)
  path = os.path.join(folder, WRITER)
  if writers.is_this_process(writers.read(path)):  # not a later writer's, nor a submitted job's
    gfile.remove(path)
  if locked is not None:
    os.close(locked)


@contextlib.contextmanager
def only_writer(folder: str) -> Iterator[None]:
  """Keeps all other processes from writing to a folder while the block runs.

  Raises:
    ArtifactError: if another process is writing to it.
  """
  if paths.resolve(folder) in _claims:  # by an enclosing block
    yield
    return
  is_new = not paths.exists(folder)
  claim(folder)
  try:
    yield
  finally:
    release(folder)
    if is_new and not paths.is_remote(folder):
      with contextlib.suppress(OSError):
        os.rmdir(folder)  # if nothing was written


# ----------------------------------------------------------------------------------------- deleting


def remove(folder: str) -> None:
  """Deletes the files that an artifact's info.json lists, and the folder if nothing else is in it.

  Deletes the `COMPLETE` marker first.
  """
  listed = (own_info(folder) or {}).get("files")
  if listed is not None:
    there = contents_of(folder)
    for name in [COMPLETE, *sorted(set(listed)), INFO]:
      if name in there and not name.endswith("/"):
        gfile.remove(os.path.join(folder, name))
  if all(name.endswith("/") for name in contents_of(folder)):
    gfile.rmtree(folder)


def restore(folder: str) -> None:
  """Restores an artifact that a job had moved aside to replace when it was killed.

  If the replacement is already in place, the old artifact is deleted instead.
  """
  parent, name = os.path.split(folder)
  for replaced in paths.listed(parent or ".", rf"\.replaced-{re.escape(name)}-\d+"):
    pid = int(replaced.rpartition("-")[2])
    if pid != os.getpid() and writers.is_running(pid):
      continue  # that process is about to move its artifact into place
    with contextlib.suppress(*paths.GONE):  # it has just deleted it, or moved it back
      if own_info(replaced) and not paths.exists(folder):
        gfile.rename(replaced, folder)
      else:
        remove(replaced)


def tidy(root: str) -> None:
  """Deletes what killed jobs left half written under `root`, and puts back what they had moved."""
  for folder in paths.listed(root, r"\.staging-.*"):
    with contextlib.suppress(ArtifactError):  # another process is writing to it
      if own_info(folder) or not contents_of(folder):
        claim(folder)
        gfile.rmtree(folder)
        release(folder)
  for replaced in paths.listed(root, r"\.replaced-.*-\d+"):
    name = os.path.basename(replaced).removeprefix(".replaced-").rpartition("-")[0]
    restore(os.path.join(root, name))


def strays(folder: str, known: str, prefix: str = "") -> list[str]:
  """Returns the relative paths of files below a folder that no job wrote.

  Args:
    folder: folder to search.
    known: regular expression of the relative paths that are expected outside of artifacts.
    prefix: prepended to each path.
  """
  info, contents = _info_and_contents(folder)
  if info:
    # an incomplete artifact has no list: all its files belong to the job
    own = {INFO, COMPLETE, *info.get("files", contents)}
    return [prefix + name for name in contents if name not in own and not name.endswith("/")]
  found = []
  for path in paths.listed(folder, ".*"):
    name = prefix + os.path.basename(path)
    if paths.is_folder(path) and not os.path.islink(path):
      found += strays(path, known, f"{name}/")
    elif not (re.fullmatch(known, name) or _is_a_writers(path)):
      found.append(name)
  return found
