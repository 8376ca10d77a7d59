"""Examples for the three trainings, and the only code that packs, masks and pads them.

Packing is TensorFlow on ragged tensors, so the same lines run in the trainers' input and inside an exported graph.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from realm_tf import artifacts, holders, passages
from realm_tf.holders import NULL_PASSAGE
from realm_tf.passages import PassageTable, Ragged
from realm_tf.tokenization import Tokenizer

SPANS_KIND = "spans"
_ROUNDS = 8  # of the permutation of an epoch's rows

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
def pack_passages(
  title_ids: tf.RaggedTensor, text_ids: tf.RaggedTensor, *, tokenizer: Tokenizer, length: int, title_length: int | None = None
) -> Packed:
  """`[CLS] title [SEP] text [SEP]` for the passage tower.

  Titles keep at most half of the room, and at most `title_length` word pieces where that is given; the text keeps the rest.
  """
  half = (length - 3) // 2
  title_ids = title_ids[:, : half if title_length is None else min(half, title_length)]
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


@dataclasses.dataclass(frozen=True)
class IctDraw:
  """Sentences and the passages that they came from.

  Attributes:
    queries, texts: [B, None] word pieces.
    numbers: [B] passage numbers.
    removed: [B] whether the sentence was taken out of its passage's text.
  """

  queries: Ragged
  texts: Ragged
  numbers: np.ndarray
  removed: np.ndarray


class IctExamples:
  """One sentence of a passage is the query, the passage (mostly without it) the target. Lee et al. 2019, section 4.

  Args:
    table: passages.
    removal_rate: probability that the sentence is taken out of its passage (0.9 as published).
    query_words: fewest and most words of the query, which is then a random run of so many words of the sentence; empty:
      the whole sentence, as published.
  """

  def __init__(
    self,
    table: PassageTable,
    *,
    tokenizer: Tokenizer,
    query_length: int,
    passage_length: int,
    title_length: int | None = None,
    removal_rate: float = 0.9,
    query_words: Sequence[int] = (),
  ):
    self.table, self.tokenizer = table, tokenizer
    self.query_length, self.passage_length, self.title_length = query_length, passage_length, title_length
    self.removal_rate, self.query_words = removal_rate, tuple(query_words)
    self.rows = np.flatnonzero(np.diff(table.text_ids.splits) > 0)

  def batch(self, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """The batch of training step `step`, a pure function of it and the seed.

    Returns:
      query_ids [B, Lq], passage_ids [B, Lp], passage_segments [B, Lp], removed [B] (1 where the sentence was taken out).
    """
    return self.pack(self.draw(step, batch_size=batch_size, seed=seed))

  def draw(self, step: int, *, batch_size: int, seed: int) -> IctDraw:
    """The sentences of training step `step`, a pure function of it and the seed.

    Single-sentence passages whose sentence would be removed are passed over, as published.
    """
    rng = np.random.default_rng([seed, step])
    queries, texts, numbers, removed = [], [], [], []
    for number in _draw_forever(self.rows, step, batch_size, seed, rng):
      starts, ends = sentence_ranges(
        self.table.token_starts[number], self.table.sentence_starts[number]
      )
      pick, remove = rng.integers(len(starts)), rng.random() < self.removal_rate
      ids = self.table.text_ids[number]
      query = ids[starts[pick]:ends[pick]]
      if len(query) == 0 or (remove and len(query) == len(ids)):
        continue
      if self.query_words:
        query = query[crop(~self.tokenizer.continues[query], self.query_words, rng)]
      queries.append(query)
      texts.append(np.delete(ids, np.s_[starts[pick]:ends[pick]]) if remove else ids)
      numbers.append(number)
      removed.append(remove)
      if len(queries) == batch_size:
        break
    return IctDraw(
      Ragged.of(queries, np.int32), Ragged.of(texts, np.int32), np.array(numbers), np.array(removed, np.float32))

  def pack(self, drawn: IctDraw) -> dict[str, np.ndarray]:
    """What an `InBatchModel` reads; see `batch`."""
    titles, _ = gather_passages(self.table, drawn.numbers)
    packed = pack_passages(
      titles, drawn.texts.tensor(), tokenizer=self.tokenizer, length=self.passage_length, title_length=self.title_length)
    return {
        "query_ids": pack_queries(drawn.queries.tensor(), tokenizer=self.tokenizer, length=self.query_length).numpy(),
        "passage_ids": packed.token_ids.numpy(), "passage_segments": packed.segment_ids.numpy(),
        "removed": drawn.removed,
    }


def crop(begins: np.ndarray, num_words: Sequence[int], rng: np.random.Generator, *, keep: tuple[int, int] = (0, 0)) -> slice:
  """A random run of whole words.

  Args:
    begins: [L] bool, whether a word begins with this word piece.
    num_words: fewest and most words, each number as likely; all words where there are fewer.
    keep: word pieces [first, last) that the run must hold; it is longer where they are more words.

  Returns:
    The run's word pieces.
  """
  starts = np.append(np.flatnonzero(begins), len(begins))
  starts[0] = 0  # where a word was split, the rest counts as one
  size = min(rng.integers(num_words[0], num_words[1], endpoint=True), len(starts) - 1)
  lowest, highest = 0, len(starts) - 1 - size  # where the run may begin
  if keep[0] < keep[1]:
    first = np.searchsorted(starts, keep[0], side="right") - 1
    last = np.searchsorted(starts, keep[1])  # the word behind
    size = max(size, last - first)
    lowest, highest = max(last - size, 0), min(first, len(starts) - 1 - size)
  at = rng.integers(lowest, highest, endpoint=True)
  return slice(int(starts[at]), int(starts[at + size]))


def sentence_ranges(
  token_starts: np.ndarray, sentence_starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Word-piece range [start, end) of each sentence of a passage.

  Args:
    token_starts, sentence_starts: byte offsets in the passage's text.
  """
  starts = np.searchsorted(token_starts, sentence_starts)
  return starts, np.append(starts[1:], len(token_starts))


