"""The benchmark for an accelerator: data and batches against the trainers', all stages."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks.accelerator import batches, packing
from benchmarks.accelerator.packed import NONE, Packed, firsts
from realm_tf import artifacts, examples, metrics, passages, settings
from realm_tf.holders import MAX_HOLDERS
from realm_tf.models import encoder
from tests import backend_losses
from tests.processes import REPOSITORY

LENGTH, QUERY, READER, MASKS = 64, 20, 72, 4


def compiled(function, **fixed):
  """The whole function: a batch is many small operations, each compiled by itself otherwise."""
  return jax.jit(functools.partial(function, **fixed))


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory) -> str:
  """A folder with passages, spans and questions; each answer is two words of a passage."""
  folder = tmp_path_factory.mktemp("run")
  for name, target in (
    ("passages", toy.path("passages-pretraining")),
    ("spans", toy.path("spans")),
  ):
    (folder / name).symlink_to(target)
  table = passages.load(str(folder / "passages"))
  rows = [
    {"question": f"what of {title}?", "answer": [" ".join(text.split()[2:4])], "title": title}
    for title, text in zip(table.titles, table.texts, strict=True)
  ]
  rows.append({"question": "who?", "answer": ["nobody"], "title": "a title of no passage"})
  (folder / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(folder)


@pytest.fixture(scope="module")
def data(run) -> Packed:
  path = os.path.join(run, "packed.zip")
  packing.pack(
    run,
    [os.path.join(run, "made.jsonl")],
    path,
    length=LENGTH,
    max_clozes=10_000,
    encoder="",
    query_length=QUERY,
    max_masks=MASKS,
    seed=0,
  )
  return Packed.load(path)


@pytest.fixture(scope="module")
def published(data) -> Packed:
  """The same with an encoder's weights."""
  architecture = {
    "vocabulary_size": data.facts["vocabulary_size"],
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
    "max_sequence_length": LENGTH,
    "dropout": 0.1,
  }
  bert = encoder.build_encoder(architecture, name="bert")
  weights = {weight.path: np.asarray(weight) for weight in bert.weights}
  return dataclasses.replace(data, architecture=architecture, encoder=weights)


@pytest.fixture(scope="module")
def table(run) -> passages.PassageTable:
  return passages.load(os.path.join(run, "passages"))


@pytest.fixture(scope="module")
def tokenizer(run):
  return settings.tokenizer(os.path.join(run, "passages"))


@pytest.fixture(scope="module")
def layout(tokenizer) -> batches.Layout:
  return batches.Layout(
    query=QUERY,
    passage=LENGTH,
    reader=READER,
    masks=MASKS,
    cls=tokenizer.cls_id,
    sep=tokenizer.sep_id,
    mask=tokenizer.mask_id,
  )


@pytest.fixture(scope="module")
def corpus(data, layout) -> batches.Corpus:
  return batches.put(data, layout)


# --------------------------------------------------------------------------------------------------
# ----------- packing


def test_pack_keeps_every_cloze_that_fits_and_its_holders(data, table, run):
  wanted = {}  # (passage, word pieces of the sentence) → its spans that fit, as text
  for path in passages.shard_paths(os.path.join(run, "spans"), "spans"):
    for row in passages.read_shard(path, passages.Sentence):
      spans = [
        (start, end)
        for start, end in zip(row.span_starts, row.span_ends, strict=True)
        if end <= QUERY - 2 and end - start <= MASKS
      ]
      if spans:
        text = row.text.encode()
        wanted[row.passage, tuple(row.ids)] = {
          (start, end): metrics.normalize_answer(
            text[row.token_starts[start] : row.token_ends[end - 1]].decode()
          )
          for start, end in spans
        }
  words = [f" {metrics.normalize_answer(text)} " for text in table.texts]
  owner = np.repeat(np.arange(len(table)), data.sentence_counts)
  spans_at, holders_at, useful = firsts(data.span_counts), firsts(data.phrase_counts), 0
  for cloze, sentence in enumerate(data.cloze_sentences):
    number = owner[sentence]
    ids = _sentence(data, sentence, number)
    spans = wanted.pop((number, tuple(ids)))
    assert len(spans) == data.span_counts[cloze]
    for at in range(spans_at[cloze], spans_at[cloze + 1]):
      text = spans[int(data.span_starts[at]), int(data.span_ends[at])]
      holders = {other for other, words_of in enumerate(words) if f" {text} " in words_of}
      titled = f" {text} " in f" {metrics.normalize_answer(table.titles[number])} "
      if not text or titled or not 1 <= len(holders - {number}) <= MAX_HOLDERS:
        assert data.span_phrases[at] == NONE, text
      else:
        phrase, useful = data.span_phrases[at], useful + 1
        assert set(data.phrase_passages[holders_at[phrase] : holders_at[phrase + 1]]) == holders, (
          text
        )
  assert not wanted, "clozes that were not packed"
  assert useful > 10


