"""Splits articles into blocks of whole sentences that fit in a passage.

Also counts the sentences split, the titles cut, and the word pieces that are [UNK].
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from beam_jobs import corpus
from beam_jobs.corpus import Article
from realm_tf.corpus import passages
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.storage import json_lines

SPLIT, CUT_TITLES = "split_sentences", "cut_titles"
WORD_PIECES, UNKNOWN = "word_pieces", "unknown_word_pieces"

# A text counts as at least one word piece per this many characters, so that a megabyte that is a
# single [UNK] does not become a passage.
_CHARS_PER_PIECE = 64
# A word longer than a passage is tokenised in windows of this many characters per word piece of
# room.
_WINDOW_CHARS = 16


@dataclasses.dataclass(frozen=True)
class Blocks:
  """The blocks of an article, or the reason why there are none."""

  article: Article
  title: str
  blocks: Sequence[Sequence[str]]
  reason: str


class Blocker:
  """Splits articles into blocks.

  Args:
    tokenizer: the tokenizer of the passages.
    max_tokens: maximum number of word pieces in `[CLS] title [SEP] text [SEP]`.

  Attributes:
    counts: sentences split, titles cut, word pieces of titles and sentences, and how many of these
      are [UNK].
    first: for each of these counts, the first article concerned and the text in question.
  """

  def __init__(self, tokenizer: Tokenizer, *, max_tokens: int):
    self._tokenizer, self._max_tokens = tokenizer, max_tokens
    self.counts = Counter({SPLIT: 0, CUT_TITLES: 0, WORD_PIECES: 0, UNKNOWN: 0})
    self.first: dict[str, tuple[Article, str]] = {}

  def __call__(self, articles: Iterable[Article]) -> list[Blocks]:
    """Returns the blocks of all articles in order; the articles are tokenised together."""
    found = []
    for article in articles:
      try:
        found.append((article, corpus.sentences_of(article), ""))
      except corpus.Rejected as reason:
        found.append((article, [], str(reason)))
    articles = [article for article, _, _ in found]
    title_sizes = self._sizes(
      ["" if reason else article.title for article, _, reason in found], articles
    )
    owners = [article for article, sentences, _ in found for _ in sentences]
    sizes = iter(
      self._sizes([sentence for _, sentences, _ in found for sentence in sentences], owners)
    )
    return [
      self._block(
        article, sentences, list(itertools.islice(sizes, len(sentences))), title_size, reason
      )
      for (article, sentences, reason), title_size in zip(found, title_sizes, strict=True)
    ]

  def _block(
    self,
    article: Article,
    sentences: Sequence[str],
    sizes: Sequence[int],
    title_size: int,
    reason: str,
  ) -> Blocks:
    title = article.title
    if title_size > self._max_tokens // 2:  # the other half is for the text
      (title, title_size), *_ = self._split(title, self._max_tokens // 2)
      self._count(CUT_TITLES, article, article.title)
    room = self._max_tokens - title_size - passages.SPECIAL_TOKENS
    fitting = []
    for sentence, size in zip(sentences, sizes, strict=True):
      if size > room:
        fitting += self._split(sentence, room)
        self._count(SPLIT, article, sentence)
      else:
        fitting.append((sentence, size))
    blocks = passages.block_sentences(
      [sentence for sentence, _ in fitting],
      [size for _, size in fitting],
      title_tokens=title_size,
      max_tokens=self._max_tokens,
    )
    return Blocks(article, title, blocks, reason)

  def _sizes(self, texts: Sequence[str], articles: Sequence[Article]) -> list[int]:
    """Returns the room that each text takes, in word pieces."""
    if not texts:
      return []
    ids = self._tokenizer(tf.constant(texts, tf.string))
    rows = ids.value_rowids().numpy()
    unknown = np.bincount(rows[ids.values.numpy() == self._tokenizer.unk_id], minlength=len(texts))
    self.counts[WORD_PIECES] += len(rows)
    for row in np.flatnonzero(unknown).tolist():
      self._count(UNKNOWN, articles[row], texts[row], count=int(unknown[row]))
    lengths = ids.row_lengths().numpy()
    return [_size(text, num) for text, num in zip(texts, lengths, strict=True)]

  def _count(self, what: str, article: Article, text: str, *, count: int = 1) -> None:
    self.counts[what] += count
    if what not in self.first:
      self.first[what] = (
        article,
        self._unknown_word(text) if what == UNKNOWN else text[: json_lines.SHOWN_CHARS],
      )

  def _unknown_word(self, text: str) -> str:
    """Returns the first word that is [UNK]."""
    tokens = self._tokenizer.with_offsets(tf.constant([text]))
    at = tokens.ids[0].numpy().tolist().index(self._tokenizer.unk_id)
    data = text.encode()[tokens.starts[0, at].numpy() : tokens.ends[0, at].numpy()]
    return data.decode(errors="replace")[: json_lines.SHOWN_CHARS]

  def _split(self, text: str, room: int) -> list[tuple[str, int]]:
    """Splits a text with single spaces into parts of at most `room` word pieces.

    The text is split between words; none is lost or changed. A word longer than `room` is split
    between word pieces.

    Returns:
      The parts and their sizes.
    """
    parts: list[list[str]] = []
    sizes = [room]
    for word, size in self._sized_words(text, room):
      if sizes[-1] + size > room:
        parts.append([])
        sizes.append(0)
      parts[-1].append(word)
      sizes[-1] += size
    return [(" ".join(words), size) for words, size in zip(parts, sizes[1:], strict=True)]

  def _sized_words(self, text: str, room: int) -> Iterator[tuple[str, int]]:
    starts = self._tokenizer.with_offsets(tf.constant([text])).starts[0].numpy()
    words = text.split(" ")
    ends = np.cumsum([len(word.encode()) + 1 for word in words])
    sizes = np.diff(np.searchsorted(starts, [0, *ends]))
    for word, num in zip(words, sizes, strict=True):
      if _size(word, num) > room:
        yield from self._split_word(word, room)
      else:
        yield word, _size(word, num)

  def _split_word(self, word: str, room: int) -> Iterator[tuple[str, int]]:
    while word:
      part = word[: _WINDOW_CHARS * room]
      starts = self._tokenizer.with_offsets(tf.constant([part])).starts[0].numpy()
      if len(starts) > room:
        part = part.encode()[: starts[room]].decode(errors="ignore") or part[0]
      yield part, _size(part, min(len(starts), room))
      word = word[len(part) :]


def _size(text: str, num_tokens: int) -> int:
  return max(int(num_tokens), len(text) // _CHARS_PER_PIECE)
