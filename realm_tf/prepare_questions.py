"""Published question sets as questions files: each one's raw format, ORQA's rules, ORQA's split into training and development.

    python -m realm_tf.prepare_questions --dataset=nq --input='nq/train/nq-train-*.jsonl.gz' --output=Q
    python -m realm_tf.prepare_questions --dataset=nq --split=test --input='nq/dev/nq-dev-*.jsonl.gz' --output=Q
    python -m realm_tf.prepare_questions --dataset=curatedtrec --input=large2180-train.tsv --output=Q

| dataset | raw formats read, packed by gzip, bzip2 or xz, or plain |
| nq | Natural Questions: jsonl with document_html, or simplified with document_text, or as Hugging Face's `datasets` writes it |
| webquestions | webquestions.examples.*.json: a list of {"utterance", "targetValue"} |
| curatedtrec | YodaQA's tsv: id, kind, question, regular expression |
| squad | SQuAD 1.1 and 2.0 |

and for all of them lists or lines of {"question", "answer": [..]}, {"qText", "answers": [..]}, Hugging Face's {"question",
"answers": {"text": [..]}}, and DPR's two columns (question, list of answers). Writes Q/train.jsonl and
Q/dev.jsonl, or for --split=test Q/test.jsonl, and what was left out and why to Q/rejected.<split>.jsonl. ORQA's test sets are the
published development set of Natural Questions and SQuAD, and the published test set of the others.
"""

import ast
import csv
import dataclasses
import html.parser
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import tabulate
import tensorflow as tf
from absl import flags

from realm_tf import (
    artifacts, input_files, json_lines, metrics, ownership, progress, settings)

MAX_ANSWER_TOKENS = 5  # of Natural Questions' own tokens
_HASH_BUCKETS, _DEV_SHARE = 100_000, 10
_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^")]*))\)')
_TAG = re.compile(r"<[^<>]+>")
_QUESTION_KEYS = {"question", "question_text", "utterance", "qText"}  # what has one of these is a question itself


class Rejected(Exception):
  """A record that gives no question; the message is the reason."""


# ============================================================================================================ raw records


def _natural_question(row: dict) -> dict:
  """ORQA's rule: every short answer of at most 5 tokens, of any annotator."""
  short = _short([answer for annotation in row["annotations"] for answer in annotation["short_answers"]])
  if "document_html" in row:
    page = row["document_html"].encode()
    answers = [_text_of(page[answer["start_byte"]:answer["end_byte"]].decode()) for answer in short]
  else:
    tokens = row["document_text"].split(" ") if "document_text" in row else [
        "" if token["html_token"] else token["token"] for token in row["document_tokens"]]
    spans = [tokens[answer["start_token"]:answer["end_token"]] for answer in short]
    answers = [" ".join(token for token in span if token and not _TAG.fullmatch(token)) for span in spans]
  return {"question": row["question_text"], "answer": answers}


def _short(given: Sequence[dict]) -> list[dict]:
  short = [answer for answer in given if answer["end_token"] - answer["start_token"] <= MAX_ANSWER_TOKENS]
  if not short:
    raise Rejected(f"every short answer has over {MAX_ANSWER_TOKENS} tokens" if given else "there is no short answer")
  return short


def _hub_natural_question(row: dict) -> dict:
  """Natural Questions as Hugging Face's `datasets` writes it: the question is an object, lists of objects are objects of lists."""
  annotations = row["annotations"]
  by_annotator = annotations["short_answers"] if isinstance(annotations, dict) else [one["short_answers"] for one in annotations]
  short = _short([answer for answers in by_annotator for answer in _objects(answers)])
  return {"question": row["question"]["text"], "answer": [answer["text"] for answer in short]}


def _objects(lists) -> list[dict]:
  """{"a": [1, 2], "b": [3, 4]} as [{"a": 1, "b": 3}, {"a": 2, "b": 4}]; a list as it is."""
  return [dict(zip(lists, values)) for values in zip(*lists.values())] if isinstance(lists, dict) else lists


def _text_of(markup: str) -> str:
  """The text of a piece of HTML."""
  pieces = []
  parser = html.parser.HTMLParser()
  parser.handle_data = pieces.append
  parser.feed(markup)
  parser.close()
  return "".join(pieces)


def _web_question(row: dict) -> dict:
  """`targetValue` is Lisp: (list (description Jamaica) (description "Jamaican English"))."""
  answers = [re.sub(r"\\(.)", r"\1", quoted) or plain for quoted, plain in _DESCRIPTION.findall(row["targetValue"])]
  return {"question": row["utterance"], "answer": answers}


def _trec_question(row: Sequence[str]) -> dict:
  if len(row) != 4:
    raise Rejected(f"the line has {len(row)} columns, wanted 4")
  return {"question": row[2], "answer": [row[3]]}


