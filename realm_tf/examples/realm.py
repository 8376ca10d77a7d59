"""Inputs of a `RealmModel`: masked queries with their candidates (REALM, section 3.4)."""

from collections.abc import Mapping

import numpy as np

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples.answer_spans import answer_spans
from realm_tf.examples.masking import MaskedQueries, contains
from realm_tf.examples.packing import gather_passages, pack_passages, pack_reader


def realm_batch(
  queries: MaskedQueries,
  query_ids: np.ndarray,
  numbers: np.ndarray,
  table: PassageTable,
  *,
  tokenizer: Tokenizer,
  query_length: int,
  passage_length: int,
  reader_length: int,
  title_length: int | None = None,
) -> dict[str, np.ndarray]:
  """Packs masked queries with their candidates as inputs of a `RealmModel`.

  Args:
    queries: B masked queries.
    query_ids: [B, Lq] int32, the packed queries.
    numbers: [B, C] int32 passage numbers of the candidates.
    table: the passages that `numbers` refers to.
    tokenizer: tokenizer of the queries and the passages.
    query_length: maximum number of word pieces of the query in the reader's input, including [CLS]
      and [SEP].
    passage_length: Lp, word pieces of a packed passage.
    reader_length: L, word pieces of the reader's input.
    title_length: maximum number of word pieces of a passage's title; None for half of the room.

  Returns:
    query_ids [B, Lq]; passage_ids, passage_segments [B, C, Lp]; reader_ids, reader_segments [B, C,
    L]; mask_positions, targets, target_mask [B, M].
  """
  titles, texts = gather_passages(table, numbers)
  for_tower = pack_passages(
    titles, texts, tokenizer=tokenizer, length=passage_length, title_length=title_length
  )
  repeated = queries.ids.gather(np.repeat(np.arange(len(numbers)), numbers.shape[1]))
  for_reader = pack_reader(
    repeated, texts, tokenizer=tokenizer, query_length=query_length, length=reader_length
  )

  def shaped(tensor):
    return tensor.numpy().reshape(*numbers.shape, -1)  # [B * C, L] → [B, C, L]

  return {
    "query_ids": query_ids,
    "passage_ids": shaped(for_tower.token_ids),
    "passage_segments": shaped(for_tower.segment_ids),
    "reader_ids": shaped(for_reader.token_ids),
    "reader_segments": shaped(for_reader.segment_ids),
    "mask_positions": queries.mask_positions,
    "targets": queries.targets,
    "target_mask": queries.target_mask,
  }


def unread_passages(queries: MaskedQueries, numbers: np.ndarray) -> np.ndarray:
  """Returns which candidates of the batch count as unread passages of each query.

  A passage counts once. A query's own candidates do not count, nor do null passages, nor passages
  that may hold the answer: the query's own passages and the holders of the masked span.

  Args:
    queries: B masked queries.
    numbers: [B, C] int32 passage numbers of their candidates.

  Returns:
    [B, B * C] float32, for `losses.with_unread`.
  """
  everything = numbers.reshape(-1)
  first = np.zeros(len(everything), bool)
  first[np.unique(everything, return_index=True)[1]] = True
  counts = np.tile(first & (everything != NULL_PASSAGE), [len(numbers), 1])
  for excluded in (numbers, queries.own_passages, queries.holders):
    counts &= ~contains(excluded, everything)
  return counts.astype(np.float32)


def evidence(batch: Mapping[str, np.ndarray], *, tokenizer: Tokenizer) -> np.ndarray:
  """Returns whether one of a query's candidates holds the masked word pieces: [B] float32.

  The part of the candidate that is read must hold them as whole words.

  Args:
    batch: batch from `realm_batch`.
    tokenizer: tokenizer of the batch.
  """
  found = []
  for row, used in enumerate(batch["target_mask"] > 0):
    targets = batch["targets"][row][used]
    marked = answer_spans(
      batch["reader_ids"][row],
      batch["reader_segments"][row],
      [targets],
      tokenizer=tokenizer,
      max_span=len(targets),
    )
    found.append(marked.any())
  return np.array(found, np.float32)
