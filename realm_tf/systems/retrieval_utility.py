"""Retrieval utility: how much retrieval helps the masked reader (REALM, section 4.5)."""

from collections.abc import Sequence

import numpy as np
from keras import ops

from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing, questions
from realm_tf.examples.questions import Question
from realm_tf.examples.realm import realm_batch
from realm_tf.models import equations
from realm_tf.models.realm import RealmModel
from realm_tf.retrieval import dense

_BATCH_SIZE = 32


def retrieval_utility(
  rows: Sequence[Question],
  model: RealmModel,
  indexed: dense.IndexedRetriever,
  *,
  tokenizer: Tokenizer,
  num_candidates: int,
) -> dict[str, float]:
  """Measures how much retrieval helps the masked reader (REALM, section 4.5).

  Args:
    rows: clozes; those whose blank is too long or too far right for the reader are left out.
    model: the retriever and the masked reader of the snapshot that `indexed` was made from.
    indexed: the retriever with its index.
    tokenizer: tokenizer with the snapshot's vocabulary.
    num_candidates: C, including the null passage; fewer if the corpus has fewer.

  Returns:
    utility_clozes, the number of clozes; and the means over them of log p(y|x) − log p(y|∅,x) as
    retrieval_utility (the released code's), and of log p(y|z,x) − log p(y|∅,x) for the best passage
    z as top_retrieval_utility. Only utility_clozes, 0, if there are none.
  """
  reader, retriever = model.reader, indexed.retriever
  num = min(num_candidates, indexed.num_rows + 1)
  marginal, top = [], []
  for start in range(0, len(rows), _BATCH_SIZE):
    masked = questions.masked_clozes(
      rows[start : start + _BATCH_SIZE], tokenizer=tokenizer, max_masks=reader.query_length
    )
    last, room = masked.mask_positions.max(axis=1), packing.query_room(reader.query_length)
    fits = (masked.target_mask.sum(axis=1) <= reader.max_masks) & (
      last - packing.QUERY_START < room
    )
    if not fits.any():
      continue
    kept = [row for row, fit in zip(rows[start : start + _BATCH_SIZE], fits, strict=True) if fit]
    masked = questions.masked_clozes(kept, tokenizer=tokenizer, max_masks=reader.max_masks)
    query_ids = packing.pack_queries(
      masked.ids.tensor(), tokenizer=tokenizer, length=retriever.query_length
    ).numpy()
    numbers = dense.candidates(indexed, query_ids, num=num, own_passages=None, null=True)
    outputs = model.predict_on_batch(
      realm_batch(
        masked,
        query_ids,
        numbers,
        indexed.table,
        tokenizer=tokenizer,
        query_length=reader.query_length,
        passage_length=retriever.passage_length,
        reader_length=reader.length,
        title_length=retriever.title_length,
      )
    )
    likelihoods = equations.log_likelihoods(
      outputs["token_log_probs"].astype(np.float64), masked.target_mask.astype(np.float64)
    )  # [B, C]
    prior = equations.log_prior(outputs["scores"].astype(np.float64))  # [B, C]
    marginal.append(ops.convert_to_numpy(equations.retrieval_utility(likelihoods, prior)))
    top.append(ops.convert_to_numpy(equations.candidate_utility(likelihoods)[:, 1]))
  if not marginal:
    return {"utility_clozes": 0}
  return {
    "utility_clozes": sum(map(len, marginal)),
    "retrieval_utility": float(np.concatenate(marginal).mean()),
    "top_retrieval_utility": float(np.concatenate(top).mean()),
  }
