"""Trained systems in Python, as opened by `realm_tf.load`.

    import realm_tf
    system = realm_tf.load("runs/quickstart/finetune/realm")
    system.answer("who built the bridge over the Gorneth?")     # text, score, passage, offsets
    system.retrieve("rivers of the north", num=5)
    pretrained = realm_tf.load("runs/quickstart/realm")
    pretrained.fill_mask("The Gorneth flows into the sea near the port of [MASK] [MASK].")

Every method takes one text and returns one result, or takes a list of texts and returns a list.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import numpy as np

from realm_tf.corpus.passages import PassageTable
from realm_tf.errors import UserError
from realm_tf.examples import answering
from realm_tf.examples.questions import Question
from realm_tf.retrieval.dense import IndexedRetriever
from realm_tf.systems.closed_book import ClosedBook
from realm_tf.systems.explanations import Report
from realm_tf.systems.mask_filling import MaskFilling
from realm_tf.systems.passage_retrieval import Bm25Retrieval, DenseRetrieval
from realm_tf.systems.question_answering import QuestionAnswering
from realm_tf.systems.question_explanation import explain_question
from realm_tf.systems.results import Answer, Filling, FoundPassage, found_passages
from realm_tf.systems.workdir import (
  CLOSED_BOOK,
  Workdir,
  find_pretrained,
  newest_indexed_snapshot,
  open_workdir,
)

Result = TypeVar("Result")
Texts = list[str] | tuple[str, ...]  # not Sequence[str], because one str is one, too


def load(workdir: str, *, index: str | None = None, passages: str | None = None) -> "System":
  """Opens a trained workdir.

      system = realm_tf.load("runs/quickstart/finetune/realm")
      system.answer("who built the bridge over the Gorneth?")
      system.answer(["who wrote hamlet", "who wrote faust"])         # a list of answers

  Args:
    workdir: workdir of realm_tf.finetune, whose system answers questions; of realm_tf.pretrain,
      whose system fills masks; or of realm_tf.pretrain_ict or realm_tf.import_checkpoint.
    index: an index folder instead of the one that the system was trained with.
    passages: a passages folder instead of the index's own.

  Returns:
    The system. `retrieve` works with every system but the closed-book baseline. Methods that the
    system does not support raise a UserError that says which workdir to load.

  Raises:
    ArtifactError: parts are missing, or do not belong together.
  """
  snapshot = newest_indexed_snapshot(workdir)
  opened = open_workdir(workdir, snapshot=snapshot, index_folder=index, passages_folder=passages)
  if snapshot.retrieval == CLOSED_BOOK:
    return ClosedBookSystem(opened)
  if snapshot.is_fine_tuned:
    return AnsweringSystem(opened)
  return MaskFillingSystem(opened) if snapshot.has_masked_reader else RetrievalSystem(opened)


class System:
  """A trained system; `load` opens one.

  Args:
    workdir: the opened workdir.
  """

  can: str  # what the system does, shown to the user

  def __init__(self, workdir: Workdir):
    self.workdir = workdir

  def __repr__(self) -> str:
    parts = self.workdir
    return (
      f"<{type(self).__name__} {parts.folder!r}: {self.can}; "
      f"step {parts.snapshot.step}, passages {parts.passages!r}>"
    )

  @overload
  def answer(self, question: str) -> Answer: ...

  @overload
  def answer(self, question: Texts) -> list[Answer]: ...

  def answer(self, question: str | Texts) -> Answer | list[Answer]:
    """Answers a question, or each question of a list.

        system.answer("who wrote hamlet").text

    Raises:
      UserError: the workdir is not fine-tuned for questions.
    """
    return _each(question, self._answer)

  @overload
  def retrieve(self, text: str, num: int = 5) -> list[FoundPassage]: ...

  @overload
  def retrieve(self, text: Texts, num: int = 5) -> list[list[FoundPassage]]: ...

  def retrieve(
    self, text: str | Texts, num: int = 5
  ) -> list[FoundPassage] | list[list[FoundPassage]]:
    """Finds the `num` best passages for a text, best first, or for each text of a list.

        [passage.title for passage in system.retrieve("rivers of the north", num=5)]

    Returns:
      The passages for the text, fewer if the corpus has fewer; for a list of texts, a list of
      these.

    Raises:
      UserError: the workdir answers closed-book, or `num` is less than 1.
    """
    if num < 1:
      raise UserError(f"num is {num}; ask for at least 1 passage.")
    return _each(text, self._retrieve, num)

  @overload
  def fill_mask(self, text: str, *, num_candidates: int = 8) -> Filling: ...

  @overload
  def fill_mask(self, text: Texts, *, num_candidates: int = 8) -> list[Filling]: ...

  def fill_mask(self, text: str | Texts, *, num_candidates: int = 8) -> Filling | list[Filling]:
    """Fills the [MASK]s of a text, or of each text of a list; one [MASK] is one word piece.

        system.fill_mask("The Gorneth flows into the sea near the port of [MASK] [MASK].").text

    Args:
      text: text with one [MASK] or several.
      num_candidates: number of passages read, including the null passage.

    Raises:
      UserError: the workdir is not pre-trained to fill masks, or the text does not fit.
    """
    return _each(text, self._fill_mask, num_candidates)

  @overload
  def explain(self, text: str, *, answer: str | None = None, num_candidates: int = 8) -> Report: ...

  @overload
  def explain(
    self, text: Texts, *, answer: str | None = None, num_candidates: int = 8
  ) -> list[Report]: ...

  def explain(
    self, text: str | Texts, *, answer: str | None = None, num_candidates: int = 8
  ) -> Report | list[Report]:
    """Explains a prediction, or each of a list, by the contribution of each passage.

        print(system.explain("The Gorneth flows into the sea near the port of [MASK] [MASK]."))

    Args:
      text: a question if the system answers questions, a text with [MASK]s if it fills masks.
      answer: y, the text in place of [MASK]; None means the most probable filling.
      num_candidates: for a text with [MASK]s, number of passages read, including the null passage.

    Raises:
      UserError: the workdir makes no predictions to explain, or the text or answer does not fit.
    """
    return _each(text, self._explain, answer, num_candidates)

  def _answer(self, questions: Sequence[str]) -> list[Answer]:
    raise UserError(
      f"{self.workdir.folder!r} is pre-trained and does not answer questions. Load the workdir of "
      "realm_tf.finetune that started from it."
    )

  def _retrieve(self, texts: Sequence[str], num: int) -> list[list[FoundPassage]]:
    raise UserError(
      f"{self.workdir.folder!r} answers closed-book and does not retrieve. Load a workdir that was "
      "fine-tuned with finetune.retrieval=dense, or a pre-trained one."
    )

  def _fill_mask(self, texts: Sequence[str], num_candidates: int) -> list[Filling]:
    raise UserError(
      f"{self.workdir.folder!r} does not fill masks. {_load_pretrained(self.workdir)}"
    )

  def _explain(self, texts: Sequence[str], answer: str | None, num_candidates: int) -> list[Report]:
    raise UserError(
      f"{self.workdir.folder!r} makes no predictions to explain. {_load_pretrained(self.workdir)}"
    )


class SearchingSystem(System):
  """A system with passages.

  Args:
    workdir: the opened workdir.
    retrieval: finds passages.
    table: the passages.
  """

  def __init__(
    self, workdir: Workdir, retrieval: DenseRetrieval | Bm25Retrieval, table: PassageTable
  ):
    super().__init__(workdir)
    self.retrieval, self.table = retrieval, table

  def _retrieve(self, texts: Sequence[str], num: int) -> list[list[FoundPassage]]:
    found = self.retrieval.retrieve(texts, min(num, self.table.num_alive))
    return [
      found_passages(self.table, numbers, scores)
      for numbers, scores in zip(found.numbers, found.scores, strict=True)
    ]


class RetrievalSystem(SearchingSystem):
  """A system with a retriever only, which finds passages."""

  can = "retrieves"

  def __init__(self, opened: Workdir):
    indexed = opened.load_index()
    super().__init__(opened, _dense(indexed, opened), indexed.table)


class MaskFillingSystem(SearchingSystem):
  """A pre-trained system, which fills masks and finds passages."""

  can = "fills masks, retrieves"

  def __init__(self, opened: Workdir):
    self.mask_filling = MaskFilling([opened])
    (indexed,) = self.mask_filling.indexes
    super().__init__(opened, _dense(indexed, opened), indexed.table)

  def _fill_mask(self, texts: Sequence[str], num_candidates: int) -> list[Filling]:
    num = min(num_candidates, self.table.num_alive + 1)
    return [self.mask_filling.fill(text, num_candidates=num) for text in texts]

  def _explain(self, texts: Sequence[str], answer: str | None, num_candidates: int) -> list[Report]:
    num = min(num_candidates, self.table.num_alive + 1)
    return [self.mask_filling.explain(text, answer=answer, num_candidates=num) for text in texts]


class AnsweringSystem(SearchingSystem):
  """A fine-tuned system, which answers questions and finds passages."""

  can = "answers, retrieves"

  def __init__(self, opened: Workdir):
    self.question_answering = QuestionAnswering(opened)
    super().__init__(opened, self.question_answering.retrieval, self.question_answering.table)

  def _answer(self, questions: Sequence[str]) -> list[Answer]:
    found = self.question_answering.predict([Question(text, []) for text in questions])
    return [_as_answer(answer, self.table) for answer in found]

  def _explain(self, texts: Sequence[str], answer: str | None, num_candidates: int) -> list[Report]:
    if answer is not None:
      raise UserError(
        "answer is only for a text with [MASK]: a question is answered by the system itself."
      )
    return [explain_question([self.question_answering], text) for text in texts]


class ClosedBookSystem(System):
  """A fine-tuned system that answers questions without passages."""

  can = "answers"

  def __init__(self, opened: Workdir):
    self.closed_book = ClosedBook(opened)
    super().__init__(opened)

  def _answer(self, questions: Sequence[str]) -> list[Answer]:
    found = self.closed_book.predict([Question(text, []) for text in questions])
    return [Answer(answer.text, score=None, passage=None, start=0, end=0) for answer in found]


def _dense(indexed: IndexedRetriever, opened: Workdir) -> DenseRetrieval:
  """Makes the retrieval of a pre-trained retriever."""
  return DenseRetrieval(
    indexed, tokenizer=opened.tokenizer, query_length=indexed.retriever.query_length
  )


def _each(texts: str | Texts, work: Callable[..., list[Result]], *how):
  """Returns the result for one text, or the results for several."""
  if isinstance(texts, str):
    return work([texts], *how)[0]
  return work(list(texts), *how) if len(texts) else []


def _as_answer(answer: answering.Prediction, table: PassageTable) -> Answer:
  """Makes an answer with its passage; byte offsets become character offsets."""
  if not answer.text:
    return Answer("", score=None, passage=None, start=0, end=0)
  (rank,) = np.flatnonzero(answer.numbers == answer.read_from)
  passage = FoundPassage.of(table, answer.read_from, float(answer.scores[rank]))
  data = passage.text.encode()
  start, end = (len(data[:at].decode()) for at in answer.byte_span)
  return Answer(answer.text, score=answer.score, passage=passage, start=start, end=end)


def _load_pretrained(opened: Workdir) -> str:
  """Says which workdir to load for filling masks."""
  if not opened.snapshot.is_fine_tuned:
    return "Load a workdir of realm_tf.pretrain, which trains a masked reader."
  if (found := find_pretrained(opened)) is None:
    return "Load the workdir of realm_tf.pretrain that it was fine-tuned from."
  workdir = found.folder.removesuffix(f"/snapshots/{found.step:08d}")
  return f"Load the workdir that it was fine-tuned from: realm_tf.load({workdir!r})."
