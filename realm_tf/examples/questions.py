"""Reads questions and clozes: JSON Lines files in the formats of NQ-open and ORQA.

Every bad line is reported with a reason.
"""

import dataclasses
import sys
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from realm_tf.corpus import metrics
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import masking, packing
from realm_tf.examples.masking import MaskedQueries
from realm_tf.storage import artifacts, json_lines
from realm_tf.storage.columns import Ragged


@dataclasses.dataclass(frozen=True)
class Question:
  """A question or cloze with its acceptable answers.

  Attributes:
    text: the question; for a cloze, the sentence with the answer in it.
    answers: the correct answers; empty if they are unknown.
    span: for a cloze, the byte range of the answer in the UTF-8 text.
    regex: whether the answers are regular expressions (CuratedTREC).
  """

  text: str
  answers: Sequence[str]
  span: tuple[int, int] | None = None
  regex: bool = False


def fingerprint_of(rows: Sequence[Question]) -> str:
  """Returns a fingerprint of questions and their answers, in their order."""
  return artifacts.fingerprint_of([dataclasses.astuple(row) for row in rows])


def read_questions(path: str, *, need_answers: bool = True) -> list[Question]:
  """Reads `{"question": str, "answer": [str, ..]}` records.

  Records may be lines, an array or a sequence of objects; see `json_lines.read`. Bad records are
  left out, and counted by reason on stderr. If a record has `"regex": true`, its answers are
  regular expressions.

  Raises:
    UserError: if the file does not exist, or has no usable line.
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
    return (
      Question(text, answers, regex=regex) if answers or not need_answers else "there is no answer"
    )

  return _read(path, parse, '{"question": str, "answer": [str, ..]}')


def read_clozes(path: str) -> list[Question]:
  """Reads `{"text": str, "span": [start, end], "answer": [str, ..]}` lines.

  The span is in characters.

  Raises:
    UserError: if the file does not exist, or has no usable line.
  """

  def parse(row):
    text, span, answers = row.get("text"), row.get("span"), row.get("answer")
    if (
      not isinstance(text, str)
      or not isinstance(answers, list)
      or not isinstance(span, list)
      or len(span) != 2
    ):
      return "text, span or answer is missing"
    if not all(isinstance(at, int) for at in span) or not all(
      isinstance(answer, str) for answer in answers
    ):
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
    keys = next(
      (
        f" The first object has the keys: {json_lines.keys_of(record.row)}."
        for record in rejected
        if record.row
      ),
      "",
    )
    raise artifacts.UserError(
      f"{path!r} has no usable line; wanted lines of {form}. Got: {told}.{keys} "
      "realm_tf.prepare_questions reads published files."
    )
  json_lines.tell(path, rejected, num_kept=len(rows))
  return rows


def tell_cut(sizes: np.ndarray, *, length: int) -> None:
  """Reports on stderr how many questions exceed `length` word pieces with [CLS] and [SEP]."""
  room = packing.query_room(length)
  if num_cut := np.count_nonzero(sizes > room):
    print(
      f"WARNING: {num_cut:,} of {len(sizes):,} questions are longer than {room} word pieces; "
      "the rest is not read.",
      file=sys.stderr,
    )


def packed_questions(
  questions: Sequence[Question], *, tokenizer: Tokenizer, length: int
) -> np.ndarray:
  """Packs questions for the query tower: [N, length] int32."""
  ids = tokenizer(tf.constant([question.text for question in questions], tf.string))
  return packing.pack_queries(ids, tokenizer=tokenizer, length=length).numpy()


def masked_clozes(
  clozes: Sequence[Question], *, tokenizer: Tokenizer, max_masks: int
) -> MaskedQueries:
  """Masks every word piece inside the answer span of each cloze."""
  tokens = tokenizer.with_offsets(tf.constant([cloze.text for cloze in clozes], tf.string))
  starts, ends = [], []
  for cloze, left, right in zip(
    clozes, tokens.starts.to_list(), tokens.ends.to_list(), strict=True
  ):
    assert cloze.span, "a cloze has a span"
    first = np.searchsorted(left, cloze.span[0])
    last = np.searchsorted(right, cloze.span[1], side="right")
    starts.append(int(first))
    ends.append(int(min(last, first + max_masks)))
  ids = Ragged.of(tokens.ids.to_list(), np.int32)
  return masking.mask_spans(
    [ids[row] for row in range(len(ids))],
    starts,
    ends,
    [NULL_PASSAGE] * len(ids),
    tokenizer=tokenizer,
    max_masks=max_masks,
  )
