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
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import tabulate
from absl import flags
from ml_collections import config_flags

from realm_tf import artifacts, json_lines, plots, progress, settings, stages
from realm_tf.stages import PORT, Stage

STATE = "pipeline.json"
SUMMARY = "summary.json"
PLOT = "training.png"
_HARMLESS = ("log_every", "checkpoint_every", "workdir")  # settings that change no result
_SAVE_EVERY_SECS = 5.0  # how often a running stage's time is written down
_SERVER_STARTS_SECS = 120.0


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
    self.path, self.config = os.path.join(run_dir, STATE), config
    self.state = json.loads(artifacts.read_text(self.path)) if artifacts.gfile.exists(self.path) else {}
    artifacts.gfile.makedirs(run_dir)

  def run(self, stage: Stage, title: str) -> None:
    """Runs a stage unless it is done.

    Raises:
      PipelineError: it failed, or it was trained from something else.
    """
    settings_, entry = self._settings_of(stage), self.state.get(stage.name)
    changed = entry is not None and _differences(entry["settings"], settings_)
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
    """Deletes what a stage and all later ones left."""
    names = [stage.name for stage in found]
    if first not in names:
      raise PipelineError(f"--redo={first!r} is no stage of this config; wanted one of: {', '.join(names)}.")
    for stage in found[names.index(first):]:
      self.state.pop(stage.name, None)
      for path in {stage.folder, *stage.outputs}:
        if artifacts.gfile.exists(path):
          (artifacts.gfile.rmtree if artifacts.gfile.isdir(path) else artifacts.gfile.remove)(path)
    self._save()

  def _call(self, stage: Stage) -> int:
    """The exit code of the stage's process; its time is written down as it goes by."""
    entry = self.state[stage.name]
    before, started = entry["wall_secs"], time.monotonic()
    self._save()
    with _serve(stage.server) as port:
      process = _start([part.replace(PORT, str(port)) for part in stage.command])
      try:
        while True:
          try:
            return process.wait(_SAVE_EVERY_SECS)
          except subprocess.TimeoutExpired:
            pass
          finally:
            entry["wall_secs"] = round(before + time.monotonic() - started, 2)
            self._save()
      except KeyboardInterrupt:
        process.wait()  # it was interrupted too
        sys.exit("\nStopped. Run the same command again to go on.")

  def _save(self) -> None:
    artifacts.write_text(self.path, json.dumps(self.state, indent=2) + "\n")

  def _settings_of(self, stage: Stage) -> dict[str, object]:
    """What the stage's result depends on."""
    command = "" if stage.sections else " ".join(stage.command)  # a trainer's flags are settings
    found = {"command": command, **stage.differs, **{f"content of {path}": _content(path) for path in stage.inputs}}
    for section in stage.sections:
      values = self.config[section] if isinstance(self.config[section], Mapping) else {"": self.config[section]}
      found = {f"{section}.{name}".rstrip("."): value for name, value in values.items() if name not in _HARMLESS} | found
    return json.loads(json.dumps(found))


def _start(command: Sequence[str], *, beside: bool = False) -> subprocess.Popen:
  """Prints and starts a module with its flags."""
  print(f"$ python -m {shlex.join(command)}{' &' if beside else ''}", flush=True)
  bind = functools.partial(_end_with, os.getpid()) if sys.platform == "linux" else None
  return subprocess.Popen([sys.executable, "-m", *command], preexec_fn=bind)


@contextlib.contextmanager
def _serve(command: Sequence[str]) -> Iterator[int | None]:
  """Runs a server, if there is one; gives its port when it listens there.

  Raises:
    PipelineError: it ended, or listens too late.
  """
  if not command:
    yield None
    return
  with socket.create_server(("localhost", 0)) as free:
    port = free.getsockname()[1]
  process, deadline = _start([part.replace(PORT, str(port)) for part in command], beside=True), time.monotonic() + _SERVER_STARTS_SECS
  try:
    while True:
      with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
        break
      if process.poll() is not None or time.monotonic() > deadline:
        raise PipelineError(f"the model server does not listen on port {port}; its own words stand above.")
      time.sleep(0.2)
    yield port
  finally:
    process.terminate()
    process.wait()


def _end_with(parent_pid: int) -> None:
  """In a new process on Linux: be killed when the pipeline is, so that two never work in one folder."""
  ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
  if os.getppid() != parent_pid:  # it is gone already
    os._exit(1)


def _differences(before: Mapping, now: Mapping) -> list[str]:
  return [f"{name}: {before.get(name)!r} before, {now.get(name)!r} now" for name in sorted({*before, *now})
          if before.get(name) != now.get(name)]


def _is_there(path: str) -> bool:
  return artifacts.is_complete(path) if artifacts.gfile.isdir(path) else artifacts.gfile.exists(path)


def _content(path: str) -> str:
  """What tells whether an input changed: an artifact's or a workdir's fingerprint, a file's digest, else sizes and dates."""
  if artifacts.is_complete(path):
    return artifacts.read_info(path)["fingerprint"]
  if snapshot := artifacts.latest(os.path.join(path, "snapshots")):
    return artifacts.read_info(snapshot)["fingerprint"]
  paths = [name for pattern in path.split(",") for match in artifacts.gfile.glob(pattern) for name in _files(match)]
  if paths == [path]:
    return artifacts.file_digest(path)[:16]
  stats = ((name, artifacts.gfile.stat(name)) for name in sorted(paths))
  return artifacts.fingerprint_of([(name, stat.length, stat.mtime_nsec) for name, stat in stats])


def _files(path: str) -> list[str]:
  if not artifacts.gfile.isdir(path):
    return [path]
  return [os.path.join(folder, name) for folder, _, names in artifacts.gfile.walk(path) for name in names]


# ============================================================================================================== summary


def summarize(config, wall_secs: Mapping[str, float]) -> dict:
  """Gathers the scores of all stages for summary.json; parts that the config leaves out are left out."""
  zero_shot = {kind: {} for kind in ("questions", "clozes")}
  for kind, scores in zero_shot.items():
    for system in ("ict", "realm", "bm25") if config.evaluate[kind] else ():
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
  for name in ("refreshes", "steps_during_refreshes", "max_staleness_steps"):
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
  systems = [system for system in ("closed_book", "bm25", "ict", "realm") if any(system in scores for scores in columns.values())]
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
  print(f"\n{table_of(summary)}\n\n{summary['refreshes']} index refreshes went on beside {summary['steps_during_refreshes']} "
        f"training steps; the index was at most {summary['max_staleness_steps']} steps old.")
  print(f"{sum(secs.values()) / 60:.1f} minutes, most in: " + ", ".join(
      f"{name} {secs[name]:.0f} s" for name in sorted(secs, key=secs.get, reverse=True)[:4]))
  for answer in summary["answers"]:
    print("\n" + describe(answer, bold=sys.stdout.isatty()))
  print(f"\n{os.path.join(run_dir, SUMMARY)}\n{os.path.join(run_dir, PLOT)}", flush=True)


def run(config, *, config_path: str, overrides: Mapping[str, object], redo: str | None = None) -> dict:
  """Runs what is not done yet; returns the summary.

  Raises:
    PipelineError: a stage failed, or what is there was made with another config.
  """
  found = stages.stages(config, config_path=config_path, overrides=overrides)
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
