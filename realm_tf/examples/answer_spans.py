"""Locates the answers in the passages that are read (ORQA, section 5)."""

from collections.abc import Sequence

import numpy as np

from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer


def answer_spans(
  reader_ids: np.ndarray,
  segments: np.ndarray,
  answers: Sequence[Sequence[int]],
  *,
  tokenizer: Tokenizer,
  max_span: int,
) -> np.ndarray:
  """Marks every occurrence of every answer in the passages read for one question.

  Args:
    reader_ids: [R, L] int32 packed reader inputs.
    segments: [R, L] int32, 1 in the passage's text.
    answers: word pieces of each answer; longer ones than `max_span` are skipped.
    tokenizer: tokenizer of both.
    max_span: W, maximum number of word pieces of an answer.

  Returns:
    [R, L, W] float32, 1 at [r, i, w] where word pieces i .. i + w of passage r are an answer of
    whole words.
  """
  correct = np.zeros([*reader_ids.shape, max_span], np.float32)
  ids = np.where(segments == 1, reader_ids, tokenizer.pad_id)
  for answer in answers:
    if 0 < len(answer) <= max_span:
      correct[:, :, len(answer) - 1] += find_words(ids, answer, continues=tokenizer.continues)
  return np.minimum(correct, 1)


def find_words(ids: np.ndarray, pieces: Sequence[int], *, continues: np.ndarray) -> np.ndarray:
  """Finds where word pieces occur in a row and the last of them ends a word.

  The match is whole words, unless the first piece continues a word.

  Args:
    ids: [.., L] int32.
    pieces: word pieces to find, at least one.
    continues: [V] bool, whether a word piece continues a word.

  Returns:
    [.., L] bool, true at the first piece of each match.
  """
  length, width = ids.shape[-1], len(pieces)
  padded = np.pad(ids, [[0, 0]] * (ids.ndim - 1) + [[0, width]])
  found = ~continues[padded[..., width : width + length]]
  for at, piece in enumerate(pieces):
    found &= padded[..., at : at + length] == piece
  return found


def whole_words(
  table: PassageTable, number: int, start: int, end: int, *, tokenizer: Tokenizer
) -> tuple[int, int] | None:
  """Returns the word-piece range [first, last) of the whole words that a byte range touches.

  The byte range [start, end) is of the passage's text. Returns None if it touches no word.
  """
  first = int(np.searchsorted(table.token_ends[number], start, side="right"))
  last = int(np.searchsorted(table.token_starts[number], end))
  if start == end or first >= last:
    return None
  continues = tokenizer.continues[table.text_ids[number]]
  while first > 0 and continues[first]:
    first -= 1
  while last < len(continues) and continues[last]:
    last += 1
  return first, last


def mark_spans(
  ranges: Sequence[Sequence[tuple[int, int]]], segments: np.ndarray, *, max_span: int
) -> np.ndarray:
  """Marks given spans in the passages read for one question, as `answer_spans` does.

  Args:
    ranges: for each passage, word-piece ranges [first, last) of its text; ranges of more than
      `max_span` word pieces, or beyond the part that is read, are skipped.
    segments: [R, L] int32 packed reader segments.
    max_span: W, maximum number of word pieces of a span.

  Returns:
    [R, L, W] float32.
  """
  correct = np.zeros([*segments.shape, max_span], np.float32)
  for row, spans in enumerate(ranges):
    text = np.flatnonzero(segments[row])  # includes the [SEP] after it
    for first, last in spans:
      if last - first <= max_span and last < len(text):
        correct[row, text[0] + first, last - first - 1] = 1
  return correct
