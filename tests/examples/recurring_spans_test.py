"""Recurring spans from articles to a trained retriever.

Tests holders of masked spans, batches, held-out sentences, and REALM's settings for them.
"""

import dataclasses
import json
import os

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import config_dict

from beam_jobs import annotate_spans, make_passages
from realm_tf import errors, pretrain, pretrain_ict, pretrain_spans, progress, settings
from realm_tf.corpus import metrics, passages
from realm_tf.corpus.candidates import NULL_PASSAGE, Found
from realm_tf.examples import packing, recurring_spans
from realm_tf.examples.ict import IctExamples
from realm_tf.examples.masked_sentences import MaskedSentences
from realm_tf.examples.masking import (
  MaskedQueries,
  contains,
  crop_queries,
  draw_holders,
  for_retriever,
  keep_spans,
)
from realm_tf.examples.realm import unread_passages
from realm_tf.examples.sentences import crop
from realm_tf.models import snapshots
from realm_tf.spans import holders, rules
from realm_tf.storage import artifacts, publishing
from realm_tf.training import realm_batches, realm_measures
from tests.conftest import eagerly, toy_config

RIVERS = ["Gorneth", "Velmar", "Tasken", "Orrin", "Palu", "Quess", "Rhom", "Sibel"]
TOWNS = ["Ashford", "Brindle", "Calder", "Dunmore"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """64 passages of two sentences, and a config for them.

  Their towns and rivers recur, and recur together.
  """
  root = str(tmp_path_factory.mktemp("recurring"))
  with open(os.path.join(root, "articles.jsonl"), "w") as file:
    for n in range(64):
      river, town = RIVERS[n % 8], TOWNS[n % 4]
      text = (
        f"People of {town} say that the {river} flows by house {n}. "
        f"In the year {1800 + n} they built mill {n} there."
      )
      file.write(json.dumps({"title": f"House {n}", "text": text}) + "\n")
  config = toy_config(root)
  make_passages.run(
    f"{root}/articles.jsonl", config.passages, vocab_size=400, max_tokens=44, passages_per_shard=20
  )
  annotate_spans.run(config.passages, config.knowledge_spans)
  config.spans = config.knowledge_spans
  config.dev_clozes = ""
  config.searcher = "exact"
  return config


def masked_sentences(config, folder: str, table, tokenizer) -> MaskedSentences:
  return realm_batches.masked_sentences(
    folder, table, tokenizer=tokenizer, lengths=settings.lengths(config), masking=config.masking
  )


@pytest.fixture(scope="module")
def parts(made):
  table, tokenizer = passages.load(made.passages), passages.load_tokenizer(made.passages)
  return table, tokenizer, masked_sentences(made, made.spans, table, tokenizer)


class Fixed:
  """A stand-in for an index that finds passages 0, 1, 2, .. for every query."""

  num_rows = 64

  def __init__(self, table: passages.PassageTable):
    self.table = table

  def search(self, query_ids, num):
    numbers = np.tile(np.arange(num, dtype=np.int32), (len(query_ids), 1))
    return Found(numbers, np.zeros(numbers.shape, np.float32))


def of(made, **values):
  """Returns the config with other values, given as dotted names with __ for dots."""
  config = made.copy_and_resolve_references()
  for name, value in values.items():
    section, _, key = name.rpartition("__")
    (config[section] if section else config)[key] = value
  return config


def phrase_of(queries, row, tokenizer) -> str:
  used = queries.target_mask[row] > 0
  return tokenizer.spell(queries.targets[row][used])


def held_by(text: str, table) -> set[int]:
  """Returns the passages that hold a text as whole normalised words."""
  wanted = metrics.searchable(text)
  return {number for number, other in enumerate(table.texts) if wanted in metrics.searchable(other)}


# ---------------------------------------------------------------------------------------- sentences


def test_holders_are_the_other_passages_with_the_span(made, parts):
  table, tokenizer, data = parts
  kinds = set()
  for step in range(12):
    queries = data.batch(step, batch_size=8, seed=0)
    for row in range(8):
      others = held_by(phrase_of(queries, row, tokenizer), table) - set(queries.own_passages[row])
      got = queries.holders[row][queries.holders[row] != NULL_PASSAGE].tolist()
      assert got == (sorted(others) if len(others) <= holders.MAX_HOLDERS else []), phrase_of(
        queries, row, tokenizer
      )
      kinds.add(len(got))
  assert {0, 7, 15} <= kinds, "years are in no other passage, rivers in 7 others, towns in 15"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_batch_has_holders(parts, share):
  data = parts[2]
  for step in range(8):
    queries = data.batch(step, batch_size=8, seed=0, with_holders=share)
    has = queries.holders[:, 0] != NULL_PASSAGE
    assert has[: round(8 * share)].all(), f"step {step}: {has}"
  assert share == 1 or not all(
    (data.batch(step, batch_size=8, seed=0, with_holders=share).holders[:, 0] != NULL_PASSAGE).all()
    for step in range(8)
  )
  again, same = (data.batch(3, batch_size=8, seed=0, with_holders=share) for _ in range(2))
  np.testing.assert_array_equal(again.targets, same.targets)


def test_held_out_sentences_are_in_no_batch(made, parts):
  table, tokenizer, data = parts
  out = data.held_out()
  held = set(out.own_passages[:, 0])
  assert 0 < len(held) <= 64 // 8 and len(data) + len(out.ids) == 128, (
    "both sentences of some passages"
  )
  drawn = {
    number
    for step in range(40)
    for share in (0.0, 1.0)
    for by_passage in (False, True)
    for number in data.batch(
      step, batch_size=8, seed=0, with_holders=share, by_passage=by_passage
    ).own_passages[:, 0]
  }
  assert drawn == set(range(64)) - held
  again = masked_sentences(made, made.spans, table, tokenizer).held_out()
  np.testing.assert_array_equal(out.targets, again.targets, err_msg="the same whoever asks")
  uniform = masked_sentences(of(made, masking="uniform"), made.spans, table, tokenizer)
  assert (
    set(uniform.held_out().own_passages[:, 0]) == held
    and (uniform.held_out().holders == NULL_PASSAGE).all()
  )


