"""Folders that are either complete or ignored.

Every job's output is a folder, written under a staging name beside its final place, then described by `info.json`, then
marked `COMPLETE`, then renamed. A reader opens complete folders only, so a job killed at any moment leaves nothing that
could be mistaken for a result. Paths go through `tf.io.gfile`: a `gs://` path works wherever a local one does.

Nothing is deleted but what a job wrote: `info.json` lists an artifact's files, and other files in the folder stay.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import tensorflow as tf

from realm_tf import ownership, paths
from realm_tf.errors import ArtifactError, UserError  # noqa: F401
from realm_tf.ownership import COMPLETE, INFO

gfile = tf.io.gfile

FORMAT_VERSION = 1
_LEVELS_UP, _LEVELS_DOWN, _MOST_FOLDERS = 4, 3, 2000  # where an artifact that was moved is looked for


@dataclasses.dataclass
class Staged:
  """A folder being written.

  Attributes:
    path: where to write files; becomes the artifact's folder when the `publish` block ends.
    counts: numbers to show in info.json.
    content: what the content is known by (a digest); enters the fingerprint.
    details: any further facts for info.json.
  """

  path: str
  counts: dict = dataclasses.field(default_factory=dict)
  content: str = ""
  details: dict = dataclasses.field(default_factory=dict)


def fingerprint_of(*parts) -> str:
  """SHA-256 (first 16 hex digits) of JSON-able parts, independent of key order."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: str) -> str:
  """SHA-256 (hex) of one file's bytes."""
  digest = hashlib.sha256()
  with gfile.GFile(path, "rb") as file:
    while chunk := file.read(1 << 20):
      digest.update(chunk)
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Publication:
  """An artifact on its way. It pickles: the last step of a job may finish it, wherever that runs.

  Attributes:
    path: where to write files.
    folder: what `path` becomes.
    recipe: fingerprint of all that is known before.
    made_by: config, inputs and the like, for info.json.
    started: seconds since the epoch.
  """

  path: str
  folder: str
  recipe: str
  made_by: Mapping
  started: float

  def finish(self, counts: Mapping, *, content: str = "", details: Mapping | None = None) -> None:
    """Makes the folder complete and moves it into place; does nothing where just this was done before.

    Args:
      counts, content, details: see `Staged`.

    Raises:
      ArtifactError: meanwhile somebody put other files there; what was made stays in the staging folder.
    """
    fingerprint = fingerprint_of(self.recipe, content)
    if not gfile.exists(self.path) and is_complete(self.folder) and read_info(self.folder)["fingerprint"] == fingerprint:
      return  # a step that runs again, after its worker was lost
    contents = sorted(set(ownership.contents_of(self.path)) - {INFO, COMPLETE})
    info = {**self.made_by, "fingerprint": fingerprint, "counts": dict(counts),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "wall_secs": round(time.time() - self.started, 3),
            **(details or {}), "contents": contents}
    write_text(os.path.join(self.path, INFO), json.dumps(info, indent=2, default=str) + "\n")
    write_text(os.path.join(self.path, COMPLETE), "")
    if gfile.exists(self.folder):
      ownership.check_replaceable(self.folder, self.made_by["kind"])
      parent, name = os.path.split(self.folder)
      replaced = os.path.join(parent, f".replaced-{name}-{os.getpid()}")
      gfile.rename(self.folder, replaced)
      gfile.rename(self.path, self.folder)
      ownership.remove(replaced)
    else:
      gfile.rename(self.path, self.folder)
    ownership.release(self.path)