def _dpr_question(row: Sequence[str]) -> dict:
  """DPR's two columns: the question, and the answers as a list in Python's spelling."""
  try:
    question, answers = next(csv.reader(["\t".join(row)], delimiter="\t"))
    return {"question": question, "answer": ast.literal_eval(answers)}
  except (ValueError, SyntaxError, RecursionError, MemoryError, csv.Error, StopIteration):
    raise Rejected("the line is neither an object nor a question and a list of answers, with a tab between") from None


def _squad_question(row: dict) -> dict:
  return {**_plain_question(row), "title": row["article"]}


def _plain_question(row: dict) -> dict:
  """NQ-open's lines, DPR's lists, YodaQA's JSON, and SQuAD's questions, alone or as Hugging Face's `datasets` writes them."""
  if row.get("is_impossible"):
    raise Rejected("it cannot be answered")
  text = next((row[name] for name in ("question", "qText") if name in row), None)
  answers = next((row[name] for name in ("answer", "answers") if name in row), None)
  if text is None or answers is None:
    raise Rejected(f"there is no {'question' if text is None else 'answer'} among its keys: {_keys(row)}")
  if isinstance(answers, dict) and "text" in answers:
    answers = answers["text"]
  elif isinstance(answers, list) and answers and all(isinstance(answer, dict) and "text" in answer for answer in answers):
    answers = [answer["text"] for answer in answers]
  elif isinstance(answers, dict):
    raise Rejected(f"the answer is an object with the keys {_keys(answers)}")
  return {"question": text, "answer": [answers] if isinstance(answers, str) else answers, **(
      {"title": row["title"]} if isinstance(row.get("title"), str) else {})}


def _keys(row: dict) -> str:
  return ", ".join(itertools.islice(row, 10)) or "none"


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A published question set.

  Attributes:
    mark: the field that only its own raw format has; None where that is tab-separated.
    parse: a raw record → a line of a questions file. Raises Rejected.
    published: number of questions in ORQA's parts of it.
    regex: its answers are regular expressions.
  """

  mark: str | None
  parse: Callable
  published: dict[str, int]
  regex: bool = False


DATASETS = {
    "nq": Dataset("question_text", _natural_question, {"train": 79_168, "dev": 8_757, "test": 3_610}),
    "webquestions": Dataset("utterance", _web_question, {"train": 3_417, "dev": 361, "test": 2_032}),
    "curatedtrec": Dataset(None, _trec_question, {"train": 1_353, "dev": 133, "test": 694}, regex=True),
    "squad": Dataset("article", _squad_question, {"train": 78_713, "dev": 8_886, "test": 10_570}),
}


# ================================================================================================================ reading


def records(path: str) -> Iterator[tuple[int, object]]:
  """The raw records of a file with their numbers, from 1.

  They are JSON (lines, a list, objects after each other, or the list in one object), or lines of tab-separated columns. A record
  that cannot be read comes as its json_lines.Record.
  """
  with artifacts.gfile.GFile(path, "rb") as packed:
    file, number = json_lines.unpacked(packed), 0
    try:
      if file.peek().removeprefix(json_lines.BOM).lstrip().startswith((b"{", b"[")):
        yield from _json_records(file)
        return
      for piece in json_lines.lines(file):
        number = piece.line
        if piece.raw.strip():
          yield number, _columns(piece)
    except json_lines.Unreadable as error:
      yield number + 1, json_lines.end_of(error, number, "line")


def _json_records(file: io.BufferedReader) -> Iterator[tuple[int, object]]:
  for record in json_lines.records(file):
    listed = None if record.row is None else _listed(record.row)
    if listed is None:
      yield record.number, record.row or record
    else:
      yield from enumerate(listed, 1)


def _columns(piece: json_lines.Piece):
  try:
    return piece.raw.decode().rstrip("\r\n").split("\t")
  except UnicodeDecodeError:
    reason = "the line is neither JSON nor tab-separated columns in UTF-8"
    return json_lines.Record(piece.line, "line", None, reason, json_lines.shown(piece.raw))


def _listed(row: dict) -> list | None:
  """The records in one object that holds them all: SQuAD's articles, or the only list of objects in it; None: it is one itself."""
  lists = [value for value in row.values() if isinstance(value, list) and value and all(isinstance(one, dict) for one in value)]
  if len(lists) != 1 or _QUESTION_KEYS & set(row):
    return None
  return [{**question, "article": article.get("title")} if "paragraphs" in article else question
          for article in lists[0] for question in _questions_of(article)]


def _questions_of(article: dict) -> list:
  """Of an article of SQuAD; what is no article is a question itself."""
  try:
    return [question for paragraph in article["paragraphs"] for question in paragraph["qas"]] if "paragraphs" in article else [article]
  except (KeyError, TypeError):
    return [{"paragraphs": "broken"}]


# =============================================================================================================== preparing


def question_of(record, dataset: Dataset) -> dict:
  """A line of a questions file.

  Raises:
    Rejected: the record gives none.
  """
  if isinstance(record, json_lines.Record):
    raise Rejected(record.reason)
  try:
    if isinstance(record, list):
      row = _trec_question(record) if dataset.mark is None else _dpr_question(record)
    elif dataset.mark in record:
      row = dataset.parse(record)
    else:
      row = (_hub_natural_question if isinstance(record.get("question"), dict) else _plain_question)(record)
  except (KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError) as error:
    raise Rejected(f"a field is missing or of another kind ({type(error).__name__}: {error})") from error
  return _checked(row, dataset)