def test_spans_of_other_passages_have_no_holders_here(made, parts, tmp_path):
  """Holders are passage numbers, so those of another corpus would be the wrong passages."""
  table, tokenizer, _ = parts
  part = str(tmp_path / "part")
  make_passages.run(
    os.path.join(made.run_dir, "articles.jsonl"), part, vocab=made.passages, max_tokens=36
  )
  annotate_spans.run(part, str(tmp_path / "apart"))
  annotate_spans.run(part, str(tmp_path / "with"), knowledge=made.passages)
  apart, known = (
    masked_sentences(made, str(tmp_path / name), table, tokenizer) for name in ("apart", "with")
  )
  assert (apart.batch(0, batch_size=16, seed=0).holders == NULL_PASSAGE).all()
  with pytest.raises(artifacts.UserError, match="for another corpus only.*--knowledge=PASSAGES"):
    apart.batch(0, batch_size=16, seed=0, with_holders=0.5)
  queries = known.batch(0, batch_size=16, seed=0, with_holders=1.0)
  for row in range(16):
    got = set(queries.holders[row]) - {NULL_PASSAGE}
    assert got == held_by(phrase_of(queries, row, tokenizer), table) - set(
      queries.own_passages[row]
    )


def test_spans_of_an_earlier_version_are_refused(made, parts, tmp_path):
  table, tokenizer, _ = parts
  with publishing.publish(
    str(tmp_path / "S"), kind=rules.KIND, config={}, inputs={"passages": made.passages}
  ) as staged:
    staged.details = {"vocab_fingerprint": tokenizer.fingerprint}
  with pytest.raises(
    artifacts.ArtifactError, match="an earlier version made it. Run beam_jobs.annotate_spans again"
  ):
    masked_sentences(made, str(tmp_path / "S"), table, tokenizer)


# ------------------------------------------------------------------------------------------ batches


def test_batch_of_recurring_spans(made, parts):
  table, tokenizer, data = parts
  spans = recurring_spans.RecurringSpans(
    data, table, tokenizer=tokenizer, query_length=24, passage_length=44
  )
  packed = passages_by_ids(table, tokenizer)
  seen = set()
  for step in range(6):
    batch, queries = (
      spans.batch(step, batch_size=8, seed=0),
      data.batch(step, batch_size=8, seed=0, with_holders=1.0),
    )
    numbers = [packed[ids.tobytes()] for ids in batch["passage_ids"]]
    for row in range(8):
      holds = held_by(phrase_of(queries, row, tokenizer), table)
      own = set(queries.own_passages[row])
      assert numbers[row] in holds - own
      wanted = [column == row or number not in holds | own for column, number in enumerate(numbers)]
      assert batch["allowed"][row].tolist() == wanted, f"step {step}, row {row}"
      seen.add(numbers[row])
    assert (batch["query_ids"] == tokenizer.mask_id).any(axis=1).all()
  assert len(seen) > 20, "at random"


