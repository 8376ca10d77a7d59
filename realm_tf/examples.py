"""Examples for the three trainings, and the only code that packs, masks and pads them.

Packing is TensorFlow on ragged tensors, so the same lines run in the trainers' input and inside an exported graph.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from realm_tf import artifacts, passages
from realm_tf.passages import PassageTable, Ragged
from realm_tf.tokenization import Tokenizer

SPANS_KIND = "spans"
NULL_PASSAGE = -1  # passage number of the empty candidate

# There are no loops in these graphs, and on ragged ops this optimizer logs warnings that nothing else can silence.
tf.config.optimizer.set_experimental_options({"loop_optimization": False})


class Packed(NamedTuple):
  """Model input.

  Attributes:
    token_ids: [N, L] int32, zero padded.
    segment_ids: [N, L] int32, 1 in the second segment.
  """

  token_ids: tf.Tensor
  segment_ids: tf.Tensor


# ----------------------------------------------------------------------------------------------------------- packing

_graph = tf.function(reduce_retracing=True)  # ragged ops are many small ones: ten times faster than eagerly


@_graph
def pack_queries(ids: tf.RaggedTensor, *, tokenizer: Tokenizer, length: int) -> tf.Tensor:
  """`[CLS] query [SEP]`, cut at `length` word pieces: [N, length] int32, zero padded."""
  return _pack([ids[:, :length - 2]], tokenizer, length).token_ids


@_graph
def pack_passages(title_ids: tf.RaggedTensor, text_ids: tf.RaggedTensor, *, tokenizer: Tokenizer, length: int) -> Packed:
  """`[CLS] title [SEP] text [SEP]` for the passage tower; titles keep at most half of the room, the text the rest."""
  title_ids = title_ids[:, :(length - 3) // 2]
  text_ids = _cut(text_ids, length - 3 - title_ids.row_lengths())
  return _pack([title_ids, text_ids], tokenizer, length)


@_graph
def pack_reader(query_ids: tf.RaggedTensor, text_ids: tf.RaggedTensor, *, tokenizer: Tokenizer, query_length: int, length: int) -> Packed:
  """`[CLS] query [SEP] text [SEP]` for the readers (no title); the query is cut as in `pack_queries`."""
  query_ids = query_ids[:, :query_length - 2]
  text_ids = _cut(text_ids, length - 3 - query_ids.row_lengths())
  return _pack([query_ids, text_ids], tokenizer, length)


def _cut(ids: tf.RaggedTensor, lengths: tf.Tensor) -> tf.RaggedTensor:
  """Row i cut to `lengths[i]` ids."""
  ids = tf.cast(ids, tf.int32)
  at = tf.range(tf.shape(ids.values, out_type=tf.int64)[0]) - tf.gather(ids.row_splits, ids.value_rowids())
  return tf.ragged.boolean_mask(ids, ids.with_values(at < tf.gather(tf.cast(lengths, tf.int64), ids.value_rowids())))


def _pack(segments: Sequence[tf.RaggedTensor], tokenizer: Tokenizer, length: int) -> Packed:
  """[CLS] first [SEP] (second [SEP]), padded to `length`."""
  rows = segments[0].nrows(out_type=tf.int32)
  cls, sep = tf.fill([rows, 1], tokenizer.cls_id), tf.fill([rows, 1], tokenizer.sep_id)
  parts, kinds = [cls], [tf.zeros_like(cls)]
  for kind, segment in enumerate(segments):
    segment = tf.cast(segment, tf.int32)
    parts += [segment, sep]
    kinds += [tf.zeros_like(segment) + kind, tf.zeros_like(sep) + kind]
  token_ids, segment_ids = (tf.concat(part, axis=1).to_tensor(tokenizer.pad_id, shape=[None, length]) for part in (parts, kinds))
  return Packed(token_ids, segment_ids)


def gather_passages(table: PassageTable, numbers: np.ndarray) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
  """Title and text word pieces of passages ([N] int, NULL_PASSAGE gives an empty row)."""
  numbers = np.asarray(numbers).reshape(-1)
  return tuple(_gather_or_empty(part, numbers) for part in (table.title_ids, table.text_ids))


def _gather_or_empty(rows: Ragged, numbers: np.ndarray) -> tf.RaggedTensor:
  padded = Ragged(rows.values, np.append(rows.splits, rows.splits[-1]))  # one empty row at the end
  return padded.gather(np.where(numbers == NULL_PASSAGE, len(rows), numbers))


# --------------------------------------------------------------------------------------------------- inverse cloze task


class IctExamples:
  """One sentence of a passage is the query, the passage (mostly without it) the target. Lee et al. 2019, section 4.

  Args:
    table: passages.
    removal_rate: probability that the sentence is taken out of its passage (0.9 as published).
  """

  def __init__(self, table: PassageTable, *, tokenizer: Tokenizer, query_length: int, passage_length: int,
               removal_rate: float = 0.9):
    self.table, self.tokenizer = table, tokenizer
    self.query_length, self.passage_length, self.removal_rate = query_length, passage_length, removal_rate
    self.rows = np.flatnonzero(np.diff(table.text_ids.splits) > 0)

  def batch(self, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """The batch of training step `step`, a pure function of it and the seed.

    Single-sentence passages whose sentence would be removed are passed over, as published.

    Returns:
      query_ids [B, Lq], passage_ids [B, Lp], passage_segments [B, Lp], removed [B] (1 where the sentence was taken out).
    """
    rng = np.random.default_rng([seed, step])
    queries, texts, numbers, removed = [], [], [], []
    for number in _draw_forever(self.rows, step, batch_size, seed, rng):
      starts, ends = sentence_ranges(self.table, number)
      pick, remove = rng.integers(len(starts)), rng.random() < self.removal_rate
      ids = self.table.text_ids[number]
      query = ids[starts[pick]:ends[pick]]
      if len(query) == 0 or (remove and len(query) == len(ids)):
        continue
      queries.append(query)
      texts.append(np.delete(ids, np.s_[starts[pick]:ends[pick]]) if remove else ids)
      numbers.append(number)
      removed.append(remove)
      if len(queries) == batch_size:
        break
    titles, _ = gather_passages(self.table, np.array(numbers))
    packed = pack_passages(titles, _ragged(texts), tokenizer=self.tokenizer, length=self.passage_length)
    return {
        "query_ids": pack_queries(_ragged(queries), tokenizer=self.tokenizer, length=self.query_length).numpy(),
        "passage_ids": packed.token_ids.numpy(), "passage_segments": packed.segment_ids.numpy(),
        "removed": np.array(removed, np.float32),
    }


def sentence_ranges(table: PassageTable, number: int) -> tuple[np.ndarray, np.ndarray]:
  """Word-piece range [start, end) of each sentence of a passage."""
  token_starts = table.token_starts[number]
  starts = np.searchsorted(token_starts, table.sentence_starts[number])
  return starts, np.append(starts[1:], len(token_starts))


def _draw_forever(rows: np.ndarray, step: int, batch_size: int, seed: int, rng: np.random.Generator):
  """Rows of step `step` of an epoch-wise shuffle, then random ones (to replace those that are passed over).

  Raises:
    UserError: after 100 batches' worth of replacements: no row is usable.
  """
  yield from epoch_rows(len(rows), step, batch_size, seed, rows)
  for _ in range(100 * batch_size):
    yield rows[rng.integers(len(rows))]
  raise artifacts.UserError("no passage gives an example: every one is a single sentence. Make passages of more than one sentence.")


def epoch_rows(num_rows: int, step: int, batch_size: int, seed: int, rows: np.ndarray | None = None) -> np.ndarray:
  """Row numbers [B] of a step when every epoch is a fresh permutation; the same for the same step, however resumed."""
  at = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs = at // num_rows
  picked = np.empty([batch_size], np.int64)
  for epoch in np.unique(epochs):
    inside = epochs == epoch
    picked[inside] = np.random.default_rng([seed, 7, epoch]).permutation(num_rows)[at[inside] % num_rows]
  return picked if rows is None else rows[picked]


def _ragged(rows: Sequence[np.ndarray]) -> tf.RaggedTensor:
  return Ragged.of(rows, np.int32).tensor()


# ---------------------------------------------------------------------------------------------- masked salient spans


@dataclasses.dataclass(frozen=True)
class MaskedQueries:
  """Sentences with one masked span each.

  Attributes:
    ids: [B, None] word pieces with [MASK] in place of the span's.
    mask_positions: [B, M] int32 positions in the *packed* query ([CLS] is 0), 0 where unused.
    targets: [B, M] int32 word pieces to predict.
    target_mask: [B, M] float32, 1 where used.
    own_passages: [B] int32 number of the passage that the sentence stands in.
  """

  ids: Ragged
  mask_positions: np.ndarray
  targets: np.ndarray
  target_mask: np.ndarray
  own_passages: np.ndarray


def mask_spans(ids: Sequence[np.ndarray], starts: Sequence[int], ends: Sequence[int], own_passages: Sequence[int], *,
               tokenizer: Tokenizer, max_masks: int) -> MaskedQueries:
  """Masks word pieces [start, end) of each row (REALM, section 3.4)."""
  masked, shape = [], (len(ids), max_masks)
  positions, targets, target_mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
  for row, (pieces, start, end) in enumerate(zip(ids, starts, ends, strict=True)):
    pieces = np.array(pieces, np.int32)
    size = end - start
    positions[row, :size] = np.arange(start, end) + 1
    targets[row, :size] = pieces[start:end]
    target_mask[row, :size] = 1
    pieces[start:end] = tokenizer.mask_id
    masked.append(pieces)
  return MaskedQueries(Ragged.of(masked, np.int32), positions, targets, target_mask, np.asarray(own_passages, np.int32))


def realm_batch(queries: MaskedQueries, query_ids: np.ndarray, numbers: np.ndarray, table: PassageTable, *,
                tokenizer: Tokenizer, query_length: int, passage_length: int, reader_length: int) -> dict[str, np.ndarray]:
  """What a `RealmModel` reads: masked queries with their candidates.

  Args:
    queries: B masked queries.
    query_ids: [B, Lq] int32, the same packed.
    numbers: [B, C] int32 passage numbers.

  Returns:
    query_ids [B, Lq]; passage_ids, passage_segments [B, C, Lp]; reader_ids, reader_segments [B, C, L]; mask_positions,
    targets, target_mask [B, M].
  """
  titles, texts = gather_passages(table, numbers)
  for_tower = pack_passages(titles, texts, tokenizer=tokenizer, length=passage_length)
  repeated = queries.ids.gather(np.repeat(np.arange(len(numbers)), numbers.shape[1]))
  for_reader = pack_reader(repeated, texts, tokenizer=tokenizer, query_length=query_length, length=reader_length)
  shaped = lambda tensor: tensor.numpy().reshape(*numbers.shape, -1)  # [B * C, L] → [B, C, L]
  return {
      "query_ids": query_ids,
      "passage_ids": shaped(for_tower.token_ids), "passage_segments": shaped(for_tower.segment_ids),
      "reader_ids": shaped(for_reader.token_ids), "reader_segments": shaped(for_reader.segment_ids),
      "mask_positions": queries.mask_positions, "targets": queries.targets, "target_mask": queries.target_mask,
  }


class SpanSentences:
  """Sentences with salient spans in memory; draws masked queries.

  Args:
    folder: a spans folder.
    knowledge: fingerprint of the passages that candidates come from; `own_passages` are NULL_PASSAGE where the sentences
      stand in other passages.

  Raises:
    ArtifactError: incomplete, of another vocabulary, or no span fits into the query.
  """

  def __init__(self, folder: str, *, tokenizer: Tokenizer, query_length: int, max_masks: int, knowledge: str):
    info = artifacts.read_info(folder, kind=SPANS_KIND)
    check_vocabulary(info, folder, tokenizer)
    self.tokenizer, self.max_masks = tokenizer, max_masks
    same = info["inputs"]["passages"]["fingerprint"] == knowledge
    ids, own, spans = [], [], []
    for path in passages.shard_paths(folder):
      for row in passages.read_shard(path, passages.Sentence):
        fitting = [(start, end) for start, end in zip(row.span_starts, row.span_ends)
                   if end <= query_length - 2 and end - start <= max_masks]
        if fitting:
          ids.append(row.ids), own.append(row.passage if same else NULL_PASSAGE), spans.append(np.ravel(fitting))
    if not ids:
      raise artifacts.ArtifactError(
          f"{folder!r} has no span within {query_length} word pieces; annotate other passages or raise query_length.")
    self.ids, self.spans = Ragged.of(ids, np.int32), Ragged.of(spans, np.int32)
    self.own_passages = np.array(own, np.int32)

  def __len__(self) -> int:
    return len(self.own_passages)

  def batch(self, step: int, *, batch_size: int, seed: int) -> MaskedQueries:
    """The masked queries of a step: each sentence once an epoch, one of its spans drawn uniformly."""
    rng = np.random.default_rng([seed, 11, step])
    rows = epoch_rows(len(self), step, batch_size, seed)
    drawn = [pairs[rng.integers(len(pairs))] for pairs in (self.spans[row].reshape(-1, 2) for row in rows)]
    return mask_spans([self.ids[row] for row in rows], [start for start, _ in drawn], [end for _, end in drawn],
                      self.own_passages[rows], tokenizer=self.tokenizer, max_masks=self.max_masks)


# -------------------------------------------------------------------------------------------------------- answer spans


def answer_spans(reader_ids: np.ndarray, segments: np.ndarray, answers: Sequence[Sequence[int]], *, tokenizer: Tokenizer,
                 max_span: int) -> np.ndarray:
  """Marks every occurrence of every answer in the passages read for one question.

  Args:
    reader_ids, segments: [R, L] int32 packed reader inputs.
    answers: word pieces of each answer; those of more than `max_span` are passed over.

  Returns:
    [R, L, W] float32, 1 at [r, i, w] where word pieces i .. i + w of passage r are an answer, made of whole words.
  """
  num_read, length = reader_ids.shape
  correct = np.zeros([num_read, length, max_span], np.float32)
  ids = np.pad(np.where(segments == 1, reader_ids, tokenizer.pad_id), [[0, 0], [0, max_span]])
  for answer in answers:
    width = len(answer)
    if 0 < width <= max_span:
      same = ~tokenizer.continues[ids[:, width:width + length]]  # the word ends with the answer
      for at, piece in enumerate(answer):
        same &= ids[:, at:at + length] == piece
      correct[:, :, width - 1] += same
  return np.minimum(correct, 1)


def check_vocabulary(info: dict, folder: str, tokenizer: Tokenizer) -> None:
  """Raises ArtifactError where an artifact was made with another vocabulary than the tokenizer's."""
  if info["vocab_fingerprint"] != tokenizer.fingerprint:
    raise artifacts.ArtifactError(
        f"{info['kind']} {folder!r} was made with vocabulary {info['vocab_fingerprint']}, this run has "
        f"{tokenizer.fingerprint} ({tokenizer.path!r}). Use the same vocab.txt for both.")
