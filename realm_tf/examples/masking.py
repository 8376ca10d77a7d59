"""Masked queries, with [MASK] in place of word pieces (REALM, section 3.4)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples.packing import QUERY_START, titled
from realm_tf.examples.sentences import crop
from realm_tf.storage.columns import Ragged

_MAX_SPAN_WORDS, _SPAN_END = 10, 0.2  # SpanBERT's clipped geometric distribution of lengths


@dataclasses.dataclass(frozen=True)
class MaskedQueries:
  """Sentences with masked word pieces.

  Attributes:
    ids: [B, None] word pieces with [MASK] in place of the targets.
    mask_positions: [B, M] int32 positions in the *packed* query, 0 where unused.
    targets: [B, M] int32 word pieces to predict.
    target_mask: [B, M] float32, 1 where used.
    own_passages: [B, K] int32 numbers of the passages that contain the sentence, then NULL_PASSAGE.
      K is 1, or the largest number of copies of one of them in the knowledge corpus.
    holders: [B, H] int32 numbers of the other passages that hold the masked span, ascending, then
      NULL_PASSAGE. A row has none if there are more than `holders.MAX_HOLDERS`, or if they are
      unknown.
  """

  ids: Ragged
  mask_positions: np.ndarray
  targets: np.ndarray
  target_mask: np.ndarray
  own_passages: np.ndarray
  holders: np.ndarray


def mask_pieces(
  ids: Sequence[np.ndarray],
  at: Sequence[np.ndarray],
  own_passages: np.ndarray | Sequence[int],
  *,
  tokenizer: Tokenizer,
  max_masks: int,
  held_by: np.ndarray | None = None,
) -> MaskedQueries:
  """Replaces the word pieces at the positions `at` of each row by [MASK].

  The positions are ascending, at most `max_masks` per row. `held_by` gives the `holders`; if None,
  they are unknown.
  """
  masked, shape = [], (len(ids), max_masks)
  positions, targets, target_mask = (
    np.zeros(shape, np.int32),
    np.zeros(shape, np.int32),
    np.zeros(shape, np.float32),
  )
  for row, (pieces, chosen) in enumerate(zip(ids, at, strict=True)):
    pieces, size = np.array(pieces, np.int32), len(chosen)
    positions[row, :size] = chosen + QUERY_START
    targets[row, :size] = pieces[chosen]
    target_mask[row, :size] = 1
    pieces[chosen] = tokenizer.mask_id
    masked.append(pieces)
  own_passages = np.reshape(own_passages, [len(ids), -1]).astype(np.int32)
  held_by = np.full([len(ids), 1], NULL_PASSAGE, np.int32) if held_by is None else held_by
  return MaskedQueries(
    Ragged.of(masked, np.int32), positions, targets, target_mask, own_passages, held_by
  )


def mask_spans(
  ids: Sequence[np.ndarray],
  starts: Sequence[int],
  ends: Sequence[int],
  own_passages: Sequence[int],
  *,
  tokenizer: Tokenizer,
  max_masks: int,
) -> MaskedQueries:
  """Masks word pieces [start, end) of each row (REALM, section 3.4)."""
  at = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
  return mask_pieces(ids, at, own_passages, tokenizer=tokenizer, max_masks=max_masks)


def random_spans(begins: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
  """Draws spans of whole words, of geometric length (SpanBERT, section 3.1).

  Spans are drawn until `budget` word pieces are chosen or nothing more fits.

  Args:
    begins: [L] bool, whether a word begins with this word piece.
    budget: maximum number of word pieces.
    rng: draws the spans.

  Returns:
    Ascending positions; the first word pieces if no whole word fits into the budget.
  """
  starts = np.flatnonzero(begins)
  ends = np.append(starts[1:], len(begins))
  chosen = np.zeros(len(begins), bool)
  for first in rng.permutation(len(starts)):
    last = min(first + min(rng.geometric(_SPAN_END), _MAX_SPAN_WORDS), len(starts)) - 1
    while last >= first and ends[last] - starts[first] > budget - chosen.sum():
      last -= 1  # a shorter span, in whole words
    if last >= first and not chosen[starts[first] : ends[last]].any():
      chosen[starts[first] : ends[last]] = True
  return np.flatnonzero(chosen) if chosen.any() else np.arange(budget)


def rows_of(queries: MaskedQueries, rows: np.ndarray) -> MaskedQueries:
  """Selects some of the masked queries ([N] int rows)."""
  ids = Ragged.of([queries.ids[row] for row in rows], np.int32)
  rest = {
    field.name: getattr(queries, field.name)[rows]
    for field in dataclasses.fields(queries)
    if field.name != "ids"
  }
  return MaskedQueries(ids, **rest)


def crop_queries(
  queries: MaskedQueries,
  num_words: Sequence[int],
  *,
  tokenizer: Tokenizer,
  rng: np.random.Generator,
) -> MaskedQueries:
  """Cuts masked queries to random runs of words around their masks, about as long as questions.

  Args:
    queries: B masked queries.
    num_words: fewest and most words; a masked span counts as one.
    tokenizer: tokenizer of the queries.
    rng: draws the runs.
  """
  ids, positions = [], queries.mask_positions.copy()
  for row, used in enumerate(queries.target_mask > 0):
    pieces, at = queries.ids[row], positions[row, used] - QUERY_START
    begins = ~tokenizer.continues[pieces]
    begins[at[1:]] = False
    part = crop(begins, num_words, rng, keep=(at[0], at[-1] + 1))
    ids.append(pieces[part])
    positions[row, used] -= part.start
  return dataclasses.replace(queries, ids=Ragged.of(ids, np.int32), mask_positions=positions)


def keep_spans(queries: MaskedQueries, share: float, rng: np.random.Generator) -> MaskedQueries:
  """Restores the masked span in a random share of the queries.

  The result is for the retriever only. Spider (Ram et al. 2022) keeps the span in half of the
  queries, so that a retriever learns both to match words and to find what is not mentioned.
  """
  if not share:
    return queries
  ids = []
  for row, kept in enumerate(rng.random(len(queries.targets)) < share):
    pieces, used = np.array(queries.ids[row]), queries.target_mask[row] > 0
    if kept:
      pieces[queries.mask_positions[row, used] - QUERY_START] = queries.targets[row, used]
    ids.append(pieces)
  return dataclasses.replace(queries, ids=Ragged.of(ids, np.int32))


def for_retriever(
  queries: MaskedQueries,
  rng: np.random.Generator,
  *,
  keep_span: float,
  title_share: float,
  table: PassageTable,
  query_length: int,
  passage_length: int,
  title_length: int | None,
) -> MaskedQueries:
  """Returns the queries as the retriever sees them: some with their span, some after their title.

  A sentence often says "he" or "the city"; the title of its passage says who or which. The title
  may contain the masked span. `mask_positions` are not moved.

  Args:
    queries: masked queries.
    rng: draws which ones.
    keep_span: share that shows the span; see `keep_spans`.
    title_share: share that begins with the title of its own passage; see `titled`. Queries whose
      own passage is unknown have no title.
    table: the passages.
    query_length: word pieces of packed queries.
    passage_length: word pieces of packed passages.
    title_length: most word pieces of a packed title; None means half of the passage.
  """
  queries = keep_spans(queries, keep_span, rng)
  if not title_share:
    return queries
  ids, own = list(queries.ids), queries.own_passages[:, 0]
  for row in np.flatnonzero((rng.random(len(own)) < title_share) & (own != NULL_PASSAGE)):
    ids[row] = titled(
      ids[row],
      table.title_ids[own[row]],
      query_length=query_length,
      passage_length=passage_length,
      title_length=title_length,
    )
  return dataclasses.replace(queries, ids=Ragged.of(ids, np.int32))


def draw_holders(queries: MaskedQueries, num: int, rng: np.random.Generator) -> np.ndarray:
  """Draws up to `num` different holders of each masked span: [B, num] int32, then NULL_PASSAGE."""
  holders = np.pad(queries.holders, [[0, 0], [0, num]], constant_values=NULL_PASSAGE)
  order = np.where(holders == NULL_PASSAGE, 1.0, rng.random(holders.shape))
  return np.take_along_axis(holders, np.argsort(order, axis=1, kind="stable"), axis=1)[:, :num]


def contains(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """Returns whether each row [B, K] contains each of the passage numbers: [B, N] bool.

  The numbers are [N] for all rows, or [B, N] with different numbers for each row.
  """
  numbers = np.broadcast_to(numbers, [len(rows), numbers.shape[-1]])
  return (rows[:, None, :] == numbers[:, :, None]).any(axis=-1)
