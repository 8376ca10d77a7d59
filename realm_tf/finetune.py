"""Open-QA fine-tuning: the question tower and a span reader train, passage embeddings and index stay fixed (ORQA, section 5).

    python -m realm_tf.finetune --config=configs/quickstart.py --workdir=runs/quickstart/finetune

`config.finetune.retrieval` chooses the system: "dense" (the retriever of a snapshot), or one of the baselines, "bm25" (the same
reader over BM25's passages) and "none" (closed book). With `config.finetune.refresh_every_steps` the passage tower trains too,
and embeddings and index are refreshed as in pre-training. With `config.finetune.dev_questions` the snapshot with
the best exact match on them is published. Run again with the same workdir, it goes on where it stopped.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from realm_tf import (
    artifacts, bm25, closed_book, examples, index, ownership, passages, pretrain, questions, refresh,
    retrieval, settings, snapshots, training)
from realm_tf.models import span_reader
from realm_tf.models.open_qa import OpenQaModel
from realm_tf.models.retriever import Retriever
from realm_tf.optimizer import bert_optimizer
from realm_tf.qa_examples import QaExamples


class SyncTower(keras.callbacks.Callback):
  """Retrieval follows the question tower as it trains.

  Every few steps the training thread leaves a copy of the tower's weights here. The thread that
  makes batches puts them into the searching tower itself, before it embeds. So no weights change
  under it, and training waits for nothing.

  Args:
    live: the tower that trains.
    searching: a tower of the same sizes, which nobody else uses.
  """

  def __init__(self, live: keras.Model, searching: keras.Model, *, every_steps: int):
    super().__init__()
    self.live, self.searching, self.every_steps = live, searching, every_steps
    self.step = 0
    self._newest = self._taken = None
    self._searching = threading.Lock()

  def on_train_begin(self, logs=None):
    self._newest = self.live.get_weights()

  def on_train_batch_end(self, batch, logs=None):
    self.step += 1
    if self.step % self.every_steps == 0:
      self._newest = self.live.get_weights()

  def embed(self, query_ids: np.ndarray) -> np.ndarray:
    """Packed questions [B, Lq] int32 to vectors [B, D], all by the weights that were left last."""
    with self._searching:
      if self._newest is None:  # a batch that is made before training begins
        self._newest = self.live.get_weights()
      newest = self._newest
      if newest is not self._taken:
        self.searching.set_weights(newest)
        self._taken = newest
      return self.searching.predict_on_batch(query_ids)


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
  if section.dev_questions and (section.eval_every < 1 or section.eval_every % section.log_every):
    raise artifacts.UserError(
        f"finetune.eval_every is {section.eval_every}; with dev_questions it must be a multiple of "
        f"finetune.log_every, {section.log_every}.")
  rows = questions.read_questions(section.questions)
  if section.retrieval == "none":
    return closed_book.finetune(config, workdir, rows)
  table, tokenizer = passages.load(config.passages), settings.tokenizer(config.passages)
  reader = new_span_reader(config, tokenizer)
  base = snapshots.newest(section.retriever, advice="run realm_tf.pretrain first.")
  refreshed = section.retrieval == "dense" and section.refresh_every_steps > 0
  sizes = snapshots.model_config(base, "retriever")["config"]

  def ask(rows: Sequence[questions.Question]) -> QaExamples:
    return QaExamples(
        rows, table, tokenizer=tokenizer, search=None, embeddings=None, reader=reader,
        num_read=section.num_read, passage_length=sizes["passage_length"] if refreshed else 0,
        title_length=sizes.get("title_length"),
        raw=section.has_answer == "raw")

  data = ask(rows)
  dev = ask(questions.read_questions(section.dev_questions)) if section.dev_questions else None
  train = finetune_both_towers if refreshed else finetune_question_tower
  return train(config, workdir, data=data, dev=dev, base=base)


def finetune_question_tower(config, workdir: str, *, data: QaExamples, dev: QaExamples | None,
                            base: str) -> str:
  """Embeddings and index are those of the snapshot `base`, or BM25's; returns the new snapshot."""
  section, beam = config.finetune, min(config.finetune.beam, len(data.table))
  num_read = min(section.num_read, beam)
  if section.retrieval == "bm25":
    tower, embeddings, callbacks = None, None, []
    searcher = bm25.Bm25Searcher(data.table)
    search = lambda query_ids, texts: searcher.search(texts, beam)
    search_live = lambda query_ids, texts: searcher.search(texts, num_read)
  else:
    indexed = retrieval.load(index.folder_of(section.retriever, base), passages=config.passages, snapshot=base)
    embeddings = index.read_embeddings(indexed.folder, num_rows=len(data.table))
    with settings.scope(config):
      tower = snapshots.load_retriever(base).query_tower
    sync = SyncTower(tower, indexed.retriever.query_tower, every_steps=section.sync_steps)
    callbacks = [sync]
    search = lambda query_ids, texts: indexed.find(sync.embed(query_ids), beam)
    search_live = lambda query_ids, texts: indexed.find(np.asarray(tower(query_ids)), num_read)
  with settings.scope(config):
    model = OpenQaModel(tower, data.reader, sep_id=data.tokenizer.sep_id)

  def write_snapshot(root: str, step: int, more: Mapping) -> str:
    return publish(config, root, step, model=model, tokenizer=data.tokenizer, base=base, more=more)

  best = None
  if dev:
    asked = dev.over(search_live, embeddings)
    best = keep_best(config, workdir, model, lambda: asked, write_snapshot)
  searched = data.over(search, embeddings)
  said = _train(config, workdir, model, lambda step: searched, best=best, callbacks=callbacks,
                slow=tower.trainable_variables if tower else ())
  return write_snapshot(os.path.join(workdir, "snapshots"), section.steps, said)


