"""A trainer takes over passages that are added and deleted while it trains."""

import os
import shutil
import time

import numpy as np

from beam_jobs import update_passages
from realm_tf import pretrain
from realm_tf.corpus import passages
from realm_tf.storage import artifacts
from realm_tf.training import realm_batches, realm_measures
from tests.processes import REPOSITORY, wait_until
from tests.towns import write

UPDATED_AT, STEPS = 13, 32


def test_candidates_come_from_the_updated_corpus(toy, tmp_path, monkeypatch, capfd):
  corpus = shutil.copytree(toy.config().passages, str(tmp_path / "passages"))
  before, workdir = passages.load(corpus), str(tmp_path / "realm")
  config = toy.config(
    passages=corpus,
    spans=toy.config().knowledge_spans,
    dev_clozes="",
    realm__steps=STEPS,
    realm__num_candidates=len(before),  # null, and all but its own
    realm__holders=2,
    realm__batch_size=2,
    refresh__every_steps=10,
  )
  packed = []

  def update() -> None:
    new = [{"title": "Nowhere", "text": "Nowhere is a town that was founded in 1234."}]
    add = write(tmp_path / "new.jsonl", new)
    update_passages.update(corpus, add=add, delete=[before.titles[3]])
    wanted = passages.load(corpus).fingerprint

    def is_refreshed() -> bool:
      folder = artifacts.latest(os.path.join(workdir, "indexes"))
      inputs = artifacts.read_info(folder)["inputs"] if folder else {}
      return bool(folder) and inputs["passages"]["fingerprint"] == wanted

    wait_until(is_refreshed, "an index of the updated corpus", timeout_secs=120)
    time.sleep(2.0)  # it is opened in the background

  def pack(batches, queries, query_ids, numbers, table):
    if numbers.shape[1] > 1:  # not the warm-up's
      packed.append((numbers, table))
      if len(packed) == UPDATED_AT:
        update()
    return as_before(batches, queries, query_ids, numbers, table)

  as_before = realm_batches.Batches._pack
  monkeypatch.setattr(realm_batches.Batches, "_pack", pack)
  monkeypatch.setattr(realm_measures, "tell_start", lambda *unused: None)
  monkeypatch.chdir(REPOSITORY)  # where the refresh job is started
  last = pretrain.pretrain(config, workdir)

  after = passages.load(corpus)
  assert len(packed) == STEPS and after.titles[len(before)] == "Nowhere"
  assert {table.fingerprint for _, table in packed[:UPDATED_AT]} == {before.fingerprint}
  numbers, table = packed[-1]
  assert table.fingerprint == after.fingerprint, "the last steps use the updated corpus"
  assert f"there are {after.num_alive} now" in capfd.readouterr().out
  late = np.concatenate([numbers for numbers, table in packed if len(table) > len(before)])
  assert (late == len(before)).any(axis=1).all(), "the new passage is among all candidates"
  assert len(after.deleted) and not np.isin(late, after.deleted).any(), "not even as a holder"
  step = artifacts.step_of(last)
  info = artifacts.read_info(artifacts.step_folder(os.path.join(workdir, "indexes"), step))
  assert info["inputs"]["passages"]["fingerprint"] == after.fingerprint
