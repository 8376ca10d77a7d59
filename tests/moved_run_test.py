"""A run in a folder whose name looks like a pattern and a list, which is then moved.

Every part finds the others.
"""

import os
import shutil

import numpy as np
import pytest

from beam_jobs import annotate_spans, make_passages
from realm_tf import explain, finetune, pretrain, pretrain_ict, settings
from realm_tf.corpus import passages
from realm_tf.examples.masked_sentences import MaskedSentences
from realm_tf.models import snapshots
from realm_tf.retrieval import index
from realm_tf.spans import show_spans
from realm_tf.storage import artifacts
from realm_tf.training import realm_batches, refresh
from serving import parts
from tests import fine_tuning, folders
from tests.conftest import eagerly, toy_config

NAME = "my [v2] run, final?*"


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
  """A whole run at toy size in such a folder: (its path, the scores of its evaluation)."""
  root = str(tmp_path_factory.mktemp("runs") / NAME)
  config = toy_config(root)
  config.dev_clozes = ""
  config.refresh.start_job = False
  config.spans = config.knowledge_spans
  config.ict.update(steps=2)
  config.realm.update(steps=4, checkpoint_every=2)
  config.finetune.update(
    steps=2,
    retriever=f"{root}/realm",
    reader=f"{root}/realm",
    questions=toy.path("corpus/questions.train.jsonl"),
  )
  make_passages.run(
    toy.path("corpus/knowledge"), config.passages, vocab=toy.config().passages, max_tokens=64
  )
  annotate_spans.run(config.passages, config.knowledge_spans)
  with pytest.MonkeyPatch.context() as patch, eagerly():
    patch.setattr(refresh, "make_index", folders.make_index)
    pretrain_ict.pretrain_ict(config, config.ict.workdir)
    pretrain.pretrain(config, config.realm.workdir)
    finetune.finetune(config, config.finetune.workdir)
  return root, score(f"{root}/finetune", toy)


def score(workdir: str, toy) -> dict:
  return fine_tuning.score(
    workdir, questions_path=toy.path("corpus/questions.dev.jsonl"), num_passages=1
  )


@pytest.mark.timeout(300)
def test_the_jobs_and_trainers_work_there(run, toy):
  root, scores = run
  assert len(passages.load(f"{root}/passages")) == 32 and scores["questions"] > 0
  assert (
    artifacts.read_info(f"{root}/spans-knowledge")["counts"]["spans"]
    == artifacts.read_info(toy.config().knowledge_spans)["counts"]["spans"]
  )
  newest = artifacts.latest(f"{root}/realm/indexes")
  assert artifacts.step_of(newest) == 4 and index.read_embeddings(newest, num_rows=32).shape == (
    32,
    8,
  )
  assert len(artifacts.complete_folders(f"{root}/realm/checkpoints")) == 2


@pytest.fixture
def moved(run, tmp_path, monkeypatch):
  """The run in another place under another name, as seen from there."""
  place = tmp_path / "else, [where]*" / "run"
  place.parent.mkdir()
  os.rename(run[0], place)
  monkeypatch.chdir(place)
  yield place
  os.rename(place, run[0])


def test_a_moved_run_is_whole(run, moved, toy):
  assert score("finetune", toy) == run[1]
  assert passages.find_of("realm/indexes/00000004") == str(moved / "passages")
  system = parts.find_system("finetune")
  assert system.folders == {
    "snapshot": "finetune/snapshots/00000002",
    "index": str(moved / "realm/indexes/00000004"),
    "passages": str(moved / "passages"),
    "pretrained": str(moved / "realm/snapshots/00000004"),
  }
  report = explain.explain(
    "realm", text="Orla lies in the north of [MASK].", question=None, answer=None
  )
  assert report.explanations[0].passages == str(moved / "passages")
  sentences = MaskedSentences(
    "spans-knowledge",
    tokenizer=snapshots.load_tokenizer("ict/snapshots/00000002"),
    query_length=24,
    max_masks=5,
    knowledge=passages.load("passages"),
    masking="uniform",
  )
  assert len(sentences) == 64
  assert show_spans.read("spans-knowledge").passages_folder == str(moved / "passages")


def test_a_part_that_was_moved_alone_is_found_by_fingerprint(run, moved, toy, capsys):
  (moved / "data").mkdir()
  os.rename("passages", "data/z")
  try:
    assert passages.find_of("realm/indexes/00000004") == str(moved / "data/z")
    assert f"found by fingerprint at {moved}/data/z" in capsys.readouterr().err
    os.rename("data/z", moved.parent / "z")
    # other ones in their place are not used
    shutil.copytree(toy.path("passages-pretraining"), "passages")
    assert passages.find_of("realm/indexes/00000004") == str(moved.parent / "z")
    os.rename(moved.parent / "z/COMPLETE", moved.parent / "marker")
    fingerprint = artifacts.read_info("realm/indexes/00000004")["inputs"]["passages"]["fingerprint"]
    others = artifacts.read_info("passages")["fingerprint"]
    with pytest.raises(artifacts.ArtifactError) as caught:
      passages.find_of("realm/indexes/00000004")
    for words in (
      f"was made from passages {fingerprint}",
      f"{str(moved / 'passages')!r} (passages {others})",
      f"{run[0] + '/passages'!r} (does not exist)",
      "--passages",
    ):
      assert words in str(caught.value), caught.value
    assert "\n" not in str(caught.value)
  finally:
    shutil.rmtree("passages", ignore_errors=True)
    if (moved.parent / "marker").exists():
      os.rename(moved.parent / "marker", moved.parent / "z/COMPLETE")
    os.rename("data/z" if os.path.exists("data/z") else moved.parent / "z", "passages")


def test_spans_are_read_once_where_both_folders_are_the_same(run, toy, monkeypatch):
  root, _ = run
  config, table = toy_config(root), passages.load(f"{root}/passages")
  tokenizer = snapshots.load_tokenizer(f"{root}/ict/snapshots/00000002")
  reads, read = [], passages.read_all

  def read_and_note(shards, row_type):
    reads.extend([shards] * (row_type is passages.Sentence))
    return read(shards, row_type)

  monkeypatch.setattr(passages, "read_all", read_and_note)
  config.spans = f"{root}/./spans-knowledge/"
  batches = realm_batches.Batches(settings.batches(config), table, tokenizer)
  assert batches.sentences is batches.knowledge_sentences and len(reads) == 1
  config.spans = toy.config().knowledge_spans
  batches = realm_batches.Batches(settings.batches(config), table, tokenizer)
  assert batches.sentences is not batches.knowledge_sentences and len(reads) == 3
  for one, other in zip(batches.sentences.ids, batches.knowledge_sentences.ids, strict=True):
    np.testing.assert_array_equal(one, other)
