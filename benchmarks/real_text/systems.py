"""The retrievers that are compared, and the product's commands that train each."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence

from realm_tf import stages
from realm_tf.stages import Stage

PAIRS = (  # (hoped to be better, hoped to be worse); where one of them is not scored, none
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
)
BM25 = "bm25"


@dataclasses.dataclass(frozen=True)
class System:
  """A retriever.

  Attributes:
    name: in the table.
    workdir: whose newest snapshot is scored; "" for BM25.
    stages: what trains it, in order; those that systems share have the same names.
  """

  name: str
  workdir: str = ""
  stages: Sequence[Stage] = ()


def systems_of(config, config_path: str, overrides: Mapping[str, object]) -> dict[str, System]:
  """The systems of one seed, in the table's order, by their names in folders and flags.

  Args:
    config: of the seed.
    config_path, overrides: where it came from; handed on to the trainers.
  """
  found = {BM25: System("BM25")}
  warm = stages.warm_starts(config, config_path, overrides)
  readers = [] if config.ict.from_mlm else [s for s in warm if s.folder == config.mlm.workdir]
  warm = [stage for stage in warm if stage not in readers]
  before = [stage for stage in warm if stage.folder != config.recurring_spans.workdir]
  start = System(
    "ICT" if config.ict.steps else "the encoder as it comes", config.ict.workdir, before
  )
  if config.encoder.preset:
    found["encoder"] = _encoder(config, config_path, overrides) if config.ict.steps else start
  if config.ict.steps:
    found["ict"] = start
  realm = functools.partial(_realm, config, config_path, overrides, readers)
  from_ict = realm(f"REALM from {start.name}", "realm_from_ict", start)
  if not config.recurring_spans.steps:
    return {**found, "realm_from_ict": from_ict}
  start = System("recurring spans", config.recurring_spans.workdir, warm)
  found |= {"recurring_spans": start, "realm_from_ict": from_ict}
  variants = {
    "realm": ("REALM from recurring spans", {}),
    "random_span": ("REALM, random span masks", {"masking": "random_span"}),
    "uniform": ("REALM, uniform masks", {"masking": "uniform"}),
    "never_refreshed": ("REALM, never refreshed", {"refresh.every_steps": config.realm.steps + 1}),
  }
  for key, (name, differs) in variants.items():
    found[key] = realm(name, key, start, differs)
  return found


def _realm(
  config,
  config_path: str,
  overrides: Mapping[str, object],
  readers: Sequence[Stage],
  name: str,
  key: str,
  start: System,
  differs: Mapping[str, object] | None = None,
) -> System:
  """REALM from a start's snapshot, or a variant of it; `readers` train the reader's warm start."""
  workdir = os.path.join(config.run_dir, key)
  stage = stages.realm(
    config,
    config_path,
    overrides,
    name=key,
    workdir=workdir,
    differs={"realm.init": start.workdir, **(differs or {})},
  )
  return System(name, workdir, [*readers, *start.stages, stage])


def _encoder(config, config_path: str, overrides: Mapping[str, object]) -> System:
  """The published encoder without ICT, in a workdir of its own."""
  workdir = os.path.join(config.run_dir, "encoder")
  differs = {"mlm.steps": 0, "ict.steps": 0, "recurring_spans.steps": 0, "ict.workdir": workdir}
  plain = config.copy_and_resolve_references()
  plain.update_from_flattened_dict(differs)
  (stage,) = stages.warm_starts(plain, config_path, {**overrides, **differs})
  stage = dataclasses.replace(stage, name="encoder", differs=differs)
  return System("the encoder as it comes", workdir, [stage])
