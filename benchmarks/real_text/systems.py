"""The retrievers to compare, and the commands that train each."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence

from realm_tf.pipeline import pretraining
from realm_tf.pipeline.plan import Plan, Trainer
from realm_tf.pipeline.stage import Stage

PAIRS = (  # (expected to be better, expected to be worse); omitted if one of them is not scored
  ("ict", "encoder"),
  ("recurring_spans", "ict"),
  ("recurring_spans", "encoder"),
  ("realm_from_ict", "ict"),
  ("realm_from_ict", "encoder"),
  ("realm", "recurring_spans"),
  ("realm", "ict"),
  ("realm", "encoder"),
  ("realm", "random_span"),
  ("random_span", "uniform"),
  ("realm", "uniform"),
  ("realm", "never_refreshed"),
  ("realm", "no_holders"),
  ("no_holders", "random_span"),
  ("no_holders", "uniform"),
)
BM25 = "bm25"


@dataclasses.dataclass(frozen=True)
class System:
  """A retriever to compare.

  Attributes:
    name: its name in the table.
    workdir: the workdir whose newest snapshot is scored; "" for BM25.
    stages: the stages that train it, in order; stages shared by systems have the same name.
  """

  name: str
  workdir: str = ""
  stages: Sequence[Stage] = ()


def systems_of(plan: Plan) -> dict[str, System]:
  """Returns the systems of a seed by their names in folders and flags, in the table's order."""
  found = {BM25: System("BM25")}
  warm = pretraining.warm_starts(plan)
  readers = [] if plan.ict_from_mlm else [s for s in warm if s.folder == plan.mlm.workdir]
  warm = [stage for stage in warm if stage not in readers]
  before = [stage for stage in warm if stage.folder != plan.recurring_spans.workdir]
  start = System("ICT" if plan.ict.steps else "the published encoder", plan.ict.workdir, before)
  if plan.settings["encoder.preset"]:
    found["encoder"] = _encoder(plan) if plan.ict.steps else start
  if plan.ict.steps:
    found["ict"] = start
  realm = functools.partial(_realm, plan, readers)
  if plan.recurring_spans.steps:
    spans = System("recurring spans", plan.recurring_spans.workdir, warm)
    from_ict = realm(f"REALM from {start.name}", "realm_from_ict", start)
    found |= {"recurring_spans": spans, "realm_from_ict": from_ict}
    start = spans
  variants: dict[str, tuple[str, dict[str, object]]] = {
    "realm": (f"REALM from {start.name}", {}),
    "random_span": ("REALM, random span masks", {"masking": "random_span"}),
    "uniform": ("REALM, uniform masks", {"masking": "uniform"}),
    "never_refreshed": ("REALM, never refreshed", {"refresh.every_steps": plan.realm.steps + 1}),
    # as with other masks, whose holders are not known
    "no_holders": ("REALM, no holders", {"realm.holders": 0, "realm.with_holders": 0.0}),
  }
  for key, (name, differs) in variants.items():
    found[key] = realm(name, key, start, differs)
  return found


def _realm(
  plan: Plan,
  readers: Sequence[Stage],
  name: str,
  key: str,
  start: System,
  differs: Mapping[str, object] | None = None,
) -> System:
  """Returns REALM or a variant from a start's snapshot; `readers` train the reader's warm start."""
  workdir = os.path.join(plan.run_dir, key)
  stage = pretraining.realm(
    plan,
    name=key,
    workdir=workdir,
    differs={"realm.init": start.workdir, **(differs or {})},
  )
  return System(name, workdir, [*readers, *start.stages, stage])


def _encoder(plan: Plan) -> System:
  """Returns the published encoder without ICT, in a separate workdir."""
  workdir = os.path.join(plan.run_dir, "encoder")
  differs = {"mlm.steps": 0, "ict.steps": 0, "recurring_spans.steps": 0, "ict.workdir": workdir}
  plain = dataclasses.replace(
    plan,
    mlm=dataclasses.replace(plan.mlm, steps=0),
    ict=Trainer(workdir, steps=0),
    overrides={**plan.overrides, **differs},
  )
  stage = dataclasses.replace(pretraining.ict(plain), name="encoder", differs=differs)
  return System("the published encoder", workdir, [stage])
