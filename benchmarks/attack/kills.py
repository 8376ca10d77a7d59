"""Kills jobs and trainers at random moments, runs them again, and compares their outputs.

    python -m benchmarks.attack.kills --kills=100 --seed=0

Each command is run once without a kill. Then it is killed at a random moment, sometimes again while
it resumes, and run to its end. Its output must be the same byte for byte: every file of every
artifact, and the losses of every step. TensorFlow uses one thread, so that its sums are the same in
every run. Two more attacks need no command: artifacts that are published over others a thousand
times, and three processes that publish to the same place.

The table of kills is printed, and written to ROOT/kills.json. The exit code is 1 if anything was
lost.
"""

import collections
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_integer("kills", 100, "How many commands to kill.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Seed of the moments.")
  flags.DEFINE_string("root", "runs/attack/kills", "Folder for the runs; it is emptied.")
  flags.DEFINE_list("commands", [], "Names of the commands to kill; all by default.")
  cli.start("benchmarks.attack.kills")

import tabulate

from benchmarks.attack import publishers
from realm_tf import progress
from realm_tf.storage import artifacts, integrity, ownership, paths

CONFIG = os.path.join(os.path.dirname(__file__), "tiny.py")
REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_TWO_PROCESSES = ("--", "--direct_num_workers=2", "--direct_running_mode=multi_processing")
# For TensorFlow: the rounding of a sum depends on how it is divided among threads.
_ONE_THREAD = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
_LATEST = 1.02  # as a share of the command's whole time, so that some kills come too late
_AGAIN = 0.3  # how often the resumed command is killed too
_LIMIT_SECS = 900


@dataclasses.dataclass(frozen=True)
class Command:
  """A command to kill.

  Attributes:
    name: name of the command.
    argv: module and arguments; "RUN" is replaced by the folder of the run.
    makes: paths in the folder of the run that it writes; later commands depend on them.
    weight: how often it is killed, as a share.
    changes: those of `makes` that it changes in place; an earlier command makes them.
  """

  name: str
  argv: tuple[str, ...]
  makes: tuple[str, ...]
  weight: float = 1.0
  changes: tuple[str, ...] = ()


def _trainer(module: str, workdir: str) -> Command:
  argv = (f"realm_tf.{module}", f"--config={CONFIG}", "--config.run_dir=RUN")
  return Command(module, (*argv, f"--workdir=RUN/{workdir}"), (workdir,))


def _passages(name: str, articles: str, output: str, *more: str) -> Command:
  argv = ("beam_jobs.make_passages", f"--input=RUN/corpus/{articles}", f"--output=RUN/{output}")
  return Command(name, (*argv, "--max_tokens=64", "--passages_per_shard=8", *more), (output,))


def _spans(name: str, source: str, output: str, *more: str) -> Command:
  argv = ("beam_jobs.annotate_spans", f"--passages=RUN/{source}", "--knowledge=RUN/passages")
  return Command(name, (*argv, f"--output=RUN/{output}", *more), (output,))


_SNAPSHOT = "ict/snapshots/00000006"
COMMANDS = (
  _passages("make_passages", "knowledge", "passages", "--vocab_size=600"),
  _passages(
    "make_passages, two processes",
    "pretraining",
    "passages-pretraining",
    "--vocab=RUN/passages",
    *_TWO_PROCESSES,
  ),
  _spans("annotate_spans", "passages", "spans-knowledge"),
  _spans("annotate_spans, two processes", "passages-pretraining", "spans", *_TWO_PROCESSES),
  _trainer("pretrain_mlm", "mlm"),
  _trainer("pretrain_ict", "ict"),
  Command(
    "embed_passages",
    (
      "beam_jobs.embed_passages",
      f"--snapshot=RUN/{_SNAPSHOT}",
      "--passages=RUN/passages",
      "--output=RUN/index",
      "--nojit_compile",
    ),
    ("index",),
  ),
  Command(
    "refresh_index",
    (
      "beam_jobs.refresh_index",
      "--snapshots=RUN/ict/snapshots",
      "--passages=RUN/passages",
      "--indexes=RUN/indexes",
      "--nojit_compile",
    ),
    ("indexes",),
  ),
  _trainer("pretrain", "realm"),
  _trainer("finetune", "finetune"),
  Command(
    "export", ("serving.export", "--workdir=RUN/finetune", "--output=RUN/servable"), ("servable",)
  ),
  _passages("make_passages, few", "knowledge/part-0001*", "updated", "--vocab=RUN/passages"),
  Command(
    "update_passages",
    (
      "beam_jobs.update_passages",
      "--passages=RUN/updated",
      "--add=RUN/corpus/knowledge",
      "--replace",
    ),
    ("updated",),
    changes=("updated",),
  ),
  Command(
    "pipeline",
    ("realm_tf.pipeline", f"--config={CONFIG}", "--config.run_dir=RUN/all"),
    ("all",),
    weight=0.3,
  ),
)


