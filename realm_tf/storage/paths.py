"""Paths as users give them: local or remote, relative, through links, with unusual characters.

A path that exists is taken literally, whatever characters are in it. Only a path that does not
exist is treated as a pattern, and then only the parts of it that do not exist.
"""

import atexit
import contextlib
import fnmatch
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator

import tensorflow as tf

gfile = tf.io.gfile

# raised for a path that does not exist any more
GONE = (FileNotFoundError, NotADirectoryError, tf.errors.NotFoundError)

_REMOTE = re.compile(r"([a-z][a-z0-9+.-]*://)([^/]*)(.*)", re.DOTALL)  # scheme, bucket, path
_MAGIC = re.compile(r"[*?\[\\]")
_PARTIAL = re.compile(r"\.partial-\d+-.*", re.DOTALL)


def is_remote(path: str) -> bool:
  return _REMOTE.fullmatch(path) is not None


def resolve(path: str) -> str:
  """Returns the canonical form of a path: absolute, without `..`, links or a trailing slash.

  A remote path is only normalised as text.
  """
  path = path.removeprefix("file://")
  if not (remote := _REMOTE.fullmatch(path)):
    return os.path.realpath(path)
  scheme, bucket, rest = remote.groups()
  return f"{scheme}{bucket}{posixpath.normpath('/' + rest.lstrip('/'))}".rstrip("/")


def holds(folder: str, path: str) -> bool:
  """Returns whether `path` is `folder` or lies inside it."""
  folder, path = resolve(folder), resolve(path)
  return path == folder or path.startswith(folder.rstrip("/") + "/")


def relative(path: str, start: str) -> str | None:
  """Returns `path` relative to the folder `start`; None if they are on different file systems."""
  path, start = resolve(path), resolve(start)
  remote, from_remote = _REMOTE.fullmatch(path), _REMOTE.fullmatch(start)
  if remote and from_remote and remote.group(1, 2) == from_remote.group(1, 2):
    return posixpath.relpath(remote[3] or "/", from_remote[3] or "/")
  return None if remote or from_remote else os.path.relpath(path, start)


def exists(path: str) -> bool:
  """Returns whether a path exists. Unlike in TensorFlow, a local name need not be UTF-8."""
  return gfile.exists(path) if is_remote(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
  return gfile.isdir(path) if is_remote(path) else os.path.isdir(path)


def names(folder: str) -> list[str]:
  """Returns the sorted names of the entries of a folder."""
  found = gfile.listdir(folder) if is_remote(folder) else os.listdir(folder)
  return sorted(name.rstrip("/") for name in found)


def listed(folder: str, pattern: str) -> list[str]:
  """Returns the sorted paths of a folder's entries whose whole name matches a regular expression.

  Returns an empty list if the folder does not exist.
  """
  if not is_folder(folder):
    return []
  return [
    os.path.join(folder, name) for name in names(folder) if re.fullmatch(pattern, name, re.DOTALL)
  ]


def split(text: str) -> list[str]:
  """Splits paths and patterns at commas, except at a comma in the name of a path that exists."""
  if _is_there(text):
    return [text]
  parts, found = text.split(","), []
  while parts:
    sizes = (size for size in range(1, len(parts) + 1) if matching(",".join(parts[:size])))
    size = next(sizes, 1)
    found.append(",".join(parts[:size]))
    parts = parts[size:]
  return [part for part in found if part]


def matching(path: str) -> list[str]:
  """Returns the path itself if it exists, otherwise the paths that it matches as a pattern.

  `*`, `?` and `[..]` match characters of a name, `**` any number of folders. As in a shell, they
  match no name that begins with a dot, unless the pattern does too. A broken link counts as
  existing.
  """
  path = path.removeprefix("file://")  # a scheme that Beam does not know
  if not path or _is_there(path):
    return [path] if path else []
  folder, pattern = os.path.split(path)
  if not pattern or not _MAGIC.search(path):
    return []
  parents = matching(folder) if folder else [""]
  if pattern == "**":
    return [below for parent in parents for below in _folders(parent)]
  match = re.compile(fnmatch.translate(pattern)).fullmatch
  return [
    os.path.join(parent, name)
    for parent in parents
    if is_folder(parent or ".")
    for name in names(parent or ".")
    if match(name) and (pattern.startswith(".") or not name.startswith("."))
  ]


@contextlib.contextmanager
def whole(path: str) -> Iterator[str]:
  """Writes a file atomically: completely or not at all.

  Yields:
    A temporary path to write to, beside `path`; it becomes `path` when the block ends, and is
    deleted if the block fails. `is_partial` recognises the file that a killed process leaves.
  """
  folder, name = os.path.split(path)
  partial = os.path.join(folder, f".partial-{os.getpid()}-{name}")
  try:
    yield partial
    gfile.rename(partial, path, overwrite=True)
  except BaseException:
    with contextlib.suppress(tf.errors.OpError):
      gfile.remove(partial)
    raise


def link_files(folder: str, names: Iterable[str], *, to: str) -> None:
  """Makes files that are never changed appear in a second folder, without copies if possible.

  Args:
    folder: the folder that has the files.
    names: their relative paths.
    to: the second folder; files that it has already stay.
  """
  for name in names:
    path, second = os.path.join(folder, name), os.path.join(to, name)
    if exists(second):
      continue
    gfile.makedirs(os.path.dirname(second))
    try:
      os.link(path, second)
    except OSError:  # another file system, or a remote one
      gfile.copy(path, second)


def is_partial(path: str) -> bool:
  """Returns whether a file is one that a killed process left half written."""
  return _PARTIAL.fullmatch(os.path.basename(path)) is not None


def half_written(folder: str) -> list[str]:
  """Returns the paths of files that killed processes left half written below a folder."""
  found = []
  for name in names(folder) if is_folder(folder) else ():
    path = os.path.join(folder, name)
    if is_folder(path) and not os.path.islink(path):
      found += half_written(path)
    elif is_partial(path):
      found.append(path)
  return found


def size_bytes(path: str) -> int | None:
  """Returns the size of a file; None if it does not exist."""
  try:
    return gfile.stat(path).length if is_remote(path) else os.stat(path).st_size
  except GONE:
    return None


def _is_there(path: str) -> bool:
  return gfile.exists(path) if is_remote(path) else os.path.lexists(path)


def _folders(parent: str) -> list[str]:
  """Returns a folder and all folders below it, except hidden ones, without following links."""
  if not is_folder(parent or "."):
    return []
  found = [parent]
  for name in names(parent or "."):
    below = os.path.join(parent, name)
    if is_folder(below) and not name.startswith(".") and not os.path.islink(below):
      found += _folders(below)
  return found


def literal(path: str) -> str:
  """Returns a path for TensorFlow's checkpoint reader, which treats every path as a pattern.

  Returns the path itself if it has no pattern characters. Otherwise the result leads through a
  temporary link, which is deleted when the process ends.
  """
  if is_remote(path) or not _MAGIC.search(path):
    return path
  folder, name = (path, "") if is_folder(path) else os.path.split(path)
  scratch = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, scratch, ignore_errors=True)
  link = os.path.join(scratch, "link")
  os.symlink(os.path.abspath(folder), link)
  return os.path.join(link, name) if name else link
