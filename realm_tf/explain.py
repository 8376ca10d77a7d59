"""Explains one prediction: the passages retrieved, their contributions, and the combined result.

    python -m realm_tf.explain --workdir=W --text='The [MASK] of France is Paris.' --output=DIR
    python -m realm_tf.explain --workdir=W --text='The [MASK] of France is Paris.' \\
        --answer=capital --index=OLD --index=NEW
    python -m realm_tf.explain --workdir=W/finetune --question='who wrote hamlet'

W is a pre-trained workdir for --text, a fine-tuned one for --question. For a text, the command
shows REALM's Table 3: the filling y (--answer, or the model's own), p(y|x) without retrieval, and
for each candidate p(z|x), p(y|z,x), its retrieval utility and the passage with y marked. With
several indexes, made from several corpora with one snapshot, it shows REALM's Table 4. explain.json
and explain.html are written to --output.
"""

import dataclasses
import json
import os
from collections.abc import Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "A trainer's workdir.", required=True)
  flags.DEFINE_string("text", None, "A text with [MASK], for a pre-trained workdir.")
  flags.DEFINE_string(
    "answer",
    None,
    "y, the text in place of [MASK]; the most probable filling by default.",
  )
  flags.DEFINE_string("question", None, "A question, for a fine-tuned workdir.")
  flags.DEFINE_multi_string(
    "index", None, "An index instead of the workdir's own; repeat the flag to compare corpora."
  )
  flags.DEFINE_integer(
    "num_candidates", 8, "Candidates of a text, including the null passage.", lower_bound=1
  )
  flags.DEFINE_string("output", None, "Folder for explain.json and explain.html.")
  cli.start("realm_tf.explain")

from rich.console import Console

from realm_tf.corpus.vocabularies import MASK
from realm_tf.storage import artifacts
from realm_tf.systems import explanation_page, explanations
from realm_tf.systems.explanations import Report
from realm_tf.systems.mask_filling import MaskFilling
from realm_tf.systems.question_answering import QuestionAnswering
from realm_tf.systems.question_explanation import explain_question
from realm_tf.systems.workdir import (
  CLOSED_BOOK,
  SnapshotInfo,
  Workdir,
  newest_indexed_snapshot,
  newest_snapshot,
  open_workdir,
)

_PUT_BACK = "Put them back, or make the index again with beam_jobs.embed_passages."


def open_pretrained(workdir: str, index_folders: Sequence[str] = ()) -> list[Workdir]:
  """Opens a pre-trained workdir with each index; by default, with its newest index.

  Raises:
    ArtifactError: parts are missing, or do not belong together.
    UserError: the workdir is of another kind.
  """
  snapshot = newest_indexed_snapshot(workdir, advice="give the workdir of realm_tf.pretrain.")
  if snapshot.is_fine_tuned:
    raise artifacts.UserError(
      f"{workdir!r} is fine-tuned for questions: give a --question, or a pre-trained workdir."
    )
  return _over_each(index_folders, workdir, snapshot)


def open_fine_tuned(workdir: str, index_folders: Sequence[str] = ()) -> list[Workdir]:
  """Opens a fine-tuned workdir with each index; by default, with the one it was fine-tuned with.

  Raises:
    ArtifactError: parts are missing, or do not belong together.
    UserError: the workdir is of another kind.
  """
  snapshot = newest_snapshot(workdir, advice="give the workdir of realm_tf.finetune.")
  if not snapshot.is_fine_tuned:
    raise artifacts.UserError(
      f"{workdir!r} is not fine-tuned for questions: give a --text with {MASK}, or a "
      "fine-tuned workdir."
    )
  if snapshot.retrieval == CLOSED_BOOK:
    raise artifacts.UserError(
      f"{workdir!r} answers closed-book: there are no passages to explain its answers by. Give a "
      "workdir fine-tuned with retrieval."
    )
  return _over_each(index_folders, workdir, snapshot)


def _over_each(index_folders: Sequence[str], workdir: str, snapshot: SnapshotInfo) -> list[Workdir]:
  folders: Sequence[str | None] = index_folders or [None]
  return [
    open_workdir(workdir, index_folder=folder, snapshot=snapshot, passages_advice=_PUT_BACK)
    for folder in folders
  ]


def explain(
  workdir: str,
  *,
  text: str | None = None,
  question: str | None = None,
  answer: str | None = None,
  index_folders: Sequence[str] = (),
  num_candidates: int = 8,
) -> Report:
  """Explains one text or one question.

  Raises:
    UserError: neither or both are given, or one that the system cannot take.
    ArtifactError: parts are missing, or do not belong together.
  """
  if text is not None and question is None:
    system = MaskFilling(open_pretrained(workdir, index_folders))
    return system.explain(text, answer=answer, num_candidates=num_candidates)
  if text is not None or question is None:
    raise artifacts.UserError("give either --text or --question.")
  if answer is not None:
    raise artifacts.UserError(
      "--answer goes with --text: a question is answered by the system itself."
    )
  systems = [QuestionAnswering(opened) for opened in open_fine_tuned(workdir, index_folders)]
  return explain_question(systems, question)


def main(argv):
  del argv
  args = flags.FLAGS
  if args.output:
    artifacts.gfile.makedirs(args.output)
  report = explain(
    args.workdir,
    text=args.text,
    question=args.question,
    answer=args.answer,
    index_folders=args.index or (),
    num_candidates=args.num_candidates,
  )
  explanations.print_report(report, Console(highlight=False))
  if args.output:
    artifacts.write_text(
      os.path.join(args.output, "explain.json"),
      json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n",
    )
    artifacts.write_text(
      os.path.join(args.output, "explain.html"), explanation_page.html_page(report)
    )
