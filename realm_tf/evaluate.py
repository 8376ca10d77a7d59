"""Answers questions with a trained system and scores it: exact match, F1, recall@k, reader oracle, retrieval utility.

    python -m realm_tf.evaluate --workdir=W --questions=Q.jsonl --output=predictions.jsonl

W is a fine-tuned workdir, or a pre-trained one (with snapshots/ and indexes/): then retrieval alone is scored, zero-shot.
--clozes instead of --questions scores retrieval for masked sentences, and what it does for the masked reader. --index and
--passages put another corpus in place of the one that W was trained on; --retrieval=bm25 scores the sparse baseline without any
model. The scores go to predictions.metrics.json, beside the predictions.

Passages are searched for as a server does it, 100 at a time: these are read, and recall@k up to 100 is theirs.
For larger k another search asks for 5000. `searched_by` among the scores says how. --exact_recall adds the recall of
exact search, and overlap@k: the share of its best k passages that the index's own searcher finds.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import flags

from realm_tf import (
    artifacts, bm25, closed_book, examples, index, json_lines, metrics, ownership, passages,
    questions, retrieval, settings, snapshots)
from realm_tf.answering import Answer
from realm_tf.models.open_qa import OpenQaModel
from realm_tf.models.realm import RealmModel
from realm_tf.qa_examples import QaExamples
from realm_tf.questions import Question

RECALL_AT = (1, 5, 10, 20, 50, 100, 500, 1000, 5000)
SERVED = 100  # passages that a servable retrieves
_BATCH_SIZE = 32
_TRAIN_FIRST = "give the workdir of a trainer that has finished."


# ========================================================================================================== answering


class Answerer:
  """A fine-tuned system that answers questions.

  Args:
    workdir: of realm_tf.finetune.
    index_folder, passages_folder: instead of those that it was trained with.

  Attributes:
    kind: "dense", "bm25" or "none".
    search: packed question ids [B, Lq] and question texts → `retrieval.Found`.
    indexed: if it is dense, retriever and index.
    searcher: if it is BM25, that.

  Raises:
    ArtifactError: missing parts, or parts that do not belong together.
  """

  def __init__(self, workdir: str, *, index_folder: str | None = None, passages_folder: str | None = None):
    snapshot = snapshots.newest(workdir, advice=_TRAIN_FIRST)
    info = artifacts.read_info(snapshot)
    self.tokenizer, self.kind = snapshots.load_tokenizer(snapshot), info["retrieval"]
    self.reader = snapshots.load_model(snapshot, "reader")
    self.passages_folder = passages_folder or artifacts.find_input(snapshot, "passages")
    self.table = passages.load(self.passages_folder)
    examples.check_vocabulary(artifacts.read_info(self.passages_folder), self.passages_folder, self.tokenizer)
    if self.kind == "none":
      return
    depth, tower = min(SERVED, len(self.table)), None
    if self.kind == "bm25":
      self.searcher, embeddings = bm25.Bm25Searcher(self.table), None
      self.search = lambda ids, texts: self.searcher.search(texts, depth)
    else:
      folder = index_folder or index.of_snapshot(workdir, snapshot)
      check_index_snapshot(folder, (info["index_snapshot"], info["fingerprint"]))  # where both are, they share a passage tower
      self.indexed = retrieval.IndexedRetriever(
          snapshots.load_retriever(snapshot), index.load(folder, passages=self.passages_folder), artifacts.step_of(snapshot), folder)
      tower, embeddings = (
        self.indexed.retriever.query_tower,
        index.read_embeddings(folder, num_rows=len(self.table)),
      )
      self.search = lambda ids, texts: self.indexed.search(ids, depth)
    self.embeddings, self.num_read = embeddings, info["num_read"]
    self.model = OpenQaModel(tower, self.reader, sep_id=self.tokenizer.sep_id)
    if tower is None:
      self.model.score_weight.assign(info["score_weight"])

  def __call__(self, rows: Sequence[Question]) -> list[Answer]:
    """Answers questions, in batches."""
    if self.kind == "none":
      return [Answer(text, 0.0, examples.NULL_PASSAGE, (0, 0), np.zeros([0], np.int32), np.zeros([0]))
              for text in closed_book.answer([row.text for row in rows], self.reader, self.tokenizer)]
    return self.examples(rows).answers(self.model.predict_on_batch)

  def examples(self, rows: Sequence[Question]) -> QaExamples:
    """Questions with what this system retrieves for them; not closed-book."""
    return QaExamples(rows, self.table, tokenizer=self.tokenizer, search=self.search, embeddings=self.embeddings,
                      reader=self.reader, num_read=self.num_read)


def check_index_snapshot(folder: str, wanted: Sequence[str | None]) -> None:
  """Raises ArtifactError where an index was made from none of the wanted snapshots (fingerprints; None stands for none)."""
  wanted = [fingerprint for fingerprint in wanted if fingerprint]
  got = artifacts.read_info(folder, kind=index.KIND)["inputs"]["snapshot"]["fingerprint"]
  if got not in wanted:
    raise artifacts.ArtifactError(
        f"index {folder!r} was made from snapshot {got}, the fine-tuned retriever wants {wanted[0]}. Make the index again from that "
        "snapshot, or fine-tune again.")


# ============================================================================================================ scoring


def score_answers(rows: Sequence[Question], answers: Sequence[Answer]) -> dict[str, float]:
  """exact_match and f1 (0 to 1), and where passages were found, reader_oracle."""
  right, overlap = ([rule(answer.text, row.answers, regex=row.regex) for row, answer in zip(rows, answers)]
                    for rule in (metrics.exact_match, metrics.f1))
  scores = {"questions": len(rows), "exact_match": float(np.mean(right)), "f1": float(np.mean(overlap))}
  if any(len(answer.numbers) for answer in answers):
    scores["reader_oracle"] = float(np.mean([answer.readable for answer in answers]))
  return scores


def matchers(table: passages.PassageTable) -> dict[str, metrics.AnswerMatcher]:
  """Both definitions of having an answer, by prefix: normalised words, and raw_ as the released code."""
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
  """recall@k by each definition of having an answer.

  Args:
    numbers: per question, [K] passage numbers, best first; where K is less than k, recall@k is recall@K.
    by: of `matchers`; they remember the passages that they have looked at.
  """
  scores = {}
  for prefix, matcher in by.items():
    found = [matcher.has_answer(beam, row.answers, regex=row.regex, first_only=True) for row, beam in zip(rows, numbers)]
    scores |= {f"{prefix}{name}": value for name, value in metrics.recall_at(found, ks).items()}
  return scores


Search = Callable[
  [slice, int], retrieval.Found
]  # a slice of the queries, and how many passages → what is found


def recall_as_searched(
  rows: Sequence[Question],
  search: Search,
  table: passages.PassageTable,
  *,
  describe: Callable[[int], str],
  exact: Search | None = None,
) -> dict:
  """recall@k as a server finds it: of a search for 100 passages, and for larger k of one for 5000.

  Args:
    describe: a search for so many passages, in words.
    exact: a second search to compare with.

  Returns:
    `recall`'s scores; `searched_by`, which says what found them; with `exact` also its exact_recall_at_k, and
    overlap_at_k, the share of its best k passages that are among the best k of `search`.
  """
  scores, exact_scores, searched_by, by = {}, {}, {}, matchers(table)
  if exact:
    best = retrieval.search_all(lambda part: exact(part, min(RECALL_AT[-1], len(table))), len(rows))
  for low, depth in ((0, SERVED), (SERVED, RECALL_AT[-1])):
    ks, asked = [k for k in RECALL_AT if low < k <= depth], min(depth, len(table))
    numbers = retrieval.search_all(lambda part: search(part, asked), len(rows))
    scores |= recall(rows, numbers, by, ks=ks)
    searched_by[f"recall_at_{ks[0]} to {ks[-1]}"] = f"{describe(asked)}, asked for {asked}"
    if exact:
      exact_scores |= {
        f"exact_{name}": value for name, value in recall(rows, best, by, ks=ks).items()
      }
      exact_scores |= {
        f"overlap_at_{k}": float(
          np.mean([np.isin(wanted[:k], got[:k]).mean() for wanted, got in zip(best, numbers)])
        )
        for k in ks
      }
  return {**scores, **exact_scores, "searched_by": searched_by}


def searched_in(
  indexed: retrieval.IndexedRetriever, query_ids: np.ndarray, *, exact_recall: bool
) -> dict:
  """`recall_as_searched`'s arguments for an index; warns if its measured recall is less than was wanted."""
  said = index.measured_recall(artifacts.read_info(indexed.folder, kind=index.KIND))
  if said.startswith("WARNING"):
    print(f"{indexed.folder}: {said}", file=sys.stderr, flush=True)
  exactly = exact_recall and dataclasses.replace(
    indexed, searcher=index.load(indexed.folder, searcher="exact")
  )
  return {
    "search": lambda part, num: indexed.search(query_ids[part], num),
    "describe": indexed.searcher.describe,
    "exact": (lambda part, num: exactly.search(query_ids[part], num)) if exact_recall else None,
  }


