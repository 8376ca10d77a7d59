"""Rejected articles and the reasons: the rows of rejected.jsonl, and readable summaries of them."""

import collections
from collections.abc import Iterable, Mapping

from beam_jobs import sources
from beam_jobs.corpus import Article
from realm_tf.storage import json_lines

_MOST_REASONS = 5  # shown on one line; rejected.jsonl has all


def row(article: Article, file: str) -> dict:
  """Returns the row of rejected.jsonl for an article, without the reason.

  The line number counts from the beginning of the article's chunk; the caller must add the lines of
  the preceding chunks.
  """
  return {
    "file": file,
    "line": article.line,
    "at": article.at,
    "title": article.title[: json_lines.SHOWN_CHARS],
    "text": article.text[: json_lines.SHOWN_CHARS],
    **({"why": article.why} if article.why else {}),
  }


def first_by_reason(rows: Iterable[Mapping]) -> dict[str, Mapping]:
  """Returns reason -> the first row with that reason."""
  found: dict[str, Mapping] = {}
  for found_row in rows:
    found.setdefault(found_row["reason"], found_row)
  return found


def reasons(rows: Iterable[Mapping]) -> str:
  """Lists the most frequent reasons, with the count and first example of each, on one line."""
  rows = list(rows)
  first = first_by_reason(rows)
  most = collections.Counter(found_row["reason"] for found_row in rows).most_common(_MOST_REASONS)
  return "; ".join(f"{num} {reason}, first {place(first[reason])}" for reason, num in most)


def place(found_row: Mapping) -> str:
  """Returns the file and line of a row, with what is wrong there or how the text begins."""
  shown = found_row.get("why") or found_row["text"][:60] or found_row["title"][:60]
  return f"{found_row['file']}:{found_row['line']}" + (f" ({shown!r})" if shown else "")


def nothing(inputs: str, rows: Iterable[Mapping]) -> sources.CorpusError:
  """Returns the error for a corpus that gives no passage."""
  told = reasons(rows) or "it is empty"
  return sources.CorpusError(f"--input {inputs!r} gives no passage: {told}; {sources.WANTED}.")