def draw_sentences(
  text_ids: Ragged,
  token_starts: Ragged,
  sentence_starts: Ragged,
  *,
  share: float,
  rng: np.random.Generator,
) -> Ragged:
  """Word pieces of one sentence each of some passages, drawn uniformly.

  Args:
    text_ids, token_starts, sentence_starts: of the passages, as in a `PassageTable`.
    share: of the passages.
  """
  drawn = []
  for number in np.flatnonzero(rng.random(len(text_ids)) < share):
    starts, ends = sentence_ranges(token_starts[number], sentence_starts[number])
    whole = np.flatnonzero(ends > starts)
    if len(whole):
      pick = rng.choice(whole)
      drawn.append(text_ids[number][starts[pick] : ends[pick]])
  return Ragged.of(drawn, np.int32)


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
    keys = np.random.default_rng([seed, 7, epoch]).integers(1 << 64, size=_ROUNDS, dtype=np.uint64)
    picked[inside] = _permuted(at[inside] % num_rows, num_rows, keys)
  return picked if rows is None else rows[picked]


def _permuted(places: np.ndarray, num_rows: int, keys: np.ndarray) -> np.ndarray:
  """The rows [B] at these places of a pseudo-random permutation of range(num_rows).

  The permutation is never held in memory. It is a Feistel network over the least square of at least `num_rows` cells
  (Black and Rogaway 2002): each round moves along one side of the square by a function of the other. What falls
  outside of the rows is moved again, until it falls inside.

  Args:
    keys: [rounds] uint64.
  """
  side = np.uint64(math.isqrt(num_rows - 1) + 1)
  moved, outside = places.astype(np.uint64), np.arange(len(places))
  while len(outside):
    left, right = np.divmod(moved[outside], side)
    for key in keys:
      left, right = right, (left + _mixed(right ^ key) % side) % side
    moved[outside] = left * side + right
    outside = outside[moved[outside] >= num_rows]
  return moved.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
  """Each of these uint64 with its bits mixed (SplitMix64, Steele et al. 2014)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------------------------------------------- masked sentences

MASKINGS = ("salient", "random_span", "uniform")
_MASKED_SHARE = 0.15  # of a sentence's word pieces, by the two baselines
_MAX_SPAN_WORDS, _SPAN_END = 10, 0.2  # SpanBERT's: lengths are geometric, and cut
_HELD_OUT_EVERY = 20  # one passage of so many may be held out
_SPANS_AT_ONCE = 1 << 16  # whose holders are looked up


@dataclasses.dataclass(frozen=True)
class MaskedQueries:
  """Sentences with masked word pieces.

  Attributes:
    ids: [B, None] word pieces with [MASK] in place of the targets.
    mask_positions: [B, M] int32 positions in the *packed* query ([CLS] is 0), 0 where unused.
    targets: [B, M] int32 word pieces to predict.
    target_mask: [B, M] float32, 1 where used.
    own_passages: [B, K] int32 numbers of the passages that the sentence stands in, then NULL_PASSAGE. K is 1, or
      as many copies as the knowledge corpus holds of one of them.
    holders: [B, H] int32 numbers of the other passages that hold the masked span, ascending, then NULL_PASSAGE. None
      where there are more than `holders.MAX_HOLDERS`, or where they are not known.
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
  """Puts [MASK] in place of the word pieces at the positions `at` (ascending, at most `max_masks`) of each row.

  `held_by` are the `holders`; without them none are known.
  """
  masked, shape = [], (len(ids), max_masks)
  positions, targets, target_mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
  for row, (pieces, chosen) in enumerate(zip(ids, at, strict=True)):
    pieces, size = np.array(pieces, np.int32), len(chosen)
    positions[row, :size] = chosen + 1
    targets[row, :size] = pieces[chosen]
    target_mask[row, :size] = 1
    pieces[chosen] = tokenizer.mask_id
    masked.append(pieces)
  own_passages = np.reshape(own_passages, [len(ids), -1]).astype(np.int32)
  held_by = np.full([len(ids), 1], NULL_PASSAGE, np.int32) if held_by is None else held_by
  return MaskedQueries(
    Ragged.of(masked, np.int32), positions, targets, target_mask, own_passages, held_by)