def passages_by_ids(table, tokenizer) -> dict[bytes, int]:
  packed = packing.pack_passages(
    *packing.gather_passages(table, np.arange(len(table))), tokenizer=tokenizer, length=44
  )
  return {ids.tobytes(): number for number, ids in enumerate(packed.token_ids.numpy())}


def test_a_part_of_the_batch_may_be_inverse_cloze(made, parts):
  table, tokenizer, data = parts
  ict = IctExamples(table, tokenizer=tokenizer, query_length=24, passage_length=44)
  spans = recurring_spans.RecurringSpans(
    data, table, tokenizer=tokenizer, query_length=24, passage_length=44, ict=ict, ict_share=0.25
  )
  batch, drawn = spans.batch(2, batch_size=16, seed=0), ict.draw(2, batch_size=4, seed=0)
  own = ict.batch(2, batch_size=4, seed=0)
  np.testing.assert_array_equal(batch["passage_ids"][12:], own["passage_ids"])
  np.testing.assert_array_equal(batch["query_ids"][12:], own["query_ids"])
  queries = data.batch(2, batch_size=12, seed=0, with_holders=1.0)
  for row in range(12):
    right = held_by(phrase_of(queries, row, tokenizer), table)
    assert batch["allowed"][row, 12:].tolist() == [number not in right for number in drawn.numbers]
  assert set(batch) == {"query_ids", "passage_ids", "passage_segments", "allowed"}


def test_queries_may_be_runs_of_words_around_the_mask(made, parts):
  table, tokenizer, data = parts
  spans = recurring_spans.RecurringSpans(
    data, table, tokenizer=tokenizer, query_length=24, passage_length=44, query_words=(3, 5)
  )
  for step in range(6):
    batch, queries = (
      spans.batch(step, batch_size=8, seed=0),
      data.batch(step, batch_size=8, seed=0, with_holders=1.0),
    )
    for ids, whole, used in zip(
      batch["query_ids"], queries.ids, queries.target_mask > 0, strict=True
    ):
      run = ids[1 : list(ids).index(tokenizer.sep_id)]
      starts = [at for at in range(len(whole)) if np.array_equal(whole[at : at + len(run)], run)]
      assert starts and (run == tokenizer.mask_id).sum() == used.sum(), (
        "a run of the sentence, with the whole mask"
      )
      masked = np.flatnonzero(run == tokenizer.mask_id)
      words = (~tokenizer.continues[np.delete(run, masked)]).sum() + 1
      assert words <= 5 and (words >= 3 or len(run) == len(whole)), tokenizer.spell(run)


def test_cropped_queries_keep_their_masks(parts):
  _, tokenizer, data = parts
  queries = data.batch(1, batch_size=32, seed=0)
  cut = crop_queries(queries, (1, 4), tokenizer=tokenizer, rng=np.random.default_rng(0))
  for row, used in enumerate(cut.target_mask > 0):
    assert (cut.ids[row][cut.mask_positions[row, used] - 1] == tokenizer.mask_id).all(), (
      "positions point at the mask"
    )
    assert (cut.ids[row] == tokenizer.mask_id).sum() == used.sum() and (
      cut.mask_positions[row, ~used] == 0
    ).all()
  assert sum(map(len, cut.ids)) < sum(map(len, queries.ids)) / 2
  np.testing.assert_array_equal(cut.targets, queries.targets)


def test_queries_may_keep_their_spans(parts):
  """A share of the queries shows the sentence unmasked.

  What the reader has to predict stays the same.
  """
  _, tokenizer, data = parts
  queries = data.batch(1, batch_size=64, seed=0)
  kept = keep_spans(queries, 0.5, np.random.default_rng(0))
  shown = 0
  for row, used in enumerate(queries.target_mask > 0):
    whole = np.array(queries.ids[row])
    whole[queries.mask_positions[row, used] - 1] = queries.targets[row, used]
    assert np.array_equal(kept.ids[row], whole) or np.array_equal(kept.ids[row], queries.ids[row])
    shown += tokenizer.mask_id not in kept.ids[row]
  assert 20 < shown < 44, "about half of 64"
  for share, wanted in ((0.0, queries.ids), (1.0, None)):
    got = keep_spans(queries, share, np.random.default_rng(0)).ids
    assert all(
      tokenizer.mask_id not in row if wanted is None else np.array_equal(row, wanted[at])
      for at, row in enumerate(got)
    )
  assert kept.targets is queries.targets and kept.mask_positions is queries.mask_positions