def finetune_both_towers(config, workdir: str, *, data: QaExamples, dev: QaExamples | None,
                         base: str) -> str:
  """The passage tower trains too, from the passages read; a background job refreshes embeddings and index.

  Dev questions are asked of the index in use, with its own question tower, as training does.

  Returns:
    The last snapshot's folder; its index has the same number under W/indexes.
  """
  section, beam = config.finetune, min(config.finetune.beam, len(data.table))
  roots = {name: os.path.join(workdir, name) for name in ("snapshots", "indexes")}
  step = training.checkpoint_step(workdir)
  artifacts.gfile.makedirs(workdir)
  training.check_workdir(workdir, section.steps)
  ownership.check_numbered(roots["indexes"], kind=index.KIND)
  for root in roots.values():
    artifacts.remove_after(root, step)
  with settings.scope(config):
    retriever = snapshots.load_retriever(base)
    model = OpenQaModel(retriever.query_tower, data.reader, sep_id=data.tokenizer.sep_id, passage_tower=retriever.passage_tower)
  first = retrieval.load(index.folder_of(section.retriever, base), passages=config.passages, snapshot=base)
  current = pretrain.newest_index(config, workdir, dataclasses.replace(first, step=0))

  def write_snapshot(root: str, step: int, more: Mapping) -> str:
    details = {
        "retrieval": section.retrieval, "num_read": section.num_read,
        "index_snapshot": None,  # the index is its own
        **more}
    return snapshots.publish(
        root, step, {"retriever": retriever, "reader": data.reader}, tokenizer=data.tokenizer,
        made_by="finetune", details=details, inputs={"passages": config.passages})

  with refresh.Refresher(**roots, passages=config.passages, log=os.path.join(workdir, "refresh.log"), searcher=config.searcher,
                         start_job=config.refresh.start_job, job_args=config.refresh.job_args) as refresher:
    swapper = EmbeddedSwapper(EmbeddedIndex.of(current), newest_index=refresher.newest_index, snapshots_root=roots["snapshots"],
                              passages=config.passages)
    said = {}  # in the end, what info.json says of the best snapshot
    refreshing = pretrain.RefreshCallback(
        lambda step: write_snapshot(roots["snapshots"], step, said), swapper, refresher,
        workdir=workdir, step=step, every_steps=section.refresh_every_steps,
        recall=lambda indexed: {})

    def over(asked: QaExamples, now: EmbeddedIndex, num: int) -> QaExamples:
      return asked.over(lambda query_ids, texts: now.search(query_ids, num), now.embeddings)

    best = None
    if dev:
      num_read = min(section.num_read, beam)
      best = keep_best(
          config, workdir, model, lambda: over(dev, swapper.current, num_read), write_snapshot)
    said |= _train(
        config, workdir, model, lambda step: over(data, refreshing.index_for(step), beam), best=best,
        callbacks=[refreshing], slow=retriever.trainable_variables, metrics=refreshing.metrics)
  last = artifacts.step_folder(roots["snapshots"], section.steps)
  published = artifacts.read_info(last) if artifacts.is_complete(last) else None
  if published is None or published.get("best_step") != said.get("best_step"):
    last = refreshing.publish()
  pretrain.make_index(config, snapshots_root=roots["snapshots"], indexes=roots["indexes"])
  return last