def _sentence(data: Packed, sentence: int, number: int) -> np.ndarray:
  """Its word pieces."""
  text_at, first = firsts(data.text_counts)[number], firsts(data.sentence_counts)
  end = (
    data.sentence_starts[sentence + 1]
    if sentence + 1 < first[number + 1]
    else data.text_counts[number]
  )
  return data.text_ids[text_at + data.sentence_starts[sentence] : text_at + end]


def test_pack_knows_which_passages_answer(data, table, run):
  rows = [
    json.loads(line) for line in artifacts.read_text(os.path.join(run, "made.jsonl")).splitlines()
  ][:-1]
  assert len(data.question_sets) == len(rows), "the question whose title no passage has is left out"
  matcher, answers, stricts = (
    metrics.AnswerMatcher(table.texts),
    firsts(data.answer_counts),
    firsts(data.strict_counts),
  )
  everything = np.arange(len(table))
  for at, row in enumerate(rows):
    right = np.flatnonzero(matcher.has_answer(everything, row["answer"]))
    which = data.question_answers[at]
    np.testing.assert_array_equal(data.answer_passages[answers[which] : answers[which + 1]], right)
    np.testing.assert_array_equal(
      data.strict_passages[stricts[at] : stricts[at + 1]],
      [n for n in right if table.titles[n] == row["title"]],
    )
  assert 0 < data.question_halves.sum() < len(rows)


def test_pack_refuses_spans_of_other_passages(toy, run, tmp_path):
  (tmp_path / "passages").symlink_to(toy.path("passages"))
  (tmp_path / "spans").symlink_to(toy.path("spans"))  # of other passages
  with pytest.raises(artifacts.ArtifactError, match="was made from passages"):
    packing.pack(
      str(tmp_path),
      [],
      str(tmp_path / "packed"),
      length=LENGTH,
      max_clozes=10,
      encoder="",
      query_length=QUERY,
      max_masks=MASKS,
      seed=0,
    )


# --------------------------------------------------------------------------------------------------
# ----------- batches


def test_packed_rows_are_those_of_the_trainers(corpus, layout, table, tokenizer):
  numbers = np.append(np.arange(len(table)), examples.NULL_PASSAGE)
  titles, texts = examples.gather_passages(table, numbers)
  wanted = examples.pack_passages(titles, texts, tokenizer=tokenizer, length=LENGTH)
  got = compiled(batches.passages, layout=layout)(corpus, jnp.asarray(numbers))
  np.testing.assert_array_equal(got["passage_ids"], wanted.token_ids)
  np.testing.assert_array_equal(got["passage_segments"], wanted.segment_ids)


def test_ict_takes_the_sentence_out_of_its_passage(corpus, layout, table, tokenizer):
  sentences = np.flatnonzero(np.isin(corpus.sentence_passage, corpus.several))
  removed = np.arange(len(sentences)) % 2
  got = compiled(batches.without_sentence, layout=layout)(
    corpus, jnp.asarray(sentences), jnp.asarray(removed)
  )
  queries, _ = compiled(batches.sentence_queries, layout=layout)(corpus, jnp.asarray(sentences))
  texts, cut, numbers = [], [], np.asarray(corpus.sentence_passage)[sentences]
  starts, sizes = np.asarray(corpus.sentence_at), np.asarray(corpus.sentence_size)
  for sentence, number, remove in zip(sentences, numbers, removed, strict=True):
    where = np.s_[starts[sentence] : starts[sentence] + sizes[sentence]]
    ids = table.text_ids[number]
    cut.append(ids[where]), texts.append(np.delete(ids, where) if remove else ids)
  titles, _ = examples.gather_passages(table, numbers)
  wanted = examples.pack_passages(
    titles, passages.Ragged.of(texts, np.int32).tensor(), tokenizer=tokenizer, length=LENGTH
  )
  np.testing.assert_array_equal(got["passage_ids"], wanted.token_ids)
  np.testing.assert_array_equal(got["passage_segments"], wanted.segment_ids)
  np.testing.assert_array_equal(
    queries,
    examples.pack_queries(
      passages.Ragged.of(cut, np.int32).tensor(), tokenizer=tokenizer, length=QUERY
    ),
  )
  inputs, allowed = compiled(batches.ict, num=8, layout=layout)(corpus, jax.random.key(0))
  assert inputs["query_ids"].shape == (8, QUERY) and (np.diag(allowed) == 1).all()


