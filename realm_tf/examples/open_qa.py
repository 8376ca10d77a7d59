"""Questions with the passages found for them, as inputs of an `OpenQaModel`.

ORQA, section 5.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from realm_tf import progress
from realm_tf.corpus import metrics, passages
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.examples import answering, epochs, packing, questions
from realm_tf.examples.answer_spans import answer_spans, mark_spans, whole_words
from realm_tf.models import span_reader
from realm_tf.storage.columns import Ragged

_BATCH_SIZE = 32  # questions answered at once


class QaExamples:
  """Questions with the beam of passages that a retriever finds for them.

  Args:
    rows: the questions.
    table: the knowledge corpus.
    search: packed question ids [B, Lq] and question texts → the `Found` beam.
    embeddings: [N, D] passage embeddings, or None if the scores come from `search`.
    num_read: R, number of passages that the reader reads.
    passage_length, title_length: lengths of the packed passages that a trained passage tower embeds
      again; 0 if the passage tower is not trained.
    raw: how the beam is labelled; see `metrics.AnswerMatcher`.
  """

  def __init__(
    self,
    rows: Sequence[questions.Question],
    table: passages.PassageTable,
    *,
    tokenizer,
    search: Callable | None,
    embeddings: np.ndarray | None,
    reader: span_reader.SpanReader,
    num_read: int,
    passage_length: int = 0,
    title_length: int | None = None,
    raw: bool = False,
  ):
    self.rows, self.table, self.tokenizer, self.search = rows, table, tokenizer, search
    self.embeddings, self.reader, self.num_read, self.passage_length = (
      embeddings,
      reader,
      num_read,
      passage_length,
    )
    self.title_length = title_length
    self.ids = Ragged.of(tokenizer([row.text for row in rows]).to_list(), np.int32)
    questions.tell_cut(np.diff(self.ids.splits), length=reader.query_length)
    self.answer_ids = tokenizer.of_lists([() if row.regex else row.answers for row in rows])
    self.matcher = metrics.AnswerMatcher(table.texts, raw=raw)
    self._ranges: dict[
      tuple[int, int], list[tuple[int, int]]
    ] = {}  # (question, passage) -> where its expressions match

  def over(
    self, search: Callable, embeddings: np.ndarray | None, table: passages.PassageTable
  ) -> "QaExamples":
    """Returns the same questions with another retriever's beams.

    `table` is the corpus, or a later version of it, whose passages keep their numbers.
    """
    other = copy.copy(self)
    other.search, other.embeddings, other.table = search, embeddings, table
    other.matcher = self.matcher.over(table.texts)
    return other

  def batch(self, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """Returns the inputs and labels of `OpenQaModel` for training step `step`."""
    rows = epochs.epoch_rows(len(self.rows), step, batch_size, seed)
    inputs, numbers = self.inputs(rows)
    return {
      **inputs,
      "beam_correct": self.beam_correct(rows, numbers),
      "span_correct": self.span_correct(rows, numbers, inputs),
    }

  def inputs(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the model's inputs for some questions, and the beam's passage numbers [B, K]."""
    query_ids = packing.pack_queries(
      self.ids.gather(rows), tokenizer=self.tokenizer, length=self.reader.query_length
    ).numpy()
    assert self.search, "`over` gives the search"
    found = self.search(query_ids, [self.rows[row].text for row in rows])
    read = found.numbers[:, : self.num_read]
    titles, texts = packing.gather_passages(self.table, read)
    packed = packing.pack_reader(
      self.ids.gather(np.repeat(rows, read.shape[1])),
      texts,
      tokenizer=self.tokenizer,
      query_length=self.reader.query_length,
      length=self.reader.length,
    )

    def shaped(tensor):
      return tensor.numpy().reshape(*read.shape, -1)  # [B * R, L] → [B, R, L]

    made = {
      "query_ids": query_ids,
      "beam_mask": (found.numbers != NULL_PASSAGE).astype(np.float32),
      "reader_ids": shaped(packed.token_ids),
      "reader_segments": shaped(packed.segment_ids),
    }
    if self.embeddings is None:
      made["beam_scores"] = found.scores
    else:
      made["beam_embeddings"] = self.embeddings[found.numbers].astype(np.float32)
    if self.passage_length:
      packed = packing.pack_passages(
        titles,
        texts,
        tokenizer=self.tokenizer,
        length=self.passage_length,
        title_length=self.title_length,
      )
      made |= {
        "passage_ids": shaped(packed.token_ids),
        "passage_segments": shaped(packed.segment_ids),
      }
    return made, found.numbers

  def answers(self, score: Callable) -> list[answering.Prediction]:
    """Answers each question.

    Args:
      score: this class' `inputs` → the outputs of an `OpenQaModel`.
    """
    found, rate = [], progress.Rate("questions", len(self.rows))
    for start in range(0, len(self.rows), _BATCH_SIZE):
      asked = np.arange(start, min(start + _BATCH_SIZE, len(self.rows)))
      inputs, numbers = self.inputs(asked)
      outputs = {name: np.asarray(values) for name, values in score(inputs).items()}
      readable = (self.span_correct(asked, numbers, inputs) * outputs["span_mask"]).any(
        axis=(1, 2, 3)
      )
      for i, beam in enumerate(numbers):
        answer = answering.best_answer(
          outputs["span_scores"][i],
          outputs["span_mask"][i],
          inputs["reader_ids"][i],
          inputs["reader_segments"][i],
          beam,
          outputs["beam_scores"][i],
          self.table,
          continues=self.tokenizer.continues,
        )
        found.append(dataclasses.replace(answer, readable=bool(readable[i])))
      rate.add(len(asked))
    return found

  def beam_correct(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Returns which passages of the beam have an answer: [B, K] float32."""
    return np.array(
      [
        self.matcher.has_answer(found, self.rows[row].answers, regex=self.rows[row].regex)
        for row, found in zip(rows, numbers, strict=True)
      ],
      np.float32,
    )

  def span_correct(
    self, rows: np.ndarray, numbers: np.ndarray, inputs: dict[str, np.ndarray]
  ) -> np.ndarray:
    """Returns which spans of the passages read are an answer: [B, R, L, W] float32.

    Every occurrence of every answer counts.
    """
    return np.stack(
      [
        self._spans(row, read, ids, segments)
        for row, read, ids, segments in zip(
          rows,
          numbers[:, : self.num_read],
          inputs["reader_ids"],
          inputs["reader_segments"],
          strict=True,
        )
      ]
    )

  def _spans(self, row: int, read: np.ndarray, ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
    if not self.rows[row].regex:
      return answer_spans(
        ids, segments, self.answer_ids[row], tokenizer=self.tokenizer, max_span=self.reader.max_span
      )
    ranges = [
      [] if number == NULL_PASSAGE else self._expression_ranges(int(row), int(number))
      for number in read
    ]
    return mark_spans(ranges, segments, max_span=self.reader.max_span)

  def _expression_ranges(self, row: int, number: int) -> list[tuple[int, int]]:
    """Returns the word-piece ranges of a passage that a question's expressions match.

    They are whole words that would count as correct if predicted.
    """
    if (row, number) not in self._ranges:
      text, found = self.table.texts[number], set()
      encoded, starts, ends = (
        text.encode(),
        self.table.token_starts[number],
        self.table.token_ends[number],
      )
      for expression in map(metrics.expression, self.rows[row].answers):
        for start, end in expression.ranges(text):
          words = whole_words(
            self.table,
            number,
            len(text[:start].encode()),
            len(text[:end].encode()),
            tokenizer=self.tokenizer,
          )
          if words and expression.matches(encoded[starts[words[0]] : ends[words[1] - 1]].decode()):
            found.add(words)
      self._ranges[row, number] = sorted(found)
    return self._ranges[row, number]
