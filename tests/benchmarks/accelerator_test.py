"""The accelerator benchmark: data and batches against those of the trainers, and all stages."""

import dataclasses
import functools
import itertools
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

from benchmarks.accelerator import batches, drawing, evaluation, packing
from benchmarks.accelerator.packed import HALVES, NONE, Packed, firsts
from realm_tf.corpus import metrics, passages
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.examples import masking
from realm_tf.examples.masking import MaskedQueries
from realm_tf.examples.packing import gather_passages, pack_passages, pack_queries
from realm_tf.examples.realm import realm_batch, unread_passages
from realm_tf.examples.sentences import crop
from realm_tf.models import encoder
from realm_tf.spans.holders import MAX_HOLDERS
from realm_tf.storage import artifacts
from realm_tf.storage.columns import Ragged
from tests import backend_losses
from tests.processes import REPOSITORY

LENGTH, QUERY, READER, MASKS = 64, 20, 72, 4


def compiled(function, **fixed):
  """Compiles the whole function; otherwise each of a batch's many small operations is compiled."""
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
    title_length=None,
    max_clozes=10_000,
    encoder="",
    query_length=QUERY,
    max_masks=MASKS,
    seed=0,
  )
  return Packed.load(path)


@pytest.fixture(scope="module")
def published(data) -> Packed:
  """The same folder with an encoder's weights."""
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
  return passages.load_tokenizer(os.path.join(run, "passages"))


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


# ------------------------------------------------------------------------------------------ packing


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
  assert not wanted, "clozes are missing"
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
  assert len(data.question_sets) == len(rows), "a question is left out if no passage has its title"
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
  (tmp_path / "spans").symlink_to(toy.path("spans"))  # in other passages
  with pytest.raises(artifacts.ArtifactError, match="was made from passages"):
    packing.pack(
      str(tmp_path),
      [],
      str(tmp_path / "packed"),
      length=LENGTH,
      title_length=None,
      max_clozes=10,
      encoder="",
      query_length=QUERY,
      max_masks=MASKS,
      seed=0,
    )


# ------------------------------------------------------------------------------------------ batches


def test_packed_rows_are_those_of_the_trainers(corpus, layout, table, tokenizer):
  numbers = np.append(np.arange(len(table)), NULL_PASSAGE)
  titles, texts = gather_passages(table, numbers)
  wanted = pack_passages(titles, texts, tokenizer=tokenizer, length=LENGTH)
  got = compiled(batches.passages, layout=layout)(corpus, jnp.asarray(numbers))
  np.testing.assert_array_equal(got["passage_ids"], wanted.token_ids)
  np.testing.assert_array_equal(got["passage_segments"], wanted.segment_ids)


def test_titles_are_cut_as_in_the_trainers(data, layout, table, tokenizer):
  cut = dataclasses.replace(data, **packing._corpus(table, length=LENGTH, title_length=1))
  numbers = np.arange(len(table))
  titles, texts = gather_passages(table, numbers)
  wanted = pack_passages(titles, texts, tokenizer=tokenizer, length=LENGTH, title_length=1)
  got = compiled(batches.passages, layout=layout)(batches.put(cut, layout), jnp.asarray(numbers))
  np.testing.assert_array_equal(got["passage_ids"], wanted.token_ids)
  assert max(cut.title_counts) == 1 < max(data.title_counts)


def test_ict_takes_the_sentence_out_of_its_passage(corpus, layout, table, tokenizer):
  sentences = np.flatnonzero(np.isin(corpus.sentence_passage, corpus.several))
  removed = np.arange(len(sentences)) % 2
  got = compiled(batches.without_sentence, layout=layout)(
    corpus, jnp.asarray(sentences), jnp.asarray(removed)
  )
  runs = batches.whole(corpus, jnp.asarray(sentences))
  queries, _ = compiled(batches.queries, layout=layout)(corpus, runs)
  texts, cut, numbers = [], [], np.asarray(corpus.sentence_passage)[sentences]
  starts, sizes = np.asarray(corpus.sentence_at), np.asarray(corpus.sentence_size)
  for sentence, number, remove in zip(sentences, numbers, removed, strict=True):
    where = np.s_[starts[sentence] : starts[sentence] + sizes[sentence]]
    ids = table.text_ids[number]
    cut.append(ids[where]), texts.append(np.delete(ids, where) if remove else ids)
  titles, _ = gather_passages(table, numbers)
  wanted = pack_passages(
    titles, Ragged.of(texts, np.int32).tensor(), tokenizer=tokenizer, length=LENGTH
  )
  np.testing.assert_array_equal(got["passage_ids"], wanted.token_ids)
  np.testing.assert_array_equal(got["passage_segments"], wanted.segment_ids)
  np.testing.assert_array_equal(
    queries,
    pack_queries(Ragged.of(cut, np.int32).tensor(), tokenizer=tokenizer, length=QUERY),
  )
  inputs = compiled(drawing.ict, num=8, layout=layout)(corpus, jax.random.key(0))
  assert inputs["query_ids"].shape == (8, QUERY) and (np.diag(inputs["allowed"]) == 1).all()


