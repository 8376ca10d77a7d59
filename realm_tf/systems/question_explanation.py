"""Explains the answer to one question by the passages that were read and their contributions.

Example:
  report = explain_question([QuestionAnswering(opened)], "who wrote hamlet")
  report.explanations[0].candidates
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from keras import ops

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.examples import answering, packing
from realm_tf.examples.answer_spans import answer_spans
from realm_tf.examples.questions import Question
from realm_tf.models import equations
from realm_tf.storage import artifacts
from realm_tf.systems.evidence import bytes_read, occurrences
from realm_tf.systems.explanations import Candidate, Explanation, PossibleAnswer, Report, best_first
from realm_tf.systems.question_answering import QuestionAnswering


def explain_question(systems: Sequence[QuestionAnswering], question: str) -> Report:
  """Explains a fine-tuned system's answer to one question by the passages that its reader read.

  Args:
    systems: the same fine-tuned system with one corpus or several.
    question: the question as text.

  Raises:
    UserError: the question is empty or too long, or there is nothing to read.
  """
  spans = [Spans.of(question, system) for system in systems]
  texts = {best.text for read in spans for best in read.best if best.text}
  answers = [
    PossibleAnswer(text, None, [float(read.probabilities(text).sum()) for read in spans])
    for text in sorted(texts)
  ]
  snapshot = systems[0].workdir.snapshot
  return Report(
    kind="question",
    x=question,
    snapshot=snapshot.folder,
    step=snapshot.step,
    explanations=[read.explain() for read in spans],
    answers=best_first(answers),
  )


@dataclasses.dataclass(frozen=True)
class Spans:
  """A fine-tuned system's outputs for one question and the R passages that it reads.

  Attributes:
    system: the fine-tuned system.
    numbers, scores: [K] passages of the retriever's beam and their scores.
    reader_ids, segments: [R, L] inputs of the reader.
    log_probs: [R, L, W] float64 log p(span|x) among the spans of all passages read, as in the
      reader's loss.
    best: each passage's best span.
    answer: the best span of all passages.
  """

  system: QuestionAnswering
  numbers: np.ndarray
  scores: np.ndarray
  reader_ids: np.ndarray
  segments: np.ndarray
  log_probs: np.ndarray
  best: Sequence[answering.Prediction]
  answer: answering.Prediction

  @classmethod
  def of(cls, question: str, system: QuestionAnswering) -> "Spans":
    """Retrieves and reads passages.

    Raises:
      UserError: the question is empty or too long, or there is nothing to read.
    """
    size = len(system.tokenizer([question]).to_list()[0])
    room = packing.query_room(system.reader.query_length)
    if not 0 < size <= room:
      raise artifacts.UserError(
        f"the question has {size} word pieces, but the system takes 1 to {room}. Rephrase it."
      )
    inputs, numbers = system.examples([Question(question, [])]).inputs(np.arange(1))
    outputs = system.model.predict_on_batch(inputs)
    ids, segments, scores = (
      inputs["reader_ids"][0],
      inputs["reader_segments"][0],
      outputs["beam_scores"][0],
    )
    spans, mask = outputs["span_scores"][0], outputs["span_mask"][0]

    def best(rows):
      return answering.best_answer(
        spans[rows],
        mask[rows],
        ids[rows],
        segments[rows],
        numbers[0][rows],
        scores,
        system.table,
        continues=system.tokenizer.continues,
      )

    answer = best(slice(None))
    if not answer.text:
      raise artifacts.UserError(
        "the retrieved passages have no text to read an answer from. Give another index."
      )
    # As in the reader's loss: every span of every passage competes with all others.
    competing = np.where(mask > 0, spans, -np.inf).astype(np.float64)
    log_probs = ops.convert_to_numpy(ops.log_softmax(competing, axis=None))
    return cls(
      system=system,
      numbers=numbers[0],
      scores=scores,
      reader_ids=ids,
      segments=segments,
      log_probs=log_probs,
      best=[best(slice(row, row + 1)) for row in range(len(ids))],
      answer=answer,
    )

  def probabilities(self, text: str) -> np.ndarray:
    """[R] p(y,z|x), the probability of each passage's spans that read y."""
    tokenizer = self.system.tokenizer
    reads = answer_spans(
      self.reader_ids,
      self.segments,
      tokenizer([text]).to_list(),
      tokenizer=tokenizer,
      max_span=self.log_probs.shape[-1],
    )
    return (np.exp(self.log_probs) * reads).sum(axis=(1, 2))

  def explain(self) -> Explanation:
    """Explains the answer by the passages read and their contributions."""
    table, tokenizer = self.system.table, self.system.tokenizer
    prior = np.exp(equations.log_prior(self.scores.astype(np.float64)))
    joint = self.probabilities(self.answer.text)
    wanted, candidates = tokenizer([self.answer.text]).to_list(), []
    for at, best in enumerate(self.best):
      number, score = int(self.numbers[at]), float(self.scores[at])
      if number == NULL_PASSAGE:
        continue
      candidates.append(
        Candidate(
          number=number,
          title=table.titles[number],
          text=table.texts[number],
          score=score,
          prior=float(prior[at]),
          likelihood=None,
          utility=None,
          joint=float(joint[at]),
          reader_score=best.score - score if best.text else None,
          best_span=best.byte_span if best.text else None,
          evidence=occurrences(table, number, wanted, continues=tokenizer.continues),
          bytes_read=bytes_read(table, number, self.segments[at]),
        )
      )
    return Explanation(
      index=self.system.retrieval.name,
      passages=table.folder,
      num_passages=table.num_alive,
      answer=self.answer.text,
      probability=float(joint.sum()),
      without_retrieval=None,
      utility=None,
      own_passage=None,
      candidates=candidates,
    )
