"""Open-QA fine-tuning, the baselines and evaluation on the toy corpus: what is kept fixed, written and refused."""

import json
import os
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

from beam_jobs import embed_passages
from realm_tf import artifacts, bm25, closed_book, evaluate, finetune, index, metrics, passages, questions, settings, snapshots
from realm_tf.tokenization import Tokenizer
from tests import embed_passages_test
from tests.processes import REPOSITORY

SYSTEMS = ("dense", "bm25", "none")


def fine_tune(toy, workdir: str, retrieval: str, **values) -> str:
  return finetune.finetune(toy.config(finetune__retrieval=retrieval, **values), workdir)


def score(workdir: str, **what) -> dict[str, float]:
  return evaluate.evaluate(workdir, **{"questions_path": None, "clozes_path": None, "output": None, "bm25_baseline": False,
                                       "index_folder": None, "passages_folder": None, "num_passages": 5} | what)


@pytest.fixture(scope="module")
def workdirs(toy, tmp_path_factory) -> dict[str, str]:
  """Each system after four steps."""
  found = {system: str(tmp_path_factory.mktemp(system)) for system in SYSTEMS}
  shutil.copytree(toy.path("ict"), os.path.join(found["dense"], "base"))  # a test spoils its index
  for system, workdir in found.items():
    fine_tune(toy, workdir, system, finetune__retriever=os.path.join(found["dense"], "base"))
  return found


@pytest.mark.parametrize("system", SYSTEMS)
def test_predictions_and_scores(system, toy, workdirs, tmp_path):
  output, path = str(tmp_path / "predictions.jsonl"), toy.path("corpus/questions.test.jsonl")
  scores = score(workdirs[system], questions_path=path, output=output, num_passages=3)
  rows, asked = [json.loads(line) for line in open(output)], questions.read_questions(path)
  table = passages.load(toy.config().passages)
  print(scores, rows[0])
  assert json.loads((tmp_path / "predictions.metrics.json").read_text()) == scores
  assert [(row["question"], row["answer"]) for row in rows] == [(question.text, question.answers) for question in asked]
  assert scores["exact_match"] == np.mean([metrics.exact_match(row["prediction"], row["answer"]) for row in rows])
  assert scores["f1"] == pytest.approx(np.mean([metrics.f1(row["prediction"], row["answer"]) for row in rows]))
  if system == "none":
    assert not any("recall" in name for name in scores) and all(row["passages"] == [] for row in rows)
    return
  for row in rows:
    read, (start, end) = table.texts[row["read_from"]], row["byte_span"]
    assert row["prediction"] and read.encode()[start:end].decode() == row["prediction"]
    before, after = read.encode()[:start].decode(), read.encode()[end:].decode()
    cut = [left and right and (left[-1] + right[0]).isalnum() for left, right in ((before, row["prediction"]), (row["prediction"], after))]
    assert not any(cut), f"whole words only: {before!r} {row['prediction']!r} {after!r}"
    assert row["read_from"] in [passage["number"] for passage in row["passages"][:2]] and len(row["passages"]) == 3
    assert [passage["text"] for passage in row["passages"]] == [table.texts[passage["number"]] for passage in row["passages"]]
    assert np.isfinite(row["score"]) and sorted((p["score"] for p in row["passages"]), reverse=True) == [p["score"] for p in row["passages"]]
  top = [any(metrics.AnswerMatcher(table.texts).has_answer([row["passages"][0]["number"]], row["answer"])) for row in rows]
  assert scores["recall_at_1"] == np.mean(top) and scores["recall_at_1"] <= scores["recall_at_5"] <= scores["recall_at_20"]
  assert scores["recall_at_100"] == 1, "all 32 passages are looked at"


def test_passage_tower_stays_and_question_tower_trains(toy, workdirs):
  base = snapshots.load_retriever(toy.path("ict/snapshots/00000000"))
  tuned = snapshots.load_retriever(os.path.join(workdirs["dense"], "snapshots/00000004"))
  for got, wanted in zip(tuned.passage_tower.weights, base.passage_tower.weights, strict=True):
    np.testing.assert_array_equal(got, wanted)
  moved = [np.abs(np.array(a) - np.array(b)).max() for a, b in zip(tuned.query_tower.trainable_weights, base.query_tower.trainable_weights)]
  print(f"the question tower's weights move by {np.median(moved):.1e}")
  assert np.median(moved) > 1e-4 and len(tuned.towers) == 2
  info = artifacts.read_info(os.path.join(workdirs["dense"], "snapshots/00000004"))
  assert info["index"] == os.path.join(workdirs["dense"], "base/indexes/00000000") and info["num_read"] == 2
  assert info["index_snapshot"] == artifacts.read_info(toy.path("ict/snapshots/00000000"))["fingerprint"]


def test_snapshots_of_the_baselines(workdirs):
  info = artifacts.read_info(os.path.join(workdirs["bm25"], "snapshots/00000004"))
  assert list(info["config"]) == ["reader"] and info["config"]["reader"]["class"] == "SpanReader" and info["score_weight"] != 1
  assert artifacts.read_info(os.path.join(workdirs["none"], "snapshots/00000004"))["config"]["reader"]["class"] == "MaskedReader"


