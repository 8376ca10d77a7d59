"""How answers and retrieval are scored: plain Python, the field's published rules."""

import functools
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import regex

from realm_tf import characters

_EXPRESSION_SECS = 1.0  # an expression that takes longer over one text is given up
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
  """NFD, lower case, no ASCII punctuation, no articles, single spaces (SQuAD's and NQ-open's rule)."""
  text = unicodedata.normalize("NFD", text).lower().translate(_PUNCTUATION)
  return " ".join(_ARTICLES.sub(" ", text).split())


class Expression:
  """A regular expression as an answer (CuratedTREC): case is ignored, character classes are Unicode's.

  Matching is the `regex` package's, which can be stopped: an expression that takes longer than a second over one text is given
  up, with a warning, and matches nothing from then on.

  Raises:
    ValueError: not a regular expression.
  """

  def __init__(self, pattern: str):
    try:
      re.compile(pattern, re.IGNORECASE | re.UNICODE | re.MULTILINE)  # as the released scorer does
      self._compiled = regex.compile(pattern, regex.IGNORECASE | regex.UNICODE | regex.MULTILINE | regex.VERSION0)
    except (re.error, regex.error) as error:
      raise ValueError(f"not a regular expression: {error.msg}") from error
    self._given_up = False

  def matches(self, text: str) -> bool:
    """Whether it matches from the text's start: the rule for predictions."""
    return self._try(lambda secs: self._compiled.match(text, timeout=secs) is not None, False)

  def found_in(self, text: str) -> bool:
    """Whether it matches anywhere: the rule for passages."""
    return self._try(lambda secs: self._compiled.search(text, timeout=secs) is not None, False)

  def ranges(self, text: str) -> list[tuple[int, int]]:
    """Start and end of each match, in characters; they do not overlap."""
    return self._try(lambda secs: [match.span() for match in self._compiled.finditer(text, timeout=secs)], [])

  def _try(self, call: Callable, otherwise):
    if self._given_up:
      return otherwise
    try:
      return call(_EXPRESSION_SECS)
    except TimeoutError:
      self._given_up = True
      print(f"WARNING: the answer {self._compiled.pattern!r} takes over {_EXPRESSION_SECS:g} s to match; it is given up.",
            file=sys.stderr, flush=True)
      return otherwise


@functools.lru_cache(maxsize=None)
def expression(pattern: str) -> Expression:
  """The `Expression` of a pattern, the same object every time."""
  return Expression(pattern)


def searchable(text: str) -> str:
  """A text's words after `normalize_answer`, each between spaces; a Chinese character is a word, as in BERT and in BM25."""
  return f" {' '.join(characters.split_cjk(normalize_answer(text)).split())} "


def exact_match(prediction: str, answers: Sequence[str], *, regex: bool = False) -> bool:
  """Whether the prediction equals one of the answers after `normalize_answer`.

  Args:
    regex: the answers are regular expressions, and one must match from the prediction's start.
  """
  if regex:
    return any(expression(answer).matches(prediction) for answer in answers)
  return normalize_answer(prediction) in {normalize_answer(answer) for answer in answers}


def f1(prediction: str, answers: Sequence[str], *, regex: bool = False) -> float:
  """Best harmonic mean of precision and recall over words (SQuAD's rule); exact match where answers are regular expressions."""
  if regex:
    return float(exact_match(prediction, answers, regex=True))
  return max(_f1(normalize_answer(prediction).split(), normalize_answer(answer).split()) for answer in answers)


def _f1(prediction: list[str], answer: list[str]) -> float:
  if not prediction or not answer:
    return float(prediction == answer)
  same = sum((Counter(prediction) & Counter(answer)).values())
  return 2 * same / (len(prediction) + len(answer))


class AnswerMatcher:
  """Which passages hold an answer.

  Args:
    texts: passage texts by number.
    raw: test for the answer as a raw, case-sensitive substring (the released ORQA code) instead of whole `searchable` words
      (DPR's convention, the default). Regular expressions are searched for in the text as written, either way.
  """

  def __init__(self, texts: Sequence[str], *, raw: bool = False):
    self._texts, self._raw = texts, raw
    self._normal: dict[int, str] = {}
    self._found: dict[str, dict[int, bool]] = {}  # expression -> passage number -> whether it is found there

  def has_answer(self, numbers: Sequence[int], answers: Sequence[str], *, regex: bool = False,
                 first_only: bool = False) -> np.ndarray:
    """Whether each passage holds any of the answers.

    Args:
      numbers: [K] passage numbers; a negative one is no passage.
      regex: the answers are regular expressions.
      first_only: look no further than the first passage that does, which is all that recall@k asks for.

    Returns:
      [K] bool.
    """
    if regex:
      holds = lambda number: any(self._finds(answer, number) for answer in answers)
    else:
      wanted = [answer if self._raw else searchable(answer) for answer in answers]
      wanted = [answer for answer in wanted if answer.strip()]
      holds = lambda number: any(answer in self._text(number) for answer in wanted)
    found = np.zeros([len(numbers)], bool)
    for at, number in enumerate(map(int, numbers)):
      found[at] = number >= 0 and holds(number)
      if first_only and found[at]:
        break
    return found

  def _finds(self, answer: str, number: int) -> bool:
    known = self._found.setdefault(answer, {})
    if number not in known:
      known[number] = expression(answer).found_in(self._texts[number])
    return known[number]

  def _text(self, number: int) -> str:
    if self._raw:
      return self._texts[number]
    if number not in self._normal:
      self._normal[number] = searchable(self._texts[number])
    return self._normal[number]


def recall_at(found: Sequence[np.ndarray], ks: Sequence[int]) -> dict[str, float]:
  """Share of queries with an answer among the first k passages.

  Args:
    found: per query, [K] bool from `AnswerMatcher.has_answer`, best first.

  Returns:
    "recall_at_k" -> share, 0 to 1.
  """
  return {f"recall_at_{k}": float(np.mean([row[:k].any() for row in found])) for k in ks}
