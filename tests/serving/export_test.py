"""Exported servables on the toy corpus.

Tests answers against evaluation, filled blanks against NumPy, and what is published.
"""

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from beam_jobs import embed_passages, embedding, make_passages, update_passages
from realm_tf.corpus import passages
from realm_tf.examples import packing
from realm_tf.examples.open_qa import QaExamples
from realm_tf.examples.questions import Question
from realm_tf.models import snapshots
from realm_tf.retrieval import approximate, index
from realm_tf.storage import artifacts
from realm_tf.systems.question_answering import QuestionAnswering
from realm_tf.systems.workdir import open_workdir
from serving import export, parts, signatures
from serving.servable import mask_filling
from tests.processes import REPOSITORY
from tests.servables import NUM_ANSWERS, NUM_CANDIDATES, STEPS, ask, joined

MANY = 120
ARTICLES = [
  ("Étretat", "Zoë Núñez founded Étretat. The CAFÉ is old, the café new."),
  ("Rön", "ŁUKASZ Çelik owns “Ünïcode” and Rön."),
  ("東京", "日本 has 東京, Émile Zola 🙂 Paris."),
]


@pytest.fixture(scope="module")
def accents(toy, served_workdirs, tmp_path_factory) -> tuple[str, str]:
  """Makes passages with accents, capitals and other scripts, and their index."""
  root = tmp_path_factory.mktemp("accents")
  (root / "articles.jsonl").write_text(
    "".join(json.dumps({"title": title, "text": text}) + "\n" for title, text in ARTICLES)
  )
  folders = str(root / "passages"), str(root / "index")
  make_passages.run(
    str(root / "articles.jsonl"), folders[0], vocab=toy.config().passages, max_tokens=64
  )
  embed_passages.embed(
    folders[1],
    snapshot=served_workdirs["pretrained"] + "/snapshots/00000003",
    passages_folder=folders[0],
    jit_compile=False,
  )
  return folders


# ========================================================================================== answers


@pytest.mark.parametrize("size", [1, 3, 32])
def test_answers_are_those_of_evaluation(size, asked, answerer, loaded):
  rows = asked if size > 1 else asked[:20]
  wanted = answerer.predict(rows)
  got = joined(
    [
      ask(loaded, "answer", [row.text for row in rows[at : at + size]])
      for at in range(0, len(rows), size)
    ]
  )
  default = loaded.signatures[signatures.DEFAULT](question=tf.constant([rows[0].text]))
  assert default["answer"].numpy()[0, 0].decode() == wanted[0].text
  picked = got["answer_rank"][:, 0]
  different = {(answer.text, answer.read_from) for answer in wanted}
  assert [answer for answer in got["answer"][:, 0]] == [answer.text for answer in wanted]
  np.testing.assert_allclose(got["score"][:, 0], [answer.score for answer in wanted], atol=1e-5)
  for row, answer in enumerate(wanted):
    rank, table = picked[row], answerer.table
    assert (
      got["passage_number"][row].tolist() == answer.numbers[:2].tolist()
      and answer.read_from == answer.numbers[rank]
    )
    assert (got["answer_start"][row, rank], got["answer_end"][row, rank]) == answer.byte_span
    assert got["text"][row].tolist() == [table.texts[number] for number in answer.numbers[:2]]
    assert got["title"][row].tolist() == [table.titles[number] for number in answer.numbers[:2]]
    np.testing.assert_allclose(got["retrieval_score"][row], answer.scores[:2], atol=1e-5)
    odds = np.exp(answer.scores.astype(np.float64) - answer.scores.max())
    np.testing.assert_allclose(got["probability"][row], (odds / odds.sum())[:2], atol=1e-6)
    assert got["score"][row, 0] == pytest.approx(
      got["reader_score"][row, rank] + got["retrieval_score"][row, rank], abs=1e-5
    )
  assert len(different) > 3


