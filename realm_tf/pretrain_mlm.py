"""Masked-LM warm start of every encoder, for use without a published BERT.

    python -m realm_tf.pretrain_mlm --config=configs/quickstart.py --workdir=runs/quickstart/mlm

This is REALM with a single candidate: masked sentences of the knowledge corpus are read with their
own passages, and masked sentences of the pre-training corpus with the null passage. Later stages
start from the result if `config.mlm.steps` is not 0.
"""

import os

from realm_tf import cli

if __name__ == "__main__":
  cli.start_trainer("realm_tf.pretrain_mlm", section="mlm")

import keras

from realm_tf import settings
from realm_tf.corpus import passages
from realm_tf.models import snapshots
from realm_tf.training import new_models, warm_start
from realm_tf.training.realm_batches import Batches


def pretrain_mlm(config, workdir: str) -> str:
  """Trains a masked reader from fresh or published weights; returns its snapshot's folder.

  Raises:
    ArtifactError: inputs are missing, or do not belong together.
  """
  # ---- Settings
  seed, passages_folder = config.seed, config.passages
  reader_start = settings.masked_reader_start(config, warm_start=False)
  batch_settings, stage = settings.batches(config), settings.masked_lm(config.mlm)
  setup = settings.setup(config)

  # ---- Training
  keras.utils.set_random_seed(seed)
  table, tokenizer = passages.load(passages_folder), passages.load_tokenizer(passages_folder)
  reader = new_models.new_masked_reader(reader_start, tokenizer)
  batches = Batches(batch_settings, table, tokenizer)
  warm_start.train_reader(reader, batches, stage=stage, workdir=workdir, setup=setup)
  return snapshots.publish(
    os.path.join(workdir, "snapshots"),
    stage.schedule.steps,
    {"reader": reader},
    tokenizer=tokenizer,
    made_by="pretrain_mlm",
  )
