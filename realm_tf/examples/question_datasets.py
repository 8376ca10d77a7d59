"""Parsers of questions in the formats of the published datasets."""

import ast
import csv
import dataclasses
import html.parser
import re
from collections.abc import Callable, Sequence

from realm_tf.storage import (
  json_lines,
)

MAX_ANSWER_TOKENS = 5  # in Natural Questions' own tokenization
_MAX_MARKUP_BYTES = 10_000
_MAX_LITERAL_CHARS = 100_000
_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^"()]*))\)')
_TAG = re.compile(r"<[^<>]+>")
# A record with one of these keys is a question.
QUESTION_KEYS = {
  "question",
  "question_text",
  "utterance",
  "qText",
}


class Rejected(Exception):
  """Raised for a record that yields no question; the message is the reason."""


def _natural_question(row: dict) -> dict:
  """Takes every short answer of at most 5 tokens, by any annotator (ORQA's rule)."""
  short = _short(
    [answer for annotation in row["annotations"] for answer in annotation["short_answers"]]
  )
  if "document_html" in row:
    page = row["document_html"].encode()
    answers = [_text_of(page[answer["start_byte"] : answer["end_byte"]]) for answer in short]
  else:
    tokens = (
      row["document_text"].split(" ")
      if "document_text" in row
      else ["" if token["html_token"] else token["token"] for token in row["document_tokens"]]
    )
    spans = [tokens[answer["start_token"] : answer["end_token"]] for answer in short]
    answers = [
      " ".join(token for token in span if token and not _TAG.fullmatch(token)) for span in spans
    ]
  return {"question": row["question_text"], "answer": answers}


def _short(given: Sequence[dict]) -> list[dict]:
  short = [
    answer for answer in given if answer["end_token"] - answer["start_token"] <= MAX_ANSWER_TOKENS
  ]
  if not short:
    raise Rejected(
      f"every short answer has over {MAX_ANSWER_TOKENS} tokens"
      if given
      else "there is no short answer"
    )
  return short


def hub_natural_question(row: dict) -> dict:
  """Parses Natural Questions as Hugging Face's `datasets` writes it.

  There, the question is an object, and lists of objects are objects of lists.
  """
  annotations = row["annotations"]
  by_annotator = (
    annotations["short_answers"]
    if isinstance(annotations, dict)
    else [one["short_answers"] for one in annotations]
  )
  short = _short([answer for answers in by_annotator for answer in _objects(answers)])
  return {"question": row["question"]["text"], "answer": [answer["text"] for answer in short]}


def _objects(lists) -> list[dict]:
  """Turns {"a": [1, 2], "b": [3, 4]} into [{"a": 1, "b": 3}, {"a": 2, "b": 4}]; keeps a list."""
  if not isinstance(lists, dict):
    return lists
  # Not strict: the lists come from a user's file, and a damaged one must not end the program.
  rows = zip(*lists.values(), strict=False)
  return [dict(zip(lists, values, strict=True)) for values in rows]


class _TextParser(html.parser.HTMLParser):
  """Collects the text of a piece of HTML."""

  def __init__(self):
    super().__init__()
    self.text = ""

  def handle_data(self, data: str) -> None:
    self.text += data


def _text_of(markup: bytes) -> str:
  """Returns the text of a piece of HTML."""
  if len(markup) > _MAX_MARKUP_BYTES:  # Python's parser takes quadratic time on broken HTML
    raise Rejected(f"a short answer has over {_MAX_MARKUP_BYTES:,} bytes of HTML")
  parser = _TextParser()
  parser.feed(markup.decode())
  parser.close()
  return parser.text


def _web_question(row: dict) -> dict:
  """Parses WebQuestions.

  `targetValue` is Lisp: (list (description Jamaica) (description "Jamaican English")).
  """
  answers = [
    re.sub(r"\\(.)", r"\1", quoted) or plain
    for quoted, plain in _DESCRIPTION.findall(row["targetValue"])
  ]
  return {"question": row["utterance"], "answer": answers}


def trec_question(row: Sequence[str]) -> dict:
  if len(row) != 4:
    raise Rejected(f"the line has {len(row)} columns, wanted 4")
  return {"question": row[2], "answer": [row[3]]}


def dpr_question(row: Sequence[str]) -> dict:
  """Parses DPR's two columns: the question, and the answers as a Python list literal."""
  try:
    if sum(map(len, row)) > _MAX_LITERAL_CHARS:
      raise ValueError("it takes a hundred times the memory to read")
    question, answers = next(csv.reader(["\t".join(row)], delimiter="\t"))
    return {"question": question, "answer": ast.literal_eval(answers)}
  except (ValueError, SyntaxError, RecursionError, MemoryError, csv.Error, StopIteration):
    raise Rejected(
      "the line is neither an object nor a question and a list of answers, separated by a tab"
    ) from None


def _squad_question(row: dict) -> dict:
  return {**plain_question(row), "title": row["article"]}


def plain_question(row: dict) -> dict:
  """Parses NQ-open's lines, DPR's lists, YodaQA's JSON, and SQuAD's questions.

  The records may be in their original form, or as Hugging Face's `datasets` writes them.
  """
  if row.get("is_impossible"):
    raise Rejected("it cannot be answered")
  text = next((row[name] for name in ("question", "qText") if name in row), None)
  answers = next((row[name] for name in ("answer", "answers") if name in row), None)
  if text is None or answers is None:
    lacking = "question" if text is None else "answer"
    raise Rejected(f"there is no {lacking} among its keys: {json_lines.keys_of(row)}")
  if isinstance(answers, dict) and "text" in answers:
    answers = answers["text"]
  elif (
    isinstance(answers, list)
    and answers
    and all(isinstance(answer, dict) and "text" in answer for answer in answers)
  ):
    answers = [answer["text"] for answer in answers]
  elif isinstance(answers, dict):
    raise Rejected(f"the answer is an object with the keys {json_lines.keys_of(answers)}")
  return {
    "question": text,
    "answer": [answers] if isinstance(answers, str) else answers,
    **({"title": row["title"]} if isinstance(row.get("title"), str) else {}),
  }


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A published question set.

  Attributes:
    mark: a field that only its raw format has; None if that is tab-separated.
    parse: a raw record → a line of a questions file. Raises Rejected.
    published: number of questions in each of ORQA's splits.
    regex: whether its answers are regular expressions.
  """

  mark: str | None
  parse: Callable
  published: dict[str, int]
  regex: bool = False


DATASETS = {
  "nq": Dataset("question_text", _natural_question, {"train": 79_168, "dev": 8_757, "test": 3_610}),
  "webquestions": Dataset("utterance", _web_question, {"train": 3_417, "dev": 361, "test": 2_032}),
  "curatedtrec": Dataset(
    None, trec_question, {"train": 1_353, "dev": 133, "test": 694}, regex=True
  ),
  "squad": Dataset("article", _squad_question, {"train": 78_713, "dev": 8_886, "test": 10_570}),
}
