"""REALM pre-training (REALM, section 3).

The retriever and the reader learn together from masked salient spans.

    python -m realm_tf.pretrain --config=configs/quickstart.py --workdir=runs/quickstart/realm

The first index is built, and the reader may be warmed up with one passage for each query
(`config.warmup`). During training, a background job embeds the corpus again from the newest
snapshot; the trainer switches to each new index between two steps and never waits. If interrupted,
run it again with the same workdir to resume.
"""

import dataclasses
import os

from realm_tf import cli

if __name__ == "__main__":
  cli.start_trainer("realm_tf.pretrain", section="realm")

import keras
import numpy as np

from realm_tf import settings
from realm_tf.corpus import passages
from realm_tf.models import snapshots
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.realm import RealmModel, check_loss
from realm_tf.models.retriever import Retriever
from realm_tf.retrieval import dense, index
from realm_tf.storage import artifacts
from realm_tf.training import (
  loop,
  new_models,
  realm_measures,
  refresh,
  refreshed_training,
  warm_start,
)
from realm_tf.training.realm_batches import Batches


def pretrain(config, workdir: str) -> str:
  """Warms up the reader, then trains retriever and reader together.

  Returns:
    The last snapshot's folder; its index has the same number under W/indexes.

  Raises:
    ArtifactError: inputs are missing, or do not belong together.
    UserError: the corpus has fewer passages than candidates, or a setting is not valid.
  """
  # ---- Settings
  seed, init, dev_clozes = config.seed, config.realm.init, config.dev_clozes
  per_token, retriever_loss = config.realm.per_token, config.realm.retriever_loss
  slow_factor = config.realm.retriever_learning_rate_ratio
  job, every_steps = settings.refresh_job(config), config.refresh.every_steps
  batch_settings, reader_start = settings.batches(config), settings.masked_reader_start(config)
  warmup, schedule = settings.masked_lm(config.warmup), settings.schedule(config.realm)
  setup = settings.setup(config)

  # ---- Inputs
  keras.utils.set_random_seed(seed)
  refreshed_training.check_workdir(workdir, schedule.steps)
  batch_settings.realm.check()
  check_loss(
    retriever_loss,
    batch_candidates=batch_settings.realm.batch_candidates,
    null=batch_settings.realm.null_passage,
  )
  table, tokenizer = passages.load(job.passages), passages.load_tokenizer(job.passages)
  batch_settings.realm.check_corpus(table)

  # ---- First index
  first = first_index(init, job, table)
  batches = Batches(batch_settings, table, tokenizer)

  # ---- Warm start
  reader = new_models.new_masked_reader(reader_start, tokenizer)
  warm = warm_up(reader, batches, first, stage=warmup, workdir=workdir, setup=setup)
  with setup.scope():
    retriever = snapshots.load_retriever(warm)
    check_warm_up(warm, retriever, first.retriever, init)
    model = RealmModel(
      retriever,
      reader,
      per_token=per_token,
      null=batch_settings.realm.null_passage,
      batch_candidates=batch_settings.realm.batch_candidates,
      retriever_loss=retriever_loss,
    )
    optimizer = setup.optimizer(
      schedule, slow=retriever.trainable_variables, slow_factor=slow_factor
    )
  if not loop.checkpoint_step(workdir):
    realm_measures.tell_start(model, batches, first)

  # ---- REALM, with refreshes (section 3.3)
  last = refreshed_training.train_with_refresh(
    model,
    lambda step, indexed: batches.realm(step, indexed=indexed),
    workdir=workdir,
    schedule=schedule,
    optimizer=optimizer,
    jit_compile=setup.jit_compile,
    first=first,
    job=job,
    every_steps=every_steps,
    write_snapshot=snapshots.publisher(
      {"retriever": retriever, "reader": reader}, tokenizer=tokenizer, made_by="pretrain"
    ),
    recall=realm_measures.recall_of(batches, dev_clozes=dev_clozes),
  )

  # ---- Last index
  refresh.make_index(job, workdir)
  return last


def first_index(
  init: str, job: refresh.RefreshJob, table: passages.PassageTable
) -> dense.IndexedRetriever:
  """Opens the index that training starts from, that of the newest snapshot in the workdir `init`.

  The index is built if it does not exist yet. `table` is that of the job's passages.

  Raises:
    ArtifactError: there is no snapshot.
    UserError: the job that builds the index failed.
  """
  snapshot = snapshots.newest(
    init, advice="run realm_tf.pretrain_ict first (steps=0 gives a fresh retriever)."
  )
  refresh.make_index(job, init)
  found = dense.load(index.folder_of(init, snapshot), table=table, snapshot=snapshot)
  return dataclasses.replace(found, step=0)


def warm_up(
  reader: MaskedReader,
  batches: Batches,
  first: dense.IndexedRetriever,
  *,
  stage: warm_start.MaskedLm,
  workdir: str,
  setup: loop.Setup,
) -> str:
  """Trains the reader alone with one passage for each query; returns the snapshot in W/warmup.

  The reader is published with the first retriever.
  """
  workdir = os.path.join(workdir, "warmup")
  root = os.path.join(workdir, "snapshots")
  if done := artifacts.latest(root):
    snapshots.load_weights(reader, os.path.join(done, "reader.weights.h5"))
    return done
  warm_start.train_reader(reader, batches, stage=stage, workdir=workdir, setup=setup, indexed=first)
  return snapshots.publish(
    root,
    stage.schedule.steps,
    {"retriever": first.retriever, "reader": reader},
    tokenizer=batches.tokenizer,
    made_by="pretrain warm-up",
  )


def check_warm_up(folder: str, retriever: Retriever, wanted: Retriever, init: str) -> None:
  """Checks that the reader was warmed up with the retriever that REALM starts from.

  Raises:
    ArtifactError: it was warmed up with another one.
  """
  got, weights = retriever.get_weights(), wanted.get_weights()
  if len(got) != len(weights) or not all(map(np.array_equal, got, weights)):
    raise artifacts.ArtifactError(
      f"{folder!r} was warmed up with another retriever than {init!r} holds now. Give another "
      "workdir, or the original realm.init."
    )
