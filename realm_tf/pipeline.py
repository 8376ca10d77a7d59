"""Every stage in order: from a corpus to a trained, evaluated and served system, with a summary at the end.

    python -m realm_tf.pipeline --config=configs/quickstart.py

Each stage is one documented command in a process of its own, printed as it starts. Stages that are done are passed over, and a
stage that was stopped goes on where it was, so a pipeline that was killed is simply run again. `--config.x.y=z` is handed on to
the trainers. `--redo=ict` forgets that stage and all later ones first.
"""

import contextlib
import ctypes
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import tabulate
from absl import flags
from ml_collections import config_flags

from realm_tf import (
    artifacts, input_files, json_lines, ownership, paths, plots, progress, settings, stages)
from realm_tf.stages import PORT, Stage

STATE = "pipeline.json"
SUMMARY = "summary.json"
PLOT = "training.png"
_DIGESTS = "digests"  # in the state beside the stages: names, sizes and dates of files -> digest of their content
_HARMLESS = ("log_every", "checkpoint_every", "workdir")  # settings that change no result
_SAVE_EVERY_SECS = 5.0  # how often a running stage's time is written down
_LOOK_SECS = 0.5  # how often a server beside a stage is looked at
_LAST_LINES = 15  # of a server that has ended, to show


class PipelineError(artifacts.UserError):
  """A stage failed, or what is there does not fit the config."""


# ============================================================================================================== running


class Runner:
  """Runs stages, and remembers in run_dir/pipeline.json what each was made from and how long it took.

  Args:
    run_dir: folder of the whole run.
    config: all settings as a plain dict.
  """

  def __init__(self, run_dir: str, config: Mapping):
    self.path, self.config, self.run_dir = os.path.join(run_dir, STATE), config, run_dir
    self.state = json.loads(artifacts.read_text(self.path)) if artifacts.gfile.exists(self.path) else {}
    artifacts.gfile.makedirs(run_dir)

  def run(self, stage: Stage, title: str) -> None:
    """Runs a stage unless it is done.

    Raises:
      PipelineError: it failed, or it was trained from something else.
    """
    settings_, entry = self._settings_of(stage), self.state.get(stage.name)
    changed = entry is not None and _differences(entry["settings"], settings_, stage)
    if entry is not None and entry["done"] and not changed and all(map(_is_there, stage.outputs)):
      print(f"{title}: done before, {entry['wall_secs']:.0f} s", flush=True)
      return
    if changed and stage.sections and artifacts.gfile.exists(stage.folder):
      raise PipelineError(
          f"{stage.folder} was trained with something else ({'; '.join(changed)}). To train anew from here on, add "
          f"--redo={shlex.quote(stage.name)}; to keep it, choose another --config.run_dir.")
    before = 0.0 if entry is None or entry["done"] else entry["wall_secs"]
    self.state[stage.name] = {"settings": settings_, "done": False, "wall_secs": before}
    artifacts.gfile.makedirs(os.path.dirname(stage.folder))
    print(f"\n{title}", flush=True)
    code = self._call(stage)
    if code:
      raise PipelineError(
          f"stage {stage.name!r} ended with code {code}; its own words stand above. Run the same command again to go on.")
    self.state[stage.name]["done"] = True
    self._save()

  def redo(self, found: Sequence[Stage], first: str) -> None:
    """Deletes what a stage and all later ones left.

    Raises:
      PipelineError: there is no such stage, or something else lies among what they left; then nothing is deleted.
    """
    names = [stage.name for stage in found]
    if first not in names:
      raise PipelineError(f"--redo={first!r} is no stage of this config; wanted one of: {', '.join(names)}.")
    doomed = []
    for stage in found[names.index(first):]:
      for path in sorted({stage.folder, *stage.outputs}):
        if added := ownership.strays(path, stage.leaves):
          raise PipelineError(
              f"--redo={first} would delete {os.path.join(path, added[0])!r}, which no stage wrote ({len(added)} such "
              "files there). Move it away first.")
        if artifacts.gfile.isdir(path) or stage.name in self.state:  # a file may be the user's
          doomed.append(path)
    for path in doomed:
      _delete(path)
    for stage in found[names.index(first):]:
      self.state.pop(stage.name, None)
    self._save()

  def _call(self, stage: Stage) -> int:
    """The exit code of the stage's process; its time is written down as it goes by."""
    entry = self.state[stage.name]
    before, started = entry["wall_secs"], time.monotonic()
    self._save()
    with _serve(stage.server) as server:
      process = _start([part.replace(PORT, str(server.port)) for part in stage.command])
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
        process.wait()  # it was interrupted too
        sys.exit("\nStopped. Run the same command again to go on.")

  def _save(self) -> None:
    artifacts.write_text(self.path, json.dumps(self.state, indent=2) + "\n")

  def _settings_of(self, stage: Stage) -> dict[str, object]:
    """What the stage's result depends on, wherever the run and its inputs are."""
    found = {"command": [] if stage.sections else stage.command, **stage.differs}  # a trainer's flags are settings
    for section in stage.sections:
      values = self.config[section] if isinstance(self.config[section], Mapping) else {"": self.config[section]}
      found = {f"{section}.{name}".rstrip("."): value for name, value in values.items() if name not in _HARMLESS} | found
    places = {path: f"output {at}" for at, path in enumerate((stage.folder, *stage.outputs))}
    places |= {path: _input(at) for at, path in enumerate(stage.inputs)}
    found = {name: _without_places(value, places, self.run_dir) for name, value in found.items()}
    found |= {f"content of {_input(at)}": self._content(path) for at, path in enumerate(stage.inputs)}
    return json.loads(json.dumps(found))

  def _content(self, path: str) -> str:
    """What tells whether an input changed: an artifact's or a workdir's fingerprint, else a digest of all files.

    Files are read again only where their names, sizes or dates are others than at any time before.
    """
    if artifacts.is_complete(path) and (info := ownership.own_info(path)):
      return info["fingerprint"]
    if snapshot := artifacts.latest(os.path.join(path, "snapshots")):
      return artifacts.read_info(snapshot)["fingerprint"]
    files = [file for part in paths.split(path) for match in paths.matching(part) for file in _files(match)]
    found = ((name, artifacts.gfile.stat(at)) for name, at in files)
    stats = [(name, stat.length, stat.mtime_nsec) for name, stat in found]
    known, key = self.state.setdefault(_DIGESTS, {}), artifacts.fingerprint_of(stats)
    if key not in known:
      known[key] = artifacts.fingerprint_of([(name, artifacts.file_digest(at)) for name, at in files])
    return known[key]