def begin(folder: str, *, kind: str, config: Mapping, inputs: Mapping[str, str], reads: Sequence[str] = (),
          seed: int | None = None, resume: bool = False) -> Publication:
  """Makes the staging folder of an artifact.

  Args:
    folder: final place. An earlier artifact of this kind there is replaced when the new one is complete.
    kind: what the folder holds ("passages", "snapshot", ...).
    config: the settings that made it (JSON-able).
    inputs: name -> folder of each complete input artifact; their fingerprints are recorded.
    reads: other files and folders that are read.
    seed: the random seed, where one was used.
    resume: keep what an interrupted run of the *same* config and inputs left in the staging folder; otherwise staging
      starts empty. One writer at a time for one folder.

  Raises:
    ArtifactError: an input is missing or incomplete, `ownership.check_output` refuses the folder, or
      another process writes it.
  """
  folder = ownership.check_output(folder, kind=kind, reads=[*inputs.values(), *reads])
  sources = {name: _reference(path, folder) for name, path in inputs.items()}
  recipe = fingerprint_of(kind, FORMAT_VERSION, dict(config), {k: v["fingerprint"] for k, v in sources.items()}, seed)
  parent, name = os.path.split(folder)
  staging = os.path.join(parent, f".staging-{name}-{recipe[:8]}" if resume else f".staging-{name}")
  if (found := ownership.contents_of(staging)) and not ownership.own_info(staging):
    raise ArtifactError(
        f"{kind} are first written to {staging!r}, and there is {ownership.some(found)}, which no job left. Move it "
        "away.")
  gfile.makedirs(staging)
  ownership.claim(staging)
  if found and not resume:
    gfile.rmtree(staging)
    gfile.makedirs(staging)
    ownership.claim(staging)
  made_by = {"kind": kind, "format_version": FORMAT_VERSION, "config": dict(config), "inputs": sources, "seed": seed}
  # Tells whose folder it is.
  write_text(os.path.join(staging, INFO), json.dumps(made_by, indent=2, default=str) + "\n")
  return Publication(staging, folder, recipe, made_by, time.time())


def _reference(path: str, folder: str) -> dict:
  """How the artifact `folder` tells of an input: its path as given, as seen from `folder`, and its fingerprint."""
  fingerprint = read_info(path)["fingerprint"]
  return {"path": path, "relative": paths.relative(path, folder), "fingerprint": fingerprint}


@contextlib.contextmanager
def publish(folder: str, *, resume: bool = False, **what) -> Iterator[Staged]:
  """Writes an artifact so that readers see all of it or nothing.

  Args:
    what: see `begin`.

  Yields:
    `Staged`; write files under its `path`, set its `counts`, `content` and `details`.

  Raises:
    ArtifactError: an input is missing or incomplete, or `ownership.check_output` refuses the folder.
  """
  publication = begin(folder, resume=resume, **what)
  staged = Staged(path=publication.path)
  try:
    yield staged
  except BaseException:
    if not resume:
      gfile.rmtree(publication.path)
    ownership.release(publication.path)
    raise
  publication.finish(staged.counts, content=staged.content, details=staged.details)


def write_text(path: str, text: str) -> None:
  """Writes a small file whole: under a temporary name, then renamed."""
  partial = f"{path}.partial-{os.getpid()}"
  with gfile.GFile(partial, "w") as file:
    file.write(text)
  gfile.rename(partial, path, overwrite=True)


# ------------------------------------------------------------------------------------------------------------- reading


def read_text(path: str) -> str:
  with gfile.GFile(path, "r") as file:
    return file.read()


def is_complete(folder: str) -> bool:
  """Whether `folder` is a finished artifact."""
  return gfile.exists(os.path.join(folder, COMPLETE))


def read_info(folder: str, *, kind: str | None = None) -> dict:
  """The artifact's info.json.

  Raises:
    ArtifactError: nothing there, not complete, of another kind, or of a later format.
  """
  if not is_complete(folder):
    state = "is not complete (the job that writes it was stopped; run it again)" if gfile.exists(folder) else "does not exist"
    raise ArtifactError(f"{kind or 'artifact'} folder {folder!r} {state}.")
  try:
    info = json.loads(read_text(os.path.join(folder, INFO)))
    info["kind"], info["format_version"]
  except (tf.errors.NotFoundError, ValueError, TypeError, KeyError):
    raise ArtifactError(
        f"{folder!r} has a file {COMPLETE} but no {INFO} of an artifact; wanted {kind or 'one'}.") from None
  if kind is not None and info["kind"] != kind:
    raise ArtifactError(f"{folder!r} holds {info['kind']}, wanted {kind}. Pass a folder that the {kind} job wrote.")
  if info["format_version"] > FORMAT_VERSION:
    raise ArtifactError(f"{folder!r} has format {info['format_version']}, this program reads up to {FORMAT_VERSION}: update it.")
  return info


def is_current(folder: str, *, kind: str, config: Mapping, inputs: Mapping[str, str], seed: int | None = None) -> bool:
  """Whether `folder` is complete and was made with just this config, seed and these inputs: nothing to do again."""
  if not is_complete(folder):
    return False
  info = read_info(folder)
  wanted = {name: read_info(path)["fingerprint"] for name, path in inputs.items()}
  got = {name: source["fingerprint"] for name, source in info["inputs"].items()}
  return (info["kind"], fingerprint_of(info["config"]), got, info["seed"]) == (kind, fingerprint_of(dict(config)), wanted, seed)


