"""Two devices that share a batch train as one device does: losses, metrics and weights, step by step."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.processes import REPOSITORY

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
import tensorflow as tf
kind, config_path, workdir, *numbers = sys.argv[1:]
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
config.realm.update(steps=6, batch_size=4, log_every=2, checkpoint_every=6, per_token=True)  # masks of all devices count alike
config.refresh.update(every_steps=6, start_job=False)
config.finetune.update(steps=6, sync_steps=100, dev_questions=config.run_dir + "/corpus/questions.dev.jsonl", eval_every=2)
# retrieval stays: when it moves depends on how far batches are made ahead
from realm_tf import finetune, pretrain, pretrain_ict
for number in numbers:
  config.num_devices = int(number)
  {"ict": pretrain_ict.pretrain_ict, "realm": pretrain.pretrain, "finetune": finetune.finetune}[kind](config, f"{workdir}/{number}")
"""


def train(toy, kind: str, workdir: str, *nums_devices: int) -> subprocess.CompletedProcess:
  """Trains on so many devices, and again on so many, each in a folder of that name."""
  return subprocess.run([sys.executable, "-c", PROGRAM, kind, toy.config_path, workdir, *map(str, nums_devices)], cwd=REPOSITORY,
                        capture_output=True, text=True, check=False)


def weights_of(path: str) -> dict[str, np.ndarray]:
  import h5py

  found = {}
  with h5py.File(path) as file:
    file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
  return found


@pytest.mark.parametrize("kind", ["ict", "realm", "finetune"])
def test_two_devices_are_one(toy, tmp_path, kind):
  done = train(toy, kind, str(tmp_path), 1, 2)
  assert done.returncode == 0, done.stderr[-3000:]
  rows = [[json.loads(line) for line in open(tmp_path / str(num) / "metrics.jsonl", encoding="utf-8")] for num in (1, 2)]
  names = {
    "ict": ("loss", "accuracy", "accuracy_removed", "removed"),
    "realm": ("loss", "retrieval_utility", "prior_entropy", "null_prior"),
    "finetune": ("loss", "retriever_loss", "reader_loss", "reader_exact_match", "dev_exact_match"),
  }[kind]
  assert len(rows[0]) == len(rows[1]) == 3
  for one, two in zip(*rows):
    print(one["step"], {name: (one[name], two[name]) for name in names})
    for name in names:
      np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
  one, two = (weights_of(str(tmp_path / str(num) / "snapshots/00000006/retriever.weights.h5")) for num in (1, 2))
  far = max(np.abs(one[name] - two[name]).max() for name in one)
  before = weights_of(os.path.join(toy.path("ict/snapshots/00000000"), "retriever.weights.h5"))
  moved = max(np.abs(one[name] - before[name]).max() for name in before)
  print(f"{kind}: {len(one)} tensors moved by up to {moved:.1e}, the two runs differ by at most {far:.1e}")
  assert set(one) == set(two) and far < 2e-4 and moved > 20 * far


def test_mistakes(toy, tmp_path):
  done = train(toy, "ict", str(tmp_path), 3)
  print(done.stderr.splitlines()[-1])
  assert done.returncode == 1 and "num_devices is 3, this machine has 2: /device:CPU:0, /device:CPU:1." in done.stderr
