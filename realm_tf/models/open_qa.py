"""Open-QA: scores of a beam of passages and of the spans in the best of them. ORQA, section 5."""

import keras
from keras import ops

from realm_tf.models import devices, losses, span_reader
from realm_tf.models.equations import NEVER
from realm_tf.models.measured import MeasuredModel

_MEASURES = (
  "loss",
  "retriever_loss",
  "reader_loss",
  "reader_exact_match",
  "beam_has_answer",
  "reader_oracle",
)


class OpenQaModel(MeasuredModel):
  """Retrieval scores of a beam of passages and span scores of the best of them.

  Args:
    query_tower: embeds questions; None uses the beam's given scores, times a learned weight (BM25).
    reader: scores spans.
    passage_tower: embeds the passages read again, so that it is trained; None uses all embeddings
      unchanged.
  """

  def __init__(
    self,
    query_tower: keras.Model | None,
    reader: span_reader.SpanReader,
    *,
    sep_id: int,
    passage_tower: keras.Model | None = None,
  ):
    super().__init__(_MEASURES, name="open_qa", dtype="float32")  # its inputs are float32 too
    self.query_tower, self.passage_tower, self.reader, self.sep_id = (
      query_tower,
      passage_tower,
      reader,
      sep_id,
    )
    if query_tower is None:
      self.score_weight = self.add_weight(shape=(), initializer="ones", name="score_weight")

  def call(self, inputs, training=False):
    """Scores passages and spans.

    Args:
      inputs: query_ids [B, Lq]; beam_embeddings [B, K, D], or beam_scores [B, K]; beam_mask [B, K],
        0 where no passage was found; reader_ids, reader_segments [B, R, L] of the beam's first R
        passages, and for the passage tower their passage_ids, passage_segments [B, R, Lp].
      training: whether dropout is on.

    Returns:
      beam_scores [B, K]; span_scores [B, R, L, W], with the retrieval score added; span_mask
      [B, R, L, W].
    """
    ids, segments = inputs["reader_ids"], inputs["reader_segments"]
    num_read, length = ids.shape[1], ids.shape[2]

    def flat(x):
      return ops.reshape(x, (-1, x.shape[-1]))  # [B, R, L] → [B * R, L]

    if self.query_tower is None:
      beam_scores = inputs["beam_scores"] * self.score_weight
    else:
      queries = self.query_tower(inputs["query_ids"], training=training)  # [B, D]
      vectors = inputs["beam_embeddings"]
      if self.passage_tower is not None:
        read = self.passage_tower(
          flat(inputs["passage_ids"]), flat(inputs["passage_segments"]), training=training
        )  # [B * R, D]
        vectors = ops.concatenate(
          [ops.reshape(read, (-1, num_read, read.shape[-1])), vectors[:, num_read:]], axis=1
        )
      beam_scores = ops.einsum("bd,bkd->bk", queries, vectors)
    beam_scores += (1 - inputs["beam_mask"]) * NEVER
    scores = self.reader(
      {"token_ids": flat(ids), "segment_ids": flat(segments)}, training=training
    )  # [B * R, L, W]
    mask = span_reader.span_mask(
      flat(ids), flat(segments), sep_id=self.sep_id, max_span=self.reader.max_span
    )
    shape = (-1, num_read, length, self.reader.max_span)
    span_scores = ops.reshape(scores, shape) + beam_scores[:, :num_read, None, None]
    return {
      "beam_scores": beam_scores,
      "span_scores": span_scores,
      "span_mask": ops.reshape(mask, shape),
    }

  def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    def flat(scores):
      return ops.reshape(scores, (ops.shape(scores)[0], -1))  # [B, R, L, W] → [B, S]

    span_scores, span_mask, span_correct = (
      flat(y_pred["span_scores"]),
      flat(y_pred["span_mask"]),
      flat(x["span_correct"]),
    )
    result = losses.marginal_span(
      y_pred["beam_scores"], x["beam_correct"], span_scores, span_mask, span_correct
    )
    best = span_reader.best_span(span_scores, span_mask > 0)
    right = ops.take_along_axis(span_correct, ops.expand_dims(best, -1), axis=-1)
    loss = ops.mean(result.retriever + result.reader)
    for name, value in (
      ("loss", loss),
      ("retriever_loss", result.retriever),
      ("reader_loss", result.reader),
      ("reader_exact_match", right),
      ("beam_has_answer", ops.max(x["beam_correct"], axis=-1)),
      ("reader_oracle", ops.max(span_mask * span_correct, axis=-1)),
    ):
      self.means[name].update_state(value)
    return loss / devices.count()
