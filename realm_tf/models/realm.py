"""REALM: retriever and reader together, p(y|x) = Σ_z p(y|z,x) p(z|x). REALM, section 3.1."""

import keras
from keras import ops

from realm_tf import devices, losses
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever

MARGINAL, DISTILLATION = "marginal", "perplexity_distillation"
RETRIEVER_LOSSES = (MARGINAL, DISTILLATION)


class RealmModel(keras.Model):
  """p(y|x) = Σ_z p(y|z,x) p(z|x) over the candidates of each query.

  A batch may say in `evidence` [B] which queries the retriever learns from: 0 leaves a query to the reader alone.

  Args:
    retriever: scores the candidates; None reads a single candidate (the reader's warm-up).
    reader: predicts the masked word pieces.
    per_token: marginalise each masked word piece by itself and average over all masks of the
      batch, as the released code does.
    null: the first candidate is the null passage.
    batch_candidates: p(z|x) is over the candidates of the whole batch (`losses.with_unread`), not
      over the query's own alone.
    retriever_loss: "marginal", the paper's, or "perplexity_distillation" (Atlas): then the
      marginal likelihood trains the reader alone.

  Raises:
    ValueError: unknown loss, or batch_candidates without the null passage.
  """

  def __init__(
    self,
    retriever: Retriever | None,
    reader: MaskedReader,
    *,
    per_token: bool = False,
    null: bool = True,
    batch_candidates: bool = False,
    retriever_loss: str = MARGINAL,
  ):
    super().__init__(name="realm")
    if retriever_loss not in RETRIEVER_LOSSES:
      raise ValueError(
        f"retriever_loss is {retriever_loss!r}; use one of {', '.join(RETRIEVER_LOSSES)}."
      )
    if batch_candidates and not null:
      raise ValueError("batch_candidates needs the null passage, whose likelihood unread ones take.")
    self.retriever, self.reader, self.per_token, self.null = retriever, reader, per_token, null
    self.batch_candidates, self.distils = batch_candidates, retriever_loss == DISTILLATION
    names = ["loss"]
    if retriever is not None:
      names += ["retrieval_utility", "prior_entropy", "null_prior"]
      names += ["unread_prior"] * batch_candidates + ["distillation"] * self.distils
    self.means = {name: keras.metrics.Mean(name) for name in names}
    self.built = True  # its weights are the retriever's and the reader's

  def call(self, inputs, training=False):
    """Scores and log-likelihoods of all candidates.

    Args:
      inputs: query_ids [B, Lq]; passage_ids, passage_segments [B, C, Lp]; reader_ids, reader_segments [B, C, L];
        mask_positions, targets [B, M]. All int32.

    Returns:
      scores [B, C], token_log_probs [B, C, M]; with batch_candidates unread_scores [B, B * C], of
      every query with every candidate of the batch.
    """
    reader_ids = inputs["reader_ids"]
    num, count = reader_ids.shape[1], ops.shape(reader_ids)[0]
    flat = lambda x: ops.reshape(x, (-1, x.shape[-1]))  # [B, C, L] → [B * C, L]
    packed = {
      "token_ids": flat(reader_ids),
      "segment_ids": flat(inputs["reader_segments"]),
      "mask_positions": ops.repeat(inputs["mask_positions"], num, axis=0),
    }
    token_log_probs = self.reader.log_likelihoods(
      packed, ops.repeat(inputs["targets"], num, axis=0), training=training)  # [B * C, M]
    token_log_probs = ops.reshape(token_log_probs, (count, num, -1))  # [B, C, M]
    if self.retriever is None:
      return {"scores": ops.zeros((count, num)), "token_log_probs": token_log_probs}
    queries = self.retriever.embed_queries(inputs["query_ids"], training=training)  # [B, D]
    vectors = self.retriever.embed_passages(
        flat(inputs["passage_ids"]), flat(inputs["passage_segments"]), training=training)  # [B * C, D]
    own = ops.reshape(vectors, (count, num, -1))  # [B, C, D]
    outputs = {"scores": ops.einsum("bd,bcd->bc", queries, own), "token_log_probs": token_log_probs}
    if self.batch_candidates:
      everybody = devices.gather(vectors).rows  # of all devices
      outputs["unread_scores"] = ops.matmul(queries, ops.transpose(everybody))
    return outputs

  def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    token_log_probs, scores = y_pred["token_log_probs"], y_pred["scores"]
    num_read = scores.shape[1]
    if self.batch_candidates:
      token_log_probs, scores = losses.with_unread(
        token_log_probs, scores, y_pred["unread_scores"], x["unread"])
    if "evidence" in x:
      scores = _gradient_where(x["evidence"], scores)
    result = losses.marginal_masked_lm(
      token_log_probs, ops.stop_gradient(scores) if self.distils else scores, x["target_mask"],
      per_token=self.per_token)
    loss = result.loss
    self.means["loss"].update_state(loss, result.weight)
    if self.retriever is not None:
      self._measure(result, num_read)
    if self.distils:
      log_prior = ops.log_softmax(scores, axis=-1)[:, :num_read]
      distilled = losses.perplexity_distillation(result.log_likelihoods[:, :num_read], log_prior)
      self.means["distillation"].update_state(distilled)
      loss = loss + distilled
    whole, = devices.add_up([ops.sum(result.weight)])  # of the batch that all devices share
    return ops.sum(loss * result.weight) / ops.maximum(whole, 1)

  def _measure(self, result: losses.MarginalLoss, num_read: int) -> None:
    prior = ops.exp(result.log_prior)
    self.means["prior_entropy"].update_state(-ops.sum(prior * result.log_prior, axis=-1))
    if self.null:
      marginal = ops.logsumexp(result.log_likelihoods + result.log_prior, axis=-1)
      self.means["retrieval_utility"].update_state(marginal - result.log_likelihoods[:, 0])
      self.means["null_prior"].update_state(prior[:, 0])
    if self.batch_candidates:
      self.means["unread_prior"].update_state(prior[:, num_read])

  @property
  def metrics(self):
    return list(self.means.values())


def _gradient_where(which, scores):
  """The same scores [B, C]; no gradient flows back from the rows where `which` [B] is 0."""
  which = ops.expand_dims(which, -1)
  return which * scores + (1 - which) * ops.stop_gradient(scores)
