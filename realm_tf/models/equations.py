"""REALM's equations on `keras.ops`, shared by trainers, evaluation, explanations and servables.

Dimensions: B batch, C candidates, M masks. Logarithms are natural.
"""

from keras import ops

NEVER = -1e9  # used for log 0 where -inf would give NaN gradients


def log_prior(scores):
  """log p(z|x), the softmax of the retrieval scores (REALM, section 3.2).

  Args:
    scores: [.., C] f(x, z).

  Returns:
    [.., C].
  """
  return ops.log_softmax(scores, axis=-1)


def log_likelihoods(token_log_probs, target_mask):
  """log p(y|z,x): given z and x, the word pieces of y are independent (REALM, section 3.2).

  Args:
    token_log_probs: [B, C, M] log p of each word piece of y given each candidate.
    target_mask: [B, M] 1 for real masks.

  Returns:
    [B, C].
  """
  return ops.sum(token_log_probs * ops.expand_dims(target_mask, 1), axis=-1)


def log_marginal(log_likelihoods, log_prior):
  """log p(y|x) = log Σ_z p(y|z,x) p(z|x) (REALM, equation 1).

  Args:
    log_likelihoods: [B, C] log p(y|z,x); or [B, C, ..] for several y, such as each word piece.
    log_prior: [B, C] log p(z|x).

  Returns:
    [B], or [B, ..].
  """
  for _ in range(len(log_likelihoods.shape) - len(log_prior.shape)):
    log_prior = ops.expand_dims(log_prior, -1)
  return ops.logsumexp(log_likelihoods + log_prior, axis=1)


def candidate_utility(log_likelihoods):
  """log p(y|z,x) − log p(y|∅,x), the retrieval utility of each candidate (REALM, section 4.5).

  Args:
    log_likelihoods: [B, C] log p(y|z,x); the first candidate is the null passage.

  Returns:
    [B, C].
  """
  return log_likelihoods - log_likelihoods[:, :1]


def retrieval_utility(log_likelihoods, log_prior):
  """log p(y|x) − log p(y|∅,x), the utility of all candidates together, as in the released code.

  Args:
    log_likelihoods: [B, C] log p(y|z,x); the first candidate is the null passage.
    log_prior: [B, C] log p(z|x).

  Returns:
    [B].
  """
  return log_marginal(log_likelihoods, log_prior) - log_likelihoods[:, 0]
