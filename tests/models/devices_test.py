"""Two devices that share a batch train as one device does.

Losses, metrics and weights are the same, step by step.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.processes import REPOSITORY

PROGRAM = """
import sys
from realm_tf import cli
cli.set_switches()
import tensorflow as tf
config_path, workdir = sys.argv[1:]
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import importlib.util
spec = importlib.util.spec_from_file_location("toy", config_path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
config = module.get_config()
config.encoder.dropout = config.retriever.dropout = 0.0
config.ict.update(steps=6, batch_size=8, log_every=2, checkpoint_every=2)
config.warmup.steps = 0
# per_token: masks of all devices count alike
config.realm.update(steps=6, batch_size=4, log_every=2, checkpoint_every=6, per_token=True)
config.refresh.update(every_steps=6, start_job=False)
dev_questions = config.run_dir + "/corpus/questions.dev.jsonl"
config.finetune.update(steps=6, sync_steps=100, dev_questions=dev_questions, eval_every=2)
# retrieval stays: when it moves depends on how far batches are made ahead
config.dev_clozes = ""
from realm_tf import finetune, pretrain, pretrain_ict
from realm_tf.training import refresh
from tests import folders
refresh.make_index = folders.make_index
trainers = {
  "ict": pretrain_ict.pretrain_ict,
  "realm": pretrain.pretrain,
  "finetune": finetune.finetune,
}
for kind, train in trainers.items():
  for number in (1, 2):
    config.num_devices = number
    train(config, f"{workdir}/{kind}/{number}")
print("trained", flush=True)
config.num_devices = 3
pretrain_ict.pretrain_ict(config, f"{workdir}/three")
"""


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
  """Folders of what each trainer made on one device and on two, and the process of these runs.

  At its end it asks for three devices.
  """
  workdir = tmp_path_factory.mktemp("devices")
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, toy.config_path, str(workdir)],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.endswith("trained\n"), done.stderr[-3000:]
  return workdir, done


def weights_of(path: str) -> dict[str, np.ndarray]:
  import h5py

  found = {}
  with h5py.File(path) as file:
    file.visititems(
      lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
    )
  return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["ict", "realm", "finetune"])
def test_two_devices_are_one(toy, trained, kind):
  folder = trained[0] / kind
  rows = [
    [json.loads(line) for line in open(folder / str(num) / "metrics.jsonl", encoding="utf-8")]
    for num in (1, 2)
  ]
  names = {
    "ict": ("loss", "accuracy", "accuracy_removed", "removed"),
    "realm": ("loss", "retrieval_utility", "prior_entropy", "null_prior"),
    "finetune": ("loss", "retriever_loss", "reader_loss", "reader_exact_match", "dev_exact_match"),
  }[kind]
  assert len(rows[0]) == len(rows[1]) == 3
  for one, two in zip(*rows, strict=True):
    for name in names:
      np.testing.assert_allclose(
        two[name], one[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} at {one['step']}"
      )
  one, two = (
    weights_of(str(folder / str(num) / "snapshots/00000006/retriever.weights.h5")) for num in (1, 2)
  )
  far = max(np.abs(one[name] - two[name]).max() for name in one)
  before = weights_of(os.path.join(toy.path("ict/snapshots/00000000"), "retriever.weights.h5"))
  moved = max(np.abs(one[name] - before[name]).max() for name in before)
  assert set(one) == set(two) and far < 2e-4 and moved > 20 * far


def test_mistakes(trained):
  _, done = trained
  assert (
    done.returncode == 1
    and "num_devices is 3, but this machine has 2: /device:CPU:0, /device:CPU:1." in done.stderr
  ), done.stderr
