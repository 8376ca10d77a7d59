"""The losses against sums written out in NumPy float64.

The gradient of REALM's marginal is compared with the paper's formula.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from realm_tf.models import losses


def softmax(scores: np.ndarray) -> np.ndarray:
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def draw(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape, scale=scale).astype(np.float32)


def close(got, wanted, what: str, *, rtol: float = 2e-5) -> None:
  got = keras.ops.convert_to_numpy(got)
  np.testing.assert_allclose(got, wanted, rtol=rtol, atol=2e-5, err_msg=what)


def test_in_batch():
  queries, passages = draw(0, 6, 5, scale=2), draw(1, 6, 5)
  passages[2] = 3 * queries[2]  # one row that is certainly right
  loss, correct = np.zeros(6), np.zeros(6)
  for i in range(6):
    scores = [
      sum(float(a) * float(b) for a, b in zip(queries[i], passages[j], strict=True))
      for j in range(6)
    ]
    loss[i] = np.log(sum(np.exp(score - scores[i]) for score in scores))
    correct[i] = scores[i] == max(scores)
  got = losses.in_batch(queries, passages)
  close(got.loss, loss, "ICT loss")
  np.testing.assert_array_equal(keras.ops.convert_to_numpy(got.correct), correct)
  assert 0 < correct.sum() < 6


def test_in_batch_leaves_out_what_is_not_allowed():
  queries, passages, allowed = draw(0, 4, 5), draw(1, 4, 5), np.ones([4, 4], np.float32)
  passages[3] = 3 * queries[1]  # would be taken for that of query 1
  allowed[1, 3] = allowed[0, 1] = 0
  scores = np.where(allowed > 0, queries.astype(np.float64) @ passages.T, -np.inf)
  got = losses.in_batch(queries, passages, allowed=allowed)
  close(got.loss, -np.log(np.diag(softmax(scores))), "loss among the allowed passages")
  np.testing.assert_array_equal(
    keras.ops.convert_to_numpy(got.correct), np.diag(scores) == scores.max(1)
  )
  assert keras.ops.convert_to_numpy(losses.in_batch(queries, passages).loss)[1] > got.loss[1] + 1, (
    "passage 3 counted"
  )


def marginal_by_hand(token_log_probs, scores, target_mask, per_token):
  """Computes loss, p(y|z,x) and p(z|x) with only sums and products of probabilities."""
  num_queries, num, masks = token_log_probs.shape
  prior, loss = softmax(scores.astype(np.float64)), np.zeros(num_queries)
  likelihood = np.ones([num_queries, num])
  for b in range(num_queries):
    used = [m for m in range(masks) if target_mask[b, m]]
    for c in range(num):
      for m in used:
        likelihood[b, c] *= np.exp(float(token_log_probs[b, c, m]))
    if per_token:
      nll = [
        -np.log(sum(np.exp(float(token_log_probs[b, c, m])) * prior[b, c] for c in range(num)))
        for m in used
      ]
      loss[b] = sum(nll) / max(len(nll), 1)
    else:
      loss[b] = -np.log(sum(likelihood[b, c] * prior[b, c] for c in range(num)))
  return loss, likelihood, prior


@pytest.mark.parametrize("per_token", [False, True])
def test_marginal_masked_lm(per_token):
  token_log_probs, scores = -np.abs(draw(2, 4, 3, 5)), draw(3, 4, 3, scale=3)
  target_mask = np.array(
    [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], np.float32
  )
  token_log_probs[1, :, 2:] = -50  # unused masks hold what the reader gives for word piece 0
  loss, likelihood, prior = marginal_by_hand(token_log_probs, scores, target_mask, per_token)
  got = losses.marginal_masked_lm(token_log_probs, scores, target_mask, per_token=per_token)
  close(got.loss, loss, f"marginal loss, per_token={per_token}")
  np.testing.assert_array_equal(
    got.weight, target_mask.sum(-1) if per_token else np.ones(4), "weights in the batch's mean"
  )
  close(got.log_likelihoods, np.log(likelihood), "log p(y|z,x)")
  close(got.log_prior, np.log(prior), "log p(z|x)")
  assert loss[3] == 0 and (loss[:3] > 0).all()


def released_loss(gold_log_probs, candidate_score, mlm_mask) -> float:
  """Computes the loss of a batch in float64.

  See google-research/language, realm/model.py, "Compute marginal log-likelihood".
  """
  gold_log_probs, candidate_score = (
    gold_log_probs.astype(np.float64),
    candidate_score.astype(np.float64),
  )
  candidate_log_probs = candidate_score - np.log(np.exp(candidate_score).sum(-1, keepdims=True))
  joint_gold_log_probs = candidate_log_probs[..., None] + gold_log_probs  # [B, C, M]
  marginal_gold_log_probs = np.log(np.exp(joint_gold_log_probs).sum(1))  # [B, M]
  return -(marginal_gold_log_probs * mlm_mask).sum() / mlm_mask.sum()


def test_batch_of_different_numbers_of_masks_against_the_released_loss():
  """Every mask has the same weight, regardless of its query.

  A query without masks has none.
  """
  token_log_probs, scores = -np.abs(draw(13, 4, 3, 5, scale=3)), draw(14, 4, 3, scale=2)
  target_mask = np.array(
    [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], np.float32
  )
  got = losses.marginal_masked_lm(token_log_probs, scores, target_mask, per_token=True)
  loss, weight = (keras.ops.convert_to_numpy(part) for part in (got.loss, got.weight))
  wanted, by_query = released_loss(token_log_probs, scores, target_mask), loss[:3].mean()
  assert abs(by_query - wanted) > 0.1, "the mean over queries differs"
  np.testing.assert_allclose((loss * weight).sum() / weight.sum(), wanted, rtol=1e-6)


def test_both_marginals_agree_on_one_mask_and_differ_on_more():
  token_log_probs, scores = -np.abs(draw(4, 2, 4, 3, scale=2)), draw(5, 2, 4)
  one = np.array([[1, 0, 0]] * 2, np.float32)
  loss = {
    (n, kind): keras.ops.convert_to_numpy(
      losses.marginal_masked_lm(token_log_probs, scores, mask, per_token=kind).loss
    )
    for n, mask in ((1, one), (3, np.ones([2, 3], np.float32)))
    for kind in (False, True)
  }
  np.testing.assert_allclose(loss[1, False], loss[1, True], rtol=1e-5)
  assert np.abs(loss[3, False] - 3 * loss[3, True]).max() > 0.5


def test_gradient_of_the_scores_is_minus_r():
  """∇ log p(y|x) = Σ_z r(z) ∇ f(x,z), r(z) = [p(y|z,x) / p(y|x) − 1] p(z|x): REALM, section 3.3."""
  token_log_probs, scores = -np.abs(draw(6, 5, 4, 2)), draw(7, 5, 4, scale=2)
  target_mask = np.array([[1, 1]] * 4 + [[1, 0]], np.float32)
  _, likelihood, prior = marginal_by_hand(token_log_probs, scores, target_mask, False)
  marginal = (likelihood * prior).sum(-1, keepdims=True)
  r = (likelihood / marginal - 1) * prior
  variable = tf.Variable(scores)
  with tf.GradientTape() as tape:
    loss = tf.reduce_sum(
      losses.marginal_masked_lm(tf.constant(token_log_probs), variable, target_mask).loss
    )
  close(tape.gradient(loss, variable), -r, "gradient of −log p(y|x) in f(x,z)")
  # helpful passages are pulled up
  assert ((likelihood > marginal) == (r > 0)).all() and (r > 0).any() and (r < 0).any()


def test_unread_passages_are_one_more_candidate_with_the_null_passages_likelihood():
  """Computes equation 1 over read and unread passages by sums and products of probabilities."""
  token_log_probs, scores, unread_scores = (
    -np.abs(draw(20, 3, 4, 2)),
    draw(21, 3, 4, scale=2),
    draw(22, 3, 6, scale=2),
  )
  target_mask = np.array([[1, 1], [1, 0], [1, 1]], np.float32)
  unread = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.float32)
  got = losses.marginal_masked_lm(
    *losses.with_unread(token_log_probs, scores, unread_scores, unread), target_mask
  )
  wanted, mass = [], []
  for b in range(3):
    counted = unread_scores[b][unread[b] > 0].astype(np.float64)
    prior = softmax(np.concatenate([scores[b].astype(np.float64), counted]))
    read = np.exp((token_log_probs[b].astype(np.float64) * target_mask[b]).sum(-1))
    likelihood = np.concatenate([read, np.full(len(counted), read[0])])
    wanted.append(-np.log((prior * likelihood).sum()))
    mass.append(prior[4:].sum())
  close(got.loss, wanted, "marginal with unread passages")
  close(np.exp(keras.ops.convert_to_numpy(got.log_prior))[:, 4], mass, "p of all unread passages")
  alone = losses.marginal_masked_lm(token_log_probs, scores, target_mask)
  close(got.loss[2], alone.loss[2], "a query for which none counts")


def test_perplexity_distillation():
  """The loss is KL(softmax of the reader's log-likelihoods ‖ p(z|x)).

  Only the retriever gets its gradient.
  """
  log_likelihoods, scores = -np.abs(draw(23, 4, 5, scale=3)), draw(24, 4, 5, scale=2)
  target, prior = softmax(log_likelihoods.astype(np.float64)), softmax(scores.astype(np.float64))
  reader, retriever = tf.Variable(log_likelihoods), tf.Variable(scores)
  with tf.GradientTape() as tape:
    loss = losses.perplexity_distillation(reader, tf.nn.log_softmax(retriever))
  close(loss, (target * np.log(target / prior)).sum(-1), "KL divergence")
  to_reader, to_retriever = tape.gradient(loss, [reader, retriever])
  close(to_retriever, prior - target, "gradient in f(x,z)")
  assert to_reader is None


def span_by_hand(scores, mask, correct):
  found = np.zeros(len(scores))
  for b, row in enumerate(scores.astype(np.float64)):
    among = sum(np.exp(score) for score, exists in zip(row, mask[b], strict=True) if exists)
    right = sum(
      np.exp(score)
      for score, exists, is_right in zip(row, mask[b], correct[b], strict=True)
      if exists and is_right
    )
    found[b] = -np.log(right / among) if right else 0.0
  return found


def test_marginal_span():
  beam_scores, span_scores = draw(8, 4, 6), draw(9, 4, 12, scale=3)
  rng = np.random.default_rng(10)
  beam_correct, span_mask, span_correct = (
    rng.integers(0, 2, shape).astype(np.float32) for shape in ([4, 6], [4, 12], [4, 12])
  )
  beam_correct[1] = 0  # no passage has an answer
  # the only answers are where no span exists
  span_mask[2], span_correct[2] = (
    np.arange(12) < 6,
    np.arange(12) >= 6,
  )
  beam_correct[3], span_correct[3] = 1, span_mask[3]  # all is correct: no loss
  got = losses.marginal_span(beam_scores, beam_correct, span_scores, span_mask, span_correct)
  retriever = span_by_hand(beam_scores, np.ones_like(beam_correct), beam_correct)
  reader = span_by_hand(span_scores, span_mask, span_correct)
  close(got.retriever, retriever, "retriever")
  close(got.reader, reader, "reader")
  assert retriever[1] == 0 and reader[2] == 0 and retriever[0] > 0 and reader[0] > 0


def test_vanished_terms_have_no_gradient():
  beam, spans = tf.Variable(draw(11, 1, 4)), tf.Variable(draw(12, 1, 4))
  with tf.GradientTape() as tape:
    got = losses.marginal_span(
      beam,
      np.zeros([1, 4], np.float32),
      spans,
      np.ones([1, 4], np.float32),
      np.zeros([1, 4], np.float32),
    )
    loss = got.retriever + got.reader
  gradients = [gradient.numpy() for gradient in tape.gradient(loss, [beam, spans])]
  assert loss.numpy() == 0 and all((gradient == 0).all() for gradient in gradients), gradients


@pytest.mark.parametrize("size", [1e4, 1e6])
def test_finite_at_extreme_scores(size):
  """Values and gradients stay finite.

  The values are the distances between scores, as in exact arithmetic.
  """
  scores = tf.Variable([[size, -size, 0.0], [-size, size, 0.0]])
  token_log_probs = tf.Variable(
    np.array([[[-size], [-1.0], [-2.0]], [[-0.0], [-1.0], [-size]]], np.float32)
  )
  ones = np.ones([2, 1], np.float32)
  first, mask = (
    np.array([[1, 0, 0], [1, 0, 0]], np.float32),
    np.array([[1, 1, 0], [1, 1, 0]], np.float32),
  )
  # row 0: the first and the last candidate share the mass; row 1: all is on the second
  marginal = [
    size - np.log1p(np.exp(-2)),
    1,
  ]
  for name, loss, wanted in (
    (
      "ICT",
      lambda: losses.in_batch(scores, tf.constant([[0, 0, 1.0], [1, 0, 0.0]])).loss,
      [size, size],
    ),
    (
      "ICT, right",
      lambda: losses.in_batch(scores, tf.constant([[1.0, 0, 0], [0, 1.0, 0]])).loss,
      [0, 0],
    ),
    ("marginal", lambda: losses.marginal_masked_lm(token_log_probs, scores, ones).loss, marginal),
    (
      "per token",
      lambda: losses.marginal_masked_lm(token_log_probs, scores, ones, per_token=True).loss,
      marginal,
    ),
    (
      "span",
      lambda: losses.marginal_span(scores, first, scores, mask, first).reader,
      [0, 2 * size],
    ),
  ):
    with tf.GradientTape() as tape:
      value = loss()
    gradients = [
      gradient
      for gradient in tape.gradient(value, [scores, token_log_probs])
      if gradient is not None
    ]
    assert all(np.isfinite(tensor).all() for tensor in (value, *gradients)), (
      f"{name}: {value}, {gradients}"
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6, err_msg=name)
