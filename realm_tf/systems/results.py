"""Results of trained systems: small values that print in one line."""

import dataclasses
import textwrap

import numpy as np

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.passages import PassageTable

_SHOWN = 80  # characters of a text


@dataclasses.dataclass(frozen=True, repr=False)
class _Readable:
  """Prints texts shortened, numbers rounded and passages by their titles."""

  def __repr__(self) -> str:
    shown = [
      f"{field.name}={_shown(getattr(self, field.name))}" for field in dataclasses.fields(self)
    ]
    return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value) -> str:
  if isinstance(value, FoundPassage):
    return repr(value.title)
  if isinstance(value, tuple):
    return f"({', '.join(map(_shown, value))})"
  if isinstance(value, str):
    return repr(textwrap.shorten(value, _SHOWN, placeholder=" …"))
  return f"{value:.4g}" if isinstance(value, float) else repr(value)


@dataclasses.dataclass(frozen=True, repr=False)
class FoundPassage(_Readable):
  """A retrieved passage.

  Attributes:
    number: number of the passage in its corpus.
    title, text: as written.
    score: f(x, z), or BM25's score as weighted by the system.
  """

  number: int
  title: str
  text: str
  score: float

  @classmethod
  def of(cls, table: PassageTable, number: int, score: float) -> "FoundPassage":
    """Makes the result for passage `number` of a corpus."""
    return cls(number, table.titles[number], table.texts[number], score)


def found_passages(
  table: PassageTable, numbers: np.ndarray, scores: np.ndarray
) -> list[FoundPassage]:
  """Returns the passages found for one query, given as [K] numbers and scores; K or fewer."""
  return [
    FoundPassage.of(table, number, score)
    for number, score in zip(numbers.tolist(), scores.tolist(), strict=True)
    if number != NULL_PASSAGE
  ]


@dataclasses.dataclass(frozen=True, repr=False)
class Answer(_Readable):
  """The answer to a question.

  Attributes:
    text: the answer as written in its passage; "" if there was nothing to read.
    score: reader score + retrieval score; None if there was nothing to read.
    passage: the passage that it was read from; None if there was nothing to read.
    start, end: position in the passage: `text` is `passage.text[start:end]`.
  """

  text: str
  score: float | None
  passage: FoundPassage | None
  start: int
  end: int


@dataclasses.dataclass(frozen=True, repr=False)
class Filling(_Readable):
  """A text with its masks filled by the most probable y.

  Attributes:
    text: the filled text.
    words: the words in each blank.
    probability: p(y|x) (REALM, equation 1).
    without_retrieval: p(y|∅,x), with the null passage only.
    passages: the candidates, best first.
  """

  text: str
  words: tuple[str, ...]
  probability: float
  without_retrieval: float
  passages: tuple[FoundPassage, ...]