def _start(command: Sequence[str], *, log: IO[bytes] | None = None) -> subprocess.Popen:
  """Prints and starts a module with its flags; what has a `log` to write to runs beside others."""
  print(f"$ python -m {shlex.join(command)}{' &' if log else ''}", flush=True)
  bind = functools.partial(_end_with, os.getpid()) if sys.platform == "linux" else None
  return subprocess.Popen([sys.executable, "-m", *command], preexec_fn=bind, stdout=log, stderr=log)


class _Server:
  """A server that runs beside a stage, on a port of its own choice; without a command, nothing.

  Args:
    command: a module that takes --port_file.
    folder: for its log and its port.
  """

  port: int | None = None

  def __init__(self, command: Sequence[str], folder: str):
    self._process, self._log = None, os.path.join(folder, "log")
    if not command:
      return
    port_file = os.path.join(folder, "port")
    with open(self._log, "wb") as log:
      self._process = _start([*command, f"--port_file={port_file}"], log=log)
    while not os.path.exists(port_file):  # however long the machine takes
      self.check()
      time.sleep(0.1)
    with open(port_file, encoding="utf-8") as file:
      self.port = int(file.read())

  def check(self) -> None:
    """Raises PipelineError with the server's last words if it has ended."""
    if self._process and self._process.poll() is not None:
      with open(self._log, encoding="utf-8", errors="replace") as file:
        words = "".join(file.readlines()[-_LAST_LINES:])
      raise PipelineError(
        f"the server beside this stage ended with code {self._process.returncode}; its last words:\n{words}"
      )

  def stop(self) -> None:
    if self._process:
      self._process.terminate()
      self._process.wait()


@contextlib.contextmanager
def _serve(command: Sequence[str]) -> Iterator[_Server]:
  """Runs a server, if there is one, until the block ends. Raises PipelineError if it ends before it listens."""
  with tempfile.TemporaryDirectory() as folder:
    server = _Server(command, folder)
    try:
      yield server
    finally:
      server.stop()


def _end_with(parent_pid: int) -> None:
  """In a new process on Linux: be killed when the pipeline is, so that two never work in one folder."""
  ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
  if os.getppid() != parent_pid:  # it is gone already
    os._exit(1)


