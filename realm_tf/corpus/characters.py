"""Character rules of BERT's basic tokenizer.

They define which characters are dropped, which separate words, which are words by themselves, and
how letters are normalised. They follow google-research/bert `tokenization.py` and Hugging Face's
BertNormalizer and BertPreTokenizer. The same rules are used to learn a vocabulary, to tokenise with
it, and to split Chinese for BM25 and for the recall metric.
"""

import dataclasses
import functools
import itertools
import re
import string
import unicodedata

import numpy as np

_IDEOGRAPHS = (
  range(0x3400, 0x4DC0),
  range(0x4E00, 0xA000),
  range(0x20000, 0x2A6E0),
  range(0x2A700, 0x2CEB0),
)
# these have decompositions
_COMPATIBILITY_IDEOGRAPHS = (
  range(0xF900, 0xFB00),
  range(0x2F800, 0x2FA20),
)
_UNSPACED = (
  range(0xE00, 0xF00),
  range(0x1000, 0x10A0),
  range(0x1780, 0x1800),
  range(0x3040, 0x3100),
  range(0x31F0, 0x3200),
)
_HANGUL = range(0xAC00, 0xD7A4)
_SURROGATES = range(0xD800, 0xE000)
# for use inside a regex character class
CJK = "".join(
  f"{chr(block[0])}-{chr(block[-1])}" for block in (*_IDEOGRAPHS, *_COMPATIBILITY_IDEOGRAPHS)
)
_CJK_PUNCTUATION = "".join(
  chr(code)
  for code in (*range(0x3000, 0x3100), *range(0xFF00, 0xFF66))
  if unicodedata.category(chr(code))[0] == "P"
)
_STANDS_ALONE = re.compile(f"([{CJK}{_CJK_PUNCTUATION}])")

LETTER, ALONE, SPACE, MARK, DROPPED = range(5)
END = 0x32400  # from here on: tags, private use and unassigned codes, no letters or marks


def is_cjk(character: str) -> bool:
  """Returns whether BERT treats it as a Chinese character; kana and Hangul are not."""
  return any(ord(character) in block for block in (*_IDEOGRAPHS, *_COMPATIBILITY_IDEOGRAPHS))


def is_unspaced(character: str) -> bool:
  """Returns whether its script is written without spaces, so that words may begin at any letter."""
  return any(ord(character) in block for block in _UNSPACED)


def split_cjk(text: str) -> str:
  """Puts spaces around Chinese characters and East Asian punctuation, where BERT splits words.

  Kana and Hangul stay together, as in BERT.
  """
  return _STANDS_ALONE.sub(r" \1 ", text)


@dataclasses.dataclass(frozen=True)
class WordRules:
  """Rules that split a text into words, which are then split into word pieces.

  The defaults are those of BERT's uncased models.

  Attributes:
    lower_case: whether letters are lower-cased, each by itself.
    strip_accents: whether letters are decomposed (NFD) and lose their marks.
    split_cjk: whether every Chinese character is a word.
    clean_text: whether control characters, U+FFFD and private-use characters are dropped.
    max_word_chars: longer words are split into words of this length, so that no text without spaces
      is lost; BERT maps them to [UNK].
  """

  lower_case: bool = True
  strip_accents: bool = True
  split_cjk: bool = True
  clean_text: bool = True
  max_word_chars: int = 100

  @classmethod
  def for_case(cls, lower_case: bool) -> "WordRules":
    """Returns BERT's rules for its uncased models (True) or its cased ones (False)."""
    return cls(lower_case=lower_case, strip_accents=lower_case)

  def spell(self, character: str) -> str:
    """Returns the letters that replace a character, at least one; a mark is returned itself."""
    letters = character
    if self.strip_accents and character >= "\x80":
      letters = (
        "".join(
          c for c in unicodedata.normalize("NFD", character) if unicodedata.category(c) != "Mn"
        )
        or character
      )
    return "".join(map(str.lower, letters)) if self.lower_case else letters

  def kind(self, character: str) -> int:
    """Classifies a character.

    Returns:
      `LETTER` (joins its neighbours), `ALONE` (a word of its own), `SPACE`, `MARK` (stripped off
      the letter before it) or `DROPPED`.
    """
    category = unicodedata.category(character)
    if category[0] == "Z" or character in "\t\n\r":
      return SPACE
    if self.clean_text and (category in ("Cc", "Cf", "Co") or character == "\ufffd"):
      return DROPPED
    if character in "\x0b\x0c\x85":
      return SPACE
    if self.strip_accents and category == "Mn":
      return MARK
    if self.split_cjk and is_cjk(character):
      return ALONE
    first = self.spell(character)[0]  # "≠" without its stroke is "="
    return ALONE if first in string.punctuation or unicodedata.category(first)[0] == "P" else LETTER

  def words(self, text: str) -> list[str]:
    """Returns the words of a text, spelt as in the vocabulary."""
    size = self.max_word_chars
    return [
      word[at : at + size]
      for word in text.translate(_spaced(self)).split()
      for at in range(0, len(word), size)
    ]


class _Spaced(dict):
  """Character code -> its letters, between spaces if it is a word by itself; filled on demand."""

  def __init__(self, rules: WordRules):
    super().__init__()
    self._rules = rules

  def __missing__(self, code: int) -> str:
    character = chr(code)
    kind = self._rules.kind(character) if code < END else DROPPED
    spelt = self._rules.spell(character)
    self[code] = {LETTER: spelt, ALONE: f" {' '.join(spelt)} ", SPACE: " "}.get(kind, "")
    return self[code]


_spaced = functools.lru_cache(maxsize=None)(_Spaced)


@dataclasses.dataclass(frozen=True)
class Table:
  """`WordRules` as arrays by character code; codes from `END` on are `DROPPED`.

  Attributes:
    kinds: [END + 1] int8.
    letters: int32, the concatenated letters of all characters.
    first: [END + 1] int32, the index of a character's first letter.
    count: [END + 1] int8, the number of a character's letters.
  """

  kinds: np.ndarray
  letters: np.ndarray
  first: np.ndarray
  count: np.ndarray


@functools.cache
def table(rules: WordRules) -> Table:
  """Returns the `Table` of `rules` for all characters."""
  kinds = np.full([END + 1], LETTER, np.int8)
  spelt: list[tuple[int, ...]] = [(code,) for code in range(END + 1)]
  others = np.ones(END, bool)  # the large blocks follow by themselves
  for block in (*_IDEOGRAPHS, _SURROGATES):
    others[block] = False
  for code in itertools.filterfalse(_is_plain, np.flatnonzero(others).tolist()):
    character = chr(code)
    kinds[code] = rules.kind(character)
    if kinds[code] < SPACE:
      spelt[code] = tuple(map(ord, rules.spell(character)))
  for block in _IDEOGRAPHS:
    kinds[block] = ALONE if rules.split_cjk else LETTER
  kinds[_SURROGATES] = kinds[END] = DROPPED  # surrogates are not characters
  count = np.array([len(letters) for letters in spelt], np.int8)
  letters = np.array([letter for letters in spelt for letter in letters], np.int32)
  return Table(kinds, letters, np.cumsum(count, dtype=np.int32) - count, count)


def _is_plain(code: int) -> bool:
  """Returns whether it is one of the many letters without case or marks, which no rule changes."""
  character = chr(code)
  return (
    unicodedata.category(character) in ("Lo", "Cn")
    and not unicodedata.decomposition(character)
    # Hangul decomposes by rule, not by a table entry.
    and not any(code in block for block in (_HANGUL, *_COMPATIBILITY_IDEOGRAPHS))
  )
