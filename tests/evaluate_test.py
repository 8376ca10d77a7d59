"""Scores against independent computations.

Tests the published rules of NQ-open, recall by both definitions, reader oracle, and retrieval
utility.
"""

import json
import re
import shutil
import string
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from beam_jobs import embed_passages
from realm_tf import evaluate
from realm_tf.corpus import metrics, passages
from realm_tf.corpus.candidates import NULL_PASSAGE, Found
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import questions
from realm_tf.examples.answering import Prediction
from realm_tf.models import snapshots
from realm_tf.retrieval import bm25, index
from realm_tf.storage import artifacts, publishing
from realm_tf.systems import passage_retrieval
from tests.fine_tuning import SYSTEMS, score
from tests.processes import REPOSITORY

# --------------------------------------------------------------------------- predictions and scores


@pytest.mark.parametrize("system", SYSTEMS)
def test_predictions_and_scores(system, toy, fine_tuned, tmp_path):
  output, path = str(tmp_path / "predictions.jsonl"), toy.path("corpus/questions.test.jsonl")
  scores = score(fine_tuned[system], questions_path=path, output=output, num_passages=3)
  rows, asked = [json.loads(line) for line in open(output)], questions.read_questions(path)
  table = passages.load(toy.config().passages)
  assert json.loads((tmp_path / "predictions.metrics.json").read_text()) == scores
  assert [(row["question"], row["answer"]) for row in rows] == [
    (question.text, question.answers) for question in asked
  ]
  assert scores["exact_match"] == np.mean(
    [metrics.exact_match(row["prediction"], row["answer"]) for row in rows]
  )
  assert scores["f1"] == pytest.approx(
    np.mean([metrics.f1(row["prediction"], row["answer"]) for row in rows])
  )
  if system == "none":
    assert not any("recall" in name or "oracle" in name for name in scores) and all(
      row["passages"] == [] for row in rows
    )
    return
  for row in rows:
    read, (start, end) = table.texts[row["read_from"]], row["byte_span"]
    assert row["prediction"] and read.encode()[start:end].decode() == row["prediction"]
    before, after = read.encode()[:start].decode(), read.encode()[end:].decode()
    cut = [
      left and right and (left[-1] + right[0]).isalnum()
      for left, right in ((before, row["prediction"]), (row["prediction"], after))
    ]
    assert not any(cut), f"whole words only: {before!r} {row['prediction']!r} {after!r}"
    assert (
      row["read_from"] in [passage["number"] for passage in row["passages"][:2]]
      and len(row["passages"]) == 3
    )
    assert [passage["text"] for passage in row["passages"]] == [
      table.texts[passage["number"]] for passage in row["passages"]
    ]
    assert np.isfinite(row["score"]) and sorted(
      (p["score"] for p in row["passages"]), reverse=True
    ) == [p["score"] for p in row["passages"]]
  top = [
    any(
      metrics.AnswerMatcher(table.texts).has_answer([row["passages"][0]["number"]], row["answer"])
    )
    for row in rows
  ]
  assert (
    scores["recall_at_1"] == np.mean(top)
    and scores["recall_at_1"] <= scores["recall_at_5"] <= scores["recall_at_20"]
  )
  assert scores["recall_at_100"] == 1, "all 32 passages are searched"


def test_evaluate_wants_questions_or_clozes(fine_tuned):
  for paths in ({}, {"questions_path": "a", "clozes_path": "b"}):
    with pytest.raises(artifacts.UserError, match="give either --questions or --clozes"):
      score(fine_tuned["dense"], **paths)


# ---------------------------------------------------------------------------------- published rules


