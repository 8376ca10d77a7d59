"""The sentences of a spans folder, from which masked queries are drawn (REALM, section 3.4)."""

from collections.abc import Mapping, Sequence

import numpy as np

from realm_tf.corpus import passages
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples.epochs import epoch_rows, mixed
from realm_tf.examples.masking import MaskedQueries, contains, mask_pieces, random_spans, rows_of
from realm_tf.examples.packing import check_vocabulary, query_room
from realm_tf.examples.sentences import sentence_ranges
from realm_tf.spans import holders, rules
from realm_tf.storage import artifacts
from realm_tf.storage.columns import Chunk, Picked, Ragged, splits_of

MASKINGS = ("salient", "random_span", "uniform")
_MASKED_SHARE = 0.15  # of a sentence's word pieces, in the two baselines
_HELD_OUT_EVERY = 20  # one in this many passages may be held out
_SPANS_AT_ONCE = 1 << 16  # for looking up holders


class MaskedSentences:
  """The sentences of a spans folder; draws masked queries.

  Args:
    folder: a spans folder.
    masking: what is masked. "salient" masks one salient span, drawn uniformly (REALM, section 3.4).
      The paper's two baselines mask 15% of any sentence of the same passages: "random_span" masks
      whole words in spans of geometric length, at most 10 (SpanBERT), "uniform" masks any word
      pieces (BERT). Every chosen word piece becomes [MASK].
    knowledge: the passages that candidates come from. A sentence's own passages are those with the
      same title and text as the passage that it was found in, even if that is in another folder.
    num_held_out: approximate number of sentences, at most a twentieth, that are in no batch. They
      are all sentences of some passages, and always the same.

  Raises:
    ArtifactError: if the folder is incomplete, has another vocabulary, or was made from passages
      that are missing, or if nothing fits into the query.
    UserError: if the masking is unknown.
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
    info = artifacts.read_info(folder, kind=rules.KIND)
    check_vocabulary(info, folder, tokenizer)
    if "knowledge" not in info["inputs"]:
      raise artifacts.ArtifactError(
        f"{folder!r} does not say which passages hold its spans: an earlier version made it. "
        "Run beam_jobs.annotate_spans again."
      )
    self.folder, self.tokenizer, self.max_masks, self.masking = (
      folder,
      tokenizer,
      max_masks,
      masking,
    )
    self.room = query_room(query_length)
    source = info["inputs"]["passages"]
    if masking != "salient" or source["fingerprint"] != knowledge.fingerprint:
      advice = "Put them back, or annotate them again."
      source = {**source, "path": artifacts.find_input(folder, "passages", advice=advice)}
    self.ids: Ragged | Picked
    self.ids, self.spans, self._phrases, own = (  # _phrases: of each span
      self._salient(folder) if masking == "salient" else self._all(source["path"])
    )
    if not len(self.ids):
      raise artifacts.ArtifactError(
        f"{folder!r} has no span within {query_length} word pieces; annotate other passages "
        "or raise query_length."
      )
    # Where the sentences of each passage begin, and where the last one ends.
    self._of_passage = np.concatenate([[0], np.flatnonzero(np.diff(own)) + 1, [len(own)]])
    self._own = OwnPassages(source, own, knowledge)
    self._holders = None
    if masking == "salient" and info["inputs"]["knowledge"]["fingerprint"] == knowledge.fingerprint:
      self._holders = holders.Holders.load(folder)
    self._is_held = self._spans_with_holders()  # spans held by other passages, but not too many
    self._hold_out(own[self._of_passage[:-1]], num_held_out)
    held = ""
    if self._holders:
      held = (
        f"; {self._is_held.mean():.1%} of the spans occur in 1 to {holders.MAX_HOLDERS} other "
        "passages"
      )
    print(
      f"{folder}: {len(self):,} sentences to mask; {self._own.share:.1%} have their own passage in "
      f"{knowledge.folder} (with the same title and text){held}",
      flush=True,
    )

  def _salient(self, folder: str) -> tuple[Picked, Ragged, np.ndarray, np.ndarray]:
    """Reads the sentences with spans that fit.

    Returns:
      Word pieces and span ranges of the sentences, the spans' phrases, and the sentences' passages.
      Only the word pieces stay in the record files.
    """
    rows = passages.read_all(passages.shard_paths(folder, rules.KIND), passages.Sentence)
    starts, phrases = rows["span_starts"], rows["span_phrases"].values
    ranges = np.stack([starts.values, rows["span_ends"].values], axis=1).astype(np.int32)
    fit = (ranges[:, 1] <= self.room) & (ranges[:, 1] - ranges[:, 0] <= self.max_masks)
    row_of = np.repeat(np.arange(len(starts)), starts.sizes())
    num_fitting = np.bincount(row_of[fit], minlength=len(starts))
    kept = np.flatnonzero(num_fitting)
    spans = Ragged([Chunk(ranges[fit].ravel(), splits_of(2 * num_fitting[kept]))])
    return Picked(rows["ids"], kept), spans, phrases[fit], rows["passage"].joined()[kept]

  def _all(self, path: str) -> tuple[Ragged, Ragged, np.ndarray, np.ndarray]:
    """Reads all sentences of a passages folder, without spans; otherwise as `_salient`."""
    table = passages.load(path)
    ids, own = [], []
    for number in table.numbers.tolist():
      pieces = table.text_ids[number]
      ranges = sentence_ranges(table.token_starts[number], table.sentence_starts[number])
      for start, end in zip(*ranges, strict=True):
        if end > start:
          ids.append(pieces[start:end])
          own.append(number)
    none = np.zeros([0], np.int64)
    spans = Ragged([Chunk(none.astype(np.int32), splits_of([0] * len(ids)))])
    return Ragged.of(ids, np.int32), spans, none, np.array(own, np.int64)

  def _spans_with_holders(self) -> np.ndarray:
    """Returns whether each span has holders: [X] bool."""
    row_of = np.repeat(np.arange(len(self.ids)), self.spans.sizes() // 2)
    held = np.zeros(len(row_of), bool)
    for at in range(0, len(row_of), _SPANS_AT_ONCE):
      part = slice(at, at + _SPANS_AT_ONCE)
      held[part] = self._others(self._phrases[part], row_of[part])[:, 0] != NULL_PASSAGE
    return held

  def _others(self, phrases: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns which passages other than the sentences' own hold these phrases: [B, H] int32.

    A row has no passage if there are too many.
    """
    if self._holders is None:
      return np.full([len(rows), 1], NULL_PASSAGE, np.int32)
    found = self._holders.of(phrases)
    other = (found != NULL_PASSAGE) & ~contains(self._own.of(rows), found)
    other &= (other.sum(axis=1) <= holders.MAX_HOLDERS)[:, None]
    found = np.where(other, found, NULL_PASSAGE)
    return np.take_along_axis(found, np.argsort(~other, axis=1, kind="stable"), axis=1)

  def _hold_out(self, numbers: np.ndarray, num: int) -> None:
    """Divides the passages with these numbers into those to train on and those held out."""
    sizes = np.diff(self._of_passage)
    chosen = mixed(numbers.astype(np.uint64)) % np.uint64(_HELD_OUT_EVERY) == 0
    chosen &= np.cumsum(sizes * chosen) <= num
    if chosen.all():
      chosen[:] = False
    self._passage_rows = np.flatnonzero(~chosen)  # of `_of_passage`
    held_out = np.repeat(chosen, sizes)
    self._rows, self._held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    row_of = np.repeat(np.arange(len(self.ids)), self.spans.sizes() // 2)
    self._rows_with_holders = np.intersect1d(self._rows, row_of[self._is_held])

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def num_with_holders(self) -> int:
    """Number of sentences with a span that other passages hold, but not too many."""
    return len(self._rows_with_holders)

  def held_out(self, *, with_holders: bool = False) -> MaskedQueries | None:
    """Returns the held-out sentences, each with one of its spans masked; None if there are none.

    The result is always the same.

    Args:
      with_holders: whether to return only those whose masked span has `holders`.
    """
    if not len(self._held_out):
      return None
    rng = np.random.default_rng([0, 13])
    queries = self._mask(self._held_out, [self._draw(int(row), rng) for row in self._held_out])
    if not with_holders:
      return queries
    rows = np.flatnonzero(queries.holders[:, 0] != NULL_PASSAGE)
    return rows_of(queries, rows) if len(rows) else None

  def batch(
    self,
    step: int,
    *,
    batch_size: int,
    seed: int,
    by_passage: bool = False,
    with_holders: float = 0.0,
  ) -> MaskedQueries:
    """Returns the masked queries of a step, a pure function of the step and the seed.

    Args:
      step: training step.
      batch_size: B, number of queries.
      seed: seed of the training.
      by_passage: whether an epoch has each passage once, with one of its spans (or, for the
        baselines, one of its sentences), as in the released code, instead of each sentence once.
      with_holders: share of the batch, its first rows, that is drawn from the spans with `holders`;
        an epoch of these has each sentence with such a span once. Ignored if there are no such
        spans, or with another masking.

    Raises:
      UserError: if spans with holders are requested, but it is unknown which passages hold them.
    """
    rng = np.random.default_rng([seed, 11, step])
    num_held = 0
    if with_holders and self.masking == "salient":
      self._check_holders()
      num_held = round(with_holders * batch_size) if len(self._rows_with_holders) else 0
    rows = self._draw_rows(step, batch_size - num_held, seed, by_passage, rng)
    drawn = [self._draw(row, rng) for row in rows]
    if num_held:
      held = epoch_rows(
        len(self._rows_with_holders), step, num_held, seed + 1, self._rows_with_holders
      )
      rows = np.concatenate([held, rows])
      drawn = [self._draw(row, rng, held=True) for row in held] + drawn
    return self._mask(rows, drawn)

  def _check_holders(self) -> None:
    if self._holders is None:
      raise artifacts.UserError(
        f"{self.folder!r} records which passages hold its spans for another corpus only. "
        "Run beam_jobs.annotate_spans with --knowledge=PASSAGES, or set mlm.holders, "
        "warmup.holders, realm.holders and realm.with_holders to 0."
      )

  def _draw_rows(
    self, step: int, num: int, seed: int, by_passage: bool, rng: np.random.Generator
  ) -> np.ndarray:
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
    """Draws a sentence of a passage, so that every span of the passage is equally likely."""
    first, last = self._of_passage[passage : passage + 2]
    if self.masking != "salient":
      return rng.integers(first, last)
    ends = self.spans.splits[first + 1 : last + 1]
    drawn = rng.integers(self.spans.splits[first] // 2, ends[-1] // 2)
    return first + np.searchsorted(ends // 2, drawn, side="right")

  def _draw(
    self, row: int, rng: np.random.Generator, *, held: bool = False
  ) -> tuple[np.ndarray, int]:
    """Draws the word pieces to mask in a sentence; returns ascending positions, and a phrase or 0.

    Args:
      row: the sentence.
      rng: draws the span, or the word pieces.
      held: whether to draw only a span that other passages hold.
    """
    if self.masking == "salient":
      first, last = self.spans.splits[row : row + 2] // 2
      choice = first + np.flatnonzero(self._is_held[first:last]) if held else np.arange(first, last)
      at = choice[rng.integers(len(choice))]
      return np.arange(*self.spans.values[2 * at : 2 * at + 2]), self._phrases[at]
    pieces = self.ids[row][: self.room]
    budget = min(max(1, round(_MASKED_SHARE * len(pieces))), self.max_masks)
    if self.masking == "uniform":
      return np.sort(rng.choice(len(pieces), budget, replace=False)), 0
    return random_spans(~self.tokenizer.continues[pieces], budget, rng), 0


class OwnPassages:
  """The passages of a knowledge corpus that contain sentences of any corpus, matched by uid.

  Args:
    source: path and fingerprint of the passages that the sentences were found in.
    numbers: [S] number of each sentence's passage there.
    knowledge: the passages that candidates come from.

  Attributes:
    share: share of the sentences that have such a passage.

  Raises:
    ArtifactError: if there are no complete passages at that path.
  """

  def __init__(self, source: Mapping[str, str], numbers: np.ndarray, knowledge: PassageTable):
    known = knowledge.short_uids
    if source["fingerprint"] == knowledge.fingerprint:
      uids = known
    else:
      artifacts.read_info(source["path"], kind=passages.KIND)
      uids = passages.read_uids(source["path"])
    # passages by uid, then by number
    alive = knowledge.numbers
    self._order = alive[np.argsort(known[alive], kind="stable")]
    known = known[self._order]
    first, last = (np.searchsorted(known, uids, side=side) for side in ("left", "right"))
    self._first, self._last = (at.astype(np.int32)[numbers] for at in (first, last))
    self.share = float(np.mean(self._last > self._first))

  def of(self, rows: np.ndarray) -> np.ndarray:
    """Returns the passage numbers [B, K] int32 of sentences, ascending, then NULL_PASSAGE."""
    counts = self._last[rows] - self._first[rows]
    place = np.arange(max(counts.max(initial=1), 1))
    at = np.minimum(self._first[rows][:, None] + place, len(self._order) - 1)
    return np.where(place < counts[:, None], self._order[at], NULL_PASSAGE).astype(np.int32)
