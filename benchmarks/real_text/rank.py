"""Finds the rank at which a retriever returns the first correct passage for each question.

    python -m benchmarks.real_text.rank --passages=P --questions=Q.jsonl --output=DIR     # BM25
    python -m benchmarks.real_text.rank --passages=P --questions=Q.jsonl --output=DIR \\
        --snapshot=S --index=I

Search is exact. --questions takes files separated by commas; a file of the same name is written to
DIR for each. All tables are made from these files.
"""

import os
from collections.abc import Mapping, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("passages", None, "The passages folder.", required=True)
  flags.DEFINE_list("questions", None, 'Files of {"question", "answer", "title"}.', required=True)
  flags.DEFINE_string("output", None, "Folder to write the ranks to.", required=True)
  flags.DEFINE_string("snapshot", "", "The snapshot with the retriever; by default BM25 is used.")
  flags.DEFINE_string("index", "", "The index of the snapshot.")
  cli.start("benchmarks.real_text.rank")

import numpy as np

from realm_tf.corpus import metrics, passages
from realm_tf.corpus.passages import PassageTable
from realm_tf.examples import questions
from realm_tf.models import snapshots
from realm_tf.retrieval import dense, index
from realm_tf.storage import artifacts, json_lines

DEPTH = 100  # passages to retrieve; a correct one further down counts as not found
RULES = {  # which passages are correct → the field of a line
  "answer": "answer_rank",  # a passage that holds an answer
  "strict": "strict_rank",  # one that also has the title of the question
}


def read_rows(path: str) -> list[dict]:
  """Reads the lines of a file written by this benchmark."""
  with artifacts.gfile.GFile(path, "rb") as file:
    return [record.row for record in json_lines.read(file) if record.row is not None]


def read_ranks(rows: Sequence[Mapping]) -> dict[str, np.ndarray]:
  """Returns rule → ranks [N] float64 from lines of ranks; inf if no correct passage was found."""
  return {
    rule: np.array([row[field] or np.inf for row in rows], np.float64)
    for rule, field in RULES.items()
  }


def ranked(
  rows: Sequence[Mapping], numbers: Sequence[np.ndarray], table: PassageTable
) -> list[dict]:
  """Returns lines of ranks.

  Args:
    rows: questions with answers and titles.
    numbers: numbers of the passages found for each, [K], best first.
    table: all passages.
  """
  matcher, found = metrics.AnswerMatcher(table.texts), []
  titles = [metrics.normalize_answer(title) for title in table.titles]
  for row, near in zip(rows, numbers, strict=True):
    holds, title = matcher.has_answer(near, row["answer"]), metrics.normalize_answer(row["title"])
    own = np.array([number >= 0 and titles[number] == title for number in near])
    ranks = {"answer": holds, "strict": holds & own}
    ranks = {field: _rank(ranks[rule]) for rule, field in RULES.items()}
    found.append({"question": row["question"], "title": row["title"], **ranks})
  return found


def _rank(right: np.ndarray) -> int | None:
  """Returns the rank of the first correct passage, from 1."""
  return int(right.argmax()) + 1 if right.any() else None


def _bm25_search(rows: Sequence[Mapping], table: PassageTable, num: int) -> list[np.ndarray]:
  from realm_tf.retrieval import bm25  # here, because it imports JAX

  searcher, texts = bm25.Bm25Searcher(table), [row["question"] for row in rows]
  return dense.search_all(lambda part: searcher.search(texts[part], num), len(rows))


def _dense_search(
  rows: Sequence[Mapping], table: PassageTable, num: int, *, snapshot: str, index_folder: str
) -> list[np.ndarray]:
  searcher = index.load(index_folder, snapshot=snapshot, passages=table.folder, searcher="exact")
  retriever = snapshots.load_retriever(snapshot)
  step = artifacts.step_of(snapshot)
  indexed = dense.IndexedRetriever(retriever, searcher, table, step, index_folder)
  asked = [questions.Question(row["question"], row["answer"]) for row in rows]
  tokenizer = passages.load_tokenizer(table.folder)
  questions.tell_cut(tokenizer.lengths([row.text for row in asked]), length=retriever.query_length)
  ids = questions.packed_questions(asked, tokenizer=tokenizer, length=retriever.query_length)
  return dense.search_all(lambda part: indexed.search(ids[part], num), len(rows))


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  table = passages.load(args.passages)
  sets = {os.path.basename(path): read_rows(path) for path in args.questions}
  rows, num = [row for part in sets.values() for row in part], min(DEPTH, table.num_alive)
  if args.snapshot:
    numbers = _dense_search(rows, table, num, snapshot=args.snapshot, index_folder=args.index)
  else:
    numbers = _bm25_search(rows, table, num)
  lines = iter(ranked(rows, numbers, table))
  artifacts.gfile.makedirs(args.output)
  for name, part in sets.items():
    text = "".join(json_lines.dumps(next(lines)) for _ in part)
    artifacts.write_text(os.path.join(args.output, name), text)