def _checked(row: dict, dataset: Dataset) -> dict:
  """The row with each answer once, in order."""
  text, answers = row["question"], row["answer"]
  if not isinstance(text, str) or not text.strip():
    raise Rejected("the question is empty, or not text")
  if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
    raise Rejected("the answer is not a list of text")
  if not all(map(json_lines.is_writable, [text, *answers, row.get("title") or ""])):
    raise Rejected(json_lines.HALF_A_PAIR)
  row["answer"] = list(dict.fromkeys(answer for answer in answers if answer.strip()))
  if not row["answer"]:
    raise Rejected("there is no answer")
  if dataset.regex:
    try:
      for answer in row["answer"]:
        metrics.expression(answer)
    except ValueError as error:
      raise Rejected(f"the answer is {error}") from error
    row["regex"] = True
  return row


def is_dev(questions: Sequence[str]) -> list[bool]:
  """ORQA's split of a published training set: the FarmHash fingerprint of the question decides."""
  buckets = tf.strings.to_hash_bucket_fast(tf.constant(list(questions), tf.string), _HASH_BUCKETS)
  return [bool(bucket % _DEV_SHARE == 0) for bucket in buckets.numpy()]


def prepare(name: str, inputs: str, output: str, *, split: str = "train") -> str:
  """Reads a published question set and writes questions files.

  Args:
    name: one of DATASETS.
    inputs: a path, or files, folders and globs separated by commas.
    output: folder.
    split: "train" is split into train.jsonl and dev.jsonl, "test" goes to test.jsonl.

  Returns:
    A table of the counts.

  Raises:
    UserError: no such file, or no usable question in them.
  """
  files = input_files.find(inputs)
  for part in ("train", "dev", "test"):
    ownership.check_apart(os.path.join(output, f"{part}.jsonl"), files)
  kept, rejected, rate = [], [], progress.Rate("records")
  for path in files:
    for number, record in records(path):
      try:
        kept.append(question_of(record, DATASETS[name]))
      except Rejected as reason:
        rejected.append({"file": path, "record": number, "reason": str(reason), **_shown(record)})
      rate.add(1)
  if not kept:
    raise artifacts.UserError(
        f"{inputs!r} has no usable question of {name}: {_told(rejected) or 'it is empty'}; wanted the published files, or lines or a "
        'list of {"question": str, "answer": [str, ..]}.')
  parts = {"test": kept}
  if split == "train":
    dev = is_dev([row["question"] for row in kept])
    parts = {"train": [row for row, out in zip(kept, dev) if not out], "dev": [row for row, out in zip(kept, dev) if out]}
  artifacts.gfile.makedirs(output)
  for part, rows in {**parts, f"rejected.{split}": rejected}.items():
    artifacts.write_text(os.path.join(output, f"{part}.jsonl"), "".join(map(json_lines.dumps, rows)))
  counts = [[part, len(rows), DATASETS[name].published[part]] for part, rows in parts.items()]
  counts += [[f"rejected: {reason}", count] for reason, count in _reasons(rejected).most_common()]
  table = tabulate.tabulate(counts, [name, "questions", "published"], intfmt=",")
  if len(rejected) > len(kept):
    table += f"\nWARNING: {len(rejected)} of {len(rejected) + len(kept)} records were rejected: {_told(rejected)}"
  return table


def _reasons(rejected: Sequence[dict]) -> Counter:
  return Counter(row["reason"] for row in rejected)


def _told(rejected: Sequence[dict]) -> str:
  """The three most frequent reasons, each with its first record."""
  first = {row["reason"]: row for row in reversed(rejected)}
  return "; ".join(f"{reason} ({count}, first: record {first[reason]['record']} of {first[reason]['file']})"
                   for reason, count in _reasons(rejected).most_common(3))


def _shown(record) -> dict:
  """The question of a rejected record, where it has one, or its beginning."""
  if isinstance(record, json_lines.Record):
    return {"found": record.text}
  if isinstance(record, dict):
    for name in ("question_text", "utterance", "question", "qText"):
      if name in record:
        return {"question": str(record[name])[:json_lines.SHOWN_CHARS]}
  return {"found": str(record)[:json_lines.SHOWN_CHARS]}


def main(argv):
  del argv
  args = flags.FLAGS
  print(prepare(args.dataset, args.input, args.output, split=args.split))


if __name__ == "__main__":
  flags.DEFINE_enum("dataset", None, tuple(DATASETS), "Whose format and rules.", required=True)
  flags.DEFINE_string("input", None, "Published files: paths and globs, separated by commas.", required=True)
  flags.DEFINE_string("output", None, "Folder to write to.", required=True)
  flags.DEFINE_enum("split", "train", ("train", "test"), "train: to be split in training and development; test: kept whole.")
  settings.start(main)
