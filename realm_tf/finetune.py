"""Open-QA fine-tuning: passage embeddings and index stay fixed, the question tower and a span reader train (ORQA, section 5).

    python -m realm_tf.finetune --config=configs/quickstart.py --workdir=runs/quickstart/finetune

`config.finetune.retrieval` chooses the system: "dense" (the retriever of a snapshot), or one of the baselines, "bm25" (the same
reader over BM25's passages) and "none" (closed book). Run again with the same workdir, it goes on where it stopped.
"""

import os

import keras
import numpy as np
from keras import ops

from realm_tf import (
    artifacts, bm25, closed_book, examples, index, losses, metrics, passages, questions, retrieval, settings, snapshots, training)
from realm_tf.models import span_reader
from realm_tf.models.retriever import Retriever

# ============================================================================================================== model


class OpenQaModel(keras.Model):
  """Retrieval scores of a beam of passages and span scores of its best.

  Args:
    query_tower: embeds questions; None takes the beam's scores as they come, times a learned weight (BM25).
    reader: scores spans.
  """

  def __init__(self, query_tower: keras.Model | None, reader: span_reader.SpanReader, *, sep_id: int):
    super().__init__(name="open_qa")
    self.query_tower, self.reader, self.sep_id = query_tower, reader, sep_id
    if query_tower is None:
      self.score_weight = self.add_weight(shape=(), initializer="ones", name="score_weight")
    self.means = {name: keras.metrics.Mean(name) for name in ("loss", "retriever_loss", "reader_loss", "reader_exact_match")}
    self.built = True  # its weights are the tower's and the reader's

  def call(self, inputs, training=False):
    """Scores.

    Args:
      inputs: query_ids [B, Lq]; beam_embeddings [B, K, D], or beam_scores [B, K]; reader_ids, reader_segments [B, R, L] of the
        beam's first R passages.

    Returns:
      beam_scores [B, K]; span_scores [B, R, L, W], retrieval score added; span_mask [B, R, L, W].
    """
    if self.query_tower is None:
      beam_scores = inputs["beam_scores"] * self.score_weight
    else:
      queries = self.query_tower(inputs["query_ids"], training=training)  # [B, D]
      beam_scores = ops.einsum("bd,bkd->bk", queries, inputs["beam_embeddings"])
    ids, segments = inputs["reader_ids"], inputs["reader_segments"]
    num_read, length = ids.shape[1], ids.shape[2]
    flat = lambda x: ops.reshape(x, (-1, length))  # [B, R, L] → [B * R, L]
    scores = self.reader({"token_ids": flat(ids), "segment_ids": flat(segments)}, training=training)  # [B * R, L, W]
    mask = span_reader.span_mask(flat(ids), flat(segments), sep_id=self.sep_id, max_span=self.reader.max_span)
    shape = (-1, num_read, length, self.reader.max_span)
    span_scores = ops.reshape(scores, shape) + beam_scores[:, :num_read, None, None]
    return {"beam_scores": beam_scores, "span_scores": span_scores, "span_mask": ops.reshape(mask, shape)}

  def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    flat = lambda scores: ops.reshape(scores, (ops.shape(scores)[0], -1))  # [B, R, L, W] → [B, S]
    span_scores, span_mask, span_correct = flat(y_pred["span_scores"]), flat(y_pred["span_mask"]), flat(x["span_correct"])
    result = losses.marginal_span(y_pred["beam_scores"], x["beam_correct"], span_scores, span_mask, span_correct)
    best = ops.argmax(ops.where(span_mask > 0, span_scores, -1e9), axis=-1)
    right = ops.take_along_axis(span_correct, ops.expand_dims(best, -1), axis=-1)
    loss = ops.mean(result.retriever + result.reader)
    for name, value in (("loss", loss), ("retriever_loss", result.retriever), ("reader_loss", result.reader),
                        ("reader_exact_match", right)):
      self.means[name].update_state(value)
    return loss

  @property
  def metrics(self):
    return list(self.means.values())


# =============================================================================================================== data