def test_queries_may_begin_with_the_title_of_their_own_passage(parts):
  """A share of the queries begins with it, if the own passage is known; the rest is unchanged."""
  table, _, data = parts
  queries = data.batch(1, batch_size=64, seed=0)
  own = queries.own_passages.copy()
  own[::4] = NULL_PASSAGE
  queries = dataclasses.replace(queries, own_passages=own)
  rest = dict(keep_span=0.0, table=table, query_length=24, passage_length=44, title_length=None)
  got = for_retriever(queries, np.random.default_rng(0), title_share=0.5, **rest).ids
  with_title = []
  for row, (before, after) in enumerate(zip(queries.ids, got, strict=True)):
    added = len(after) - len(before)
    np.testing.assert_array_equal(after[added:], before)
    title = table.title_ids[own[row, 0]] if own[row, 0] != NULL_PASSAGE else []
    np.testing.assert_array_equal(after[:added], title[:added])
    assert added in (0, min(len(title), 22 - len(before), 20)), "as much as there is room for"
    with_title.append(added > 0)
  assert not any(with_title[::4]) and 14 < sum(with_title) < 34, "about half of 48"
  assert for_retriever(queries, np.random.default_rng(0), title_share=0.0, **rest) is queries


def test_recurring_spans_begin_with_titles(parts):
  """Every query begins with the title of its own passage; the passages are the same."""
  table, tokenizer, data = parts
  titled, plain = (
    recurring_spans.RecurringSpans(
      data, table, tokenizer=tokenizer, query_length=24, passage_length=44, title_share=share
    ).batch(3, batch_size=16, seed=0)
    for share in (1.0, 0.0)
  )
  np.testing.assert_array_equal(titled["passage_ids"], plain["passage_ids"])
  queries = data.batch(3, batch_size=16, seed=0, with_holders=1.0)
  for row, number in enumerate(queries.own_passages[:, 0]):
    title, query = table.title_ids[number], queries.ids[row]
    whole = np.concatenate([title[: 22 - len(query)], query])
    np.testing.assert_array_equal(titled["query_ids"][row, 1 : 1 + len(whole)], whole)


def test_recurring_spans_keep_their_spans_in_a_share_of_the_queries(made, parts):
  table, tokenizer, data = parts
  kept, masked = (
    recurring_spans.RecurringSpans(
      data, table, tokenizer=tokenizer, query_length=24, passage_length=44, keep_span=share
    )
    for share in (0.5, 0.0)
  )
  has_mask = np.concatenate(
    [
      (kept.batch(step, batch_size=16, seed=0)["query_ids"] == tokenizer.mask_id).any(axis=1)
      for step in range(8)
    ]
  )
  assert 40 < has_mask.sum() < 88, "about half of 128"
  np.testing.assert_array_equal(
    *(part.batch(3, batch_size=16, seed=0)["passage_ids"] for part in (kept, masked))
  )


@pytest.mark.parametrize(
  "begins, words, keep, wanted",
  [
    ([1, 1, 1, 1], (2, 2), (0, 0), {(0, 2), (1, 3), (2, 4)}),
    ([1, 0, 1, 1], (1, 1), (0, 0), {(0, 2), (2, 3), (3, 4)}),  # the first word is two word pieces
    ([1, 1, 1], (5, 9), (0, 0), {(0, 3)}),  # there are no more
    ([1, 1, 1, 1, 1], (2, 2), (2, 3), {(1, 3), (2, 4)}),
    ([1, 1, 1, 1, 1], (1, 1), (1, 4), {(1, 4)}),  # what must be held is longer
    ([1, 0, 1, 0, 1], (1, 2), (3, 4), {(2, 4), (0, 4), (2, 5)}),
    ([1, 1, 1], (2, 2), (2, 3), {(1, 3)}),
  ],
)
def test_crop(begins, words, keep, wanted):
  drawn = [
    crop(np.array(begins, bool), words, np.random.default_rng(seed), keep=keep)
    for seed in range(100)
  ]
  assert {(part.start, part.stop) for part in drawn} == wanted


