"""Open-QA fine-tuning on the toy corpus.

Tests labels, loss, and what is kept fixed, refreshed, written and refused.
"""

import dataclasses
import json
import os
import re
import shutil
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator

import keras
import numpy as np
import pytest
import tensorflow as tf

from beam_jobs import embed_passages
from realm_tf import progress, settings
from realm_tf.corpus import passages
from realm_tf.corpus.candidates import Found
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing, questions
from realm_tf.examples.open_qa import QaExamples
from realm_tf.models import snapshots
from realm_tf.models.open_qa import OpenQaModel
from realm_tf.retrieval import index
from realm_tf.storage import artifacts
from realm_tf.storage.columns import Ragged
from realm_tf.systems.closed_book import answer, inputs
from realm_tf.systems.workdir import SnapshotInfo, find_index
from realm_tf.training import closed_book, loop, new_models
from realm_tf.training.open_qa import SyncTower
from serving import parts
from tests import folders
from tests.conftest import eagerly
from tests.fine_tuning import SYSTEMS, fine_tune, score
from tests.processes import REPOSITORY, wait_until


def test_passage_tower_stays_and_question_tower_trains(toy, fine_tuned):
  base = snapshots.load_retriever(toy.path("ict/snapshots/00000000"))
  tuned = snapshots.load_retriever(os.path.join(fine_tuned["dense"], "snapshots/00000004"))
  for got, wanted in zip(tuned.passage_tower.weights, base.passage_tower.weights, strict=True):
    np.testing.assert_array_equal(got, wanted)
  moved = [
    np.abs(np.array(a) - np.array(b)).max()
    for a, b in zip(
      tuned.query_tower.trainable_weights, base.query_tower.trainable_weights, strict=True
    )
  ]
  assert np.median(moved) > 1e-4 and len(tuned.towers) == 2
  snapshot = os.path.join(fine_tuned["dense"], "snapshots/00000004")
  info = artifacts.read_info(snapshot)
  assert find_index(fine_tuned["dense"], SnapshotInfo.read(snapshot)) == os.path.join(
    fine_tuned["dense"], "base/indexes/00000000"
  )
  assert info["num_read"] == 2
  assert (
    info["index_snapshot"] == artifacts.read_info(toy.path("ict/snapshots/00000000"))["fingerprint"]
  )


def test_snapshots_of_the_baselines(fine_tuned):
  info = artifacts.read_info(os.path.join(fine_tuned["bm25"], "snapshots/00000004"))
  assert (
    list(info["config"]) == ["reader"]
    and info["config"]["reader"]["class"] == "SpanReader"
    and info["score_weight"] != 1
  )
  assert (
    artifacts.read_info(os.path.join(fine_tuned["none"], "snapshots/00000004"))["config"]["reader"][
      "class"
    ]
    == "MaskedReader"
  )


def test_span_reader_starts_from_the_masked_reader(toy):
  masked = snapshots.load_model(toy.path("warm/snapshots/00000000"), "reader")
  reader = new_models.new_span_reader(
    settings.span_reader_start(toy.config()), Tokenizer(toy.config().passages)
  )
  for got, wanted in zip(reader.encoder.weights, masked.encoder.weights, strict=True):
    np.testing.assert_array_equal(got, wanted)


def test_span_reader_starts_from_the_encoder_where_no_reader_is_named(toy):
  config = toy.config(finetune__reader="", encoder__num_layers=2, encoder__init_std=0.2)
  reader = new_models.new_span_reader(
    settings.span_reader_start(config), Tokenizer(config.passages)
  )
  assert reader.get_config()["architecture"]["num_layers"] == 2
  assert 0.15 < np.std(reader.encoder.token_embedding.embeddings) < 0.22, (
    "fresh weights of encoder.init_std"
  )


class Constant:
  """A stand-in for a tower of two weights that are always set together.

  Setting and embedding are both slow.
  """

  def __init__(self, pause_secs: float):
    self.weights, self.pause_secs = [0.0, 0.0], pause_secs

  def get_weights(self) -> list[float]:
    return list(self.weights)

  def set_weights(self, weights: list[float]) -> None:
    for at, weight in enumerate(weights):
      self.weights[at] = weight
      time.sleep(self.pause_secs)

  def predict_on_batch(self, query_ids):
    first = self.weights[0]
    time.sleep(self.pause_secs)
    return np.array([[first, self.weights[1]]])


def test_retrieval_follows_the_question_tower():
  live, searching = Constant(0), Constant(0)
  follows = SyncTower(live, searching, every_steps=3)
  seen = [follows.embed(None)[0, 0]]  # before training begins
  for step in range(7):
    live.weights = [step + 1.0, step + 1.0]
    follows.on_train_batch_end(step)
    seen.append(follows.embed(None)[0, 0])
  assert seen == [0, 0, 0, 3, 3, 3, 6, 6], (
    "weights that questions are embedded with, after each step"
  )


