"""Summary of a run: gathers all scores in one file and shows them."""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import tabulate

from realm_tf import progress
from realm_tf.pipeline import open_qa
from realm_tf.pipeline.plan import Plan
from realm_tf.storage import artifacts, json_lines

SUMMARY = "summary.json"
PLOT = "training.png"


def summarize(plan: Plan, wall_secs: Mapping[str, float]) -> dict:
  """Gathers the scores of all stages for summary.json.

  Scores of stages that the plan does not have are left out.

  Args:
    plan: plan of the run.
    wall_secs: stage → how long it took.
  """
  found: dict[str, Any] = {
    "zero_shot_recall_at_5": _zero_shot(plan, "questions") if plan.evaluate.questions else {},
    "zero_shot_cloze_recall_at_5": _zero_shot(plan, "clozes") if plan.evaluate.clozes else {},
    "exact_match": {},
    "recall_at_5": {},
  }
  for system in plan.evaluated:
    scores = json.loads(artifacts.read_text(open_qa.scores(open_qa.predictions(plan, system))))
    for name in ("exact_match", "recall_at_5"):
      if name in scores:
        found[name][system] = round(scores[name], 4)
  last = progress.read_metrics(plan.realm.workdir)[-1]
  for name in ("refreshes", "steps_during_refreshes", "max_index_age_steps", "max_staleness_steps"):
    found[name] = int(last[name])
  found["wall_secs"] = {name: round(secs, 1) for name, secs in wall_secs.items()}
  if open_qa.new_article_stages(plan):
    found["new_article"] = json.loads(artifacts.read_text(open_qa.new_article(plan)))
  return found | _shown_answers(plan)


def _zero_shot(plan: Plan, kind: str) -> dict[str, float]:
  """Returns zero-shot recall@5 by system."""
  found = {}
  for system in (plan.start_of_realm, "realm", "bm25"):
    scores = json.loads(artifacts.read_text(open_qa.zero_shot_scores(plan, kind, system)))
    found[system] = round(scores["recall_at_5"], 4)
  return found


def _shown_answers(plan: Plan) -> dict[str, Any]:
  """Returns answers of the model server, or else of the last system, if there are any."""
  if plan.is_served:
    answers = _answers(open_qa.predictions(plan, open_qa.SERVED), plan.evaluate.num_answers)
    return {"answers": answers, **({"answer": answers[0]} if answers else {})}
  if plan.evaluated:
    last = open_qa.predictions(plan, plan.evaluated[-1])
    return {"answers": _answers(last, plan.evaluate.num_answers)}
  return {"answers": []}


def _answers(path: str, count: int) -> list[dict]:
  """Returns some predictions, right or wrong, spread evenly over the file."""
  with artifacts.gfile.GFile(path, "rb") as file:
    rows = [record.row for record in json_lines.read(file) if record.row]
  found = []
  for row in rows[len(rows) // (2 * max(count, 1)) :: max(1, len(rows) // max(count, 1))][:count]:
    numbers = [passage["number"] for passage in row["passages"]]
    found.append(
      {
        "question": row["question"],
        "answer": row["prediction"],
        "wanted": row["answer"],
        "read_from": numbers.index(row["read_from"])
        if row["read_from"] in numbers
        else None,  # position in the passages
        "byte_span": row["byte_span"],
        "passages": [
          {name: passage[name] for name in ("title", "text", "score")}
          for passage in row["passages"]
        ],
      }
    )
  return found


def table_of(summary: Mapping) -> str:
  """Formats the scores as a table, in percent."""
  names = {
    "zero-shot recall@5": "zero_shot_recall_at_5",
    "zero-shot cloze recall@5": "zero_shot_cloze_recall_at_5",
    "fine-tuned recall@5": "recall_at_5",
    "exact match": "exact_match",
  }
  columns = {title: summary[name] for title, name in names.items() if summary[name]}
  systems = [
    system
    for system in ("closed_book", "bm25", "ict", "recurring_spans", "realm")
    if any(system in scores for scores in columns.values())
  ]
  rows = [
    [
      system.replace("_", " "),
      *(100 * scores[system] if system in scores else None for scores in columns.values()),
    ]
    for system in systems
  ]
  return tabulate.tabulate(rows, ["%", *columns], floatfmt=".1f", missingval="-") if rows else ""


def describe(answer: Mapping, *, bold: bool) -> str:
  """Formats a question and its answer, with the answer marked in the passage it was read from."""
  begin, end = ("\033[1m", "\033[0m") if bold else ("[", "]")
  lines = [
    f"Q: {answer['question']}",
    f"A: {answer['answer'] or '(none)'}   (wanted: {' / '.join(answer['wanted'])})",
  ]
  if answer["read_from"] is not None:
    passage, (start, stop) = answer["passages"][answer["read_from"]], answer["byte_span"]
    text = passage["text"].encode()
    marked = f"{text[:start].decode()}{begin}{text[start:stop].decode()}{end}{text[stop:].decode()}"
    lines.append(f"   {passage['title']}: {marked}")
  return "\n".join(lines)


def describe_new_article(found: Mapping) -> str:
  """Formats the answers before and after an article is replaced."""
  secs = sum(found["secs"].values())
  lines = [
    f"Then the article {found['title']!r} was replaced, without training, in {secs:.0f} s.",
    f"Q: {found['question']}",
  ]
  for when in ("before", "after"):
    answer = found[when]
    lines.append(f"A {when}: {answer['answer'] or '(none)'}, read in: {answer['text']}")
  return "\n".join(lines)


def describe_refreshes(summary: Mapping) -> str:
  """Formats how old the index was that REALM trained with."""
  age = f"at most {summary['max_index_age_steps']} steps old"
  if not summary["refreshes"]:
    return f"REALM trained with its first index, which was {age}."
  plural = "" if summary["refreshes"] == 1 else "es"
  return (
    f"{summary['refreshes']} index refresh{plural} ran during {summary['steps_during_refreshes']} "
    f"training steps; the index in use was {age}, and at most {summary['max_staleness_steps']} "
    "behind the newest snapshot."
  )


def show(summary: Mapping, run_dir: str) -> None:
  """Prints the summary."""
  secs = summary["wall_secs"]
  print(f"\n{table_of(summary)}\n\n{describe_refreshes(summary)}")
  print(
    f"{sum(secs.values()) / 60:.1f} minutes, most in: "
    + ", ".join(
      f"{name} {secs[name]:.0f} s" for name in sorted(secs, key=secs.get, reverse=True)[:4]
    )
  )
  for answer in summary["answers"]:
    print("\n" + describe(answer, bold=sys.stdout.isatty()))
  if "new_article" in summary:
    print("\n" + describe_new_article(summary["new_article"]))
  print(f"\n{os.path.join(run_dir, SUMMARY)}\n{os.path.join(run_dir, PLOT)}", flush=True)