def test_realm_inputs_are_those_of_the_trainers(corpus, layout, data, table, tokenizer):
  spans = jnp.arange(0, len(corpus.span_at), 5)
  drawn = compiled(batches.clozes, layout=layout)(corpus, spans)
  numbers = np.stack(
    [np.full(len(spans), len(table)), np.arange(len(spans)) % len(table), np.asarray(drawn.own)],
    axis=1,
  )
  got = compiled(batches.realm, layout=layout)(corpus, drawn, jnp.asarray(numbers))
  sentences = np.asarray(corpus.cloze_sentence)[np.asarray(corpus.span_cloze)[np.asarray(spans)]]
  ids = [
    _sentence(data, sentence, number)
    for sentence, number in zip(sentences, np.asarray(drawn.own), strict=True)
  ]
  starts, ends = data.span_starts[::5].tolist(), data.span_ends[::5].tolist()
  queries = examples.mask_spans(
    ids, starts, ends, np.asarray(drawn.own), tokenizer=tokenizer, max_masks=MASKS
  )
  packed = examples.pack_queries(queries.ids.tensor(), tokenizer=tokenizer, length=QUERY).numpy()
  wanted = examples.realm_batch(
    queries,
    packed,
    np.where(numbers == len(table), examples.NULL_PASSAGE, numbers),
    table,
    tokenizer=tokenizer,
    query_length=QUERY,
    passage_length=LENGTH,
    reader_length=READER,
  )
  assert set(got) == set(wanted)
  for name, array in wanted.items():
    np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_candidates_are_the_best_without_the_own_passage_and_with_holders(corpus, layout, table):
  spans = compiled(batches.draw_spans, num=12, asked=8)(corpus, jax.random.key(0))
  drawn = compiled(batches.clozes, layout=layout)(corpus, spans)
  candidates, held = (
    compiled(batches.candidates, num=6, holders=2),
    np.asarray(corpus.holders)[np.asarray(drawn.phrase)],
  )
  assert (np.asarray(drawn.phrase)[:8] != NONE).all()
  scores = np.random.default_rng(0).normal(size=[12, len(table)]).astype(np.float32)
  for share in (0.0, 1.0):
    got, given = (
      np.asarray(part)
      for part in candidates(corpus, jax.random.key(1), drawn, jnp.asarray(scores), share=share)
    )
    for row, own in enumerate(np.asarray(drawn.own)):
      holders = [number for number in given[row] if number != NONE]
      others = set(held[row].tolist()) - {own, NONE} if drawn.phrase[row] != NONE else set()
      assert len(holders) == (min(2, len(others)) if share else 0) and set(holders) <= others, (
        f"row {row}, share {share}"
      )
      best = [n for n in np.argsort(-scores[row]) if n != own and n not in holders][
        : 5 - len(holders)
      ]
      assert (
        got[row, 0] == len(table)
        and set(got[row, 1:]) == {*best, *holders}
        and got[row, 1] == best[0]
      )


def test_recurring_spans_gives_a_holder_and_leaves_the_others_out(corpus, layout):
  inputs, allowed = compiled(batches.recurring_spans, num=16, layout=layout)(
    corpus, jax.random.key(0)
  )
  key = jax.random.split(jax.random.key(0))
  spans = compiled(batches.draw_spans, num=16, asked=16)(corpus, key[0])
  drawn = compiled(batches.clozes, layout=layout)(corpus, spans)
  numbers = np.asarray(compiled(batches.draw_holders, num=1)(corpus, key[1], drawn))[:, 0]
  np.testing.assert_array_equal(inputs["passage_ids"], np.asarray(corpus.rows)[numbers])
  for row, phrase in enumerate(np.asarray(drawn.phrase)):
    held = set(np.asarray(corpus.holders)[phrase].tolist())
    assert numbers[row] in held and numbers[row] != drawn.own[row]
    np.testing.assert_array_equal(
      allowed[row] == 0, [other != row and n in held for other, n in enumerate(numbers)]
    )


