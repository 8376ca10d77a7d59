"""Answers questions with a trained system and scores the answers.

The scores are exact match, F1, recall@k, reader oracle and retrieval utility.

    python -m realm_tf.evaluate --workdir=W --questions=Q.jsonl --output=predictions.jsonl

W is a fine-tuned workdir, or a pre-trained one (with snapshots/ and indexes/), for which only
retrieval is scored, zero-shot. --clozes instead of --questions scores retrieval for masked
sentences, and how much it helps the masked reader. --index and --passages replace the corpus that W
was trained on; --retrieval=bm25 scores the sparse baseline without any model. The scores are
written to predictions.metrics.json, beside the predictions.

As in a server, a search retrieves 100 passages; these are read, and give recall@k up to 100. For
larger k, another search retrieves 5000. `searched_by` in the scores describes the searches.
--exact_recall adds the recall of exact search, and overlap@k: the share of its best k passages that
the index's own searcher finds.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "A trainer's workdir.", required=True)
  flags.DEFINE_string("questions", None, 'Lines of {"question": str, "answer": [str, ..]}.')
  flags.DEFINE_string(
    "clozes", None, 'Lines of {"text": str, "span": [start, end], "answer": [str, ..]}.'
  )
  flags.DEFINE_string("output", None, "Predictions to write; scores are written beside them.")
  flags.DEFINE_string("index", None, "Index to use instead of the workdir's own.")
  flags.DEFINE_string("passages", None, "Passages to use instead of the workdir's own.")
  flags.DEFINE_enum(
    "retrieval", "dense", ("dense", "bm25"), "For zero-shot recall: the retriever, or BM25."
  )
  flags.DEFINE_integer("num_passages", 5, "Passages to write with each prediction.", lower_bound=0)
  flags.DEFINE_integer(
    "num_candidates",
    8,
    "For the retrieval utility: candidates of a cloze, including the null passage.",
    lower_bound=2,
  )
  flags.DEFINE_bool(
    "exact_recall",
    False,
    "Also search exactly, and score its recall and the share that the index's searcher finds.",
  )
  cli.start("realm_tf.evaluate")

import numpy as np

from realm_tf.corpus import metrics, passages
from realm_tf.corpus.candidates import Found
from realm_tf.examples import packing, questions
from realm_tf.examples.answering import Prediction
from realm_tf.examples.questions import Question
from realm_tf.models import snapshots
from realm_tf.models.realm import RealmModel
from realm_tf.retrieval import dense, index
from realm_tf.storage import artifacts, json_lines, ownership
from realm_tf.systems import passage_retrieval
from realm_tf.systems.closed_book import ClosedBook
from realm_tf.systems.passage_retrieval import Bm25Retrieval
from realm_tf.systems.question_answering import QuestionAnswering
from realm_tf.systems.results import FoundPassage, found_passages
from realm_tf.systems.retrieval_utility import retrieval_utility
from realm_tf.systems.workdir import CLOSED_BOOK, newest_snapshot, open_workdir

RECALL_AT = (1, 5, 10, 20, 50, 100, 500, 1000, 5000)


# ========================================================================================== scoring


def score_answers(rows: Sequence[Question], answers: Sequence[Prediction]) -> dict[str, float]:
  """Scores answers: exact_match and f1 (0 to 1), and reader_oracle if passages were found."""
  right, overlap = (
    [
      rule(answer.text, row.answers, regex=row.regex)
      for row, answer in zip(rows, answers, strict=True)
    ]
    for rule in (metrics.exact_match, metrics.f1)
  )
  scores = {
    "questions": len(rows),
    "exact_match": float(np.mean(right)),
    "f1": float(np.mean(overlap)),
  }
  if any(len(answer.numbers) for answer in answers):
    scores["reader_oracle"] = float(np.mean([answer.readable for answer in answers]))
  return scores


def matchers(table: passages.PassageTable) -> dict[str, metrics.AnswerMatcher]:
  """Returns matchers for both definitions of having an answer, by prefix.

  Without a prefix, normalised words are compared; with raw_, text as in the released code.
  """
  return {
    prefix: metrics.AnswerMatcher(table.texts, raw=raw)
    for prefix, raw in (("", False), ("raw_", True))
  }


def recall(
  rows: Sequence[Question],
  numbers: Sequence[np.ndarray],
  by: Mapping[str, metrics.AnswerMatcher],
  *,
  ks: Sequence[int] = RECALL_AT,
) -> dict[str, float]:
  """Scores recall@k by each definition of having an answer.

  Args:
    rows: questions.
    numbers: per question, [K] passage numbers, best first; if K is less than k, recall@k is
      recall@K.
    by: matchers from `matchers`, which cache the passages that they have seen.
    ks: the values of k.
  """
  scores: dict[str, float] = {}
  for prefix, matcher in by.items():
    found = [
      matcher.has_answer(beam, row.answers, regex=row.regex, first_only=True)
      for row, beam in zip(rows, numbers, strict=True)
    ]
    scores |= {f"{prefix}{name}": value for name, value in metrics.recall_at(found, ks).items()}
  return scores


# slice of the queries, number of passages → passages found
Search = Callable[[slice, int], Found]


def recall_as_searched(
  rows: Sequence[Question],
  search: Search,
  table: passages.PassageTable,
  *,
  describe: Callable[[int], str],
  exact: Search | None = None,
) -> dict:
  """Scores recall@k of a search for 100 passages, as in a server, and for larger k of one for 5000.

  Args:
    rows: questions.
    search: the search to score.
    table: the passages that are searched.
    describe: number of passages → description of a search for them.
    exact: a second search to compare with.

  Returns:
    `recall`'s scores; `searched_by`, which describes the searches; with `exact` also its
    exact_recall_at_k, and overlap_at_k, the share of its best k passages that are among the best k
    of `search`.
  """
  scores: dict[str, float] = {}
  exact_scores: dict[str, float] = {}
  searched_by, by = {}, matchers(table)
  served = passage_retrieval.SERVED
  if exact:
    best = dense.search_all(
      lambda part: exact(part, min(RECALL_AT[-1], table.num_alive)), len(rows)
    )
  for low, depth in ((0, served), (served, RECALL_AT[-1])):
    ks, asked = [k for k in RECALL_AT if low < k <= depth], min(depth, table.num_alive)

    def asked_for(part: slice, asked: int = asked) -> Found:
      return search(part, asked)

    numbers = dense.search_all(asked_for, len(rows))
    scores |= recall(rows, numbers, by, ks=ks)
    searched_by[f"recall_at_{ks[0]} to {ks[-1]}"] = f"{describe(asked)}, asked for {asked}"
    if exact:
      exact_scores |= {
        f"exact_{name}": value for name, value in recall(rows, best, by, ks=ks).items()
      }
      beams = list(zip(best, numbers, strict=True))
      exact_scores |= {
        f"overlap_at_{k}": float(
          np.mean([np.isin(wanted[:k], got[:k]).mean() for wanted, got in beams])
        )
        for k in ks
      }
  return {**scores, **exact_scores, "searched_by": searched_by}


def searched_in(
  indexed: dense.IndexedRetriever, query_ids: np.ndarray, *, exact_recall: bool
) -> dict:
  """Returns `recall_as_searched`'s arguments for an index.

  Warns if the index's measured recall is less than wanted.
  """
  said = index.measured_recall(artifacts.read_info(indexed.folder, kind=index.KIND))
  if said.startswith("WARNING"):
    print(f"{indexed.folder}: {said}", file=sys.stderr, flush=True)

  def search_in(one: dense.IndexedRetriever) -> Search:
    return lambda part, num: one.search(query_ids[part], num)

  exact = None
  if exact_recall:
    searcher = index.load(indexed.folder, searcher="exact")
    exact = search_in(dataclasses.replace(indexed, searcher=searcher))
  return {"search": search_in(indexed), "describe": indexed.searcher.describe, "exact": exact}


def searched_by_bm25(retrieval: Bm25Retrieval, texts: Sequence[str]) -> dict:
  """Returns `recall_as_searched`'s arguments for BM25."""
  return {
    "search": lambda part, num: retrieval.retrieve(texts[part], num),
    "describe": lambda num: "bm25",
  }


