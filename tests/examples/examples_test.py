"""realm_tf/examples/: packing and random draws.

The ids of every packing are written by hand; draws are pure functions of step and seed.
"""

import collections
import functools
import itertools
import re
import time

import numpy as np
import pytest
import tensorflow as tf

from realm_tf.corpus import passages
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.corpus.vocabularies import SPECIAL
from realm_tf.examples import answering, epochs, packing
from realm_tf.examples.answer_spans import answer_spans
from realm_tf.examples.ict import IctExamples
from realm_tf.examples.masked_sentences import MaskedSentences, OwnPassages
from realm_tf.examples.masking import mask_spans, random_spans
from realm_tf.examples.packing import Packed
from realm_tf.examples.sentences import sentence_ranges
from realm_tf.storage import artifacts, publishing
from realm_tf.storage.columns import Ragged
from tests.conftest import eagerly

PIECES = [
  *SPECIAL,
  "ron",
  "##tgen",
  "was",
  "born",
  "in",
  "len",
  "##nep",
  ".",
  "he",
  "won",
  "a",
  "prize",
  "x",
]
PAD, UNK, CLS, SEP, MASK = range(5)
A, B, C, D, E, F, G, H = range(5, 13)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
  path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
  path.write_text("\n".join(PIECES) + "\n")
  return Tokenizer(str(path))


def ragged(*rows) -> tf.RaggedTensor:
  return Ragged.of(rows, np.int32).tensor()


def make_table(tokenizer: Tokenizer, folder: str, blocks) -> passages.PassageTable:
  """Returns a passages folder, written to disk and read back."""
  with publishing.publish(folder, kind=passages.KIND, config={}, inputs={}) as staged:
    rows = passages.make_passages(tokenizer, blocks, range(len(blocks)))
    passages.write_shard(
      f"{staged.path}/{passages.shard_name('passages', 0, 1)}", rows, passages.Passage
    )
    staged.counts, staged.content = {"passages": len(rows)}, artifacts.fingerprint_of(blocks)
    staged.details = {
      "vocab_fingerprint": tokenizer.fingerprint,
      "vocab_size": tokenizer.size,
      "lower_case": True,
    }
  return passages.load(folder)


# ------------------------------------------------------------------------------------------ packing


def pack_queries(tokenizer, ids):
  return Packed(packing.pack_queries(ids, tokenizer=tokenizer, length=6), None)


def pack_passages(tokenizer, titles, texts):
  return packing.pack_passages(titles, texts, tokenizer=tokenizer, length=9)


def pack_reader(tokenizer, queries, texts):
  return packing.pack_reader(queries, texts, tokenizer=tokenizer, query_length=5, length=9)


def pack_short_titles(tokenizer, titles, texts):
  return packing.pack_passages(titles, texts, tokenizer=tokenizer, length=9, title_length=1)


def pack_without_titles(tokenizer, titles, texts):
  return packing.pack_passages(titles, texts, tokenizer=tokenizer, length=9, title_length=0)


