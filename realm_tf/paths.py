"""Paths as people write them: local or remote, relative, through links, with odd characters.

A path that exists is that path, whatever characters are in it. Only what does not exist is taken
for a pattern, and then only the parts of it that do not exist.
"""

import atexit
import fnmatch
import os
import posixpath
import re
import shutil
import tempfile

import tensorflow as tf

gfile = tf.io.gfile

_REMOTE = re.compile(r"([a-z][a-z0-9+.-]*://)([^/]*)(.*)", re.DOTALL)  # scheme, bucket, path
_MAGIC = re.compile(r"[*?\[\\]")


def is_remote(path: str) -> bool:
  return _REMOTE.fullmatch(path) is not None


def resolve(path: str) -> str:
  """One spelling of a path: absolute, without `..`, links and a last slash.

  A remote path is only tidied as text.
  """
  path = path.removeprefix("file://")
  if not (remote := _REMOTE.fullmatch(path)):
    return os.path.realpath(path)
  scheme, bucket, rest = remote.groups()
  return f"{scheme}{bucket}{posixpath.normpath('/' + rest.lstrip('/'))}".rstrip("/")


def holds(folder: str, path: str) -> bool:
  """Whether `path` is `folder` or lies inside it."""
  folder, path = resolve(folder), resolve(path)
  return path == folder or path.startswith(folder.rstrip("/") + "/")


def relative(path: str, start: str) -> str | None:
  """`path` as seen from the folder `start`; None where the two are on different file systems."""
  path, start = resolve(path), resolve(start)
  remote, from_remote = _REMOTE.fullmatch(path), _REMOTE.fullmatch(start)
  if remote and from_remote and remote.group(1, 2) == from_remote.group(1, 2):
    return posixpath.relpath(remote[3] or "/", from_remote[3] or "/")
  return None if remote or from_remote else os.path.relpath(path, start)


def exists(path: str) -> bool:
  """Whether something is there. Its name need not be UTF-8, as TensorFlow wants."""
  return gfile.exists(path) if is_remote(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
  return gfile.isdir(path) if is_remote(path) else os.path.isdir(path)


def names(folder: str) -> list[str]:
  """The names of what is in a folder, sorted."""
  found = gfile.listdir(folder) if is_remote(folder) else os.listdir(folder)
  return sorted(name.rstrip("/") for name in found)


def listed(folder: str, pattern: str) -> list[str]:
  """Paths of what is in a folder and whose whole name matches a regular expression, sorted.

  Nothing is in a folder that does not exist.
  """
  if not is_folder(folder):
    return []
  return [
    os.path.join(folder, name) for name in names(folder) if re.fullmatch(pattern, name, re.DOTALL)
  ]


def split(text: str) -> list[str]:
  """Paths and patterns that are separated by commas; a comma in a name that exists is its own."""
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
  """The path itself if it exists, otherwise what it matches as a pattern.

  `*`, `?` and `[..]` stand for letters of a name, `**` for any number of folders. As in a shell, they
  match no name that begins with a dot, unless the pattern does too. A link that leads nowhere exists.
  """
  path = path.removeprefix("file://")  # which Beam does not know
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


def _is_there(path: str) -> bool:
  return gfile.exists(path) if is_remote(path) else os.path.lexists(path)


def _folders(parent: str) -> list[str]:
  """A folder and all folders below it, but for hidden ones; no link is followed."""
  if not is_folder(parent or "."):
    return []
  found = [parent]
  for name in names(parent or "."):
    below = os.path.join(parent, name)
    if is_folder(below) and not name.startswith(".") and not os.path.islink(below):
      found += _folders(below)
  return found


def literal(path: str) -> str:
  """A path for TensorFlow's reader of checkpoints, which takes every path for a pattern.

  It is the path itself if that looks like no pattern. Otherwise it leads through a link, which
  stays until the process ends.
  """
  if is_remote(path) or not _MAGIC.search(path):
    return path
  folder, name = (path, "") if is_folder(path) else os.path.split(path)
  scratch = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, scratch, ignore_errors=True)
  link = os.path.join(scratch, "link")
  os.symlink(os.path.abspath(folder), link)
  return os.path.join(link, name) if name else link