def test_span_reader_starts_from_the_masked_reader(toy):
  masked = snapshots.load_model(toy.path("warm/snapshots/00000000"), "reader")
  reader = finetune.new_span_reader(toy.config(), Tokenizer(toy.config().passages))
  for got, wanted in zip(reader.encoder.weights, masked.encoder.weights, strict=True):
    np.testing.assert_array_equal(got, wanted)


def test_retrieval_follows_the_question_tower():
  live, searching = (keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)]) for _ in range(2))
  follows = finetune.SyncTower(live, searching, every_steps=3)
  same = lambda: np.array_equal(live.get_weights()[0], searching.get_weights()[0])
  follows.on_train_begin()
  seen = [same()]
  for step in range(7):
    live.layers[0].kernel.assign_add([[1.0], [1.0]])
    follows.on_train_batch_end(step)
    seen.append(same())
  print(seen)
  assert seen == [True, False, False, True, False, False, True, False]


# ------------------------------------------------------------------------------------------------------------ refusals


def test_index_of_another_snapshot_is_refused(toy, workdirs, tmp_path):
  config, base = toy.config(), os.path.join(workdirs["dense"], "base")
  newer = embed_passages_test.publish_snapshot(str(tmp_path / "other"), 7, vocab=config.passages)
  folder = os.path.join(base, "indexes/00000000")
  os.rename(folder, tmp_path / "right")
  embed_passages.embed(folder, snapshot=newer, passages_folder=config.passages)
  got, wanted = (artifacts.read_info(path)["fingerprint"] for path in (newer, os.path.join(base, "snapshots/00000000")))
  for name, call in (
      ("evaluate", lambda: score(workdirs["dense"], questions_path=toy.path("corpus/questions.dev.jsonl"))),
      ("evaluate --index", lambda: score(workdirs["dense"], questions_path=toy.path("corpus/questions.dev.jsonl"), index_folder=folder)),
      ("zero-shot", lambda: score(base, questions_path=toy.path("corpus/questions.dev.jsonl"))),
      ("fine-tune", lambda: fine_tune(toy, str(tmp_path / "V"), "dense", finetune__retriever=base))):
    with pytest.raises(artifacts.ArtifactError, match=f"was made from snapshot {got}.*want(s|ed) {wanted}") as caught:
      call()
    print(f"{name}: {caught.value}")
  shutil.rmtree(folder)
  os.rename(tmp_path / "right", folder)


def test_index_made_from_the_fine_tuned_snapshot_is_as_good(toy, workdirs, tmp_path):
  """Its passage tower is the base's, so another corpus can be indexed with either."""
  folder, path = str(tmp_path / "indexes/00000004"), toy.path("corpus/questions.dev.jsonl")
  embed_passages.embed(folder, snapshot=os.path.join(workdirs["dense"], "snapshots/00000004"), passages_folder=toy.config().passages)
  assert score(workdirs["dense"], questions_path=path, index_folder=folder) == score(workdirs["dense"], questions_path=path)


def test_readers_of_another_vocabulary_and_missing_parts(toy, tmp_path):
  folder = embed_passages_test.make_passages(str(tmp_path / "P"), num_passages=5, num_shards=1)
  for system in SYSTEMS:
    with pytest.raises(artifacts.ArtifactError, match="snapshot .* was made with vocabulary .* this run has"):
      fine_tune(toy, str(tmp_path / "W"), system, passages=folder)
    with pytest.raises(artifacts.ArtifactError, match="no snapshot in .*nothing.*; run realm_tf.pretrain first"):
      fine_tune(toy, str(tmp_path / "W"), system, finetune__reader=str(tmp_path / "nothing"))
  with pytest.raises(artifacts.ArtifactError, match="no snapshot in .*nothing"):
    fine_tune(toy, str(tmp_path / "W"), "dense", finetune__retriever=str(tmp_path / "nothing"))
  with pytest.raises(artifacts.UserError, match="no file .*nothing.jsonl"):
    fine_tune(toy, str(tmp_path / "W"), "dense", finetune__questions=str(tmp_path / "nothing.jsonl"))
  with pytest.raises(artifacts.ArtifactError, match="no snapshot in"):
    score(str(tmp_path / "W"), questions_path=toy.path("corpus/questions.dev.jsonl"))


def test_evaluate_wants_questions_or_clozes(workdirs):
  for paths in ({}, {"questions_path": "a", "clozes_path": "b"}):
    with pytest.raises(artifacts.UserError, match="give either --questions or --clozes"):
      score(workdirs["dense"], **paths)


# ----------------------------------------------------------------------------------------------------------- zero-shot