def all_answers(answerer: QuestionAnswering, text: str) -> list[tuple[str, float, int]]:
  """Returns every distinct answer to a question by exhaustion, best first: text, score, rank.

  They come from the models' raw outputs.
  """
  data = QaExamples(
    [Question(text, ["-"])],
    answerer.table,
    tokenizer=answerer.tokenizer,
    search=answerer.search,
    embeddings=answerer.embeddings,
    reader=answerer.reader,
    num_read=answerer.num_read,
  )
  inputs, numbers = data.inputs(np.array([0]))
  outputs = answerer.model.predict_on_batch(inputs)
  pieces, found = answerer.tokenizer.pieces, []
  for rank, number in enumerate(numbers[0, : answerer.num_read]):
    ids, segments = (
      inputs["reader_ids"][0, rank].tolist(),
      inputs["reader_segments"][0, rank].tolist(),
    )
    # the text and its [SEP]
    first, last = (
      segments.index(1),
      len(segments) - 1 - segments[::-1].index(1),
    )
    begins, ends = answerer.table.token_starts[number], answerer.table.token_ends[number]
    for start in range(first, last):
      for size in range(min(answerer.reader.max_span, last - start)):
        if not pieces[ids[start]].startswith("##") and not pieces[ids[start + size + 1]].startswith(
          "##"
        ):
          span = (
            answerer.table.texts[number]
            .encode()[begins[start - first] : ends[start + size - first]]
            .decode()
          )
          found.append((span, float(outputs["span_scores"][0, rank, start, size]), rank))
  best = {}
  for span, score, rank in sorted(found, key=lambda row: -row[1]):
    best.setdefault(span, (span, score, rank))
  assert len(best) < len(found), "some text is in several places"
  return list(best.values())


def test_best_answers_keep_case_and_accents(served_workdirs, accents):
  """Answers are distinct, best first, and exactly as written.

  A missing one is empty and has the lowest score.
  """
  folders = dict(zip(("passages_folder", "index_folder"), accents, strict=True))
  answerer = QuestionAnswering(open_workdir(served_workdirs["dense"], **folders))
  answerer.num_read = 3
  system = parts.find_system(served_workdirs["dense"], **folders)
  _, functions, _ = export.build(
    system,
    answerer.table,
    parts.open_searcher(system, answerer.table, kind="exact"),
    num_answers=MANY,
    num_passages=3,
    num_retrieved=100,
    num_candidates=3,
  )
  asked = ["who founded Étretat?", "where is 東京?", "", "x"]
  got = {key: value.numpy() for key, value in functions["answer"](tf.constant(asked)).items()}
  got["answer"] = np.vectorize(bytes.decode, otypes=[object])(got["answer"])
  for row, text in enumerate(asked):
    wanted = all_answers(answerer, text)
    count = len(wanted)
    assert 30 < count < MANY and got["answer"][row, count:].tolist() == [""] * (MANY - count), text
    assert (got["score"][row, count:] == np.float32(signatures.NO_SCORE)).all() and (
      got["answer_rank"][row, count:] == -1
    ).all(), text
    np.testing.assert_allclose(
      got["score"][row, :count], [score for _, score, _ in wanted], atol=1e-5
    )
    assert (np.diff(got["score"][row]) <= 0).all()
    by_text = {span: (score, rank) for span, score, rank in wanted}
    assert set(got["answer"][row, :count]) == set(by_text)
    for span, score, rank in zip(
      got["answer"][row, :count],
      got["score"][row, :count],
      got["answer_rank"][row, :count],
      strict=True,
    ):
      assert (score, rank) == (pytest.approx(by_text[span][0], abs=1e-5), by_text[span][1])
  said = {answer for row in got["answer"] for answer in row}
  assert {"Zoë", "CAFÉ", "café", "Rön", "東京"} <= said


def test_retrieve(asked, answerer, loaded):
  rows = asked[:5]
  got, wanted = ask(loaded, "retrieve", [row.text for row in rows]), answerer.predict(rows)
  assert got["passage_number"].shape == (5, 32)
  assert got["passage_number"].tolist() == [answer.numbers.tolist() for answer in wanted]
  np.testing.assert_allclose(
    got["retrieval_score"], [answer.scores for answer in wanted], atol=1e-5
  )
  np.testing.assert_allclose(got["probability"].sum(axis=1), 1, atol=1e-6)
  assert got["text"][2, 7] == answerer.table.texts[got["passage_number"][2, 7]]