def published_accuracy(references: str, predictions: str, *, is_regex: bool) -> float:
  """Scores by NQ-open's and ORQA's rules as they are described.

  Predictions are looked up by question; a question without one is wrong.
  """

  def normal(text: str) -> str:
    text = "".join(
      letter
      for letter in unicodedata.normalize("NFD", text).lower()
      if letter not in string.punctuation
    )
    return " ".join(word for word in re.sub(r"\b(a|an|the)\b", " ", text).split())

  def right(prediction: str, answer: str) -> bool:
    if not is_regex:
      return normal(prediction) == normal(answer)
    return (
      re.compile(answer, re.IGNORECASE | re.UNICODE | re.MULTILINE).match(prediction) is not None
    )

  rows = [
    [json.loads(line) for line in open(path, encoding="utf-8")]
    for path in (references, predictions)
  ]
  said = {row["question"]: row["prediction"] for row in rows[1]}
  wanted = {row["question"]: row["answer"] for row in rows[0]}
  return sum(
    question in said and any(right(said[question], answer) for answer in answers)
    for question, answers in wanted.items()
  ) / len(wanted)


def write_lines(path, rows) -> str:
  path.write_text(
    "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
  )
  return str(path)


@pytest.mark.parametrize("is_regex", [False, True], ids=["text", "regex"])
def test_predictions_file_goes_through_the_published_rules(is_regex, toy, fine_tuned, tmp_path):
  """The references are made from real predictions.

  Some are changed in ways that the rules forgive, and some in ways they do not.
  """
  asked, output = toy.path("corpus/questions.train.jsonl"), str(tmp_path / "predictions.jsonl")
  score(fine_tuned["dense"], questions_path=asked, output=output)
  forgiving = [
    lambda text: f"(The {text.upper()}!)",
    lambda text: f"{text}s",
    lambda text: f"x {text}",
    lambda text: text,
  ]
  if is_regex:
    forgiving = [
      lambda text: re.escape(text.upper()[:3]),
      lambda text: f"nothing|{re.escape(text)}$",
      lambda text: f"x{re.escape(text)}",
      lambda text: f"{re.escape(text[1:])}",
    ]
  rows = {}
  for at, line in enumerate(open(output, encoding="utf-8")):
    row = json.loads(line)
    rows[row["question"]] = {
      "question": row["question"],
      "answer": ["no such answer", forgiving[at % 4](row["prediction"])],
      **({"regex": True} if is_regex else {}),
    }
  references = write_lines(tmp_path / "references.jsonl", rows.values())
  got = score(fine_tuned["dense"], questions_path=references, output=output)
  published = published_accuracy(references, output, is_regex=is_regex)
  assert got["exact_match"] == pytest.approx(published, abs=1e-12) and 0.3 < published < 0.8
  assert not is_regex or got["f1"] == got["exact_match"]


# ------------------------------------------------------------------------------- what could be read


@pytest.mark.parametrize("is_regex", [False, True], ids=["text", "regex"])
def test_reader_oracle_and_recall(is_regex, toy, fine_tuned, tmp_path):
  """Uses questions whose answers are two words of some passage, in lower case or as expressions."""
  table, tokenizer, rng = (
    passages.load(toy.config().passages),
    Tokenizer(toy.config().passages),
    np.random.default_rng(0),
  )
  rows = []
  for line in open(toy.path("corpus/questions.train.jsonl")):
    words = re.findall(r"\w+ \w+", table.texts[rng.integers(len(table))])
    answer = words[rng.integers(len(words))]
    rows.append(
      {
        "question": json.loads(line)["question"],
        "answer": [f"{answer}$|{answer}\\b" if is_regex else answer.lower()],
        **({"regex": True} if is_regex else {}),
      }
    )
  output = str(tmp_path / "predictions.jsonl")
  got = score(
    fine_tuned["dense"],
    questions_path=write_lines(tmp_path / "q.jsonl", rows),
    output=output,
    num_passages=32,
  )
  readable, held, raw = [], [], []
  for row in map(json.loads, open(output)):
    texts, (answer,) = [passage["text"] for passage in row["passages"]], row["answer"]
    if is_regex:
      held.append([re.search(answer, text, re.IGNORECASE) is not None for text in texts])
      raw.append(held[-1])
      short = len(tokenizer([answer.partition("$")[0]]).to_list()[0]) <= 5
    else:
      normal = [f" {metrics.normalize_answer(text)} " for text in texts]
      held.append([f" {metrics.normalize_answer(answer)} " in text for text in normal])
      raw.append([answer in text for text in texts])
      short = len(tokenizer([answer]).to_list()[0]) <= 5
    words = re.escape(answer) if not is_regex else answer.partition("$")[0]
    readable.append(
      short and any(re.search(rf"\b{words}\b", text, re.IGNORECASE) for text in texts[:2])
    )
  assert got["reader_oracle"] == np.mean(readable) and 0.05 < got["reader_oracle"] < 0.9
  for k in evaluate.RECALL_AT:
    assert got[f"recall_at_{k}"] == np.mean([any(row[:k]) for row in held])
    assert got[f"raw_recall_at_{k}"] == np.mean([any(row[:k]) for row in raw])
  assert (got["raw_recall_at_5"] == got["recall_at_5"]) == is_regex, (
    "lower case is not the text as written"
  )


