"""Finds version folders under a base path, and their files.

As in TensorFlow Serving, a version is a folder whose name is a number below 2^63. Folders with
other names, even with invalid ones, are ignored.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator

import tensorflow as tf

from realm_tf.storage import paths

gfile = tf.io.gfile

_NUMBER = re.compile("[0-9]+")  # not \\d, which matches the digits of every script
_MAX_VERSION = (1 << 63) - 1


def version_of(name: str) -> int | None:
  """Returns the version that a folder's name represents, or None if it is not a version."""
  digits = name.lstrip("0") or "0"
  if not _NUMBER.fullmatch(name) or len(digits) > len(str(_MAX_VERSION)):
    return None
  version = int(digits)
  return version if version <= _MAX_VERSION else None


def found(base_path: str) -> dict[int, str]:
  """Returns version → folder, newest first; of two names for a number (1 and 01), takes the last.

  Raises:
    OSError, OpError: the base path cannot be read.
  """
  # TensorFlow's listing fails for the whole folder if one name in it is not UTF-8.
  names = gfile.listdir(base_path) if paths.is_remote(base_path) else os.listdir(base_path)
  versions = {}
  for name in sorted(name.rstrip("/") for name in names):
    version = version_of(name)
    if version is not None:
      versions[version] = f"{base_path.rstrip('/')}/{name}"
  return dict(sorted(versions.items(), reverse=True))


def files(path: str) -> tuple:
  """Returns all files of a folder with their sizes and times, to detect changes."""
  if not paths.is_remote(path):
    return tuple(sorted(_local_files(path)))
  names = [f"{folder}/{name}" for folder, _, names in gfile.walk(path) for name in names]
  stats = [(name, gfile.stat(name)) for name in sorted(names)]
  return tuple((name, stat.length, stat.mtime_nsec) for name, stat in stats)


def _local_files(path: str) -> Iterator[tuple]:
  for folder, _, names in os.walk(path):
    for name in names:
      with contextlib.suppress(FileNotFoundError):  # deleted meanwhile, or a link to nothing
        stat = os.stat(os.path.join(folder, name))
        yield os.path.join(folder, name), stat.st_size, stat.st_mtime_ns


@dataclasses.dataclass
class Broken:
  """A version that failed to load.

  Attributes:
    failed: its files at that time.
    seen: its files at the last check.
    num_tries: how often loading was tried.
    retry_at: when it is retried, in time.monotonic().
  """

  failed: tuple
  seen: tuple
  num_tries: int
  retry_at: float
