"""The inverse cloze task (Lee et al. 2019, section 4)."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from realm_tf import errors
from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples.epochs import epoch_rows
from realm_tf.examples.packing import gather_passages, pack_passages, pack_queries, titled
from realm_tf.examples.sentences import crop, sentence_ranges
from realm_tf.storage.columns import Ragged


@dataclasses.dataclass(frozen=True)
class IctDraw:
  """Sentences and the passages that they came from.

  Attributes:
    queries, texts: [B, None] word pieces.
    numbers: [B] passage numbers.
    removed: [B] whether the sentence was removed from its passage's text.
  """

  queries: Ragged
  texts: Ragged
  numbers: np.ndarray
  removed: np.ndarray


class IctExamples:
  """Examples whose query is one sentence of a passage, and whose target is the passage.

  The target is mostly without the sentence. Lee et al. 2019, section 4.

  Args:
    table: passages.
    removal_rate: probability that the sentence is removed from its passage (0.9 as published).
    query_words: fewest and most words of the query, which is then a random run of words of the
      sentence; if empty, the query is the whole sentence, as published.
    title_share: share of the queries that begin with the passage's title, as much of it as a packed
      passage has (0 as published). A run of words seldom names what its passage is about, but many
      questions do.
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
    title_share: float = 0.0,
  ):
    self.table, self.tokenizer = table, tokenizer
    self.query_length, self.passage_length, self.title_length = (
      query_length,
      passage_length,
      title_length,
    )
    self.removal_rate, self.query_words = removal_rate, tuple(query_words)
    self.title_share = title_share
    self.rows = table.numbers[table.text_ids.sizes()[table.numbers] > 0]

  def batch(self, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """Returns the batch of training step `step`, a pure function of the step and the seed.

    Returns:
      query_ids [B, Lq], passage_ids [B, Lp], passage_segments [B, Lp], removed [B] (1 where the
      sentence was removed).
    """
    return self.pack(self.draw(step, batch_size=batch_size, seed=seed))

  def draw(self, step: int, *, batch_size: int, seed: int) -> IctDraw:
    """Draws the sentences of training step `step`, a pure function of the step and the seed.

    Single-sentence passages whose sentence would be removed are skipped, as published.
    """
    rng = np.random.default_rng([seed, step])
    queries, texts, numbers, removed = [], [], [], []
    for number in _draw_forever(self.rows, step, batch_size, seed, rng):
      starts, ends = sentence_ranges(
        self.table.token_starts[number], self.table.sentence_starts[number]
      )
      pick, remove = rng.integers(len(starts)), rng.random() < self.removal_rate
      ids = self.table.text_ids[number]
      query = ids[starts[pick] : ends[pick]]
      if len(query) == 0 or (remove and len(query) == len(ids)):
        continue
      if self.query_words:
        query = query[crop(~self.tokenizer.continues[query], self.query_words, rng)]
      if self.title_share and rng.random() < self.title_share:
        query = titled(
          query,
          self.table.title_ids[number],
          query_length=self.query_length,
          passage_length=self.passage_length,
          title_length=self.title_length,
        )
      queries.append(query)
      texts.append(np.delete(ids, np.s_[starts[pick] : ends[pick]]) if remove else ids)
      numbers.append(number)
      removed.append(remove)
      if len(queries) == batch_size:
        break
    return IctDraw(
      Ragged.of(queries, np.int32),
      Ragged.of(texts, np.int32),
      np.array(numbers),
      np.array(removed, np.float32),
    )

  def pack(self, drawn: IctDraw) -> dict[str, np.ndarray]:
    """Packs the inputs of an `InBatchModel`; see `batch`."""
    titles, _ = gather_passages(self.table, drawn.numbers)
    packed = pack_passages(
      titles,
      drawn.texts.tensor(),
      tokenizer=self.tokenizer,
      length=self.passage_length,
      title_length=self.title_length,
    )
    return {
      "query_ids": pack_queries(
        drawn.queries.tensor(), tokenizer=self.tokenizer, length=self.query_length
      ).numpy(),
      "passage_ids": packed.token_ids.numpy(),
      "passage_segments": packed.segment_ids.numpy(),
      "removed": drawn.removed,
    }


def _draw_forever(
  rows: np.ndarray, step: int, batch_size: int, seed: int, rng: np.random.Generator
) -> Iterator[int]:
  """Yields the rows of step `step` of an epoch-wise shuffle, then random rows.

  The random rows replace those that are skipped.

  Raises:
    UserError: if no row is usable, after 100 batches of replacements.
  """
  yield from epoch_rows(len(rows), step, batch_size, seed, rows)
  for _ in range(100 * batch_size):
    yield rows[rng.integers(len(rows))]
  raise errors.UserError(
    "no passage yields an example: every one is a single sentence. "
    "Make passages of more than one sentence."
  )
