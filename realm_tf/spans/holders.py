"""Which passages hold a phrase: phrase hashes, and the inverted list of `annotate_spans`.

A phrase is the sequence of words of a text after `metrics.searchable`: NFD, lower case, no
punctuation, no articles, each Chinese character by itself. A passage holds a phrase if the words of
its text contain the phrase's words in a row.

A phrase is identified by 64 bits, stored as int64; 0 means no phrase. A word's hash is the first 64
bits of BLAKE2b, and n words are combined by a polynomial modulo 2**64, so that the hashes of all
phrases of n words follow from those of n - 1 words. Two of 20 million phrases share their 64 bits
in one of 100,000 corpora. In one of 70 corpora of 13 million passages, which have 10 billion
sequences of up to 10 words, some passage counts as the holder of a phrase that it does not hold.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from realm_tf.corpus import metrics, passages
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.spans import rules
from realm_tf.storage import artifacts
from realm_tf.storage.columns import Ragged

KIND = "holders"  # kind of the record files
MAX_HOLDERS = 20  # other passages; a phrase that more of them hold is not specific enough
MAX_WORDS = 10  # of a phrase
NO_PHRASE = 0

_MULTIPLIER = np.uint64(0x94D049BB133111EB)  # 3 modulo 4: the words' order counts too
_CACHED_WORDS = 1 << 18
_NO_PAIRS = (np.zeros([0], np.int64), np.zeros([0], np.int32))


@dataclasses.dataclass(frozen=True)
class HeldPhrase:
  """The phrase of a salient span and the passages that hold it: a record of the inverted list.

  Attributes:
    phrase: hash from `phrase_of`.
    passages: ascending numbers in the knowledge corpus, at most `MAX_HOLDERS` + 1, because one may
      be the passage that the span comes from.
  """

  phrase: int = dataclasses.field(metadata={passages.LEAST: pa.int64()})
  passages: Sequence[int] = dataclasses.field(metadata={passages.LEAST: pa.int32()})


# ------------------------------------------------------------------------------------------ phrases


def phrase_of(text: str) -> int:
  """Returns the hash of a phrase; 0 if it has no words, or more than `MAX_WORDS`."""
  return int(phrases_of([text])[0])


def phrases_of(texts: Sequence[str]) -> np.ndarray:
  """Returns `phrase_of` of each text: [N] int64."""
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
  """Finds which of the wanted phrases occur in which texts.

  Args:
    phrases: [P] int64, ascending.
    texts: the texts of N passages.
    numbers: [N] int, the passage numbers.

  Returns:
    [M] int64 phrases and [M] int32 numbers of passages that hold them, as from `pairs`.
  """
  found, numbers = [], np.asarray(numbers, np.int32)
  for sequences, rows in _sequences(_words_of(texts)):
    order = np.argsort(sequences)  # lookups in sorted order are many times faster
    sequences, rows = sequences[order], rows[order]
    known = phrases.searchsorted(sequences, "right") > phrases.searchsorted(sequences, "left")
    found.append((sequences[known], numbers[rows[known]]))
  return pairs(found)


def pairs(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  """Returns all pairs of phrase and passage number, sorted and without duplicates.

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
  """Returns which of the equal parts of int64's range each phrase ([N] int64) is in: [N] int64.

  Sorted buckets, concatenated in order, are sorted as a whole.
  """
  return ((phrases >> 32) + (1 << 31)) * num_buckets >> 32


def _words_of(texts: Sequence[str]) -> list[list[str]]:
  return [metrics.searchable(text).split() for text in texts]


def _sequences(texts: Sequence[Sequence[str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields hashes [M] and rows [M] of all sequences of 1, 2, .. `MAX_WORDS` words."""
  words = np.fromiter(map(_hash_of, itertools.chain.from_iterable(texts)), np.uint64)
  rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
  hashes = np.zeros([len(words) + 1], np.uint64)
  for size in range(1, MAX_WORDS + 1):
    hashes = hashes[:-1] * _MULTIPLIER + words[size - 1 :]
    inside = rows[: len(hashes)] == rows[size - 1 :]  # it begins and ends in the same text
    phrases = hashes[inside].view(np.int64)
    phrases[phrases == NO_PHRASE] = 1
    yield phrases, rows[: len(hashes)][inside]


@functools.lru_cache(maxsize=_CACHED_WORDS)
def _hash_of(word: str) -> int:
  return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


# ----------------------------------------------------------------------------------------- the list


@dataclasses.dataclass(frozen=True)
class Holders:
  """The inverted list.

  Attributes:
    phrases: [P] int64, ascending, in memory.
    passages: int32 passage numbers of each phrase, ascending.
  """

  phrases: np.ndarray
  passages: Ragged

  @classmethod
  def load(cls, spans_folder: str) -> "Holders":
    """Reads the list of a complete spans folder.

    Raises:
      ArtifactError: if it is not a complete spans folder, or has no holders.
    """
    info = artifacts.read_info(spans_folder, kind=rules.KIND)
    if "knowledge" not in info["inputs"]:
      raise artifacts.ArtifactError(
        f"{spans_folder!r} does not say which passages hold its spans: an earlier version made "
        "it. Run beam_jobs.annotate_spans again."
      )
    columns = passages.read_all(passages.shard_paths(spans_folder, KIND), HeldPhrase)
    return cls(columns["phrase"].joined(), columns["passages"])

  def __len__(self) -> int:
    return len(self.phrases)

  def of(self, phrases: np.ndarray) -> np.ndarray:
    """Returns the passages that hold each phrase.

    Args:
      phrases: [N] int64; 0 is no phrase.

    Returns:
      [N, MAX_HOLDERS + 1] int32, ascending passage numbers, then NULL_PASSAGE. A row has no passage
      if its phrase is 0, unknown, or held by more passages.
    """
    phrases = np.asarray(phrases, np.int64)
    at = self.phrases.searchsorted(phrases, "left")
    known = np.flatnonzero(at < self.phrases.searchsorted(phrases, "right"))
    held = self.passages.take(at[known])
    found = np.full([len(phrases), MAX_HOLDERS + 1], NULL_PASSAGE, np.int32)
    sizes = np.zeros(len(phrases), np.int64)
    sizes[known] = held.sizes()
    found[np.arange(MAX_HOLDERS + 1) < sizes[:, None]] = held.values
    return found
