"""Questions and clozes: jsonl files in NQ-open's and ORQA's format, read with a clear answer for every bad line.

    python -m realm_tf.questions --input=questions.jsonl --train=train.jsonl --test=test.jsonl     # split by title
"""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import flags

from realm_tf import artifacts, examples, json_lines, metrics, ownership, settings
from realm_tf.passages import Ragged
from realm_tf.tokenization import Tokenizer


@dataclasses.dataclass(frozen=True)
class Question:
  """A question or cloze with its acceptable answers.

  Attributes:
    text: the question; for a cloze the sentence with the answer in it.
    answers: any of them is right; empty where they are not known.
    span: for a cloze, the byte range of the answer in the UTF-8 text.
    regex: the answers are regular expressions (CuratedTREC).
  """

  text: str
  answers: Sequence[str]
  span: tuple[int, int] | None = None
  regex: bool = False


def read_questions(path: str, *, need_answers: bool = True) -> list[Question]:
  """Reads `{"question": str, "answer": [str, ..]}` records; bad ones are counted by reason on stderr and left out.

  They are lines, an array or objects after each other, as `json_lines.read` takes them.

  With `"regex": true` on a line, its answers are regular expressions.

  Raises:
    UserError: no such file, or no usable line in it.
  """
  def parse(row):
    text, answers, regex = row.get("question"), row.get("answer", []), row.get("regex", False)
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(text, str):
      return "the question is not text"
    if not text.strip():
      return "the question is empty"
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
      return "the answer is not a list of text"
    if not all(map(json_lines.is_writable, [text, *answers])):
      return json_lines.HALF_A_PAIR
    if not isinstance(regex, bool):
      return "regex is neither true nor false"
    answers = [answer for answer in answers if answer.strip()]
    try:
      for answer in answers if regex else ():
        metrics.expression(answer)
    except ValueError as error:
      return f"the answer is {error}"
    return Question(text, answers, regex=regex) if answers or not need_answers else "there is no answer"

  return _read(path, parse, '{"question": str, "answer": [str, ..]}')


def read_clozes(path: str) -> list[Question]:
  """Reads `{"text": str, "span": [start, end], "answer": [str, ..]}` lines; the span counts characters.

  Raises:
    UserError: no such file, or no usable line in it.
  """
  def parse(row):
    text, span, answers = row.get("text"), row.get("span"), row.get("answer")
    if not isinstance(text, str) or not isinstance(answers, list) or not isinstance(span, list) or len(span) != 2:
      return "text, span or answer is missing"
    if not all(isinstance(at, int) for at in span) or not all(isinstance(answer, str) for answer in answers):
      return "the span is not two integers, or the answer not a list of text"
    if not all(map(json_lines.is_writable, [text, *answers])):
      return json_lines.HALF_A_PAIR
    if not 0 <= span[0] < span[1] <= len(text):
      return "the span is not inside the text"
    return Question(text, answers, tuple(len(text[:at].encode()) for at in span))

  return _read(path, parse, '{"text": str, "span": [start, end], "answer": [str, ..]}')


def _read(path: str, parse, form: str) -> list[Question]:
  if not artifacts.gfile.exists(path):
    raise artifacts.UserError(f"no file {path!r}; wanted lines of {form}.")
  with artifacts.gfile.GFile(path, "rb") as file:
    rows, rejected = json_lines.parsed(file, parse)
  if not rows:
    told = "; ".join(json_lines.reasons(rejected)) or "an empty file"
    keys = next((f" The first object has the keys: {', '.join(record.row)}." for record in rejected if record.row), "")
    raise artifacts.UserError(
        f"{path!r} has no usable line; wanted lines of {form}. Got: {told}.{keys} realm_tf.prepare_questions reads published files.")
  json_lines.tell(path, rejected, num_kept=len(rows))
  return rows


