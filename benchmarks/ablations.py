"""The paper's Table 2 at a size of your choice: every row trained and evaluated, over several seeds.

    python -m benchmarks.ablations --config=configs/ablations.py --seeds=0,1,2

Each seed has a folder below the config's run_dir, with a corpus (where it is the built-in one) and warm starts of its own, which
all rows share. Rows are trained by the commands of the README, in the order of the table, one seed after another; run again, it goes
on where it was. The table is written to run_dir/ablations.{txt,json} after every row.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np
import tabulate
from absl import flags
from ml_collections import config_flags

from realm_tf import artifacts, pipeline, progress, settings, stages

STALE = 30  # times fewer refreshes
BASELINE = "baseline"  # the retriever before REALM (ICT), or the reader before it (the masked-LM warm starts)
AGE = "max_index_age_steps"  # of the oldest index that a batch was made with
METRICS = {"exact_match": "exact match", "zero_shot": "zero-shot recall@5"}


@dataclasses.dataclass(frozen=True)
class Row:
  """A system of the paper's Table 2.

  Attributes:
    name: as the paper calls it.
    retriever, reader: which pre-training each comes from: one of `variants`, or BASELINE.
    paper: its exact match and zero-shot recall@5 on the development part of Natural Questions, in percent.
  """

  name: str
  retriever: str
  reader: str
  paper: tuple[float, float]

  @property
  def folder(self) -> str:
    return self.retriever if self.retriever == self.reader else f"{self.retriever}-retriever-{self.reader}-reader"


ROWS = (
    Row("REALM", "realm", "realm", (38.2, 38.5)),
    Row("REALM retriever + baseline encoder", "realm", BASELINE, (37.4, 38.5)),
    Row("baseline retriever + REALM encoder", BASELINE, "realm", (35.3, 13.9)),
    Row("baseline (ORQA)", BASELINE, BASELINE, (31.3, 13.9)),
    Row("REALM with random uniform masks", "uniform", "uniform", (32.3, 24.2)),
    Row("REALM with random span masks", "random_span", "random_span", (35.3, 26.1)),
    Row(f"{STALE}x stale index", "stale", "stale", (28.7, 15.1)),
)
ORDERINGS = (  # (better, worse) rows by the paper
    ("REALM", "REALM with random span masks"), ("REALM with random span masks", "REALM with random uniform masks"),
    ("REALM", f"{STALE}x stale index"), ("REALM", "baseline (ORQA)"))


def variants(config) -> dict[str, dict]:
  """Pre-training -> its settings."""
  return {"realm": {}, "uniform": {"masking": "uniform"}, "random_span": {"masking": "random_span"},
          "stale": {"refresh.every_steps": STALE * config.refresh.every_steps}}


def stages_of(row: Row, config, config_path: str, overrides: Mapping[str, object]) -> list[stages.Stage]:
  """What trains and evaluates a row; stages that rows share have the same names."""
  workdir_of = functools.partial(_workdir, config)
  found = stages.corpus(config) + stages.warm_starts(config, config_path, overrides)
  for variant in sorted({"realm", row.retriever, row.reader} - {BASELINE}):  # the baseline's reader is REALM's before REALM
    found.append(stages.realm(config, config_path, overrides, name=f"pretraining {variant}", workdir=workdir_of(variant),
                              differs=variants(config)[variant]))
  retriever = config.ict.workdir if row.retriever == BASELINE else workdir_of(row.retriever)
  reader = os.path.join(workdir_of("realm"), "warmup") if row.reader == BASELINE else workdir_of(row.reader)
  found.append(stages.zero_shot(config, "questions", name=row.retriever, workdir=retriever))
  return found + stages.fine_tuning(
      config, config_path, overrides, name=row.folder, inputs=(retriever, reader),
      differs={"retrieval": "dense", "retriever": retriever, "reader": reader})


def _workdir(config, variant: str) -> str:
  return os.path.join(config.run_dir, "pretraining", variant)


def scores_of(row: Row, config) -> dict[str, float]:
  """A finished row's scores, 0 to 1, and AGE where REALM trained its retriever."""
  read = lambda path: json.loads(artifacts.read_text(path))
  found = {
      "exact_match": read(stages.scores(stages.predictions(config, row.folder)))["exact_match"],
      "zero_shot": read(stages.zero_shot_scores(config, "questions", row.retriever))["recall_at_5"]}
  if row.retriever != BASELINE:
    found[AGE] = progress.read_metrics(_workdir(config, row.retriever))[-1][AGE]
  return found


