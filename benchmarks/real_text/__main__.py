"""Compares retrievers trained on raw text, on two corpora with independently written questions.

    python -m benchmarks.real_text --data_dir=DATA --corpus=covid --start=published --seeds=0,1,2

The systems are BM25, the inverse cloze task (or a published encoder), recurring spans, REALM from
either, and REALM with uniform masks, with random span masks, with an index that is never refreshed,
and without passages that are known to hold the masked span. The last four start from recurring
spans; `--config.recurring_spans.steps=0` leaves those out, and they start from the inverse cloze
task, as in the paper's Table 2. Each is trained with the regular commands, and its zero-shot
retrieval is scored. DATA holds covid/, or wikipedia_2014/ and qa/.
`--systems=recurring_spans,realm` runs only some of them; the table has all systems scored so far.
Flags such as `--config.recurring_spans.steps=80` change configs/real_text.py.

All output goes below `--config.run_dir`, runs/real_text/<corpus>-<start>: passages and spans, which
all seeds share; questions/, with a dev and a test half of each set, split by title; seed-N/, with
the trained systems and the ranks, from which all tables are made; table.txt, results.json and
recall.png, rewritten after every system. Use the dev half for choices; `--halves=test` or
`--halves=dev,test` shows the other one. If interrupted, run it again to resume.

docs/results.md has the runs so far, and configs/real_text.py how long they take.
"""

import itertools
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence

from absl import flags
from ml_collections import config_flags

from benchmarks.real_text import choice
from configs import real_text as config_file
from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_enum("corpus", "covid", config_file.CORPORA, "The corpus to search.")
  flags.DEFINE_enum(
    "start", "scratch", config_file.STARTS, "Fresh weights, or a published sentence encoder."
  )
  flags.DEFINE_string("data_dir", None, "Folder with the corpora and questions.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to run.")
  flags.DEFINE_list("systems", [], "Systems to train and score; all by default.")
  flags.DEFINE_list("halves", ["dev"], "Halves of the questions to show: dev, test.")
  flags.register_validator("halves", bool, "name at least one.")
  flags.register_validator("seeds", lambda seeds: all(map(str.isdigit, seeds)), "wanted numbers.")
  config_flags.DEFINE_config_file(
    "config", None, "The config chosen by --corpus and --start.", lock_config=True
  )
  sys.argv.insert(1, f"--config={choice.config_path(sys.argv)}")
  cli.start("benchmarks.real_text.__main__")

from benchmarks import question_sets
from benchmarks.question_sets import HALVES
from benchmarks.real_text import rank, report, systems
from realm_tf import settings
from realm_tf.corpus import metrics, passages
from realm_tf.models import snapshots
from realm_tf.pipeline import corpus, runner
from realm_tf.pipeline.plan import Plan, plan_of
from realm_tf.pipeline.stage import Stage
from realm_tf.retrieval import index
from realm_tf.storage import artifacts, json_lines
from realm_tf.training import refresh


