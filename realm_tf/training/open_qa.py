"""Trains an `OpenQaModel`: a span reader and the question tower, or both towers (ORQA, 5)."""

import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Mapping

import keras
import numpy as np
import tensorflow as tf

from realm_tf import errors
from realm_tf.examples import questions
from realm_tf.examples.open_qa import QaExamples
from realm_tf.models import snapshots
from realm_tf.models.open_qa import OpenQaModel
from realm_tf.models.retriever import Retriever
from realm_tf.retrieval import bm25, dense, index
from realm_tf.storage import artifacts
from realm_tf.systems.workdir import BM25, DENSE, SnapshotInfo, fine_tuned
from realm_tf.training import closed_book, loop, refresh, refreshed_training


class SyncTower(keras.callbacks.Callback):
  """Keeps retrieval in step with the question tower as it trains.

  Every few steps the training thread leaves a copy of the tower's weights here. The thread that
  makes batches loads them into the searching tower before it embeds. So weights never change during
  a search, and training never waits.

  Args:
    live: the tower that trains.
    searching: a tower of the same sizes, used only here.
    every_steps: steps between two copies.
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
    """Embeds packed questions [B, Lq] int32 as [B, D], with the weights copied last."""
    with self._searching:
      if self._newest is None:  # a batch made before training begins
        self._newest = self.live.get_weights()
      newest = self._newest
      if newest is not self._taken:
        self.searching.set_weights(newest)
        self._taken = newest
      return self.searching.predict_on_batch(query_ids)


@dataclasses.dataclass(frozen=True)
class EmbeddedIndex(dense.IndexedRetriever):
  """An index with its passage embeddings in memory, [N, D] of the type that it stores."""

  embeddings: np.ndarray

  @classmethod
  def of(cls, indexed: dense.IndexedRetriever) -> "EmbeddedIndex":
    num_rows = artifacts.read_info(indexed.folder)["counts"]["passages"]
    return cls(**vars(indexed), embeddings=index.read_embeddings(indexed.folder, num_rows=num_rows))


@dataclasses.dataclass(frozen=True)
class FineTuning:
  """Settings for fine-tuning a system that retrieves.

  Attributes:
    passages: folder of the knowledge corpus.
    retrieval: "dense" or "bm25".
    retriever: workdir with snapshots/ and indexes/ to start from.
    num_read: passages read, R.
    beam: passages in the retriever's loss, K.
    has_answer: how passages are matched with answers: "tokens" (normalised words) or "raw".
    slow_factor: the towers' learning rate, as a multiple of the reader's.
    sync_steps: steps between two copies of the question tower's weights for retrieval.
    refresh_every_steps: steps between snapshots that the passages are embedded from; 0 keeps the
      first embeddings.
    eval_every: steps between two evaluations on the dev questions.
    schedule, setup, seed: settings of the training.
  """

  passages: str
  retrieval: str
  retriever: str
  num_read: int
  beam: int
  has_answer: str
  slow_factor: float
  sync_steps: int
  refresh_every_steps: int
  eval_every: int
  schedule: loop.Schedule
  setup: loop.Setup
  seed: int

  @property
  def refreshed(self) -> bool:
    """Whether the passage tower trains too."""
    return self.retrieval == "dense" and self.refresh_every_steps > 0

  def check(self, *, has_dev: bool) -> None:
    """Checks that the settings are valid and compatible.

    Args:
      has_dev: whether there are dev questions.

    Raises:
      UserError: they are not.
    """
    if self.has_answer not in ("tokens", "raw"):
      raise errors.UserError(f"finetune.has_answer is {self.has_answer!r}; use 'tokens' or 'raw'.")
    log_every = self.schedule.log_every
    if has_dev and (self.eval_every < 1 or self.eval_every % log_every):
      raise errors.UserError(
        f"finetune.eval_every is {self.eval_every}; with dev_questions it must be a multiple of "
        f"finetune.log_every, {log_every}."
      )


def train_question_tower(
  how: FineTuning, workdir: str, *, data: QaExamples, dev: QaExamples | None, base: str
) -> str:
  """Trains the reader, and the question tower unless retrieval is by BM25.

  Embeddings and index are those of the snapshot `base`, or BM25's.

  Returns:
    The new snapshot's folder.
  """
  schedule, setup, beam = how.schedule, how.setup, min(how.beam, data.table.num_alive)
  num_read = min(how.num_read, beam)
  if how.retrieval == "bm25":
    tower, embeddings, callbacks = None, None, []
    searcher = bm25.Bm25Searcher(data.table)

    def search(query_ids, texts):
      return searcher.search(texts, beam)

    def search_live(query_ids, texts):
      return searcher.search(texts, num_read)
  else:
    indexed = dense.load(index.folder_of(how.retriever, base), table=data.table, snapshot=base)
    embeddings = index.read_embeddings(indexed.folder, num_rows=len(data.table))
    with setup.scope():
      tower = snapshots.load_retriever(base).query_tower
    sync = SyncTower(tower, indexed.retriever.query_tower, every_steps=how.sync_steps)
    callbacks = [sync]

    def search(query_ids, texts):
      return indexed.find(sync.embed(query_ids), beam)

    def search_live(query_ids, texts):
      return indexed.find(np.asarray(tower(query_ids)), num_read)

  with setup.scope():
    model = OpenQaModel(tower, data.reader, sep_id=data.tokenizer.sep_id)
    optimizer = setup.optimizer(
      schedule, slow=tower.trainable_variables if tower else (), slow_factor=how.slow_factor
    )

  def write_snapshot(root: str, step: int, more: Mapping) -> str:
    return publish(how, root, step, model=model, tokenizer=data.tokenizer, base=base, more=more)

  best = None
  if dev:
    asked = dev.over(search_live, embeddings, data.table)
    best = keep_best(how, workdir, model, lambda: asked, write_snapshot)
  searched = data.over(search, embeddings, data.table)
  loop.train(
    model,
    lambda step: searched.batch(step, batch_size=schedule.batch_size, seed=how.seed + 3),
    workdir=workdir,
    schedule=schedule,
    jit_compile=setup.jit_compile,
    optimizer=optimizer,
    callbacks=callbacks,
    best=best,
    made_from=made_from(data, base if how.retrieval == DENSE else None),
  )
  said = best.take() if best else {}
  return write_snapshot(os.path.join(workdir, "snapshots"), schedule.steps, said)


def train_both_towers(
  how: FineTuning,
  workdir: str,
  *,
  data: QaExamples,
  dev: QaExamples | None,
  base: str,
  job: refresh.RefreshJob,
) -> str:
  """Trains both towers and the reader; the passage tower learns from the passages read.

  A background job refreshes embeddings and index. Dev questions are answered with the current index
  and its own question tower, as in training.

  Returns:
    The last snapshot's folder; its index has the same number under W/indexes.
  """
  # ---- Models, and the first index
  schedule, setup, beam = how.schedule, how.setup, min(how.beam, data.table.num_alive)
  refreshed_training.check_workdir(workdir, schedule.steps)
  with setup.scope():
    retriever = snapshots.load_retriever(base)
    model = OpenQaModel(
      retriever.query_tower,
      data.reader,
      sep_id=data.tokenizer.sep_id,
      passage_tower=retriever.passage_tower,
    )
    optimizer = setup.optimizer(
      schedule, slow=retriever.trainable_variables, slow_factor=how.slow_factor
    )
  first = dense.load(index.folder_of(how.retriever, base), table=data.table, snapshot=base)

  # ---- Training, with refreshes
  write_snapshot = snapshots.publisher(
    {"retriever": retriever, "reader": data.reader},
    tokenizer=data.tokenizer,
    made_by="finetune",
    # the snapshot has its own index
    details=fine_tuned(DENSE, num_read=how.num_read, index_snapshot=None),
    inputs={"passages": how.passages},
  )

  def over(asked: QaExamples, now: dense.IndexedRetriever, num: int) -> QaExamples:
    assert isinstance(now, EmbeddedIndex), "`prepare` below makes one of each index"
    most = min(num, now.num_rows)  # an update may have deleted passages
    return asked.over(
      lambda query_ids, texts: now.search(query_ids, most), now.embeddings, now.table
    )

  def batch(step: int, now: dense.IndexedRetriever) -> dict[str, np.ndarray]:
    return over(data, now, beam).batch(step, batch_size=schedule.batch_size, seed=how.seed + 3)

  def best_on(asked: QaExamples, in_use: Callable[[], dense.IndexedRetriever]) -> loop.KeepBest:
    num_read = min(how.num_read, beam)
    return keep_best(how, workdir, model, lambda: over(asked, in_use(), num_read), write_snapshot)

  last = refreshed_training.train_with_refresh(
    model,
    batch,
    workdir=workdir,
    schedule=schedule,
    optimizer=optimizer,
    jit_compile=setup.jit_compile,
    first=dataclasses.replace(first, step=0),
    job=job,
    every_steps=how.refresh_every_steps,
    write_snapshot=write_snapshot,
    prepare=EmbeddedIndex.of,
    keep_best=functools.partial(best_on, dev) if dev else None,
    made_from=made_from(data, base),
  )

  # ---- Last index
  refresh.make_index(job, workdir)
  return last


def made_from(data: QaExamples, base: str | None) -> dict[str, str]:
  """Returns what a model is trained with: the questions, and the retriever's first snapshot."""
  retriever = {"retriever": artifacts.read_info(base)["fingerprint"]} if base else {}
  return {"questions": questions.fingerprint_of(data.rows), **retriever}


