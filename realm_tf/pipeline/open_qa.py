"""Stages with questions: zero-shot retrieval, fine-tuning, evaluation, serving, a new article."""

import os
from collections.abc import Mapping, Sequence

from realm_tf.pipeline import stage
from realm_tf.pipeline.plan import Plan
from realm_tf.pipeline.stage import PORT, ConfigError, Stage

SERVED = "served"  # instead of a system's name: REALM's answers from the model server


# ======================================================================================= zero-shot


def zero_shot_stages(plan: Plan) -> list[Stage]:
  """Returns stages for REALM's retriever, its starting point and BM25 on questions and clozes."""
  start, trained, found = plan.realm.init, plan.realm.workdir, []
  for kind in ("questions", "clozes"):
    if _asked(plan, kind):
      found += [
        zero_shot(plan, kind, name=plan.start_of_realm, workdir=start),
        zero_shot(plan, kind, name="realm", workdir=trained),
        zero_shot(plan, kind, name="bm25", workdir=trained, bm25=True),
      ]
  return found


def zero_shot(plan: Plan, kind: str, *, name: str, workdir: str, bm25: bool = False) -> Stage:
  """Returns a stage that evaluates retrieval without training on questions.

  Args:
    plan: plan of the run.
    kind: "questions" or "clozes".
    name: name of the system, used in file names.
    workdir: workdir with the retriever, or with the passages for BM25.
    bm25: whether BM25 retrieves instead of the retriever.
  """
  path, output = _asked(plan, kind), zero_shot_scores(plan, kind, name)
  return Stage(
    f"zero-shot {kind} {name}",
    (
      "realm_tf.evaluate",
      f"--workdir={workdir}",
      *(("--retrieval=bm25",) if bm25 else ()),
      f"--{kind}={path}",
      f"--output={output.removesuffix('.metrics.json')}.jsonl",
    ),
    inputs=(plan.passages, workdir, path),
    outputs=(output,),
    folder=output,
  )


def zero_shot_scores(plan: Plan, kind: str, name: str) -> str:
  """Returns the path of the scores that `zero_shot` writes."""
  return os.path.join(plan.run_dir, "zero_shot", f"{name}.{kind}.metrics.json")


def _asked(plan: Plan, kind: str) -> str:
  """Returns the file of test questions or of clozes."""
  return {"questions": plan.evaluate.questions, "clozes": plan.evaluate.clozes}[kind]


# ===================================================================================== fine-tuning


def system_stages(plan: Plan) -> list[Stage]:
  """Returns stages that fine-tune and evaluate the plan's systems; none without questions.

  Raises:
    ConfigError: an unknown system.
  """
  realm, reader = plan.realm.workdir, plan.finetune.reader and plan.realm.workdir
  reader_before = plan.finetune.reader and os.path.join(plan.realm.workdir, "warmup")
  starts = {  # system → what differs in config.finetune
    "closed_book": {"retrieval": "none", "reader": realm},
    "bm25": {"retrieval": "bm25", "reader": reader},
    plan.start_of_realm: {
      "retrieval": "dense",
      "retriever": plan.realm.init,
      "reader": reader_before,
    },
    "realm": {"retrieval": "dense", "retriever": realm, "reader": reader},
  }
  found = []
  for system in plan.evaluate.systems if plan.finetune.questions else ():
    if system not in starts:
      raise ConfigError(f"evaluate.systems names {system!r}; wanted some of {', '.join(starts)}.")
    start = {"retriever": realm, **starts[system]}
    inputs = sorted({start["retriever"], start["reader"]} - {""})
    inputs += [] if reader else stage.preset_folders(plan)
    found += fine_tuning(plan, name=system, differs=starts[system], inputs=inputs)
  return found


def fine_tuning(
  plan: Plan, *, name: str, differs: Mapping[str, object], inputs: Sequence[str]
) -> list[Stage]:
  """Returns stages that fine-tune one system and, if there are test questions, evaluate it.

  Args:
    plan: plan of the run.
    name: name of the system, used in folder names.
    differs: the system's settings in `config.finetune`.
    inputs: the workdirs that it starts from.
  """
  section = plan.finetune
  workdir = os.path.join(section.workdir, name)
  dev = (section.dev_questions,) if section.dev_questions else ()
  encoder = () if section.reader else ("encoder",)
  trained = stage.trainer(
    plan,
    "finetune",
    name=f"finetune {name}",
    workdir=workdir,
    differs={f"finetune.{key}": value for key, value in differs.items()},
    inputs=(plan.passages, section.questions, *dev, *inputs),
    outputs=(stage.snapshot(workdir, section.steps),),
    sections=("seed", "optimizer", *encoder, "retriever", "finetune"),
  )
  return [trained, _evaluation(plan, name, workdir)] if plan.evaluate.questions else [trained]


def _evaluation(plan: Plan, name: str, workdir: str) -> Stage:
  """Returns the stage that scores a fine-tuned system on the test questions."""
  output = predictions(plan, name)
  return Stage(
    f"evaluate {name}",
    (
      "realm_tf.evaluate",
      f"--workdir={workdir}",
      f"--questions={plan.evaluate.questions}",
      f"--output={output}",
    ),
    inputs=(workdir, plan.evaluate.questions),
    outputs=(output, scores(output)),
    folder=output,
  )


def predictions(plan: Plan, name: str) -> str:
  """Returns the path of a fine-tuned system's predictions."""
  return os.path.join(plan.run_dir, "predictions", f"{name}.jsonl")


def scores(predictions_path: str) -> str:
  """Returns the path of an evaluation's scores, beside its predictions."""
  return os.path.splitext(predictions_path)[0] + ".metrics.json"


# ========================================================================================= serving


def serving_stages(plan: Plan) -> list[Stage]:
  """Returns stages that export a system, and send all test questions to a model server."""
  if not plan.servable:
    return []
  trained = os.path.join(plan.finetune.workdir, "realm") if plan.is_served else plan.realm.workdir
  export = Stage(
    "export",
    ("serving.export", f"--workdir={trained}", f"--output={plan.servable}"),
    inputs=(trained,),
    outputs=(os.path.join(plan.servable, "1"),),
    folder=plan.servable,
  )
  return [export, _served(plan)] if plan.is_served else [export]


def _served(plan: Plan) -> Stage:
  output = predictions(plan, SERVED)
  return Stage(
    "serve",
    (
      "serving.client",
      f"--server=localhost:{PORT}",
      f"--questions={plan.evaluate.questions}",
      f"--output={output}",
      "--timeout_secs=600",
    ),
    server=(
      "serving.model_server",
      f"--model_base_path={os.path.abspath(plan.servable)}",
      "--model_name=realm",
      "--port=0",
    ),
    inputs=(plan.servable, plan.evaluate.questions),
    outputs=(output,),
    folder=output,
  )


# ===================================================================================== new article


def new_article_stages(plan: Plan) -> list[Stage]:
  """Returns the stage that replaces an article of the built-in corpus and asks REALM again."""
  if not (plan.corpus.builtin and "realm" in plan.evaluated):
    return []
  output, workdir = new_article(plan), os.path.join(plan.finetune.workdir, "realm")
  return [
    Stage(
      "new article",
      (
        "realm_tf.replace_article",
        f"--workdir={workdir}",
        f"--predictions={predictions(plan, 'realm')}",
        f"--output={output}",
      ),
      inputs=(plan.passages, workdir, predictions(plan, "realm")),
      outputs=(output,),
      folder=output,
    )
  ]


def new_article(plan: Plan) -> str:
  """Returns the path of the answers before and after an article is replaced."""
  return os.path.join(plan.run_dir, "new_article.json")
