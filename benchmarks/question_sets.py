"""Question sets with titles: those of a corpus, in halves."""

import hashlib
from collections.abc import Collection

from realm_tf import artifacts, json_lines, metrics

HALVES = ("dev", "test")


def of_titles(path: str, titles: Collection[str]) -> list[dict]:
  """The questions of a file whose title is a passage's; what is left out is counted on stderr.

  Args:
    path: records of `{"question": str, "answer": [str, ..], "title": str, ...}`.
    titles: of the passages, after `metrics.normalize_answer`.

  Raises:
    UserError: no such file.
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
  """The row if its title is a passage's, otherwise the reason against it."""
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
  """The half that a title's questions are in, by the title alone: 0 (dev) or 1 (test)."""
  return hashlib.sha256(title.encode()).digest()[0] % len(HALVES)


def halves_of(path: str, titles: Collection[str]) -> dict[str, list[dict]]:
  """`of_titles` by half.

  Raises:
    UserError: no such file, or a half without questions.
  """
  rows = of_titles(path, titles)
  found = {half: [row for row in rows if HALVES[half_of(row["title"])] == half] for half in HALVES}
  for half, part in found.items():
    if not part:
      raise artifacts.UserError(
        f"the {half} half of {path!r} has no question about these passages, of {len(rows)} in both "
        "halves; give more articles, or questions about them."
      )
  return found
