"""Question sets with titles: selects the questions about a corpus and splits them into halves."""

import hashlib
from collections.abc import Collection

from realm_tf.corpus import metrics
from realm_tf.storage import artifacts, json_lines

HALVES = ("dev", "test")


def of_titles(path: str, titles: Collection[str]) -> list[dict]:
  """Returns the questions whose title is that of a passage; others are counted on stderr.

  Args:
    path: file of records `{"question": str, "answer": [str, ..], "title": str, ...}`.
    titles: titles of the passages, after `metrics.normalize_answer`.

  Raises:
    UserError: there is no such file.
  """
  if not artifacts.gfile.exists(path):
    raise artifacts.UserError(
      f'no file {path!r}; wanted lines of {{"question", "answer", "title"}}.'
    )
  with artifacts.gfile.GFile(path, "rb") as file:
    kept, bad = json_lines.parsed(file, lambda row: _question_of(row, titles))
  json_lines.tell(path, bad, num_kept=len(kept))
  return kept


def _question_of(row: dict, titles: Collection[str]) -> dict | str:
  """Returns the row if its title is that of a passage, otherwise the reason to skip it."""
  texts, answers = [row.get("question"), row.get("title")], row.get("answer")
  if not all(isinstance(text, str) for text in texts):
    return "question or title is not text"
  if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
    return "the answer is not a list of text"
  if not all(map(json_lines.is_writable, [*texts, *answers])):
    return json_lines.HALF_A_PAIR
  if not any(map(str.strip, answers)):
    return "there is no answer"
  if metrics.normalize_answer(row["title"]) not in titles:
    return "no passage has its title"
  return row


def half_of(title: str) -> int:
  """Returns the half that questions with a title belong to: 0 (dev) or 1 (test)."""
  return hashlib.sha256(title.encode()).digest()[0] % len(HALVES)


def halves_of(path: str, titles: Collection[str]) -> dict[str, list[dict]]:
  """Returns the questions of `of_titles` by half.

  Raises:
    UserError: there is no such file, or a half has no questions.
  """
  rows = of_titles(path, titles)
  found = {half: [row for row in rows if HALVES[half_of(row["title"])] == half] for half in HALVES}
  for half, part in found.items():
    if not part:
      raise artifacts.UserError(
        f"the {half} half of {path!r} has no question about these passages (both halves have "
        f"{len(rows)}); add articles, or questions about them."
      )
  return found