def tell_cut(sizes: np.ndarray, *, length: int) -> None:
  """Says on stderr how many questions do not fit in `length` word pieces with [CLS] and [SEP]."""
  if num_cut := np.count_nonzero(sizes > length - 2):
    print(
      f"WARNING: {num_cut:,} of {len(sizes):,} questions are longer than {length - 2} word pieces; "
      "what is beyond is not read.",
      file=sys.stderr,
    )


def packed_questions(questions: Sequence[Question], *, tokenizer: Tokenizer, length: int) -> np.ndarray:
  """Questions as the query tower reads them: [N, length] int32."""
  ids = tokenizer(tf.constant([question.text for question in questions], tf.string))
  return examples.pack_queries(ids, tokenizer=tokenizer, length=length).numpy()


def masked_clozes(clozes: Sequence[Question], *, tokenizer: Tokenizer, max_masks: int) -> examples.MaskedQueries:
  """Clozes with every word piece inside the answer's span masked."""
  tokens = tokenizer.with_offsets(tf.constant([cloze.text for cloze in clozes], tf.string))
  starts, ends = [], []
  for cloze, left, right in zip(clozes, tokens.starts.to_list(), tokens.ends.to_list()):
    first, last = np.searchsorted(left, cloze.span[0]), np.searchsorted(right, cloze.span[1], side="right")
    starts.append(int(first)), ends.append(int(min(last, first + max_masks)))
  ids = Ragged.of(tokens.ids.to_list(), np.int32)
  return examples.mask_spans([ids[row] for row in range(len(ids))], starts, ends, [examples.NULL_PASSAGE] * len(ids),
                             tokenizer=tokenizer, max_masks=max_masks)


# ----------------------------------------------------------------------------------------- splitting a file of questions


def split_by_title(source: str, *, train: str, test: str, test_share: float = 0.1) -> dict[str, int]:
  """Splits questions so that no title has questions in both parts; the choice hangs on the title alone.

  Args:
    source: records of `{"question", "answer", "title", ...}`.
    train, test: files to write.
    test_share: share of the titles in the test part.

  Returns:
    Number of questions by part.

  Raises:
    UserError: an object without a title, a part without questions, or a part that would be written
      over the source.
  """
  for path in (train, test):
    ownership.check_file(path, reads=[source])
  parts, rejected = {train: [], test: []}, []
  with artifacts.gfile.GFile(source, "rb") as file:
    for record in json_lines.read(file):
      title = record.row and record.row.get("title")
      if record.row is None:
        rejected.append(record)
      elif not isinstance(title, str):
        raise artifacts.UserError(
            f'{source}:{record.number} has no title; wanted {{"question", "answer", "title"}} on every line.')
      elif not json_lines.is_writable(title):
        rejected.append(dataclasses.replace(record, reason=json_lines.HALF_A_PAIR))
      else:
        bucket = int(hashlib.sha1(title.encode()).hexdigest(), 16) % 1000
        parts[test if bucket < 1000 * test_share else train].append(json_lines.dumps(record.row))
  json_lines.tell(source, rejected, num_kept=sum(map(len, parts.values())))
  for path, lines in parts.items():
    if not lines:
      raise artifacts.UserError(f"{source!r} has too few titles to split: nothing is left for {path!r}.")
    artifacts.write_text(path, "".join(lines))
  return {path: len(lines) for path, lines in parts.items()}


if __name__ == "__main__":
  flags.DEFINE_string("input", None, "Lines of {\"question\", \"answer\", \"title\"}.", required=True)
  flags.DEFINE_string("train", None, "File to write.", required=True)
  flags.DEFINE_string("test", None, "File to write, with the titles held out.", required=True)
  flags.DEFINE_float("test_share", 0.1, "Share of the titles held out.")
  settings.start(lambda argv: print(split_by_title(
      flags.FLAGS.input, train=flags.FLAGS.train, test=flags.FLAGS.test, test_share=flags.FLAGS.test_share)))
