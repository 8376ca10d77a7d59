"""Files of artifacts, mapped into memory and compared with their digests.

A mapped file takes no memory of its own: the operating system reads the pages that are used, and
drops them when it needs room. It stays readable if the file is deleted or replaced. Files are never
changed in place.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa
import tensorflow as tf

from realm_tf.errors import ArtifactError, UserError
from realm_tf.storage import integrity, ownership, paths

gfile = tf.io.gfile

CHECKED_AT_ONCE_BYTES = 1 << 30  # hashing them takes about a second of one core
_FILES_AT_ONCE = 8  # hashing and copying release the interpreter's lock


class Check:
  """The comparison of mapped files with their digests.

  Calling it raises ArtifactError if a difference has been found.

  Args:
    folder: the artifact.
    info: its info.json.
    contents: name -> contents of each file.
    copies: name -> path of the local copy that was mapped, if it is one. A damaged copy is deleted,
      so that the next process copies the file again.
  """

  def __init__(
    self,
    folder: str,
    info: Mapping,
    contents: Mapping[str, pa.Buffer],
    copies: Mapping[str, str],
  ):
    self._folder, self._info, self._contents, self._copies = folder, info, contents, copies
    self._error: ArtifactError | None = None

  def __call__(self) -> None:
    if self._error is not None:
      raise ArtifactError(str(self._error))

  def start(self) -> None:
    """Compares all files, in the background if they have more than `CHECKED_AT_ONCE_BYTES`.

    Raises:
      ArtifactError: if they have fewer, and one differs.
    """
    if sum(map(len, self._contents.values())) > CHECKED_AT_ONCE_BYTES:
      digests = map(_digest, self._contents.values())
      # Not by a pool, for which the end of the process would wait.
      threading.Thread(target=self._compare, args=[digests], name="digests", daemon=True).start()
      return
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
      self._compare(pool.map(_digest, self._contents.values()))
    self()

  def _compare(self, digests: Iterator[str]) -> None:
    for name, found in zip(self._contents, digests, strict=True):
      wanted = self._info["files"][name]["sha256"]
      if found != wanted:
        self._error = self._damaged(name, found, wanted)
        return

  def _damaged(self, name: str, found: str, wanted: str) -> ArtifactError:
    where = ""
    if name in self._copies:
      where = f" (copied to {self._copies[name]!r})"
      with contextlib.suppress(FileNotFoundError):
        os.remove(self._copies[name])
    return integrity.damaged(
      self._folder,
      self._info["kind"],
      f"its file {name!r}{where} has SHA-256 {found[:12]}.. instead of {wanted[:12]}..",
    )


def _digest(contents: pa.Buffer) -> str:
  return hashlib.sha256(contents).hexdigest()


def _no_check() -> None:
  """Stands for the check of files that have no digests yet."""


def open_all(
  files: Sequence[str], *, keep: bool = False
) -> tuple[list[pa.Buffer], Callable[[], None]]:
  """Maps files of one folder, and compares them with their digests in info.json.

  In a folder that is still being written nothing is compared, because it has no digests yet.

  Args:
    files: paths of the files.
    keep: whether remote files are copied to the local disk, where this process and later ones map
      the copies; otherwise they are read into memory.

  Returns:
    The contents of each file, and the `Check` to call whenever they are used.

  Raises:
    ArtifactError: if a file is missing, damaged, or not in the artifact's list.
  """
  if not files:
    return [], _no_check
  folder, names = os.path.dirname(files[0]), [os.path.basename(path) for path in files]
  info = ownership.own_info(folder)
  if info is None or "files" not in info:
    return [_contents(path) for path in files], _no_check
  for name in names:
    if name not in info["files"]:
      raise integrity.damaged(folder, info["kind"], f"its file {name!r} is not in its file list")
  copies = {}
  if keep and paths.is_remote(folder):
    copies = _local_copies(folder, info, names)
  contents = {}
  for name, path in zip(names, files, strict=True):
    try:
      contents[name] = _contents(copies.get(name, path))
    except paths.GONE:
      raise integrity.damaged(folder, info["kind"], f"its file {name!r} is missing") from None
  check = Check(folder, info, contents, copies)
  check.start()
  return list(contents.values()), check


def _contents(path: str) -> pa.Buffer:
  """Maps a local file, or reads a remote one into memory."""
  if paths.is_remote(path):
    with gfile.GFile(path, "rb") as file:
      return pa.py_buffer(file.read())
  if not os.stat(path).st_size:
    return pa.py_buffer(b"")  # cannot be mapped
  with pa.memory_map(path) as file:
    start = file.read_buffer(1)  # Arrow makes the system read ahead all that is asked for
    return pa.foreign_buffer(start.address, file.size(), base=start)  # outlives the open file


def _local_copies(folder: str, info: Mapping, names: Sequence[str]) -> dict[str, str]:
  """Copies remote files to a folder of the local disk, under the names of their digests.

  Files that are already there with their size are not copied again, whatever artifact they are of:
  the segments of an updated corpus are copied once.

  Returns:
    Name -> path of the copy.
  """
  digests = {name: info["files"][name]["sha256"] for name in names}
  for name, digest in digests.items():
    if not re.fullmatch("[0-9a-f]{64}", digest):
      raise integrity.damaged(folder, info["kind"], f"the digest of its file {name!r} is none")
  cache = os.path.join(tempfile.gettempdir(), f"realm_tf-{os.getuid()}")
  os.makedirs(cache, mode=0o700, exist_ok=True)
  if os.stat(cache).st_uid != os.getuid():
    raise UserError(f"{cache!r} belongs to another user; set TMPDIR to a folder of your own.")
  copies = {name: os.path.join(cache, f"{digest}.arrow") for name, digest in digests.items()}
  missing = [
    name for name in names if paths.size_bytes(copies[name]) != info["files"][name]["bytes"]
  ]

  def copy(name: str) -> None:
    with paths.whole(copies[name]) as partial:
      gfile.copy(os.path.join(folder, name), partial, overwrite=True)

  if missing:
    print(f"copying {len(missing)} files of {folder} to {cache}", file=sys.stderr, flush=True)
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
      list(pool.map(copy, missing))
  return copies