def searched_by_bm25(searcher: bm25.Bm25Searcher, texts: Sequence[str]) -> dict:
  """`recall_as_searched`'s arguments for BM25."""
  return {
    "search": lambda part, num: searcher.search(texts[part], num),
    "describe": lambda num: "bm25",
  }


def evaluate_fine_tuned(
  answerer: Answerer, rows: Sequence[Question], answers: Sequence[Answer], *, exact_recall: bool
) -> dict:
  """The scores of a fine-tuned system's answers, and of its retriever, if it has one."""
  scores = score_answers(rows, answers)
  if answerer.kind == "none":
    return scores
  if answerer.kind == "bm25":
    how = searched_by_bm25(answerer.searcher, [row.text for row in rows])
  else:
    query_ids = questions.packed_questions(
      rows, tokenizer=answerer.tokenizer, length=answerer.reader.query_length
    )
    how = searched_in(answerer.indexed, query_ids, exact_recall=exact_recall)
  return scores | recall_as_searched(rows, table=answerer.table, **how)


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
  """recall@k of a pre-trained workdir's retriever, or of BM25 over the same passages; for clozes also the retrieval utility."""
  snapshot = snapshots.newest(workdir, advice=_TRAIN_FIRST)
  folder = index_folder or index.folder_of(workdir, snapshot)
  passages_folder = passages_folder or index.passages_of(folder)
  table, tokenizer = passages.load(passages_folder), settings.tokenizer(passages_folder)
  length = snapshots.model_config(snapshot, "retriever")["config"]["query_length"]
  if clozes:
    masked = questions.masked_clozes(rows, tokenizer=tokenizer, max_masks=length)
    query_ids = examples.pack_queries(masked.ids.tensor(), tokenizer=tokenizer, length=length).numpy()
    texts = [row.text.encode()[:row.span[0]].decode() + row.text.encode()[row.span[1]:].decode() for row in rows]
  else:
    query_ids, texts = questions.packed_questions(rows, tokenizer=tokenizer, length=length), [row.text for row in rows]
  if bm25_baseline:
    how = searched_by_bm25(bm25.Bm25Searcher(table), texts)
  else:
    questions.tell_cut(tokenizer.lengths(texts), length=length)
    indexed = retrieval.load(folder, passages=passages_folder, snapshot=snapshot)
    how = searched_in(indexed, query_ids, exact_recall=exact_recall)
  scores = {"questions": len(rows), **recall_as_searched(rows, table=table, **how)}
  if clozes and not bm25_baseline and "reader" in artifacts.read_info(snapshot)["config"]:
    model = RealmModel(indexed.retriever, snapshots.load_model(snapshot, "reader"))
    scores |= retrieval_utility(rows, model, indexed, table, tokenizer=tokenizer, num_candidates=num_candidates)
  return scores


