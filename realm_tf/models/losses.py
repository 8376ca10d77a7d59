"""Losses as pure tensor functions on `keras.ops`.

Dimensions: B batch, C candidates, M masks, K beam.
"""

from typing import Any, NamedTuple

from keras import ops

from realm_tf.models import equations
from realm_tf.models.equations import NEVER


class InBatchLoss(NamedTuple):
  """The loss [B], and `correct` [B]: 1 where the query's own passage scored highest."""

  loss: object
  correct: object


def in_batch(queries, passages, first=0, *, allowed=None) -> InBatchLoss:
  """Softmax cross-entropy of each query's own passage among those of the batch (ORQA, section 4).

  Args:
    queries: [B, D] float32.
    passages: [B', D] float32 of the whole batch; row `first + i` belongs to query i.
    first: [] int32, not 0 if the batch is spread over devices.
    allowed: [B, B'] 0 where a passage must not count as wrong for a query; 1 for its own passage.
      None allows all.
  """
  scores = ops.matmul(queries, ops.transpose(passages))  # [B, B']
  if allowed is not None:
    scores = scores + (1 - allowed) * NEVER
  labels = ops.expand_dims(first + ops.arange(ops.shape(scores)[0]), -1)
  own = ops.squeeze(ops.take_along_axis(scores, labels, axis=1), -1)  # [B]
  loss = ops.logsumexp(scores, axis=1) - own
  return InBatchLoss(loss, ops.cast(own >= ops.max(scores, axis=1), "float32"))


class MarginalLoss(NamedTuple):
  """Loss of each example; the loss of a batch is Σ loss * weight / Σ weight.

  Attributes:
    loss: [B] −log p(y|x), or its mean over the masks.
    weight: [B] 1, or the number of masks.
    log_likelihoods: [B, C] log p(y|z,x).
    log_prior: [B, C] log p(z|x).
  """

  loss: Any
  weight: Any
  log_likelihoods: Any
  log_prior: Any


def marginal_masked_lm(
  token_log_probs, scores, target_mask, *, per_token: bool = False
) -> MarginalLoss:
  """−log Σ_z p(y|z,x) p(z|x) over the candidates (REALM, equation 1 and section 3.1).

  Args:
    token_log_probs: [B, C, M] log p of each masked word piece given each candidate.
    scores: [B, C] f(x, z).
    target_mask: [B, M] 1 for real masks.
    per_token: whether to marginalise each masked word piece by itself and average over all masks of
      the batch, as the released code does, instead of the paper's product over masks inside the
      sum.
  """
  log_prior = equations.log_prior(scores)  # [B, C]
  log_likelihoods = equations.log_likelihoods(token_log_probs, target_mask)  # [B, C]
  if per_token:
    marginal = equations.log_marginal(token_log_probs, log_prior) * target_mask  # [B, M]
    weight = ops.sum(target_mask, axis=-1)
    loss = -ops.sum(marginal, axis=-1) / ops.maximum(weight, 1)
  else:
    loss = -equations.log_marginal(log_likelihoods, log_prior)
    weight = ops.ones_like(loss)
  return MarginalLoss(loss, weight, log_likelihoods, log_prior)


def with_unread(token_log_probs, scores, unread_scores, unread):
  """Appends all unread passages together as one more candidate.

  A passage that was not read for a query is assumed to be as useful as no passage at all: it gets
  the likelihood of the null passage. p(z|x) is then a softmax over both kinds, and Σ_z p(y|z,x)
  p(z|x) over the result is equation 1 of REALM over all of them.

  Args:
    token_log_probs: [B, C, M]; the first candidate is the null passage.
    scores: [B, C] f(x, z).
    unread_scores: [B, K] f(x, z) of passages that were read for other queries or not at all.
    unread: [B, K] 1 where such a passage counts for this query.

  Returns:
    token_log_probs [B, C + 1, M], scores [B, C + 1].
  """
  together = ops.logsumexp(unread_scores + (1 - unread) * NEVER, axis=-1, keepdims=True)  # [B, 1]
  return (
    ops.concatenate([token_log_probs, token_log_probs[:, :1]], axis=1),
    ops.concatenate([scores, together], axis=1),
  )


def perplexity_distillation(log_likelihoods, log_prior):
  """KL divergence of p(z|x) from the reader's distribution over candidates: [B].

  This is the loss of Atlas (Izacard et al. 2022, section 2.2). Its target is softmax_z
  log p(y|z,x), which has no gradient here.

  Args:
    log_likelihoods: [B, C] log p(y|z,x).
    log_prior: [B, C] log p(z|x).
  """
  target = ops.stop_gradient(ops.log_softmax(log_likelihoods, axis=-1))
  return ops.sum(ops.exp(target) * (target - log_prior), axis=-1)


class SpanLoss(NamedTuple):
  """Losses of retriever [B] and reader [B] for each question; zero where nothing is correct."""

  retriever: object
  reader: object


def marginal_span(beam_scores, beam_correct, span_scores, span_mask, span_correct) -> SpanLoss:
  """−log Σ_{z has an answer} p(z|x) and −log Σ_{correct spans} p(span) (ORQA, section 5).

  Args:
    beam_scores: [B, K] f(x, z) of the retriever's beam.
    beam_correct: [B, K] 1 where the passage has an answer.
    span_scores: [B, S] reader score + retrieval score of every span in every passage read.
    span_mask: [B, S] 1 where the span exists.
    span_correct: [B, S] 1 where it is an answer.
  """
  return SpanLoss(
    _marginal_nll(beam_scores, ops.ones_like(beam_scores), beam_correct),
    _marginal_nll(span_scores, span_mask, span_correct),
  )


def _marginal_nll(scores, mask, correct):
  """−log of the softmax mass on `correct` among `mask`: [B, K] → [B].

  The result is 0 where no entry is correct.
  """
  among = ops.logsumexp(scores + (1 - mask) * NEVER, axis=-1)
  right = ops.logsumexp(scores + (1 - mask * correct) * NEVER, axis=-1)
  return ops.where(ops.max(mask * correct, axis=-1) > 0, among - right, 0.0)
