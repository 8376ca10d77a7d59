"""At which rank a retriever finds the first right passage of each question.

    python -m benchmarks.real_text.rank --passages=P --questions=Q.jsonl --output=DIR     # BM25
    python -m benchmarks.real_text.rank --passages=P --questions=Q.jsonl --output=DIR \\
        --snapshot=S --index=I

Search is exact. DIR gets a file of the same name for each of the question files, which are
separated by commas. All tables come from these files.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

from realm_tf import (
  artifacts,
  index,
  json_lines,
  metrics,
  passages,
  questions,
  retrieval,
  settings,
  snapshots,
)
from realm_tf.passages import PassageTable

DEPTH = 100  # passages searched for; a right one further down counts as not found
RULES = {  # what is right → the field of a line
  "answer": "answer_rank",  # a passage that holds an answer
  "strict": "strict_rank",  # one that has the question's own title besides
}


def read_rows(path: str) -> list[dict]:
  """The lines of a file that this benchmark wrote."""
  with artifacts.gfile.GFile(path, "rb") as file:
    return [record.row for record in json_lines.read(file)]


def read_ranks(rows: Sequence[Mapping]) -> dict[str, np.ndarray]:
  """Rule → ranks [N] float64 from lines of ranks; inf where nothing right was found."""
  return {
    rule: np.array([row[field] or np.inf for row in rows], np.float64)
    for rule, field in RULES.items()
  }


def ranked(
  rows: Sequence[Mapping], numbers: Sequence[np.ndarray], table: PassageTable
) -> list[dict]:
  """Lines of ranks.

  Args:
    rows: questions with answers and titles.
    numbers: of the passages found for each, [K], best first.
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
  """The first right one, from 1."""
  return int(right.argmax()) + 1 if right.any() else None


def _bm25_search(rows: Sequence[Mapping], table: PassageTable, num: int) -> list[np.ndarray]:
  from realm_tf import bm25  # with JAX in its train, which a dense retriever does without

  searcher, texts = bm25.Bm25Searcher(table), [row["question"] for row in rows]
  return retrieval.search_all(lambda part: searcher.search(texts[part], num), len(rows))


def _dense_search(
  rows: Sequence[Mapping], table: PassageTable, num: int, *, snapshot: str, index_folder: str
) -> list[np.ndarray]:
  searcher = index.load(index_folder, snapshot=snapshot, passages=table.folder, searcher="exact")
  retriever = snapshots.load_retriever(snapshot)
  indexed = retrieval.IndexedRetriever(
    retriever, searcher, artifacts.step_of(snapshot), index_folder
  )
  asked = [questions.Question(row["question"], row["answer"]) for row in rows]
  tokenizer = settings.tokenizer(table.folder)
  questions.tell_cut(tokenizer.lengths([row.text for row in asked]), length=retriever.query_length)
  ids = questions.packed_questions(asked, tokenizer=tokenizer, length=retriever.query_length)
  return retrieval.search_all(lambda part: indexed.search(ids[part], num), len(rows))


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  table = passages.load(args.passages)
  sets = {os.path.basename(path): read_rows(path) for path in args.questions}
  rows, num = [row for part in sets.values() for row in part], min(DEPTH, len(table))
  if args.snapshot:
    numbers = _dense_search(rows, table, num, snapshot=args.snapshot, index_folder=args.index)
  else:
    numbers = _bm25_search(rows, table, num)
  lines = iter(ranked(rows, numbers, table))
  artifacts.gfile.makedirs(args.output)
  for name, part in sets.items():
    text = "".join(json_lines.dumps(next(lines)) for _ in part)
    artifacts.write_text(os.path.join(args.output, name), text)


if __name__ == "__main__":
  flags.DEFINE_string("passages", None, "The passages folder.", required=True)
  flags.DEFINE_list("questions", None, 'Files of {"question", "answer", "title"}.', required=True)
  flags.DEFINE_string("output", None, "Folder for the ranks.", required=True)
  flags.DEFINE_string("snapshot", "", "Whose retriever; BM25, if there is none.")
  flags.DEFINE_string("index", "", "The snapshot's index.")
  settings.start(main)