class Benchmark:
  """The benchmark for one corpus and one start.

  Args:
    shared: the run that makes the corpus, which all seeds share.
    plans: seed → its run.
    question_sets: name → file.
    job: the job that makes indexes.
    halves: halves to show; the dev half is always scored, because it determines the best system.

  Raises:
    PipelineError: the corpus cannot be made.
    UserError: there are no questions about it.
  """

  def __init__(
    self,
    shared: Plan,
    plans: Mapping[int, Plan],
    *,
    question_sets: Mapping[str, str],
    job: refresh.RefreshJob,
    halves: Sequence[str],
  ):
    self.shared, self.plans, self.job = shared, plans, job
    self.root, self.halves = shared.run_dir, halves
    self._make_corpus()
    titles = passages.load(shared.passages).titles
    self.num_passages = len(titles)
    known = set(map(metrics.normalize_answer, titles))
    self.questions = self._write_questions(question_sets, known)
    self.names: dict[str, str] = {}  # system → its display name

  def _make_corpus(self) -> None:
    found = corpus.corpus_stages(self.shared)
    runner.check_inputs(found)
    runs = runner.Runner(self.root)
    for number, stage in enumerate(found, 1):
      runs.run(stage, f"[corpus, {number}/{len(found)}] {stage.name}")

  def _write_questions(
    self, sets: Mapping[str, str], titles: Collection[str]
  ) -> dict[str, dict[str, list[dict]]]:
    """Writes the questions to files; returns half → set → rows."""
    found: dict[str, dict[str, list[dict]]] = {half: {} for half in HALVES}
    for name, path in sets.items():
      for half, rows in question_sets.halves_of(path, titles).items():
        found[half][name] = rows
        artifacts.gfile.makedirs(os.path.dirname(self._file(half, name)))
        artifacts.write_text(self._file(half, name), "".join(map(json_lines.dumps, rows)))
    return found

  def _file(self, half: str, name: str) -> str:
    return os.path.join(self.root, "questions", half, f"{name}.jsonl")

  def _ranks(self, seed: int, half: str, key: str) -> str:
    return os.path.join(self.plans[seed].run_dir, "ranks", half, key)

  def of_seed(self, seed: int) -> dict[str, systems.System]:
    """Returns the systems of a seed."""
    found = systems.systems_of(self.plans[seed])
    self.names = {key: system.name for key, system in found.items()}
    return found

  def train_and_score(self, seed: int, key: str) -> None:
    """Trains a system and ranks with it, unless that is already done.

    Raises:
      PipelineError: a stage failed, or existing output was made with another config.
    """
    system = self.of_seed(seed)[key]
    runs = runner.Runner(self.plans[seed].run_dir)
    title = f"[seed {seed}, {system.name}]"
    for stage in system.stages:
      runs.run(stage, f"{title} {stage.name}")
    retriever = self._retriever(system.workdir) if system.workdir else {}
    for half in HALVES:
      if half in ("dev", *self.halves):
        runs.run(self._rank_stage(seed, half, key, retriever), f"{title} ranks, {half} half")

  def _retriever(self, workdir: str) -> dict[str, str]:
    """Returns a trainer's newest snapshot and its index, which is made if it does not exist."""
    snapshot = snapshots.newest(workdir, advice="run the same command again.")
    folder = index.folder_of(workdir, snapshot)
    if not artifacts.is_complete(folder):
      refresh.make_index(self.job, workdir)
    return {"snapshot": snapshot, "index": folder}

  def _rank_stage(self, seed: int, half: str, key: str, retriever: Mapping[str, str]) -> Stage:
    """Returns the stage that makes files of ranks; it is rerun if retriever or questions change."""
    asked = [self._file(half, name) for name in self.questions[half]]
    folder, passages_ = self._ranks(seed, half, key), self.shared.passages
    return Stage(
      f"ranks {half} {key}",
      (
        "benchmarks.real_text.rank",
        f"--passages={passages_}",
        f"--questions={','.join(asked)}",
        *(f"--{name}={path}" for name, path in retriever.items()),
        f"--output={folder}",
      ),
      inputs=(passages_, *asked, *retriever.values()),
      outputs=[os.path.join(folder, os.path.basename(path)) for path in asked],
      folder=folder,
    )

  def results(self, seeds: Sequence[int]) -> dict:
    """Returns the input of `report.table_of`, from all existing ranks."""
    found = {half: self._read(seeds, half) for half in self.questions}
    return {
      "title": f"Zero-shot retrieval, {os.path.basename(self.root)}, "
      f"{self.num_passages:,} passages",
      "note": report.NOTE if self.shared.settings["encoder.preset"] else "",
      "sets": {
        name: {half: report.compare(found["dev"][name], found[half][name]) for half in self.halves}
        for name in self.questions["dev"]
      },
    }

  def _read(self, seeds: Sequence[int], half: str) -> Mapping[str, report.Ranks]:
    """Reads set → system → seed → rule → ranks; skips those of questions that have changed."""
    found: dict[str, dict[str, dict[int, dict]]] = {}
    for name, asked in self.questions[half].items():
      found[name] = {}
      for key, seed in itertools.product(self.names, seeds):
        path = os.path.join(self._ranks(seed, half, key), f"{name}.jsonl")
        rows = rank.read_rows(path) if artifacts.gfile.exists(path) else []
        if [row["question"] for row in rows] == [row["question"] for row in asked]:
          found[name].setdefault(key, {})[seed] = rank.read_ranks(rows)
    return found

  def write(self, seeds: Sequence[int]) -> str:
    """Writes the table, results and plot; returns the table."""
    results = self.results(seeds)
    text = report.table_of(results, self.names)
    artifacts.write_text(os.path.join(self.root, "table.txt"), text)
    artifacts.write_text(
      os.path.join(self.root, "results.json"), json.dumps(results, indent=2) + "\n"
    )
    report.plot(results, self.names, os.path.join(self.root, "recall.png"))
    return text


def run(
  config,
  *,
  config_path: str,
  overrides: Mapping[str, object],
  seeds: Sequence[int],
  wanted: Collection[str] = (),
  halves: Sequence[str] = ("dev",),
) -> None:
  """Trains and scores the systems not done yet, and prints the table after each.

  Args:
    config: all settings; its seed and run_dir are changed for each seed.
    config_path: the file that it was read from; passed to the trainers.
    overrides: flags that changed it, name → value; passed to the trainers.
    seeds: the seeds to run.
    wanted: systems to train and score; all if empty.
    halves: see `Benchmark`.

  Raises:
    UserError: there is no such system or half, or there are no questions about the corpus.
    PipelineError: a stage failed, or existing output was made with another config.
  """
  # ---- Settings
  shared = plan_of(config, config_path=config_path, overrides=overrides)
  job, sets = settings.refresh_job(config), config.question_sets.to_dict()
  same = {name: config[name] for name in ("passages", "knowledge_spans", "spans")}
  config.update(same)  # so that they do not follow later changes of run_dir
  plans = {}
  for seed in seeds:
    own = {"seed": seed, "run_dir": os.path.join(shared.run_dir, f"seed-{seed}")}
    config.update(own)
    plans[seed] = plan_of(config, config_path=config_path, overrides={**overrides, **same, **own})
  _check(wanted, list(systems.systems_of(shared)), "systems")
  _check(halves, HALVES, "halves")

  # ---- Systems
  benchmark = Benchmark(shared, plans, question_sets=sets, job=job, halves=halves)
  for seed in seeds:
    for key in benchmark.of_seed(seed):
      if not wanted or key in wanted:
        benchmark.train_and_score(seed, key)
        print(f"\n{benchmark.write(seeds)}", flush=True)


def _check(named: Collection[str], known: Sequence[str], flag: str) -> None:
  if unknown := [name for name in named if name not in known]:
    raise artifacts.UserError(
      f"--{flag} names {', '.join(unknown)}; wanted some of {', '.join(known)}."
    )


def main(argv: Sequence[str]) -> None:
  del argv
  args, config = flags.FLAGS, flags.FLAGS.config
  own = {"data_dir": args.data_dir} if args.data_dir else {}
  config.update(own)
  run(
    config,
    config_path=choice.config_path(sys.argv),
    overrides={**config_flags.get_override_values(flags.FLAGS["config"]), **own},
    seeds=[int(seed) for seed in args.seeds],
    wanted=args.systems,
    halves=args.halves,
  )
