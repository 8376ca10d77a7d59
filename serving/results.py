"""The results of a servable for each input: answers or filled texts, with their passages."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from serving import signatures


@dataclasses.dataclass(frozen=True)
class Passage:
  """A passage read for a question.

  Attributes:
    number: its row in the corpus.
    probability: p(z|x) over the passages retrieved.
    retrieval_score, reader_score: scores of the passage, and of its best span alone.
    span: (start, end) of that span, in bytes of the UTF-8 text.
  """

  number: int
  title: str
  text: str
  probability: float
  retrieval_score: float
  reader_score: float
  span: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer; `rank` is the rank of its passage among the passages read."""

  text: str
  score: float
  rank: int


@dataclasses.dataclass(frozen=True)
class Answers:
  """The answers to a question, best first, and the passages read, best retrieved first."""

  question: str
  answers: Sequence[Answer]
  passages: Sequence[Passage]


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A candidate for a masked text; the null passage has number -1.

  Attributes:
    probability: p(z|x).
    retrieval_utility: log p(y|z,x) - log p(y|null,x).
  """

  number: int
  title: str
  text: str
  probability: float
  retrieval_utility: float


@dataclasses.dataclass(frozen=True)
class Filled:
  """A masked text with the best tokens in place.

  Attributes:
    text: the text with [MASK].
    filled: the text with the best tokens.
    tokens, tokens_without_retrieval: for each blank, (token, probability) pairs, best first.
    candidates: the candidates, null passage first.
  """

  text: str
  filled: str
  tokens: Sequence[Sequence[tuple[str, float]]]
  tokens_without_retrieval: Sequence[Sequence[tuple[str, float]]]
  candidates: Sequence[Candidate]


def answers_of(question: str, row: Mapping[str, list]) -> Answers:
  """Returns the answers to a question, from its row of the outputs of `signatures.ANSWER`."""
  passages = zip(
    row["passage_number"],
    row["title"],
    row["text"],
    row["probability"],
    row["retrieval_score"],
    row["reader_score"],
    zip(row["answer_start"], row["answer_end"], strict=True),
    strict=True,
  )
  return Answers(
    question,
    [
      Answer(*values)
      for values in zip(row["answer"], row["score"], row["answer_rank"], strict=True)
      if values[0]
    ],
    [Passage(*values) for values in passages if values[0] != signatures.NULL_PASSAGE],
  )


def filled_of(text: str, row: Mapping[str, Any]) -> Filled:
  """Returns a filled text, from its row of the outputs of `signatures.FILL_MASK`."""

  def pairs(tokens, probabilities):
    num = row["num_masks"]
    blanks = zip(tokens[:num], probabilities[:num], strict=True)
    return [list(zip(*blank, strict=True)) for blank in blanks]

  candidates = zip(
    row["passage_number"],
    row["title"],
    row["text"],
    row["probability"],
    row["retrieval_utility"],
    strict=True,
  )
  return Filled(
    text,
    row["filled"],
    pairs(row["token"], row["token_probability"]),
    pairs(row["token_without_retrieval"], row["token_probability_without_retrieval"]),
    [Candidate(*values) for values in candidates],
  )
