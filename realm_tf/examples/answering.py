"""Answers: the best span of whole words in the passages read for a question."""

import dataclasses

import numpy as np
from keras import ops

from realm_tf.corpus import passages
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.models import span_reader


@dataclasses.dataclass(frozen=True)
class Prediction:
  """A system's answer to one question, with the passages that it was chosen from.

  Attributes:
    text: a substring of the passage it was read from; "" if there was nothing to read.
    score: reader score + retrieval score of the span.
    read_from: number of the passage that it was read from.
    byte_span: (start, end) of the answer in that passage's UTF-8 text.
    numbers, scores: the passages found, best first.
    readable: whether the passages read hold a correct answer, which a perfect reader would find.
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
) -> Prediction:
  """Returns the best span of whole words for one question.

  Args:
    scores: [R, L, W] span scores, including the retrieval score.
    mask: [R, L, W], positive for spans inside the passage's text.
    reader_ids: [R, L] int32 packed reader inputs.
    segments: [R, L] int32, 1 in the passage's text.
    numbers: [K] passage numbers of the beam, best first.
    retrieval_scores: [K] retrieval scores of the beam.
    table: the passages that `numbers` refers to.
    continues: [V] bool, whether a word piece continues a word.
  """
  whole = span_reader.whole_word_mask(continues[reader_ids], max_span=scores.shape[-1])
  allowed = (mask > 0) & ops.convert_to_numpy(whole)
  best = int(span_reader.best_span(scores.reshape(-1), allowed.reshape(-1)))
  at, start, size = np.unravel_index(best, scores.shape)
  if not allowed[at, start, size]:
    return Prediction("", float("-inf"), NULL_PASSAGE, (0, 0), numbers, retrieval_scores)
  first = start - int(np.argmax(segments[at] == 1))  # word piece of the passage's text
  number = int(numbers[at])
  begin, end = int(table.token_starts[number][first]), int(table.token_ends[number][first + size])
  text = table.texts[number].encode()[begin:end].decode()
  return Prediction(
    text, float(scores[at, start, size]), number, (begin, end), numbers, retrieval_scores
  )
