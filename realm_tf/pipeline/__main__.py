"""Runs all stages in order, from a corpus to a trained, evaluated and served system.

A summary is written at the end.

    python -m realm_tf.pipeline --config=configs/quickstart.py

Each stage is one documented command in its own process, printed as it starts. If interrupted, run
the pipeline again to resume: finished stages are skipped, and an interrupted stage resumes.
`--config.x.y=z` is passed to the trainers. `--redo=ict` deletes the output of that stage and all
later ones first.
"""

import json
import os
from collections.abc import Mapping, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_string("redo", None, "Delete the output of this stage and all later ones, then run.")
  cli.start("realm_tf.pipeline.__main__")

from ml_collections import config_flags

from realm_tf import progress
from realm_tf.pipeline import plots, runner, stages, summary
from realm_tf.pipeline.plan import plan_of
from realm_tf.storage import artifacts


def run(
  config, *, config_path: str, overrides: Mapping[str, object], redo: str | None = None
) -> dict:
  """Runs all unfinished stages; returns the summary.

  Args:
    config: all settings.
    config_path: the config's file; passed to the trainers.
    overrides: settings that override the file's, name → value; passed to the trainers.
    redo: a stage whose output is deleted first, with that of all later stages.

  Raises:
    ConfigError: no corpus, or an unknown system.
    PipelineError: something is missing, a stage failed, or existing output was made with another
      config.
  """
  # ---- Settings
  plan = plan_of(config, config_path=config_path, overrides=overrides)

  # ---- Stages
  found = stages.all_stages(plan)
  runner.check_inputs(found)
  runs = runner.Runner(plan.run_dir)
  if redo:
    runs.redo(found, redo)  # checks what stays
  else:
    runs.check(found)
  for number, stage in enumerate(found, 1):
    runs.run(stage, f"[{number}/{len(found)}] {stage.name}")

  # ---- Summary
  made = summary.summarize(plan, {stage.name: runs.wall_secs(stage) for stage in found})
  path = os.path.join(plan.run_dir, summary.SUMMARY)
  artifacts.write_text(path, json.dumps(made, indent=2, ensure_ascii=False) + "\n")
  metrics = progress.read_metrics(plan.realm.workdir)
  plots.plot_training(metrics, os.path.join(plan.run_dir, summary.PLOT))
  summary.show(made, plan.run_dir)
  return made


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  run(
    args.config,
    config_path=config_flags.get_config_filename(args["config"]),
    overrides=config_flags.get_override_values(args["config"]),
    redo=args.redo,
  )