def retrieval_utility(rows: Sequence[Question], model: RealmModel, indexed: retrieval.IndexedRetriever,
                      table: passages.PassageTable, *, tokenizer, num_candidates: int) -> dict[str, float]:
  """What retrieval does for the masked reader (REALM, section 4.5).

  Args:
    rows: clozes; those whose blank the reader cannot take, being too long or too far right, are left out.
    model: retriever and masked reader of the snapshot that `indexed` was made from.
    num_candidates: C, the null passage included; fewer where the corpus has fewer.

  Returns:
    utility_clozes: how many clozes; and their means of log p(y|x) − log p(y|∅,x) as retrieval_utility (the released code's), and
    of log p(y|z,x) − log p(y|∅,x) for the best passage z as top_retrieval_utility. Without any, just the 0.
  """
  reader, retriever = model.reader, model.retriever
  num = min(num_candidates, len(table) + 1)
  marginal, top = [], []
  for start in range(0, len(rows), _BATCH_SIZE):
    masked = questions.masked_clozes(rows[start:start + _BATCH_SIZE], tokenizer=tokenizer, max_masks=reader.query_length)
    fits = (masked.target_mask.sum(axis=1) <= reader.max_masks) & (masked.mask_positions.max(axis=1) <= reader.query_length - 2)
    if not fits.any():
      continue
    kept = [row for row, fit in zip(rows[start:start + _BATCH_SIZE], fits) if fit]
    masked = questions.masked_clozes(kept, tokenizer=tokenizer, max_masks=reader.max_masks)
    query_ids = examples.pack_queries(masked.ids.tensor(), tokenizer=tokenizer, length=retriever.query_length).numpy()
    numbers = retrieval.candidates(indexed, query_ids, num=num, own_passages=None, null=True)
    outputs = model.predict_on_batch(examples.realm_batch(
        masked, query_ids, numbers, table, tokenizer=tokenizer, query_length=reader.query_length,
        passage_length=retriever.passage_length, reader_length=reader.length, title_length=retriever.title_length))
    likelihoods = (outputs["token_log_probs"] * masked.target_mask[:, None]).sum(axis=-1, dtype=np.float64)  # [B, C] log p(y|z,x)
    scores = outputs["scores"].astype(np.float64)
    scores -= np.logaddexp.reduce(scores, axis=1, keepdims=True)  # log p(z|x)
    marginal.append(np.logaddexp.reduce(likelihoods + scores, axis=1) - likelihoods[:, 0])
    top.append(likelihoods[:, 1] - likelihoods[:, 0])
  if not marginal:
    return {"utility_clozes": 0}
  marginal, top = np.concatenate(marginal), np.concatenate(top)
  return {"utility_clozes": len(marginal), "retrieval_utility": float(marginal.mean()),
          "top_retrieval_utility": float(top.mean())}


