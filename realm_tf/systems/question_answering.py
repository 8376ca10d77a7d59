"""Question answering: retrieve, read, and choose the best span (ORQA, section 5).

Example:
  system = QuestionAnswering(open_workdir("runs/quickstart/finetune/realm"))
  system.predict([Question("who wrote hamlet", answers=[])])[0].text
"""

from collections.abc import Sequence

import numpy as np

from realm_tf.corpus.candidates import Found
from realm_tf.examples.answering import Prediction
from realm_tf.examples.open_qa import QaExamples
from realm_tf.examples.questions import Question
from realm_tf.models.open_qa import OpenQaModel
from realm_tf.retrieval import index
from realm_tf.systems.passage_retrieval import SERVED, Bm25Retrieval, DenseRetrieval
from realm_tf.systems.workdir import BM25, Workdir


class QuestionAnswering:
  """A fine-tuned system that answers questions from the passages that it retrieves.

  Args:
    opened: the system's workdir, with an index or with BM25.

  Attributes:
    table: the passages.
    retrieval: finds passages; `DenseRetrieval` or `Bm25Retrieval`.
    reader: the span reader.
    num_read: R, number of passages read.
    embeddings: [N, D] embeddings of the passages; None with BM25.
    model: scores spans.
  """

  def __init__(self, opened: Workdir):
    self.workdir, self.tokenizer = opened, opened.tokenizer
    self.table, self.reader = opened.table, opened.load_model("reader")
    self.num_read = opened.snapshot.num_read
    self.retrieval: Bm25Retrieval | DenseRetrieval
    weight = opened.snapshot.score_weight
    if opened.snapshot.retrieval == BM25:
      self.retrieval = Bm25Retrieval(self.table, score_weight=weight)
      self.embeddings = tower = None
    else:
      indexed = opened.load_index()
      self.retrieval = DenseRetrieval(
        indexed, tokenizer=self.tokenizer, query_length=self.reader.query_length
      )
      self.embeddings = index.read_embeddings(indexed.folder, num_rows=len(self.table))
      tower = indexed.retriever.query_tower
    self.model = OpenQaModel(tower, self.reader, sep_id=self.tokenizer.sep_id)
    if tower is None:
      self.model.score_weight.assign(weight)

  def search(self, query_ids: np.ndarray, texts: Sequence[str]) -> Found:
    """Retrieves as many passages as a server does, for questions [B, Lq] with these texts."""
    return self.retrieval.search(query_ids, texts, min(SERVED, self.table.num_alive))

  def examples(self, rows: Sequence[Question]) -> QaExamples:
    """Returns questions with the passages that this system retrieves for them."""
    return QaExamples(
      rows,
      self.table,
      tokenizer=self.tokenizer,
      search=self.search,
      embeddings=self.embeddings,
      reader=self.reader,
      num_read=self.num_read,
    )

  def predict(self, rows: Sequence[Question]) -> list[Prediction]:
    """Answers questions in batches."""
    return self.examples(rows).answers(self.model.predict_on_batch)
