"""Runs stages one after another, and records what each was made from."""

import json
import os
import shlex
import subprocess
import time
from collections.abc import Collection, Sequence

from realm_tf.corpus import passages
from realm_tf.pipeline import dependencies, processes
from realm_tf.pipeline.processes import PipelineError
from realm_tf.pipeline.stage import PORT, Stage
from realm_tf.storage import artifacts, ownership, paths

STATE = "pipeline.json"
# key of the state beside the stages': names, sizes and dates of files -> digest of their content
_DIGESTS = "digests"
_SAVE_EVERY_SECS = 5.0  # how often a running stage's time is saved
_LOOK_SECS = 0.5  # how often a server beside a stage is checked


class Runner:
  """Runs stages and records them in run_dir/pipeline.json.

  The record has what each stage was made from and how long it took.

  Args:
    run_dir: folder of the whole run.
  """

  def __init__(self, run_dir: str):
    self.path, self.run_dir = os.path.join(run_dir, STATE), run_dir
    self.state = (
      json.loads(artifacts.read_text(self.path)) if artifacts.gfile.exists(self.path) else {}
    )
    artifacts.gfile.makedirs(run_dir)

  def check(self, found: Sequence[Stage]) -> None:
    """Checks, before any work, that all that is trained may stay as it is.

    Otherwise a stage would replace what a later one was trained with.

    Args:
      found: stages in their order.

    Raises:
      PipelineError: settings or inputs of something trained have changed, or an earlier stage would
        change them.
    """
    made = {path for stage in found for path in (stage.folder, *stage.outputs)}
    missing = {path for path in made if not artifacts.gfile.exists(path)}
    # output → why it will differ, and the first stage whose result does
    remade: dict[str, tuple[list[str], Stage]] = {}
    for stage in found:
      unseen = {path for path in stage.inputs if any(_holds(one, path) for one in missing)}
      _, changed = self._changed(stage, unseen=unseen)
      if stage.settings and stage.folder in missing:
        changed = [f"{stage.folder} is missing and will be trained"]
      inherited = next(
        (remade[one] for one in remade if any(_holds(one, path) for path in stage.inputs)), None
      )
      why, root = inherited if inherited and not changed else (changed, stage)
      is_trained = stage.settings and stage.name in self.state and stage.folder not in missing
      if why and is_trained:
        raise _was_trained_with_something_else(stage, why, root)
      if why:
        remade |= dict.fromkeys((stage.folder, *stage.outputs), (why, root))

  def run(self, stage: Stage, title: str) -> None:
    """Runs a stage unless it is done.

    Raises:
      PipelineError: the stage failed, or its output was trained from something else.
    """
    entry = self.state.get(stage.name)
    now, changed = self._changed(stage)
    if entry is not None and entry["done"] and not changed and all(map(_is_there, stage.outputs)):
      print(f"{title}: already done, {entry['wall_secs']:.0f} s", flush=True)
      return
    if changed and stage.settings and artifacts.gfile.exists(stage.folder):
      raise _was_trained_with_something_else(stage, changed, stage)
    before = 0.0 if entry is None or entry["done"] else entry["wall_secs"]
    self.state[stage.name] = {"settings": now, "done": False, "wall_secs": before}
    artifacts.gfile.makedirs(os.path.dirname(stage.folder))
    print(f"\n{title}", flush=True)
    code = self._call(stage)
    if code:
      raise PipelineError(
        f"stage {stage.name!r} ended with code {code}; see its output above. Run the same command "
        "again to resume."
      )
    self.state[stage.name]["done"] = True
    self._save()

  def _changed(self, stage: Stage, *, unseen: Collection[str] = ()) -> tuple[dict, list[str]]:
    """Returns what a stage depends on, and how that differs from when it last ran.

    `unseen` are inputs that an earlier stage has yet to make.
    """
    now = dependencies.dependencies(
      stage, run_dir=self.run_dir, digests=self.state.setdefault(_DIGESTS, {})
    )
    entry = self.state.get(stage.name)
    before = entry["settings"] if entry else now
    return now, dependencies.differences(before, now, stage, unseen=unseen)

  def wall_secs(self, stage: Stage) -> float:
    """Returns how long a finished stage took."""
    return self.state[stage.name]["wall_secs"]

  def redo(self, found: Sequence[Stage], first: str) -> None:
    """Deletes the output of a stage and all later ones.

    Raises:
      UserError: there is no such stage, other files or an updated corpus are among the output, or
        something that is to stay was trained with something else; then nothing is deleted.
    """
    names = [stage.name for stage in found]
    if first not in names:
      raise PipelineError(
        f"--redo={first!r} is no stage of this config; wanted one of: {', '.join(names)}."
      )
    self.check(found[: names.index(first)])
    doomed = []
    for stage in found[names.index(first) :]:
      for path in sorted({stage.folder, *stage.outputs}):
        if added := ownership.strays(path, stage.leaves):
          raise PipelineError(
            f"--redo={first} would delete {os.path.join(path, added[0])!r}, which no stage wrote "
            f"({len(added)} such files there). Move it away first."
          )
        passages.refuse_updated(path)
        if artifacts.gfile.isdir(path) or stage.name in self.state:  # a file may be the user's
          doomed.append(path)
    for path in doomed:
      _delete(path)
    for stage in found[names.index(first) :]:
      self.state.pop(stage.name, None)
    self._save()

  def _call(self, stage: Stage) -> int:
    """Runs the stage's process and returns its exit code; saves its time as it runs."""
    entry = self.state[stage.name]
    before, started = entry["wall_secs"], time.monotonic()
    self._save()
    with processes.serve(stage.server) as server:
      process = processes.start([part.replace(PORT, str(server.port)) for part in stage.command])
      try:
        while True:
          try:
            return process.wait(_SAVE_EVERY_SECS if not stage.server else _LOOK_SECS)
          except subprocess.TimeoutExpired:
            server.check()
          finally:
            entry["wall_secs"] = round(before + time.monotonic() - started, 2)
            self._save()
      except PipelineError:
        process.terminate()
        process.wait()
        raise
      except KeyboardInterrupt:
        process.wait()  # it receives the interrupt too
        raise

  def _save(self) -> None:
    artifacts.write_text(self.path, json.dumps(self.state, indent=2) + "\n")


