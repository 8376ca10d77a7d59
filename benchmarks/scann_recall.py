"""Compares approximate search, as trainers and servers use it, with exact search.

Compares recall, answers and time.

    python -m benchmarks.scann_recall --index=I --snapshot=S --passages=P --questions=Q.jsonl

I is an index of P by S's passage tower, made for any searcher. ScaNN, or --searcher=partitioned, is
built from its embeddings as in `beam_jobs.embed_passages`, with the same --recall, --num_leaves,
--leaves_to_search, --reorder and --row_type. A trainer requests 8 passages, a server 100. Each cell
shows the share of the exact best k passages that are among the k found, and the share of questions
with an answer in these.
"""

import dataclasses
import time
from collections.abc import Sequence

from absl import flags

from realm_tf import cli
from realm_tf.retrieval.index_config import ROW_TYPES, SEARCHERS, IndexConfig

if __name__ == "__main__":
  flags.DEFINE_string("index", None, "The index folder.", required=True)
  flags.DEFINE_string("snapshot", None, "The snapshot that it was made from.", required=True)
  flags.DEFINE_string("passages", None, "The passages that it was made from.", required=True)
  flags.DEFINE_string(
    "questions",
    None,
    'File of questions: lines of {"question": str, "answer": [str, ..]}.',
    required=True,
  )
  flags.DEFINE_enum(
    "searcher", "scann", [kind for kind in SEARCHERS if kind != "exact"], "The searcher to compare."
  )
  flags.DEFINE_enum("row_type", IndexConfig.row_type, ROW_TYPES, "Type of partitioned rows.")
  flags.DEFINE_float("recall", IndexConfig.recall, "The wanted recall.")
  flags.DEFINE_integer("num_leaves", None, "Partitions.")
  flags.DEFINE_integer("leaves_to_search", None, "Partitions searched for each query.")
  flags.DEFINE_integer("reorder", None, "Candidates whose score is computed exactly.")
  cli.start("benchmarks.scann_recall")

import numpy as np
import tabulate
import tensorflow as tf

from realm_tf.corpus import metrics, passages
from realm_tf.examples import questions
from realm_tf.models import snapshots
from realm_tf.retrieval import dense, index
from realm_tf.storage import artifacts

KS = (1, 5, 8, 10, 20, 100)
ASKED = {"trainer": 8, "server": 100}
_TIMED = 256  # questions
_BATCH = 32


def search(searcher, vectors: np.ndarray, num: int) -> np.ndarray:
  """Returns passage numbers [Q, num]."""
  return np.concatenate(
    [
      searcher.search(tf.constant(vectors[start : start + _BATCH]), num).numbers.numpy()
      for start in range(0, len(vectors), _BATCH)
    ]
  )


def milliseconds(searcher, vectors: np.ndarray, num: int, *, batch: int) -> float:
  """Returns the median time of searching per question, in batches of `batch`."""
  secs = []
  for start in range(0, min(_TIMED, len(vectors)) - batch + 1, batch):
    part, started = tf.constant(vectors[start : start + batch]), time.perf_counter()
    searcher.search(part, num).numbers.numpy()
    secs.append((time.perf_counter() - started) / batch)
  return 1e3 * float(np.median(secs))


def row(
  name: str,
  searcher,
  vectors: np.ndarray,
  num: int,
  *,
  exact: np.ndarray,
  rows: Sequence[questions.Question],
  matcher: metrics.AnswerMatcher,
) -> list:
  """Returns a row of the table."""
  found, cells = search(searcher, vectors, num), [name, num]
  answered = [
    matcher.has_answer(numbers, question.answers, regex=question.regex)
    for numbers, question in zip(found, rows, strict=True)
  ]
  for k in KS:
    pairs = zip(exact, found, strict=True)
    overlap = np.mean([np.isin(wanted[:k], got[:k]).mean() for wanted, got in pairs])
    hit = np.mean([any(right[:k]) for right in answered])
    cells += [f"{100 * overlap:.2f} {100 * hit:.2f}"] if k <= num else [None]
  return cells + [milliseconds(searcher, vectors, num, batch=batch) for batch in (1, _BATCH)]


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  artifacts.check_input(args.index, "snapshot", args.snapshot)
  artifacts.check_input(args.index, "passages", args.passages)
  table, retriever = passages.load(args.passages), snapshots.load_retriever(args.snapshot)
  tokenizer, rows = passages.load_tokenizer(args.passages), questions.read_questions(args.questions)
  query_ids = questions.packed_questions(rows, tokenizer=tokenizer, length=retriever.query_length)
  vectors = retriever.query_tower.predict(query_ids, batch_size=_BATCH, verbose=0)
  embeddings = index.read_embeddings(args.index, num_rows=len(table))
  config = IndexConfig(
    searcher=args.searcher,
    recall=args.recall,
    num_leaves=args.num_leaves,
    leaves_to_search=args.leaves_to_search,
    reorder=args.reorder,
    row_type=args.row_type,
  )
  queries = dense.sample_queries(retriever, table, tokenizer=tokenizer, config=config)
  started = time.time()
  approximate = index.build_approximate(embeddings, config, queries)
  print(
    f"{len(table):,} passages x {embeddings.shape[1]}, {len(rows):,} questions; "
    f"{args.searcher} built and measured in {time.time() - started:.1f} s"
  )
  print(
    index.measured_recall({"config": dataclasses.asdict(config), "searcher": approximate.settings})
  )
  exact = index.ExactSearcher(embeddings)
  best, matcher = search(exact, vectors, max(KS)), metrics.AnswerMatcher(table.texts)
  lines = [
    row(f"{kind}, {user}", searcher, vectors, num, exact=best, rows=rows, matcher=matcher)
    for kind, searcher in (("exact", exact), (args.searcher, approximate))
    for user, num in ASKED.items()
  ]
  names = [
    "% of exact, % answered at",
    "requested",
    *(f"@{k}" for k in KS),
    "ms, one at a time",
    f"ms, {_BATCH} at a time",
  ]
  print(tabulate.tabulate(lines, names, floatfmt=".2f", missingval="-"))