def test_missing_passages_are_neither_scored_nor_written(toy):
  table = passages.load(toy.config().passages)
  last = table.texts[-1].split()[0]
  rows = [questions.Question("q", [last])]
  numbers = [np.array([0, NULL_PASSAGE, NULL_PASSAGE], np.int32)]
  got = evaluate.recall(rows, numbers, evaluate.matchers(table))
  line = evaluate.prediction_line(
    rows[0],
    Prediction("", 0.0, 0, (0, 0), numbers[0], np.array([1.0, -1e9, -1e9])),
    table,
    num_passages=3,
  )
  assert got["recall_at_5"] == (last in table.texts[0]) == 0 and [
    row["number"] for row in line["passages"]
  ] == [0]


# -------------------------------------------------------------------------------- retrieval utility


@pytest.fixture(scope="module")
def pretrained(toy, tmp_path_factory) -> str:
  """A workdir as realm_tf.pretrain leaves it, with untrained models.

  It holds a retriever, a masked reader and an index.
  """
  workdir, tokenizer = (
    str(tmp_path_factory.mktemp("pretrained")),
    passages.load_tokenizer(toy.config().passages),
  )
  models = {
    "retriever": snapshots.load_retriever(toy.path("ict/snapshots/00000000")),
    "reader": snapshots.load_model(toy.path("warm/snapshots/00000000"), "reader"),
  }
  snapshot = snapshots.publish(
    f"{workdir}/snapshots", 3, models, tokenizer=tokenizer, made_by="pretrain"
  )
  embed_passages.embed(
    f"{workdir}/indexes/00000003",
    snapshot=snapshot,
    passages_folder=toy.config().passages,
    jit_compile=False,
  )
  return workdir


