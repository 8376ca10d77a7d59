"""Reproduces the paper's Table 2 at any size: trains and evaluates each row with several seeds.

    python -m benchmarks.ablations --config=configs/ablations.py --seeds=0,1,2

Each seed has a folder below the config's run_dir, with its own corpus (if it is the built-in one)
and warm starts, which all rows share. Rows are trained with the commands of docs/concepts.md, in
the order of the table, one seed after another. If interrupted, run it again to resume. The table is
written to run_dir/ablations.{txt,json} after every row.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to run.")
  cli.start("benchmarks.ablations")

import numpy as np
import tabulate
from ml_collections import config_flags

from realm_tf import progress
from realm_tf.pipeline import corpus, open_qa, pretraining, runner
from realm_tf.pipeline.plan import Plan, plan_of
from realm_tf.pipeline.stage import Stage
from realm_tf.storage import artifacts

STALE = 30  # times fewer refreshes
# the retriever before REALM (ICT), or the reader before REALM (the masked-LM warm starts)
BASELINE = "baseline"
AGE = "max_index_age_steps"  # of the oldest index used for a batch
METRICS = {"exact_match": "exact match", "zero_shot": "zero-shot recall@5"}


@dataclasses.dataclass(frozen=True)
class Row:
  """A system of the paper's Table 2.

  Attributes:
    name: its name in the paper.
    retriever, reader: the pre-training that each comes from: one of `variants`, or BASELINE.
    paper: its exact match and zero-shot recall@5 on the development set of Natural Questions, in
      percent.
  """

  name: str
  retriever: str
  reader: str
  paper: tuple[float, float]

  @property
  def folder(self) -> str:
    return (
      self.retriever
      if self.retriever == self.reader
      else f"{self.retriever}-retriever-{self.reader}-reader"
    )


ROWS = (
  Row("REALM", "realm", "realm", (38.2, 38.5)),
  Row("REALM retriever + baseline encoder", "realm", BASELINE, (37.4, 38.5)),
  Row("baseline retriever + REALM encoder", BASELINE, "realm", (35.3, 13.9)),
  Row("baseline (ORQA)", BASELINE, BASELINE, (31.3, 13.9)),
  Row("REALM with random uniform masks", "uniform", "uniform", (32.3, 24.2)),
  Row("REALM with random span masks", "random_span", "random_span", (35.3, 26.1)),
  Row(f"{STALE}x stale index", "stale", "stale", (28.7, 15.1)),
)
ORDERINGS = (  # (better, worse) rows according to the paper
  ("REALM", "REALM with random span masks"),
  ("REALM with random span masks", "REALM with random uniform masks"),
  ("REALM", f"{STALE}x stale index"),
  ("REALM", "baseline (ORQA)"),
)


def variants(refresh_every_steps: int) -> dict[str, dict]:
  """Returns pre-training -> its settings, given REALM's own steps between refreshes."""
  return {
    "realm": {},
    "uniform": {"masking": "uniform"},
    "random_span": {"masking": "random_span"},
    "stale": {"refresh.every_steps": STALE * refresh_every_steps},
  }


def stages_of(row: Row, plan: Plan) -> list[Stage]:
  """Returns the stages that train and evaluate a row; stages shared by rows have the same name."""
  workdir_of = functools.partial(_workdir, plan.run_dir)
  known = variants(int(str(plan.settings["refresh.every_steps"])))
  found = corpus.corpus_stages(plan) + pretraining.warm_starts(plan)
  # The reader of the baseline is that of REALM before REALM pre-training.
  for variant in sorted({"realm", row.retriever, row.reader} - {BASELINE}):
    found.append(
      pretraining.realm(
        plan,
        name=f"pretraining {variant}",
        workdir=workdir_of(variant),
        differs=known[variant],
      )
    )
  retriever = plan.ict.workdir if row.retriever == BASELINE else workdir_of(row.retriever)
  reader = (
    os.path.join(workdir_of("realm"), "warmup")
    if row.reader == BASELINE
    else workdir_of(row.reader)
  )
  found.append(open_qa.zero_shot(plan, "questions", name=row.retriever, workdir=retriever))
  return found + open_qa.fine_tuning(
    plan,
    name=row.folder,
    inputs=(retriever, reader),
    differs={"retrieval": "dense", "retriever": retriever, "reader": reader},
  )