def keep_best(config, workdir: str, model: OpenQaModel, asked: Callable[[], QaExamples],
              write_snapshot: Callable[[str, int, Mapping], str]) -> training.KeepBest:
  """Chooses the weights by exact match on the dev questions.

  Args:
    asked: gives the dev questions over what retrieves for them now.
    write_snapshot: see `training.KeepBest`.
  """
  score = tf.function(lambda inputs: model(inputs, training=False), reduce_retracing=True)

  def exact_match() -> float:
    now = asked()
    return closed_book.exact_match_of(now.rows, [answer.text for answer in now.answers(score)])

  section = config.finetune
  return training.KeepBest(
      exact_match, write_snapshot, lambda folder: restore(folder, model), workdir=workdir,
      every_steps=section.eval_every, steps=section.steps)


def restore(snapshot: str, model: OpenQaModel) -> None:
  """Gives the model the weights of a snapshot of it."""
  model.reader.set_weights(snapshots.load_model(snapshot, "reader").get_weights())
  if model.query_tower is None:
    model.score_weight.assign(artifacts.read_info(snapshot)["score_weight"])
    return
  retriever = snapshots.load_retriever(snapshot)
  model.query_tower.set_weights(retriever.query_tower.get_weights())
  if model.passage_tower is not None:
    model.passage_tower.set_weights(retriever.passage_tower.get_weights())


def _train(config, workdir: str, model: OpenQaModel, data: Callable[[int], QaExamples], *, slow,
           best: training.KeepBest | None, callbacks: Sequence[keras.callbacks.Callback],
           metrics: Callable[[], Mapping] = dict) -> Mapping:
  """Leaves the best weights in the model if `best` chose some; returns what info.json says of them."""
  section = config.finetune
  with model.distribute_strategy.scope():
    optimizer = bert_optimizer(
        learning_rate=section.learning_rate, steps=section.steps, slow=slow,
        slow_factor=section.retriever_learning_rate_ratio, **config.optimizer)
  training.train(
      model, lambda step: data(step).batch(
          step, batch_size=section.batch_size, seed=config.seed + 3),
      workdir=workdir, steps=section.steps, log_every=section.log_every,
      checkpoint_every=section.checkpoint_every, batch_size=section.batch_size,
      jit_compile=config.jit_compile, optimizer=optimizer, extra_metrics=metrics,
      callbacks=callbacks, best=best)
  return best.take() if best else {}


def new_span_reader(config, tokenizer) -> span_reader.SpanReader:
  """A span reader whose encoder is that of `config.finetune.reader`, or of `config.encoder` where that is empty."""
  section = config.finetune
  sizes = dict(
      query_length=config.retriever.query_length, length=section.reader_length, max_span=section.max_span, span_dim=section.span_dim)
  if not section.reader:
    architecture, published_bert = settings.new_encoder(config.encoder, tokenizer, section.reader_length)
    with settings.scope(config):
      reader = span_reader.SpanReader(architecture=architecture, **sizes)
    settings.start_encoder(reader.encoder, published_bert, config.encoder.init_std)
    return reader
  snapshot = snapshots.newest(config.finetune.reader, advice="run realm_tf.pretrain first.")
  examples.check_vocabulary(artifacts.read_info(snapshot), snapshot, tokenizer)
  masked = snapshots.load_model(snapshot, "reader")
  with settings.scope(config):
    reader = span_reader.SpanReader(architecture=masked.get_config()["architecture"], **sizes)
  reader.encoder.set_weights(masked.encoder.get_weights())
  return reader


def publish(
  config, root: str, step: int, *, model: OpenQaModel, tokenizer, base: str, more: Mapping
) -> str:
  """Writes a fine-tuned snapshot: the trained question tower beside the index's passage tower.

  Args:
    base: the snapshot that training started from.
    more: for info.json.
  """
  models = {"reader": model.reader}
  details = {
    "retrieval": config.finetune.retrieval,
    "num_read": config.finetune.num_read,
    **more,
  }
  inputs = {"passages": config.passages}
  if model.query_tower is not None:
    before = snapshots.load_retriever(base)
    models["retriever"] = Retriever(**before.get_config() | {"shared": False})
    models["retriever"].passage_tower.set_weights(before.passage_tower.get_weights())
    models["retriever"].query_tower.set_weights(model.query_tower.get_weights())
    inputs["index"] = index.folder_of(config.finetune.retriever, base)
    details["index_snapshot"] = artifacts.read_info(base)["fingerprint"]
  else:
    details["score_weight"] = float(model.score_weight.numpy())
  return snapshots.publish(
    root, step, models, tokenizer=tokenizer, made_by="finetune", details=details, inputs=inputs
  )


if __name__ == "__main__":
  settings.start_trainer(finetune, section="finetune")