def test_a_run_that_goes_on_searches_by_its_own_weights():
  """Only the live tower has the weights that training was restored to."""
  live, searching = Constant(0), Constant(0)
  follows = SyncTower(live, searching, every_steps=3)
  live.weights = [5.0, 5.0]
  assert follows.embed(None).tolist() == [[5.0, 5.0]], "the batch that Keras makes first"
  live.weights = [6.0, 6.0]
  follows.on_train_begin()
  assert follows.embed(None).tolist() == [[6.0, 6.0]]


def test_no_question_is_embedded_by_weights_of_two_steps():
  """The tower's weights are set slowly while another thread embeds with them.

  Training waits for neither.
  """
  live, searching = Constant(0), Constant(0.01)
  follows = SyncTower(live, searching, every_steps=1)
  follows.on_train_begin()
  seen, stop = [], threading.Event()

  def embed():
    while not stop.is_set():
      seen.append(follows.embed(None)[0].tolist())

  threads = [threading.Thread(target=embed) for _ in range(2)]
  for thread in threads:
    thread.start()
  longest = 0.0
  for step in range(100):
    live.weights = [step + 1.0, step + 1.0]
    started = time.perf_counter()
    follows.on_train_batch_end(step)
    longest = max(longest, time.perf_counter() - started)
    time.sleep(0.005)
  stop.set()
  for thread in threads:
    thread.join()
  assert all(first == second for first, second in seen), f"weights of two steps at once in {seen}"
  assert len(set(map(tuple, seen))) > 3, f"new weights should be used during training: {seen}"
  assert longest < 0.5, f"training waited {longest:.3f} s"


# ------------------------------------------------------------------------------------------- labels


@dataclasses.dataclass
class Captured:
  """Returns what `finetune` would train on."""

  model: OpenQaModel
  batches: Callable


def capture(toy, monkeypatch, workdir: str, **values) -> Captured:
  """Runs `finetune` up to its first step."""
  caught = []
  monkeypatch.setattr(
    loop,
    "train",
    lambda model, batches, **what: caught.append(Captured(model, batches)),
  )
  fine_tune(toy, workdir, "dense", **values)
  return caught[0]


def write_questions(path, *rows) -> str:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


@pytest.mark.parametrize("beam, wanted", [(5000, 32), (8, 8)])
def test_beam_is_capped_by_the_corpus(beam, wanted, toy, monkeypatch, tmp_path):
  """The live question tower scores the whole beam.

  The first passages of the beam are read, and all their spans are scored.
  """
  caught = capture(
    toy,
    monkeypatch,
    str(tmp_path),
    finetune__beam=beam,
    finetune__num_read=5,
    finetune__max_span=10,
  )
  batch = caught.batches(0)
  outputs = caught.model(batch)
  assert batch["beam_embeddings"].shape == (4, wanted, 8) and batch["beam_correct"].shape == (
    4,
    wanted,
  )
  assert (
    batch["reader_ids"].shape == (4, 5, 64)
    and outputs["span_scores"].shape == (4, 5, 64, 10) == batch["span_correct"].shape
  )
  assert (
    (batch["beam_mask"] == 1).all()
    and "passage_ids" not in batch
    and caught.model.passage_tower is None
  )
  queries = np.array(caught.model.query_tower(batch["query_ids"]), np.float64)
  scores = np.einsum("bd,bkd->bk", queries, batch["beam_embeddings"])
  np.testing.assert_allclose(outputs["beam_scores"], scores, atol=1e-5)
  assert (np.diff(scores) < 1e-5).all(), "best first"
  text = (batch["reader_segments"] == 1) & (batch["reader_ids"] != 3)  # [SEP] is word piece 3
  assert Tokenizer(toy.config().passages).sep_id == 3
  inside = np.array(
    [
      [
        [[text[b, r, i : i + w + 1].all() and i + w < 64 for w in range(10)] for i in range(64)]
        for r in range(5)
      ]
      for b in range(4)
    ]
  )
  np.testing.assert_array_equal(np.array(outputs["span_mask"]) > 0, inside)


@pytest.mark.parametrize("has_answer", ["tokens", "raw"])
def test_what_counts_as_right_in_the_beam(has_answer, toy, monkeypatch, tmp_path):
  """Compares normalised words or the text as written.

  A different case, an article and a part of a word tell them apart.
  """
  table = passages.load(toy.config().passages)
  name = table.titles[0]
  answers = [[name], [name.upper()], [f"the {name}"], [name[:3]], ["no such thing"]]
  path = write_questions(
    tmp_path / "q.jsonl",
    *({"question": f"where is {name}?", "answer": answer} for answer in answers),
  )
  caught = capture(
    toy,
    monkeypatch,
    str(tmp_path / "W"),
    finetune__questions=path,
    finetune__has_answer=has_answer,
    finetune__beam=32,
    finetune__batch_size=5,
  )
  batch = caught.batches(0)
  held = np.array([name in text for text in table.texts])
  cut = np.array([name[:3] in text for text in table.texts])
  assert 0 < held.sum() < 32 and not any(
    f"the {name}" in text or name.upper() in text for text in table.texts
  )
  wanted = {
    "tokens": [held.sum(), held.sum(), held.sum(), 0, 0],
    "raw": [held.sum(), 0, 0, cut.sum(), 0],
  }[has_answer]
  assert sorted(batch["beam_correct"].sum(1)) == sorted(wanted)


