"""Mask filling: retrieve, read, and marginalise over the passages (REALM, equation 1).

Example:
  system = MaskFilling([open_workdir("runs/quickstart/realm")])
  text = "The Gorneth flows into the sea near the port of [MASK] [MASK]."
  system.fill(text).text
  system.explain(text).explanations[0].candidates
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from keras import ops

from realm_tf.corpus import passages
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.passages import PassageTable
from realm_tf.examples import packing
from realm_tf.examples.masking import MaskedQueries
from realm_tf.examples.realm import realm_batch
from realm_tf.retrieval import dense
from realm_tf.systems.evidence import bytes_read, occurrences
from realm_tf.systems.explanations import Candidate, Explanation, PossibleAnswer, Report, best_first
from realm_tf.systems.masked_text import MaskedText, Reading
from realm_tf.systems.results import Filling, found_passages
from realm_tf.systems.workdir import Workdir

_NUM_ANSWERS = 3  # best answers of every corpus and of the null passage


class Look(NamedTuple):
  """Candidates of a masked text in one corpus, and the models' outputs.

  Attributes:
    indexed: the corpus.
    own_passage: the passage that contains the text itself, which is not a candidate; or None.
    numbers: [C] numbers of the candidates, the null passage first.
    segments: [C, L] segment ids of the reader's inputs.
    reading: the models' outputs.
  """

  indexed: dense.IndexedRetriever
  own_passage: int | None
  numbers: np.ndarray
  segments: np.ndarray
  reading: Reading


class MaskFilling:
  """A pre-trained system that fills masks, with one corpus or several.

  Args:
    opened: the system's workdir, opened with each corpus.

  Raises:
    ArtifactError: the snapshot has no reader.
  """

  def __init__(self, opened: Sequence[Workdir]):
    self.snapshot, self.tokenizer = opened[0].snapshot, opened[0].tokenizer
    self.retriever, self.reader = (opened[0].load_model(name) for name in ("retriever", "reader"))
    self.indexes = [corpus.load_index(self.retriever) for corpus in opened]

  def fill(self, text: str, *, num_candidates: int = 8) -> Filling:
    """Fills the masks of a text with the most probable y, using the first corpus.

    Args:
      text: text with [MASK]s.
      num_candidates: C, including the null passage.

    Raises:
      UserError: the models cannot take the text.
    """
    masked = MaskedText.of(text, None, self.tokenizer)
    (look, *_) = self._look(masked, num_candidates)
    (pieces,) = look.reading.best(1)
    return Filling(
      text=masked.filled(pieces, self.tokenizer),
      words=tuple(map(self.tokenizer.spell, masked.split(pieces))),
      probability=look.reading.probability(pieces),
      without_retrieval=look.reading.without_retrieval.probability(pieces),
      passages=tuple(found_passages(look.indexed.table, look.numbers[1:], look.reading.scores[1:])),
    )

  def explain(self, text: str, *, answer: str | None = None, num_candidates: int = 8) -> Report:
    """Explains one text.

    Args:
      text: text with [MASK]s.
      answer: y; None means each corpus's most probable filling.
      num_candidates: C, including the null passage.

    Raises:
      UserError: the models cannot take the text or the answer.
    """
    masked = MaskedText.of(text, answer, self.tokenizer)
    looks = self._look(masked, num_candidates)
    alone = looks[0].reading.without_retrieval  # the null passage is the same in every corpus
    readings = [look.reading for look in looks]
    fillings = {pieces for reading in (alone, *readings) for pieces in reading.best(_NUM_ANSWERS)}
    if masked.pieces is not None:
      fillings.add(masked.pieces)
    answers = [
      PossibleAnswer(
        self._spell(masked, pieces),
        alone.probability(pieces),
        [reading.probability(pieces) for reading in readings],
      )
      for pieces in sorted(fillings)
    ]
    return Report(
      kind="text",
      x=text,
      snapshot=self.snapshot.folder,
      step=self.snapshot.step,
      explanations=[self._explain(look, masked, answer) for look in looks],
      answers=best_first(answers),
    )

  def _explain(self, look: Look, masked: MaskedText, answer: str | None) -> Explanation:
    """Explains the prediction for a text with one corpus; `answer` is the given y, if any."""
    reading, alone = look.reading, look.reading.without_retrieval
    pieces = masked.pieces or reading.best(1)[0]
    return Explanation(
      index=look.indexed.folder,
      passages=look.indexed.table.folder,
      num_passages=look.indexed.table.num_alive,
      own_passage=look.own_passage,
      answer=answer or self._spell(masked, pieces),
      probability=reading.probability(pieces),
      without_retrieval=alone.probability(pieces),
      utility=reading.retrieval_utility(pieces),
      candidates=self._candidates(look, masked, pieces),
    )

  def _look(self, masked: MaskedText, num_candidates: int) -> list[Look]:
    """Retrieves and reads in each corpus."""
    query = masked.query(
      self.tokenizer, query_length=self.retriever.query_length, max_masks=self.reader.max_masks
    )
    query_ids = packing.pack_queries(
      query.ids.tensor(), tokenizer=self.tokenizer, length=self.retriever.query_length
    ).numpy()
    found = []
    for indexed in self.indexes:
      own = self._own_passage(masked, query_ids, indexed, num_candidates)
      numbers = dense.candidates(
        indexed,
        query_ids,
        num=num_candidates,
        own_passages=None if own is None else np.array([[own]]),
        null=True,
      )[0]
      numbers = np.append(numbers[:1], numbers[1:][numbers[1:] != NULL_PASSAGE])
      reading, segments = self._read(
        query, query_ids, numbers, indexed.table, num_masks=sum(masked.sizes)
      )
      found.append(Look(indexed, own, numbers, segments, reading))
    return found

  def _own_passage(
    self,
    masked: MaskedText,
    query_ids: np.ndarray,
    indexed: dense.IndexedRetriever,
    num: int,
  ) -> int | None:
    """Returns the passage that contains the text itself, if it is among the best; else None."""
    table = indexed.table
    for number in indexed.search(query_ids, min(num, indexed.num_rows)).numbers[0].tolist():
      if number != NULL_PASSAGE and any(
        map(
          masked.matches,
          passages.sentences_of(
            table.texts[number], table.sentence_starts[number], table.sentence_ends[number]
          ),
        )
      ):
        return number
    return None

  def _read(
    self,
    query: MaskedQueries,
    query_ids: np.ndarray,
    numbers: np.ndarray,
    table: PassageTable,
    *,
    num_masks: int,
  ) -> tuple[Reading, np.ndarray]:
    """Runs the models; returns their outputs and the reader's segments [C, L]."""
    batch = realm_batch(
      query,
      query_ids,
      numbers[None],
      table,
      tokenizer=self.tokenizer,
      query_length=self.retriever.query_length,
      passage_length=self.retriever.passage_length,
      reader_length=self.reader.length,
      title_length=self.retriever.title_length,
    )
    queries = self.retriever.embed_queries(query_ids)  # [1, D]
    vectors = self.retriever.embed_passages(
      batch["passage_ids"][0], batch["passage_segments"][0]
    )  # [C, D]
    logits = self.reader(
      {  # [C, M, V]
        "token_ids": batch["reader_ids"][0],
        "segment_ids": batch["reader_segments"][0],
        "mask_positions": np.repeat(query.mask_positions, len(numbers), axis=0),
      }
    )
    scores = ops.convert_to_numpy(ops.einsum("bd,cd->c", queries, vectors))
    log_probs = ops.log_softmax(ops.cast(logits[:, :num_masks], "float64"))
    return Reading(scores, ops.convert_to_numpy(log_probs)), batch["reader_segments"][0]

  def _candidates(self, look: Look, masked: MaskedText, pieces: Sequence[int]) -> list[Candidate]:
    """Returns the candidates of a text with their contributions to y."""
    table, reading, found = look.indexed.table, look.reading, []
    log_prior, log_likelihoods = reading.log_prior, reading.log_likelihoods(pieces)
    utility = reading.candidate_utility(pieces)
    by_blank = masked.split(pieces)
    for at, number in enumerate(look.numbers.tolist()):
      title, text = (
        ("", "") if number == NULL_PASSAGE else (table.titles[number], table.texts[number])
      )
      found.append(
        Candidate(
          number=number,
          title=title,
          text=text,
          score=float(reading.scores[at]),
          prior=float(np.exp(log_prior[at])),
          likelihood=float(np.exp(log_likelihoods[at])),
          utility=float(utility[at]),
          joint=float(np.exp(log_likelihoods[at] + log_prior[at])),
          reader_score=None,
          best_span=None,
          evidence=occurrences(table, number, by_blank, continues=self.tokenizer.continues),
          bytes_read=bytes_read(table, number, look.segments[at]),
        )
      )
    return found

  def _spell(self, masked: MaskedText, pieces: Sequence[int]) -> str:
    return " … ".join(map(self.tokenizer.spell, masked.split(pieces)))