def test_drawn_holders_are_different_and_the_rest_is_null():
  queries = MaskedQueries(
    *[None] * 5, holders=np.array([[3, 5, 9, -1], [4, -1, -1, -1], [-1] * 4], np.int32)
  )
  drawn = [draw_holders(queries, 2, np.random.default_rng(seed)) for seed in range(200)]
  for rows in drawn:
    assert rows.shape == (3, 2) and rows[1].tolist() == [4, -1] and rows[2].tolist() == [-1, -1]
    assert len(set(rows[0])) == 2 and set(rows[0]) <= {3, 5, 9}
  firsts = [rows[0, 0] for rows in drawn]
  assert all(45 < firsts.count(number) < 90 for number in (3, 5, 9)), "uniformly"
  assert draw_holders(queries, 0, np.random.default_rng(0)).shape == (3, 0)
  assert draw_holders(queries, 6, np.random.default_rng(0)).shape == (3, 6)


def test_unread_passages_by_hand():
  """Passages 7 and 8 are candidates of two queries.

  Passage 2 is query 0's own, and 4 holds query 1's span.
  """
  queries = MaskedQueries(
    *[None] * 4,
    own_passages=np.array([[2], [3], [-1]]),
    holders=np.array([[-1, -1], [4, 6], [-1, -1]]),
  )
  numbers = np.array([[-1, 7, 8], [-1, 2, 7], [-1, 8, 4]])
  wanted = [[0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0, 0, 0]]
  np.testing.assert_array_equal(unread_passages(queries, numbers), wanted)


def test_a_corpus_where_no_span_recurs(made, tmp_path, capfd):
  """Recurring spans continue with the inverse cloze part alone, and REALM without holders.

  Both say so.
  """
  config = of(
    made,
    passages=str(tmp_path / "P"),
    spans=str(tmp_path / "S"),
    knowledge_spans=str(tmp_path / "S"),
    realm__with_holders=0.5,
  )
  with open(tmp_path / "a.jsonl", "w") as file:
    for n in range(24):
      file.write(
        json.dumps(
          {
            "title": f"House {n}",
            "text": f"They built the house by {1800 + n}. It stood on the hill.",
          }
        )
        + "\n"
      )
  make_passages.run(str(tmp_path / "a.jsonl"), config.passages, vocab=made.passages, max_tokens=44)
  annotate_spans.run(config.passages, config.spans)
  table, tokenizer = passages.load(config.passages), passages.load_tokenizer(config.passages)
  data = masked_sentences(config, config.spans, table, tokenizer)
  lengths = {"query_length": 24, "passage_length": 44}
  with pytest.raises(
    artifacts.UserError, match="no span of .* Give more passages, or set recurring_spans.steps to 0"
  ):
    recurring_spans.RecurringSpans(data, table, tokenizer=tokenizer, **lengths)
  ict = IctExamples(table, tokenizer=tokenizer, **lengths)
  spans = recurring_spans.RecurringSpans(
    data, table, tokenizer=tokenizer, ict=ict, ict_share=0.5, **lengths
  )
  assert "WARNING: no span of" in capfd.readouterr().err
  batch = spans.batch(0, batch_size=8, seed=0)
  np.testing.assert_array_equal(
    batch["passage_ids"], ict.batch(0, batch_size=8, seed=0)["passage_ids"]
  )
  np.testing.assert_array_equal(batch["allowed"], np.ones([8, 8]))
  batches = realm_batches.Batches(settings.batches(config), table, tokenizer)
  assert "REALM continues without holders" in capfd.readouterr().err
  assert batches.realm(0, indexed=Fixed(batches.table))["query_ids"].shape == (4, 24)


# ----------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def ict(made):
  """Writes an untrained retriever to `recurring_spans.init`."""
  return pretrain_ict.pretrain_ict(of(made, ict__steps=0), made.ict.workdir)


