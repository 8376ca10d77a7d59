"""Stages that train without questions: warm starts, and REALM (section 3)."""

from collections.abc import Mapping, Sequence

from realm_tf.pipeline import stage
from realm_tf.pipeline.plan import Plan
from realm_tf.pipeline.stage import Stage


def warm_starts(plan: Plan) -> list[Stage]:
  """Returns stages for the masked-LM warm start, the inverse cloze task and recurring spans.

  The first and the last are skipped if they have 0 steps.
  """
  found = [_mlm(plan)] if plan.mlm.steps else []
  found.append(ict(plan))
  return found + ([_recurring_spans(plan)] if plan.recurring_spans.steps else [])


def _mlm(plan: Plan) -> Stage:
  return stage.trainer(
    plan,
    "pretrain_mlm",
    name="mlm",
    workdir=plan.mlm.workdir,
    inputs=(plan.passages, *_sentences(plan), *stage.preset_folders(plan)),
    outputs=(stage.snapshot(plan.mlm.workdir, plan.mlm.steps),),
    sections=("seed", "optimizer", "reader_encoder", "retriever", "reader", "masking", "mlm"),
  )


def ict(plan: Plan) -> Stage:
  """Returns the stage of the inverse cloze task."""
  return stage.trainer(
    plan,
    "pretrain_ict",
    name="ict",
    workdir=plan.ict.workdir,
    inputs=(
      plan.passages,
      *(_sentences(plan) if plan.ict_held_out else ()),
      *(_masked_lm(plan) if plan.ict_from_mlm else ()),
      *stage.preset_folders(plan),
    ),
    outputs=(stage.snapshot(plan.ict.workdir, plan.ict.steps),),
    sections=("seed", "optimizer", "encoder", "retriever", "ict"),
  )


def _recurring_spans(plan: Plan) -> Stage:
  section = plan.recurring_spans
  return stage.trainer(
    plan,
    "pretrain_spans",
    name="recurring spans",
    workdir=section.workdir,
    inputs=(plan.passages, plan.knowledge_spans, section.init),
    outputs=(stage.snapshot(section.workdir, section.steps),),
    sections=("seed", "optimizer", "retriever", "reader", "masking", "recurring_spans", "ict"),
  )


def realm(
  plan: Plan,
  *,
  name: str = "realm",
  workdir: str = "",
  differs: Mapping[str, object] | None = None,
) -> Stage:
  """Returns the stage of REALM pre-training, or of a variant of it.

  Args:
    plan: plan of the run.
    name: name of the stage.
    workdir: workdir of the variant; the plan's own by default.
    differs: the variant's settings.
  """
  workdir = workdir or plan.realm.workdir
  init = str((differs or {}).get("realm.init", plan.realm.init))
  steps = {start.workdir: start.steps for start in (plan.ict, plan.recurring_spans)}
  return stage.trainer(
    plan,
    "pretrain",
    name=name,
    workdir=workdir,
    differs=differs,
    inputs=(
      plan.passages,
      *_sentences(plan),
      *_masked_lm(plan),
      init,
      *stage.preset_folders(plan),
    ),
    outputs=(
      stage.snapshot(workdir, plan.realm.steps),
      stage.index(workdir, plan.realm.steps),
      *((stage.index(init, steps[init]),) if init in steps else ()),  # the first index
    ),
    sections=(
      *("seed", "optimizer", "encoder", "reader_encoder", "retriever", "reader", "masking"),
      *("warmup", "searcher", "realm", "refresh"),
    ),
  )


def _sentences(plan: Plan) -> Sequence[str]:
  """Returns the spans folders to train on."""
  return sorted({plan.knowledge_spans, plan.spans})


def _masked_lm(plan: Plan) -> Sequence[str]:
  return (plan.mlm.workdir,) if plan.mlm.steps else ()