def test_has_answer_must_be_one_of_the_two(toy, tmp_path):
  with pytest.raises(
    artifacts.UserError, match="finetune.has_answer is 'Raw'; use 'tokens' or 'raw'"
  ):
    fine_tune(toy, str(tmp_path), "dense", finetune__has_answer="Raw")


@pytest.mark.parametrize("is_regex", [False, True], ids=["text", "regex"])
def test_every_occurrence_of_every_answer_is_right(is_regex, toy, monkeypatch, tmp_path):
  """Compares with all spans of whole words, read from the passages' texts."""
  table, tokenizer = passages.load(toy.config().passages), Tokenizer(toy.config().passages)
  more = {"regex": True} if is_regex else {}
  rows = [json.loads(line) for line in open(toy.path("corpus/questions.train.jsonl"))][:8]
  answers = [[*row["answer"], "the", "river"] for row in rows]
  if is_regex:
    answers = [[rf"{re.escape(row['answer'][0][:3])}\w*|the\b|r.ver"] for row in rows]
  path = write_questions(
    tmp_path / "q.jsonl",
    *({**row, "answer": answer, **more} for row, answer in zip(rows, answers, strict=True)),
  )
  caught = capture(
    toy,
    monkeypatch,
    str(tmp_path / "W"),
    finetune__questions=path,
    finetune__num_read=5,
    finetune__batch_size=8,
    finetune__beam=32,
  )
  batch, numbers = caught.batches(0), []
  vectors = index.read_embeddings(toy.path("ict/indexes/00000000"), num_rows=32)
  for embeddings in batch["beam_embeddings"]:
    numbers.append([int(np.flatnonzero((vectors == row).all(1))[0]) for row in embeddings[:5]])
  asked = {
    tuple(tokenizer([row["question"]]).to_list()[0]): answer
    for row, answer in zip(rows, answers, strict=True)
  }
  right = 0
  for b, ids in enumerate(batch["query_ids"]):
    wanted = [
      answer
      for question, answer in asked.items()
      if question[:22] == tuple(ids[1 : list(ids).index(tokenizer.sep_id)])
    ][0]
    for r, number in enumerate(numbers[b]):
      text, first = (
        table.texts[number].encode(),
        int(np.argmax(batch["reader_segments"][b, r] == 1)),
      )
      begins, ends, pieces = (
        part[number] for part in (table.token_starts, table.token_ends, table.text_ids)
      )
      size = int((batch["reader_segments"][b, r] == 1).sum()) - 1
      for start in range(size):
        for width in range(min(5, size - start)):
          span = text[begins[start] : ends[start + width]].decode()
          whole = not tokenizer.continues[pieces[start]] and not (
            start + width + 1 < len(pieces) and tokenizer.continues[pieces[start + width + 1]]
          )
          if is_regex:
            here = len(text[: begins[start]].decode())
            matches = [
              match.span() for match in re.finditer(wanted[0], text.decode(), re.IGNORECASE)
            ]
            holds = (
              any(
                here == at
                and len(text[: ends[start + width]].decode()) >= end
                and not (width and len(text[: ends[start + width - 1]].decode()) >= end)
                for at, end in matches
              )
              and whole
            )
          else:
            holds = whole and span.lower() in [answer.lower() for answer in wanted]
          assert batch["span_correct"][b, r, first + start, width] == holds, (span, wanted)
          right += holds
  assert right == batch["span_correct"].sum() > 40


