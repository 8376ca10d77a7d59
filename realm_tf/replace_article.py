"""Replaces one article by one that says something else, and asks the same system again.

    python -m realm_tf.replace_article --workdir=runs/quickstart/finetune/realm \\
        --predictions=runs/quickstart/predictions/realm.jsonl --output=replaced_article.json

REALM, Table 4: knowledge is in the corpus, so it changes without training. The question is one that
the system answered right. In the article that it read, the answer is replaced by the answer to a
similar question. A copy of the corpus takes the new article (`beam_jobs.update_passages`), a copy
of the index embeds it (`beam_jobs.embed_passages`), and the same snapshot answers from both. The
copies are deleted at the end; the system's own corpus and index stay as they are.
"""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Workdir of realm_tf.finetune, dense.", required=True)
  flags.DEFINE_string("predictions", None, "realm_tf.evaluate's --output.", required=True)
  flags.DEFINE_string("output", None, "JSON file to write.", required=True)
  cli.start("realm_tf.replace_article")

from realm_tf.corpus import metrics
from realm_tf.corpus.passages import PassageTable
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts, json_lines, ownership
from realm_tf.systems.results import Answer
from realm_tf.systems.system import load


@dataclasses.dataclass(frozen=True)
class Change:
  """What is asked, and how its article changes.

  Attributes:
    question: the question.
    passage: number of the passage that the answer was read from.
    old: the answer, as written in the passage.
    new: what the passage says instead.
  """

  question: str
  passage: int
  old: str
  new: str


def choose(rows: Sequence[Mapping]) -> Change:
  """Chooses a question, and another answer to it: that of the question most like it.

  A question that was answered right is preferred, and questions are alike if their first words are.

  Args:
    rows: predictions, as written by realm_tf.evaluate.

  Raises:
    UserError: no question was answered from a passage, or all have the same answer.
  """
  answered = [
    row
    for row in rows
    if all(map(row.get, ("question", "prediction", "answer"))) and row.get("read_from") is not None
  ]
  answered.sort(key=lambda row: not metrics.exact_match(row["prediction"], row["answer"]))
  for row in answered:
    question, old = row["question"], row["prediction"]
    others = [other for other in answered if not metrics.exact_match(old, other["answer"])]
    if others:
      alike = max(others, key=lambda other: _num_first_words(question, other["question"]))
      return Change(question, row["read_from"], old, alike["answer"][0])
  raise artifacts.UserError(
    f"of {len(rows)} predictions, {len(answered)} were read from a passage; wanted two of them "
    "with different answers. Use predictions of a dense system."
  )


def _num_first_words(one: str, other: str) -> int:
  """Returns how many words two questions share at their beginning."""
  pairs = zip(one.split(), other.split(), strict=False)
  return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def replace(workdir: str, *, predictions: str, output: str) -> dict:
  """Asks a question before and after its article is replaced.

  Args:
    workdir: a fine-tuned workdir that searches an index.
    predictions: file of its predictions.
    output: JSON file to write.

  Returns:
    What it writes: "question", "title", "new_answer", and "before" and "after", each with the
    "answer" and the "text" of the passage that it was read from; "secs": command → seconds.

  Raises:
    UserError: see `choose`; or a command failed; or the system searches no index.
    ArtifactError: parts of the workdir are missing, or the output would overwrite a file of its.
  """
  ownership.check_file(output, reads=[predictions])
  with artifacts.gfile.GFile(predictions, "rb") as file:
    change = choose([record.row for record in json_lines.read(file) if record.row])
  system = load(workdir)
  opened = system.workdir
  if opened.index is None:
    raise artifacts.UserError(f"{workdir!r} searches no index; give a workdir with a retriever.")
  table, default = opened.table, dataclasses.asdict(IndexConfig())
  if change.passage >= len(table) or change.old not in table.texts[change.passage]:
    raise artifacts.UserError(
      f"{predictions!r} has answers from another corpus: passage {change.passage} of "
      f"{opened.passages!r} does not hold {change.old!r}. Evaluate this workdir again."
    )
  before = system.answer(change.question)
  config = artifacts.read_info(opened.index)["config"]
  changed = {name: value for name, value in config.items() if value != default[name]}
  with tempfile.TemporaryDirectory() as folder:
    passages, index, added = (os.path.join(folder, name) for name in ("P", "E", "article.jsonl"))
    shutil.copytree(opened.passages, passages)
    shutil.copytree(opened.index, index)
    artifacts.write_text(added, "".join(map(json_lines.dumps, new_article(table, change))))
    secs = {
      "update_passages": _run(
        "beam_jobs.update_passages", f"--passages={passages}", f"--add={added}", "--replace"
      ),
      "embed_passages": _run(
        "beam_jobs.embed_passages",
        f"--snapshot={artifacts.find_input(opened.index, 'snapshot')}",
        f"--passages={passages}",
        f"--output={index}",
        *(f"--{name}={value}" for name, value in changed.items()),
      ),
    }
    after = load(workdir, index=index).answer(change.question)
  found = {
    "question": change.question,
    "title": table.titles[change.passage],
    "new_answer": change.new,
    "before": _shown(before),
    "after": _shown(after),
    "secs": secs,
  }
  artifacts.write_text(output, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
  return found


def new_article(table: PassageTable, change: Change) -> list[dict[str, str]]:
  """Returns the passages of the changed article, as input of `update_passages`."""
  document = table.documents[change.passage]
  return [
    {
      "id": document,
      "title": table.titles[number],
      "text": table.texts[number].replace(change.old, change.new),
    }
    for number in table.numbers.tolist()
    if table.documents[number] == document
  ]


def _run(module: str, *args: str) -> float:
  """Runs a command; returns its duration in seconds. Raises UserError if it fails."""
  started = time.monotonic()
  if subprocess.run([sys.executable, "-m", module, *args], check=False).returncode:
    raise artifacts.UserError(f"{module} failed; see its output above.")
  return round(time.monotonic() - started, 1)


def _shown(answer: Answer) -> dict[str, str]:
  return {"answer": answer.text, "text": answer.passage.text if answer.passage else ""}


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  found = replace(args.workdir, predictions=args.predictions, output=args.output)
  before, after = (found[name]["answer"] or "no answer" for name in ("before", "after"))
  print(f"{found['question']} Before: {before}. After: {after}.")