def check_input(folder: str, name: str, wanted_folder: str) -> None:
  """Checks that artifact `folder` was made from the artifact at `wanted_folder` (its input called `name`).

  Raises:
    ArtifactError: it was made from something else.
  """
  info, wanted = read_info(folder), read_info(wanted_folder)
  got = info["inputs"].get(name, {})
  if got.get("fingerprint") != wanted["fingerprint"]:
    raise ArtifactError(
        f"{info['kind']} {folder!r} was made from {name} {got.get('fingerprint')} ({got.get('path')}), wanted "
        f"{wanted['fingerprint']} ({wanted_folder!r}). Make the {info['kind']} again from these {name}.")


def find_input(folder: str, name: str, *, accept: Callable[[dict], bool] | None = None,
               advice: str | None = None) -> str:
  """The folder of an artifact that another one was made from, though one of them or both were moved.

  Looks as seen from `folder`, then where the input was, then around `folder`.

  Args:
    folder: a complete artifact.
    name: of the input, which is its kind too: "passages" or "index".
    accept: whether an artifact of this kind (its info.json) will do; by default, only the very same.
    advice: what to do where it is not found; ends the message.

  Raises:
    ArtifactError: it is nowhere.
  """
  info = read_info(folder)
  if name not in info["inputs"]:
    raise ArtifactError(f"{info['kind']} {folder!r} does not tell which {name} it belongs to (its inputs: "
                        f"{', '.join(info['inputs']) or 'none'}). {advice or f'Give --{name}.'}")
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
        f"{info['kind']} {folder!r} was made from {name} {wanted['fingerprint']}, which is not at {looked} and not "
        f"around that {info['kind']}. {advice or f'Put it back, or give where it is as --{name}.'}")
  print(f"{name} of {folder} moved: found by fingerprint at {found}", file=sys.stderr)
  return found


def _state(folder: str) -> str:
  if not is_complete(folder):
    return "not complete" if gfile.exists(folder) else "nothing is there"
  info = ownership.own_info(folder)
  return f"{info['kind']} {info['fingerprint']}" if info else "of another program"


def _around(folder: str) -> Iterator[str]:
  """Complete artifacts below each of the folders that a folder lies in, the nearest first.

  Gives up after many folders.
  """
  seen = set()
  for _ in range(_LEVELS_UP):
    folder = os.path.dirname(folder)
    if os.path.dirname(folder) in (folder, ""):
      return  # that would be the whole machine
    level = [folder]
    for _ in range(_LEVELS_DOWN):
      below = []
      for parent in level:
        if parent not in seen and len(seen) < _MOST_FOLDERS:
          seen.add(parent)
          with contextlib.suppress(tf.errors.OpError, OSError):  # not ours to read
            below += [path for path in paths.listed(parent, r"[^.].*") if paths.is_folder(path)]
      complete = [path for path in below if paths.exists(os.path.join(path, COMPLETE))]
      yield from complete
      level = sorted(set(below) - set(complete))


def complete_folders(root: str) -> Sequence[str]:
  """Complete artifacts named by a number (a training step) under `root`, oldest first."""
  if not gfile.exists(root):
    return []
  names = [name.rstrip("/") for name in gfile.listdir(root)]
  steps = sorted(int(name) for name in names if name.isdigit())
  return [folder for step in steps if is_complete(folder := step_folder(root, step))]


def latest(root: str) -> str | None:
  """The newest complete numbered artifact under `root`, or None."""
  folders = complete_folders(root)
  return folders[-1] if folders else None


def step_folder(root: str, step: int) -> str:
  return os.path.join(root, f"{step:08d}")


def step_of(folder: str) -> int:
  """The training step that a numbered folder is named by."""
  return int(os.path.basename(folder.rstrip("/")))


def prune(root: str, *, newest: int, keep_steps: Collection[int] = ()) -> None:
  """Deletes complete numbered artifacts under `root`, but for the newest so many and those of `keep_steps`."""
  for folder in complete_folders(root)[:-newest]:
    if step_of(folder) not in keep_steps:
      ownership.remove(folder)


def remove_after(root: str, step: int) -> None:
  """Deletes the numbered artifacts of later steps: what a run that resumes from `step` will make again."""
  for folder in complete_folders(root):
    if step_of(folder) > step:
      ownership.remove(folder)