class Chances:
  """Draws sizes and places of runs for `realm_tf.examples` as the device draws them."""

  def __init__(self, key, num: int):
    self._left = itertools.chain(*np.asarray(jax.random.uniform(key, [2, num])).T)

  def integers(self, low: int, high: int, *, endpoint: bool) -> int:
    assert endpoint
    return low + int(next(self._left) * np.float32(high - low + 1))


@pytest.mark.parametrize("keep", [False, True])
def test_runs_of_words_are_those_of_the_trainers(corpus, data, table, tokenizer, keep):
  np.testing.assert_array_equal(data.continues, tokenizer.continues)
  assert tokenizer.continues[data.text_ids].any(), "words of several word pieces"
  if keep:
    at, width = np.asarray(corpus.span_at), np.asarray(corpus.span_size)
    sentences = np.asarray(corpus.cloze_sentence)[np.asarray(corpus.span_cloze)]
  else:
    at = width = np.zeros_like(sentences := np.arange(len(corpus.sentence_at)))
  key, sentence = jax.random.key(3), batches.whole(corpus, jnp.asarray(sentences))
  got = compiled(batches.crop, num_words=(2, 6))(
    corpus, key, sentence, keep=(jnp.asarray(at), jnp.asarray(width)) if keep else None
  )
  rng, cut = Chances(key, len(sentences)), 0
  for row, number in enumerate(np.asarray(sentence.passage)):
    ids = _sentence(data, sentences[row], number)
    begins = ~tokenizer.continues[ids]
    begins[at[row] + 1 : at[row] + width[row]] = False  # a span is one word
    wanted = crop(begins, (2, 6), rng, keep=(at[row], at[row] + width[row]))
    start = int(got.at[row] - sentence.at[row])
    assert slice(start, start + int(got.size[row])) == wanted, f"row {row}"
    cut += len(ids) - int(got.size[row])
  assert cut > len(sentences)