def test_training_on_recurring_spans_finds_held_out_ones(made, parts, ict, tmp_path):
  """Training starts from a fresh retriever and publishes its best snapshot.

  Interrupted and resumed, it ends with the same weights.
  """
  table, tokenizer, data = parts
  config = of(
    made,
    recurring_spans__steps=60,
    recurring_spans__batch_size=16,
    recurring_spans__learning_rate=3e-3,
    recurring_spans__eval_every=20,
    recurring_spans__log_every=10,
    recurring_spans__checkpoint_every=20,
    recurring_spans__init=made.ict.workdir,
  )
  last = pretrain_spans.pretrain_spans(config, str(tmp_path / "W"))
  info = artifacts.read_info(last)
  rows = {row["step"]: row for row in progress.read_metrics(str(tmp_path / "W"))}
  measured = {
    step: row["held_out_recall_at_5"] for step, row in rows.items() if "held_out_recall_at_5" in row
  }
  assert info["made_by"] == "pretrain_spans" and list(measured) == [20, 40, 60]
  assert info["held_out_recall_at_5"] == max(measured.values()) == measured[info["best_step"]]
  start, end = (
    recurring_spans.HeldOutRecall(snapshots.load_retriever(at), data, table, tokenizer=tokenizer)()
    for at in (ict, last)
  )
  assert (
    end == pytest.approx(max(measured.values()))
    and end > start + 0.2
    and rows[60]["accuracy"] > rows[10]["accuracy"]
  )
  config.recurring_spans.init = str(tmp_path / "W")  # another retriever to start from
  with pytest.raises(errors.UserError, match="trained with something else .retriever. and cannot"):
    pretrain_spans.pretrain_spans(config, str(tmp_path / "W"))


def test_held_out_recall_by_hand(made, parts, ict):
  table, tokenizer, data = parts
  retriever = snapshots.load_retriever(ict)
  queries = data.held_out()
  query_ids = packing.pack_queries(queries.ids.tensor(), tokenizer=tokenizer, length=24)
  packed = packing.pack_passages(
    *packing.gather_passages(table, np.arange(64)), tokenizer=tokenizer, length=44
  )
  scores = (
    np.array(retriever.embed_queries(query_ids), np.float64)
    @ np.array(retriever.embed_passages(*packed), np.float64).T
  )
  hits = []
  for row in range(len(scores)):
    wanted = held_by(phrase_of(queries, row, tokenizer), table) - set(queries.own_passages[row])
    if 1 <= len(wanted) <= holders.MAX_HOLDERS:
      order = [
        number for number in np.argsort(-scores[row]) if number not in queries.own_passages[row]
      ]
      hits.append(bool(wanted & set(order[:5])))
  got = recurring_spans.HeldOutRecall(retriever, data, table, tokenizer=tokenizer)()
  assert len(hits) > 3 and got == pytest.approx(np.mean(hits))


def test_held_out_recall_stops_the_inverse_cloze_task(made, tmp_path):
  config = of(made, ict__steps=8, ict__eval_every=4, ict__log_every=2, ict__checkpoint_every=4)
  with eagerly():
    info = artifacts.read_info(pretrain_ict.pretrain_ict(config, str(tmp_path)))
  measured = {
    row["step"]: row["held_out_recall_at_5"]
    for row in progress.read_metrics(str(tmp_path))
    if "held_out_recall_at_5" in row
  }
  assert list(measured) == [4, 8] and info["held_out_recall_at_5"] == max(measured.values())
  with pytest.raises(
    artifacts.UserError, match="eval_every is 3; it must be a multiple of log_every, 2"
  ):
    pretrain_ict.pretrain_ict(of(config, ict__eval_every=3), str(tmp_path / "other"))


def test_recurring_spans_need_a_retriever_to_start_from(made, tmp_path):
  with pytest.raises(
    artifacts.ArtifactError, match="no snapshot in .*run realm_tf.pretrain_ict first"
  ):
    pretrain_spans.pretrain_spans(
      of(made, recurring_spans__init=str(tmp_path / "none")), str(tmp_path / "W")
    )


# -------------------------------------------------------------------------------------------- REALM


def recorded(batches, monkeypatch, pack=lambda *given: None) -> list[tuple]:
  """What `batches` packs from now on: the queries, query_ids and numbers of each batch."""
  kept = []

  def record(*given):
    kept.append(given[:3])
    return pack(*given)

  monkeypatch.setattr(batches, "_pack", record)
  return kept


