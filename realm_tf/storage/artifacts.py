"""Folders that are either complete or ignored.

Every job's output is a folder. It is written under a staging name beside its final location,
described by `info.json`, marked `COMPLETE`, and then renamed. Readers open complete folders only,
so a job killed at any moment leaves nothing that could be mistaken for a result. Paths go through
`tf.io.gfile`: a `gs://` path works wherever a local one does.

`info.json` lists an artifact's files with their sizes and digests, and `COMPLETE` holds the digest
of `info.json`. Readers check the list and the sizes whenever they open an artifact, and the digests
of the files that they read. A file that was lost, truncated or changed after publication is an
error, never a smaller or wrong result.

Only files that a job wrote are ever deleted: files that are not in the list stay.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import tensorflow as tf

from realm_tf.errors import ArtifactError, UserError  # noqa: F401
from realm_tf.storage import integrity, ownership, paths
from realm_tf.storage.ownership import COMPLETE, INFO

gfile = tf.io.gfile

FORMAT_VERSION = 3
# How far the search for a moved artifact reaches.
_LEVELS_UP, _LEVELS_DOWN, _MOST_FOLDERS = 4, 3, 2000


def fingerprint_of(*parts) -> str:
  """Returns the SHA-256 (first 16 hex digits) of JSON-able parts, independent of key order."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: str) -> str:
  """Returns the SHA-256 (hex) of one file's bytes."""
  return integrity.describe(path)["sha256"]


def write_text(path: str, text: str) -> None:
  """Writes a small file atomically; see `paths.whole`."""
  with paths.whole(path) as partial, gfile.GFile(partial, "w") as file:
    file.write(text)


def read_text(path: str) -> str:
  with gfile.GFile(path, "r") as file:
    return file.read()


def is_complete(folder: str) -> bool:
  """Returns whether `folder` is a finished artifact."""
  return gfile.exists(os.path.join(folder, COMPLETE))


def read_info(folder: str, *, kind: str | None = None) -> dict:
  """Returns the artifact's info.json after checking that all files exist with their listed sizes.

  Raises:
    ArtifactError: if the artifact is missing, incomplete, damaged, of another kind, or of another
      format.
  """
  if not is_complete(folder):
    state = (
      "is not complete (its job was interrupted; run it again)"
      if gfile.exists(folder)
      else "does not exist"
    )
    raise ArtifactError(f"{kind or 'artifact'} folder {folder!r} {state}.")
  try:
    text = read_text(os.path.join(folder, INFO))
    info = json.loads(text)
    version = info["format_version"]
    valid = _is_plain(info["kind"]) and isinstance(version, int) and 0 <= version < 1_000_000
  except (tf.errors.OpError, OSError, ValueError, TypeError, KeyError, RecursionError):
    valid = False
  if not valid:
    raise ArtifactError(
      f"{folder!r} has a file {COMPLETE} but no valid {INFO}; wanted {kind or 'an artifact'}."
    )
  if kind is not None and info["kind"] != kind:
    raise ArtifactError(
      f"{folder!r} holds {info['kind']}, wanted {kind}. Pass a folder that the {kind} job wrote."
    )
  if info["format_version"] != FORMAT_VERSION:
    _refuse_version(folder, info)
  if not ownership.is_info(info) or "files" not in info or not _is_as_published(folder, text):
    raise integrity.damaged(folder, info["kind"], f"its {INFO} is not the one that was published")
  wrong = (
    _wrong_remote_files(folder, text)
    if paths.is_remote(folder)
    else integrity.wrong_files(folder, info["files"])
  )
  if wrong and is_complete(folder):
    raise integrity.damaged(folder, info["kind"], wrong)
  if wrong:
    raise ArtifactError(f"{info['kind']} folder {folder!r} was deleted while it was being read.")
  return info


@functools.lru_cache(maxsize=64)
def _wrong_remote_files(folder: str, text: str) -> str:
  """`integrity.wrong_files` of a remote artifact with this info.json, once per process."""
  return integrity.wrong_files(folder, json.loads(text)["files"])


def _is_plain(kind: object) -> bool:
  """Returns whether a kind may be printed: a few letters and spaces."""
  return isinstance(kind, str) and re.fullmatch("[A-Za-z_ ]{1,40}", kind) is not None


def _refuse_version(folder: str, info: Mapping) -> None:
  version = info["format_version"]
  if version < FORMAT_VERSION:
    raise ArtifactError(
      f"{folder!r} was made by an earlier version of this program. Delete it and make the "
      f"{info['kind']} again."
    )
  raise ArtifactError(
    f"{folder!r} has format {version}, but this program reads {FORMAT_VERSION}; update the program."
  )


def _is_as_published(folder: str, text: str) -> bool:
  try:
    wanted = read_text(os.path.join(folder, COMPLETE)).strip()
  except (tf.errors.OpError, UnicodeDecodeError):
    return False
  return wanted == hashlib.sha256(text.encode()).hexdigest()


def is_current(
  folder: str, *, kind: str, config: Mapping, inputs: Mapping[str, str], seed: int | None = None
) -> bool:
  """Returns whether `folder` is intact and was made with exactly this config, seed and inputs.

  If so, the job can be skipped. A damaged artifact is made again, so all its bytes are read.

  Raises:
    ArtifactError: if an input is missing, incomplete or damaged.
  """
  if not is_complete(folder):
    return False
  wanted = {name: read_info(path)["fingerprint"] for name, path in inputs.items()}
  try:
    info = read_info(folder)
    integrity.check_digests(folder)
  except ArtifactError as error:
    print(f"{folder} will be made again: {error}", file=sys.stderr, flush=True)
    return False
  got = {name: source["fingerprint"] for name, source in info["inputs"].items()}
  return (info["kind"], fingerprint_of(info["config"]), got, info["seed"]) == (
    kind,
    fingerprint_of(dict(config)),
    wanted,
    seed,
  )


