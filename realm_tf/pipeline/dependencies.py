"""Dependencies of a stage's result, independent of where the run and its inputs are."""

import json
import os
from collections.abc import Collection, Mapping, Sequence

from realm_tf.pipeline.stage import Stage
from realm_tf.storage import artifacts, input_files, json_lines, ownership, paths


def dependencies(stage: Stage, *, run_dir: str, digests: dict[str, str]) -> dict[str, object]:
  """Returns what the stage's result depends on: settings, and the content of its inputs.

  Paths are replaced by their roles in the stage, so a run may be moved.

  Args:
    stage: a stage of the run.
    run_dir: folder of the whole run.
    digests: names, sizes and dates of files → digest of their content; new digests are added.
  """
  found = {
    **stage.settings,
    "command": [] if stage.settings else _without_beam(stage.command),  # a trainer's are settings
    **stage.differs,
  }
  places = {path: f"output {at}" for at, path in enumerate((stage.folder, *stage.outputs))}
  places |= {path: _input(at) for at, path in enumerate(stage.inputs)}
  found = {name: _without_places(value, places, run_dir) for name, value in found.items()}
  for at, path in enumerate(stage.inputs):
    found[_content_of(at)] = _content(path, digests)
  return json.loads(json.dumps(found))


def differences(
  before: Mapping, now: Mapping, stage: Stage, *, unseen: Collection[str] = ()
) -> list[str]:
  """Describes what has changed, with the paths of the inputs; does not look at inputs `unseen`."""
  shown = {_content_of(at): f"content of {path}" for at, path in enumerate(stage.inputs)}
  skipped = {_content_of(at) for at, path in enumerate(stage.inputs) if path in unseen}
  return [
    f"{shown.get(name, name)}: {before.get(name)!r} before, {now.get(name)!r} now"
    for name in sorted({*before, *now} - skipped)
    if before.get(name) != now.get(name)
  ]


def _without_beam(command: Sequence[str]) -> Sequence[str]:
  """Leaves out Beam's options, which change how a job runs and not what it writes."""
  return command[: command.index("--")] if "--" in command else command


def _input(at: int) -> str:
  return f"input {at}"


def _content_of(at: int) -> str:
  return f"content of {_input(at)}"


def _without_places(value, places: Mapping[str, str], run_dir: str):
  """Replaces a setting's paths by their roles in the stage.

  Other paths become relative to the run's folder.
  """
  if isinstance(value, (list, tuple)):
    return [_without_places(part, places, run_dir) for part in value]
  if not isinstance(value, str):
    return value
  if value in places:
    return places[value]
  flag, equals, rest = value.partition("=")
  if flag.startswith("--") and equals:
    return f"{flag}={_without_places(rest, places, run_dir)}"
  inside = value.removeprefix(run_dir.rstrip("/") + "/")
  if inside != value:
    return f"run_dir/{os.path.normpath(inside)}"
  return (
    f"run_dir/{paths.relative(value, run_dir)}"
    if "/" in value and paths.holds(run_dir, value)
    else value
  )


def _content(path: str, digests: dict[str, str]) -> str:
  """Returns a value that changes with the content of an input.

  This is the fingerprint of an artifact or a workdir, or else a digest of all files. Files are read
  again only if their names, sizes or dates have not been seen before.
  """
  if artifacts.is_complete(path) and (info := ownership.own_info(path)):
    return info["fingerprint"]
  if snapshot := artifacts.latest(os.path.join(path, "snapshots")):
    return artifacts.read_info(snapshot)["fingerprint"]
  files = [
    file for part in paths.split(path) for match in paths.matching(part) for file in _files(match)
  ]
  found = ((name, artifacts.gfile.stat(at)) for name, at in files)
  key = artifacts.fingerprint_of([(name, stat.length, stat.mtime_nsec) for name, stat in found])
  if key not in digests:
    digests[key] = artifacts.fingerprint_of(
      [(name, artifacts.file_digest(at)) for name, at in files]
    )
  return digests[key]


def _files(path: str) -> list[tuple[str, str]]:
  """Returns (relative name, path) of a file, or of all files below a folder.

  Files that cannot be read and hidden files below a folder are left out.
  """
  found = [at for at in sorted(input_files.walk(path)) if _can_be_read(at)]
  return [(os.path.basename(at) if at == path else os.path.relpath(at, path), at) for at in found]


def _can_be_read(path: str) -> bool:
  """Whether the path is a readable file with a UTF-8 name; reading a pipe would never end."""
  return json_lines.is_writable(path) and (
    paths.is_remote(path) or os.path.isfile(path) and os.access(path, os.R_OK)
  )
