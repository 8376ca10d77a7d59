"""Open-QA fine-tuning: the question tower and a span reader train, passage embeddings and index stay fixed (ORQA, section 5).

    python -m realm_tf.finetune --config=configs/quickstart.py --workdir=runs/quickstart/finetune

`config.finetune.retrieval` chooses the system: "dense" (the retriever of a snapshot), or one of the baselines, "bm25" (the same
reader over BM25's passages) and "none" (closed book). With `config.finetune.refresh_every_steps` the passage tower trains too,
and embeddings and index are refreshed as in pre-training. Run again with the same workdir, it goes on where it stopped.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from realm_tf import (
    artifacts, bm25, closed_book, devices, examples, index, losses, metrics, passages, pretrain, questions, refresh, retrieval, settings,
    snapshots, training)
from realm_tf.models import span_reader
from realm_tf.models.retriever import Retriever
from realm_tf.optimizer import bert_optimizer

_NEVER = -1e9  # score of a place in the beam that the searcher left empty

# ============================================================================================================== model


class OpenQaModel(keras.Model):
  """Retrieval scores of a beam of passages and span scores of its best.

  Args:
    query_tower: embeds questions; None takes the beam's scores as they come, times a learned weight (BM25).
    reader: scores spans.
    passage_tower: embeds the passages read anew, so that it learns; None takes all embeddings as they come.
  """

  def __init__(self, query_tower: keras.Model | None, reader: span_reader.SpanReader, *, sep_id: int,
               passage_tower: keras.Model | None = None):
    super().__init__(name="open_qa", dtype="float32")  # of its inputs too
    self.query_tower, self.passage_tower, self.reader, self.sep_id = query_tower, passage_tower, reader, sep_id
    if query_tower is None:
      self.score_weight = self.add_weight(shape=(), initializer="ones", name="score_weight")
    self.means = {name: keras.metrics.Mean(name) for name in (
        "loss", "retriever_loss", "reader_loss", "reader_exact_match", "beam_has_answer", "reader_oracle")}
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
        read = self.passage_tower(flat(inputs["passage_ids"]), flat(inputs["passage_segments"]), training=training)  # [B * R, D]
        vectors = ops.concatenate([ops.reshape(read, (-1, num_read, read.shape[-1])), vectors[:, num_read:]], axis=1)
      beam_scores = ops.einsum("bd,bkd->bk", queries, vectors)
    beam_scores += (1 - inputs["beam_mask"]) * _NEVER
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
                        ("reader_exact_match", right), ("beam_has_answer", ops.max(x["beam_correct"], axis=-1)),
                        ("reader_oracle", ops.max(span_mask * span_correct, axis=-1))):
      self.means[name].update_state(value)
    return loss / devices.count()

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
    embeddings: [N, D] passage embeddings, or None where the scores come from `search`.
    num_read: R.
    passage_length: Lp of the packed passages that a training passage tower embeds anew; 0 where there is none.
    raw: how the beam is labelled, see `metrics.AnswerMatcher`.
  """

  def __init__(self, rows: Sequence[questions.Question], table: passages.PassageTable, *, tokenizer, search: Callable | None,
               embeddings: np.ndarray | None, reader: span_reader.SpanReader, num_read: int, passage_length: int = 0,
               raw: bool = False):
    self.rows, self.table, self.tokenizer, self.search = rows, table, tokenizer, search
    self.embeddings, self.reader, self.num_read, self.passage_length = embeddings, reader, num_read, passage_length
    self.ids = passages.Ragged.of(tokenizer([row.text for row in rows]).to_list(), np.int32)
    self.answer_ids = [[] if row.regex or not row.answers else tokenizer(row.answers).to_list() for row in rows]
    self.matcher = metrics.AnswerMatcher(table.texts, raw=raw)
    self._ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (question, passage) -> where its expressions match

  def over(self, search: Callable, embeddings: np.ndarray | None) -> "QaExamples":
    """The same questions with another retriever's beams."""
    other = copy.copy(self)
    other.search, other.embeddings = search, embeddings
    return other

  def batch(self, step: int, *, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """What `OpenQaModel` takes, with its labels, for training step `step`."""
    rows = examples.epoch_rows(len(self.rows), step, batch_size, seed)
    inputs, numbers = self.inputs(rows)
    return {**inputs, "beam_correct": self.beam_correct(rows, numbers), "span_correct": self.span_correct(rows, numbers, inputs)}

  def inputs(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The model's inputs for these questions, and the beam's passage numbers [B, K]."""
    query_ids = examples.pack_queries(self.ids.gather(rows), tokenizer=self.tokenizer, length=self.reader.query_length).numpy()
    found = self.search(query_ids, [self.rows[row].text for row in rows])
    read = found.numbers[:, :self.num_read]
    titles, texts = examples.gather_passages(self.table, read)
    packed = examples.pack_reader(
        self.ids.gather(np.repeat(rows, read.shape[1])), texts, tokenizer=self.tokenizer,
        query_length=self.reader.query_length, length=self.reader.length)
    shaped = lambda tensor: tensor.numpy().reshape(*read.shape, -1)  # [B * R, L] → [B, R, L]
    made = {"query_ids": query_ids, "beam_mask": (found.numbers != index.MISSING).astype(np.float32),
            "reader_ids": shaped(packed.token_ids), "reader_segments": shaped(packed.segment_ids)}
    if self.embeddings is None:
      made["beam_scores"] = found.scores
    else:
      made["beam_embeddings"] = self.embeddings[found.numbers]
    if self.passage_length:
      packed = examples.pack_passages(titles, texts, tokenizer=self.tokenizer, length=self.passage_length)
      made |= {"passage_ids": shaped(packed.token_ids), "passage_segments": shaped(packed.segment_ids)}
    return made, found.numbers

  def beam_correct(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Which passages of the beam have an answer: [B, K] float32."""
    return np.array([self.matcher.has_answer(found, self.rows[row].answers, regex=self.rows[row].regex)
                     for row, found in zip(rows, numbers)], np.float32)

  def span_correct(self, rows: np.ndarray, numbers: np.ndarray, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Which spans of the passages read are an answer, every occurrence of every one: [B, R, L, W] float32."""
    return np.stack([self._spans(row, read, ids, segments) for row, read, ids, segments in zip(
        rows, numbers[:, :self.num_read], inputs["reader_ids"], inputs["reader_segments"])])

  def _spans(self, row: int, read: np.ndarray, ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
    if not self.rows[row].regex:
      return examples.answer_spans(ids, segments, self.answer_ids[row], tokenizer=self.tokenizer, max_span=self.reader.max_span)
    ranges = [[] if number == index.MISSING else self._expression_ranges(int(row), int(number)) for number in read]
    return examples.mark_spans(ranges, segments, max_span=self.reader.max_span)

  def _expression_ranges(self, row: int, number: int) -> list[tuple[int, int]]:
    """Word-piece ranges of a passage that a question's expressions match: whole words that would count as right if predicted."""
    if (row, number) not in self._ranges:
      text, found = self.table.texts[number], set()
      encoded, starts, ends = text.encode(), self.table.token_starts[number], self.table.token_ends[number]
      for expression in map(metrics.expression, self.rows[row].answers):
        for start, end in expression.ranges(text):
          words = examples.whole_words(
              self.table, number, len(text[:start].encode()), len(text[:end].encode()), tokenizer=self.tokenizer)
          if words and expression.matches(encoded[starts[words[0]]:ends[words[1] - 1]].decode()):
            found.add(words)
      self._ranges[row, number] = sorted(found)
    return self._ranges[row, number]


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


@dataclasses.dataclass(frozen=True)
class EmbeddedIndex(retrieval.IndexedRetriever):
  """An index with its passage embeddings in memory, [N, D] float32."""

  embeddings: np.ndarray

  @classmethod
  def of(cls, indexed: retrieval.IndexedRetriever) -> "EmbeddedIndex":
    return cls(**vars(indexed), embeddings=index.read_embeddings(indexed.folder, num_rows=indexed.searcher.num_rows))


class EmbeddedSwapper(retrieval.Swapper):
  """Hands index and embeddings over together."""

  def _load(self, folder: str) -> EmbeddedIndex:
    return EmbeddedIndex.of(super()._load(folder))


def finetune(config, workdir: str) -> str:
  """Trains the system that `config.finetune.retrieval` names; returns its snapshot's folder.

  Raises:
    ArtifactError: inputs missing, or not belonging together.
    UserError: no usable question, or a setting that there is not.
  """
  keras.utils.set_random_seed(config.seed)
  section = config.finetune
  if section.has_answer not in ("tokens", "raw"):
    raise artifacts.UserError(f"finetune.has_answer is {section.has_answer!r}; use 'tokens' or 'raw'.")
  rows = questions.read_questions(section.questions)
  if section.retrieval == "none":
    return closed_book.finetune(config, workdir, rows)
  table, tokenizer = passages.load(config.passages), settings.tokenizer(config.passages)
  reader = new_span_reader(config, tokenizer)
  base = snapshots.newest(section.retriever, advice="run realm_tf.pretrain first.")
  refreshed = section.retrieval == "dense" and section.refresh_every_steps > 0
  data = QaExamples(
      rows, table, tokenizer=tokenizer, search=None, embeddings=None, reader=reader, num_read=section.num_read,
      passage_length=snapshots.model_config(base, "retriever")["config"]["passage_length"] if refreshed else 0,
      raw=section.has_answer == "raw")
  return (finetune_both_towers if refreshed else finetune_question_tower)(config, workdir, data, base)


def finetune_question_tower(config, workdir: str, data: QaExamples, base: str) -> str:
  """Embeddings and index are those of the snapshot `base`, or BM25's; returns the new snapshot."""
  section, beam = config.finetune, min(config.finetune.beam, len(data.table))
  if section.retrieval == "bm25":
    tower, embeddings, callbacks = None, None, []
    searcher = bm25.Bm25Searcher(data.table)
    search = lambda query_ids, texts: searcher.search(texts, beam)
  else:
    indexed = retrieval.load(index.folder_of(section.retriever, base), passages=config.passages, snapshot=base)
    embeddings = index.read_embeddings(indexed.folder, num_rows=len(data.table))
    with settings.scope(config):
      tower = snapshots.load_retriever(base).query_tower
    callbacks = [SyncTower(tower, indexed.retriever.query_tower, every_steps=section.sync_steps)]
    search = lambda query_ids, texts: indexed.search(query_ids, beam)
  with settings.scope(config):
    model = OpenQaModel(tower, data.reader, sep_id=data.tokenizer.sep_id)
  _train(config, workdir, model, lambda: data.over(search, embeddings), slow=tower.trainable_variables if tower else (),
         callbacks=callbacks)
  return publish(config, workdir, model, data.tokenizer, base)


def finetune_both_towers(config, workdir: str, data: QaExamples, base: str) -> str:
  """The passage tower trains too, from the passages read; a background job refreshes embeddings and index.

  Returns:
    The last snapshot's folder; its index has the same number under W/indexes.
  """
  section, beam = config.finetune, min(config.finetune.beam, len(data.table))
  roots = {name: os.path.join(workdir, name) for name in ("snapshots", "indexes")}
  start = artifacts.latest(os.path.join(workdir, "checkpoints"))
  step = artifacts.step_of(start) if start else 0
  artifacts.gfile.makedirs(workdir)
  for root in roots.values():
    artifacts.remove_after(root, step)
  with settings.scope(config):
    retriever = snapshots.load_retriever(base)
    model = OpenQaModel(retriever.query_tower, data.reader, sep_id=data.tokenizer.sep_id, passage_tower=retriever.passage_tower)
  first = retrieval.load(index.folder_of(section.retriever, base), passages=config.passages, snapshot=base)
  current = pretrain.newest_index(config, workdir, dataclasses.replace(first, step=0))

  def write_snapshot(step: int) -> str:
    details = {"retrieval": section.retrieval, "passages": config.passages, "num_read": section.num_read,
               "index": artifacts.step_folder(roots["indexes"], step), "index_snapshot": None}  # the index is its own
    return snapshots.publish(roots["snapshots"], step, {"retriever": retriever, "reader": data.reader}, tokenizer=data.tokenizer,
                             made_by="finetune", details=details)

  with refresh.Refresher(**roots, passages=config.passages, log=os.path.join(workdir, "refresh.log"), searcher=config.searcher,
                         start_job=config.refresh.start_job, job_args=config.refresh.job_args) as refresher:
    swapper = EmbeddedSwapper(EmbeddedIndex.of(current), newest_index=refresher.newest_index, snapshots_root=roots["snapshots"],
                              passages=config.passages)
    refreshing = pretrain.RefreshCallback(write_snapshot, swapper, refresher, workdir=workdir, step=step,
                                          every_steps=section.refresh_every_steps, recall=lambda indexed: {})

    def over_current() -> QaExamples:
      now = swapper.current
      return data.over(lambda query_ids, texts: now.search(query_ids, beam), now.embeddings)

    _train(config, workdir, model, over_current, slow=retriever.trainable_variables, callbacks=[refreshing],
           extra_metrics=refreshing.metrics)
  last = artifacts.step_folder(roots["snapshots"], section.steps)
  if not artifacts.is_complete(last):
    last = refreshing.publish()
  pretrain.make_index(config, snapshots_root=roots["snapshots"], indexes=roots["indexes"])
  return last


def _train(config, workdir: str, model: OpenQaModel, data: Callable[[], QaExamples], *, slow, **what) -> None:
  section = config.finetune
  with model.distribute_strategy.scope():
    optimizer = bert_optimizer(
        learning_rate=section.learning_rate, steps=section.steps, slow=slow,
        slow_factor=section.retriever_learning_rate_ratio, **config.optimizer)
  training.train(
      model, lambda step: data().batch(step, batch_size=section.batch_size, seed=config.seed + 3), workdir=workdir,
      steps=section.steps, log_every=section.log_every, checkpoint_every=section.checkpoint_every,
      batch_size=section.batch_size, jit_compile=config.jit_compile, optimizer=optimizer, **what)


def new_span_reader(config, tokenizer) -> span_reader.SpanReader:
  """A span reader whose encoder is the pre-trained masked reader's."""
  snapshot = snapshots.newest(config.finetune.reader, advice="run realm_tf.pretrain first.")
  examples.check_vocabulary(artifacts.read_info(snapshot), snapshot, tokenizer)
  masked = snapshots.load_model(snapshot, "reader")
  with settings.scope(config):
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
    details |= {"index": index.folder_of(config.finetune.retriever, base), "index_snapshot": artifacts.read_info(base)["fingerprint"]}
  else:
    details["score_weight"] = float(model.score_weight.numpy())
  return snapshots.publish(os.path.join(workdir, "snapshots"), config.finetune.steps, models, tokenizer=tokenizer,
                           made_by="finetune", details=details)


if __name__ == "__main__":
  settings.start_trainer(finetune, section="finetune")
