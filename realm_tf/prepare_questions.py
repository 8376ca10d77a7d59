"""Converts published question sets to questions files.

It implements their raw formats, ORQA's rules, and ORQA's split into training and development.

    python -m realm_tf.prepare_questions --dataset=nq --output=Q \\
        --input='nq/train/nq-train-*.jsonl.gz'
    python -m realm_tf.prepare_questions --dataset=nq --output=Q --split=test \\
        --input='nq/dev/nq-dev-*.jsonl.gz'
    python -m realm_tf.prepare_questions --dataset=curatedtrec --output=Q \\
        --input=large2180-train.tsv

Supported raw formats, plain or compressed by gzip, bzip2 or xz:

    nq            Natural Questions: jsonl with document_html, or simplified with document_text,
                  or as written by Hugging Face's `datasets`
    webquestions  webquestions.examples.*.json: a list of {"utterance", "targetValue"}
    curatedtrec   YodaQA's tsv: id, kind, question, regular expression
    squad         SQuAD 1.1 and 2.0

and for all of them lists or lines of {"question", "answer": [..]}, {"qText", "answers": [..]},
Hugging Face's {"question", "answers": {"text": [..]}}, and DPR's two columns (question, list of
answers). Writes Q/train.jsonl and Q/dev.jsonl, or for --split=test Q/test.jsonl, and rejected
records with reasons to Q/rejected.<split>.jsonl. ORQA's test sets are the published development
sets of Natural Questions and SQuAD, and the published test sets of the others.
"""

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_enum(
    "dataset",
    None,
    ("nq", "webquestions", "curatedtrec", "squad"),
    "The question set, which determines format and rules.",
    required=True,
  )
  flags.DEFINE_string(
    "input", None, "Published files: paths and globs, separated by commas.", required=True
  )
  flags.DEFINE_string("output", None, "Folder to write to.", required=True)
  flags.DEFINE_enum(
    "split",
    "train",
    ("train", "test"),
    "train: split into training and development; test: keep whole.",
  )
  cli.start("realm_tf.prepare_questions")

import tabulate
import tensorflow as tf

from realm_tf import progress
from realm_tf.corpus import metrics
from realm_tf.examples import question_datasets
from realm_tf.storage import (
  artifacts,
  input_files,
  json_lines,
  json_values,
  ownership,
  packed_files,
)

_HASH_BUCKETS, _DEV_SHARE = 100_000, 10


# ========================================================================================== reading


def records(path: str) -> Iterator[tuple[int, object]]:
  """Yields the raw records of a file with their numbers, from 1.

  Records are JSON (lines, a list, consecutive objects, or the list in one object), or lines of
  tab-separated columns. A record that cannot be read is yielded as its json_lines.Record.
  """
  with artifacts.gfile.GFile(path, "rb") as packed:
    file, number = packed_files.unpacked(packed), 0
    try:
      if file.peek().removeprefix(packed_files.BOM).lstrip().startswith((b"{", b"[")):
        yield from _json_records(file)
        return
      for piece in json_values.lines(file):
        number = piece.line
        if piece.raw.strip():
          yield number, _columns(piece)
    except packed_files.Unreadable as error:
      yield number + 1, json_lines.end_of(error, number, "line")


def _json_records(file: io.BufferedReader) -> Iterator[tuple[int, object]]:
  for record in json_lines.records(file):
    listed = None if record.row is None else _listed(record.row)
    if listed is None:
      yield record.number, record.row or record
    else:
      yield from enumerate(listed, 1)


def _columns(piece: json_values.Piece):
  try:
    return piece.raw.decode().rstrip("\r\n").split("\t")
  except UnicodeDecodeError:
    reason = "the line is neither JSON nor tab-separated columns in UTF-8"
    return json_lines.Record(piece.line, "line", None, reason, json_lines.shown(piece.raw))


def _listed(row: dict) -> list | None:
  """Returns the records in one object that holds them all.

  The records are SQuAD's articles, or the only list of objects in the object. Returns None if the
  object itself is a record.
  """
  lists = [
    value
    for value in row.values()
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value)
  ]
  if len(lists) != 1 or question_datasets.QUESTION_KEYS & set(row):
    return None
  return [
    {**question, "article": article.get("title")}
    if "paragraphs" in article and isinstance(question, dict)
    else question
    for article in lists[0]
    for question in _questions_of(article)
  ]


def _questions_of(article: dict) -> list:
  """Returns the questions of a SQuAD article; anything but an article is a question itself."""
  try:
    return (
      [question for paragraph in article["paragraphs"] for question in paragraph["qas"]]
      if "paragraphs" in article
      else [article]
    )
  except (KeyError, TypeError):
    return [{"paragraphs": "broken"}]


# ======================================================================================== preparing


