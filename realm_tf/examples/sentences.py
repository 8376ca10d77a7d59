"""Parts of passages: their sentences, and runs of whole words."""

from collections.abc import Sequence

import numpy as np

from realm_tf.storage.columns import Ragged


def sentence_ranges(
  token_starts: np.ndarray, sentence_starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the word-piece range [start, end) of each sentence of a passage.

  Args:
    token_starts: [T] byte offsets of the word pieces in the passage's text.
    sentence_starts: [S] byte offsets of the sentences in the passage's text.
  """
  starts = np.searchsorted(token_starts, sentence_starts)
  return starts, np.append(starts[1:], len(token_starts))


def draw_sentences(
  text_ids: Ragged,
  token_starts: Ragged,
  sentence_starts: Ragged,
  *,
  share: float,
  rng: np.random.Generator,
) -> Ragged:
  """Draws one sentence of each of some passages uniformly; returns its word pieces.

  Args:
    text_ids: word pieces of the passages, as in a `PassageTable`.
    token_starts: byte offsets of the word pieces, as in a `PassageTable`.
    sentence_starts: byte offsets of the sentences, as in a `PassageTable`.
    share: share of the passages to draw from.
    rng: draws the passages and the sentences.
  """
  drawn = []
  for number in np.flatnonzero(rng.random(len(text_ids)) < share):
    starts, ends = sentence_ranges(token_starts[number], sentence_starts[number])
    whole = np.flatnonzero(ends > starts)
    if len(whole):
      pick = rng.choice(whole)
      drawn.append(text_ids[number][starts[pick] : ends[pick]])
  return Ragged.of(drawn, np.int32)


def crop(
  begins: np.ndarray,
  num_words: Sequence[int],
  rng: np.random.Generator,
  *,
  keep: tuple[int, int] = (0, 0),
) -> slice:
  """Draws a random run of whole words.

  Args:
    begins: [L] bool, whether a word begins with this word piece.
    num_words: fewest and most words, drawn uniformly; all words if there are fewer.
    rng: draws the number of words and the first word.
    keep: word pieces [first, last) that the run must contain, even if that makes it longer.

  Returns:
    The word pieces of the run.
  """
  starts = np.append(np.flatnonzero(begins), len(begins))
  starts[0] = 0  # the rest of a split word counts as a word
  size = min(int(rng.integers(num_words[0], num_words[1], endpoint=True)), len(starts) - 1)
  lowest, highest = 0, len(starts) - 1 - size  # where the run may begin
  if keep[0] < keep[1]:
    first = int(np.searchsorted(starts, keep[0], side="right")) - 1
    last = int(np.searchsorted(starts, keep[1]))  # the word after it
    size = max(size, last - first)
    lowest, highest = max(last - size, 0), min(first, len(starts) - 1 - size)
  at = rng.integers(lowest, highest, endpoint=True)
  return slice(int(starts[at]), int(starts[at + size]))