@pytest.mark.parametrize(
  "pattern, wanted",
  [
    ("Sept?(ember)?|Feb(ruary)?", ["Sept", "February"]),
    (r"Sept?\b", ["Sept"]),
    ("Septem|Febru", ["February"]),  # to the end of the word
    ("bruary", []),  # a prediction must match from its start
    (r".*bruary", []),  # too long
    (r"\b5,?778\s*K", ["5,778 K"]),
    ("778 K", ["778 K"]),  # a word begins after a comma
    (r"(?<=in )192\d", []),  # matches in place, but not as a prediction
    (r"192\d", ["1924", "1925"]),
    (r"\s*z[uü]rich", ["Zürich"]),
    ("", []),
    ("a|zürich|in zürich", ["in Zürich", "a"]),
  ],
)
def test_expressions_become_spans(pattern, wanted, tmp_path):
  """Finds the whole words that the published rule would count as right."""
  vocab = [
    *"[PAD] [UNK] [CLS] [SEP] [MASK]".split(),
    *"sept feb ##ru ##ary in zu ##rich 5 77 ##8 k , . 19 ##24 ##25 a was hot q".split(),
  ]
  (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n")
  tokenizer = Tokenizer(str(tmp_path))
  text = "Sept. in Zürich was 5,778 K hot, a February 1924, 1925."
  (row,) = passages.make_passages(tokenizer, [("t", [text])], [0])
  ragged = {
    name: Ragged.of([getattr(row, name)], np.int32)
    for name in (
      "title_ids",
      "text_ids",
      "token_starts",
      "token_ends",
      "sentence_starts",
      "sentence_ends",
    )
  }
  table = passages.PassageTable(titles=["t"], texts=[text], folder="", **ragged)

  def search(query_ids, texts):
    return Found(np.array([[0, -1]], np.int32), np.array([[1.0, -np.inf]], np.float32))

  reader = types.SimpleNamespace(query_length=8, length=40, max_span=7)
  for length, cut in ((40, None), (25, "1925")):  # read completely, and without its last word
    reader.length = length
    data = QaExamples(
      [questions.Question("q", [pattern], regex=True)],
      table,
      tokenizer=tokenizer,
      search=search,
      embeddings=np.zeros([1, 2], np.float32),
      reader=reader,
      num_read=2,
    )
    batch = data.batch(0, batch_size=1, seed=0)
    first = int(np.argmax(batch["reader_segments"][0, 0]))
    got = [
      text.encode()[
        row.token_starts[start - first] : row.token_ends[start - first + width]
      ].decode()
      for passage, start, width in np.argwhere(batch["span_correct"][0])
    ]
    assert (
      got == [span for span in wanted if span != cut] and not batch["span_correct"][0, 1].any()
    ), (pattern, length)
    assert batch["beam_correct"].tolist() == [
      [re.search(pattern, text, re.IGNORECASE) is not None, 0]
    ]
    assert batch["beam_mask"].tolist() == [[1, 0]]


# --------------------------------------------------------------------------------------------- loss


def nll(scores: np.ndarray, mask: np.ndarray, correct: np.ndarray) -> tuple[float, np.ndarray]:
  """Returns −log of the softmax mass on correct entries, and its gradient.

  Both are float64, and 0 if nothing is correct.
  """
  odds = np.where(mask > 0, np.exp(scores - scores[mask > 0].max()), 0)
  right = odds * correct
  if not right.any():
    return 0.0, np.zeros_like(odds)
  return np.log(odds.sum() / right.sum()), odds / odds.sum() - right / right.sum()


def test_loss_and_gradients_against_sums():
  """A batch's loss is the mean over its questions.

  A term without correct entries is 0 and has no gradient.
  """
  rng, shape = np.random.default_rng(0), (4, 2, 6, 3)
  model = OpenQaModel(None, keras.Sequential([]), sep_id=0)
  beam_scores, span_scores = rng.normal(size=(4, 7)), rng.normal(size=shape, scale=2)
  beam_correct, span_mask = (
    rng.integers(0, 2, (4, 7)).astype(float),
    rng.integers(0, 2, shape).astype(float),
  )
  span_correct = rng.integers(0, 2, shape).astype(float)
  span_correct[1] = 0  # the reader finds nothing
  # neither finds anything: the answers are only where no span is
  span_correct[3], beam_correct[3] = (
    1 - span_mask[3],
    0,
  )
  beam, spans = (tf.Variable(scores.astype(np.float32)) for scores in (beam_scores, span_scores))
  with tf.GradientTape() as tape:
    loss = model.compute_loss(
      x={
        "beam_correct": tf.constant(beam_correct, tf.float32),
        "span_correct": tf.constant(span_correct, tf.float32),
      },
      y_pred={
        "beam_scores": beam,
        "span_scores": spans,
        "span_mask": tf.constant(span_mask, tf.float32),
      },
    )
  gradients = [np.array(gradient) for gradient in tape.gradient(loss, [beam, spans])]
  retriever = [nll(beam_scores[b], np.ones(7), beam_correct[b]) for b in range(4)]
  reader = [
    nll(
      span_scores[b].ravel(), span_mask[b].ravel(), span_correct[b].ravel() * span_mask[b].ravel()
    )
    for b in range(4)
  ]
  wanted = np.mean([one[0] + other[0] for one, other in zip(retriever, reader, strict=True)])
  assert reader[1][0] == reader[3][0] == retriever[3][0] == 0 < min(reader[0][0], retriever[1][0])
  np.testing.assert_allclose(loss, wanted, rtol=1e-6)
  np.testing.assert_allclose(gradients[0], np.stack([one[1] for one in retriever]) / 4, atol=1e-6)
  np.testing.assert_allclose(
    gradients[1].reshape(4, -1), np.stack([one[1] for one in reader]) / 4, atol=1e-6
  )
  assert not gradients[1][3].any() and not gradients[1][1].any() and not gradients[0][3].any()
  means = {name: float(mean.result()) for name, mean in model.means.items()}
  best = [np.argmax(np.where(span_mask[b] > 0, span_scores[b], -np.inf)) for b in range(4)]
  assert means["beam_has_answer"] == 0.75 and means["reader_oracle"] == 0.5
  assert means["reader_exact_match"] == np.mean(
    [span_correct[b].ravel()[best[b]] for b in range(4)]
  )
  assert means["retriever_loss"] == pytest.approx(np.mean([one[0] for one in retriever]), rel=1e-6)


def test_batch_is_its_questions(toy, monkeypatch, tmp_path):
  """With real scores, the loss of a batch of 6 is the mean over its questions.

  They are asked one by one, as in the original.
  """
  caught = capture(toy, monkeypatch, str(tmp_path), finetune__batch_size=6, finetune__beam=32)
  batch = caught.batches(3)

  def loss(part):
    return float(caught.model.compute_loss(x=part, y_pred=caught.model(part)))

  alone = [loss({name: value[row : row + 1] for name, value in batch.items()}) for row in range(6)]
  assert loss(batch) == pytest.approx(np.mean(alone), rel=1e-5) and min(alone) > 0


def test_place_left_empty_by_the_searcher_counts_for_nothing(toy, monkeypatch, tmp_path):
  """Has the effect of a shorter beam."""
  caught = capture(toy, monkeypatch, str(tmp_path), finetune__beam=6)
  batch = caught.batches(0)
  shorter = {
    **batch,
    **{name: batch[name][:, :4] for name in ("beam_embeddings", "beam_mask", "beam_correct")},
  }
  batch["beam_mask"][:, 4:] = 0
  batch["beam_correct"][:, 4:] = 0
  losses = [
    float(caught.model.compute_loss(x=part, y_pred=caught.model(part))) for part in (batch, shorter)
  ]
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_reader_learns_expressions(toy, tmp_path):
  """Answers may be regular expressions.

  Neither the original nor its ports could train on them.
  """
  rows = [json.loads(line) for line in open(toy.path("corpus/questions.train.jsonl"))][:8]
  path = write_questions(
    tmp_path / "q.jsonl",
    *(
      {
        "question": row["question"],
        "answer": [f"nothing|{row['answer'][0][:4]}\\w*"],
        "regex": True,
      }
      for row in rows
    ),
  )
  workdir = str(tmp_path / "W")
  fine_tune(
    toy,
    workdir,
    "bm25",
    finetune__questions=path,
    finetune__steps=60,
    finetune__log_every=20,
    finetune__checkpoint_every=60,
    finetune__batch_size=8,
    finetune__learning_rate=2e-2,
    finetune__span_dim=32,
  )
  seen, got = progress.read_metrics(workdir), score(workdir, questions_path=path)
  assert (
    seen[-1]["reader_loss"] < 0.5 * seen[0]["reader_loss"]
    and seen[-1]["reader_oracle"] == got["reader_oracle"] > 0.5
  )
  assert got["exact_match"] > 0.5


# ---------------------------------------------------------------------------------- the best on dev


NUM_DEV = 6


def few_dev_questions(toy, folder) -> str:
  """Writes a file of this many questions; the corpus has a different number."""
  rows = [json.loads(line) for line in open(toy.path("corpus/questions.dev.jsonl"))]
  return write_questions(folder / "dev.jsonl", *rows[:NUM_DEV])


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_snapshot_with_the_best_exact_match_on_dev_is_published(
  system, toy, tmp_path, monkeypatch
):
  """What is measured during training is what evaluation measures.

  Here the best snapshot is not the last.
  """
  workdir, path, measured = str(tmp_path / "W"), few_dev_questions(toy, tmp_path), []
  exact_match_of = closed_book.exact_match_of

  def recorded(rows, texts):
    measured.append(exact_match_of(rows, texts))
    return measured[-1] + (len(measured) == 1)  # the first is reported as the best

  monkeypatch.setattr(closed_book, "exact_match_of", recorded)
  config = dict(finetune__dev_questions=path, finetune__eval_every=2, finetune__learning_rate=3e-2)
  with eagerly():
    last = fine_tune(toy, workdir, system, **config)
  info = artifacts.read_info(last)
  assert (
    last.endswith("/snapshots/00000004")
    and info["best_step"] == 2
    and info["dev_exact_match"] == measured[0] + 1
  )
  scores = [row["dev_exact_match"] for row in progress.read_metrics(workdir)]
  assert scores == [measured[0] + 1, measured[1]]
  monkeypatch.undo()
  assert score(workdir, questions_path=path)["exact_match"] == pytest.approx(measured[0])
  kept = os.path.join(workdir, "best/00000002")
  same_weights(last, kept)
  again = fine_tune(toy, workdir, system, **config)  # nothing is left to do
  same_weights(again, kept)
  assert artifacts.read_info(again)["best_step"] == 2 and again == last


def same_weights(got: str, wanted: str) -> None:
  """Checks that two snapshots share their models and the learned weight of BM25's scores."""
  infos = [artifacts.read_info(folder) for folder in (got, wanted)]
  assert infos[0]["config"] == infos[1]["config"] and infos[0].get("score_weight") == infos[1].get(
    "score_weight"
  )
  for name in infos[0]["config"]:
    models = [snapshots.load_model(folder, name) for folder in (got, wanted)]
    for one, other in zip(models[0].weights, models[1].weights, strict=True):
      np.testing.assert_array_equal(
        one, other, err_msg=f"{name} of {got} and of {wanted}: {other.path}"
      )


def test_eval_every_must_fit_the_rows_of_metrics(toy, tmp_path):
  for every in (0, 3):
    with pytest.raises(
      artifacts.UserError,
      match=f"eval_every is {every}; with dev_questions it must be a multiple of "
      "finetune.log_every, 2",
    ):
      fine_tune(
        toy,
        str(tmp_path),
        "dense",
        finetune__dev_questions=toy.path("corpus/questions.dev.jsonl"),
        finetune__eval_every=every,
      )


# ------------------------------------------------------------------------ refresh while fine-tuning


@dataclasses.dataclass
class Refreshed:
  """A finished run: its last snapshot, its rows, and what each step used.

  For each step it has the embeddings in use, the questions and the passages found.
  """

  workdir: str
  last: str
  rows: list[dict]
  seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def refreshed(toy, tmp_path_factory) -> Refreshed:
  """A run of 60 steps, slowed down so that the first refresh takes place during them."""
  workdir, seen = str(tmp_path_factory.mktemp("refreshed")), []
  dev = few_dev_questions(toy, tmp_path_factory.mktemp("dev"))

  def indexed_yet():
    return artifacts.latest(os.path.join(workdir, "indexes"))

  over = QaExamples.over

  def recorded(data, search, embeddings, table):
    if len(data.rows) == NUM_DEV:
      return over(data, search, embeddings, table)  # the dev questions

    def watched(query_ids, texts):
      found = search(query_ids, texts)
      seen.append((embeddings, query_ids, found.numbers))
      if len(seen) == 30:
        wait_until(indexed_yet, "the first refreshed index", timeout_secs=120)
      if np.array_equal(embeddings, seen[0][0]):
        time.sleep(0.5 if indexed_yet() else 0.1)  # it is opened in the background
      return found

    return over(data, watched, embeddings, table)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(QaExamples, "over", recorded)
    patch.chdir(REPOSITORY)  # where the refresh job is started
    last = fine_tune(
      toy,
      workdir,
      "dense",
      finetune__refresh_every_steps=10,
      finetune__steps=60,
      finetune__log_every=10,
      finetune__checkpoint_every=30,
      refresh__job_args=("--poll_secs=0.1", "--nojit_compile", "--keep=100"),
      finetune__dev_questions=dev,
      finetune__eval_every=20,
    )
  return Refreshed(workdir, last, progress.read_metrics(workdir), seen)


def test_query_tower_index_and_embeddings_are_taken_over_together(refreshed, toy):
  end = refreshed.rows[-1]
  assert (
    end["refreshes"] >= 1
    and end["steps_during_refreshes"] > 0
    and end["index_step"] % 10 == 0 < end["index_step"]
  )
  assert refreshed.rows[0]["index_step"] == 0 and len(refreshed.seen) >= 60
  known = {0: (toy.path("ict/indexes/00000000"), toy.path("ict/snapshots/00000000"))} | {
    step: tuple(
      os.path.join(refreshed.workdir, name, f"{step:08d}") for name in ("indexes", "snapshots")
    )
    for step in range(10, 61, 10)
  }
  known = {
    step: (index.read_embeddings(folder, num_rows=32), snapshots.load_retriever(snapshot))
    for step, (folder, snapshot) in known.items()
    if artifacts.is_complete(folder)
  }
  steps = [
    next(step for step, (vectors, _) in known.items() if np.array_equal(vectors, embeddings))
    for embeddings, *_ in refreshed.seen
  ]
  assert steps == sorted(steps) and steps[0] == 0 and len(set(steps)) > 1
  assert len(set(steps)) - 1 == end["refreshes"] and end["index_step"] == steps[-1]
  assert end["index_age_steps"] == 60 - steps[-1] and end["max_index_age_steps"] == max(
    step - used for step, used in enumerate(steps[-60:], 1)
  ), "steps between a batch and the snapshot of its index"
  for step in set(steps):
    embeddings, query_ids, numbers = refreshed.seen[steps.index(step)]
    scores = np.array(known[step][1].embed_queries(query_ids), np.float64) @ embeddings.T
    np.testing.assert_allclose(
      np.take_along_axis(scores, numbers, 1), -np.sort(-scores)[:, :8], atol=1e-5
    )


def test_best_snapshot_of_both_towers_is_published_with_its_own_index(refreshed):
  """The index is made from it, even if another was made from the last step's weights."""
  scores = {
    row["step"]: row["dev_exact_match"] for row in refreshed.rows if "dev_exact_match" in row
  }
  info = artifacts.read_info(refreshed.last)
  assert list(scores) == [20, 40, 60] and scores[info["best_step"]] == info[
    "dev_exact_match"
  ] == max(scores.values())
  best = os.path.join(refreshed.workdir, "best", f"{info['best_step']:08d}")
  assert os.listdir(os.path.join(refreshed.workdir, "best")) == [os.path.basename(best)]
  same_weights(refreshed.last, best)
  made_from = artifacts.read_info(os.path.join(refreshed.workdir, "indexes/00000060"))["inputs"][
    "snapshot"
  ]["fingerprint"]
  assert made_from == info["fingerprint"]


def test_last_snapshot_of_both_towers_has_its_own_index(refreshed, toy):
  info = artifacts.read_info(refreshed.last)
  assert refreshed.last.endswith("/snapshots/00000060") and info["made_by"] == "finetune"
  own = find_index(refreshed.workdir, SnapshotInfo.read(refreshed.last))
  assert own == os.path.join(refreshed.workdir, "indexes/00000060")
  tuned, base = (
    snapshots.load_retriever(folder)
    for folder in (refreshed.last, toy.path("ict/snapshots/00000000"))
  )
  moved = [
    np.abs(np.array(a) - np.array(b)).max()
    for a, b in zip(
      tuned.passage_tower.trainable_weights, base.passage_tower.trainable_weights, strict=True
    )
  ]
  table, tokenizer = passages.load(toy.config().passages), snapshots.load_tokenizer(refreshed.last)
  packed = packing.pack_passages(
    *packing.gather_passages(table, np.arange(len(table))), tokenizer=tokenizer, length=44
  )
  np.testing.assert_allclose(
    index.read_embeddings(own, num_rows=32), tuned.embed_passages(*packed), atol=1e-5
  )
  path = toy.path("corpus/questions.dev.jsonl")
  got = score(refreshed.workdir, questions_path=path)
  assert np.median(moved) > 1e-4 and got["recall_at_5000"] == 1
  system = parts.find_system(refreshed.workdir)
  assert system.folders["index"] == own and system.masked_reader is None, (
    "this index has no masked reader"
  )
  with pytest.raises(
    artifacts.ArtifactError,
    match=f"was made from snapshot .*, but the fine-tuned retriever wants {info['fingerprint']}",
  ):
    score(refreshed.workdir, questions_path=path, index_folder=toy.path("ict/indexes/00000000"))


def test_finished_run_is_not_trained_again(refreshed, toy, monkeypatch):
  monkeypatch.chdir(REPOSITORY)
  before = artifacts.read_info(refreshed.last)
  again = fine_tune(
    toy,
    refreshed.workdir,
    "dense",
    finetune__refresh_every_steps=10,
    finetune__steps=60,
    finetune__log_every=10,
    finetune__checkpoint_every=30,
    finetune__dev_questions=toy.path("corpus/questions.dev.jsonl"),
    finetune__eval_every=20,
  )
  assert again == refreshed.last and artifacts.read_info(again) == before


def test_passages_read_are_embedded_anew_and_the_others_are_not(toy, monkeypatch, tmp_path):
  """The live passage tower scores the first of the beam, and learns from them.

  The embeddings of the index score the rest.
  """
  caught = []
  monkeypatch.setattr(
    loop,
    "train",
    lambda model, batches, **what: caught.append(Captured(model, batches)) or sys.exit(),
  )
  with pytest.raises(SystemExit):
    fine_tune(
      toy, str(tmp_path), "dense", finetune__refresh_every_steps=10, refresh__start_job=False
    )
  (caught,) = caught
  model, batch = caught.model, caught.batches(0)
  # stale, let us say
  batch["beam_embeddings"] = np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)
  with tf.GradientTape() as tape:
    scores = model(batch)["beam_scores"]
    first = tf.reduce_sum(scores[:, 0])
  queries = np.array(model.query_tower(batch["query_ids"]), np.float64)
  for row in range(4):
    live = np.array(
      model.passage_tower(batch["passage_ids"][row], batch["passage_segments"][row]), np.float64
    )
    np.testing.assert_allclose(scores[row, :2], live @ queries[row], atol=1e-5)
    np.testing.assert_allclose(
      scores[row, 2:], batch["beam_embeddings"][row, 2:] @ queries[row], atol=1e-5
    )
  gradient = tape.gradient(first, model.passage_tower.projection.kernel.value)
  assert np.abs(gradient).max() > 1e-3
  table = passages.load(toy.config().passages)
  tokenizer = Tokenizer(toy.config().passages)
  for ids in batch["passage_ids"].reshape(-1, 44):
    title = ids[1 : list(ids).index(tokenizer.sep_id)].tolist()
    assert title in [table.title_ids[number].tolist() for number in range(32)]


