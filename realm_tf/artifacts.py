"""Folders that are either complete or ignored.

Every job's output is a folder, written under a staging name beside its final place, then described by `info.json`, then
marked `COMPLETE`, then renamed. A reader opens complete folders only, so a job killed at any moment leaves nothing that
could be mistaken for a result. Paths go through `tf.io.gfile`: a `gs://` path works wherever a local one does.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import tensorflow as tf

from realm_tf.errors import ArtifactError, UserError  # noqa: F401

gfile = tf.io.gfile

FORMAT_VERSION = 1
INFO = "info.json"
COMPLETE = "COMPLETE"


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
    """
    fingerprint = fingerprint_of(self.recipe, content)
    if not gfile.exists(self.path) and is_complete(self.folder) and read_info(self.folder)["fingerprint"] == fingerprint:
      return  # a step that runs again, after its worker was lost
    info = {**self.made_by, "fingerprint": fingerprint, "counts": dict(counts),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "wall_secs": round(time.time() - self.started, 3),
            **(details or {})}
    write_text(os.path.join(self.path, INFO), json.dumps(info, indent=2, default=str) + "\n")
    write_text(os.path.join(self.path, COMPLETE), "")
    if gfile.exists(self.folder):
      parent, name = os.path.split(self.folder)
      replaced = os.path.join(parent, f".replaced-{name}-{os.getpid()}")
      gfile.rename(self.folder, replaced)
      gfile.rename(self.path, self.folder)
      gfile.rmtree(replaced)
    else:
      gfile.rename(self.path, self.folder)


def begin(folder: str, *, kind: str, config: Mapping, inputs: Mapping[str, str], seed: int | None = None,
          resume: bool = False) -> Publication:
  """Makes the staging folder of an artifact.

  Args:
    folder: final place. An earlier complete artifact there is replaced when the new one is complete.
    kind: what the folder holds ("passages", "snapshot", ...).
    config: the settings that made it (JSON-able).
    inputs: name -> folder of each complete input artifact; their fingerprints are recorded.
    seed: the random seed, where one was used.
    resume: keep what an interrupted run of the *same* config and inputs left in the staging folder; otherwise staging
      starts empty. One writer at a time for one folder.

  Raises:
    ArtifactError: an input is missing or incomplete.
  """
  folder = folder.rstrip("/")
  sources = {name: {"path": path, "fingerprint": read_info(path)["fingerprint"]} for name, path in inputs.items()}
  recipe = fingerprint_of(kind, FORMAT_VERSION, dict(config), {k: v["fingerprint"] for k, v in sources.items()}, seed)
  parent, name = os.path.split(folder)
  staging = os.path.join(parent, f".staging-{name}-{recipe[:8]}" if resume else f".staging-{name}")
  if gfile.exists(staging) and not resume:
    gfile.rmtree(staging)
  gfile.makedirs(staging)
  made_by = {"kind": kind, "format_version": FORMAT_VERSION, "config": dict(config), "inputs": sources, "seed": seed}
  return Publication(staging, folder, recipe, made_by, time.time())


@contextlib.contextmanager
def publish(folder: str, *, resume: bool = False, **what) -> Iterator[Staged]:
  """Writes an artifact so that readers see all of it or nothing.

  Args:
    what: see `begin`.

  Yields:
    `Staged`; write files under its `path`, set its `counts`, `content` and `details`.

  Raises:
    ArtifactError: an input is missing or incomplete.
  """
  publication = begin(folder, resume=resume, **what)
  staged = Staged(path=publication.path)
  try:
    yield staged
  except BaseException:
    if not resume:
      gfile.rmtree(publication.path)
    raise
  publication.finish(staged.counts, content=staged.content, details=staged.details)


def write_text(path: str, text: str) -> None:
  """Writes a small file whole: under a temporary name, then renamed."""
  partial = f"{path}.partial-{os.getpid()}"
  with gfile.GFile(partial, "w") as file:
    file.write(text)
  gfile.rename(partial, path, overwrite=True)


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
  info = json.loads(read_text(os.path.join(folder, INFO)))
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
      remove(folder)


def remove_after(root: str, step: int) -> None:
  """Deletes the numbered artifacts of later steps: what a run that resumes from `step` will make again."""
  for folder in complete_folders(root):
    if step_of(folder) > step:
      remove(folder)


def remove(folder: str) -> None:
  """Deletes an artifact; it stops being complete first."""
  gfile.remove(os.path.join(folder, COMPLETE))
  gfile.rmtree(folder)