def keep_best(
  how: FineTuning,
  workdir: str,
  model: OpenQaModel,
  asked: Callable[[], QaExamples],
  write_snapshot: Callable[[str, int, Mapping], str],
) -> loop.KeepBest:
  """Returns a callback that keeps the weights with the best exact match on the dev questions.

  Args:
    how: settings of the fine-tuning.
    workdir: workdir of the trainer.
    model: the model in training.
    asked: returns the dev questions with the current retrieval.
    write_snapshot: see `loop.KeepBest`.
  """
  score = tf.function(
    lambda inputs: model(inputs, training=False), autograph=False, reduce_retracing=True
  )

  def exact_match() -> float:
    now = asked()
    return closed_book.exact_match_of(now.rows, [answer.text for answer in now.answers(score)])

  return loop.KeepBest(
    exact_match,
    write_snapshot,
    lambda folder: restore(folder, model),
    workdir=workdir,
    every_steps=how.eval_every,
    steps=how.schedule.steps,
  )


def restore(snapshot: str, model: OpenQaModel) -> None:
  """Loads the weights of one of the model's snapshots."""
  model.reader.set_weights(snapshots.load_model(snapshot, "reader").get_weights())
  if model.query_tower is None:
    model.score_weight.assign(SnapshotInfo.read(snapshot).score_weight)
    return
  retriever = snapshots.load_retriever(snapshot)
  model.query_tower.set_weights(retriever.query_tower.get_weights())
  if model.passage_tower is not None:
    model.passage_tower.set_weights(retriever.passage_tower.get_weights())


