"""Published question sets as questions files: each one's raw format, ORQA's rules, ORQA's split into training and development.

    python -m realm_tf.prepare_questions --dataset=nq --input='nq/train/nq-train-*.jsonl.gz' --output=Q
    python -m realm_tf.prepare_questions --dataset=nq --split=test --input='nq/dev/nq-dev-*.jsonl.gz' --output=Q
    python -m realm_tf.prepare_questions --dataset=curatedtrec --input=large2180-train.tsv --output=Q

| dataset | raw formats read, gzipped, bzipped or plain |
| nq | Natural Questions: jsonl with document_html, or simplified with document_text |
| webquestions | webquestions.examples.*.json: a list of {"utterance", "targetValue"} |
| curatedtrec | YodaQA's tsv: id, kind, question, regular expression |
| squad | SQuAD 1.1 and 2.0 |

and for all of them lists or lines of {"question", "answer": [..]} or {"qText", "answers": [..]}. Writes Q/train.jsonl and
Q/dev.jsonl, or for --split=test Q/test.jsonl, and what was left out and why to Q/rejected.<split>.jsonl. ORQA's test sets are the
published development set of Natural Questions and SQuAD, and the published test set of the others.
"""

import bz2
import contextlib
import dataclasses
import gzip
import html.parser
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import tabulate
import tensorflow as tf
from absl import flags

from realm_tf import artifacts, metrics, ownership, paths, progress, settings

MAX_ANSWER_TOKENS = 5  # of Natural Questions' own tokens
_HASH_BUCKETS, _DEV_SHARE = 100_000, 10
_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^")]*))\)')
_TAG = re.compile(r"<[^<>]+>")


class Rejected(Exception):
  """A record that gives no question; the message is the reason."""


# ============================================================================================================ raw records


def _natural_question(row: dict) -> dict:
  """ORQA's rule: every short answer of at most 5 tokens, of any annotator."""
  given = [answer for annotation in row["annotations"] for answer in annotation["short_answers"]]
  short = [answer for answer in given if answer["end_token"] - answer["start_token"] <= MAX_ANSWER_TOKENS]
  if not short:
    raise Rejected(f"every short answer has over {MAX_ANSWER_TOKENS} tokens" if given else "there is no short answer")
  if "document_html" in row:
    page = row["document_html"].encode()
    answers = [_text_of(page[answer["start_byte"]:answer["end_byte"]].decode()) for answer in short]
  else:
    tokens = row["document_text"].split(" ") if "document_text" in row else [
        "" if token["html_token"] else token["token"] for token in row["document_tokens"]]
    spans = [tokens[answer["start_token"]:answer["end_token"]] for answer in short]
    answers = [" ".join(token for token in span if token and not _TAG.fullmatch(token)) for span in spans]
  return {"question": row["question_text"], "answer": answers}


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


def _squad_question(row: dict) -> dict:
  if row.get("is_impossible"):
    raise Rejected("it cannot be answered")
  return {"question": row["question"], "answer": [answer["text"] for answer in row["answers"]], "title": row["article"]}


def _plain_question(row: dict) -> dict:
  """NQ-open's lines and YodaQA's JSON."""
  text, answers = (row[long if long in row else short] for long, short in (("question", "qText"), ("answer", "answers")))
  return {"question": text, "answer": [answers] if isinstance(answers, str) else answers, **(
      {"title": row["title"]} if "title" in row else {})}


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

  They are lines of JSON or of tab-separated columns, or the list in one JSON value. A line that is none of these comes as bytes.
  """
  with _open(path) as file:
    first = file.readline()
    if _is_whole(first):
      try:
        yield from enumerate(_listed(json.loads(first + file.read())), 1)
      except ValueError as error:
        raise artifacts.UserError(f"{path!r} begins like JSON and is not: {error}.") from error
      return
    for number, line in enumerate(itertools.chain([first], file), 1):
      if line.strip():
        yield number, _line(line)


@contextlib.contextmanager
def _open(path: str):
  unpacked = {".gz": gzip.open, ".bz2": bz2.open}.get(os.path.splitext(path)[1], contextlib.nullcontext)
  with artifacts.gfile.GFile(path, "rb") as packed, unpacked(packed) as file:
    yield file


def _is_whole(first: bytes) -> bool:
  """Whether a file with this first line is one JSON value, not lines of them."""
  start = first.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
  if start == b"{":
    try:
      return "data" in json.loads(first)
    except ValueError:
      return first.strip() == b"{"  # printed over many lines
  return start == b"["


def _listed(value) -> Iterator[object]:
  """The records of one JSON value: a list, or SQuAD's articles."""
  if isinstance(value, list):
    yield from value
  elif isinstance(value, dict) and isinstance(value.get("data"), list):
    for article in value["data"]:
      for paragraph in article["paragraphs"]:
        for question in paragraph["qas"]:
          yield {**question, "article": article["title"]}
  else:
    raise ValueError("there is no list in it")


