"""The ablation benchmark.

Tests what each row of the paper's Table 2 is trained from, and the table of known scores.
"""

import re

from benchmarks import ablations
from configs import ablations as config_file
from realm_tf.pipeline.plan import plan_of


def commands(name: str) -> dict[str, str]:
  """Stage -> command of a row."""
  (row,) = [row for row in ablations.ROWS if row.name == name]
  plan = plan_of(config_file.get_config(), config_path="c.py", overrides={"seed": 3})
  return {stage.name: " ".join(stage.command) for stage in ablations.stages_of(row, plan)}


def test_each_row_differs_from_realm_in_what_its_name_says():
  started = {}
  for row in ablations.ROWS:
    found = commands(row.name)
    pretraining = [
      command for name, command in found.items() if name == f"pretraining {row.retriever}"
    ]
    finetune = found[f"finetune {row.folder}"]
    retriever, reader = (
      re.search(rf"--config\.finetune\.{what}=(\S+)", finetune)[1].removeprefix("runs/ablations/")
      for what in ("retriever", "reader")
    )
    switches = re.findall(r"--config\.(masking|refresh\.every_steps)=(\w+)", " ".join(pretraining))
    started[row.name] = (retriever, reader, *switches)
    assert "--config.seed=3" in finetune and all(
      "--config.seed=3" in command for command in pretraining
    )
  assert started == {
    "REALM": ("pretraining/realm", "pretraining/realm"),
    "REALM retriever + baseline encoder": ("pretraining/realm", "pretraining/realm/warmup"),
    "baseline retriever + REALM encoder": ("ict", "pretraining/realm"),
    "baseline (ORQA)": ("ict", "pretraining/realm/warmup"),
    "REALM with random uniform masks": (
      "pretraining/uniform",
      "pretraining/uniform",
      ("masking", "uniform"),
    ),
    "REALM with random span masks": (
      "pretraining/random_span",
      "pretraining/random_span",
      ("masking", "random_span"),
    ),
    "30x stale index": ("pretraining/stale", "pretraining/stale", ("refresh.every_steps", "1200")),
  }


def test_table_and_orderings():
  found = {
    "REALM": {
      0: {"exact_match": 0.52, "zero_shot": 0.7, "max_index_age_steps": 70.0},
      1: {"exact_match": 0.3, "zero_shot": 0.9, "max_index_age_steps": 85.0},
    },
    "baseline (ORQA)": {
      0: {"exact_match": 0.4, "zero_shot": 0.2},
      1: {"exact_match": 0.4, "zero_shot": 0.3},
    },
    "30x stale index": {1: {"exact_match": 0.25, "zero_shot": 0.5}},
  }
  table, orderings = ablations.table_of(found), ablations.orderings_of(found)
  rows = [re.split("  +", line.strip()) for line in table.splitlines()]
  assert ["REALM", "38.2", "41.0 ± 15.6", "38.5", "80.0 ± 14.1", "85", "2"] in rows
  assert ["30x stale index", "28.7", "25.0", "15.1", "50.0", "-", "1"] in rows
  assert ["REALM with random span masks", "35.3", "-", "26.1", "-", "-", "0"] in rows
  assert re.search(
    r"REALM +> +baseline \(ORQA\) +exact match +1 of 2 +\+1\.0 \(-10\.0 to \+12\.0\)", orderings
  )
  assert (
    re.search(r"REALM +> +30x stale index +zero-shot recall@5 +1 of 1 +\+40\.0", orderings)
    and "uniform" not in orderings
  )