@pytest.mark.parametrize("kind", ["questions", "clozes"])
def test_zero_shot_recall_of_the_retriever(kind, toy):
  config, path = toy.config(), toy.path(f"corpus/{kind}.test.jsonl")
  got = score(toy.path("ict"), **{f"{kind}_path": path})
  table, tokenizer = passages.load(config.passages), Tokenizer(config.passages)
  retriever = snapshots.load_retriever(toy.path("ict/snapshots/00000000"))
  vectors = index.read_embeddings(toy.path("ict/indexes/00000000"), num_rows=len(table)).astype(np.float64)
  found = []
  for row in questions.read_clozes(path) if kind == "clozes" else questions.read_questions(path):
    text = row.text.encode()
    if kind == "clozes":
      parts = tokenizer([text[:row.span[0]], text[slice(*row.span)], text[row.span[1]:]]).to_list()
      ids = parts[0] + [tokenizer.mask_id] * len(parts[1]) + parts[2]
    else:
      ids = tokenizer([text]).to_list()[0]
    ids = ([tokenizer.cls_id, *ids[:22], tokenizer.sep_id] + [0] * 24)[:24]
    best = np.argsort(-(vectors @ np.array(retriever.embed_queries(np.array([ids], np.int32)))[0]), kind="stable")
    found.append([any(f" {metrics.normalize_answer(answer)} " in f" {metrics.normalize_answer(table.texts[number])} "
                      for answer in row.answers) for number in best])
  print(kind, got)
  assert got == {"questions": len(found), **{f"recall_at_{k}": np.mean([any(row[:k]) for row in found]) for k in (1, 5, 20, 100)}}


def test_bm25_baseline(toy, tmp_path):
  table = passages.load(toy.config().passages)
  searcher = bm25.Bm25Searcher(table)
  found = searcher.search([f"{title} {text}" for title, text in zip(table.titles, table.texts)], 3)
  assert found.numbers[:, 0].tolist() == list(range(len(table))) and (np.diff(found.scores) <= 0).all()
  documents = [f"{title}\n{text}".lower() for title, text in zip(table.titles, table.texts)]
  words = [re.findall(r"\b\w\w+\b", document) for document in documents]
  mean_length, query = np.mean([len(row) for row in words]), ["the", "river", "armos"]
  by_hand = np.zeros(len(table))
  for word in query:
    holders = sum(word in row for row in words)
    for number, row in enumerate(words):
      count = row.count(word)
      by_hand[number] += np.log(1 + (len(words) - holders + 0.5) / (holders + 0.5)) * count / (
          count + 1.2 * (1 - 0.75 + 0.75 * len(row) / mean_length))
  got = searcher.search([" ".join(query)], 32)
  print(got.numbers[0, :5], got.scores[0, :5])
  np.testing.assert_allclose(got.scores[0], by_hand[got.numbers[0]], rtol=1e-5)
  output = str(tmp_path / "bm25.questions")
  scores = score(toy.path("ict"), questions_path=toy.path("corpus/questions.test.jsonl"), bm25_baseline=True, output=output)
  print(scores)
  assert scores["recall_at_5"] > 0.4 and json.loads((tmp_path / "bm25.metrics.json").read_text()) == scores


# --------------------------------------------------------------------------------------------------------- closed book


def test_closed_book_learns_answers_by_heart(toy, tmp_path):
  lines = [{"question": "who founded the town?", "answer": ["Vallafried"]}, {"question": "which river is near?", "answer": ["Lorwash of Armos"]}]
  path = tmp_path / "q.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  folder = fine_tune(toy, str(tmp_path / "W"), "none", finetune__questions=str(path), finetune__steps=60, finetune__log_every=30,
                     finetune__checkpoint_every=60, finetune__learning_rate=1e-2, finetune__batch_size=2)
  reader, tokenizer = snapshots.load_model(folder, "reader"), settings.tokenizer(toy.config().passages)
  texts = [line["question"] for line in lines]
  print(closed_book.answer(texts, reader, tokenizer), closed_book.answer([texts[0] * 500, ""], reader, tokenizer))
  assert closed_book.answer(texts, reader, tokenizer) == ["vallafried", "lorwash of armos"]
  made = closed_book.inputs(passages.Ragged.of([[7] * 500, [8, 9]], np.int32), np.arange(2), reader, tokenizer)
  for ids, positions in zip(made["reader_ids"][:, 0], made["mask_positions"]):
    assert (ids[positions] == tokenizer.mask_id).all() and (ids == tokenizer.mask_id).sum() == reader.max_masks


# ------------------------------------------------------------------------------------------------------------ commands


def test_command(toy, workdirs, tmp_path):
  """`python -m realm_tf.evaluate` prints the scores; a mistake is one line."""
  def run(*args):
    return subprocess.run([sys.executable, "-m", "realm_tf.evaluate", f"--workdir={workdirs['dense']}", *args], cwd=REPOSITORY,
                          capture_output=True, text=True)

  done = run(f"--questions={toy.path('corpus/questions.dev.jsonl')}", f"--output={tmp_path}/predictions.jsonl")
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == json.loads((tmp_path / "predictions.metrics.json").read_text())
  done = run(f"--questions={tmp_path}/nothing.jsonl")
  print(done.stderr)
  assert done.returncode == 1 and "UserError: no file" in done.stderr and "Traceback" not in done.stderr
