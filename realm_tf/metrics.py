"""How answers and retrieval are scored: plain Python, the field's published rules."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
  """NFD, lower case, no ASCII punctuation, no articles, single spaces (SQuAD's and NQ-open's rule)."""
  text = unicodedata.normalize("NFD", text).lower().translate(_PUNCTUATION)
  return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
  """Whether the prediction equals one of the answers after `normalize_answer`."""
  return normalize_answer(prediction) in {normalize_answer(answer) for answer in answers}


def f1(prediction: str, answers: Sequence[str]) -> float:
  """Best harmonic mean of precision and recall over words (SQuAD's rule)."""
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
    raw: test for the answer as a raw, case-sensitive substring (the released ORQA code) instead of whole words after
      `normalize_answer` (DPR's convention, the default).
  """

  def __init__(self, texts: Sequence[str], *, raw: bool = False):
    self._texts, self._raw = texts, raw
    self._normal: dict[int, str] = {}

  def has_answer(self, numbers: Sequence[int], answers: Sequence[str]) -> np.ndarray:
    """[K] bool: whether each passage holds any of the answers."""
    wanted = [answer if self._raw else f" {normalize_answer(answer)} " for answer in answers]
    wanted = [answer for answer in wanted if answer.strip()]
    return np.array([any(answer in text for answer in wanted) for text in map(self._text, numbers)], bool)

  def _text(self, number: int) -> str:
    number = int(number)
    if self._raw:
      return self._texts[number]
    if number not in self._normal:
      self._normal[number] = f" {normalize_answer(self._texts[number])} "
    return self._normal[number]


def recall_at(found: Sequence[np.ndarray], ks: Sequence[int]) -> dict[str, float]:
  """Share of queries with an answer among the first k passages.

  Args:
    found: per query, [K] bool from `AnswerMatcher.has_answer`, best first.

  Returns:
    "recall_at_k" -> share, 0 to 1.
  """
  return {f"recall_at_{k}": float(np.mean([row[:k].any() for row in found])) for k in ks}
