"""Writing artifacts: staged, listed, marked complete, and renamed into place."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence

from realm_tf.errors import ArtifactError
from realm_tf.storage import artifacts, integrity, ownership, paths, writers
from realm_tf.storage.ownership import COMPLETE, INFO


@dataclasses.dataclass
class Staged:
  """A folder being written.

  Attributes:
    path: where to write files; becomes the artifact's folder when the `publish` block ends.
    counts: counts to record in info.json.
    content: digest that identifies the content; part of the fingerprint.
    details: further entries for info.json.
    files: descriptions of the files that are already known; see `Publication.finish`.
  """

  path: str
  counts: dict = dataclasses.field(default_factory=dict)
  content: str = ""
  details: dict = dataclasses.field(default_factory=dict)
  files: dict[str, dict] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Publication:
  """An artifact being written. It can be pickled, so the last step of a job can finish it anywhere.

  Attributes:
    path: staging folder, where files are written.
    folder: final location; `path` is moved there.
    recipe: fingerprint of everything that is known before the job runs.
    made_by: config, inputs and the like, for info.json.
    started: seconds since the epoch.
    writer: the process that claimed `path`.
  """

  path: str
  folder: str
  recipe: str
  made_by: Mapping
  started: float
  writer: Mapping

  def finish(
    self,
    counts: Mapping,
    *,
    content: str = "",
    details: Mapping | None = None,
    files: Mapping[str, dict] | None = None,
  ) -> None:
    """Marks the folder complete and moves it into place.

    Does nothing if this same artifact was already finished.

    Args:
      counts: counts to record in info.json.
      content: digest that identifies the content; see `Staged`.
      details: further entries for info.json.
      files: relative path -> `integrity.describe` of each file that its writer has described. These
        files must exist with that size. All others are described here.

    Raises:
      ArtifactError: if another process has taken the staging folder or changed its files, or if
        other files are in the final location. The staging folder keeps what was written.
    """
    fingerprint = artifacts.fingerprint_of(self.recipe, content)
    if (
      not artifacts.gfile.exists(self.path)
      and artifacts.is_complete(self.folder)
      and artifacts.read_info(self.folder)["fingerprint"] == fingerprint
    ):
      return  # the step runs again after its worker was lost
    self._check_writer()
    info = {
      **self.made_by,
      "fingerprint": fingerprint,
      "counts": dict(counts),
      "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      "wall_secs": round(max(time.time() - self.started, 0), 3),
      **(details or {}),
      "files": self._files(files or {}),
    }
    if paths.is_remote(self.path):  # a remote move copies file by file, in any order
      self._move()
      write_info(self.folder, info)
    else:
      write_info(self.path, info)
      self._move()
    ownership.release(self.path)

  def _check_writer(self) -> None:
    there = writers.read(os.path.join(self.path, ownership.WRITER))
    if there != self.writer:
      raise ArtifactError(
        f"the staging folder {self.path!r} of {self.folder!r} "
        + (f"was taken by {writers.words(there)}" if there else "is gone: it was deleted")
        + ". Nothing was published; run the job again."
      )

  def _files(self, known: Mapping[str, dict]) -> dict[str, dict]:
    """Returns the info.json entry of each staged file, and deletes half-written files.

    Half-written files come from killed workers, whose work other workers have repeated.
    """
    for path in paths.half_written(self.path):
      artifacts.gfile.remove(path)
    found = [name for name in ownership.contents_of(self.path) if not name.endswith("/")]
    found = sorted(set(found) - {INFO, COMPLETE})
    if wrong := integrity.wrong_files(self.path, known):
      raise ArtifactError(
        f"the staging folder {self.path!r} is not as its job wrote it: {wrong}. Nothing was "
        "published; run the job again."
      )
    own = [name for name in found if name not in known]
    both = {**known, **integrity.describe_all(self.path, own)}
    return {name: both[name] for name in found}

  def _move(self) -> None:
    """Moves the staging folder into place, replacing an earlier artifact there."""
    replaced = None
    if artifacts.gfile.exists(self.folder):
      ownership.check_replaceable(self.folder, self.made_by["kind"])
      parent, name = os.path.split(self.folder)
      replaced = os.path.join(parent, f".replaced-{name}-{os.getpid()}")
      artifacts.gfile.rename(self.folder, replaced)
    artifacts.gfile.rename(self.path, self.folder)
    writer = os.path.join(self.folder, ownership.WRITER)
    if artifacts.gfile.exists(writer):
      artifacts.gfile.remove(writer)
    if replaced:
      ownership.remove(replaced)


def write_info(folder: str, info: Mapping) -> None:
  """Writes info.json, then COMPLETE with its digest."""
  text = json.dumps(info, indent=2, default=str) + "\n"
  artifacts.write_text(os.path.join(folder, INFO), text)
  artifacts.write_text(
    os.path.join(folder, COMPLETE), hashlib.sha256(text.encode()).hexdigest() + "\n"
  )


def begin(
  folder: str,
  *,
  kind: str,
  config: Mapping,
  inputs: Mapping[str, str],
  reads: Sequence[str] = (),
  seed: int | None = None,
  resume: bool = False,
  outlives: bool = False,
) -> Publication:
  """Creates the staging folder of an artifact.

  Args:
    folder: final location. An earlier artifact of this kind there is replaced when the new one is
      complete.
    kind: kind of artifact ("passages", "snapshot", ...).
    config: the settings of the job (JSON-able).
    inputs: name -> folder of each complete input artifact; their fingerprints are recorded.
    reads: other files and folders that the job reads.
    seed: the random seed, if one is used.
    resume: keep what an interrupted run of the *same* config and inputs left in the staging folder;
      otherwise staging starts empty. A folder has one writer at a time. If the folder is remote,
      each writer has a separate staging folder instead, unless it resumes.
    outlives: whether another process finishes the artifact after this one has ended.

  Raises:
    ArtifactError: if an input is missing, incomplete or damaged, if `ownership.check_output`
      refuses the folder, or if another process is writing it.
  """
  folder = ownership.check_output(folder, kind=kind, reads=[*inputs.values(), *reads])
  sources = {name: _reference(path, folder) for name, path in inputs.items()}
  recipe = artifacts.fingerprint_of(
    kind,
    artifacts.FORMAT_VERSION,
    dict(config),
    {k: v["fingerprint"] for k, v in sources.items()},
    seed,
  )
  parent, name = os.path.split(folder)
  staging = os.path.join(parent, f".staging-{name}")
  if paths.is_remote(folder):
    _refuse_others(folder)
    staging += "" if resume else f"-{uuid.uuid4().hex[:8]}"
  staging += f"-{recipe[:8]}" if resume else ""
  writer = writers.submitted() if outlives else writers.this_process()
  ownership.claim(staging, writer)
  if (found := ownership.contents_of(staging)) and not ownership.own_info(staging):
    artifacts.gfile.remove(os.path.join(staging, ownership.WRITER))
    ownership.release(staging)
    raise ArtifactError(
      f"{kind} are first written to {staging!r}, which holds {ownership.some(found)} that no job "
      "left there. Move it away."
    )
  ownership.restore(folder)
  if not resume:
    _empty(staging)
  artifacts.gfile.makedirs(staging)
  made_by = {
    "kind": kind,
    "format_version": artifacts.FORMAT_VERSION,
    "config": dict(config),
    "inputs": sources,
    "seed": seed,
  }
  # Marks the staging folder as this job's.
  artifacts.write_text(
    os.path.join(staging, INFO), json.dumps(made_by, indent=2, default=str) + "\n"
  )
  return Publication(staging, folder, recipe, made_by, time.time(), writer)


def _refuse_others(folder: str) -> None:
  """Raises ArtifactError if another process on this host is writing a remote artifact."""
  parent, name = os.path.split(folder)
  for staging in paths.listed(parent, rf"\.staging-{re.escape(name)}(-[0-9a-f]{{8}})?"):
    other = writers.read(os.path.join(staging, ownership.WRITER))
    if other and writers.is_known_to_live(other):
      raise ArtifactError(
        f"another process is writing to {folder!r} ({writers.words(other)}); wait until it ends, "
        "or write elsewhere."
      )


def _empty(staging: str) -> None:
  """Deletes what a killed process left, but not the folder itself, which this process locked."""
  for name in paths.names(staging) if paths.is_folder(staging) else ():
    path = os.path.join(staging, name)
    if name != ownership.WRITER:
      artifacts.gfile.rmtree(path) if paths.is_folder(path) else artifacts.gfile.remove(path)


def discard(publication: Publication) -> None:
  """Abandons an artifact, and deletes its staging folder unless another process has claimed it."""
  there = writers.read(os.path.join(publication.path, ownership.WRITER))
  if artifacts.gfile.exists(publication.path) and there == publication.writer:
    artifacts.gfile.rmtree(publication.path)
  ownership.release(publication.path)


def _reference(path: str, folder: str) -> dict:
  """Returns the entry of an input in the info.json of the artifact `folder`.

  The entry has the input's path as given, its path relative to `folder`, and its fingerprint.
  """
  fingerprint = artifacts.read_info(path)["fingerprint"]
  return {"path": path, "relative": paths.relative(path, folder), "fingerprint": fingerprint}


@contextlib.contextmanager
def publish(folder: str, *, resume: bool = False, **what) -> Iterator[Staged]:
  """Publishes an artifact atomically: readers see all of it or nothing.

  Args:
    folder: final location.
    resume: keep what an interrupted run of the same config and inputs left; see `begin`.
    what: see `begin`.

  Yields:
    `Staged`; write files under its `path`, and set its `counts`, `content` and `details`.

  Raises:
    ArtifactError: if an input is missing or incomplete, or if `ownership.check_output` refuses the
      folder.
  """
  publication = begin(folder, resume=resume, **what)
  staged = Staged(path=publication.path)
  try:
    yield staged
  except BaseException:
    if resume:
      ownership.release(publication.path)
    else:
      discard(publication)
    raise
  try:
    publication.finish(
      staged.counts, content=staged.content, details=staged.details, files=staged.files
    )
  finally:
    ownership.release(publication.path)