def _was_trained_with_something_else(
  stage: Stage, changed: Sequence[str], root: Stage
) -> PipelineError:
  """Returns the error of a trained stage; `root` is the first stage whose result will differ."""
  advice = f" {root.advice}" if root.advice else ""
  return PipelineError(
    f"{stage.folder} was trained with something else ({'; '.join(changed)}). To train again, "
    f"delete it (--redo={shlex.quote(stage.name)} of realm_tf.pipeline also deletes all that "
    f"depends on it); to keep it, choose another --config.run_dir.{advice}"
  )


def _delete(path: str) -> None:
  """Deletes a file or a folder without links in it; a folder that is a link is emptied."""
  real = paths.resolve(path)
  if artifacts.gfile.isdir(real):
    artifacts.gfile.rmtree(real)
    if os.path.islink(path):
      artifacts.gfile.makedirs(real)
  elif artifacts.gfile.exists(path):
    artifacts.gfile.remove(path)


def check_inputs(found: Sequence[Stage]) -> None:
  """Raises PipelineError before any work if an input is missing that no stage makes."""
  made = {path for stage in found for path in (stage.folder, *stage.outputs)}
  missing: dict[str, str] = {}
  for stage in found:
    for path in stage.inputs:
      if not any(_holds(one, path) for one in made):
        for name in paths.split(path):
          if not paths.matching(name):
            missing.setdefault(name, stage.name)
  if missing:
    told = ", ".join(f"{path} (for {stage})" for path, stage in missing.items())
    raise PipelineError(
      f"missing, and made by no stage: {told}. The config's first lines list what must exist "
      "before a run."
    )


def _holds(folder: str, path: str) -> bool:
  """Returns whether a path is `folder` or below it."""
  return path == folder or path.startswith(folder + "/")


def _is_there(path: str) -> bool:
  return (
    artifacts.is_complete(path) if artifacts.gfile.isdir(path) else artifacts.gfile.exists(path)
  )