def _input(at: int) -> str:
  return f"input {at}"


def _without_places(value, places: Mapping[str, str], run_dir: str):
  """A setting whose paths are told by what they are to the stage, or as seen from the run's folder."""
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
  return f"run_dir/{paths.relative(value, run_dir)}" if "/" in value and paths.holds(run_dir, value) else value


def _differences(before: Mapping, now: Mapping, stage: Stage) -> list[str]:
  """What is not as before, with the paths of the inputs."""
  shown = {f"content of {_input(at)}": f"content of {path}" for at, path in enumerate(stage.inputs)}
  return [f"{shown.get(name, name)}: {before.get(name)!r} before, {now.get(name)!r} now" for name in sorted({*before, *now})
          if before.get(name) != now.get(name)]


def _delete(path: str) -> None:
  """Deletes a file, or a folder that holds no links; of a folder that is a link, what is in it."""
  real = paths.resolve(path)
  if artifacts.gfile.isdir(real):
    artifacts.gfile.rmtree(real)
    if os.path.islink(path):
      artifacts.gfile.makedirs(real)
  elif artifacts.gfile.exists(path):
    artifacts.gfile.remove(path)


def check_inputs(found: Sequence[Stage]) -> None:
  """Raises PipelineError before work begins if something is missing that no stage makes."""
  made = {path for stage in found for path in (stage.folder, *stage.outputs)}
  missing = {}
  for stage in found:
    for path in stage.inputs:
      if not any(path == one or path.startswith(one + "/") for one in made):
        for name in paths.split(path):
          if not paths.matching(name):
            missing.setdefault(name, stage.name)
  if missing:
    told = ", ".join(f"{path} (for {stage})" for path, stage in missing.items())
    raise PipelineError(f"missing, and made by no stage: {told}. What must be there before stands in "
                        "the config's first lines.")


def _is_there(path: str) -> bool:
  return artifacts.is_complete(path) if artifacts.gfile.isdir(path) else artifacts.gfile.exists(path)


def _files(path: str) -> list[tuple[str, str]]:
  """(relative name, path) of a file, or of all files below a folder that can be read and are not hidden."""
  found = [at for at in sorted(input_files.walk(path)) if _can_be_read(at)]
  return [(os.path.basename(at) if at == path else os.path.relpath(at, path), at) for at in found]


def _can_be_read(path: str) -> bool:
  """Whether it is a file, with a name in UTF-8; a pipe would never end."""
  return json_lines.is_writable(path) and (
    paths.is_remote(path) or os.path.isfile(path) and os.access(path, os.R_OK)
  )


# ============================================================================================================== summary


def summarize(config, wall_secs: Mapping[str, float]) -> dict:
  """Gathers the scores of all stages for summary.json; parts that the config leaves out are left out."""
  zero_shot = {kind: {} for kind in ("questions", "clozes")}
  for kind, scores in zero_shot.items():
    for system in (stages.start_of_realm(config), "realm", "bm25") if config.evaluate[kind] else ():
      path = stages.zero_shot_scores(config, kind, system)
      scores[system] = round(json.loads(artifacts.read_text(path))["recall_at_5"], 4)
  found = {"zero_shot_recall_at_5": zero_shot["questions"], "zero_shot_cloze_recall_at_5": zero_shot["clozes"],
           "exact_match": {}, "recall_at_5": {}}
  systems = stages.evaluated(config)
  for system in systems:
    scores = json.loads(artifacts.read_text(stages.scores(stages.predictions(config, system))))
    for name in ("exact_match", "recall_at_5"):
      if name in scores:
        found[name][system] = round(scores[name], 4)
  last = progress.read_metrics(config.realm.workdir)[-1]
  for name in ("refreshes", "steps_during_refreshes", "max_index_age_steps", "max_staleness_steps"):
    found[name] = int(last[name])
  found["wall_secs"] = {name: round(secs, 1) for name, secs in wall_secs.items()}
  shown = stages.SERVED if stages.is_served(config) else systems[-1] if systems else None
  found["answers"] = _answers(stages.predictions(config, shown), config.evaluate.num_answers) if shown else []
  if shown == stages.SERVED and found["answers"]:
    found["answer"] = found["answers"][0]  # as it came over the wire
  return found