def _workdir(run_dir: str, variant: str) -> str:
  return os.path.join(run_dir, "pretraining", variant)


def scores_of(row: Row, plan: Plan) -> dict[str, float]:
  """Returns the scores of a finished row, 0 to 1, and AGE if REALM trained its retriever."""

  def read(path):
    return json.loads(artifacts.read_text(path))

  found = {
    "exact_match": read(open_qa.scores(open_qa.predictions(plan, row.folder)))["exact_match"],
    "zero_shot": read(open_qa.zero_shot_scores(plan, "questions", row.retriever))["recall_at_5"],
  }
  if row.retriever != BASELINE:
    found[AGE] = progress.read_metrics(_workdir(plan.run_dir, row.retriever))[-1][AGE]
  return found


# ============================================================================================ table


def table_of(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
  """Formats the paper's table with these results: percent, mean ± standard deviation over seeds."""
  lines = []
  for row in ROWS:
    cells = [row.name]
    for metric, paper in zip(METRICS, row.paper, strict=True):
      values = 100 * np.array([scores[metric] for scores in found.get(row.name, {}).values()])
      cells += [
        f"{paper:.1f}",
        f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
        if len(values) > 1
        else f"{values[0]:.1f}"
        if len(values)
        else "-",
      ]
    ages = [scores[AGE] for scores in found.get(row.name, {}).values() if AGE in scores]
    lines.append([*cells, f"{max(ages):.0f}" if ages else "-", len(found.get(row.name, {}))])
  heads = [
    "%",
    *(f"{name}, {whose}" for name in METRICS.values() for whose in ("paper", "here")),
    "oldest index used, steps",
    "seeds",
  ]
  return tabulate.tabulate(
    lines, heads, stralign="right", colalign=("left",), disable_numparse=True
  )


def orderings_of(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
  """Formats for how many seeds each of the paper's orderings holds, and by how much."""
  lines = []
  for better, worse in ORDERINGS:
    seeds = sorted(set(found.get(better, {})) & set(found.get(worse, {})))
    for metric, title in METRICS.items() if seeds else ():
      gaps = 100 * np.array(
        [found[better][seed][metric] - found[worse][seed][metric] for seed in seeds]
      )
      lines.append(
        [
          better,
          ">",
          worse,
          title,
          f"{(gaps > 0).sum()} of {len(gaps)}",
          f"{gaps.mean():+.1f} ({gaps.min():+.1f} to {gaps.max():+.1f})",
        ]
      )
  return tabulate.tabulate(lines, ["better", "", "worse", "in", "seeds", "by"])


# ============================================================================================== run


def run(config, *, config_path: str, overrides: Mapping[str, object], seeds: Sequence[int]) -> str:
  """Trains and evaluates the rows that are not done yet; returns the table.

  Args:
    config: all settings; its seed and run_dir are changed for each seed.
    config_path: the file that it was read from.
    overrides: flags that changed it, name → value.
    seeds: the seeds to run.

  Raises:
    PipelineError: a stage failed, or existing output was made with another config.
  """
  # ---- Settings
  root, plans = config.run_dir, {}
  for seed in seeds:
    own = {"seed": seed, "run_dir": os.path.join(root, f"seed-{seed}")}
    config.update(own)
    plans[seed] = plan_of(config, config_path=config_path, overrides={**overrides, **own})

  # ---- Rows
  found: dict[str, dict] = {}
  for seed, plan in plans.items():
    runs = runner.Runner(plan.run_dir)
    every = {stage.name: stage for row in ROWS for stage in stages_of(row, plan)}
    runs.check(list(every.values()))
    for row in ROWS:
      for stage in stages_of(row, plan):
        runs.run(stage, f"[seed {seed}, {row.name}] {stage.name}")
      found.setdefault(row.name, {})[seed] = scores_of(row, plan)
      text = f"{table_of(found)}\n\n{orderings_of(found)}\n"
      artifacts.write_text(os.path.join(root, "ablations.txt"), text)
      artifacts.write_text(os.path.join(root, "ablations.json"), json.dumps(found, indent=2) + "\n")
      print(f"\n{text}", flush=True)
  return text


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  run(
    args.config,
    config_path=config_flags.get_config_filename(args["config"]),
    overrides=config_flags.get_override_values(args["config"]),
    seeds=[int(seed) for seed in args.seeds],
  )