def test_retrieval_utility(toy, pretrained, tmp_path):
  """Checked passage by passage in float64; clozes that the reader cannot take are left out."""
  table, tokenizer = passages.load(toy.config().passages), Tokenizer(toy.config().passages)
  rows = [json.loads(line) for line in open(toy.path("corpus/clozes.test.jsonl"))][:8]
  far = "long " * 30 + rows[0]["text"]
  rows += [
    {"text": far, "span": [at + 150 for at in rows[0]["span"]], "answer": rows[0]["answer"]},
    {"text": rows[0]["text"], "span": [0, len(rows[0]["text"])], "answer": ["-"]},
  ]
  path = write_lines(tmp_path / "clozes.jsonl", rows)
  got = score(pretrained, clozes_path=path, num_candidates=4)
  retriever, reader = (
    snapshots.load_model(f"{pretrained}/snapshots/00000003", name)
    for name in ("retriever", "reader")
  )
  vectors = index.read_embeddings(f"{pretrained}/indexes/00000003", num_rows=len(table)).astype(
    np.float64
  )
  marginal, top = [], []
  for row in questions.read_clozes(path):
    left, answer, right = tokenizer(
      [
        row.text.encode()[part]
        for part in (slice(row.span[0]), slice(*row.span), slice(row.span[1], None))
      ]
    ).to_list()
    if len(answer) > reader.max_masks or 1 + len(left) + len(answer) > 24 - 2:
      continue
    query = [
      tokenizer.cls_id,
      *[*left, *[tokenizer.mask_id] * len(answer), *right][: 24 - 2],
      tokenizer.sep_id,
    ]

    def padded(ids, length):
      return np.array([(ids + [0] * length)[:length]], np.int32)

    vector = np.array(retriever.embed_queries(padded(query, 24)), np.float64)[0]
    scores = vectors @ vector
    best = np.argsort(-scores, kind="stable")[:3]

    def likelihood(text_ids, query=query, left=left, answer=answer):
      ids = query + list(text_ids) + [tokenizer.sep_id]
      segments = [0] * len(query) + [1] * (len(ids) - len(query))
      positions = padded([1 + len(left) + at for at in range(len(answer))], reader.max_masks)
      logits = np.array(
        reader(
          {
            "token_ids": padded(ids, 64),
            "segment_ids": padded(segments, 64),
            "mask_positions": positions,
          }
        ),
        np.float64,
      )[0]
      logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
      return sum(logits[at, piece] for at, piece in enumerate(answer))

    found = [likelihood(table.text_ids[number]) for number in best]
    null = likelihood([])
    # the null passage
    empty = (
      padded([tokenizer.cls_id, tokenizer.sep_id, tokenizer.sep_id], 44),
      padded([0, 0, 1], 44),
    )
    null_vector = np.array(retriever.embed_passages(*empty), np.float64)[0]
    odds = np.exp(np.array([null_vector @ vector, *scores[best]]) - scores[best].max())
    marginal.append(np.log((odds / odds.sum() * np.exp([null, *found])).sum()) - null)
    top.append(found[0] - null)
  assert got["utility_clozes"] == len(marginal) and 4 <= len(marginal) <= 8
  assert got["retrieval_utility"] == pytest.approx(np.mean(marginal), abs=2e-5)
  assert got["top_retrieval_utility"] == pytest.approx(np.mean(top), abs=2e-5)
  assert abs(np.mean(marginal)) > 1e-3 and abs(np.mean(marginal) - np.mean(top)) > 1e-4
  only_long = write_lines(tmp_path / "long.jsonl", rows[8:])
  assert score(pretrained, clozes_path=only_long)["utility_clozes"] == 0
  assert "utility_clozes" not in score(toy.path("ict"), clozes_path=path), (
    "there is no masked reader"
  )
  assert "utility_clozes" not in score(pretrained, clozes_path=path, bm25_baseline=True)


# ---------------------------------------------------------------------------------------- zero-shot


