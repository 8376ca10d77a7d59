"""Measures recall after each stage, and reports it."""

import json
import time
from collections.abc import Iterator, Mapping

import numpy as np

from benchmarks.accelerator.packed import HALVES, Packed, firsts
from benchmarks.real_text import statistics

RECALL_AT = (1, 5, 20)


def ranks(data: Packed, found: np.ndarray) -> np.ndarray:
  """Finds the rank of the first correct passage of each question, from 1; 0 if none was found.

  Args:
    data: the packed data.
    found: [Q, K] passages, best first.

  Returns:
    [2, Q]: by the rule of answers, and by the strict rule.
  """
  answers, stricts = firsts(data.answer_counts), firsts(data.strict_counts)
  right = np.zeros([2, *found.shape], bool)
  for row, numbers in enumerate(found):
    which = data.question_answers[row]
    right[0, row] = np.isin(numbers, data.answer_passages[answers[which] : answers[which + 1]])
    right[1, row] = np.isin(numbers, data.strict_passages[stricts[row] : stricts[row + 1]])
  return np.where(right.any(axis=-1), 1 + right.argmax(axis=-1), 0)


def score(data: Packed, found: np.ndarray) -> dict:
  """Computes recall@k and MRR in percent, by question set and half.

  Returns:
    "entity_questions/dev" → {"questions", "answer@1", .., "answer_mrr", .., "strict_mrr"}. MRR is
    the mean of 1 / rank of the first correct passage, or of 0 if no correct one was found.

  Args:
    data: the packed data.
    found: [Q, K] passages, best first.
  """
  result = {}
  for rows, name in _parts(data):
    part: dict[str, float] = {"questions": int(rows.sum())}
    result[name] = part
    for rule, first in zip(("answer", "strict"), ranks(data, found), strict=True):
      first = first[rows]
      for k in RECALL_AT:
        part[f"{rule}@{k}"] = round(100 * float(((first > 0) & (first <= k)).mean()), 2)
      inverse = np.where(first > 0, 1 / np.maximum(first, 1), 0)
      part[f"{rule}_mrr"] = round(100 * float(inverse.mean()), 2)
  return result


def gains(data: Packed, after: np.ndarray, before: np.ndarray) -> dict:
  """Computes paired differences of recall and MRR, in percent, by question set and half.

  Returns:
    "entity_questions/dev" → {"recall@1": [mean, low, high], .., "MRR": ..}, with the ends of the
    95% bootstrap interval over questions.

  Args:
    data: the packed data.
    after: [Q] ranks, 0 if no correct passage was found.
    before: the same of the retriever that training started from.
  """
  values = [statistics.values_of(np.where(rank > 0, rank, np.inf)) for rank in (after, before)]
  result = {}
  for rows, name in _parts(data):
    difference = (values[0] - values[1])[None, rows]  # [1, q, M]
    found = statistics.estimate(difference, statistics.draw(int(rows.sum())))
    result[name] = {
      metric: [round(100 * float(end), 2) for end in (mean, low, high)]
      for metric, mean, low, high in zip(
        statistics.METRICS, found.mean, found.low, found.high, strict=True
      )
    }
  return result


def _parts(data: Packed) -> Iterator[tuple[np.ndarray, str]]:
  """Yields which questions, [Q] bool, are in each set's half, and its name."""
  for at, name in enumerate(data.facts["sets"]):
    for half, half_name in enumerate(HALVES):
      rows = (data.question_sets == at) & (data.question_halves == half)
      if rows.any():
        yield rows, f"{name}/{half_name}"


class Report:
  """Prints results and writes them after each row, so that an interrupted run keeps its results.

  The ranks of single questions are written and not printed.

  Args:
    path: JSON file to write.
    facts: facts about the whole run.
  """

  def __init__(self, path: str, facts: Mapping):
    self.path, self.facts, self.started = path, dict(facts), time.monotonic()
    self.rows: list[dict] = []

  def __call__(self, row: dict) -> None:
    self.rows.append(row | {"at_secs": round(time.monotonic() - self.started, 1)})
    with open(self.path, "w") as file:
      json.dump(self.facts | {"rows": self.rows}, file, indent=1)
    print(json.dumps({k: v for k, v in self.rows[-1].items() if k != "ranks"}), flush=True)