def test_given_holders_are_annealed_away_over_the_first_half(made, parts, monkeypatch):
  table, tokenizer, _ = parts
  config = of(
    made,
    realm__steps=40,
    realm__batch_size=16,
    realm__num_candidates=5,
    realm__holders=2,
    realm__with_holders=0.5,
    realm__batch_candidates=True,
  )
  batches = realm_batches.Batches(settings.batches(config), table, tokenizer)
  kept = recorded(batches, monkeypatch, pack=batches._pack)
  shares = []
  for step in range(40):
    batch = batches.realm(step, indexed=Fixed(batches.table))
    queries, _, numbers = kept[-1]
    np.testing.assert_array_equal(batch["unread"], unread_passages(queries, numbers))
    assert (numbers[:, 0] == NULL_PASSAGE).all()
    # the first two places, in the half that has holders
    held = contains(queries.holders, numbers[:, 1:3])[:8]
    beyond = numbers[:8, 1:3] > 8  # not among the first that `Fixed` gives
    shares.append((held & beyond).mean())
    for row in numbers:
      rest = row[row != NULL_PASSAGE]
      assert len(set(rest)) == len(rest), "a passage is a candidate once"
  assert np.mean(shares[:4]) > 0.7 > np.mean(shares[8:12]) > 0.2 and not any(shares[20:]), shares


@pytest.mark.parametrize("anneal, wanted", [(0.0, [1, 1, 1, 1]), (1.0, [1, 0.75, 0.5, 0.25])])
def test_given_candidates_may_stay(made, parts, monkeypatch, anneal, wanted):
  """`wanted` is the share of own passages that are candidates in each of four steps.

  The index finds only the first passage.
  """
  table, tokenizer, _ = parts
  config = of(
    made,
    realm__steps=4,
    realm__batch_size=400,
    realm__num_candidates=2,
    realm__holders=1,
    realm__own_passages=1.0,
    realm__anneal=anneal,
    realm__keep_span=0.5,
    realm__title_share=1.0,
  )
  batches = realm_batches.Batches(settings.batches(config), table, tokenizer)
  kept = recorded(batches, monkeypatch)
  for step, share in enumerate(wanted):
    batches.realm(step, indexed=Fixed(batches.table))
    queries, query_ids, numbers = kept[-1]
    hard = queries.own_passages[:, 0] > 0  # `Fixed` finds 0 first
    given = (numbers[hard, 1] == queries.own_passages[hard, 0]).mean()
    assert abs(given - share) < 0.1, (
      f"step {step}: {given} of the own passages are given, not about {share}"
    )
    shown = (query_ids != tokenizer.mask_id).all(axis=1).mean()
    assert 0.4 < shown < 0.6, f"{shown} of the retriever's queries show the span"
    assert all(tokenizer.mask_id in row for row in queries.ids), "the reader never sees it"
    for row, number in enumerate(queries.own_passages[:, 0]):
      title = table.title_ids[number][: 22 - len(queries.ids[row])]
      np.testing.assert_array_equal(query_ids[row, 1 : 1 + len(title)], title, f"query {row}")


def test_a_share_of_the_queries_keeps_its_own_passage(made, parts, monkeypatch):
  """Own passages are given at first and later left to the index; other queries never see theirs."""
  table, tokenizer, _ = parts
  config = of(
    made,
    realm__steps=8,
    realm__batch_size=8,
    realm__num_candidates=4,
    realm__holders=1,
    realm__own_passages=0.25,
  )
  batches = realm_batches.Batches(settings.batches(config), table, tokenizer)
  kept = recorded(batches, monkeypatch)
  for step in range(8):
    batches.realm(step, indexed=Fixed(batches.table))
    queries, _, numbers = kept[-1]
    own = contains(numbers, queries.own_passages)[:, 0]
    assert not own[:6].any() and (step or own[6:].all()), f"step {step}: {own}"
    assert step < 4 or (own[6:] == (queries.own_passages[6:, 0] < 3)).all(), (
      "`Fixed` finds 0, 1 and 2"
    )


class Unmoved:
  """A stand-in for REALM's initial model, to which every passage is useless."""

  null = True
  distribute_strategy = tf.distribute.get_strategy()

  def compile(self):
    pass

  def test_on_batch(self, batch, return_dict):
    return {"retrieval_utility": 0.0}

  def reset_metrics(self):
    pass