def evaluate_fine_tuned(
  system: QuestionAnswering | ClosedBook,
  rows: Sequence[Question],
  answers: Sequence[Prediction],
  *,
  exact_recall: bool,
) -> dict:
  """Scores a fine-tuned system's answers, and its retriever if it has one."""
  scores = score_answers(rows, answers)
  if isinstance(system, ClosedBook):
    return scores
  if isinstance(system.retrieval, Bm25Retrieval):
    how = searched_by_bm25(system.retrieval, [row.text for row in rows])
  else:
    query_ids = questions.packed_questions(
      rows, tokenizer=system.tokenizer, length=system.reader.query_length
    )
    how = searched_in(system.retrieval.indexed, query_ids, exact_recall=exact_recall)
  return scores | recall_as_searched(rows, table=system.table, **how)


def evaluate_zero_shot(
  workdir: str,
  rows: Sequence[Question],
  *,
  clozes: bool,
  bm25_baseline: bool,
  index_folder: str | None,
  passages_folder: str | None,
  num_candidates: int,
  exact_recall: bool = False,
) -> dict:
  """Scores recall@k of a pre-trained workdir's retriever, or of BM25 over the same passages.

  For clozes, also scores the retrieval utility.
  """
  opened = open_workdir(
    workdir,
    index_folder=index_folder,
    passages_folder=passages_folder,
    need_index=not bm25_baseline,
  )
  table, tokenizer = opened.table, opened.tokenizer
  if clozes:
    texts = [
      row.text.encode()[: row.span[0]].decode() + row.text.encode()[row.span[1] :].decode()
      for row in rows
      if row.span
    ]
  else:
    texts = [row.text for row in rows]
  if bm25_baseline:
    how = searched_by_bm25(Bm25Retrieval(table), texts)
  else:
    length = snapshots.model_config(opened.snapshot.folder, "retriever")["config"]["query_length"]
    if clozes:
      masked = questions.masked_clozes(rows, tokenizer=tokenizer, max_masks=length)
      query_ids = packing.pack_queries(
        masked.ids.tensor(), tokenizer=tokenizer, length=length
      ).numpy()
    else:
      query_ids = questions.packed_questions(rows, tokenizer=tokenizer, length=length)
    questions.tell_cut(tokenizer.lengths(texts), length=length)
    indexed = opened.load_index()
    how = searched_in(indexed, query_ids, exact_recall=exact_recall)
  scores = {"questions": len(rows), **recall_as_searched(rows, table=table, **how)}
  if clozes and not bm25_baseline and opened.snapshot.has_masked_reader:
    model = RealmModel(indexed.retriever, opened.load_model("reader"))
    scores |= retrieval_utility(
      rows, model, indexed, tokenizer=tokenizer, num_candidates=num_candidates
    )
  return scores


