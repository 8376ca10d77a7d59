"""Retrievers from raw text on two corpora and questions that nobody here wrote.

    python -m benchmarks.real_text --data_dir=DATA --corpus=covid --start=published --seeds=0,1,2

BM25, the inverse cloze task (or a published encoder), recurring spans, REALM from either, and
REALM with uniform masks, with random span masks and with an index that is never refreshed: each is
trained by the product's commands, and its zero-shot retrieval is scored. DATA holds covid/, or
wikipedia_2014/ and qa/. `--systems=recurring_spans,realm` runs some of them only; the table has all
that were scored at any time. `--config.recurring_spans.steps=80` and the like change
configs/real_text.py.

Everything is written below run_dir/<corpus>-<start>: passages and spans, which all seeds share;
questions/, each set in a dev and a test half, by title; seed-N/ with the trained systems and the
ranks that all tables come from; table.txt, results.json and recall.png, written anew after every
system. Choose by the dev half; `--halves=test` or `--halves=dev,test` asks for the other one. Run
again, it goes on where it was.

It has not been run whole on these corpora yet, so the hours it takes are not known.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence

from absl import flags
from ml_collections import config_flags

from benchmarks import question_sets
from benchmarks.question_sets import HALVES
from benchmarks.real_text import rank, report, systems
from configs import real_text as config_file
from realm_tf import (
  artifacts,
  index,
  json_lines,
  metrics,
  passages,
  pipeline,
  pretrain,
  settings,
  snapshots,
  stages,
)


class Benchmark:
  """One corpus and one start.

  Args:
    config: all settings; its seed and run_dir are changed from seed to seed.
    config_path, overrides: where it came from; handed on to the trainers.
    halves: to show; the dev half is always scored, because it says what system is the best.

  Raises:
    PipelineError: the corpus cannot be made.
    UserError: there are no questions about it.
  """

  def __init__(
    self, config, *, config_path: str, overrides: Mapping[str, object], halves: Sequence[str]
  ):
    self.config, self.config_path = config, config_path
    self.root, self.halves = config.run_dir, halves
    self._make_corpus()
    shared = {name: config[name] for name in ("passages", "knowledge_spans", "spans")}
    config.update(shared)  # whatever run_dir is from now on
    self.overrides = {**overrides, **shared}
    titles = passages.load(config.passages).titles
    self.num_passages = len(titles)
    self.questions = self._write_questions(set(map(metrics.normalize_answer, titles)))
    self.names: dict[str, str] = {}  # system → its name for people

  def _make_corpus(self) -> None:
    found = stages.corpus(self.config)
    pipeline.check_inputs(found)
    runner = pipeline.Runner(self.root, self.config.to_dict())
    for number, stage in enumerate(found, 1):
      runner.run(stage, f"[corpus, {number}/{len(found)}] {stage.name}")

  def _write_questions(self, titles: Collection[str]) -> dict[str, dict[str, list[dict]]]:
    """Half → set → rows; each also stands in a file."""
    found = {half: {} for half in HALVES}
    for name, path in self.config.question_sets.items():
      for half, rows in question_sets.halves_of(path, titles).items():
        found[half][name] = rows
        artifacts.gfile.makedirs(os.path.dirname(self._file(half, name)))
        artifacts.write_text(self._file(half, name), "".join(map(json_lines.dumps, rows)))
    return found

  def _file(self, half: str, name: str) -> str:
    return os.path.join(self.root, "questions", half, f"{name}.jsonl")

  def _seed_dir(self, seed: int) -> str:
    return os.path.join(self.root, f"seed-{seed}")

  def _ranks(self, seed: int, half: str, key: str) -> str:
    return os.path.join(self._seed_dir(seed), "ranks", half, key)

  def of_seed(self, seed: int) -> dict[str, systems.System]:
    """A seed's systems; the config becomes that seed's."""
    self.config.seed, self.config.run_dir = seed, self._seed_dir(seed)
    own = {"seed": seed, "run_dir": self.config.run_dir}
    found = systems.systems_of(self.config, self.config_path, {**self.overrides, **own})
    self.names = {key: system.name for key, system in found.items()}
    return found

  def train_and_score(self, seed: int, key: str) -> None:
    """Trains a system and ranks with it, where that is not done yet.

    Raises:
      PipelineError: a stage failed, or what is there was made with another config.
    """
    system = self.of_seed(seed)[key]
    runner = pipeline.Runner(self.config.run_dir, self.config.to_dict())
    title = f"[seed {seed}, {system.name}]"
    for stage in system.stages:
      runner.run(stage, f"{title} {stage.name}")
    retriever = self._retriever(system.workdir) if system.workdir else {}
    for half in HALVES:
      if half in ("dev", *self.halves):
        runner.run(self._rank_stage(seed, half, key, retriever), f"{title} ranks, {half} half")

  def _retriever(self, workdir: str) -> dict[str, str]:
    """A trainer's newest snapshot and its index, which is made if it is not there."""
    snapshot = snapshots.newest(workdir, advice="run the same command again.")
    folder = index.folder_of(workdir, snapshot)
    if not artifacts.is_complete(folder):
      roots = [os.path.join(workdir, name) for name in ("snapshots", "indexes")]
      pretrain.make_index(self.config, snapshots_root=roots[0], indexes=roots[1])
    return {"snapshot": snapshot, "index": folder}

  def _rank_stage(
    self, seed: int, half: str, key: str, retriever: Mapping[str, str]
  ) -> stages.Stage:
    """Retriever and question files → files of ranks; done again when one of them has changed."""
    asked = [self._file(half, name) for name in self.questions[half]]
    folder, passages_ = self._ranks(seed, half, key), self.config.passages
    return stages.Stage(
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
    """What `report.table_of` takes, of all ranks that are there."""
    found = {half: self._read(seeds, half) for half in self.questions}
    return {
      "title": f"Zero-shot retrieval, {os.path.basename(self.root)}, "
      f"{self.num_passages:,} passages",
      "note": report.NOTE if self.config.encoder.preset else "",
      "sets": {
        name: {half: report.compare(found["dev"][name], found[half][name]) for half in self.halves}
        for name in self.questions["dev"]
      },
    }

  def _read(self, seeds: Sequence[int], half: str) -> dict[str, report.Ranks]:
    """Set → system → seed → rule → ranks; those of other questions than today's are left out."""
    found = {}
    for name, asked in self.questions[half].items():
      found[name] = {}
      for key, seed in itertools.product(self.names, seeds):
        path = os.path.join(self._ranks(seed, half, key), f"{name}.jsonl")
        rows = rank.read_rows(path) if artifacts.gfile.exists(path) else []
        if [row["question"] for row in rows] == [row["question"] for row in asked]:
          found[name].setdefault(key, {})[seed] = rank.read_ranks(rows)
    return found

  def write(self, seeds: Sequence[int]) -> str:
    """Writes table, results and picture; returns the table."""
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
  """Trains and scores what is not done yet, and prints the table after each system.

  Args:
    config, config_path, overrides, halves: see `Benchmark`.
    wanted: systems to train and score; all, if there are none.

  Raises:
    UserError: no such system or half; no questions about the corpus.
    PipelineError: a stage failed, or what is there was made with another config.
  """
  _check(wanted, list(systems.systems_of(config, config_path, overrides)), "systems")
  _check(halves, HALVES, "halves")
  benchmark = Benchmark(config, config_path=config_path, overrides=overrides, halves=halves)
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


def _config_path(argv: Sequence[str]) -> str:
  """The config that --corpus and --start ask for; no flag of its own can be read before these."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument("--corpus", default="covid", choices=config_file.CORPORA)
  parser.add_argument("--start", default="scratch", choices=config_file.STARTS)
  chosen, _ = parser.parse_known_args(argv[1:])
  return f"{config_file.__file__}:{chosen.corpus}+{chosen.start}"


def main(argv: Sequence[str]) -> None:
  del argv
  args, config = flags.FLAGS, flags.FLAGS.config
  own = {"run_dir": os.path.join(args.run_dir, f"{args.corpus}-{args.start}")}
  if args.data_dir:
    own["data_dir"] = args.data_dir
  config.update(own)
  run(
    config,
    config_path=_config_path(sys.argv),
    overrides={**config_flags.get_override_values(flags.FLAGS["config"]), **own},
    seeds=[int(seed) for seed in args.seeds],
    wanted=args.systems,
    halves=args.halves,
  )


if __name__ == "__main__":
  flags.DEFINE_enum("corpus", "covid", config_file.CORPORA, "What is searched.")
  flags.DEFINE_enum(
    "start", "scratch", config_file.STARTS, "Fresh weights, or a published sentence encoder."
  )
  flags.DEFINE_string("data_dir", None, "Folder with the corpora and questions.")
  flags.DEFINE_string("run_dir", "runs/real_text", "Folder to write to.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to run.")
  flags.DEFINE_list("systems", [], "Systems to train and score; all by default.")
  flags.DEFINE_list("halves", ["dev"], "Halves of the questions to show: dev, test.")
  flags.register_validator("halves", bool, "name one at least.")
  flags.register_validator("seeds", lambda seeds: all(map(str.isdigit, seeds)), "wanted numbers.")
  config_flags.DEFINE_config_file(
    "config", None, "What --corpus and --start choose.", lock_config=True
  )
  sys.argv.insert(1, f"--config={_config_path(sys.argv)}")
  settings.start(main)