# ----------------------------------------------------------------------------------------- refusals


@pytest.fixture
def exchanged(toy, fine_tuned, tmp_path) -> Iterator[tuple[str, str]]:
  """Another snapshot, and the dense system's index, made from that snapshot during the test."""
  passages_folder = toy.config().passages
  snapshot = folders.publish_snapshot(str(tmp_path / "other"), 7, vocab=passages_folder)
  folder = os.path.join(fine_tuned["dense"], "base/indexes/00000000")
  os.rename(folder, tmp_path / "right")
  embed_passages.embed(
    folder, snapshot=snapshot, passages_folder=passages_folder, jit_compile=False
  )
  yield snapshot, folder
  shutil.rmtree(folder)
  os.rename(tmp_path / "right", folder)


def test_index_of_another_snapshot_is_refused(toy, fine_tuned, exchanged, tmp_path):
  newer, folder = exchanged
  base = os.path.join(fine_tuned["dense"], "base")
  got, wanted = (
    artifacts.read_info(path)["fingerprint"]
    for path in (newer, os.path.join(base, "snapshots/00000000"))
  )
  for call in (
    # evaluate --index, zero-shot, fine-tune
    lambda: score(
      fine_tuned["dense"],
      questions_path=toy.path("corpus/questions.dev.jsonl"),
      index_folder=folder,
    ),
    lambda: score(base, questions_path=toy.path("corpus/questions.dev.jsonl")),
    lambda: fine_tune(toy, str(tmp_path / "V"), "dense", finetune__retriever=base),
  ):
    with pytest.raises(
      artifacts.ArtifactError, match=f"was made from snapshot {got}.*want(s|ed) {wanted}"
    ):
      call()
  snapshot = os.path.join(fine_tuned["dense"], "snapshots/00000004")
  # A copy of the right one is nearby.
  found = find_index(fine_tuned["dense"], SnapshotInfo.read(snapshot))
  assert (
    found != folder and artifacts.read_info(found)["inputs"]["snapshot"]["fingerprint"] == wanted
  )