def _line(line: bytes):
  try:
    text = line.decode("utf-8-sig").rstrip("\r\n")
    return json.loads(text) if text.lstrip().startswith("{") else text.split("\t")
  except ValueError:
    return line


# =============================================================================================================== preparing


def question_of(record, dataset: Dataset) -> dict:
  """A line of a questions file.

  Raises:
    Rejected: the record gives none.
  """
  if isinstance(record, bytes):
    raise Rejected("the line is neither JSON nor tab-separated columns in UTF-8")
  try:
    if isinstance(record, list):
      row = _trec_question(record) if dataset.mark is None else None
    else:
      row = (dataset.parse if dataset.mark in record else _plain_question)(record)
  except (KeyError, TypeError, IndexError, UnicodeDecodeError) as error:
    raise Rejected(f"a field is missing or of another kind ({type(error).__name__}: {error})") from error
  if row is None:
    raise Rejected("the line is not an object")
  return _checked(row, dataset)


def _checked(row: dict, dataset: Dataset) -> dict:
  """The row with each answer once, in order."""
  text, answers = row["question"], row["answer"]
  if not isinstance(text, str) or not text.strip():
    raise Rejected("the question is empty, or not text")
  if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
    raise Rejected("the answer is not a list of text")
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
    inputs: files or globs, separated by commas.
    output: folder.
    split: "train" is split into train.jsonl and dev.jsonl, "test" goes to test.jsonl.

  Returns:
    A table of the counts.

  Raises:
    UserError: no such file, or no usable question in them.
  """
  files = [path for pattern in paths.split(inputs) for path in paths.matching(pattern)]
  if not files:
    raise artifacts.UserError(f"no file {inputs!r}; give the published files of {name}.")
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
    reasons = ", ".join(f"{reason} ({count})" for reason, count in _reasons(rejected).most_common(3))
    raise artifacts.UserError(f"{inputs!r} has no usable question of {name}: {reasons or 'it is empty'}.")
  parts = {"test": kept}
  if split == "train":
    dev = is_dev([row["question"] for row in kept])
    parts = {"train": [row for row, out in zip(kept, dev) if not out], "dev": [row for row, out in zip(kept, dev) if out]}
  artifacts.gfile.makedirs(output)
  for part, rows in {**parts, f"rejected.{split}": rejected}.items():
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    artifacts.write_text(os.path.join(output, f"{part}.jsonl"), "".join(lines))
  counts = [[part, len(rows), DATASETS[name].published[part]] for part, rows in parts.items()]
  counts += [[f"rejected: {reason}", count] for reason, count in _reasons(rejected).most_common()]
  return tabulate.tabulate(counts, [name, "questions", "published"], intfmt=",")


def _reasons(rejected: Sequence[dict]) -> Counter:
  return Counter(row["reason"] for row in rejected)


def _shown(record) -> dict:
  """The question of a rejected record, where it has one, or its beginning."""
  if isinstance(record, dict):
    for name in ("question_text", "utterance", "question", "qText"):
      if name in record:
        return {"question": record[name]}
  return {"found": str(record)[:200]}


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
