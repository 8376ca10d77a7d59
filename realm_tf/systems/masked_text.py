"""Texts with masks, and the models' outputs for them.

Example:
  blank = MaskedText.of("The [MASK] of France is Paris.", None, tokenizer)
  query = blank.query(tokenizer, query_length=64, max_masks=5)
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np
from keras import ops

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.corpus.vocabularies import MASK
from realm_tf.examples import packing
from realm_tf.examples.masking import MaskedQueries
from realm_tf.models import equations
from realm_tf.storage import artifacts
from realm_tf.storage.columns import Ragged
from realm_tf.systems.explanations import BLANK


@dataclasses.dataclass(frozen=True)
class MaskedText:
  """A text with blanks; a blank is a mask or several adjacent ones.

  Attributes:
    segments: the text around the blanks.
    sizes: number of word pieces in each blank.
    pieces: y's word pieces, if y is given.
  """

  segments: Sequence[str]
  sizes: Sequence[int]
  pieces: tuple[int, ...] | None

  @classmethod
  def of(cls, text: str, answer: str | None, tokenizer: Tokenizer) -> "MaskedText":
    """Finds the blanks; a single mask is widened to the answer.

    Raises:
      UserError: there is no mask, or the answer does not fit.
    """
    sizes, pieces = [blank.count(MASK) for blank in BLANK.findall(text)], None
    if not sizes:
      raise artifacts.UserError(
        f"the text has no {MASK}: {text!r}. Write {MASK} where a word is missing."
      )
    if answer is not None:
      pieces = tuple(tokenizer([answer]).to_list()[0])
      if not pieces or tokenizer.unk_id in pieces:
        words = " ".join(tokenizer.pieces[piece] for piece in pieces) or "nothing"
        raise artifacts.UserError(
          f"the answer {answer!r} is {words} in the snapshot's word pieces. "
          "Give an answer that they can spell."
        )
      if sum(sizes) == 1:
        sizes = [len(pieces)]
      if sum(sizes) != len(pieces):
        raise artifacts.UserError(
          f"the answer {answer!r} has {len(pieces)} word pieces, but the text has {sum(sizes)} "
          f"masks. Write one {MASK}, which is widened to the answer, or one for each word piece."
        )
    return cls(BLANK.split(text), sizes, pieces)

  def query(self, tokenizer: Tokenizer, *, query_length: int, max_masks: int) -> MaskedQueries:
    """Makes a batch of this one query, without targets.

    Raises:
      UserError: the text has more masks or word pieces than the models take.
    """
    size, room, ids = sum(self.sizes), packing.query_room(query_length), []
    segments = tokenizer(self.segments).to_list()
    for segment, masks in zip(segments, [*self.sizes, 0], strict=True):
      ids += segment + [tokenizer.mask_id] * masks
    if size > max_masks:
      raise artifacts.UserError(
        f"{size} word pieces are masked, but the snapshot's reader fills up to {max_masks}. Mask "
        "fewer."
      )
    if len(ids) > room:
      raise artifacts.UserError(
        f"the text has {len(ids)} word pieces, but the snapshot's queries have up to {room}. "
        "Shorten it."
      )
    positions = np.zeros([1, max_masks], np.int32)
    positions[0, :size] = packing.QUERY_START + np.flatnonzero(np.array(ids) == tokenizer.mask_id)
    return MaskedQueries(
      ids=Ragged.of([ids], np.int32),
      mask_positions=positions,
      targets=np.zeros_like(positions),
      target_mask=(positions > 0).astype(np.float32),
      own_passages=np.array([[NULL_PASSAGE]], np.int32),
      holders=np.array([[NULL_PASSAGE]], np.int32),
    )

  def split(self, pieces: Sequence[int]) -> list[Sequence[int]]:
    """Splits y's word pieces by blank."""
    ends = itertools.accumulate(self.sizes)
    return [pieces[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]

  def filled(self, pieces: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns the text with y in its blanks.

    A word piece that continues a word joins the word before it.
    """
    text = self.segments[0]
    for blank, segment in zip(self.split(pieces), self.segments[1:], strict=True):
      words = tokenizer.spell(blank)
      text = text.rstrip() if words.startswith("##") else text
      text += words.removeprefix("##") + segment
    return text

  def matches(self, sentence: str) -> bool:
    """Whether the sentence is this text with its blanks filled."""
    return re.fullmatch(".+?".join(map(re.escape, self.segments)), sentence) is not None


@dataclasses.dataclass(frozen=True)
class Reading:
  """The models' outputs for one text and its candidates.

  Attributes:
    scores: [C] f(x, z).
    log_probs: [C, M, V] float64 log p of every word piece at every mask.
  """

  scores: np.ndarray
  log_probs: np.ndarray

  @property
  def log_prior(self) -> np.ndarray:
    """[C] float64 log p(z|x)."""
    return ops.convert_to_numpy(equations.log_prior(self.scores.astype(np.float64)))

  @property
  def without_retrieval(self) -> "Reading":
    """The same reading restricted to the null passage."""
    return Reading(self.scores[:1], self.log_probs[:1])

  def log_likelihoods(self, pieces: Sequence[int]) -> np.ndarray:
    """[C] log p(y|z,x)."""
    of_pieces = self.log_probs[:, np.arange(len(pieces)), pieces]  # [C, M]
    found = equations.log_likelihoods(of_pieces[None], np.ones([1, len(pieces)]))
    return ops.convert_to_numpy(found)[0]

  def log_probability(self, pieces: Sequence[int]) -> float:
    """log p(y|x)."""
    likelihoods = self.log_likelihoods(pieces)
    return float(equations.log_marginal(likelihoods[None], self.log_prior[None])[0])

  def probability(self, pieces: Sequence[int]) -> float:
    """p(y|x)."""
    return float(np.exp(self.log_probability(pieces)))

  def candidate_utility(self, pieces: Sequence[int]) -> np.ndarray:
    """[C] log p(y|z,x) − log p(y|∅,x)."""
    return ops.convert_to_numpy(equations.candidate_utility(self.log_likelihoods(pieces)[None]))[0]

  def retrieval_utility(self, pieces: Sequence[int]) -> float:
    """log p(y|x) − log p(y|∅,x)."""
    likelihoods = self.log_likelihoods(pieces)
    return float(equations.retrieval_utility(likelihoods[None], self.log_prior[None])[0])

  def best(self, num: int) -> list[tuple[int, ...]]:
    """Returns the most probable fillings.

    They are chosen among the best fillings with each candidate, and the best with each mask
    marginalised by itself.
    """
    one_by_one = equations.log_marginal(self.log_probs[None], self.log_prior[None])[0]  # [M, V]
    found = {
      pieces
      for log_probs in (ops.convert_to_numpy(one_by_one), *self.log_probs)
      for pieces in best_fillings(log_probs, num)
    }
    return sorted(found, key=lambda pieces: (-self.log_probability(pieces), pieces))[:num]


def best_fillings(log_probs: np.ndarray, num: int) -> list[tuple[int, ...]]:
  """Returns the `num` most probable fillings of independent masks, best first; log_probs [M, V]."""
  beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
  for row in log_probs:
    top = np.argpartition(-row, min(num, len(row)) - 1)[:num]
    grown = [
      (score + float(row[piece]), (*pieces, int(piece))) for score, pieces in beam for piece in top
    ]
    beam = sorted(grown, key=lambda filling: (-filling[0], filling[1]))[:num]
  return [pieces for _, pieces in beam]
