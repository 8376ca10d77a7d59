"""The Python API: a user's first five lines, which give what the commands give."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import realm_tf
from beam_jobs import embed_passages
from realm_tf import explain, finetune
from realm_tf.corpus import passages
from realm_tf.examples import questions
from realm_tf.models import snapshots
from realm_tf.storage import artifacts
from realm_tf.systems import workdir
from realm_tf.systems.workdir import SnapshotInfo, open_workdir
from serving import export
from tests import fine_tuning
from tests.conftest import eagerly, index_of
from tests.processes import REPOSITORY

TEXTS = ["The river [MASK] flows into the sea.", "[MASK] lies in the north of Malmor."]
ACCENTS = [
  ("Étretat", "Zoë Núñez founded Étretat. The CAFÉ is old, the café new."),
  ("東京", "日本 has 東京, Émile Zola 🙂 Paris."),
]


@pytest.fixture(scope="module")
def workdirs(toy, tmp_path_factory) -> dict[str, str]:
  """A pre-trained workdir of fresh models with its index, and each kind of system on top of it."""
  root = tmp_path_factory.mktemp("workdirs")
  found = {name: str(root / name) for name in ("pretrained", "dense", "bm25", "none")}
  config = toy.config()
  tokenizer = passages.load_tokenizer(config.passages)
  models = {
    "retriever": snapshots.load_retriever(toy.path("ict/snapshots/00000000")),
    "reader": snapshots.load_model(toy.path("warm/snapshots/00000000"), "reader"),
  }
  keras.utils.set_random_seed(1)
  for weight in models["reader"].weights:  # an untrained one cannot tell passages apart
    weight.assign(weight + 0.3 * keras.random.normal(weight.shape))
  snapshot = snapshots.publish(
    found["pretrained"] + "/snapshots", 3, models, tokenizer=tokenizer, made_by="pretrain"
  )
  embed_passages.embed(
    found["pretrained"] + "/indexes/00000003",
    snapshot=snapshot,
    passages_folder=config.passages,
    jit_compile=False,
  )
  with eagerly():
    for retrieval in ("dense", "bm25", "none"):
      tuned = toy.config(
        finetune__retrieval=retrieval,
        finetune__retriever=found["pretrained"],
        finetune__reader=found["pretrained"],
        finetune__learning_rate=1e-2,
      )
      finetune.finetune(tuned, found[retrieval])
  return found


@pytest.fixture(scope="module")
def asked(toy) -> list[str]:
  rows = questions.read_questions(toy.path("corpus/questions.test.jsonl"))
  return [row.text for row in rows]


@pytest.fixture(scope="module")
def system(workdirs) -> realm_tf.System:
  return realm_tf.load(workdirs["dense"])


@pytest.fixture(scope="module")
def filler(workdirs) -> realm_tf.System:
  return realm_tf.load(workdirs["pretrained"])


@pytest.fixture(scope="module")
def servable(workdirs, tmp_path_factory):
  output = str(tmp_path_factory.mktemp("servables"))
  return tf.saved_model.load(export.export(workdirs["dense"], output, num_candidates=5))


@pytest.fixture(scope="module")
def accents(toy, workdirs, tmp_path_factory) -> str:
  """An index of passages with accents and other scripts."""
  return index_of(
    [{"title": title, "text": text} for title, text in ACCENTS],
    tmp_path_factory.mktemp("accents"),
    toy=toy,
    snapshot=workdirs["pretrained"] + "/snapshots/00000003",
    max_tokens=64,
  )


def predictions(folder: str, toy, tmp_path) -> list[dict]:
  """Returns what `realm_tf.evaluate` writes for the test questions."""
  output = str(tmp_path / "predictions.jsonl")
  fine_tuning.score(folder, questions_path=toy.path("corpus/questions.test.jsonl"), output=output)
  with open(output) as file:
    return [json.loads(line) for line in file]


# ---------------------------------------------------------------------------------- the five lines


def test_a_users_first_five_lines(workdirs):
  system = realm_tf.load(workdirs["dense"])
  answer = system.answer("who built the bridge over the Gorneth?")
  found = system.retrieve("rivers of the north", num=5)
  filling = realm_tf.load(workdirs["pretrained"]).fill_mask(
    "The Gorneth flows into the sea near [MASK]."
  )
  assert answer.text and answer.passage.text[answer.start : answer.end] == answer.text
  assert len(found) == 5 and all(passage.title and passage.text for passage in found)
  # a word piece such as ##s, which a model this small may predict, continues the word before it
  filled = f"The Gorneth flows into the sea near {filling.words[0]}."
  assert filling.text == filled.replace(" ##", "")
  assert repr(answer).startswith(f"Answer(text={answer.text!r}, score=")
  assert repr(filling).startswith(f"Filling(text={filling.text!r}, words=(")
  assert max(len(repr(one)) for one in (answer, system, *found)) < 400


def test_importing_the_package_opens_nothing():
  code = (
    "import sys, realm_tf; assert not any(name.startswith('realm_tf.') for name in sys.modules); "
    "assert 'load' in dir(realm_tf); from realm_tf.corpus import metrics; realm_tf.UserError; "
    "assert 'realm_tf.systems' not in sys.modules; realm_tf.nothing"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
  )
  assert "AttributeError: module 'realm_tf' has no attribute 'nothing'" in done.stderr


# --------------------------------------------------------------------- what the commands say, too


@pytest.mark.parametrize("kind", ["dense", "bm25", "none"])
def test_answers_are_those_of_evaluation(kind, toy, workdirs, asked, tmp_path):
  wanted = predictions(workdirs[kind], toy, tmp_path)
  system = realm_tf.load(workdirs[kind])
  got = system.answer(asked)
  assert [answer.text for answer in got] == [row["prediction"] for row in wanted]
  if kind == "none":
    assert {(answer.score, answer.passage, answer.start, answer.end) for answer in got} == {
      (None, None, 0, 0)
    }
    return
  for answer, row, found in zip(got, wanted, system.retrieve(asked, num=5), strict=True):
    assert answer.score == pytest.approx(row["score"], abs=1e-5)
    assert answer.passage.number == row["read_from"]
    assert (
      answer.passage.text[: answer.start].encode()
      == answer.passage.text.encode()[: row["byte_span"][0]]
    )
    assert answer.passage.text[answer.start : answer.end] == answer.text
    assert [(passage.number, passage.title, passage.text) for passage in found] == [
      (passage["number"], passage["title"], passage["text"]) for passage in row["passages"]
    ]
    np.testing.assert_allclose(
      [passage.score for passage in found],
      [passage["score"] for passage in row["passages"]],
      atol=1e-5,
    )


def test_answers_and_passages_are_those_of_the_servable(system, servable, asked):
  served = servable.signatures["answer"](question=tf.constant(asked))
  found = servable.signatures["retrieve"](question=tf.constant(asked))
  for row, answer in enumerate(system.answer(asked)):
    rank = int(served["answer_rank"][row, 0])
    assert answer.text == served["answer"][row, 0].numpy().decode()
    assert answer.score == pytest.approx(float(served["score"][row, 0]), abs=1e-5)
    assert answer.passage.number == int(served["passage_number"][row, rank])
    assert answer.passage.score == pytest.approx(
      float(served["retrieval_score"][row, rank]), abs=1e-5
    )
  numbers = found["passage_number"].numpy()
  assert [[one.number for one in passages] for passages in system.retrieve(asked, num=7)] == (
    numbers[:, :7].tolist()
  )


def test_masks_are_filled_as_by_the_servable(filler, servable):
  served = servable.signatures["fill_mask"](text=tf.constant(TEXTS))
  for row, filling in enumerate(filler.fill_mask(TEXTS, num_candidates=5)):
    assert filling.text == served["filled"][row].numpy().decode()
    assert filling.probability == pytest.approx(
      float(served["token_probability"][row, 0, 0]), rel=1e-4
    )
    assert [passage.number for passage in filling.passages] == (
      served["passage_number"][row, 1:].numpy().tolist()
    )


def test_masks_are_filled_and_explained_as_by_the_command(filler, workdirs):
  for text in (TEXTS[0], "[MASK] [MASK] met [MASK]."):
    wanted = explain.explain(workdirs["pretrained"], text=text)
    report, filling = filler.explain(text), filler.fill_mask(text)
    (found,) = wanted.explanations
    assert report == wanted
    assert " … ".join(filling.words) == found.answer
    assert filling.probability == found.probability
    assert filling.without_retrieval == found.without_retrieval
    assert [(one.number, one.score) for one in filling.passages] == [
      (candidate.number, candidate.score) for candidate in found.candidates[1:]
    ]
  given = filler.explain(TEXTS[0], answer="Gorneth").explanations[0]
  assert given.answer == "Gorneth" and given.probability <= 1


def test_questions_are_explained_as_by_the_command(system, workdirs, asked):
  report, wanted = (
    system.explain(asked[0]),
    explain.explain(workdirs["dense"], question=asked[0]),
  )
  (got,), (found,) = report.explanations, wanted.explanations
  assert (report.x, report.snapshot, got.index) == (wanted.x, wanted.snapshot, found.index)
  assert got.answer == found.answer == system.answer(asked[0]).text
  assert got.probability == pytest.approx(found.probability, rel=1e-4)
  assert [(one.number, one.best_span, one.evidence) for one in got.candidates] == [
    (one.number, one.best_span, one.evidence) for one in found.candidates
  ]
  assert "most probable answers" in str(report) and "\x1b" not in str(report)
  assert repr(report).startswith(f"Report({asked[0]!r}: ") and len(repr(report)) < 400


# ------------------------------------------------------------------------------- one text or many


def test_a_list_gives_a_list(system, filler, asked):
  for one, call in (
    (asked[0], system.answer),
    (asked[0], system.retrieve),
    (asked[0], system.explain),
    (TEXTS[0], filler.fill_mask),
    (TEXTS[0], filler.retrieve),
    (TEXTS[0], filler.explain),
  ):
    assert call([one]) == [call(one)] and call((one,)) == call([one]) and call([]) == []


def test_a_small_corpus_gives_what_it_has(system, workdirs, accents):
  assert len(system.retrieve("rivers", num=1000)) == 32
  small = realm_tf.load(workdirs["pretrained"], index=accents)
  assert len(small.retrieve("who founded it?")) == len(ACCENTS)
  assert len(small.fill_mask("[MASK] is old.").passages) == len(ACCENTS)
  assert len(small.explain("[MASK] is old.").explanations[0].candidates) == len(ACCENTS) + 1


def test_offsets_count_letters(workdirs, accents):
  """The index says which passages it was made from."""
  system = realm_tf.load(workdirs["dense"], index=accents)
  for answer in system.answer(["who founded Étretat?", "where is 東京?", "x"]):
    title, text = ACCENTS[answer.passage.number]
    assert (answer.passage.title, answer.passage.text) == (title, text)
    assert answer.text and text[answer.start : answer.end] == answer.text


# ---------------------------------------------------------------------------------------- refusals


def test_what_a_workdir_cannot_do_says_which_one_to_load(toy, workdirs, system, filler):
  ict = realm_tf.load(toy.path("ict"))
  sparse, closed = (realm_tf.load(workdirs[name]) for name in ("bm25", "none"))
  started_from = f"realm_tf.load({workdirs['pretrained']!r})"
  for words, call in (
    (started_from, lambda: system.fill_mask(TEXTS[0])),
    ("workdir of realm_tf.pretrain", lambda: sparse.fill_mask(TEXTS)),
    ("workdir of realm_tf.pretrain", lambda: closed.explain("who")),
    ("a workdir of realm_tf.pretrain, which", lambda: ict.fill_mask(TEXTS[0])),
    ("a workdir of realm_tf.pretrain, which", lambda: ict.explain(TEXTS[0])),
    ("workdir of realm_tf.finetune", lambda: filler.answer("who")),
    ("workdir of realm_tf.finetune", lambda: ict.answer(["who"])),
    ("finetune.retrieval=dense", lambda: closed.retrieve("who")),
    ("a question is answered by the system itself", lambda: system.explain("who", answer="me")),
    ("no [MASK]", lambda: filler.fill_mask("The river flows.")),
    ("at least 1 passage", lambda: system.retrieve("who", num=0)),
  ):
    with pytest.raises(realm_tf.UserError) as caught:
      call()
    assert words in str(caught.value)
  assert len(ict.retrieve("rivers", num=3)) == 3
  assert sparse.explain("who founded the town?").explanations[0].index == "bm25"


def test_parts_that_do_not_belong_together_are_refused(toy, workdirs, accents, tmp_path):
  foreign, passages = toy.path("ict/indexes/00000000"), os.path.dirname(accents) + "/passages"
  for words, folder, what in (
    ("no snapshot in", str(tmp_path), {}),
    ("has no retriever, only a reader. Give the", toy.path("warm"), {}),
    ("was made from snapshot", workdirs["pretrained"], {"index": foreign}),
    ("the fine-tuned retriever wants", workdirs["dense"], {"index": foreign}),
    ("was made from passages", workdirs["pretrained"], {"passages": passages}),
    ("was made from passages", workdirs["dense"], {"passages": passages}),
    ("does not exist", workdirs["dense"], {"index": str(tmp_path / "none")}),
  ):
    with pytest.raises(artifacts.ArtifactError, match=words):
      realm_tf.load(folder, **what)
  (tmp_path / "W").mkdir()
  os.symlink(workdirs["pretrained"] + "/snapshots", tmp_path / "W/snapshots")
  with pytest.raises(artifacts.ArtifactError, match="no index in .*\n.*embed_passages --snapshot="):
    realm_tf.load(str(tmp_path / "W"))


# ----------------------------------------------------------------------------------------- the door


def test_a_workdir_says_what_it_holds(toy, workdirs):
  opened = {name: open_workdir(folder) for name, folder in workdirs.items()}
  base = opened["pretrained"].snapshot
  assert {name: one.snapshot.retrieval for name, one in opened.items()} == {
    "pretrained": None,
    "dense": "dense",
    "bm25": "bm25",
    "none": "none",
  }
  assert {one.passages for one in opened.values()} == {toy.config().passages}
  assert opened["dense"].index == opened["pretrained"].index
  assert opened["bm25"].index is None and opened["none"].index is None
  assert opened["dense"].snapshot.index_snapshot == base.fingerprint
  assert opened["dense"].snapshot.num_read == opened["bm25"].snapshot.num_read == 2
  assert opened["bm25"].snapshot.score_weight not in (None, 1.0)
  assert [name for name, one in opened.items() if one.snapshot.has_masked_reader] == ["pretrained"]
  assert workdir.find_pretrained(opened["dense"]) == base
  assert workdir.find_pretrained(opened["dense"], workdirs["pretrained"]) == base


def test_the_newest_snapshot_waits_for_its_index(toy, workdirs, tmp_path):
  """During training, the snapshot of the newest index is opened."""
  for name in ("snapshots", "indexes"):
    (tmp_path / name).mkdir()
    folder = f"{workdirs['pretrained']}/{name}/00000003"
    os.symlink(folder, tmp_path / name / "00000003")
  os.symlink(f"{workdirs['pretrained']}/snapshots/00000003", tmp_path / "snapshots/00000005")
  assert workdir.newest_snapshot(str(tmp_path)).step == 5
  assert realm_tf.load(str(tmp_path)).workdir.snapshot.step == 3


def test_written_and_read_keys_are_the_same(workdirs):
  for name, keys in {
    "dense": {"retrieval", "num_read", "index_snapshot"},
    "bm25": {"retrieval", "num_read", "score_weight"},
    "none": {"retrieval"},
  }.items():
    snapshot = SnapshotInfo.read(artifacts.latest(workdirs[name] + "/snapshots"))
    written = artifacts.read_info(snapshot.folder)
    assert {"retrieval", "num_read", "index_snapshot", "score_weight"} & set(written) == keys
    assert {key: getattr(snapshot, key) for key in keys} == {key: written[key] for key in keys}
