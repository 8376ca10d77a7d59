"""The file list in info.json, and checks of an artifact's files against it.

Sizes are checked whenever an artifact is opened. Digests are checked just before a file is read:
hashing a gigabyte takes about a second of one core, and reading it from disk about as long.
"""

import concurrent.futures
import hashlib
import os
import re
from collections.abc import Collection, Mapping

import tensorflow as tf

from realm_tf.errors import ArtifactError
from realm_tf.storage import ownership, paths

gfile = tf.io.gfile

_DIGESTS_AT_ONCE = 8  # hashing releases the interpreter's lock
_STATS_AT_ONCE = 32  # remote files, each a round trip


def describe(path: str, *, records: int | None = None) -> dict:
  """Returns a file's entry for info.json: "bytes", "sha256", and "records" if known."""
  digest, size = hashlib.sha256(), 0
  with gfile.GFile(path, "rb") as file:
    while chunk := file.read(1 << 20):
      digest.update(chunk)
      size += len(chunk)
  found = {"bytes": size, "sha256": digest.hexdigest()}
  return found if records is None else {**found, "records": records}


def describe_all(folder: str, names: Collection[str]) -> dict[str, dict]:
  """Returns `describe` of some files of a folder, by name."""
  with concurrent.futures.ThreadPoolExecutor(_DIGESTS_AT_ONCE) as pool:
    found = pool.map(describe, [os.path.join(folder, name) for name in names])
    return dict(zip(names, found, strict=True))


def wrong_files(folder: str, files: Mapping[str, Mapping]) -> str:
  """Describes in words which of `files` are missing or have another size; "" if none."""
  for name in files:
    if name.startswith("/") or ".." in name.split("/"):
      return f"its file list names {name!r}, which is outside of it"
  at = [os.path.join(folder, name) for name in files]
  if paths.is_remote(folder):
    with concurrent.futures.ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
      sizes = list(pool.map(paths.size_bytes, at))
  else:
    sizes = [paths.size_bytes(path) for path in at]
  wrong = [
    f"its file {name!r} is missing"
    if size is None
    else f"its file {name!r} has {size:,} bytes instead of {file['bytes']:,}"
    for (name, file), size in zip(files.items(), sizes, strict=True)
    if size != file["bytes"]
  ]
  return (
    wrong[0] + (f" (and {len(wrong) - 1} more are wrong)" if wrong[1:] else "") if wrong else ""
  )


def damaged(folder: str, kind: str, how: str) -> ArtifactError:
  """Returns the error for an artifact that is not as it was published."""
  return ArtifactError(
    f"{kind} folder {folder!r} is damaged: {how}. Delete it and make the {kind} again, or copy it "
    "again from an intact source."
  )


def check_digests(folder: str, names: Collection[str] | None = None) -> None:
  """Compares files of an artifact with their digests in info.json, reading all their bytes.

  Checks nothing in a folder that is still being written, because it has no digests yet.

  Args:
    folder: the artifact.
    names: relative paths of the files that are about to be read; None for all files.

  Raises:
    ArtifactError: if a file is missing, damaged, or not in the artifact's list.
  """
  info = ownership.own_info(folder)
  if info is None or "files" not in info:
    return
  names = list(info["files"] if names is None else names)

  def problem(name: str) -> str:
    if name not in info["files"]:
      return "is not in its file list"
    try:
      found = describe(os.path.join(folder, name))["sha256"]
    except tf.errors.NotFoundError:
      return "is missing"
    wanted = info["files"][name]["sha256"]
    return "" if found == wanted else f"has SHA-256 {found[:12]}.. instead of {wanted[:12]}.."

  with concurrent.futures.ThreadPoolExecutor(_DIGESTS_AT_ONCE) as pool:
    for name, wrong in zip(names, pool.map(problem, names), strict=True):
      if wrong:
        raise damaged(folder, info["kind"], f"its file {name!r} {wrong}")


def files_of(folder: str, pattern: str) -> list[str]:
  """Returns the artifact's files whose relative path matches a regular expression, sorted.

  For a folder that is still being written, returns the files that exist so far.
  """
  info = ownership.own_info(folder)
  if info is None or "files" not in info:
    return paths.listed(folder, pattern)
  return [
    os.path.join(folder, name) for name in sorted(info["files"]) if re.fullmatch(pattern, name)
  ]