def mask_spans(ids: Sequence[np.ndarray], starts: Sequence[int], ends: Sequence[int], own_passages: Sequence[int], *,
               tokenizer: Tokenizer, max_masks: int) -> MaskedQueries:
  """Masks word pieces [start, end) of each row (REALM, section 3.4)."""
  at = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
  return mask_pieces(ids, at, own_passages, tokenizer=tokenizer, max_masks=max_masks)


def realm_batch(queries: MaskedQueries, query_ids: np.ndarray, numbers: np.ndarray, table: PassageTable, *,
                tokenizer: Tokenizer, query_length: int, passage_length: int, reader_length: int,
                title_length: int | None = None) -> dict[str, np.ndarray]:
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
  for_tower = pack_passages(titles, texts, tokenizer=tokenizer, length=passage_length, title_length=title_length)
  repeated = queries.ids.gather(np.repeat(np.arange(len(numbers)), numbers.shape[1]))
  for_reader = pack_reader(repeated, texts, tokenizer=tokenizer, query_length=query_length, length=reader_length)
  shaped = lambda tensor: tensor.numpy().reshape(*numbers.shape, -1)  # [B * C, L] → [B, C, L]
  return {
      "query_ids": query_ids,
      "passage_ids": shaped(for_tower.token_ids), "passage_segments": shaped(for_tower.segment_ids),
      "reader_ids": shaped(for_reader.token_ids), "reader_segments": shaped(for_reader.segment_ids),
      "mask_positions": queries.mask_positions, "targets": queries.targets, "target_mask": queries.target_mask,
  }


