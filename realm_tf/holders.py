"""Which passages hold a phrase: hashes of phrases, and the inverted list of `annotate_spans`.

A phrase is the words of a text as `metrics.searchable` parts them: NFD, lower case, no punctuation,
no articles, a Chinese character by itself. A passage holds a phrase if the words of its text
contain the phrase's words in a row.

A phrase is known by 64 bits, kept as int64; 0 stands for no phrase. A word's hash is the first 64
bits of BLAKE2b, and n words are combined by a polynomial modulo 2**64, so that the hashes of all
phrases of n words follow from those of n - 1 words. Two of 20 million phrases share their 64 bits
in one of 100,000 corpora. In one of 70 corpora of 13 million passages, which have 10 billion
sequences of up to 10 words, some passage is taken for the holder of a phrase that it does not hold.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from realm_tf import artifacts, metrics, passages
from realm_tf.passages import Ragged

KIND = "holders"  # of the record files
MAX_HOLDERS = 20  # other passages: a phrase that more of them hold tells too little
MAX_WORDS = 10  # of a phrase
NO_PHRASE = 0
NULL_PASSAGE = -1  # passage number of the empty candidate

_MULTIPLIER = np.uint64(0x94D049BB133111EB)  # 3 modulo 4: the words' order counts too
_CACHED_WORDS = 1 << 18
_NO_PAIRS = (np.zeros([0], np.int64), np.zeros([0], np.int32))


@dataclasses.dataclass(frozen=True)
class HeldPhrase:
  """A phrase of a salient span and who holds it: a record of the inverted list.

  Attributes:
    phrase: as `phrase_of` gives it.
    passages: ascending numbers in the knowledge corpus, at most `MAX_HOLDERS` + 1: one may be the
      passage that the span stands in.
  """

  phrase: int
  passages: Sequence[int]


# ------------------------------------------------------------------------------------------ phrases


def phrase_of(text: str) -> int:
  """The hash of a phrase; 0 where it has no word, or more than `MAX_WORDS`."""
  return int(phrases_of([text])[0])


def phrases_of(texts: Sequence[str]) -> np.ndarray:
  """`phrase_of` of each text: [N] int64."""
  words = _words_of(texts)
  found = np.full([len(texts)], NO_PHRASE, np.int64)
  num_words = np.array([len(row) for row in words], np.int64)
  for size, (phrases, rows) in enumerate(_sequences(words), start=1):
    whole = num_words[rows] == size
    found[rows[whole]] = phrases[whole]
  return found


def find(
  phrases: np.ndarray, texts: Sequence[str], numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Which of the wanted phrases stand in which texts.

  Args:
    phrases: [P] int64, ascending.
    texts: of N passages.
    numbers: [N] int, their numbers.

  Returns:
    [M] int64 phrases and [M] int32 passage numbers that hold them, as from `pairs`.
  """
  found, numbers = [], np.asarray(numbers, np.int32)
  for sequences, rows in _sequences(_words_of(texts)):
    order = np.argsort(sequences)  # looked up in order, which is many times faster
    sequences, rows = sequences[order], rows[order]
    known = phrases.searchsorted(sequences, "right") > phrases.searchsorted(sequences, "left")
    found.append((sequences[known], numbers[rows[known]]))
  return pairs(found)


def pairs(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  """All pairs of phrase and passage number, in their order and each once.

  Args:
    parts: [M] int64 phrases and [M] int32 passage numbers.
  """
  parts = [_NO_PAIRS, *parts]
  phrases, numbers = (np.concatenate([part[at] for part in parts]) for at in (0, 1))
  order = np.lexsort((numbers, phrases))
  phrases, numbers = phrases[order], numbers[order]
  new = np.ones([len(order)], bool)
  new[1:] = (phrases[1:] != phrases[:-1]) | (numbers[1:] != numbers[:-1])
  return phrases[new], numbers[new]


def bucket_of(phrases: np.ndarray, num_buckets: int) -> np.ndarray:
  """Which of the equal parts of int64's range each phrase ([N] int64) lies in: [N] int64.

  Buckets in their order, each one sorted, are sorted as a whole.
  """
  return ((phrases >> 32) + (1 << 31)) * num_buckets >> 32


def _words_of(texts: Sequence[str]) -> list[list[str]]:
  return [metrics.searchable(text).split() for text in texts]


def _sequences(texts: Sequence[Sequence[str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """For 1, 2, .. `MAX_WORDS` words: hashes [M] of all sequences of so many, and their rows [M]."""
  words = np.fromiter(map(_hash_of, itertools.chain.from_iterable(texts)), np.uint64)
  rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
  hashes = np.zeros([len(words) + 1], np.uint64)
  for size in range(1, MAX_WORDS + 1):
    hashes = hashes[:-1] * _MULTIPLIER + words[size - 1 :]
    inside = rows[: len(hashes)] == rows[size - 1 :]  # it ends in the text that it begins in
    phrases = hashes[inside].view(np.int64)
    phrases[phrases == NO_PHRASE] = 1
    yield phrases, rows[: len(hashes)][inside]


@functools.lru_cache(maxsize=_CACHED_WORDS)
def _hash_of(word: str) -> int:
  return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


# ---------------------------------------------------------------------------------------- the list


@dataclasses.dataclass(frozen=True)
class Holders:
  """The inverted list in memory.

  Attributes:
    phrases: [P] int64, ascending.
    passages: int32 passage numbers of each, ascending.
  """

  phrases: np.ndarray
  passages: Ragged

  @classmethod
  def load(cls, spans_folder: str) -> "Holders":
    """Reads the list of a complete spans folder.

    Raises:
      ArtifactError: not a complete spans folder, or one without holders.
    """
    info = artifacts.read_info(spans_folder, kind="spans")
    if "knowledge" not in info["inputs"]:
      raise artifacts.ArtifactError(
        f"{spans_folder!r} does not tell which passages hold its spans: an earlier version made "
        "it. Run beam_jobs.annotate_spans again."
      )
    features = {
      "phrase": tf.io.FixedLenFeature([], tf.int64),
      "passages": tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int64),
    }
    phrases, numbers = ([empty] for empty in _NO_PAIRS)
    sizes = [[0]]
    for rows in passages.read_columns(passages.shard_paths(spans_folder, KIND), features):
      phrases.append(rows["phrase"].numpy())
      numbers.append(rows["passages"].values.numpy().astype(np.int32))
      sizes.append(rows["passages"].row_lengths().numpy())
    splits = np.cumsum(np.concatenate(sizes), dtype=np.int64)
    return cls(np.concatenate(phrases), Ragged(np.concatenate(numbers), splits))

  def __len__(self) -> int:
    return len(self.phrases)

  def of(self, phrases: np.ndarray) -> np.ndarray:
    """The passages that hold each phrase.

    Args:
      phrases: [N] int64; 0 is no phrase.

    Returns:
      [N, MAX_HOLDERS + 1] int32, ascending passage numbers and then -1; all -1 where a phrase is 0,
      unknown, or held by more passages.
    """
    phrases = np.asarray(phrases, np.int64)
    starts = self.passages.splits[self.phrases.searchsorted(phrases, "left")]
    ends = self.passages.splits[self.phrases.searchsorted(phrases, "right")]
    at = starts[:, None] + np.arange(MAX_HOLDERS + 1)  # [N, MAX_HOLDERS + 1]
    found = np.full(at.shape, NULL_PASSAGE, np.int32)
    held = at < ends[:, None]
    found[held] = self.passages.values[at[held]]
    return found