def test_index_made_from_the_fine_tuned_snapshot_is_as_good(toy, fine_tuned, tmp_path):
  """Its passage tower is that of the base, so another corpus can be indexed with either."""
  folder, path = str(tmp_path / "indexes/00000004"), toy.path("corpus/questions.dev.jsonl")
  embed_passages.embed(
    folder,
    snapshot=os.path.join(fine_tuned["dense"], "snapshots/00000004"),
    passages_folder=toy.config().passages,
    jit_compile=False,
  )
  assert score(fine_tuned["dense"], questions_path=path, index_folder=folder) == score(
    fine_tuned["dense"], questions_path=path
  )


def test_readers_of_another_vocabulary_and_missing_parts(toy, tmp_path):
  folder = folders.make_passages(str(tmp_path / "P"), num_passages=5, num_shards=1)
  for system in SYSTEMS:
    with pytest.raises(
      artifacts.ArtifactError, match="snapshot .* was made with vocabulary .* this run has"
    ):
      fine_tune(toy, str(tmp_path / "W"), system, passages=folder)
    with pytest.raises(
      artifacts.ArtifactError, match="no snapshot in .*nothing.*; run realm_tf.pretrain first"
    ):
      fine_tune(toy, str(tmp_path / "W"), system, finetune__reader=str(tmp_path / "nothing"))
  with pytest.raises(artifacts.ArtifactError, match="no snapshot in .*nothing"):
    fine_tune(toy, str(tmp_path / "W"), "dense", finetune__retriever=str(tmp_path / "nothing"))
  with pytest.raises(artifacts.UserError, match="no file .*nothing.jsonl"):
    fine_tune(
      toy, str(tmp_path / "W"), "dense", finetune__questions=str(tmp_path / "nothing.jsonl")
    )
  with pytest.raises(artifacts.ArtifactError, match="no snapshot in"):
    score(str(tmp_path / "W"), questions_path=toy.path("corpus/questions.dev.jsonl"))


