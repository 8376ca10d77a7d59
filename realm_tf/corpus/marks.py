"""Marked byte ranges of a text, and the text cut at their bounds."""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Mark(NamedTuple):
  """A named byte range [start, end) of a UTF-8 text."""

  name: str
  start: int
  end: int


class Run(NamedTuple):
  """A part of a text that is covered by the same marks throughout.

  Attributes:
    text: text of the part.
    start, end: byte range of the part.
    names: names of the marks that cover it.
  """

  text: str
  start: int
  end: int
  names: frozenset[str]


def runs(text: str, marks: Iterable[Mark]) -> Sequence[Run]:
  """Cuts a text at the bounds of all marks; the parts concatenate to the text."""
  data, marks = text.encode(), list(marks)
  cuts = sorted({0, len(data), *(at for mark in marks for at in (mark.start, mark.end))})
  return [
    Run(
      data[start:end].decode(),
      start,
      end,
      frozenset(mark.name for mark in marks if mark.start <= start and end <= mark.end),
    )
    for start, end in itertools.pairwise(cuts)
  ]