def question_of(record, dataset: question_datasets.Dataset) -> dict:
  """Converts a record to a line of a questions file.

  Raises:
    Rejected: the record has no usable question.
  """
  if isinstance(record, json_lines.Record):
    raise question_datasets.Rejected(record.reason)
  try:
    if not isinstance(record, dict | list):
      raise question_datasets.Rejected("the record is not an object")
    if isinstance(record, list):
      row = (
        question_datasets.trec_question(record)
        if dataset.mark is None
        else question_datasets.dpr_question(record)
      )
    elif dataset.mark in record:
      row = dataset.parse(record)
    else:
      row = (
        question_datasets.hub_natural_question
        if isinstance(record.get("question"), dict)
        else question_datasets.plain_question
      )(record)
  except (KeyError, TypeError, IndexError, AttributeError, UnicodeError) as error:
    raise question_datasets.Rejected(
      f"a field is missing or of the wrong type ({type(error).__name__}: {error})"
    ) from error
  return _checked(row, dataset)


def _checked(row: dict, dataset: question_datasets.Dataset) -> dict:
  """Checks a row and removes repeated answers, keeping their order."""
  text, answers = row["question"], row["answer"]
  if not isinstance(text, str) or not text.strip():
    raise question_datasets.Rejected("the question is empty, or not text")
  if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
    raise question_datasets.Rejected("the answer is not a list of text")
  if not isinstance(title := row.get("title") or "", str):
    raise question_datasets.Rejected("the title is not text")
  if not all(map(json_lines.is_writable, [text, title, *answers])):
    raise question_datasets.Rejected(json_lines.HALF_A_PAIR)
  row["answer"] = list(dict.fromkeys(answer for answer in answers if answer.strip()))
  if not row["answer"]:
    raise question_datasets.Rejected("there is no answer")
  if dataset.regex:
    try:
      for answer in row["answer"]:
        metrics.expression(answer)
    except ValueError as error:
      raise question_datasets.Rejected(f"the answer is {error}") from error
    row["regex"] = True
  return row


def is_dev(questions: Sequence[str]) -> list[bool]:
  """Splits a published training set as ORQA does, by the FarmHash fingerprint of each question."""
  buckets = tf.strings.to_hash_bucket_fast(tf.constant(list(questions), tf.string), _HASH_BUCKETS)
  return [bool(bucket % _DEV_SHARE == 0) for bucket in buckets.numpy()]


def prepare(name: str, inputs: str, output: str, *, split: str = "train") -> str:
  """Reads a published question set and writes questions files.

  Args:
    name: one of DATASETS.
    inputs: a path, or files, folders and globs separated by commas.
    output: folder.
    split: "train" is split into train.jsonl and dev.jsonl; "test" is written to test.jsonl.

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
        kept.append(question_of(record, question_datasets.DATASETS[name]))
      except question_datasets.Rejected as reason:
        rejected.append({"file": path, "record": number, "reason": str(reason), **_shown(record)})
      rate.add(1)
  if not kept:
    found = _told(rejected) or "it is empty"
    raise artifacts.UserError(
      f"{inputs!r} has no usable question of {name}: {found}; wanted the published files, or "
      'lines or a list of {"question": str, "answer": [str, ..]}.'
    )
  parts = {"test": kept}
  if split == "train":
    dev = is_dev([row["question"] for row in kept])
    parts = {
      "train": [row for row, out in zip(kept, dev, strict=True) if not out],
      "dev": [row for row, out in zip(kept, dev, strict=True) if out],
    }
  artifacts.gfile.makedirs(output)
  for part, rows in {**parts, f"rejected.{split}": rejected}.items():
    artifacts.write_text(
      os.path.join(output, f"{part}.jsonl"), "".join(map(json_lines.dumps, rows))
    )
  counts = [
    [part, len(rows), question_datasets.DATASETS[name].published[part]]
    for part, rows in parts.items()
  ]
  counts += [[f"rejected: {reason}", count] for reason, count in _reasons(rejected).most_common()]
  table = tabulate.tabulate(counts, [name, "questions", "published"], intfmt=",")
  if len(rejected) > len(kept):
    num = len(rejected) + len(kept)
    table += f"\nWARNING: {len(rejected)} of {num} records were rejected: {_told(rejected)}"
  return table


def _reasons(rejected: Sequence[dict]) -> Counter:
  return Counter(row["reason"] for row in rejected)


def _told(rejected: Sequence[dict]) -> str:
  """Describes the three most frequent reasons, each with its first record."""
  first = {row["reason"]: row for row in reversed(rejected)}
  return "; ".join(
    f"{reason} ({count}, first: record {first[reason]['record']} of {first[reason]['file']})"
    for reason, count in _reasons(rejected).most_common(3)
  )


def _shown(record) -> dict:
  """Returns the question of a rejected record, or the record's beginning if it has none."""
  if isinstance(record, json_lines.Record):
    return {"found": record.text}
  if isinstance(record, dict):
    for name in ("question_text", "utterance", "question", "qText"):
      if name in record:
        return {"question": str(record[name])[: json_lines.SHOWN_CHARS]}
  return {"found": str(record)[: json_lines.SHOWN_CHARS]}


def main(argv):
  del argv
  args = flags.FLAGS
  print(prepare(args.dataset, args.input, args.output, split=args.split))
