"""The files that people name on a command line: paths, folders and globs, separated by commas."""

import os
from collections.abc import Iterator

from realm_tf import artifacts, paths
from realm_tf.artifacts import gfile


def find(inputs: str) -> list[str]:
  """The files that `inputs` names, in the order of their paths, each once.

  A path that exists is just that path, whatever is in its name: brackets, stars, question marks,
  commas. Folders are walked;
  hidden files and folders in them are passed over, unless they are named themselves. A link that
  leads nowhere is among the files.

  Args:
    inputs: a path, or files, folders and globs separated by commas.

  Raises:
    UserError: one of them matches no file.
  """
  found = set()
  for part in paths.split(inputs):
    matches = paths.matching(part)
    if not matches:
      raise artifacts.UserError(
        f"no file {part!r}; wanted files, folders or globs, separated by commas."
      )
    found.update(path for match in matches for path in walk(match))
  return sorted(found)


def walk(path: str) -> Iterator[str]:
  """The files below a folder but for hidden ones, or the path itself.

  Local folders are read by Python: a name need not be UTF-8 there.
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
  """Links to folders are followed, each folder once. A folder that cannot be listed is given
  itself, for others to reject.
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
