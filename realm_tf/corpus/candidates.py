"""Candidates: the passages found for a query, by number."""

from typing import Any, NamedTuple

# The number of the null passage, the empty candidate. It also marks the absence of a passage: it
# pads rows, and fills the places where a searcher found fewer passages than requested.
NULL_PASSAGE = -1


class Found(NamedTuple):
  """The result of a search: arrays, or tensors inside a graph.

  Attributes:
    numbers: [B, K] int32 passage numbers, best first, then NULL_PASSAGE.
    scores: [B, K] float32, f(x, z) or the BM25 score; -inf where the number is NULL_PASSAGE.
  """

  numbers: Any
  scores: Any