def check_input(folder: str, name: str, wanted_folder: str) -> None:
  """Checks that artifact `folder` was made from the artifact at `wanted_folder`.

  Args:
    folder: the artifact to check.
    name: name of the input.
    wanted_folder: the artifact that the input must be.

  Raises:
    ArtifactError: if it was made from something else.
  """
  check_version(folder, name, wanted_folder, read_info(wanted_folder)["fingerprint"])


def check_version(folder: str, name: str, wanted_folder: str, fingerprint: str) -> None:
  """Checks like `check_input`, for the version of `wanted_folder` that has this fingerprint."""
  info = read_info(folder)
  got = info["inputs"].get(name, {})
  if got.get("fingerprint") != fingerprint:
    raise ArtifactError(
      f"{info['kind']} {folder!r} was made from {name} {got.get('fingerprint')} "
      f"({got.get('path')}), wanted {fingerprint} ({wanted_folder!r}). "
      f"Make the {info['kind']} again from these {name}."
    )


def find_input(
  folder: str, name: str, *, accept: Callable[[dict], bool] | None = None, advice: str | None = None
) -> str:
  """Returns the folder of an artifact that another one was made from.

  Either or both may have been moved. Looks at the recorded path relative to `folder`, then at the
  recorded absolute path, then around `folder`.

  Args:
    folder: a complete artifact.
    name: name of the input, which is also its kind: "passages" or "index".
    accept: whether an artifact of this kind, given its info.json, is acceptable; by default, only
      the same artifact is.
    advice: what to do if it is not found; ends the error message.

  Raises:
    ArtifactError: if it is not found.
  """
  info = read_info(folder)
  if name not in info["inputs"]:
    raise ArtifactError(
      f"{info['kind']} {folder!r} does not record which {name} it belongs to (its inputs: "
      f"{', '.join(info['inputs']) or 'none'}). {advice or f'Give --{name}.'}"
    )
  wanted = info["inputs"][name]
  accept = accept or (lambda found: found.get("fingerprint") == wanted["fingerprint"])

  def fits(path: str) -> bool:
    found = ownership.own_info(path) if is_complete(path) else None
    return found is not None and found["kind"] == name and accept(found)

  here = paths.resolve(folder)
  places = [wanted["path"]]
  if wanted.get("relative"):
    beside = paths.resolve(os.path.join(here, wanted["relative"]))
    places = places if beside == paths.resolve(wanted["path"]) else [beside, *places]
  if place := next(filter(fits, places), None):
    return place
  found = next(filter(fits, _around(here)), None)
  if found is None:
    looked = ", ".join(f"{place!r} ({_state(place)})" for place in places)
    raise ArtifactError(
      f"{info['kind']} {folder!r} was made from {name} {wanted['fingerprint']}, which is not at "
      f"{looked} and not near that {info['kind']}. "
      f"{advice or f'Put it back, or give its location as --{name}.'}"
    )
  print(f"{name} of {folder} moved: found by fingerprint at {found}", file=sys.stderr)
  return found


def _state(folder: str) -> str:
  if not is_complete(folder):
    return "not complete" if gfile.exists(folder) else "does not exist"
  info = ownership.own_info(folder)
  return f"{info['kind']} {info['fingerprint']}" if info else "from another program"


def _around(folder: str) -> Iterator[str]:
  """Yields the complete artifacts below each ancestor of a folder, nearest ancestor first.

  Stops after `_MOST_FOLDERS` folders.
  """
  seen: set[str] = set()
  for _ in range(_LEVELS_UP):
    folder = os.path.dirname(folder)
    if os.path.dirname(folder) in (folder, ""):
      return  # the search would cover the whole machine
    level = [folder]
    for _ in range(_LEVELS_DOWN):
      below = []
      for parent in level:
        if parent not in seen and len(seen) < _MOST_FOLDERS:
          seen.add(parent)
          with contextlib.suppress(tf.errors.OpError, OSError):  # an unreadable folder
            below += [path for path in paths.listed(parent, r"[^.].*") if paths.is_folder(path)]
      complete = [path for path in below if paths.exists(os.path.join(path, COMPLETE))]
      yield from complete
      level = sorted(set(below) - set(complete))


def complete_folders(root: str) -> Sequence[str]:
  """Returns the complete artifacts named by a training step under `root`, oldest first."""
  if not gfile.exists(root):
    return []
  names = [name.rstrip("/") for name in gfile.listdir(root)]
  steps = sorted(int(name) for name in names if name.isdigit())
  return [folder for step in steps if is_complete(folder := step_folder(root, step))]


def latest(root: str) -> str | None:
  """Returns the newest complete numbered artifact under `root`, or None."""
  folders = complete_folders(root)
  return folders[-1] if folders else None


def step_folder(root: str, step: int) -> str:
  return os.path.join(root, f"{step:08d}")


def step_of(folder: str) -> int:
  """Returns the training step in the name of a numbered folder."""
  return int(os.path.basename(folder.rstrip("/")))


def prune(root: str, *, newest: int, keep_steps: Collection[int] = ()) -> None:
  """Deletes complete numbered artifacts under `root`.

  Keeps the `newest` most recent ones and those of `keep_steps`.
  """
  for folder in complete_folders(root)[:-newest]:
    if step_of(folder) not in keep_steps:
      ownership.remove(folder)


def remove_after(root: str, step: int) -> None:
  """Deletes the numbered artifacts of steps after `step`.

  A run that resumes from `step` will make them again.
  """
  for folder in complete_folders(root):
    if step_of(folder) > step:
      ownership.remove(folder)