# ================================================================================================================ table


def table_of(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
  """The paper's table beside ours, in percent, as mean ± standard deviation over the seeds."""
  lines = []
  for row in ROWS:
    cells = [row.name]
    for metric, paper in zip(METRICS, row.paper):
      values = 100 * np.array([scores[metric] for scores in found.get(row.name, {}).values()])
      cells += [f"{paper:.1f}", f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else
                f"{values[0]:.1f}" if len(values) else "-"]
    ages = [scores[AGE] for scores in found.get(row.name, {}).values() if AGE in scores]
    lines.append([*cells, f"{max(ages):.0f}" if ages else "-", len(found.get(row.name, {}))])
  heads = ["%", *(f"{name}, {whose}" for name in METRICS.values() for whose in ("paper", "here")),
           "oldest index used, steps", "seeds"]
  return tabulate.tabulate(lines, heads, stralign="right", colalign=("left",), disable_numparse=True)


def orderings_of(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
  """In how many seeds each of the paper's orderings holds, and by how much."""
  lines = []
  for better, worse in ORDERINGS:
    seeds = sorted(set(found.get(better, {})) & set(found.get(worse, {})))
    for metric, title in METRICS.items() if seeds else ():
      gaps = 100 * np.array([found[better][seed][metric] - found[worse][seed][metric] for seed in seeds])
      lines.append([better, ">", worse, title, f"{(gaps > 0).sum()} of {len(gaps)}", f"{gaps.mean():+.1f} ({gaps.min():+.1f} to {gaps.max():+.1f})"])
  return tabulate.tabulate(lines, ["better", "", "worse", "in", "seeds", "by"])


# ================================================================================================================== run


def run(config, *, config_path: str, overrides: Mapping[str, object], seeds: Sequence[int]) -> str:
  """Trains and evaluates what is not done yet; returns the table.

  Args:
    config: all settings; its seed and run_dir are changed from seed to seed.
    config_path, overrides: where it came from.
    seeds: of the runs.

  Raises:
    PipelineError: a stage failed, or what is there was made with another config.
  """
  root, found = config.run_dir, {}
  for seed in seeds:
    config.seed, config.run_dir = seed, os.path.join(root, f"seed-{seed}")
    runner = pipeline.Runner(config.run_dir, config.to_dict())
    for row in ROWS:
      for stage in stages_of(row, config, config_path, {**overrides, "seed": seed, "run_dir": config.run_dir}):
        runner.run(stage, f"[seed {seed}, {row.name}] {stage.name}")
      found.setdefault(row.name, {})[seed] = scores_of(row, config)
      text = f"{table_of(found)}\n\n{orderings_of(found)}\n"
      artifacts.write_text(os.path.join(root, "ablations.txt"), text)
      artifacts.write_text(os.path.join(root, "ablations.json"), json.dumps(found, indent=2) + "\n")
      print(f"\n{text}", flush=True)
  return text


if __name__ == "__main__":
  config_flag = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
  seeds_flag = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to run.")
  flags.mark_flag_as_required("config")
  settings.start(lambda argv: run(
      config_flag.value, config_path=config_flags.get_config_filename(flags.FLAGS["config"]),
      overrides=config_flags.get_override_values(flags.FLAGS["config"]), seeds=[int(seed) for seed in seeds_flag.value]))