PACKINGS = {
  "queries": (
    pack_queries,
    [ragged([A, B], [], [A, B, C, D], [A, B, C, D, E, F])],
    [
      [CLS, A, B, SEP, 0, 0],
      [CLS, SEP, 0, 0, 0, 0],
      [CLS, A, B, C, D, SEP],
      [CLS, A, B, C, D, SEP],  # cut at length − 2
    ],
    None,
  ),
  # Room for 6: titles keep at most half of it, 3; the text gets the rest.
  "passages": (
    pack_passages,
    [
      ragged([A], [A, B, C, D], [], [A, B, C, D], []),
      ragged([B, C], [E, F, G, H], [A] * 9, [E], []),
    ],
    [
      [CLS, A, SEP, B, C, SEP, 0, 0, 0],
      [CLS, A, B, C, SEP, E, F, G, SEP],
      [CLS, SEP, A, A, A, A, A, A, SEP],
      [CLS, A, B, C, SEP, E, SEP, 0, 0],
      [CLS, SEP, SEP, 0, 0, 0, 0, 0, 0],  # the null passage
    ],
    [
      [0, 0, 0, 1, 1, 1, 0, 0, 0],
      [0, 0, 0, 0, 0, 1, 1, 1, 1],
      [0, 0, 1, 1, 1, 1, 1, 1, 1],
      [0, 0, 0, 0, 0, 1, 1, 0, 0],
      [0, 0, 1, 0, 0, 0, 0, 0, 0],
    ],
  ),
  "short titles": (
    pack_short_titles,
    [ragged([A], [A, B, C, D]), ragged([B, C], [E, F, G, H, A, B])],
    [
      [CLS, A, SEP, B, C, SEP, 0, 0, 0],
      [CLS, A, SEP, E, F, G, H, A, SEP],
    ],
    [[0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1]],
  ),
  "no titles": (
    pack_without_titles,
    [ragged([A, B, C, D]), ragged([E, F])],
    [[CLS, SEP, E, F, SEP, 0, 0, 0, 0]],
    [[0, 0, 1, 1, 1, 0, 0, 0, 0]],
  ),
  # The query keeps query_length − 2 = 3 as in pack_queries; the text keeps what is left of 6.
  "reader": (
    pack_reader,
    [
      ragged([A, B, C, D], [A], [], [MASK, B]),
      ragged([E, F, G, H], [E, F, G, H, A, B, C], [E], []),
    ],
    [
      [CLS, A, B, C, SEP, E, F, G, SEP],
      [CLS, A, SEP, E, F, G, H, A, SEP],
      [CLS, SEP, E, SEP, 0, 0, 0, 0, 0],
      [CLS, MASK, B, SEP, SEP, 0, 0, 0, 0],  # with the null passage
    ],
    [
      [0, 0, 0, 0, 0, 1, 1, 1, 1],
      [0, 0, 0, 1, 1, 1, 1, 1, 1],
      [0, 0, 1, 1, 0, 0, 0, 0, 0],
      [0, 0, 0, 0, 1, 0, 0, 0, 0],
    ],
  ),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_packed_ids(name, tokenizer):
  pack, args, ids, segments = PACKINGS[name]
  in_graph = tf.function(lambda *parts: pack(tokenizer, *parts))(*args)
  with eagerly():
    eager = pack(tokenizer, *args)
  for how, got in (
    ("eagerly", eager),
    ("in a graph", in_graph),
    ("as trainers do", pack(tokenizer, *args)),
  ):
    assert got.token_ids.dtype == tf.int32
    np.testing.assert_array_equal(got.token_ids, ids, err_msg=f"{name} {how}")
    if segments is not None:
      np.testing.assert_array_equal(got.segment_ids, segments, err_msg=f"{name} {how}")


def test_one_row_at_a_time_packs_like_a_batch(tokenizer):
  pack, (queries, texts), ids, _ = PACKINGS["reader"]
  rows = [
    pack(tokenizer, queries[i : i + 1], texts[i : i + 1]).token_ids.numpy()[0].tolist()
    for i in range(4)
  ]
  assert rows == ids
  assert pack(tokenizer, queries[:0], texts[:0]).token_ids.shape == (0, 9)


def test_gather_passages_gives_the_null_passage_an_empty_row(tokenizer, tmp_path):
  table = make_table(tokenizer, str(tmp_path / "P"), [("x", ["born."]), ("", ["he won a prize."])])
  titles, texts = packing.gather_passages(table, np.array([[1, NULL_PASSAGE], [0, 1]]))
  assert titles.to_list() == [[], [], [17], []]
  assert texts.to_list() == [[13, 14, 15, 16, 12], [], [8, 12], [13, 14, 15, 16, 12]]


# ------------------------------------------------------------------------------------ inverse cloze


@pytest.fixture(scope="module")
def ict_table(tokenizer, tmp_path_factory) -> passages.PassageTable:
  """20 passages of two or three sentences, and 5 of a single sentence.

  The words of a sentence identify it.
  """
  rng, words = np.random.default_rng(0), ["ron", "was", "born", "in", "he", "won", "a", "prize"]
  blocks = [
    (
      "x",
      [" ".join(rng.choice(words, rng.integers(2, 6))) + "." for _ in range(rng.integers(2, 4))],
    )
    for _ in range(20)
  ]
  return make_table(
    tokenizer, str(tmp_path_factory.mktemp("ict") / "P"), blocks + [("x", ["he was ron."])] * 5
  )


def unpacked(ids: np.ndarray) -> list[list[int]]:
  """Returns the segments of a packed row."""
  ids = ids[ids != PAD]
  ends = np.flatnonzero(ids == SEP)
  return [ids[start + 1 : end].tolist() for start, end in itertools.pairwise([0, *ends])]


def sentences_of(table: passages.PassageTable, number: int) -> list[list[int]]:
  starts, ends = sentence_ranges(table.token_starts[number], table.sentence_starts[number])
  return [
    table.text_ids[number][start:end].tolist() for start, end in zip(starts, ends, strict=True)
  ]


def test_sentence_ranges_part_the_text(ict_table, tokenizer):
  for number in range(len(ict_table)):
    text = ict_table.texts[number].encode()
    written = [
      text[a:b].decode()
      for a, b in zip(
        ict_table.sentence_starts[number], ict_table.sentence_ends[number], strict=True
      )
    ]
    assert sentences_of(ict_table, number) == tokenizer(written).to_list(), ict_table.texts[number]


@pytest.fixture
def ict_examples(tokenizer, ict_table):
  """Makes examples of `ict_table`, with more or other settings."""
  return functools.partial(
    IctExamples, ict_table, tokenizer=tokenizer, query_length=20, passage_length=40
  )


@pytest.mark.parametrize("removal_rate", [0.0, 0.7, 1.0])
def test_ict_examples(removal_rate, tokenizer, ict_table, ict_examples):
  data = ict_examples(removal_rate=removal_rate)
  by_text = collections.defaultdict(set)
  (alone,) = tokenizer(["he was ron."]).to_list()
  removed, single = [], 0
  for number in range(len(ict_table)):
    sentences = sentences_of(ict_table, number)
    for at, sentence in enumerate(sentences):
      rest = sum(sentences[:at] + sentences[at + 1 :], [])
      by_text[tuple(sentence), tuple(rest)].add(1.0)
      by_text[tuple(sentence), tuple(sum(sentences, []))].add(0.0)
  for step in range(100):
    batch = data.batch(step, batch_size=8, seed=3)
    for query, passage, segments, out in zip(
      *(batch[name] for name in ("query_ids", "passage_ids", "passage_segments", "removed")),
      strict=True,
    ):
      (query,), (title, text) = unpacked(query), unpacked(passage)
      assert title == [17] and segments.sum() == len(text) + 1
      assert out in by_text[tuple(query), tuple(text)]
      assert text, "a single-sentence passage must not be emptied"
      single += text == alone
      removed.append(out)
  # single-sentence passages that would lose their sentence are skipped
  kept_single = 5 * (1 - removal_rate)
  wanted = 20 * removal_rate / (20 + kept_single)
  assert abs(np.mean(removed) - wanted) < 4 * np.sqrt(0.25 / len(removed)) + 1e-9
  assert abs(single / len(removed) - kept_single / (20 + kept_single)) < 0.05 and (single == 0) == (
    removal_rate == 1
  )
  if removal_rate in (0.0, 1.0):
    assert np.mean(removed) == removal_rate


def test_ict_queries_may_be_runs_of_words(tokenizer, ict_table, ict_examples):
  data = ict_examples(removal_rate=0.0, query_words=(2, 3))
  sizes = set()
  for step in range(30):
    drawn = data.draw(step, batch_size=8, seed=3)
    for query, text, number in zip(drawn.queries, drawn.texts, drawn.numbers, strict=True):
      np.testing.assert_array_equal(text, ict_table.text_ids[number], err_msg="the whole passage")
      runs = [
        part[at : at + len(query)]
        for part in sentences_of(ict_table, number)
        for at in range(len(part))
      ]
      assert query.tolist() in runs and tokenizer.continues[query[:1]].tolist() == [False]
      sizes.add(int((~tokenizer.continues[query]).sum()))
  assert sizes == {2, 3}


@pytest.mark.parametrize("title_share", [0.0, 0.5, 1.0])
def test_ict_queries_may_begin_with_the_title(tokenizer, ict_table, ict_examples, title_share):
  data = ict_examples(query_length=6, removal_rate=0.0, query_words=(2, 3), title_share=title_share)
  titled = []
  for step in range(30):
    drawn = data.draw(step, batch_size=8, seed=3)
    for query, number in zip(drawn.queries, drawn.numbers, strict=True):
      whole = query.tolist()
      title = ict_table.title_ids[number].tolist()
      parts = sentences_of(ict_table, number)

      def is_run(ids, parts=parts):
        return any(part[at : at + len(ids)] == ids for part in parts for at in range(len(part)))

      shown = next((n for n in range(len(title), 0, -1) if whole[:n] == title[:n]), 0)
      titled.append(shown > 0)
      assert is_run(whole[shown:]), (whole, title)
      # [CLS] title, run [SEP]: the title is cut, the run is not
      assert not shown or shown == len(title) or len(whole) == 4, (whole, title)
  assert abs(np.mean(titled) - title_share) < 0.1


def test_ict_queries_show_no_title_that_passages_do_not_show(tokenizer, ict_table, ict_examples):
  data = ict_examples(title_length=0, title_share=1.0)
  for step in range(3):
    drawn = data.draw(step, batch_size=8, seed=3)
    for query, number in zip(drawn.queries, drawn.numbers, strict=True):
      assert query.tolist() in sentences_of(ict_table, number), "a sentence alone"


def test_ict_batch_is_a_pure_function_of_step_and_seed(tokenizer, ict_table):
  def make():
    return IctExamples(ict_table, tokenizer=tokenizer, query_length=20, passage_length=40)

  one, two = make(), make()
  forwards = [one.batch(step, batch_size=4, seed=5) for step in range(6)]
  backwards = [two.batch(step, batch_size=4, seed=5) for step in reversed(range(6))][::-1]
  for a, b in zip(forwards, backwards, strict=True):
    assert a.keys() == b.keys() == {"query_ids", "passage_ids", "passage_segments", "removed"}
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
  others = [one.batch(3, batch_size=4, seed=6), forwards[4]]
  assert all((forwards[3]["passage_ids"] != other["passage_ids"]).any() for other in others)


def test_ict_corpus_of_single_sentences_is_refused(tokenizer, tmp_path):
  table = make_table(tokenizer, str(tmp_path / "P"), [("x", ["he was born."])] * 3)
  data = IctExamples(
    table, tokenizer=tokenizer, query_length=9, passage_length=16, removal_rate=1.0
  )
  with pytest.raises(artifacts.UserError, match="every one is a single sentence"):
    data.batch(0, batch_size=2, seed=0)


def test_every_epoch_is_a_permutation_however_it_is_cut():
  num_rows, batch_size = 7, 3
  drawn = np.concatenate(
    [epochs.epoch_rows(num_rows, step, batch_size, 1) for step in range(14)]
  ).reshape(6, num_rows)
  assert (np.sort(drawn, axis=1) == np.arange(num_rows)).all(), drawn
  assert len({tuple(epoch) for epoch in drawn}) == 6, "every epoch has its own order"
  resumed = np.concatenate(
    [epochs.epoch_rows(num_rows, step, batch_size, 1) for step in range(9, 14)]
  )
  np.testing.assert_array_equal(resumed, drawn.ravel()[27:])
  assert (epochs.epoch_rows(num_rows, 0, 21, 1).reshape(3, 7) == drawn[:3]).all(), (
    "the batch size only cuts the same order"
  )
  assert (epochs.epoch_rows(num_rows, 0, 7, 2) != drawn[0]).any()
  rows = np.array([10, 20, 30, 40, 50, 60, 70])
  np.testing.assert_array_equal(
    epochs.epoch_rows(num_rows, 2, batch_size, 1, rows),
    rows[epochs.epoch_rows(num_rows, 2, batch_size, 1)],
  )


def test_rows_of_a_large_corpus_are_drawn_without_its_permutation():
  """With 13 million rows, no step may hold or make them all, and the order shows no pattern."""
  num_rows, batch_size = 13_353_718, 512
  started = time.process_time()
  drawn = np.concatenate([epochs.epoch_rows(num_rows, step, batch_size, 0) for step in range(100)])
  assert time.process_time() - started < 1, "100 calls; one that permutes all rows takes longer"
  assert len(set(drawn)) == len(drawn) and drawn.min() >= 0 and drawn.max() < num_rows
  assert (
    abs(drawn.mean() / num_rows - 0.5) < 0.01
    and abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02
  )
  edge = num_rows // batch_size  # the step in which an epoch ends
  last = epochs.epoch_rows(num_rows, edge, batch_size, 0)[: num_rows % batch_size]
  assert not set(last) & set(drawn), "each row once per epoch"
  small = np.concatenate([epochs.epoch_rows(11, step, 11, 0) for step in range(3000)]).reshape(
    3000, 11
  )
  counts = np.stack([np.bincount(column, minlength=11) for column in small.T])
  assert (np.abs(counts - 3000 / 11) < 5 * np.sqrt(3000 / 11)).all(), (
    "every row is equally often at every place"
  )


# ------------------------------------------------------------------------------------- masked spans


def test_mask_spans(tokenizer):
  ids = [[A, B, C, D], [E, F], [G, H, A]]
  got = mask_spans(
    [np.array(row, np.uint16) for row in ids],
    [1, 0, 0],
    [3, 1, 3],
    [4, -1, 2],
    tokenizer=tokenizer,
    max_masks=3,
  )
  assert [got.ids[i].tolist() for i in range(3)] == [
    [A, MASK, MASK, D],
    [MASK, F],
    [MASK, MASK, MASK],
  ]
  assert got.mask_positions.tolist() == [[2, 3, 0], [1, 0, 0], [1, 2, 3]]
  assert got.targets.tolist() == [[B, C, 0], [E, 0, 0], [G, H, A]]
  assert got.target_mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
  assert got.own_passages.tolist() == [[4], [-1], [2]]
  packed = packing.pack_queries(got.ids.tensor(), tokenizer=tokenizer, length=8).numpy()
  masked = np.take_along_axis(packed, got.mask_positions, axis=1)
  assert (masked[got.target_mask > 0] == MASK).all() and (
    packed == MASK
  ).sum() == got.target_mask.sum(), f"{packed}\n{masked}"
  assert ids == [[A, B, C, D], [E, F], [G, H, A]]


def test_masked_sentences_of_the_toy_corpus(toy):
  config = toy.config()
  tokenizer, table = Tokenizer(config.passages), passages.load(config.passages)
  for folder, same in ((config.knowledge_spans, True), (config.spans, False)):
    data = MaskedSentences(
      folder, tokenizer=tokenizer, query_length=20, max_masks=4, knowledge=table
    )
    written = [
      row
      for path in passages.shard_paths(folder, "spans")
      for row in passages.read_shard(path, passages.Sentence)
    ]
    spans = {
      (tuple(row.ids), start, end)
      for row in written
      for start, end in zip(row.span_starts, row.span_ends, strict=True)
    }
    fitting = {row for row in spans if row[2] <= 18 and row[2] - row[1] <= 4}
    drawn = set()
    for step in range(60):
      batch = data.batch(step, batch_size=8, seed=0)
      packed = packing.pack_queries(batch.ids.tensor(), tokenizer=tokenizer, length=20).numpy()
      for i in range(8):
        used = batch.target_mask[i] > 0
        positions = batch.mask_positions[i][used]
        assert 1 <= used.sum() <= 4 and (packed[i][positions] == tokenizer.mask_id).all()
        whole = batch.ids[i].copy()
        whole[positions - 1] = batch.targets[i][used]
        drawn.add((tuple(whole), positions[0] - 1, positions[-1]))
        if same:
          assert tuple(whole) in {tuple(s) for s in sentences_of(table, batch.own_passages[i, 0])}
        else:
          assert batch.own_passages[i].tolist() == [NULL_PASSAGE]
    assert drawn <= fitting and len(drawn) > 0.8 * len(fitting) and len(fitting) < len(spans), (
      folder
    )
    again = data.batch(7, batch_size=8, seed=0)
    np.testing.assert_array_equal(again.targets, data.batch(7, batch_size=8, seed=0).targets)
    assert (again.targets != data.batch(7, batch_size=8, seed=1).targets).any()


@pytest.mark.parametrize("masking", ["salient", "uniform"])
def test_own_passages_are_found_in_another_folder(toy, overlapping, masking, capfd):
  """X overlaps Z by title and text, regardless of numbers and folders."""
  config = toy.config()
  tokenizer, table = Tokenizer(config.passages), passages.load(config.passages)
  data = MaskedSentences(
    overlapping, tokenizer=tokenizer, query_length=20, max_masks=4, knowledge=table, masking=masking
  )
  said = capfd.readouterr().out
  in_z = {(title, text) for title, text in zip(table.titles, table.texts, strict=True)}
  source = passages.load(artifacts.read_info(overlapping)["inputs"]["passages"]["path"])
  known = [pair in in_z for pair in zip(source.titles, source.texts, strict=True)]
  assert 0 < sum(known) < len(known), "a part of X is in Z"
  sentences = {
    tuple(part): number for number in range(len(source)) for part in sentences_of(source, number)
  }
  own = 0
  for step in range(-(-len(data) // 8)):
    batch = data.batch(step, batch_size=8, seed=0)
    for i in range(8):
      whole = batch.ids[i].copy()
      used = batch.target_mask[i] > 0
      whole[batch.mask_positions[i][used] - 1] = batch.targets[i][used]
      here, there = sentences[tuple(whole)], batch.own_passages[i].tolist()
      wanted = [
        (table.titles[n], table.texts[n]) == (source.titles[here], source.texts[here])
        for n in range(len(table))
      ]
      assert there == (np.flatnonzero(wanted).tolist() or [NULL_PASSAGE]), (
        f"of {source.texts[here]!r}"
      )
      own += there != [NULL_PASSAGE]
  assert 0 < own
  share = float(re.search(r"sentences to mask; ([\d.]+)% have their own passage in", said)[1])
  total = [
    known[number]
    for number in (
      [
        row.passage
        for path in passages.shard_paths(overlapping, "spans")
        for row in passages.read_shard(path, passages.Sentence)
      ]
      if masking == "salient"
      else [n for n in range(len(source)) for _ in sentences_of(source, n)]
    )
  ]
  # of the sentences whose spans fit
  assert share == pytest.approx(100 * np.mean(total), abs=8), said


def test_every_copy_of_a_passage_is_its_sentences_own(tokenizer, tmp_path):
  blocks = [
    ("x", ["ron was born."]),
    ("x", ["he won a prize."]),
    ("x", ["ron was born."]),
    ("ron", ["ron was born."]),
  ]
  table = make_table(tokenizer, str(tmp_path / "P"), blocks)
  source = {"path": table.folder, "fingerprint": table.fingerprint}
  own = OwnPassages(source, np.array([0, 1, 2, 3, 3]), table)
  assert (
    own.of(np.arange(5)).tolist() == [[0, 2], [1, -1], [0, 2], [3, -1], [3, -1]] and own.share == 1
  )
  other = make_table(
    tokenizer, str(tmp_path / "X"), [("x", ["he won."]), ("x", ["he won a prize."])]
  )
  own = OwnPassages(
    {"path": other.folder, "fingerprint": other.fingerprint}, np.array([0, 0, 1]), table
  )
  assert own.of(np.arange(3)).tolist() == [[-1], [-1], [1]] and own.share == pytest.approx(1 / 3)
  with pytest.raises(artifacts.ArtifactError, match="passages folder .* does not exist"):
    OwnPassages({"path": str(tmp_path / "gone"), "fingerprint": "?"}, np.array([0]), table)


def runs(positions: np.ndarray) -> list[tuple[int, int]]:
  """Returns the maximal [start, end) runs of neighbours."""
  cuts = np.flatnonzero(np.diff(positions) > 1) + 1
  return [(int(part[0]), int(part[-1]) + 1) for part in np.split(positions, cuts)]


@pytest.mark.parametrize("masking", ["random_span", "uniform"])
def test_the_baselines_mask_15_percent_of_all_sentences(toy, masking):
  config = toy.config()
  tokenizer, table = Tokenizer(config.passages), passages.load(config.passages)
  data = MaskedSentences(
    config.knowledge_spans,
    tokenizer=tokenizer,
    query_length=20,
    max_masks=3,
    masking=masking,
    knowledge=table,
  )
  everything = [tuple(part) for number in range(len(table)) for part in sentences_of(table, number)]
  assert len(data) == len(everything)
  seen, sizes, cut_words, spans = set(), [], 0, []
  for step in range(-(-len(data) // 8)):
    batch = data.batch(step, batch_size=8, seed=0)
    for i in range(8):
      used = batch.target_mask[i] > 0
      positions = batch.mask_positions[i][used] - 1
      whole = batch.ids[i].copy()
      whole[positions] = batch.targets[i][used]
      assert (batch.ids[i][positions] == tokenizer.mask_id).all() and (np.diff(positions) > 0).all()
      assert tuple(whole) in {tuple(part) for part in sentences_of(table, batch.own_passages[i, 0])}
      wanted = min(max(1, round(0.15 * min(len(whole), 18))), 3)
      sizes.append((used.sum(), wanted))
      seen.add(tuple(whole))
      spans += [end - start for start, end in runs(positions)]
      goes_on = np.append(tokenizer.continues[whole], False)
      cut_words += any(goes_on[start] or goes_on[end] for start, end in runs(positions))
  sizes, spans = np.array(sizes), np.array(spans)
  assert seen == set(everything) and (sizes[:, 0] <= sizes[:, 1]).all() and sizes.max() == 3
  if masking == "uniform":
    assert (sizes[:, 0] == sizes[:, 1]).all() and cut_words > 0.2 * len(sizes)
  else:
    # only if not one whole word fits
    assert cut_words < 0.1 * len(sizes) and (spans > 1).mean() > 0.3


def test_random_spans_are_whole_words_of_geometric_length():
  rng = np.random.default_rng(0)
  begins = np.array([1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0] * 20, bool)
  firsts, words = [], []
  for _ in range(4000):
    at = random_spans(begins, 60, rng)
    assert len(at) <= 60
    for start, end in runs(at):
      assert begins[start] and (end == len(begins) or begins[end])
      words.append(begins[start:end].sum())
    firsts.append(at)
  hit = np.bincount(np.concatenate(firsts), minlength=len(begins)) / len(firsts)
  # Geometric with p = 0.2, cut at 10: mean 4.5 if nothing interferes; spans also meet each other
  # and the end of the budget.
  assert 3 < np.mean(words) < 6 and hit.min() > 0.05
  assert random_spans(np.array([1, 0, 0, 0], bool), 2, rng).tolist() == [0, 1], "no whole word fits"


def test_unknown_masking(toy):
  config = toy.config()
  with pytest.raises(
    artifacts.UserError, match="masking is 'whole_word'; use one of salient, random_span, uniform"
  ):
    MaskedSentences(
      config.spans,
      tokenizer=Tokenizer(config.passages),
      query_length=20,
      max_masks=4,
      knowledge=None,
      masking="whole_word",
    )


def test_no_span_fits_and_another_vocabulary(toy, tokenizer):
  config = toy.config()
  with pytest.raises(artifacts.ArtifactError, match="has no span within 3 word pieces"):
    MaskedSentences(
      config.spans,
      tokenizer=Tokenizer(config.passages),
      query_length=3,
      max_masks=4,
      knowledge=passages.load(config.passages),
    )
  with pytest.raises(
    artifacts.ArtifactError, match="was made with vocabulary .*, this run has .*vocab.txt"
  ):
    MaskedSentences(
      config.spans,
      tokenizer=tokenizer,
      query_length=20,
      max_masks=4,
      knowledge=passages.load(config.passages),
    )


# ------------------------------------------------------------------------------------- answer spans


def answer_spans_by_hand(ids, segments, answers, tokenizer, max_span):
  found = np.zeros([*ids.shape, max_span], np.float32)
  for r, row in enumerate(ids):
    for i in range(len(row)):
      for w in range(max_span):
        end = i + w + 1
        if (
          end <= len(row)
          and (segments[r, i:end] == 1).all()
          and list(row[i:end]) in [list(answer) for answer in answers]
        ):
          goes_on = end < len(row) and segments[r, end] == 1 and PIECES[row[end]].startswith("##")
          found[r, i, w] = not goes_on
  return found


def test_answer_spans_against_brute_force(tokenizer):
  rng = np.random.default_rng(0)
  words = [5, 6, 7, 10, 11]  # ron ##tgen was len ##nep: many continuations
  total = 0
  for _ in range(30):
    queries, texts = (
      ragged(*(rng.choice(words, rng.integers(0, 9)) for _ in range(3))) for _ in range(2)
    )
    packed = packing.pack_reader(queries, texts, tokenizer=tokenizer, query_length=6, length=12)
    answers = [rng.choice(words, rng.integers(0, 5)).tolist() for _ in range(6)]
    got = answer_spans(
      packed.token_ids.numpy(), packed.segment_ids.numpy(), answers, tokenizer=tokenizer, max_span=3
    )
    np.testing.assert_array_equal(
      got,
      answer_spans_by_hand(
        packed.token_ids.numpy(), packed.segment_ids.numpy(), answers, tokenizer, 3
      ),
    )
    total += got.sum()
  assert total > 50


def test_answer_spans_by_hand(tokenizer):
  ron, tgen, was, len_, nep = 5, 6, 7, 10, 11
  packed = packing.pack_reader(
    ragged([ron, tgen], [ron]),
    ragged([ron, tgen, was, ron], [len_, nep, was, was]),
    tokenizer=tokenizer,
    query_length=5,
    length=10,
  )
  got = answer_spans(
    packed.token_ids.numpy(),
    packed.segment_ids.numpy(),
    [[ron, tgen], [ron], [was], [was], [len_], [was] * 5],
    tokenizer=tokenizer,
    max_span=2,
  )
  marked = [tuple(int(n) for n in at) for at in np.argwhere(got)]
  # Never in the question; `ron` only as a whole word; every occurrence; no answer of more than
  # max_span.
  assert marked == [(0, 4, 1), (0, 6, 0), (0, 7, 0), (1, 5, 0), (1, 6, 0)] and got.max() == 1


def test_answer_text_keeps_case_and_accents(tokenizer, tmp_path):
  text = "Röntgen was born in LENNEP. Rön won a prize."
  table = make_table(
    tokenizer,
    str(tmp_path / "P"),
    [("x", ["he was a prize."]), ("x", ["Röntgen was born in LENNEP.", "Rön won a prize."])],
  )
  assert table.texts[1] == text
  numbers = np.array([0, 1])
  _, texts = packing.gather_passages(table, numbers)
  query = ragged([7], [7])
  packed = packing.pack_reader(query, texts, tokenizer=tokenizer, query_length=5, length=24)
  ids, segments = packed.token_ids.numpy(), packed.segment_ids.numpy()
  for answer, wanted in (
    ("Rontgen", ["Röntgen"]),
    ("ron", ["Rön"]),
    ("lennep", ["LENNEP"]),
    ("A PRIZE", ["a prize"]),
  ):
    correct = answer_spans(
      ids, segments, tokenizer([answer]).to_list(), tokenizer=tokenizer, max_span=4
    )
    correct[0] = 0
    found = answering.best_answer(
      correct,
      np.ones_like(correct),
      ids,
      segments,
      numbers,
      np.zeros(2),
      table,
      continues=tokenizer.continues,
    )
    assert [found.text] == wanted and found.read_from == 1
    assert text.encode()[slice(*found.byte_span)].decode() == found.text
