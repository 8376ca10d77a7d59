"""Characters as BERT's basic tokenizer sees them.

It says what is left out, what parts words, what is a word of its own, and how letters are spelt.
The rules are those of google-research/bert `tokenization.py` and of Hugging Face's BertNormalizer
and BertPreTokenizer. The same rules learn a vocabulary, tokenise with it, and split Chinese for BM25
and for the recall metric.
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
_COMPATIBILITY_IDEOGRAPHS = (
  range(0xF900, 0xFB00),
  range(0x2F800, 0x2FA20),
)  # those have decompositions
_UNSPACED = (
  range(0xE00, 0xF00),
  range(0x1000, 0x10A0),
  range(0x1780, 0x1800),
  range(0x3040, 0x3100),
  range(0x31F0, 0x3200),
)
CJK = "".join(
  f"{chr(block[0])}-{chr(block[-1])}" for block in (*_IDEOGRAPHS, *_COMPATIBILITY_IDEOGRAPHS)
)  # for a regex
_CJK_PUNCTUATION = "".join(
  chr(code)
  for code in (*range(0x3000, 0x3100), *range(0xFF00, 0xFF66))
  if unicodedata.category(chr(code))[0] == "P"
)
_STANDS_ALONE = re.compile(f"([{CJK}{_CJK_PUNCTUATION}])")

LETTER, ALONE, SPACE, MARK, DROPPED = range(5)
END = 0x32400  # no letter or mark of the languages is at or beyond: tags, private use, nothing yet


def is_cjk(character: str) -> bool:
  """Whether BERT takes it for a Chinese character; kana and Hangul are none."""
  return any(ord(character) in block for block in (*_IDEOGRAPHS, *_COMPATIBILITY_IDEOGRAPHS))


def is_unspaced(character: str) -> bool:
  """Whether its script is written without spaces: words begin anywhere in a run of letters."""
  return any(ord(character) in block for block in _UNSPACED)


def split_cjk(text: str) -> str:
  """The text with spaces around Chinese characters and East Asian punctuation, as BERT splits them.

  Kana and Hangul stay together, as in BERT.
  """
  return _STANDS_ALONE.sub(r" \1 ", text)


@dataclasses.dataclass(frozen=True)
class WordRules:
  """How a text becomes words, in which word pieces are then looked up.

  The defaults are those of BERT's uncased models.

  Attributes:
    lower_case: letters are lower-cased, each by itself.
    strip_accents: letters are decomposed (NFD) and lose their marks.
    split_cjk: every Chinese character is a word.
    clean_text: control characters, U+FFFD and private characters are left out.
    max_word_chars: a longer word goes on as the next one, so that nothing of a text without spaces
      is lost; BERT makes it [UNK].
  """

  lower_case: bool = True
  strip_accents: bool = True
  split_cjk: bool = True
  clean_text: bool = True
  max_word_chars: int = 100

  @classmethod
  def for_case(cls, lower_case: bool) -> "WordRules":
    """BERT's rules for its uncased models (True) and for its cased ones."""
    return cls(lower_case=lower_case, strip_accents=lower_case)

  def spell(self, character: str) -> str:
    """The letters that stand for a character, at least one; of a mark, itself."""
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
    """What a character is.

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
    """The words of a text, spelt as the vocabulary spells them."""
    size = self.max_word_chars
    return [
      word[at : at + size]
      for word in text.translate(_spaced(self)).split()
      for at in range(0, len(word), size)
    ]


class _Spaced(dict):
  """Character code -> its letters, between spaces if it stands alone; filled as they are met."""

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
  """`WordRules` by character code; codes from `END` on are `DROPPED`.

  Attributes:
    kinds: [END + 1] int8.
    letters: int32, the letters of all characters one after the other.
    first: [END + 1] int32, where a character's letters begin.
    count: [END + 1] int8, how many they are.
  """

  kinds: np.ndarray
  letters: np.ndarray
  first: np.ndarray
  count: np.ndarray


@functools.lru_cache(maxsize=None)
def table(rules: WordRules) -> Table:
  """All characters of a rules."""
  kinds = np.full([END + 1], LETTER, np.int8)
  spelt = [(code,) for code in range(END + 1)]
  for code in itertools.filterfalse(_is_plain, range(END)):
    character = chr(code)
    kinds[code] = rules.kind(character)
    if kinds[code] < SPACE:
      spelt[code] = tuple(map(ord, rules.spell(character)))
  for block in _IDEOGRAPHS:
    kinds[block] = ALONE if rules.split_cjk else LETTER
  kinds[0xD800:0xE000] = kinds[END] = DROPPED  # surrogates are no characters
  count = np.array([len(letters) for letters in spelt], np.int8)
  letters = np.array([letter for letters in spelt for letter in letters], np.int32)
  return Table(kinds, letters, np.cumsum(count, dtype=np.int32) - count, count)


def _is_plain(code: int) -> bool:
  """Whether it is one of the many letters without case and marks, which no rule changes."""
  character = chr(code)
  return (
    unicodedata.category(character) in ("Lo", "Cn", "Cs")
    and not unicodedata.decomposition(character)
    and not (is_cjk(character) or 0xAC00 <= code < 0xD7A4)
  )  # Hangul's decomposition is a rule, not in the table
