"""The files that people name on a command line: paths, folders and globs, separated by commas."""

import glob
import os
from collections.abc import Iterator

from realm_tf import artifacts
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
  paths = set()
  for found in _matches(inputs):
    paths.update(path for match in found for path in _walk(match))
  return sorted(paths)


def _matches(inputs: str) -> Iterator[list[str]]:
  """What each part of the list matches. A comma in a name is told by what exists: the parts around
  it match nothing alone.
  """
  parts = [inputs] if _exists(inputs) else inputs.split(",")
  first = 0
  while first < len(parts):
    for end in range(first + 1, len(parts) + 1):
      if found := _match(",".join(parts[first:end])):
        yield found
        break
    else:
      if parts[first].strip():
        raise artifacts.UserError(
          f"no file {parts[first]!r}; wanted files, folders or globs, separated by commas."
        )
      end = first + 1
    first = end


def _match(path: str) -> list[str]:
  if not path.strip():
    return []
  if _exists(path):
    return [path]
  if not glob.has_magic(path):
    return []
  if "://" in path:
    return gfile.glob(path)
  folder = path  # the part of the path that exists is no pattern: a folder may be called [v2]
  while folder != os.path.dirname(folder) and not os.path.exists(folder):
    folder = os.path.dirname(folder)
  return glob.glob(glob.escape(folder) + path[len(folder) :], recursive=True)


def _exists(path: str) -> bool:
  return gfile.exists(path) if "://" in path else os.path.lexists(path)


def _walk(path: str) -> Iterator[str]:
  """The files below a folder, or the path itself. Local folders are read by Python: a name need not
  be UTF-8 there.
  """
  if "://" in path:
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