# --------------------------------------------------------------------------------------------------
# --- on JAX's backend

_QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def _python(program: str, *args: str) -> str:
  """Standard output of a program on JAX's backend that cannot import TensorFlow."""
  names = ("tensorflow", "tensorflow_text", "ml_collections", "apache_beam", "scann")
  blocked = f"import sys\nsys.modules.update(dict.fromkeys({names}))\n"
  done = subprocess.run(
    [sys.executable, "-c", blocked + program, *args],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=240,
    env={
      **os.environ,
      "KERAS_BACKEND": "jax",
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": _QUICK_COMPILATION,
    },
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_losses_are_the_same_on_both_backends(tmp_path):
  wanted = backend_losses.compute(str(tmp_path))
  program = """
import json, sys, keras
from tests import backend_losses
assert keras.backend.backend() == "jax"
print(json.dumps(backend_losses.compute(sys.argv[1])))
"""
  got = json.loads(_python(program, str(tmp_path)))
  for name, value in wanted.items():
    assert abs(got[name] - value) < 1e-5, f"{name}: {got[name]} on JAX, {value} on TensorFlow"


def test_published_weights_come_back_as_bfloat16(published, tmp_path):
  published.save(str(tmp_path / "packed.zip"))
  got = Packed.load(str(tmp_path / "packed.zip"))
  assert got.architecture == published.architecture and set(got.encoder) == set(published.encoder)
  for name, weight in published.encoder.items():
    wanted = weight.astype(ml_dtypes.bfloat16) if weight.ndim > 1 else weight
    np.testing.assert_array_equal(got.encoder[name], wanted.astype(np.float32), err_msg=name)


def test_all_stages_run_without_tensorflow(published, tmp_path):
  published.save(str(tmp_path / "packed.zip"))
  sizes = [
    f"query_length={LENGTH}",  # one length for all: fewer shapes to compile
    f"reader_length={LENGTH}",
    f"max_masks={MASKS}",
    "candidates=4",
    "refresh_every=2",
    "embed_chunk=16",
  ]
  steps = {"ict": 3, "spans": 3, "warmup": 3, "realm": 4, "realm_from_ict": 0}
  changes = [f"sizes.{size}" for size in sizes] + [
    f"published.{stage}.{name}={value}"
    for stage, num in steps.items()
    for name, value in (("steps", num), ("batch_size", 8))
  ]
  output = tmp_path / "results.json"
  text = _python(
    "import runpy; runpy.run_module('benchmarks.accelerator', run_name='__main__')",
    f"--data={tmp_path / 'packed.zip'}",
    f"--output={output}",
    "--start=published",
    *(f"--set={change}" for change in changes),
  )
  results = json.loads(output.read_text())
  rows = {(row["start"], row["stage"]): row for row in results["rows"]}
  assert list(rows) == [
    ("bm25", "start"),
    *(("published", stage) for stage in ("start", "ict", "spans", "warmup", "realm")),
  ]
  for stage in ("ict", "spans", "warmup", "realm"):
    row = rows["published", stage]
    assert (
      row["steps"] == steps[stage]
      and row["examples_per_sec"] > 0
      and np.isfinite(row["metrics"]["loss"]).all()
    ), row
    assert ("recall" in row) == (stage != "warmup")
  assert rows["published", "realm"]["metrics"].keys() >= {
    "retrieval_utility",
    "null_prior",
    "holder_retrieved",
  }
  recall = rows["published", "spans"]["recall"]
  assert sum(part["questions"] for part in recall.values()) == len(published.question_sets) and set(
    recall
  ) == {"made/dev", "made/test"}
  losses = rows["published", "ict"]["metrics"]["loss"]
  assert len(losses) == 3 and len(set(losses)) == 3, "a stage that trains changes its loss"
  assert re.search(r"results\.json: \d+ s", text)
