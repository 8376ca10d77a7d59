"""Masked-LM warm start of every encoder, where no published BERT can be had.

    python -m realm_tf.pretrain_mlm --config=configs/quickstart.py --workdir=runs/quickstart/mlm

REALM with a single candidate: masked sentences of the knowledge corpus beside their own passages, and masked sentences of the
pre-training corpus beside the null passage. The stages that follow start from it where `config.mlm.steps` is not 0.
"""

import os

import keras

from realm_tf import passages, pretrain, settings, snapshots


def pretrain_mlm(config, workdir: str) -> str:
  """Trains a masked reader from fresh or published weights; returns its snapshot's folder.

  Raises:
    ArtifactError: inputs missing, or not belonging together.
  """
  keras.utils.set_random_seed(config.seed)
  table, tokenizer = passages.load(config.passages), settings.tokenizer(config.passages)
  reader = settings.new_masked_reader(config, tokenizer, warm_start=False)
  pretrain.train_masked_lm(config, config.mlm, workdir, pretrain.Batches(config, table, tokenizer), reader)
  return snapshots.publish(os.path.join(workdir, "snapshots"), config.mlm.steps, {"reader": reader}, tokenizer=tokenizer,
                           made_by="pretrain_mlm")


if __name__ == "__main__":
  settings.start_trainer(pretrain_mlm, section="mlm")