@pytest.mark.parametrize("query_words", [(), (2, 6)])
def test_realm_inputs_are_those_of_the_trainers(
  corpus, layout, data, table, tokenizer, query_words
):
  spans, key = jnp.arange(0, len(corpus.span_at), 5), jax.random.key(4)
  drawn = compiled(batches.clozes, layout=layout, query_words=query_words)(corpus, spans, key=key)
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
  queries = masking.mask_spans(
    ids, starts, ends, np.asarray(drawn.own), tokenizer=tokenizer, max_masks=MASKS
  )
  if query_words:
    rng = Chances(key, len(spans))
    queries = masking.crop_queries(queries, query_words, tokenizer=tokenizer, rng=rng)
  packed = pack_queries(queries.ids.tensor(), tokenizer=tokenizer, length=QUERY).numpy()
  wanted = realm_batch(
    queries,
    packed,
    np.where(numbers == len(table), NULL_PASSAGE, numbers),
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
  spans = compiled(drawing.draw_spans, num=12, asked=8)(corpus, jax.random.key(0))
  drawn = compiled(batches.clozes, layout=layout)(corpus, spans)
  candidates, held = (
    compiled(drawing.candidates, num=6, holders=2),
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


def test_given_own_passages_and_a_pool(corpus, layout, table):
  """The last clozes are given their own passages; the others do not see theirs."""
  spans = compiled(drawing.draw_spans, num=12, asked=12)(corpus, jax.random.key(0))
  drawn = compiled(batches.clozes, layout=layout)(corpus, spans)
  scores = np.random.default_rng(0).normal(size=[12, len(table)]).astype(np.float32)
  draw = compiled(drawing.candidates, num=4, holders=1, own=5, pool=6)
  seen = set()
  for seed in range(20):
    got, given = draw(corpus, jax.random.key(seed), drawn, jnp.asarray(scores), share=1.0)
    for row, own in enumerate(np.asarray(drawn.own)):
      numbers, first = np.asarray(got[row]), int(given[row, 0])
      assert (own in numbers) == (row >= 7) and (row < 7 or first == own), f"row {row}: {numbers}"
      best = [n for n in np.argsort(-scores[row]) if n not in (own, first)]
      rest = [best.index(n) for n in numbers[1:] if n != first]
      assert len(set(rest)) == 2 and max(rest) < 6, f"row {row}: places {rest} among the best"
      seen.update(rest)
  assert seen == set(range(6)), "any of the best six"


def test_kept_spans_are_those_of_the_sentences(corpus, layout):
  spans = compiled(drawing.draw_spans, num=64, asked=64)(corpus, jax.random.key(0))
  drawn = compiled(batches.clozes, layout=layout)(corpus, spans)
  whole = np.array(drawn.query_ids)
  for row, used in enumerate(np.asarray(drawn.target_mask) > 0):
    places = np.asarray(drawn.mask_positions)[row, used]
    whole[row, places] = np.asarray(drawn.targets)[row, used]
  for share, least, most in ((0.0, 0, 0), (0.5, 20, 44), (1.0, 64, 64)):
    got = np.asarray(compiled(drawing.keep_spans)(drawn, jax.random.key(1), share=share))
    kept = (got == whole).all(axis=1)
    assert (kept | (got == np.asarray(drawn.query_ids)).all(axis=1)).all()
    assert least <= kept.sum() <= most, f"{kept.sum()} of 64 kept for a share of {share}"


def test_unread_candidates_are_those_of_the_trainers(corpus, layout, data, table):
  spans = compiled(drawing.draw_spans, num=12, asked=8)(corpus, jax.random.key(1))
  drawn = compiled(batches.clozes, layout=layout)(corpus, spans)
  null, phrases = len(table), np.asarray(drawn.phrase)
  numbers = np.random.default_rng(0).integers(len(table), size=[12, 5])
  held = np.asarray(corpus.holders)[phrases]
  numbers[:, 0], numbers[:, 4] = null, held[np.arange(12)[::-1], 0]  # other rows' holders, too
  got = compiled(drawing.unread)(corpus, drawn, jnp.asarray(numbers))
  queries = _queries(drawn, np.where(phrases[:, None] == NONE, NULL_PASSAGE, held))
  known = np.where(numbers == null, NULL_PASSAGE, numbers)
  wanted = unread_passages(queries, known)
  np.testing.assert_array_equal(got, wanted)
  assert 0 < wanted.mean() < 0.7 and len(np.unique(wanted, axis=0)) > 6


def _queries(drawn: batches.Clozes, held: np.ndarray) -> MaskedQueries:
  """Clozes in the trainers' form, with the parts that `unread_passages` reads."""
  nothing = np.zeros([len(held), MASKS])
  return MaskedQueries(
    Ragged.of([[]] * len(held), np.int32),
    nothing,
    nothing,
    nothing,
    np.asarray(drawn.own)[:, None],
    held,
  )


def test_mixed_spans_gives_holders_and_own_passages_and_leaves_the_right_ones_out(
  corpus, layout, tokenizer
):
  mixed = functools.partial(
    drawing.mixed_spans, num=16, layout=layout, query_words=(2, 6), keep_span=0.5
  )
  keys = jax.random.split(jax.random.key(0), 8)
  spans = compiled(drawing.draw_spans, num=12, asked=12)(corpus, keys[0])
  drawn = compiled(batches.clozes, layout=layout, query_words=(2, 6))(corpus, spans, key=keys[1])
  got = compiled(mixed, ict_share=0.25)(corpus, jax.random.key(0))
  rows = {row.tobytes(): number for number, row in enumerate(np.asarray(corpus.rows))}
  numbers = np.array([rows[ids.tobytes()] for ids in np.asarray(got["passage_ids"], np.uint16)])
  own = np.append(drawn.own, numbers[12:])
  held = np.full([16, corpus.holders.shape[1]], NONE)
  held[:12] = np.asarray(corpus.holders)[np.asarray(drawn.phrase)]
  shown = compiled(drawing.keep_spans)(drawn, keys[6], share=0.5)
  np.testing.assert_array_equal(got["query_ids"][:12], shown)
  for row in range(16):
    if row < 12:
      assert numbers[row] in held[row] and numbers[row] != own[row], "another holder"
    else:
      ids = np.asarray(got["query_ids"][row])
      run = ids[1 : list(ids).index(tokenizer.sep_id)]
      text = np.asarray(got["passage_ids"][row])[np.asarray(got["passage_segments"][row]) == 1]
      windows = np.lib.stride_tricks.sliding_window_view(text, len(run))
      assert (windows == run).all(axis=1).any(), "a piece of its own, intact passage"
      assert (~tokenizer.continues[run]).sum() <= 6
  right = np.concatenate([own[:, None], held], axis=1)
  wanted = ~masking.contains(right, numbers) | np.eye(16, dtype=bool)
  np.testing.assert_array_equal(got["allowed"], wanted)
  assert not wanted.all(), "some rows share a passage"
  titled = compiled(mixed, ict_share=0.25, title_share=1.0)(corpus, jax.random.key(0))
  for row in range(12, 16):
    plain, ids = (np.asarray(one["query_ids"][row]).tolist() for one in (got, titled))
    passage = np.asarray(got["passage_ids"][row]).tolist()
    title = passage[1 : passage.index(tokenizer.sep_id)]
    run = plain[1 : plain.index(tokenizer.sep_id)]
    room = QUERY - 2 - len(run)
    shown = [tokenizer.cls_id, *title[:room], *run, tokenizer.sep_id]
    assert ids == shown + [0] * (QUERY - len(shown)), "the title, then the same run"


def test_mrr_is_the_mean_of_one_by_rank(data):
  found = np.full([len(data.question_sets), 20], NONE)
  answers = firsts(data.answer_counts)[data.question_answers]
  found[:, 3] = data.answer_passages[answers]  # each question's first answer at rank 4
  found[0, 3] = NONE
  for name, got in evaluation.score(data, found).items():
    rows = data.question_halves == HALVES.index(name.split("/")[1])
    share = 1 - rows[0] / rows.sum()
    assert (got["answer@1"], got["answer@5"]) == (0, round(100 * share, 2)), name
    assert got["answer_mrr"] == round(25 * share, 2), name


# --------------------------------------------------------------------------------- on JAX's backend

_QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def _python(program: str, *args: str) -> str:
  """Returns the standard output of a program on JAX's backend that cannot import TensorFlow."""
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
    "pool=8",
    "retriever_rate=0.5",
    "refresh_every=2",
    "query_words=2,6",
    "realm_query_words=",
    "embed_chunk=16",
  ]
  steps = {"ict": 3, "spans": 3, "warmup": 3, "realm": 4, "realm_stale": 3, "realm_from_ict": 0}
  changes = [f"sizes.{size}" for size in sizes] + [
    f"published.{stage}.{name}={value}"
    for stage, num in steps.items()
    for name, value in (("steps", num), ("batch_size", 8))
  ]
  del steps["realm_from_ict"]  # left out
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
    *(("published", stage) for stage in ("start", *steps)),
  ]
  assert results["sizes"]["query_words"] == [2, 6] and results["sizes"]["realm_query_words"] == []
  for stage, num in steps.items():
    row = rows["published", stage]
    assert (
      row["steps"] == num
      and row["examples_per_sec"] > 0
      and np.isfinite(row["metrics"]["loss"]).all()
    ), row
    assert ("recall" in row) == (stage != "warmup")
  assert rows["published", "realm"]["metrics"].keys() >= {
    "retrieval_utility",
    "null_prior",
    "unread_prior",
    "holder_retrieved",
  }
  for fresh, stale in zip(
    rows["published", "realm"]["metrics"]["loss"][:2],
    rows["published", "realm_stale"]["metrics"]["loss"][:2],
    strict=True,
  ):
    assert fresh == stale, "before the first refresh both train alike"
  recall = rows["published", "spans"]["recall"]
  assert sum(part["questions"] for part in recall.values()) == len(published.question_sets) and set(
    recall
  ) == {"made/dev", "made/test"}
  ranks = np.array(rows["published", "spans"]["ranks"])
  hits = round(100 * float(((ranks > 0) & (ranks <= 5)).mean()), 2)
  parts = [(part["answer@5"], part["questions"]) for part in recall.values()]
  wanted = np.average([share for share, _ in parts], weights=[num for _, num in parts])
  assert hits == pytest.approx(wanted, abs=0.02), "recall is that of the ranks"
  before = rows["published", "ict"]["recall"]
  assert rows["published", "spans"]["from"] == "ict"
  for name, gain in rows["published", "spans"]["gains"].items():
    mean, low, high = gain["recall@5"]
    difference = recall[name]["answer@5"] - before[name]["answer@5"]
    assert low <= mean <= high and mean == pytest.approx(difference, abs=0.02)
  losses = rows["published", "ict"]["metrics"]["loss"]
  assert len(losses) == 3 and len(set(losses)) == 3, "a trained stage changes its loss"
  assert re.search(r"results\.json: \d+ s", text)