@pytest.mark.parametrize("kind", ["questions", "clozes"])
def test_zero_shot_recall_of_the_retriever(kind, toy):
  config, path = toy.config(), toy.path(f"corpus/{kind}.test.jsonl")
  got = score(toy.path("ict"), **{f"{kind}_path": path})
  table, tokenizer = passages.load(config.passages), Tokenizer(config.passages)
  retriever = snapshots.load_retriever(toy.path("ict/snapshots/00000000"))
  vectors = index.read_embeddings(toy.path("ict/indexes/00000000"), num_rows=len(table)).astype(
    np.float64
  )
  found, raw = [], []
  for row in questions.read_clozes(path) if kind == "clozes" else questions.read_questions(path):
    text = row.text.encode()
    if kind == "clozes":
      parts = tokenizer(
        [text[: row.span[0]], text[slice(*row.span)], text[row.span[1] :]]
      ).to_list()
      ids = parts[0] + [tokenizer.mask_id] * len(parts[1]) + parts[2]
    else:
      ids = tokenizer([text]).to_list()[0]
    ids = ([tokenizer.cls_id, *ids[:22], tokenizer.sep_id] + [0] * 24)[:24]
    best = np.argsort(
      -(vectors @ np.array(retriever.embed_queries(np.array([ids], np.int32)))[0]), kind="stable"
    )
    found.append(
      [
        any(
          f" {metrics.normalize_answer(answer)} "
          in f" {metrics.normalize_answer(table.texts[number])} "
          for answer in row.answers
        )
        for number in best
      ]
    )
    raw.append([any(answer in table.texts[number] for answer in row.answers) for number in best])
  wanted = {
    f"{name}_at_{k}": np.mean([any(row[:k]) for row in rows])
    for name, rows in (("recall", found), ("raw_recall", raw))
    for k in (1, 5, 10, 20, 50, 100, 500, 1000, 5000)
  }
  searched_by = {
    "recall_at_1 to 100": "exact, asked for 32",
    "recall_at_500 to 5000": "exact, asked for 32",
  }
  assert got == {"questions": len(found), **wanted, "searched_by": searched_by}, (
    "32 passages: from 50 on, all of them"
  )


class Narrow:
  """A searcher that loses the best passage when asked for few, as ScaNN may."""

  def __init__(self, exact):
    self.exact, self.num_rows = exact, exact.num_rows

  def describe(self, num: int) -> str:
    return f"narrow for {num}"

  def search(self, queries, num: int):
    lost = num <= 10
    found = self.exact.search(queries, num + lost)
    return Found(found.numbers[:, lost:], found.scores[:, lost:])


@pytest.mark.parametrize("system", ["zero-shot", "fine-tuned"])
def test_recall_is_of_the_search_that_a_server_does(system, toy, fine_tuned, monkeypatch):
  """The search is for 10 passages here.

  Other requests do not change its recall, and exact search is reported separately.
  """
  load = index.load
  monkeypatch.setattr(
    index,
    "load",
    lambda folder, *, searcher=None, **what: (
      load(folder, searcher="exact", **what)
      if searcher == "exact"
      else Narrow(load(folder, **what))
    ),
  )
  monkeypatch.setattr(passage_retrieval, "SERVED", 10)
  path = toy.path("corpus/questions.test.jsonl")
  workdir = toy.path("ict") if system == "zero-shot" else fine_tuned["dense"]
  got = score(workdir, questions_path=path, exact_recall=True)
  monkeypatch.setattr(index, "load", load)
  exact = score(workdir, questions_path=path)
  assert {k: got[f"exact_recall_at_{k}"] for k in evaluate.RECALL_AT} == {
    k: exact[f"recall_at_{k}"] for k in evaluate.RECALL_AT
  }
  assert {k: got[f"overlap_at_{k}"] for k in (1, 5, 10, 20, 100)} == pytest.approx(
    {1: 0, 5: 0.8, 10: 0.9, 20: 1, 100: 1}
  )
  assert got["recall_at_20"] == exact["recall_at_20"] and got["recall_at_5"] <= exact["recall_at_5"]
  assert system == "fine-tuned" or got["recall_at_5"] < exact["recall_at_5"], (
    "a lost passage is not hidden"
  )
  assert got["searched_by"] == {
    "recall_at_1 to 10": "narrow for 10, asked for 10",
    "recall_at_20 to 5000": "narrow for 32, asked for 32",
  }
  assert not any(name.startswith(("exact_recall", "overlap")) for name in exact)