class QaExamples:
  """Questions with the beam of passages that a retriever finds for them.

  Args:
    rows: the questions.
    table: the knowledge corpus.
    search: packed question ids [B, Lq] and question texts → `retrieval.Found` of `beam` passages.
    embeddings: [N, D] fixed passage embeddings, or None where the scores come from `search`.
    num_read: R.
  """

  def __init__(self, rows, table: passages.PassageTable, *, tokenizer, search, embeddings: np.ndarray | None,
               reader: span_reader.SpanReader, num_read: int):
    self.rows, self.table, self.tokenizer, self.search = rows, table, tokenizer, search
    self.embeddings, self.reader, self.num_read = embeddings, reader, num_read
    self.ids = passages.Ragged.of(tokenizer([row.text for row in rows]).to_list(), np.int32)
    self.answer_ids = [tokenizer(row.answers).to_list() for row in rows]
    self.matcher = metrics.AnswerMatcher(table.texts)

  def batch(self, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """What `OpenQaModel` takes, with its labels, for training step `step`."""
    return self.inputs(examples.epoch_rows(len(self.rows), step, batch_size, seed))[0]

  def inputs(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The model's inputs for these questions, and the beam's passage numbers [B, K]."""
    query_ids = examples.pack_queries(self.ids.gather(rows), tokenizer=self.tokenizer, length=self.reader.query_length).numpy()
    found = self.search(query_ids, [self.rows[row].text for row in rows])
    read = found.numbers[:, :self.num_read]
    _, texts = examples.gather_passages(self.table, read)
    packed = examples.pack_reader(
        self.ids.gather(np.repeat(rows, read.shape[1])), texts, tokenizer=self.tokenizer,
        query_length=self.reader.query_length, length=self.reader.length)
    reader_ids, segments = (part.numpy().reshape(*read.shape, -1) for part in packed)
    beam = {"beam_scores": found.scores} if self.embeddings is None else {"beam_embeddings": self.embeddings[found.numbers]}
    correct = [self.matcher.has_answer(numbers, self.rows[row].answers) for row, numbers in zip(rows, found.numbers)]
    spans = [examples.answer_spans(ids, segment, self.answer_ids[row], tokenizer=self.tokenizer, max_span=self.reader.max_span)
             for row, ids, segment in zip(rows, reader_ids, segments)]
    return {
        "query_ids": query_ids, **beam, "beam_correct": np.array(correct, np.float32), "reader_ids": reader_ids,
        "reader_segments": segments, "span_correct": np.stack(spans)}, found.numbers


# =========================================================================================================== training


class SyncTower(keras.callbacks.Callback):
  """Retrieval follows the question tower as it trains: copies its weights into the searching tower every few steps."""

  def __init__(self, live: keras.Model, searching: keras.Model, *, every_steps: int):
    super().__init__()
    self.live, self.searching, self.every_steps = live, searching, every_steps
    self.step = 0

  def on_train_begin(self, logs=None):
    self.searching.set_weights(self.live.get_weights())

  def on_train_batch_end(self, batch, logs=None):
    self.step += 1
    if self.step % self.every_steps == 0:
      self.searching.set_weights(self.live.get_weights())


def finetune(config, workdir: str) -> str:
  """Trains the system that `config.finetune.retrieval` names; returns its snapshot's folder.

  Raises:
    ArtifactError: inputs missing, or not belonging together.
    UserError: no usable question.
  """
  keras.utils.set_random_seed(config.seed)
  section = config.finetune
  rows = questions.read_questions(section.questions)
  if section.retrieval == "none":
    return closed_book.finetune(config, workdir, rows)
  table, tokenizer = passages.load(config.passages), settings.tokenizer(config.passages)
  reader = new_span_reader(config, tokenizer)
  base = snapshots.newest(section.retriever, advice="run realm_tf.pretrain first.")
  if section.retrieval == "bm25":
    tower, embeddings, callbacks = None, None, []
    searcher = bm25.Bm25Searcher(table)
    search = lambda query_ids, texts: searcher.search(texts, min(section.beam, len(table)))
  else:
    index_folder = artifacts.step_folder(os.path.join(section.retriever, "indexes"), artifacts.step_of(base))
    indexed = retrieval.load(index_folder, passages=config.passages, snapshot=base)
    embeddings = index.read_embeddings(index_folder, num_rows=len(table))
    tower = snapshots.load_retriever(base).query_tower
    callbacks = [SyncTower(tower, indexed.retriever.query_tower, every_steps=section.sync_steps)]
    search = lambda query_ids, texts: indexed.search(query_ids, min(section.beam, len(table)))
  data = QaExamples(rows, table, tokenizer=tokenizer, search=search, embeddings=embeddings, reader=reader, num_read=section.num_read)
  model = OpenQaModel(tower, reader, sep_id=tokenizer.sep_id)
  training.train(
      model, lambda step: data.batch(step, batch_size=section.batch_size, seed=config.seed + 3), workdir=workdir,
      steps=section.steps, log_every=section.log_every, checkpoint_every=section.checkpoint_every,
      batch_size=section.batch_size, jit_compile=config.jit_compile, callbacks=callbacks,
      optimizer=training.bert_optimizer(
          learning_rate=section.learning_rate, steps=section.steps,
          slow=tower.trainable_variables if tower else (), slow_factor=section.retriever_learning_rate_ratio))
  return publish(config, workdir, model, tokenizer, base)


def new_span_reader(config, tokenizer) -> span_reader.SpanReader:
  """A span reader whose encoder is the pre-trained masked reader's."""
  snapshot = snapshots.newest(config.finetune.reader, advice="run realm_tf.pretrain first.")
  examples.check_vocabulary(artifacts.read_info(snapshot), snapshot, tokenizer)
  masked = snapshots.load_model(snapshot, "reader")
  reader = span_reader.SpanReader(
      architecture=masked.get_config()["architecture"], query_length=config.retriever.query_length,
      length=config.finetune.reader_length, max_span=config.finetune.max_span, span_dim=config.finetune.span_dim)
  reader.encoder.set_weights(masked.encoder.get_weights())
  return reader


def publish(config, workdir: str, model: OpenQaModel, tokenizer, base: str) -> str:
  """Writes the fine-tuned snapshot: the trained question tower beside the passage tower that the index came from."""
  models = {"reader": model.reader}
  details = {"retrieval": config.finetune.retrieval, "passages": config.passages, "num_read": config.finetune.num_read}
  if model.query_tower is not None:
    before = snapshots.load_retriever(base)
    models["retriever"] = Retriever(**before.get_config() | {"shared": False})
    models["retriever"].passage_tower.set_weights(before.passage_tower.get_weights())
    models["retriever"].query_tower.set_weights(model.query_tower.get_weights())
    details |= {"index": artifacts.step_folder(os.path.join(config.finetune.retriever, "indexes"), artifacts.step_of(base)),
                "index_snapshot": artifacts.read_info(base)["fingerprint"]}
  else:
    details["score_weight"] = float(model.score_weight.numpy())
  return snapshots.publish(os.path.join(workdir, "snapshots"), config.finetune.steps, models, tokenizer=tokenizer,
                           made_by="finetune", details=details)


if __name__ == "__main__":
  settings.start_trainer(finetune, section="finetune")
