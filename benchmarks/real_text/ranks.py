"""At which rank each retriever finds the first right passage: files that all tables come from."""

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks import question_sets
from benchmarks.question_sets import HALVES
from realm_tf import (
  artifacts, bm25, index, json_lines, metrics, passages, pretrain, questions, retrieval, settings,
  snapshots)

KIND = "ranks"
DEPTH = 100  # passages searched for; a right one further down counts as not found
RULES = {  # of what is right → the field of a line
  "answer": "answer_rank",  # the passage holds an answer
  "strict": "strict_rank",  # and has the question's own title
}


class Scorer:
  """Ranks the passages of one corpus for its question sets.

  Args:
    folder: of the passages.
    files: question set → its file.
    output: folder for the sets' halves.

  Attributes:
    sets: question set → half → rows `{"question", "answer", "title", ...}`.

  Raises:
    UserError: a file is missing, or a half has no question about these passages.
  """

  def __init__(self, folder: str, files: Mapping[str, str], *, output: str):
    self.folder, self.table = folder, passages.load(folder)
    self.tokenizer = settings.tokenizer(folder)
    self._titles = [metrics.normalize_answer(title) for title in self.table.titles]
    self._matcher = metrics.AnswerMatcher(self.table.texts)
    known = set(self._titles)
    self.sets = {name: _halves(path, known) for name, path in files.items()}
    for name, halves in self.sets.items():
      for half, rows in halves.items():
        path = os.path.join(output, f"{name}.{half}.jsonl")
        artifacts.write_text(path, "".join(map(json_lines.dumps, rows)))

  def tell_cut(self, *, length: int) -> None:
    """Says on stderr how many questions do not fit in so many word pieces."""
    texts = [row["question"] for halves in self.sets.values() for rows in halves.values()
             for row in rows]
    questions.tell_cut(self.tokenizer.lengths(texts), length=length)

  def write(self, output: str, half: str, inputs: Mapping[str, str], open_search: Callable) -> None:
    """Writes a file of ranks for each set, unless the same inputs gave those that are there.

    Args:
      output: folder.
      inputs: the artifacts that rank, by kind.
      open_search: opens the retriever: () → (rows, num) → passage numbers [N, K], best first.
    """
    what = {"kind": KIND, "config": self._config(half), "inputs": inputs}
    if artifacts.is_current(output, **what):
      return
    search = open_search()
    with artifacts.publish(output, **what) as staged:
      for name, halves in self.sets.items():
        numbers = search(halves[half], min(DEPTH, len(self.table)))
        lines = [self._line(row, found) for row, found in zip(halves[half], numbers, strict=True)]
        artifacts.write_text(_file(staged.path, name), "".join(map(json_lines.dumps, lines)))
        staged.counts[name] = len(lines)

  def read(self, folder: str, half: str) -> dict[str, dict[str, np.ndarray]]:
    """Set → rule → ranks [N] float64, inf where nothing right was found; nothing where there is no file.

    Ranks of other questions count as not there.
    """
    if not artifacts.is_complete(folder):
      return {}
    info = artifacts.read_info(folder, kind=KIND)
    if artifacts.fingerprint_of(info["config"]) != artifacts.fingerprint_of(self._config(half)):
      return {}
    found = {}
    for name in self.sets:
      with artifacts.gfile.GFile(_file(folder, name), "rb") as file:
        rows = [record.row for record in json_lines.read(file)]
      found[name] = {rule: np.array([row[field] or np.inf for row in rows], np.float64)
                     for rule, field in RULES.items()}
    return found

  def _config(self, half: str) -> dict:
    """What ranks depend on besides the retriever."""
    asked = {name: artifacts.fingerprint_of(halves[half]) for name, halves in self.sets.items()}
    return {"depth": DEPTH, "half": half, "questions": asked}

  def _line(self, row: Mapping, numbers: np.ndarray) -> dict:
    holds = self._matcher.has_answer(numbers, row["answer"])
    title = metrics.normalize_answer(row["title"])
    own = np.array([number >= 0 and self._titles[number] == title for number in numbers])
    ranks = {"answer": _rank(holds), "strict": _rank(holds & own)}
    return {"question": row["question"], "title": row["title"],
            **{field: ranks[rule] for rule, field in RULES.items()}}

  def bm25_search(self) -> Callable:
    """BM25 over these passages, for `write`."""
    searcher = bm25.Bm25Searcher(self.table)
    return lambda rows, num: retrieval.search_all(
      lambda part: searcher.search([row["question"] for row in rows[part]], num), len(rows))

  def dense_search(self, snapshot: str, folder: str) -> Callable:
    """Exact search of a snapshot's index, for `write`.

    Raises:
      ArtifactError: the index was made from another snapshot or from other passages.
    """
    searcher = index.load(folder, snapshot=snapshot, passages=self.folder, searcher="exact")
    indexed = retrieval.IndexedRetriever(
      snapshots.load_retriever(snapshot), searcher, artifacts.step_of(snapshot), folder)

    def search(rows: Sequence[Mapping], num: int) -> list[np.ndarray]:
      asked = [questions.Question(row["question"], row["answer"]) for row in rows]
      ids = questions.packed_questions(
        asked, tokenizer=self.tokenizer, length=indexed.retriever.query_length)
      return retrieval.search_all(lambda part: indexed.search(ids[part], num), len(rows))

    return search


def newest_index(config, workdir: str) -> tuple[str, str]:
  """A trainer's newest snapshot and its index, which is made if it is not there.

  Raises:
    UserError: the job that makes it failed.
  """
  snapshot = snapshots.newest(workdir, advice="run the same command again.")
  folder = index.folder_of(workdir, snapshot)
  if not artifacts.is_complete(folder):
    roots = {name: os.path.join(workdir, name) for name in ("snapshots", "indexes")}
    pretrain.make_index(config, snapshots_root=roots["snapshots"], indexes=roots["indexes"])
  return snapshot, folder


def _file(folder: str, name: str) -> str:
  return os.path.join(folder, f"{name}.jsonl")


def _halves(path: str, titles: set[str]) -> dict[str, list[dict]]:
  rows = question_sets.of_titles(path, titles)
  found = {half: [row for row in rows if HALVES[question_sets.half_of(row["title"])] == half]
           for half in HALVES}
  for half, part in found.items():
    if not part:
      raise artifacts.UserError(
        f"the {half} half of {path!r} has no question about these passages ({len(rows)} are in the "
        "other half); give more articles, or questions about them.")
  return found


def _rank(right: np.ndarray) -> int | None:
  """The first right one, from 1."""
  return int(right.argmax()) + 1 if right.any() else None