def _answers(path: str, count: int) -> list[dict]:
  """Some predictions, spread evenly over the file, good or bad."""
  with artifacts.gfile.GFile(path, "rb") as file:
    rows = [record.row for record in json_lines.read(file) if record.row]
  found = []
  for row in rows[len(rows) // (2 * max(count, 1))::max(1, len(rows) // max(count, 1))][:count]:
    numbers = [passage["number"] for passage in row["passages"]]
    found.append({
        "question": row["question"], "answer": row["prediction"], "wanted": row["answer"],
        "read_from": numbers.index(row["read_from"]) if row["read_from"] in numbers else None,  # which of the passages
        "byte_span": row["byte_span"],
        "passages": [{name: passage[name] for name in ("title", "text", "score")} for passage in row["passages"]]})
  return found


def table_of(summary: Mapping) -> str:
  """The scores as a table, in percent."""
  columns = {"zero-shot recall@5": "zero_shot_recall_at_5", "zero-shot cloze recall@5": "zero_shot_cloze_recall_at_5",
             "fine-tuned recall@5": "recall_at_5", "exact match": "exact_match"}
  columns = {title: summary[name] for title, name in columns.items() if summary[name]}
  systems = [system for system in ("closed_book", "bm25", "ict", "recurring_spans", "realm") if any(system in scores for scores in columns.values())]
  rows = [[system.replace("_", " "), *(100 * scores[system] if system in scores else None for scores in columns.values())]
          for system in systems]
  return tabulate.tabulate(rows, ["%", *columns], floatfmt=".1f", missingval="-") if rows else ""


def describe(answer: Mapping, *, bold: bool) -> str:
  """A question with its answer and the passage that it was read from, the answer marked there."""
  begin, end = ("\033[1m", "\033[0m") if bold else ("[", "]")
  lines = [f"Q: {answer['question']}", f"A: {answer['answer'] or '(none)'}   (wanted: {' / '.join(answer['wanted'])})"]
  if answer["read_from"] is not None:
    passage, (start, stop) = answer["passages"][answer["read_from"]], answer["byte_span"]
    text = passage["text"].encode()
    marked = f"{text[:start].decode()}{begin}{text[start:stop].decode()}{end}{text[stop:].decode()}"
    lines.append(f"   {passage['title']}: {marked}")
  return "\n".join(lines)


def show(summary: Mapping, run_dir: str) -> None:
  """Prints the summary."""
  secs = summary["wall_secs"]
  print(f"\n{table_of(summary)}\n\n{summary['refreshes']} index refreshes went on beside "
        f"{summary['steps_during_refreshes']} training steps; the index in use was at most "
        f"{summary['max_index_age_steps']} steps old, and at most "
        f"{summary['max_staleness_steps']} behind the newest snapshot.")
  print(f"{sum(secs.values()) / 60:.1f} minutes, most in: " + ", ".join(
      f"{name} {secs[name]:.0f} s" for name in sorted(secs, key=secs.get, reverse=True)[:4]))
  for answer in summary["answers"]:
    print("\n" + describe(answer, bold=sys.stdout.isatty()))
  print(f"\n{os.path.join(run_dir, SUMMARY)}\n{os.path.join(run_dir, PLOT)}", flush=True)


def run(config, *, config_path: str, overrides: Mapping[str, object], redo: str | None = None) -> dict:
  """Runs what is not done yet; returns the summary.

  Raises:
    PipelineError: something is missing, a stage failed, or what is there was made with another
      config.
  """
  found = stages.stages(config, config_path=config_path, overrides=overrides)
  check_inputs(found)
  runner = Runner(config.run_dir, config.to_dict())
  if redo:
    runner.redo(found, redo)
  for number, stage in enumerate(found, 1):
    runner.run(stage, f"[{number}/{len(found)}] {stage.name}")
  summary = summarize(config, {stage.name: runner.state[stage.name]["wall_secs"] for stage in found})
  artifacts.write_text(os.path.join(config.run_dir, SUMMARY), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
  plots.plot_training(progress.read_metrics(config.realm.workdir), os.path.join(config.run_dir, PLOT))
  show(summary, config.run_dir)
  return summary


if __name__ == "__main__":
  config_flag = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
  redo_flag = flags.DEFINE_string("redo", None, "Forget this stage and all later ones, then run.")
  flags.mark_flag_as_required("config")
  settings.start(lambda argv: run(
      config_flag.value, config_path=config_flags.get_config_filename(flags.FLAGS["config"]),
      overrides=config_flags.get_override_values(flags.FLAGS["config"]), redo=redo_flag.value))
