"""Answers: the best span of whole words of the passages read for a question."""

import dataclasses

import numpy as np

from realm_tf import examples, passages


@dataclasses.dataclass(frozen=True)
class Answer:
  """One answer with the passages it was chosen from.

  Attributes:
    text: a substring of the passage it was read from; "" where there was nothing to read.
    score: reader score + retrieval score of the span.
    read_from: passage number.
    byte_span: (start, end) of the answer in that passage's UTF-8 text.
    numbers, scores: the passages found, best first.
    readable: whether the passages read hold a right answer, so that a perfect reader would have found it.
  """

  text: str
  score: float
  read_from: int
  byte_span: tuple[int, int]
  numbers: np.ndarray
  scores: np.ndarray
  readable: bool = False


def best_answer(
  scores: np.ndarray,
  mask: np.ndarray,
  reader_ids: np.ndarray,
  segments: np.ndarray,
  numbers: np.ndarray,
  retrieval_scores: np.ndarray,
  table: passages.PassageTable,
  *,
  continues: np.ndarray,
) -> Answer:
  """The best span of whole words of one question.

  Args:
    scores, mask: [R, L, W].
    reader_ids, segments: [R, L].
    numbers, retrieval_scores: [K] of the beam.
    continues: [V] which word pieces go on inside a word.
  """
  length, width = scores.shape[1:]
  inside = np.pad(continues[reader_ids], [[0, 0], [0, width]])
  ends = np.stack(
    [inside[:, w + 1 : w + 1 + length] for w in range(width)], axis=-1
  )  # the next piece belongs to the same word
  allowed = (mask > 0) & ~inside[:, :length, None] & ~ends
  if not allowed.any():
    return Answer("", float("-inf"), examples.NULL_PASSAGE, (0, 0), numbers, retrieval_scores)
  at, start, size = np.unravel_index(np.argmax(np.where(allowed, scores, -np.inf)), scores.shape)
  first = start - int(np.argmax(segments[at] == 1))  # word piece of the passage's text
  number = int(numbers[at])
  begin, end = int(table.token_starts[number][first]), int(table.token_ends[number][first + size])
  text = table.texts[number].encode()[begin:end].decode()
  return Answer(
    text, float(scores[at, start, size]), number, (begin, end), numbers, retrieval_scores
  )