def test_an_index_that_finds_less_than_wanted_is_told(toy, tmp_path, capfd):
  folder = str(tmp_path / "index")
  shutil.copytree(toy.path("ict/indexes/00000000"), folder)
  widths = [
    {"num": num, "leaves": 7, "reorder": 40, "recall": recall}
    for num, recall in ((10, 0.9712), (100, 0.99))
  ]
  searcher = {"num_rows": 32, "num_leaves": 9, "num_queries": 50, "widths": widths}
  info = artifacts.read_info(folder) | {"searchers": {"0": searcher}}
  publishing.write_info(folder, info)
  score(toy.path("ict"), questions_path=toy.path("corpus/questions.dev.jsonl"), index_folder=folder)
  assert (
    f"{folder}: WARNING: measured recall 0.9712 at 10, 0.9900 at 100 (50 queries, wanted 0.98"
    in capfd.readouterr().err
  )
  widths[0]["recall"] = 0.98
  publishing.write_info(folder, info)
  score(toy.path("ict"), questions_path=toy.path("corpus/questions.dev.jsonl"), index_folder=folder)
  assert "WARNING" not in capfd.readouterr().err


def test_bm25_baseline(toy, tmp_path):
  table = passages.load(toy.config().passages)
  searcher = bm25.Bm25Searcher(table)
  found = searcher.search(
    [f"{title} {text}" for title, text in zip(table.titles, table.texts, strict=True)], 3
  )
  assert (
    found.numbers[:, 0].tolist() == list(range(len(table))) and (np.diff(found.scores) <= 0).all()
  )
  documents = [
    f"{title}\n{text}".lower() for title, text in zip(table.titles, table.texts, strict=True)
  ]
  words = [re.findall(r"\b\w\w+\b", document) for document in documents]
  mean_length, query = np.mean([len(row) for row in words]), ["the", "river", "armos"]
  by_hand = np.zeros(len(table))
  for word in query:
    holders = sum(word in row for row in words)
    for number, row in enumerate(words):
      count = row.count(word)
      by_hand[number] += (
        np.log(1 + (len(words) - holders + 0.5) / (holders + 0.5))
        * count
        / (count + 1.2 * (1 - 0.75 + 0.75 * len(row) / mean_length))
      )
  got = searcher.search([" ".join(query)], 32)
  np.testing.assert_allclose(got.scores[0], by_hand[got.numbers[0]], rtol=1e-5)
  output = str(tmp_path / "bm25.questions")
  scores = score(
    toy.path("ict"),
    questions_path=toy.path("corpus/questions.test.jsonl"),
    bm25_baseline=True,
    output=output,
  )
  assert (
    scores["recall_at_5"] > 0.4
    and json.loads((tmp_path / "bm25.metrics.json").read_text()) == scores
  )


@pytest.mark.parametrize("kind", ["dense", "bm25", "none"])
def test_bm25_baseline_of_a_fine_tuned_workdir(kind, toy, fine_tuned):
  """It is BM25 over the same passages, whatever models are there."""
  for name, path in (
    ("questions", "corpus/questions.test.jsonl"),
    ("clozes", "corpus/clozes.test.jsonl"),
  ):
    asked = {f"{name}_path": toy.path(path), "bm25_baseline": True}
    assert score(fine_tuned[kind], **asked) == score(toy.path("ict"), **asked), name


# ----------------------------------------------------------------------------------------- commands


def test_command(toy, fine_tuned, tmp_path):
  """`python -m realm_tf.evaluate` prints the scores, and one line for a user's mistake."""

  def run(*args):
    return subprocess.run(
      [sys.executable, "-m", "realm_tf.evaluate", f"--workdir={fine_tuned['dense']}", *args],
      cwd=REPOSITORY,
      capture_output=True,
      text=True,
    )

  done = run(
    f"--questions={toy.path('corpus/questions.dev.jsonl')}",
    f"--output={tmp_path}/predictions.jsonl",
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == json.loads((tmp_path / "predictions.metrics.json").read_text())
  done = run(f"--questions={tmp_path}/nothing.jsonl")
  assert (
    done.returncode == 1 and "UserError: no file" in done.stderr and "Traceback" not in done.stderr
  ), done.stderr
