"""Open-QA: scores of a beam of passages and of the spans in its best. ORQA, section 5."""

import keras
from keras import ops

from realm_tf import devices, losses
from realm_tf.models import span_reader

_NEVER = -1e9  # score of a place in the beam that the searcher left empty


class OpenQaModel(keras.Model):
  """Retrieval scores of a beam of passages and span scores of its best.

  Args:
    query_tower: embeds questions; None takes the beam's scores as they come, times a learned weight (BM25).
    reader: scores spans.
    passage_tower: embeds the passages read anew, so that it learns; None takes all embeddings as they come.
  """

  def __init__(
    self,
    query_tower: keras.Model | None,
    reader: span_reader.SpanReader,
    *,
    sep_id: int,
    passage_tower: keras.Model | None = None,
  ):
    super().__init__(name="open_qa", dtype="float32")  # of its inputs too
    self.query_tower, self.passage_tower, self.reader, self.sep_id = (
      query_tower,
      passage_tower,
      reader,
      sep_id,
    )
    if query_tower is None:
      self.score_weight = self.add_weight(shape=(), initializer="ones", name="score_weight")
    self.means = {
      name: keras.metrics.Mean(name)
      for name in (
        "loss",
        "retriever_loss",
        "reader_loss",
        "reader_exact_match",
        "beam_has_answer",
        "reader_oracle",
      )
    }
    self.built = True  # its weights are the towers' and the reader's

  def call(self, inputs, training=False):
    """Scores.

    Args:
      inputs: query_ids [B, Lq]; beam_embeddings [B, K, D], or beam_scores [B, K]; beam_mask [B, K], 0 where no passage was found;
        reader_ids, reader_segments [B, R, L] of the beam's first R passages, and for the passage tower their passage_ids,
        passage_segments [B, R, Lp].

    Returns:
      beam_scores [B, K]; span_scores [B, R, L, W], retrieval score added; span_mask [B, R, L, W].
    """
    ids, segments = inputs["reader_ids"], inputs["reader_segments"]
    num_read, length = ids.shape[1], ids.shape[2]
    flat = lambda x: ops.reshape(x, (-1, x.shape[-1]))  # [B, R, L] → [B * R, L]
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
    beam_scores += (1 - inputs["beam_mask"]) * _NEVER
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
    flat = lambda scores: ops.reshape(scores, (ops.shape(scores)[0], -1))  # [B, R, L, W] → [B, S]
    span_scores, span_mask, span_correct = (
      flat(y_pred["span_scores"]),
      flat(y_pred["span_mask"]),
      flat(x["span_correct"]),
    )
    result = losses.marginal_span(
      y_pred["beam_scores"], x["beam_correct"], span_scores, span_mask, span_correct
    )
    best = ops.argmax(ops.where(span_mask > 0, span_scores, -1e9), axis=-1)
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

  @property
  def metrics(self):
    return list(self.means.values())
