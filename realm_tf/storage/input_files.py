"""Input files given on a command line: paths, folders and globs, separated by commas."""

import os
from collections.abc import Iterator

from realm_tf.storage import artifacts, paths
from realm_tf.storage.artifacts import gfile


def find(inputs: str) -> list[str]:
  """Returns the files that `inputs` names, sorted by path, without duplicates.

  A path that exists is taken literally, even if its name has brackets, stars, question marks or
  commas. Folders are walked; hidden files and folders in them are skipped, unless they are named
  themselves. Broken links are included.

  Args:
    inputs: a path, or files, folders and globs separated by commas.

  Raises:
    UserError: if one of them matches no file.
  """
  found: set[str] = set()
  for part in paths.split(inputs):
    matches = paths.matching(part)
    if not matches:
      raise artifacts.UserError(
        f"no file {part!r}; wanted files, folders or globs, separated by commas."
      )
    found.update(path for match in matches for path in walk(match))
  return sorted(found)


def walk(path: str) -> Iterator[str]:
  """Yields the files below a folder except hidden ones, or the path itself.

  Local folders are listed by Python, because a name need not be UTF-8 there.
  """
  if paths.is_remote(path):
    if not gfile.isdir(path):
      yield path
      return
    for folder, _, names in gfile.walk(path):
      inside = folder[len(path) :].strip("/").split("/")
      if not any(name.startswith(".") for name in inside):
        yield from (os.path.join(folder, name) for name in names if not name.startswith("."))
  elif os.path.isdir(path):
    yield from _walk_local(path, set())
  else:
    yield path


def _walk_local(path: str, seen: set[str]) -> Iterator[str]:
  """Yields the files below a local folder, following links but visiting each folder once.

  A folder that cannot be listed is yielded itself, for the caller to reject.
  """
  real = os.path.realpath(path)
  if real in seen:
    return
  seen.add(real)
  try:
    names = [name for name in os.listdir(path) if not name.startswith(".")]
  except OSError:
    yield path
    return
  for name in names:
    below = os.path.join(path, name)
    if os.path.isdir(below):
      yield from _walk_local(below, seen)
    else:
      yield below
