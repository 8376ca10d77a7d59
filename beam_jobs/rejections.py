"""What was rejected, and why: the rows of rejected.jsonl, and sentences about them for people."""

import collections
from collections.abc import Iterable, Mapping

from beam_jobs import sources
from beam_jobs.corpus import Article
from realm_tf import json_lines

_MOST_REASONS = 5  # that one line tells; rejected.jsonl has all


def row(article: Article, file: str) -> dict:
  """What rejected.jsonl says about an article, without the reason.

  The line number counts from the article's chunk: whoever knows the chunks before it adds their lines.
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
  """Reason -> the first row that has it."""
  found = {}
  for found_row in rows:
    found.setdefault(found_row["reason"], found_row)
  return found


def reasons(rows: Iterable[Mapping]) -> str:
  """The most frequent reasons with their counts and the first example of each, on one line."""
  rows = list(rows)
  first = first_by_reason(rows)
  most = collections.Counter(found_row["reason"] for found_row in rows).most_common(_MOST_REASONS)
  return "; ".join(f"{num} {reason}, first {place(first[reason])}" for reason, num in most)


def place(found_row: Mapping) -> str:
  """File and line of a row, and what is wrong there or how it begins."""
  shown = found_row.get("why") or found_row["text"][:60] or found_row["title"][:60]
  return f"{found_row['file']}:{found_row['line']}" + (f" ({shown!r})" if shown else "")


def nothing(inputs: str, rows: Iterable[Mapping]) -> sources.CorpusError:
  """The error for a corpus that gives no passage."""
  told = reasons(rows) or "it is empty"
  return sources.CorpusError(f"--input {inputs!r} gives no passage: {told}; {sources.WANTED}.")
