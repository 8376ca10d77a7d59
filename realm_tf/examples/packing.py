"""Packs word pieces as model inputs: `[CLS] first [SEP] second [SEP]`, cut and padded.

Packing uses TensorFlow ops on ragged tensors, so the same code runs in the trainers' input and
inside an exported graph.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.passages import SPECIAL_TOKENS, PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.storage import artifacts
from realm_tf.storage.columns import Chunk, Ragged, splits_of

# Many small ops run ten times faster in a graph than eagerly.
_graph = tf.function(autograph=False, reduce_retracing=True)

QUERY_START = 1  # position of a query's first word piece in a packed input, after [CLS]


class Packed(NamedTuple):
  """Model input.

  Attributes:
    token_ids: [N, L] int32, padded with zeros.
    segment_ids: [N, L] int32, 1 in the second segment.
  """

  token_ids: tf.Tensor
  segment_ids: tf.Tensor


def title_room(length: int, title_length: int | None) -> int:
  """Returns how many word pieces of a title fit into a packed passage of `length`.

  This is half of the room, and at most `title_length` if that is given.
  """
  half = (length - SPECIAL_TOKENS) // 2
  return half if title_length is None else min(half, title_length)


def query_room(length: int) -> int:
  """Returns the most word pieces of a query that is packed into `length` with [CLS] and [SEP]."""
  return length - 2


def titled(
  query: np.ndarray,
  title: np.ndarray,
  *,
  query_length: int,
  passage_length: int,
  title_length: int | None,
) -> np.ndarray:
  """Puts a passage's title before a query.

  Args:
    query: [L] word pieces.
    title: [T] word pieces.
    query_length: word pieces of packed queries.
    passage_length: word pieces of packed passages.
    title_length: most word pieces of a packed title; None means half of the passage.

  Returns:
    The query after the first word pieces of the title: as many as a packed passage shows, and as
    fit into the packed query.
  """
  room = max(query_room(query_length) - len(query), 0)
  shown = min(room, title_room(passage_length, title_length))
  return np.concatenate([title[:shown], query])


@_graph
def pack_queries(ids: tf.RaggedTensor, *, tokenizer: Tokenizer, length: int) -> tf.Tensor:
  """Packs `[CLS] query [SEP]`, cut at `length` word pieces: [N, length] int32, zero padded."""
  return _pack([(ids, query_room(length))], tokenizer, length).token_ids


@_graph
def pack_passages(
  title_ids: tf.RaggedTensor,
  text_ids: tf.RaggedTensor,
  *,
  tokenizer: Tokenizer,
  length: int,
  title_length: int | None = None,
) -> Packed:
  """Packs `[CLS] title [SEP] text [SEP]` for the passage tower.

  Titles get at most `title_room`; the text gets the rest.
  """
  return _pack_two(title_ids, text_ids, tokenizer, length, most=title_room(length, title_length))


@_graph
def pack_reader(
  query_ids: tf.RaggedTensor,
  text_ids: tf.RaggedTensor,
  *,
  tokenizer: Tokenizer,
  query_length: int,
  length: int,
) -> Packed:
  """Packs `[CLS] query [SEP] text [SEP]` for the readers, without the title.

  The query is cut as in `pack_queries`.
  """
  return _pack_two(query_ids, text_ids, tokenizer, length, most=query_room(query_length))


def _pack_two(
  first: tf.RaggedTensor, second: tf.RaggedTensor, tokenizer: Tokenizer, length: int, *, most: int
) -> Packed:
  """Packs at most `most` word pieces of the first; the second gets the rest of the room."""
  taken = tf.minimum(tf.cast(first.row_lengths(), tf.int32), most)
  return _pack([(first, most), (second, tf.maximum(length - 3 - taken, 0))], tokenizer, length)


def _pack(
  segments: Sequence[tuple[tf.RaggedTensor, int | tf.Tensor]], tokenizer: Tokenizer, length: int
) -> Packed:
  """Packs [CLS] first [SEP] (second [SEP]), padded to `length`.

  Segments come with the most word pieces that are taken of each row: one number, or [N] int32. The
  op count is small, because every command and every exported graph traces this.
  """
  place = tf.range(length)[tf.newaxis]  # [1, L]
  rows = segments[0][0].nrows(out_type=tf.int32)
  token_ids = tf.tile(tf.where(place == 0, tokenizer.cls_id, tokenizer.pad_id), [rows, 1])
  segment_ids, begin = tf.zeros_like(token_ids), tf.ones([rows, 1], tf.int32)
  for kind, (segment, most) in enumerate(segments):
    sizes = tf.minimum(tf.cast(segment.row_lengths(), tf.int32), most)
    end = begin + sizes[:, tf.newaxis]  # the place of [SEP]
    inside = (begin <= place) & (place < end)
    # One more, because there may be none at all.
    values = tf.concat([tf.cast(segment.values, tf.int32), [tokenizer.pad_id]], axis=0)
    at = tf.cast(place - begin, tf.int64) + tf.cast(segment.row_starts(), tf.int64)[:, tf.newaxis]
    taken = tf.gather(values, tf.where(inside, at, 0))
    token_ids = tf.where(inside, taken, tf.where(place == end, tokenizer.sep_id, token_ids))
    segment_ids += kind * tf.cast((begin <= place) & (place <= end), tf.int32)
    begin = end + 1
  return Packed(token_ids, segment_ids)


def gather_passages(
  table: PassageTable, numbers: np.ndarray
) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
  """Returns title and text word pieces of passages ([N] int; NULL_PASSAGE gives an empty row)."""
  numbers = np.asarray(numbers).reshape(-1)
  return tuple(_gather_or_empty(part, numbers) for part in (table.title_ids, table.text_ids))


def _gather_or_empty(rows: Ragged, numbers: np.ndarray) -> tf.RaggedTensor:
  known = np.flatnonzero(numbers != NULL_PASSAGE)
  taken = rows.take(numbers[known])
  sizes = np.zeros(len(numbers), np.int64)
  sizes[known] = taken.sizes()
  return Ragged([Chunk(taken.values, splits_of(sizes))]).tensor()


def check_vocabulary(info: dict, folder: str, tokenizer: Tokenizer) -> None:
  """Raises ArtifactError if an artifact was made with another vocabulary than the tokenizer's."""
  if info["vocab_fingerprint"] != tokenizer.fingerprint:
    raise artifacts.ArtifactError(
      f"{info['kind']} {folder!r} was made with vocabulary {info['vocab_fingerprint']}, this run "
      f"has {tokenizer.fingerprint} ({tokenizer.path!r}). Use the same vocab.txt for both."
    )