def prediction_line(row: Question, answer: Answer, table: passages.PassageTable, *, num_passages: int) -> dict:
  """One line of the predictions file."""
  return {
      "question": row.text, "prediction": answer.text, "answer": list(row.answers),
      "score": answer.score if np.isfinite(answer.score) else None, "read_from": answer.read_from, "byte_span": list(answer.byte_span),
      "passages": [{"number": int(number), "title": table.titles[number], "text": table.texts[number], "score": float(score)}
                   for number, score in zip(answer.numbers[:num_passages], answer.scores[:num_passages])
                   if number != index.MISSING],
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
  """Scores a workdir; writes predictions and scores beside them.

  Raises:
    UserError: neither or both of questions and clozes given, or no usable line in them.
    ArtifactError: missing parts, or parts that do not belong together.
  """
  if (questions_path is None) == (clozes_path is None):
    raise artifacts.UserError("give either --questions or --clozes.")
  if output:
    reads = [questions_path, clozes_path, index_folder, passages_folder]
    ownership.check_file(output, reads=[path for path in reads if path])
  rows = questions.read_clozes(clozes_path) if clozes_path else questions.read_questions(questions_path)
  snapshot = snapshots.newest(workdir, advice=_TRAIN_FIRST)
  fine_tuned = "retrieval" in artifacts.read_info(snapshot)
  if fine_tuned and not clozes_path:
    answerer = Answerer(workdir, index_folder=index_folder, passages_folder=passages_folder)
    answers = answerer(rows)
    scores = evaluate_fine_tuned(answerer, rows, answers, exact_recall=exact_recall)
    if output:
      lines = [prediction_line(row, answer, answerer.table, num_passages=num_passages) for row, answer in zip(rows, answers)]
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
    artifacts.write_text(os.path.splitext(output)[0] + ".metrics.json", json.dumps(scores, indent=2) + "\n")
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


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "A trainer's workdir.", required=True)
  flags.DEFINE_string("questions", None, 'Lines of {"question": str, "answer": [str, ..]}.')
  flags.DEFINE_string("clozes", None, 'Lines of {"text": str, "span": [start, end], "answer": [str, ..]}.')
  flags.DEFINE_string("output", None, "Predictions to write; scores go beside them.")
  flags.DEFINE_string("index", None, "Index instead of the workdir's own.")
  flags.DEFINE_string("passages", None, "Passages instead of the workdir's own.")
  flags.DEFINE_enum("retrieval", "dense", ("dense", "bm25"), "For zero-shot recall: the retriever, or BM25.")
  flags.DEFINE_integer("num_passages", 5, "Passages to write with each prediction.", lower_bound=0)
  flags.DEFINE_integer("num_candidates", 8, "For the retrieval utility: candidates of a cloze, the null passage among them.",
                       lower_bound=2)
  flags.DEFINE_bool(
    "exact_recall",
    False,
    "Search exactly, too: its recall, and how much of it the index's own searcher finds.",
  )
  settings.start(main)