def prediction_line(
  row: Question, answer: Prediction, table: passages.PassageTable | None, *, num_passages: int
) -> dict:
  """Makes a line of the predictions file; `table` is None if nothing was retrieved."""
  found: list[FoundPassage] = []
  if table:
    found = found_passages(table, answer.numbers[:num_passages], answer.scores[:num_passages])
  return {
    "question": row.text,
    "prediction": answer.text,
    "answer": list(row.answers),
    "score": answer.score if np.isfinite(answer.score) else None,
    "read_from": answer.read_from,
    "byte_span": list(answer.byte_span),
    "passages": [dataclasses.asdict(passage) for passage in found],
  }


def evaluate(
  workdir: str,
  *,
  questions_path: str | None,
  clozes_path: str | None,
  output: str | None,
  bm25_baseline: bool,
  index_folder: str | None,
  passages_folder: str | None,
  num_passages: int,
  num_candidates: int = 8,
  exact_recall: bool = False,
) -> dict:
  """Scores a workdir; writes predictions, and scores beside them.

  Raises:
    UserError: neither or both of questions and clozes are given, or they have no usable line.
    ArtifactError: parts are missing, or do not belong together.
  """
  read: Callable[[str], list[Question]]
  if questions_path is not None and clozes_path is None:
    read, asked = questions.read_questions, questions_path
  elif clozes_path is not None and questions_path is None:
    read, asked = questions.read_clozes, clozes_path
  else:
    raise artifacts.UserError("give either --questions or --clozes.")
  if output:
    reads = [asked, index_folder, passages_folder]
    ownership.check_file(output, reads=[path for path in reads if path])
  rows = read(asked)
  if newest_snapshot(workdir).is_fine_tuned and not clozes_path and not bm25_baseline:
    opened = open_workdir(workdir, index_folder=index_folder, passages_folder=passages_folder)
    closed_book = opened.snapshot.retrieval == CLOSED_BOOK
    system = ClosedBook(opened) if closed_book else QuestionAnswering(opened)
    answers = system.predict(rows)
    scores = evaluate_fine_tuned(system, rows, answers, exact_recall=exact_recall)
    if output:
      lines = [
        prediction_line(row, answer, system.table, num_passages=num_passages)
        for row, answer in zip(rows, answers, strict=True)
      ]
      artifacts.write_text(output, "".join(map(json_lines.dumps, lines)))
  else:
    scores = evaluate_zero_shot(
      workdir,
      rows,
      clozes=bool(clozes_path),
      bm25_baseline=bm25_baseline,
      index_folder=index_folder,
      passages_folder=passages_folder,
      num_candidates=num_candidates,
      exact_recall=exact_recall,
    )
  if output:
    artifacts.write_text(
      os.path.splitext(output)[0] + ".metrics.json", json.dumps(scores, indent=2) + "\n"
    )
  return scores


def main(argv):
  del argv
  args = flags.FLAGS
  scores = evaluate(
    args.workdir,
    questions_path=args.questions,
    clozes_path=args.clozes,
    output=args.output,
    bm25_baseline=args.retrieval == "bm25",
    index_folder=args.index,
    passages_folder=args.passages,
    num_passages=args.num_passages,
    num_candidates=args.num_candidates,
    exact_recall=args.exact_recall,
  )
  print(json.dumps(scores, indent=2))
