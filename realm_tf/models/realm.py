"""REALM's joint model of retriever and reader, p(y|x) = Σ_z p(y|z,x) p(z|x). REALM, section 3.1."""

from keras import ops

from realm_tf import errors
from realm_tf.models import devices, equations, losses
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.measured import MeasuredModel
from realm_tf.models.retriever import Retriever

MARGINAL, DISTILLATION = "marginal", "perplexity_distillation"
RETRIEVER_LOSSES = (MARGINAL, DISTILLATION)


class RealmModel(MeasuredModel):
  """p(y|x) = Σ_z p(y|z,x) p(z|x) over the candidates of each query.

  `evidence` [B] of a batch marks the queries that the retriever learns from; a query with 0 trains
  the reader only.

  Args:
    retriever: scores the candidates; None reads a single candidate (the reader's warm-up).
    reader: predicts the masked word pieces.
    per_token: whether to marginalise each masked word piece by itself and average over all masks of
      the batch, as the released code does.
    null: whether the first candidate is the null passage.
    batch_candidates: whether p(z|x) is over the candidates of the whole batch
      (`losses.with_unread`) instead of the query's own only.
    retriever_loss: "marginal", the paper's, or "perplexity_distillation" (Atlas), with which the
      marginal likelihood trains the reader only.

  Raises:
    UserError: see `check_loss`.
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
    check_loss(retriever_loss, batch_candidates=batch_candidates, null=null)
    distils = retriever_loss == DISTILLATION
    measures = ["loss"]
    if retriever is not None:
      measures += ["retrieval_utility", "prior_entropy", "null_prior"]
      measures += ["unread_prior"] * batch_candidates + ["distillation"] * distils
    super().__init__(measures, name="realm")
    self.retriever, self.reader, self.per_token, self.null = retriever, reader, per_token, null
    self.batch_candidates, self.distils = batch_candidates, distils

  def call(self, inputs, training=False):
    """Scores and log-likelihoods of all candidates.

    Args:
      inputs: query_ids [B, Lq]; passage_ids, passage_segments [B, C, Lp]; reader_ids,
        reader_segments [B, C, L]; mask_positions, targets [B, M]. All int32.
      training: whether dropout is on.

    Returns:
      scores [B, C], token_log_probs [B, C, M]; with batch_candidates also unread_scores
      [B, B * C] of every query with every candidate of the batch.
    """
    reader_ids = inputs["reader_ids"]
    num, count = reader_ids.shape[1], ops.shape(reader_ids)[0]

    def flat(x):
      return ops.reshape(x, (-1, x.shape[-1]))  # [B, C, L] → [B * C, L]

    packed = {
      "token_ids": flat(reader_ids),
      "segment_ids": flat(inputs["reader_segments"]),
      "mask_positions": ops.repeat(inputs["mask_positions"], num, axis=0),
    }
    token_log_probs = self.reader.log_likelihoods(
      packed,
      ops.repeat(inputs["targets"], num, axis=0),
      training=training,
      static=self.jit_compile,
    )  # [B * C, M]
    token_log_probs = ops.reshape(token_log_probs, (count, num, -1))  # [B, C, M]
    if self.retriever is None:
      return {"scores": ops.zeros((count, num)), "token_log_probs": token_log_probs}
    how = {"training": training, "static": self.jit_compile}
    queries = self.retriever.embed_queries(inputs["query_ids"], **how)  # [B, D]
    vectors = self.retriever.embed_passages(
      flat(inputs["passage_ids"]), flat(inputs["passage_segments"]), **how
    )  # [B * C, D]
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
        token_log_probs, scores, y_pred["unread_scores"], x["unread"]
      )
    if "evidence" in x:
      scores = _gradient_where(x["evidence"], scores)
    result = losses.marginal_masked_lm(
      token_log_probs,
      ops.stop_gradient(scores) if self.distils else scores,
      x["target_mask"],
      per_token=self.per_token,
    )
    loss = result.loss
    self.means["loss"].update_state(loss, result.weight)
    if self.retriever is not None:
      self._measure(result, num_read)
    if self.distils:
      log_prior = equations.log_prior(scores)[:, :num_read]
      distilled = losses.perplexity_distillation(result.log_likelihoods[:, :num_read], log_prior)
      self.means["distillation"].update_state(distilled)
      loss = loss + distilled
    (whole,) = devices.add_up([ops.sum(result.weight)])  # over all devices
    return ops.sum(loss * result.weight) / ops.maximum(whole, 1)

  def _measure(self, result: losses.MarginalLoss, num_read: int) -> None:
    prior = ops.exp(result.log_prior)
    self.means["prior_entropy"].update_state(-ops.sum(prior * result.log_prior, axis=-1))
    if self.null:
      utility = equations.retrieval_utility(result.log_likelihoods, result.log_prior)
      self.means["retrieval_utility"].update_state(utility)
      self.means["null_prior"].update_state(prior[:, 0])
    if self.batch_candidates:
      self.means["unread_prior"].update_state(prior[:, num_read])


def check_loss(retriever_loss: str, *, batch_candidates: bool, null: bool) -> None:
  """Checks that a `RealmModel`'s loss is known and compatible with its candidates.

  Trainers call this before any long work; the arguments are those of `RealmModel`.

  Raises:
    UserError: unknown loss, or batch_candidates without the null passage.
  """
  if retriever_loss not in RETRIEVER_LOSSES:
    raise errors.UserError(
      f"realm.retriever_loss is {retriever_loss!r}; use one of {', '.join(RETRIEVER_LOSSES)}."
    )
  if batch_candidates and not null:
    raise errors.UserError(
      "realm.batch_candidates needs the null passage, whose likelihood unread passages take; set "
      "realm.null_passage to True."
    )


def _gradient_where(which, scores):
  """Returns the scores [B, C] with no gradient in rows where `which` [B] is 0."""
  which = ops.expand_dims(which, -1)
  return which * scores + (1 - which) * ops.stop_gradient(scores)