@pytest.mark.parametrize(
  "own_passages, holders, words",
  [
    (0.0, 0, "No candidates are given\n"),
    (0.0, 1, "Up to 1 of the candidates are given: passages that hold the span\n"),
    (1.0, 1, "passages that hold the span, for 100% of the clozes their own passage\n"),
    (0.5, 0, "No candidates are given; 50% of the clozes may find their own passage\n"),
  ],
)
def test_what_is_given_counts_at_the_start(made, parts, capfd, own_passages, holders, words):
  table, tokenizer, _ = parts
  config = of(
    made,
    realm__batch_size=4,
    realm__num_candidates=2,
    realm__holders=holders,
    realm__own_passages=own_passages,
  )
  batches = realm_batches.Batches(settings.batches(config), table, tokenizer)
  said = realm_measures.tell_start(Unmoved(), batches, Fixed(table))
  assert said["retrieval_utility"] == 0 and words in capfd.readouterr().out
  if own_passages == 1:
    assert said["answer_read"] == 1, "a cloze's own passage holds its answer"
  elif not holders and not own_passages:
    assert said["answer_read"] < 0.5, "the index finds only the first passage"


def test_evidence_is_the_answer_in_a_candidate_as_it_is_read(made, parts):
  table, tokenizer, _ = parts
  config = of(
    made,
    realm__batch_size=16,
    realm__num_candidates=4,
    realm__needs_evidence=True,
    retriever__query_length=24,
  )
  batch = realm_batches.Batches(settings.batches(config), table, tokenizer).realm(
    0, indexed=Fixed(table)
  )
  for row in range(16):
    answer = " ".join(map(str, batch["targets"][row][batch["target_mask"][row] > 0]))
    texts = [
      " ".join(map(str, ids[segments == 1]))
      for ids, segments in zip(batch["reader_ids"][row], batch["reader_segments"][row], strict=True)
    ]
    assert batch["evidence"][row] == any(f" {answer} " in f" {text} " for text in texts), (
      tokenizer.spell(batch["targets"][row])
    )
  assert 0 < batch["evidence"].mean() < 1


def test_the_reader_warms_up_on_holders(made, parts, monkeypatch):
  table, tokenizer, _ = parts
  batches = realm_batches.Batches(settings.batches(made), table, tokenizer)
  kept = recorded(batches, monkeypatch)
  for step in range(6):
    batches.masked_lm(
      step, batch_size=8, pretraining_every=2, holders=0.5, indexed=Fixed(batches.table)
    )
    queries, _, numbers = kept[-1]
    assert contains(queries.holders, numbers)[:4].all(), "a passage that holds the masked span"
    assert (numbers[4:] == queries.own_passages[4:, :1]).all() == (step % 2 == 0), (
      "then its own, or the best of the index"
    )


@pytest.mark.parametrize(
  "values, words",
  [
    (
      {"retriever_loss": "kl"},
      "realm.retriever_loss is 'kl'; use one of marginal, perplexity_distillation",
    ),
    ({"batch_candidates": True, "null_passage": False}, "set realm.null_passage to True"),
    (
      {"holders": 3},
      "realm.holders is 3; it must be at least 0 and less than realm.num_candidates, 3",
    ),
  ],
)
def test_settings_that_do_not_go_together(made, tmp_path, values, words):
  with pytest.raises(artifacts.UserError, match=words):
    pretrain.pretrain(
      of(made, **{f"realm__{name}": value for name, value in values.items()}), str(tmp_path)
    )


def test_realm_with_every_switch(made, ict, tmp_path, capfd):
  """From recurring spans to REALM with holders, batch candidates and distillation.

  Runs with the real refresh job. Also tests what REALM reports before it starts.
  """
  config = of(
    made,
    realm__init=made.ict.workdir,
    realm__holders=1,
    realm__with_holders=0.5,
    realm__batch_candidates=True,
    realm__retriever_loss="perplexity_distillation",
    warmup__holders=0.5,
    realm__batch_size=8,
  )
  # wider than the retriever's
  config.reader_encoder = config_dict.ConfigDict({**config.encoder.to_dict(), "hidden_dim": 24})
  last = pretrain.pretrain(config, str(tmp_path))
  said = capfd.readouterr()
  row = progress.read_metrics(str(tmp_path))[-1]
  assert (
    "held-out clozes" in said.out
    and "have their answer among the candidates; retrieval utility" in said.out
  )
  assert (
    "WARNING: the reader hardly uses what it reads; a utility of 0.2 nats is enough" in said.err
  )
  hidden_dim = {
    name: snapshots.model_config(last, name)["config"]["architecture"]["hidden_dim"]
    for name in ("retriever", "reader")
  }
  assert hidden_dim == {"retriever": 16, "reader": 24}
  assert (
    0 <= row["held_out_recall_at_5"] <= 1
    and 0 < row["unread_prior"] < 1
    and row["distillation"] > 0
    and artifacts.is_complete(last)
  )