# -------------------------------------------------------------------------------------- closed book


def test_closed_book_learns_answers_by_heart(toy, tmp_path):
  lines = [
    {"question": "who founded the town?", "answer": ["Vallafried"]},
    {"question": "which river is near?", "answer": ["Lorwash of Armos"]},
  ]
  path = tmp_path / "q.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  folder = fine_tune(
    toy,
    str(tmp_path / "W"),
    "none",
    finetune__questions=str(path),
    finetune__steps=60,
    finetune__log_every=30,
    finetune__checkpoint_every=60,
    finetune__learning_rate=1e-2,
    finetune__batch_size=2,
  )
  reader, tokenizer = (
    snapshots.load_model(folder, "reader"),
    passages.load_tokenizer(toy.config().passages),
  )
  texts = [line["question"] for line in lines]
  answer([texts[0] * 500, ""], reader, tokenizer)  # too long, and empty: no error
  assert answer(texts, reader, tokenizer) == ["vallafried", "lorwash of armos"]
  made = inputs(Ragged.of([[7] * 500, [8, 9]], np.int32), np.arange(2), reader, tokenizer)
  for ids, positions in zip(made["reader_ids"][:, 0], made["mask_positions"], strict=True):
    assert (ids[positions] == tokenizer.mask_id).all() and (
      ids == tokenizer.mask_id
    ).sum() == reader.max_masks


def test_closed_book_leaves_expressions_out(toy, tmp_path, capfd):
  rows = [
    {"question": "a?", "answer": ["x.*"], "regex": True},
    {"question": "b?", "answer": ["Lorwash"]},
  ]
  with eagerly():
    fine_tune(
      toy,
      str(tmp_path / "W"),
      "none",
      finetune__questions=write_questions(tmp_path / "q.jsonl", *rows),
    )
  assert "1 questions left out: their answers are regular expressions" in capfd.readouterr().err
  with pytest.raises(artifacts.UserError, match="all answers are regular expressions"):
    fine_tune(
      toy,
      str(tmp_path / "V"),
      "none",
      finetune__questions=write_questions(tmp_path / "r.jsonl", rows[0]),
    )
