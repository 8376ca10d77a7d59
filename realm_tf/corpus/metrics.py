"""Metrics of answers and retrieval, by the field's published rules, in plain Python."""

import copy
import functools
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import regex

from realm_tf.corpus import characters

_EXPRESSION_SECS = 1.0  # an expression that takes longer on one text is abandoned
# Expressions longer than this, or longer once every repetition is written out, are rejected.
_MAX_EXPRESSION_CHARS, _MAX_WRITTEN_OUT = 4000, 100_000
_SHOWN_CHARS = 100
_TOKEN = re.compile(
  r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<least>\d*),?(?P<most>\d*)\}|(?P<bracket>[()])|.",
  re.DOTALL,
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
  """Normalises an answer: NFD, lower case, no ASCII punctuation, no articles, single spaces.

  This is the rule of SQuAD and NQ-open.
  """
  text = unicodedata.normalize("NFD", text).lower().translate(_PUNCTUATION)
  return " ".join(_ARTICLES.sub(" ", text).split())


class Expression:
  """A regular expression as an answer (CuratedTREC).

  Case is ignored, and character classes are Unicode.

  Matching uses the `regex` package, which supports timeouts. If an expression takes longer than a
  second on one text, it is abandoned with a warning, and matches nothing from then on.

  Raises:
    ValueError: if the pattern is not a regular expression, or is too long or nested too deep.
  """

  def __init__(self, pattern: str):
    if len(pattern) > _MAX_EXPRESSION_CHARS or _written_out(pattern) > _MAX_WRITTEN_OUT:
      raise ValueError("a regular expression that is too long, or repeats too much")
    try:
      re.compile(pattern, re.IGNORECASE | re.UNICODE | re.MULTILINE)  # as the released scorer does
      self._compiled = regex.compile(
        pattern, regex.IGNORECASE | regex.UNICODE | regex.MULTILINE | regex.VERSION0
      )
    except (re.error, regex.error) as error:
      raise ValueError(f"not a regular expression: {error.msg[:_SHOWN_CHARS]}") from error
    except (RecursionError, OverflowError, MemoryError) as error:
      raise ValueError("a regular expression that is nested too deep") from error
    self._given_up = False

  def matches(self, text: str) -> bool:
    """Returns whether it matches at the start of the text: the rule for predictions."""
    return self._try(lambda secs: self._compiled.match(text, timeout=secs) is not None, False)

  def found_in(self, text: str) -> bool:
    """Returns whether it matches anywhere in the text: the rule for passages."""
    return self._try(lambda secs: self._compiled.search(text, timeout=secs) is not None, False)

  def ranges(self, text: str) -> list[tuple[int, int]]:
    """Returns the start and end of each match, in characters; matches do not overlap."""
    return self._try(
      lambda secs: [match.span() for match in self._compiled.finditer(text, timeout=secs)], []
    )

  def _try(self, call: Callable, otherwise):
    if self._given_up:
      return otherwise
    try:
      return call(_EXPRESSION_SECS)
    except TimeoutError:
      self._given_up = True
      print(
        f"WARNING: the answer {self._compiled.pattern!r} takes over {_EXPRESSION_SECS:g} s to "
        "match and will be ignored.",
        file=sys.stderr,
        flush=True,
      )
      return otherwise


def _written_out(pattern: str) -> int:
  """Estimates the characters of a pattern with each `{..}` written out, as `regex` does."""
  sizes, last = [0], 0
  for token in _TOKEN.finditer(pattern):
    if token["bracket"] == "(":
      sizes.append(0)
      last = 0
      continue
    if token["bracket"] == ")" and len(sizes) > 1:
      last = sizes.pop()
    elif token["least"] or token["most"]:
      times = max(int((token[name] or "1")[:9]) for name in ("least", "most"))
      last *= max(times - 1, 1)
    else:
      last = 1
    sizes[-1] += last
    if sizes[-1] > _MAX_WRITTEN_OUT:
      break
  return sum(sizes)


@functools.cache
def expression(pattern: str) -> Expression:
  """Returns the `Expression` of a pattern, the same object every time."""
  return Expression(pattern)


def searchable(text: str) -> str:
  """Returns the words of a text after `normalize_answer`, each between spaces.

  Each Chinese character is a word, as in BERT and in BM25.
  """
  return f" {' '.join(characters.split_cjk(normalize_answer(text)).split())} "


def exact_match(prediction: str, answers: Sequence[str], *, regex: bool = False) -> bool:
  """Returns whether the prediction equals one of the answers after `normalize_answer`.

  Args:
    prediction: the predicted text.
    answers: the correct answers.
    regex: whether the answers are regular expressions, one of which must match at the start of the
      prediction.
  """
  if regex:
    return any(expression(answer).matches(prediction) for answer in answers)
  return normalize_answer(prediction) in {normalize_answer(answer) for answer in answers}


def f1(prediction: str, answers: Sequence[str], *, regex: bool = False) -> float:
  """Returns the best harmonic mean of precision and recall over words (SQuAD's rule).

  If answers are regular expressions, returns the exact match.
  """
  if regex:
    return float(exact_match(prediction, answers, regex=True))
  return max(
    _f1(normalize_answer(prediction).split(), normalize_answer(answer).split())
    for answer in answers
  )


def _f1(prediction: list[str], answer: list[str]) -> float:
  if not prediction or not answer:
    return float(prediction == answer)
  same = sum((Counter(prediction) & Counter(answer)).values())
  return 2 * same / (len(prediction) + len(answer))


class AnswerMatcher:
  """Finds which passages hold an answer.

  Args:
    texts: passage texts by number.
    raw: whether to search for the answer as a raw, case-sensitive substring (the released ORQA
      code) instead of whole `searchable` words (DPR's convention, the default). Either way, regular
      expressions are matched against the text as written.
  """

  def __init__(self, texts: Sequence[str], *, raw: bool = False):
    self._texts, self._raw = texts, raw
    self._normal: dict[int, str] = {}
    self._found: dict[
      str, dict[int, bool]
    ] = {}  # expression -> passage number -> whether it is found there

  def over(self, texts: Sequence[str]) -> "AnswerMatcher":
    """Returns a matcher for a later version of the corpus, whose passages keep their numbers."""
    other = copy.copy(self)
    other._texts = texts
    return other

  def has_answer(
    self,
    numbers: Sequence[int] | np.ndarray,
    answers: Sequence[str],
    *,
    regex: bool = False,
    first_only: bool = False,
  ) -> np.ndarray:
    """Returns whether each passage holds any of the answers.

    Args:
      numbers: [K] passage numbers; a negative number is no passage.
      answers: texts, or regular expressions.
      regex: whether the answers are regular expressions.
      first_only: whether to stop at the first passage that holds an answer, which is enough for
        recall@k.

    Returns:
      [K] bool.
    """
    if regex:

      def holds(number):
        return any(self._finds(answer, number) for answer in answers)
    else:
      wanted = [answer if self._raw else searchable(answer) for answer in answers]
      wanted = [answer for answer in wanted if answer.strip()]

      def holds(number):
        return any(answer in self._text(number) for answer in wanted)

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
  """Returns the share of queries with an answer among the first k passages.

  Args:
    found: for each query, [K] bool from `AnswerMatcher.has_answer`, best first.
    ks: the values of k.

  Returns:
    "recall_at_k" -> share, 0 to 1.
  """
  return {f"recall_at_{k}": float(np.mean([row[:k].any() for row in found])) for k in ks}