# ===================================================================================== the commands


def start(command: Command, run: str) -> subprocess.Popen:
  """Starts a command in its own process group; its output goes to RUN/words."""
  argv = [part.replace("RUN", run) for part in command.argv]
  with open(os.path.join(run, "words"), "ab") as words:
    return subprocess.Popen(
      [sys.executable, "-m", *argv],
      cwd=REPOSITORY,
      env={**os.environ, **_ONE_THREAD},
      stdout=words,
      stderr=words,
      start_new_session=True,
    )


def finish(command: Command, run: str) -> None:
  """Runs a command to its end.

  Raises:
    RuntimeError: it failed; the message has the end of its output.
  """
  process = start(command, run)
  try:
    process.wait(_LIMIT_SECS)
  except subprocess.TimeoutExpired:
    _end(process)
  if process.returncode:
    with open(os.path.join(run, "words"), errors="replace") as words:
      raise RuntimeError(f"exit code {process.returncode}; {words.read()[-600:]}")


def _end(process: subprocess.Popen) -> None:
  """Kills a command with all its processes."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.wait()


def kill(command: Command, run: str, *, how: str, after_secs: float) -> bool:
  """Starts a command and kills it; returns whether it was still running.

  Args:
    command: the command.
    run: folder of the run.
    how: "all" its processes at once, as if the machine lost power; "one", only the command itself;
      "TERM" or "INT", which it may catch.
    after_secs: when to kill it.
  """
  process = start(command, run)
  try:
    process.wait(after_secs)
    return False
  except subprocess.TimeoutExpired:
    pass
  if how == "all":
    _end(process)
  else:
    os.kill(process.pid, signal.SIGKILL if how == "one" else signal.Signals[f"SIG{how}"])
    process.wait(_LIMIT_SECS)
  return True


def made(root: str) -> dict[str, object]:
  """Returns the contents of a folder that must be the same in every run.

  These are digests of the files of artifacts, the fingerprints of artifacts, and the losses of
  trainers.
  """
  found: dict[str, object] = {}
  for folder, names, files in os.walk(root):
    names.sort()
    name = os.path.relpath(folder, root)
    if artifacts.COMPLETE in files:
      info = artifacts.read_info(folder)
      integrity.check_digests(folder)
      found[name] = (info["fingerprint"], {at: info["files"][at]["sha256"] for at in info["files"]})
      names.clear()
    if progress.METRICS in files:
      rows = progress.read_metrics(folder)
      found[f"{name}/losses"] = [(row["step"], row["loss"]) for row in rows]
  return found


def left_behind(root: str) -> list[str]:
  """Returns partially written and partially deleted files and folders below a folder."""
  return sorted(
    os.path.relpath(os.path.join(folder, name), root)
    for folder, names, files in os.walk(root)
    for name in (*names, *files)
    if name.startswith((".staging-", ".replaced-"))
    or name == ownership.WRITER
    or paths.is_partial(name)
  )


@dataclasses.dataclass(frozen=True)
class Kill:
  """A kill and its outcome.

  Attributes:
    command: name of the command killed.
    how: see `kill`.
    after_secs: when it was killed.
    in_time: whether it was still running.
    wrong: what was lost or different, in words; "" if nothing.
    left: partially written files and folders left behind.
  """

  command: str
  how: str
  after_secs: float
  in_time: bool
  wrong: str
  left: list[str]


class Attack:
  """Commands, with their outputs if they are not killed.

  Args:
    root: folder of the runs; it is emptied.
    names: names of the commands to kill; those that they depend on are run too.
  """

  def __init__(self, root: str, names: Sequence[str]):
    unknown = set(names) - {command.name for command in COMMANDS}
    if unknown:
      raise artifacts.UserError(
        f"no command {', '.join(sorted(unknown))}; wanted some of "
        f"{'; '.join(command.name for command in COMMANDS)}."
      )
    self.root = os.path.abspath(root)
    self.commands = [command for command in COMMANDS if not names or command.name in names]
    self._before: dict[str, list[Command]] = {}
    self._wanted: dict[str, list[dict]] = {}  # later commands may add to what is there
    self._secs: dict[str, float] = {}
    self._whole = os.path.join(self.root, "whole")
    self._former = os.path.join(self.root, "former")  # what a command changes, as it was before

  def prepare(self) -> None:
    """Makes the corpus, and runs every command once."""
    shutil.rmtree(self.root, ignore_errors=True)
    os.makedirs(self._whole)
    corpus = os.path.join(self._whole, "corpus")
    generate = ["quickstart_corpus.generate", f"--output={corpus}", "--seed=0", "--num_entities=16"]
    subprocess.run([sys.executable, "-m", *generate], cwd=REPOSITORY, check=True)
    before: list[Command] = []
    last = max(COMMANDS.index(command) for command in self.commands)
    for command in COMMANDS[: last + 1]:
      if command.name == "pipeline" and command not in self.commands:
        continue
      for at in command.changes:
        shutil.copytree(os.path.join(self._whole, at), os.path.join(self._former, at))
      started = time.monotonic()
      finish(command, self._whole)
      self._secs[command.name] = time.monotonic() - started
      self._before[command.name] = list(before)
      self._wanted[command.name] = [made(os.path.join(self._whole, at)) for at in command.makes]
      before.append(command)
      print(f"{command.name}: {self._secs[command.name]:.1f} s", flush=True)

  def kill(self, command: Command, rng: random.Random) -> Kill:
    """Kills a command and checks the outcome."""
    run = os.path.join(self.root, "killed")
    shutil.rmtree(run, ignore_errors=True)
    os.makedirs(run)
    made_before = [at for one in self._before[command.name] for at in one.makes]
    for place in dict.fromkeys(["corpus", *made_before]):  # some are made, then changed
      whole = self._former if place in command.changes else self._whole
      shutil.copytree(os.path.join(whole, place), os.path.join(run, place))
    how = rng.choice(("all", "all", "all", "one", "TERM", "INT"))
    after_secs = rng.uniform(0, _LATEST * self._secs[command.name])
    in_time = kill(command, run, how=how, after_secs=after_secs)
    if in_time and rng.random() < _AGAIN:
      kill(command, run, how="all", after_secs=rng.uniform(0, after_secs))
    places, wanted = [os.path.join(run, at) for at in command.makes], self._wanted[command.name]
    wrong = ""
    try:
      if list(map(made, places)) != wanted:  # else it had ended: an export makes one more version
        finish(command, run)
      wrong = "; ".join(
        itertools.starmap(_differences, zip(wanted, map(made, places), strict=True))
      )
    except RuntimeError as error:
      wrong = f"it could not be resumed: {error}"
    except artifacts.UserError as error:
      wrong = str(error)
    left = [name for place in places for name in left_behind(place)]
    return Kill(command.name, how, round(after_secs, 2), in_time, wrong, left)


def _differences(wanted: dict, got: dict) -> str:
  return ", ".join(
    f"{name} is different" if name in got and name in wanted else f"{name} is in one run only"
    for name in sorted(set(wanted) | set(got))
    if wanted.get(name) != got.get(name)
  )


# ========================================================================================== report


def plan(commands: Sequence[Command], num: int, rng: random.Random) -> Iterator[Command]:
  """Yields the commands to kill: each in proportion to its weight, the rest at random."""
  weights = [command.weight for command in commands]
  counts = [int(num * weight / sum(weights)) for weight in weights]
  chosen = [one for one, count in zip(commands, counts, strict=True) for _ in range(count)]
  chosen += rng.choices(commands, weights, k=num - len(chosen))
  rng.shuffle(chosen)
  yield from chosen


def table(kills: Sequence[Kill]) -> str:
  """Formats a table that counts the kills of each command."""
  by_command = collections.defaultdict(list)
  for one in kills:
    by_command[one.command].append(one)
  rows = [
    [
      name,
      len(ones),
      sum(one.in_time for one in ones),
      sum(bool(one.wrong) for one in ones),
      sum(bool(one.left) for one in ones),
    ]
    for name, ones in by_command.items()
  ]
  columns = ["command", "kills", "in time", "wrong", "left something behind"]
  return tabulate.tabulate(rows, columns)


def attack(root: str, *, kills: int, seed: int, names: Sequence[str] = ()) -> list[Kill]:
  """Kills commands; the arguments are the flags of this program."""
  rng = random.Random(seed)
  attacked = Attack(root, names)
  attacked.prepare()
  found: list[Kill] = []
  for command in plan(attacked.commands, kills, rng):
    found.append(attacked.kill(command, rng))
    one = found[-1]
    print(
      f"{len(found)}/{kills} {one.command}, {one.how} after {one.after_secs:.1f} s: "
      f"{one.wrong or 'same output'}{'' if one.in_time else ' (it had ended)'}",
      flush=True,
    )
  return found


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
  rng = random.Random(args.seed)
  published = publishers.kill(os.path.join(args.root, "published"), kills=1000, rng=rng)
  raced = publishers.race(os.path.join(args.root, "raced"), races=200, rng=rng)
  print(
    f"1000 publishers killed: {len(published)} wrong; 200 races: {len(raced)} wrong", flush=True
  )
  found = attack(args.root, kills=args.kills, seed=args.seed, names=args.commands)
  wrong = [*published, *raced, *(f"{one.command}: {one.wrong}" for one in found if one.wrong)]
  report = {
    "seed": args.seed,
    "kills": [dataclasses.asdict(one) for one in found],
    "published": published,
    "raced": raced,
  }
  artifacts.write_text(os.path.join(args.root, "kills.json"), json.dumps(report, indent=2) + "\n")
  print(f"\n{table(found)}\n\n{len(wrong)} wrong")
  print("\n".join(wrong))
  sys.exit(1 if wrong else 0)