def unread_passages(queries: MaskedQueries, numbers: np.ndarray) -> np.ndarray:
  """Which candidates of the batch count for each query among those that were not read for it.

  A passage counts once. Those that the query was read with do not count, nor do null passages, nor what may
  hold the answer: its own passages and the holders of the masked span.

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


def contains(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """Whether each row [B, K] holds each of the passage numbers ([N], or [B, N] of its own): [B, N] bool."""
  numbers = np.broadcast_to(numbers, [len(rows), numbers.shape[-1]])
  return (rows[:, None, :] == numbers[:, :, None]).any(axis=-1)


def rows_of(queries: MaskedQueries, rows: np.ndarray) -> MaskedQueries:
  """Some of the masked queries ([N] int rows)."""
  ids = Ragged.of([queries.ids[row] for row in rows], np.int32)
  rest = {field.name: getattr(queries, field.name)[rows] for field in dataclasses.fields(queries) if field.name != "ids"}
  return MaskedQueries(ids, **rest)


def crop_queries(
  queries: MaskedQueries, num_words: Sequence[int], *, tokenizer: Tokenizer, rng: np.random.Generator
) -> MaskedQueries:
  """Masked queries cut to random runs of words around their masks, about as long as questions are.

  Args:
    num_words: fewest and most words; a masked span counts as one.
  """
  ids, positions = [], queries.mask_positions.copy()
  for row, used in enumerate(queries.target_mask > 0):
    pieces, at = queries.ids[row], positions[row, used] - 1  # without [CLS]
    begins = ~tokenizer.continues[pieces]
    begins[at[1:]] = False
    part = crop(begins, num_words, rng, keep=(at[0], at[-1] + 1))
    ids.append(pieces[part])
    positions[row, used] -= part.start
  return dataclasses.replace(queries, ids=Ragged.of(ids, np.int32), mask_positions=positions)


def evidence(batch: Mapping[str, np.ndarray], *, tokenizer: Tokenizer) -> np.ndarray:
  """Whether one of a query's candidates, as it is read, holds the masked word pieces as whole words: [B] float32.

  Args:
    batch: of `realm_batch`.
  """
  found = []
  for row, used in enumerate(batch["target_mask"] > 0):
    targets = batch["targets"][row][used]
    marked = answer_spans(
      batch["reader_ids"][row], batch["reader_segments"][row], [targets], tokenizer=tokenizer, max_span=len(targets))
    found.append(marked.any())
  return np.array(found, np.float32)


def draw_holders(queries: MaskedQueries, num: int, rng: np.random.Generator) -> np.ndarray:
  """So many different holders of each masked span, at random: [B, num] int32, then NULL_PASSAGE."""
  holders = np.pad(queries.holders, [[0, 0], [0, num]], constant_values=NULL_PASSAGE)
  order = np.where(holders == NULL_PASSAGE, 1.0, rng.random(holders.shape))
  return np.take_along_axis(holders, np.argsort(order, axis=1, kind="stable"), axis=1)[:, :num]


class OwnPassages:
  """The passages of a knowledge corpus that sentences of any corpus stand in, found by uid.

  Args:
    source: path and fingerprint of the passages that the sentences were found in.
    numbers: [S] the number there of each sentence's passage.
    knowledge: the passages that candidates come from.

  Attributes:
    share: of the sentences that have such a passage.

  Raises:
    ArtifactError: there are no complete passages at that path.
  """

  def __init__(self, source: Mapping[str, str], numbers: np.ndarray, knowledge: PassageTable):
    known = knowledge.short_uids
    if source["fingerprint"] == knowledge.fingerprint:
      uids = known
    else:
      artifacts.read_info(source["path"], kind=passages.KIND)
      uids = passages.read_uids(source["path"])
    self._order = np.argsort(
      known, kind="stable"
    )  # passages by uid, those of the same one by number
    known = known[self._order]
    first, last = (np.searchsorted(known, uids, side=side) for side in ("left", "right"))
    self._first, self._last = (at.astype(np.int32)[numbers] for at in (first, last))
    self.share = float(np.mean(self._last > self._first))

  def of(self, rows: np.ndarray) -> np.ndarray:
    """Passage numbers [B, K] int32 of these sentences, ascending, then NULL_PASSAGE."""
    counts = self._last[rows] - self._first[rows]
    place = np.arange(max(counts.max(initial=1), 1))
    at = np.minimum(self._first[rows][:, None] + place, len(self._order) - 1)
    return np.where(place < counts[:, None], self._order[at], NULL_PASSAGE).astype(np.int32)


class MaskedSentences:
  """The sentences of a spans folder in memory; draws masked queries.

  Args:
    folder: a spans folder.
    masking: what is masked. "salient": one salient span, drawn uniformly (REALM, section 3.4). The paper's two baselines mask
      15% of a sentence, of all sentences of the same passages: "random_span" whole words in spans of geometric length, at most
      10 (SpanBERT), "uniform" any word pieces (BERT). Every chosen word piece becomes [MASK].
    knowledge: the passages that candidates come from. A sentence's own passages are those of the same title and
      text as the passage that it was found in, whichever folder that stands in.
    num_held_out: about so many sentences, at most a twentieth, are in no batch. They are those of whole passages, and
      the same whoever asks.

  Raises:
    ArtifactError: incomplete, of another vocabulary, made from passages that are gone, or nothing fits into the query.
    UserError: unknown masking.
  """

  def __init__(
    self,
    folder: str,
    *,
    tokenizer: Tokenizer,
    query_length: int,
    max_masks: int,
    knowledge: PassageTable,
    masking: str = "salient",
    num_held_out: int = 0,
  ):
    if masking not in MASKINGS:
      raise artifacts.UserError(f"masking is {masking!r}; use one of {', '.join(MASKINGS)}.")
    info = artifacts.read_info(folder, kind=SPANS_KIND)
    check_vocabulary(info, folder, tokenizer)
    if "knowledge" not in info["inputs"]:
      raise artifacts.ArtifactError(
        f"{folder!r} does not tell which passages hold its spans: an earlier version made it. Run beam_jobs.annotate_spans again.")
    self.folder, self.tokenizer, self.max_masks, self.masking = folder, tokenizer, max_masks, masking
    self.room = query_length - 2
    source = info["inputs"]["passages"]
    if masking != "salient" or source["fingerprint"] != knowledge.fingerprint:
      advice = "Put them back, or annotate them again."
      source = {**source, "path": artifacts.find_input(folder, "passages", advice=advice)}
    ids, own, spans, phrases = self._salient(folder) if masking == "salient" else self._all(source["path"])
    if not ids:
      raise artifacts.ArtifactError(
          f"{folder!r} has no span within {query_length} word pieces; annotate other passages or raise query_length.")
    self.ids, self.spans = Ragged.of(ids, np.int32), Ragged.of(spans, np.int32)
    self._phrases = np.array(phrases, np.int64)  # of all spans
    # Where the sentences of each passage begin, and the end of the last.
    self._of_passage = np.concatenate([[0], np.flatnonzero(np.diff(own)) + 1, [len(own)]])
    self._own = OwnPassages(source, np.array(own), knowledge)
    self._holders = None
    if masking == "salient" and info["inputs"]["knowledge"]["fingerprint"] == knowledge.fingerprint:
      self._holders = holders.Holders.load(folder)
    self._is_held = self._spans_with_holders()  # by other passages, few enough
    self._hold_out(np.array(own)[self._of_passage[:-1]], num_held_out)
    held = ""
    if self._holders:
      held = f"; {self._is_held.mean():.1%} of the spans stand in 1 to {holders.MAX_HOLDERS} other passages"
    print(
      f"{folder}: {len(self):,} sentences to mask; {self._own.share:.1%} stand in a passage of "
      f"{knowledge.folder} (of the same title and text), which is their own{held}",
      flush=True,
    )

  def _salient(self, folder: str):
    """Sentences with spans that fit: their word pieces, passage numbers and span ranges, and the spans' phrases."""
    ids, own, spans, phrases = [], [], [], []
    for path in passages.shard_paths(folder, SPANS_KIND):
      for row in passages.read_shard(path, passages.Sentence):
        fitting = [
          (start, end, phrase)
          for start, end, phrase in zip(row.span_starts, row.span_ends, row.span_phrases, strict=True)
          if end <= self.room and end - start <= self.max_masks
        ]
        if fitting:
          starts, ends, their_phrases = zip(*fitting)
          ids.append(row.ids)
          own.append(row.passage)
          spans.append(np.ravel(list(zip(starts, ends))))
          phrases += their_phrases
    return ids, own, spans, phrases

  def _all(self, folder: str):
    """All sentences of a passages folder: their word pieces, passage numbers, and no spans."""
    table = passages.load(folder)
    ids, own = [], []
    for number in range(len(table)):
      pieces = table.text_ids[number]
      for start, end in zip(
        *sentence_ranges(table.token_starts[number], table.sentence_starts[number])
      ):
        if end > start:
          ids.append(pieces[start:end]), own.append(number)
    return ids, own, [()] * len(ids), []

  def _spans_with_holders(self) -> np.ndarray:
    """[X] bool, of all spans."""
    row_of = np.repeat(np.arange(len(self.ids)), np.diff(self.spans.splits) // 2)
    held = np.zeros(len(row_of), bool)
    for at in range(0, len(row_of), _SPANS_AT_ONCE):
      part = slice(at, at + _SPANS_AT_ONCE)
      held[part] = self._others(self._phrases[part], row_of[part])[:, 0] != NULL_PASSAGE
    return held

  def _others(self, phrases: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which passages besides these sentences' own ones hold these phrases: [B, H] int32; none where there are too many."""
    if self._holders is None:
      return np.full([len(rows), 1], NULL_PASSAGE, np.int32)
    found = self._holders.of(phrases)
    other = (found != NULL_PASSAGE) & ~contains(self._own.of(rows), found)
    other &= (other.sum(axis=1) <= holders.MAX_HOLDERS)[:, None]
    found = np.where(other, found, NULL_PASSAGE)
    return np.take_along_axis(found, np.argsort(~other, axis=1, kind="stable"), axis=1)

  def _hold_out(self, numbers: np.ndarray, num: int) -> None:
    """Divides the passages, whose numbers these are, into those to train on and those held out."""
    sizes = np.diff(self._of_passage)
    chosen = _mixed(numbers.astype(np.uint64)) % np.uint64(_HELD_OUT_EVERY) == 0
    chosen &= np.cumsum(sizes * chosen) <= num
    if chosen.all():
      chosen[:] = False
    self._passage_rows = np.flatnonzero(~chosen)  # of `_of_passage`
    held_out = np.repeat(chosen, sizes)
    self._rows, self._held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    row_of = np.repeat(np.arange(len(self.ids)), np.diff(self.spans.splits) // 2)
    self._rows_with_holders = np.intersect1d(self._rows, row_of[self._is_held])

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def num_with_holders(self) -> int:
    """The sentences with a span that other passages hold, few enough of them."""
    return len(self._rows_with_holders)

  def held_out(self, *, with_holders: bool = False) -> MaskedQueries | None:
    """The sentences that no batch has, each with one of its spans masked; always the same. None without any.

    Args:
      with_holders: only those whose masked span has `holders`.
    """
    if not len(self._held_out):
      return None
    rng = np.random.default_rng([0, 13])
    queries = self._mask(self._held_out, [self._draw(row, rng) for row in self._held_out])
    if not with_holders:
      return queries
    rows = np.flatnonzero(queries.holders[:, 0] != NULL_PASSAGE)
    return rows_of(queries, rows) if len(rows) else None

  def batch(self, step: int, *, batch_size: int, seed: int, by_passage: bool = False, with_holders: float = 0.0) -> MaskedQueries:
    """The masked queries of a step, a pure function of it and the seed.

    Args:
      by_passage: an epoch is each passage once, with one of its spans (for the baselines one of its
        sentences), as in the released code, instead of each sentence once.
      with_holders: share of the batch, its first rows, that are drawn among the spans which have `holders`; an epoch of
        these is each sentence with such a span once. Nothing where there are none, or where other things are masked.

    Raises:
      UserError: which passages hold the spans is not known, and such spans are asked for.
    """
    rng = np.random.default_rng([seed, 11, step])
    num_held = 0
    if with_holders and self.masking == "salient":
      self._check_holders()
      num_held = round(with_holders * batch_size) if len(self._rows_with_holders) else 0
    rows = self._draw_rows(step, batch_size - num_held, seed, by_passage, rng)
    drawn = [self._draw(row, rng) for row in rows]
    if num_held:
      held = epoch_rows(len(self._rows_with_holders), step, num_held, seed + 1, self._rows_with_holders)
      rows = np.concatenate([held, rows])
      drawn = [self._draw(row, rng, held=True) for row in held] + drawn
    return self._mask(rows, drawn)

  def _check_holders(self) -> None:
    if self._holders is None:
      raise artifacts.UserError(
        f"which passages hold the spans of {self.folder!r} is known for another corpus only. Run beam_jobs.annotate_spans with "
        "--knowledge=PASSAGES, or set mlm.holders, warmup.holders, realm.holders and realm.with_holders to 0.")

  def _draw_rows(self, step: int, num: int, seed: int, by_passage: bool, rng: np.random.Generator) -> np.ndarray:
    if not by_passage:
      return epoch_rows(len(self._rows), step, num, seed, self._rows)
    passage_rows = epoch_rows(len(self._passage_rows), step, num, seed, self._passage_rows)
    return np.array([self._draw_sentence(row, rng) for row in passage_rows], np.int64)

  def _mask(self, rows: np.ndarray, drawn: Sequence[tuple[np.ndarray, int]]) -> MaskedQueries:
    phrases = np.array([phrase for _, phrase in drawn], np.int64)
    return mask_pieces(
      [self.ids[row] for row in rows],
      [positions for positions, _ in drawn],
      self._own.of(rows),
      tokenizer=self.tokenizer,
      max_masks=self.max_masks,
      held_by=self._others(phrases, rows),
    )

  def _draw_sentence(self, passage: int, rng: np.random.Generator) -> int:
    """A sentence of a passage, so drawn that every span of the passage is as likely."""
    first, last = self._of_passage[passage:passage + 2]
    if self.masking != "salient":
      return rng.integers(first, last)
    ends = self.spans.splits[first + 1:last + 1]
    drawn = rng.integers(self.spans.splits[first] // 2, ends[-1] // 2)
    return first + np.searchsorted(ends // 2, drawn, side="right")

  def _draw(self, row: int, rng: np.random.Generator, *, held: bool = False) -> tuple[np.ndarray, int]:
    """Positions of the word pieces to mask in sentence `row`, ascending, and the phrase that they are, or 0.

    Args:
      held: only of a span that other passages hold.
    """
    if self.masking == "salient":
      first, last = self.spans.splits[row:row + 2] // 2
      choice = first + np.flatnonzero(self._is_held[first:last]) if held else np.arange(first, last)
      at = choice[rng.integers(len(choice))]
      return np.arange(*self.spans.values[2 * at:2 * at + 2]), self._phrases[at]
    pieces = self.ids[row][:self.room]
    budget = min(max(1, round(_MASKED_SHARE * len(pieces))), self.max_masks)
    if self.masking == "uniform":
      return np.sort(rng.choice(len(pieces), budget, replace=False)), 0
    return random_spans(~self.tokenizer.continues[pieces], budget, rng), 0


def random_spans(begins: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
  """Spans of whole words, of geometric length (SpanBERT, section 3.1), until `budget` word pieces are chosen or nothing more fits.

  Args:
    begins: [L] bool, whether a word begins with this word piece.
    budget: most word pieces.

  Returns:
    Positions, ascending; the first word pieces where no whole word fits into the budget.
  """
  starts = np.flatnonzero(begins)
  ends = np.append(starts[1:], len(begins))
  chosen = np.zeros(len(begins), bool)
  for first in rng.permutation(len(starts)):
    last = min(first + min(rng.geometric(_SPAN_END), _MAX_SPAN_WORDS), len(starts)) - 1
    while last >= first and ends[last] - starts[first] > budget - chosen.sum():
      last -= 1  # a shorter span, in whole words
    if last >= first and not chosen[starts[first]:ends[last]].any():
      chosen[starts[first]:ends[last]] = True
  return np.flatnonzero(chosen) if chosen.any() else np.arange(budget)


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


def whole_words(table: PassageTable, number: int, start: int, end: int, *, tokenizer: Tokenizer) -> tuple[int, int] | None:
  """Word-piece range [first, last) of the whole words that bytes [start, end) of a passage's text touch; None without any."""
  first = int(np.searchsorted(table.token_ends[number], start, side="right"))
  last = int(np.searchsorted(table.token_starts[number], end))
  if start == end or first >= last:
    return None
  continues = tokenizer.continues[table.text_ids[number]]
  while first > 0 and continues[first]:
    first -= 1
  while last < len(continues) and continues[last]:
    last += 1
  return first, last


def mark_spans(ranges: Sequence[Sequence[tuple[int, int]]], segments: np.ndarray, *, max_span: int) -> np.ndarray:
  """Marks given spans in the passages read for one question, as `answer_spans` does.

  Args:
    ranges: of each passage, word-piece ranges [first, last) of its text; those of more than `max_span` word pieces, or beyond
      what is read of the passage, are passed over.
    segments: [R, L] int32 packed reader segments.

  Returns:
    [R, L, W] float32.
  """
  correct = np.zeros([*segments.shape, max_span], np.float32)
  for row, spans in enumerate(ranges):
    text = np.flatnonzero(segments[row])  # and the [SEP] after it
    for first, last in spans:
      if last - first <= max_span and last < len(text):
        correct[row, text[0] + first, last - first - 1] = 1
  return correct


def check_vocabulary(info: dict, folder: str, tokenizer: Tokenizer) -> None:
  """Raises ArtifactError where an artifact was made with another vocabulary than the tokenizer's."""
  if info["vocab_fingerprint"] != tokenizer.fingerprint:
    raise artifacts.ArtifactError(
        f"{info['kind']} {folder!r} was made with vocabulary {info['vocab_fingerprint']}, this run has "
        f"{tokenizer.fingerprint} ({tokenizer.path!r}). Use the same vocab.txt for both.")
