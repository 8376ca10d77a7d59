"""Parts of a passage to mark: where an answer occurs, and how much of the passage was read."""

from collections.abc import Iterable, Sequence

import numpy as np

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.passages import PassageTable
from realm_tf.examples.answer_spans import find_words


def occurrences(
  table: PassageTable, number: int, answers: Iterable[Sequence[int]], *, continues: np.ndarray
) -> list[tuple[int, int]]:
  """Returns the byte ranges of a passage's UTF-8 text with any of these answers as whole words."""
  if number == NULL_PASSAGE:
    return []
  starts, ends = table.token_starts[number], table.token_ends[number]
  found = set()
  for pieces in answers:
    if continues[pieces[0]]:
      continue
    for at in np.flatnonzero(find_words(table.text_ids[number], pieces, continues=continues)):
      found.add((int(starts[at]), int(ends[at + len(pieces) - 1])))
  return sorted(found)


def bytes_read(table: PassageTable, number: int, segments: np.ndarray) -> int:
  """Returns how many bytes of a passage's UTF-8 text are in the reader's input.

  The input's segments [L] are 1 there and at the [SEP] after it.
  """
  num_pieces = np.count_nonzero(segments) - 1
  return int(table.token_ends[number][num_pieces - 1]) if num_pieces else 0