# =========================================================================================== blanks


def pack(
  tokenizer, first, second, *, room_for_first: int, length: int
) -> tuple[list[int], list[int]]:
  """Packs [CLS] first [SEP] second [SEP] by hand."""
  first = list(first)[:room_for_first]
  second = list(second)[: length - 3 - len(first)]
  ids = [tokenizer.cls_id, *first, tokenizer.sep_id, *second, tokenizer.sep_id]
  return ids + [0] * (length - len(ids)), [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * (
    length - len(ids)
  )


def log_softmax(logits) -> np.ndarray:
  shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def fill_by_hand(text: str, retriever, reader, tokenizer, table) -> dict:
  """Returns p(z|x), p(y|z,x) and their marginal in float64.

  They come from the outputs of towers and reader for inputs packed by hand.
  """
  parts = tokenizer(text.split("[MASK]")).to_list()
  ids = [piece for part in parts for piece in [*part, tokenizer.mask_id]][:-1]
  query = [tokenizer.cls_id, *ids[: retriever.query_length - 2], tokenizer.sep_id]
  query += [0] * (retriever.query_length - len(query))
  positions = [at for at, piece in enumerate(query) if piece == tokenizer.mask_id][
    : reader.max_masks
  ]
  vector = np.array(retriever.embed_queries(np.array([query], np.int32)), np.float64)[0]
  packed = [
    pack(
      tokenizer,
      title,
      body,
      room_for_first=(retriever.passage_length - 3) // 2,
      length=retriever.passage_length,
    )
    for title, body in [
      ([], []),
      *((table.title_ids[n], table.text_ids[n]) for n in range(len(table))),
    ]
  ]
  vectors = np.array(
    retriever.embed_passages(*(np.array(part, np.int32) for part in zip(*packed, strict=True))),
    np.float64,
  )
  scores = vectors @ vector  # null passage, passage 0, passage 1, ..
  numbers = [-1, *np.argsort(-scores[1:], kind="stable")[: NUM_CANDIDATES - 1]]
  prior = np.exp(log_softmax(scores[np.array(numbers) + 1]))
  texts = [[] if number < 0 else table.text_ids[number] for number in numbers]
  read = [
    pack(tokenizer, ids, text_ids, room_for_first=retriever.query_length - 2, length=reader.length)
    for text_ids in texts
  ]
  token_ids, segments = (np.array(part, np.int32) for part in zip(*read, strict=True))
  padded = np.tile(
    positions + [0] * (reader.max_masks - len(positions)), [NUM_CANDIDATES, 1]
  ).astype(np.int32)
  logits = np.array(
    reader({"token_ids": token_ids, "segment_ids": segments, "mask_positions": padded})
  )
  log_probs = log_softmax(logits)[:, : len(positions)]  # [C, M, V]
  marginal = np.einsum("c,cmv->mv", prior, np.exp(log_probs))
  chosen = marginal.argmax(axis=-1)
  likelihoods = log_probs[:, np.arange(len(positions)), chosen].sum(axis=1)
  return {
    "numbers": numbers,
    "prior": prior,
    "marginal": marginal,
    "alone": np.exp(log_probs[0]),
    "chosen": chosen,
    "utility": likelihoods - likelihoods[0],
  }


TEXTS = [
  "The river near Armos is [MASK].",
  "[MASK] was founded by [MASK] [MASK] in Korbara.",
  "nothing to fill",
  "",
  "[MASK]" * 7,
  "a b " * 8 + "[MASK] then " + "c d " * 8 + "[MASK]",
  "Étretat [mask] [MASK]",
]


@pytest.fixture(scope="module")
def filled_by_hand(served_workdirs, answerer) -> list[dict]:
  snapshot = served_workdirs["pretrained"] + "/snapshots/00000003"
  retriever, reader = snapshots.load_retriever(snapshot), snapshots.load_model(snapshot, "reader")
  return [
    fill_by_hand(text, retriever, reader, answerer.tokenizer, answerer.table) for text in TEXTS
  ]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_blanks_are_filled_as_the_trainer_computes(size, answerer, filled_by_hand, loaded):
  tokenizer, table = answerer.tokenizer, answerer.table
  answers = [ask(loaded, "fill_mask", TEXTS[at : at + size]) for at in range(0, len(TEXTS), size)]
  got = [
    {key: value[row] for key, value in answer.items()}
    for answer in answers
    for row in range(len(answer["filled"]))
  ]
  assert [row["num_masks"] for row in got] == [1, 3, 0, 0, 5, 1, 1]
  for text, row, wanted in zip(TEXTS, got, filled_by_hand, strict=True):
    masks = row["num_masks"]
    assert masks == len(wanted["marginal"]) and row["passage_number"].tolist() == wanted["numbers"]
    np.testing.assert_allclose(row["probability"], wanted["prior"], atol=1e-6)
    np.testing.assert_allclose(row["retrieval_utility"], wanted["utility"], atol=2e-5)
    assert row["title"].tolist() == [
      "",
      *(table.titles[number] for number in wanted["numbers"][1:]),
    ]
    assert row["text"].tolist() == ["", *(table.texts[number] for number in wanted["numbers"][1:])]
    for token, probability, exact in (
      ("token", "token_probability", wanted["marginal"]),
      ("token_without_retrieval", "token_probability_without_retrieval", wanted["alone"]),
    ):
      for mask in range(masks):
        best = np.sort(exact[mask])[::-1][:NUM_ANSWERS]
        np.testing.assert_allclose(row[probability][mask], best, rtol=1e-4)
        for piece, value in zip(row[token][mask], best, strict=True):
          assert exact[mask][tokenizer.pieces.index(piece)] == pytest.approx(value, rel=1e-4)
      assert set(row[token][masks:].ravel()) <= {""} and not row[probability][masks:].any()
    assert row["filled"].count("[MASK]") == text.count("[MASK]") - masks, text
  assert np.ptp(got[1]["retrieval_utility"]) > 1e-3 and got[1]["probability"].max() < 0.999, (
    "the numbers above are not trivial"
  )


@pytest.mark.parametrize(
  "text, tokens, filled",
  [
    ("It is [MASK].", ["paris"], "It is paris."),
    ("It is Par [MASK].", ["##is"], "It is Paris."),
    ("It is [MASK]  [MASK] [MASK]!", ["par", "##is", "now"], "It is paris now!"),
    ("[MASK][MASK][MASK]", ["par", "##is", "now"], "paris now"),
    ("[MASK]", ["##is"], "is"),
    ("([MASK])\n", ["a"], "(a)\n"),
    ("[MASK] [MASK] [MASK]", ["a", "b"], "a b [MASK]"),
    ("Été [mask]", [], "Été [mask]"),
    ("", [], ""),
  ],
)
def test_what_is_filled_reads_as_text(text, tokens, filled):
  pieces = tf.strings.split([text], signatures.MASK)
  tokens = tokens + [""] * (3 - len(tokens))
  blanks = mask_filling.Blanks(pieces, None, None, tf.constant([3 - tokens.count("")]))
  assert mask_filling._fill(blanks, tf.constant([tokens])).numpy()[0].decode() == filled


# ========================================================================================= requests


def test_odd_requests_are_answered(loaded):
  odd = [
    "",
    b"\xff\xfe bad \xc3",
    "a" * 10_000,
    "who founded " * 900,
    "\x00",
    "🙂 東京",
    "[MASK] [CLS] [SEP]",
  ]
  for name in ("answer", "fill_mask", "retrieve"):
    got, nothing = ask(loaded, name, odd), ask(loaded, name, [])
    for field in signatures.SIGNATURES[name].outputs:
      assert len(got[field.name]) == len(odd) and nothing[field.name].shape == (
        0,
        *got[field.name].shape[1:],
      ), field.name
      if got[field.name].dtype != object:
        assert np.isfinite(got[field.name]).all(), field.name
      json.dumps(got[field.name].tolist(), allow_nan=False)
  assert ask(loaded, "fill_mask", odd)["filled"][1] == "\ufffd\ufffd bad \ufffd"


def test_signatures_say_what_the_model_has(servable, loaded):
  described = json.loads(artifacts.read_text(servable + "/signatures.json"))
  sizes = described["sizes"]
  assert sizes == {"N": NUM_ANSWERS, "K": 32, "R": 2, "C": NUM_CANDIDATES}
  assert set(described["signatures"]) == {"answer", "fill_mask", "retrieve"}
  assert set(loaded.signatures) == {"answer", "fill_mask", "retrieve", "serving_default"}
  for name, signature in described["signatures"].items():
    function = loaded.signatures[name]
    assert set(function.structured_outputs) == {field["name"] for field in signature["outputs"]}
    assert list(function.structured_input_signature[1]) == [
      field["name"] for field in signature["inputs"]
    ]
    for field in signature["outputs"]:
      spec, got = (
        function.structured_outputs[field["name"]],
        ask(loaded, name, ["x [MASK]", "y"])[field["name"]],
      )
      assert spec.dtype.name == field["dtype"] and len(field["shape"]) == spec.shape.rank, field[
        "name"
      ]
      assert got.shape == tuple({"B": 2, "M": 1, **sizes}[word] for word in field["shape"]), field[
        "name"
      ]
  for place in ("", "assets.extra/"):
    document = artifacts.read_text(f"{servable}/{place}signatures.md")
    assert all(
      f"`{field['name']}`" in document
      for part in described["signatures"].values()
      for field in part["outputs"]
    )


def test_warm_up_requests_run(servable, loaded):
  seen = []
  for record in tf.data.TFRecordDataset(
    servable + "/assets.extra/tf_serving_warmup_requests"
  ).as_numpy_iterator():
    log = prediction_log_pb2.PredictionLog.FromString(record)
    assert log.WhichOneof("log_type") == "predict_log"
    request = log.predict_log.request
    inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
    outputs = loaded.signatures[request.model_spec.signature_name](
      **{name: tf.constant(value) for name, value in inputs.items()}
    )
    (size,) = {len(value) for value in (*inputs.values(), *outputs.values())}
    seen.append((request.model_spec.name, request.model_spec.signature_name, size))
    if "num_masks" in outputs:
      assert (outputs["num_masks"].numpy() == 1).all()
  assert sorted(seen) == sorted(
    ("realm", name, size) for name in loaded.signatures for size in (1, 32)
  )


# ========================================================================================= op kinds

FRESH_PROCESS = """
import json, sys
import tensorflow as tf
import tensorflow_text
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry

saved = open(sys.argv[1] + "/saved_model.pb", "rb").read()
graph = saved_model_pb2.SavedModel.FromString(saved).meta_graphs[0].graph_def
functions = {function.signature.name for function in graph.library.function}
parts = (graph.node, *(function.node_def for function in graph.library.function))
nodes = [node for part in parts for node in part]
ops = {node.op for node in nodes} - functions
largest = max(node.ByteSize() for node in nodes)
unknown = sorted(op for op in ops if op_def_registry.get(op) is None)
answers = None
if not unknown:
  answer = tf.saved_model.load(sys.argv[1]).signatures["answer"]
  answers = answer(question=tf.constant([sys.argv[2]]))
print(json.dumps({
  "ops": sorted(ops),
  "unknown": unknown,
  "largest": largest,
  "modules": sorted(sys.modules),
  "answer": answers and [text.decode() for text in answers["answer"].numpy()[0]],
}))
"""


def in_fresh_process(folder: str, question: str) -> dict:
  done = subprocess.run(
    [sys.executable, "-c", FRESH_PROCESS, folder, question],
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def test_exact_servable_needs_only_tensorflow_and_tf_text(servable, loaded):
  question = "who founded the town of Armos?"
  got = in_fresh_process(servable, question)
  assert got["unknown"] == [] and not [op for op in got["ops"] if "Scann" in op or "PyFunc" in op]
  assert not {"scann", "realm_tf", "serving"} & set(got["modules"])
  assert got["answer"] == ask(loaded, "answer", [question])["answer"][0].tolist()
  assert got["largest"] < 1 << 20, "the corpus is in variables"


def test_scann_servable_agrees_with_the_exact_one(
  asked, served_workdirs, loaded, tmp_path, monkeypatch
):
  """All candidates of a small corpus are scored, so the answers are those of exact search."""
  from scann.scann_ops.py import scann_ops  # registers its op  # noqa: F401

  folder = export_with_partitions("scann", served_workdirs, tmp_path, monkeypatch)
  ops = ops_of(folder)
  assert [op for op in ops if op.startswith("Scann>") and "Search" in op], "ScaNN searches"
  check_same_answers(tf.saved_model.load(folder), loaded, [row.text for row in asked])


def test_scann_servable_of_a_small_corpus_needs_no_op_of_scanns(
  asked, served_workdirs, loaded, tmp_path
):
  """The servable exported by the command, as a user would."""
  output = str(tmp_path / "M")
  done = command(
    served_workdirs,
    output,
    "--searcher=scann",
    f"--num_answers={NUM_ANSWERS}",
    f"--num_candidates={NUM_CANDIDATES}",
  )
  said = done.communicate()
  assert (
    done.returncode == 0
    and said[0] == f"{output}/1: answer, fill_mask, retrieve, serving_default\n"
  ), said
  assert not [op for op in ops_of(f"{output}/1") if "Scann" in op]
  model = tf.saved_model.load(f"{output}/1")
  check_same_answers(model, loaded, [row.text for row in asked])


def export_with_partitions(searcher: str, served_workdirs, tmp_path, monkeypatch) -> str:
  """Exports a small corpus with all the partitions of a large one's searcher; all are read."""
  monkeypatch.setattr(approximate, "MIN_ROWS", 10)
  folder = export.export(
    served_workdirs["dense"],
    str(tmp_path / "M"),
    searcher=searcher,
    num_answers=NUM_ANSWERS,
    num_candidates=NUM_CANDIDATES,
  )
  said = artifacts.read_info(folder)["search"]
  assert said.startswith(f"{searcher}, 5 of 5 partitions, 32 candidates"), said
  return folder


def ops_of(folder: str) -> set[str]:
  """Returns the ops of a SavedModel's functions."""
  with open(f"{folder}/saved_model.pb", "rb") as file:
    saved = saved_model_pb2.SavedModel.FromString(file.read())
  library = saved.meta_graphs[0].graph_def.library
  return {node.op for function in library.function for node in function.node_def}


def test_partitioned_servable_needs_only_tensorflow_and_tf_text(
  asked, served_workdirs, loaded, tmp_path, monkeypatch
):
  """All partitions of a small corpus are searched, so the answers are those of exact search."""
  folder = export_with_partitions("partitioned", served_workdirs, tmp_path, monkeypatch)
  texts = [row.text for row in asked]
  got = in_fresh_process(folder, texts[0])
  assert got["unknown"] == [] and not [op for op in got["ops"] if "Scann" in op or "PyFunc" in op]
  assert "UniqueWithCounts" in got["ops"], "which partitions are read"
  assert not {"scann", "realm_tf", "serving"} & set(got["modules"])
  assert got["answer"] == ask(loaded, "answer", texts[:1])["answer"][0].tolist()
  assert got["largest"] < 1 << 20, "partitions and corpus are in variables"
  check_same_answers(tf.saved_model.load(folder), loaded, texts)


def check_same_answers(model, loaded, texts: list[str]) -> None:
  """Compares two servables' answers, blanks and passages, for texts and for no texts."""
  for name, inputs in (("answer", texts), ("fill_mask", TEXTS), ("retrieve", texts)):
    got, wanted = ask(model, name, inputs), ask(loaded, name, inputs)
    for key, value in wanted.items():
      if value.dtype == np.float32:
        np.testing.assert_allclose(got[key], value, atol=1e-5)
      else:
        assert (got[key] == value).all(), (name, key)
    assert {len(value) for value in ask(model, name, []).values()} == {0}


# ======================================================================================= publishing


def command(served_workdirs, output, *args) -> subprocess.Popen:
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "serving.export",
      f"--workdir={served_workdirs['dense']}",
      f"--output={output}",
      *args,
    ],
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_a_version_is_seen_whole_or_not_at_all(toy, served_workdirs, tmp_path):
  """Tests what a server would find under M while one export is killed and another one runs."""
  output, looks = str(tmp_path / "M"), 0
  assert export.newest_version(output) is None

  def watch(until):
    nonlocal looks
    while not until():
      for version in export.versions(output):
        folder = os.path.join(output, str(version))
        assert all(
          os.path.exists(os.path.join(folder, name))
          for name in (
            "saved_model.pb",
            "variables/variables.index",
            "assets.extra/tf_serving_warmup_requests",
            "COMPLETE",
          )
        ), folder
      looks += 1
      time.sleep(0.01)

  killed = command(served_workdirs, output)
  watch(lambda: os.path.exists(output + "/.staging-1/variables") or killed.poll() is not None)
  killed.send_signal(signal.SIGKILL)
  assert (
    killed.wait() == -signal.SIGKILL
    and os.listdir(output) == [".staging-1"]
    and export.versions(output) == []
  )
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    running = pool.submit(export.export, toy.path("ict"), output)
    watch(running.done)
    assert running.result() == f"{output}/1" == export.newest_version(output) and os.listdir(
      output
    ) == ["1"]
  assert set(tf.saved_model.load(f"{output}/1").signatures) == {"retrieve"}, (
    "an ICT workdir has no reader"
  )
  print(f"{looks} looks")

  os.makedirs(output + "/10")  # not ours, not complete
  assert export.newest_version(output) == f"{output}/1" and export.versions(output) == [1, 10]
  with pytest.raises(artifacts.UserError, match="already has a version 1, .* leave --version out"):
    export.export(served_workdirs["dense"], output, version=1)
  assert export.export(toy.path("ict"), output) == f"{output}/11" == export.newest_version(output)


def test_info_says_what_it_was_made_from(toy, served_workdirs, servable):
  info = artifacts.read_info(servable, kind="servable")
  pretrained = served_workdirs["pretrained"]
  folders = {
    "snapshot": f"{served_workdirs['dense']}/snapshots/{STEPS:08d}",
    "pretrained": pretrained + "/snapshots/00000003",
    "index": pretrained + "/indexes/00000003",
    "passages": toy.config().passages,
  }
  assert info["inputs"] == {
    name: {
      "path": path,
      "relative": os.path.relpath(path, servable),
      "fingerprint": artifacts.read_info(path)["fingerprint"],
    }
    for name, path in folders.items()
  }
  assert info["config"]["searcher"] == "exact" and info["counts"] == {"passages": 32}


def test_a_pretrained_workdir_fills_blanks_and_retrieves(toy, served_workdirs, loaded, tmp_path):
  model = tf.saved_model.load(
    export.export(
      served_workdirs["pretrained"],
      str(tmp_path),
      num_answers=NUM_ANSWERS,
      num_candidates=NUM_CANDIDATES,
    )
  )
  assert set(model.signatures) == {"fill_mask", "retrieve"}
  got, wanted = ask(model, "fill_mask", TEXTS), ask(loaded, "fill_mask", TEXTS)
  assert (got["filled"] == wanted["filled"]).all()
  np.testing.assert_allclose(got["retrieval_utility"], wanted["retrieval_utility"], atol=1e-5)
  tokenizer, snapshot = (
    snapshots.load_tokenizer(toy.path("ict/snapshots/00000000")),
    toy.path("ict/snapshots/00000000"),
  )
  ids = packing.pack_queries(tokenizer(["who is it?"]), tokenizer=tokenizer, length=24)
  vector = np.array(snapshots.load_retriever(snapshot).embed_queries(ids))[0]
  rows = (
    np.load(served_workdirs["pretrained"] + "/indexes/00000003/embeddings-00000-00000-of-00001.npy")
    @ vector
  )
  np.testing.assert_allclose(
    ask(model, "retrieve", ["who is it?"])["retrieval_score"][0], np.sort(rows)[::-1], atol=1e-5
  )


def test_what_does_not_belong_together_is_refused(toy, served_workdirs, accents, tmp_path):
  output = str(tmp_path / "M")
  other = str(tmp_path / "other")
  models = {
    "retriever": snapshots.load_retriever(f"{served_workdirs['dense']}/snapshots/{STEPS:08d}"),
    "reader": snapshots.load_model(toy.path("warm/snapshots/00000000"), "reader"),
  }
  snapshots.publish(
    other + "/snapshots",
    3,
    models,
    tokenizer=snapshots.load_tokenizer(toy.path("ict/snapshots/00000000")),
    made_by="pretrain",
  )
  embed_passages.embed(
    other + "/indexes/00000003",
    snapshot=other + "/snapshots/00000003",
    passages_folder=toy.config().passages,
    jit_compile=False,
  )
  for message, workdir, args in (
    ("no snapshot in .*nothing", str(tmp_path / "nothing"), {}),
    ("is a baseline \\(finetune.retrieval=bm25\\)", served_workdirs["bm25"], {}),
    (
      "no snapshot [0-9a-f]+ with a masked reader in .*other",
      served_workdirs["dense"],
      {"pretrained": other},
    ),
    (
      "was made from snapshot .* fine-tuned retriever wants",
      served_workdirs["dense"],
      {"index_folder": other + "/indexes/00000003"},
    ),
    ("was made from passages", served_workdirs["dense"], {"passages_folder": accents[0]}),
    (
      "was made from snapshot",
      served_workdirs["pretrained"],
      {"index_folder": other + "/indexes/00000003"},
    ),
    (
      "33 passages to read, but only 32 are retrieved",
      served_workdirs["dense"],
      {"num_passages": 33},
    ),
    (
      "34 candidates requested, but the corpus has 32",
      served_workdirs["dense"],
      {"num_candidates": 34},
    ),
  ):
    with pytest.raises(artifacts.UserError, match=message):
      export.export(workdir, output, **args)
  assert export.versions(output) == [] and not os.path.exists(output) or os.listdir(output) == []


class Enough(Exception):
  """Ends `export.watch`."""


def test_a_watching_export_makes_a_version_of_every_change(
  toy, served_workdirs, tmp_path, monkeypatch, capsys
):
  """It waits while the index is not of the passages, repeats no version, and deletes old ones."""
  corpus, output = shutil.copytree(toy.config().passages, tmp_path / "P"), str(tmp_path / "M")
  workdir = shutil.copytree(toy.path("ict"), str(tmp_path / "W"))
  settings = {
    "searcher": "exact",
    "num_answers": 2,
    "num_passages": None,
    "num_retrieved": 3,
    "num_candidates": 3,
  }
  (newest,) = artifacts.complete_folders(f"{workdir}/snapshots")[-1:]

  def refresh() -> None:
    embedding.embed(
      index.folder_of(workdir, newest),
      snapshot=newest,
      passages_folder=str(corpus),
      jit_compile=False,
    )

  *titles, other = passages.load(str(corpus)).titles[:4]
  steps = iter(
    [
      lambda: None,  # version 1 is there; it is not made twice
      lambda: update_passages.update(str(corpus), delete=titles),
      refresh,
      lambda: update_passages.update(str(corpus), delete=[other]),
      refresh,
    ]
  )

  def sleep(_) -> None:
    step = next(steps, None)
    if step is None:
      raise Enough
    step()

  monkeypatch.setattr(export.time, "sleep", sleep)
  refresh()
  where = {"pretrained": None, "index_folder": None, "passages_folder": str(corpus)}
  with pytest.raises(Enough):
    export.watch(workdir, output, settings=settings, where=where, keep=2, poll_secs=1)
  assert export.versions(output) == [2, 3] and sorted(os.listdir(output)) == ["2", "3"]
  said = capsys.readouterr()
  assert said.err.count("waiting: index ") == 2 and "was made from passages" in said.err
  assert f"{output}/1: deleted, because of --keep=2" in said.out
  found = ask(tf.saved_model.load(f"{output}/2"), "retrieve", titles)["title"]
  assert found.shape == (3, 3) and not {*titles, ""} & set(found.ravel().tolist())
