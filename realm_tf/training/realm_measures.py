"""Measurements of REALM on held-out sentences, at its start and with each new index."""

import sys
from collections.abc import Callable

import numpy as np

from realm_tf.corpus import metrics
from realm_tf.examples import masking, questions
from realm_tf.examples.realm import evidence
from realm_tf.examples.recurring_spans import HELD_OUT_RECALL
from realm_tf.models.realm import RealmModel
from realm_tf.retrieval import dense
from realm_tf.training.realm_batches import Batches, RealmSettings

_START_CLOZES = 256  # held-out clozes that are measured at the start of REALM
# Share of clozes whose answer is read, and utility in nats; REALM hardly learns from less.
_ENOUGH_READ, _ENOUGH_UTILITY = 0.4, 0.2


def tell_start(
  model: RealmModel, batches: Batches, first: dense.IndexedRetriever
) -> dict[str, float]:
  """Measures REALM's start on held-out clozes, and warns if it has little to learn from.

  The retriever learns only from the reader's likelihoods. So some candidates must hold the answer,
  and the reader must make use of them.

  The candidates are those of step 0: the null passage, the given ones (holders of the span and own
  passages), and those that the first index finds.

  Returns:
    answer_read, the share of the clozes whose answer is in the candidates as they are read;
    retrieval_utility, in nats. Empty without held-out clozes.
  """
  queries = batches.sentences.held_out()
  if queries is None or not model.null:
    return {}
  section, rng = batches.settings.realm, np.random.default_rng(31)
  size = section.batch_size
  # Whole batches: another size would be traced anew.
  num = max(size, min(_START_CLOZES, len(queries.ids)) // size * size)
  rows = rng.permutation(len(queries.ids))[:num]
  with model.distribute_strategy.scope():
    model.compile()
  found, utilities = [], []
  for at in range(0, len(rows), size):
    part = batches.cropped(masking.rows_of(queries, rows[at : at + size]), rng)
    batch = batches.with_candidates(part, 0, indexed=first, rng=rng)
    found += list(evidence(batch, tokenizer=batches.tokenizer))
    utilities.append(
      (len(part.ids), model.test_on_batch(batch, return_dict=True)["retrieval_utility"])
    )
    model.reset_metrics()
  weights, values = zip(*utilities, strict=True)
  said = {
    "answer_read": float(np.mean(found)),
    "retrieval_utility": float(np.average(values, weights=weights)),
  }
  print(
    f"REALM starts: of {len(rows)} held-out clozes {said['answer_read']:.0%} have their answer "
    f"among the candidates; retrieval utility {said['retrieval_utility']:.2f} nats. "
    f"{_given(section)}",
    flush=True,
  )
  if said["answer_read"] < _ENOUGH_READ:
    print(
      f"WARNING: the retriever learns from candidates that hold the answer; {_ENOUGH_READ:.0%} is "
      "enough. Raise realm.holders, realm.own_passages or realm.num_candidates, or pre-train the "
      "retriever for longer (ict, recurring_spans).",
      file=sys.stderr,
      flush=True,
    )
  if said["retrieval_utility"] < _ENOUGH_UTILITY:
    print(
      f"WARNING: the reader hardly uses what it reads; a utility of {_ENOUGH_UTILITY} nats is "
      "enough. Raise warmup.steps or warmup.holders.",
      file=sys.stderr,
      flush=True,
    )
  return said


def _given(section: RealmSettings) -> str:
  """Describes the candidates that a batch is given at first."""
  share = f"{section.own_passages:.0%} of the clozes"
  if section.holders:
    own = f", for {share} their own passage" if section.own_passages else ""
    return f"Up to {section.holders} of the candidates are given: passages that hold the span{own}"
  own = f"; {share} may find their own passage" if section.own_passages else ""
  return f"No candidates are given{own}"


def recall_of(
  batches: Batches, *, dev_clozes: str
) -> Callable[[dense.IndexedRetriever], dict[str, float]]:
  """Returns a function that measures an index on the held-out sentences and on clozes.

  Args:
    batches: has the held-out sentences.
    dev_clozes: file of the clozes; "" for none.
  """
  measures = [held_out_recall(batches)]
  if dev_clozes:
    measures.append(dev_cloze_recall(batches, dev_clozes))

  def measure_all(indexed: dense.IndexedRetriever) -> dict[str, float]:
    return {name: value for measure in measures for name, value in measure(indexed).items()}

  return measure_all


def held_out_recall(batches: Batches) -> Callable[[dense.IndexedRetriever], dict[str, float]]:
  """Returns a function that measures an index's recall at 5 on held-out sentences.

  This is how often another passage that holds the sentence's masked span is among the first five
  retrieved.
  """
  queries = batches.sentences.held_out(with_holders=True)
  if queries is None:
    return lambda indexed: {}
  query_ids = batches.pack_queries(queries)

  def measure(indexed: dense.IndexedRetriever) -> dict[str, float]:
    num = min(5, indexed.num_rows)
    numbers = dense.candidates(
      indexed, query_ids, num=num, own_passages=queries.own_passages, null=False
    )
    return {HELD_OUT_RECALL: float(masking.contains(queries.holders, numbers).any(axis=1).mean())}

  return measure


def dev_cloze_recall(
  batches: Batches, path: str
) -> Callable[[dense.IndexedRetriever], dict[str, float]]:
  """Returns a function that measures an index's recall at 5 on the clozes of a file."""
  clozes = questions.read_clozes(path)
  masked = questions.masked_clozes(
    clozes, tokenizer=batches.tokenizer, max_masks=batches.settings.lengths.max_masks
  )
  query_ids = batches.pack_queries(masked)
  answers = [cloze.answers for cloze in clozes]

  def measure(indexed: dense.IndexedRetriever) -> dict[str, float]:
    depth, matcher = min(5, indexed.num_rows), metrics.AnswerMatcher(indexed.table.texts)
    scores = dense.recall(
      lambda part: indexed.search(query_ids[part], depth), answers, matcher, ks=[5]
    )
    return {f"dev_cloze_{name}": value for name, value in scores.items()}

  return measure
