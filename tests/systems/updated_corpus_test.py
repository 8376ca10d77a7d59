"""Trained systems after an update of their passages."""

import json
import shutil

import pytest

import realm_tf
from beam_jobs import embedding, update_passages
from realm_tf import finetune
from realm_tf.corpus import passages
from realm_tf.models import snapshots
from realm_tf.storage import artifacts
from realm_tf.systems.workdir import open_workdir
from tests.conftest import eagerly

NEW = {"title": "Zarnholm", "text": "The port of Zarnholm was founded by Ottoline Quexby."}
QUESTION = "who founded the port of Zarnholm?"


def titles_found(workdir: str) -> set[str]:
  found = realm_tf.load(workdir).retrieve(QUESTION, num=1000)
  return {passage.title for passage in found}


def test_trained_systems_search_the_updated_passages(toy, tmp_path):
  corpus = shutil.copytree(toy.config().passages, tmp_path / "P")
  pretrained = str(tmp_path / "pretrained")
  models = {
    "retriever": snapshots.load_retriever(toy.path("ict/snapshots/00000000")),
    "reader": snapshots.load_model(toy.path("warm/snapshots/00000000"), "reader"),
  }
  snapshot = snapshots.publish(
    f"{pretrained}/snapshots",
    3,
    models,
    tokenizer=passages.load_tokenizer(str(corpus)),
    made_by="pretrain",
  )

  def make_index(snapshot: str = snapshot) -> None:
    embedding.embed(
      snapshot.replace("/snapshots/", "/indexes/"),
      snapshot=snapshot,
      passages_folder=str(corpus),
      jit_compile=False,
    )

  make_index()
  workdirs = {name: str(tmp_path / name) for name in ("dense", "bm25")}
  with eagerly():
    for retrieval, workdir in workdirs.items():
      finetune.finetune(
        toy.config(
          passages=str(corpus),
          finetune__retrieval=retrieval,
          finetune__retriever=pretrained,
          finetune__reader=pretrained,
        ),
        workdir,
      )
  every = set(passages.load(str(corpus)).titles)
  assert {name: titles_found(workdir) for name, workdir in workdirs.items()} == {
    "dense": every,
    "bm25": every,
  }

  shutil.copytree(corpus, tmp_path / "P-copy")  # the former version is not used in its place
  added, gone = tmp_path / "new.jsonl", sorted(every)[0]
  added.write_text(json.dumps(NEW) + "\n")
  update_passages.update(str(corpus), add=str(added), delete=[gone])
  now = every - {gone} | {NEW["title"]}
  assert titles_found(workdirs["bm25"]) == now
  assert open_workdir(pretrained, need_index=False).passages == str(corpus)
  for workdir in (workdirs["dense"], pretrained):
    with pytest.raises(artifacts.ArtifactError, match="index .* was made from passages .*again"):
      realm_tf.load(workdir)
  make_index()
  assert titles_found(workdirs["dense"]) == titles_found(pretrained) == now
  assert realm_tf.load(workdirs["bm25"]).answer(QUESTION).passage.title == NEW["title"]

  update_passages.compact(str(corpus))
  make_index()
  assert {name: titles_found(workdir) for name, workdir in workdirs.items()} == {
    "dense": now,
    "bm25": now,
  }

  # The workdir that it was fine-tuned from goes on without it; its own index serves as well.
  shutil.rmtree(f"{pretrained}/indexes/00000003")
  with pytest.raises(
    artifacts.ArtifactError, match=f"refresh_index --snapshots={workdirs['dense']}/snapshots"
  ):
    realm_tf.load(workdirs["dense"])
  make_index(artifacts.latest(f"{workdirs['dense']}/snapshots"))
  assert titles_found(workdirs["dense"]) == now