def publish(
  how: FineTuning, root: str, step: int, *, model: OpenQaModel, tokenizer, base: str, more: Mapping
) -> str:
  """Writes a fine-tuned snapshot: the trained question tower beside the index's passage tower.

  Args:
    how: settings of the fine-tuning.
    root: folder of the snapshots.
    step: training step; names the snapshot.
    model: the trained model.
    tokenizer: the model's tokenizer.
    base: the snapshot that training started from.
    more: further fields of info.json.
  """
  models, inputs = {"reader": model.reader}, {"passages": how.passages}
  num_read = how.num_read
  if model.query_tower is not None:
    before = snapshots.load_retriever(base)
    models["retriever"] = Retriever(**before.get_config() | {"shared": False})
    models["retriever"].passage_tower.set_weights(before.passage_tower.get_weights())
    models["retriever"].query_tower.set_weights(model.query_tower.get_weights())
    inputs["index"] = index.folder_of(how.retriever, base)
    details = fine_tuned(
      DENSE, num_read=num_read, index_snapshot=SnapshotInfo.read(base).fingerprint
    )
  else:
    details = fine_tuned(BM25, num_read=num_read, score_weight=float(model.score_weight.numpy()))
  return snapshots.publish(
    root,
    step,
    models,
    tokenizer=tokenizer,
    made_by="finetune",
    details={**details, **more},
    inputs=inputs,
  )
