"""Searchers against brute force in NumPy float64; index folders that are kept, and those that are refused."""

import dataclasses
import os

import numpy as np
import pytest
import tensorflow as tf

from realm_tf import artifacts, index, searchers
from realm_tf.index import IndexConfig

NUM_ROWS, DIM, NUM_QUERIES = 20_000, 32, 100


@pytest.fixture(scope="module")
def clustered() -> tuple[np.ndarray, np.ndarray]:
  """Rows and queries around 200 centres, as embeddings are."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=[200, DIM])
  draw = lambda count: (centres[rng.integers(200, size=count)] + 0.4 * rng.normal(size=[count, DIM])).astype(np.float32)
  return draw(NUM_ROWS), draw(NUM_QUERIES)


def brute_force(rows, queries, num):
  scores = queries.astype(np.float64) @ rows.astype(np.float64).T
  numbers = np.argsort(-scores, axis=1, kind="stable")[:, :num]
  return numbers, np.take_along_axis(scores, numbers, axis=1)


def searcher_of(kind, rows):
  return index.ExactSearcher(rows) if kind == "exact" else index.ScannSearcher.build(rows, IndexConfig(searcher="scann"))


def publish(folder, rows, *, config=IndexConfig(), num_shards=3, passages=None, snapshot=None):
  """An index folder without the jobs."""
  inputs = {name: path for name, path in (("passages", passages), ("snapshot", snapshot)) if path}
  with artifacts.publish(folder, kind=index.KIND, config=dataclasses.asdict(config), inputs=inputs) as staged:
    for i, part in enumerate(np.array_split(rows, num_shards)):
      index.write_shard(os.path.join(staged.path, index.shard_name(i, num_shards)), part)
    staged.details = index.build(staged.path, config, num_rows=len(rows))
    staged.counts = {"passages": len(rows)}
  return folder


def artifact(folder, kind):
  with artifacts.publish(str(folder), kind=kind, config={"made": str(folder)}, inputs={}):
    pass
  return str(folder)


@pytest.mark.parametrize("kind", ["exact", "scann"])
@pytest.mark.parametrize("num", [1, 5, 100])
def test_search_matches_brute_force(kind, num, clustered):
  rows, queries = clustered
  result = searcher_of(kind, rows).search(tf.constant(queries), num)
  numbers, scores = brute_force(rows, queries, num)
  found = result.numbers.numpy()
  recall = np.mean([np.isin(row, wanted).mean() for row, wanted in zip(found, numbers)])
  own_scores = np.einsum("qd,qnd->qn", queries.astype(np.float64), rows[found].astype(np.float64))
  error = np.abs(result.scores - own_scores).max()
  print(f"{kind} top {num} of {NUM_ROWS}: recall {recall:.4f}, largest score error {error:.1e}")
  assert found.shape == (NUM_QUERIES, num) and found.dtype == np.int32
  np.testing.assert_allclose(result.scores, own_scores, rtol=1e-5, atol=1e-5)
  assert (np.diff(result.scores, axis=1) <= 0).all()
  if kind == "exact":
    np.testing.assert_array_equal(found, numbers)
    np.testing.assert_allclose(result.scores, scores, rtol=1e-5, atol=1e-5)
  assert recall >= 0.95


def test_exact_search_in_many_blocks_keeps_the_lower_number_among_equals(monkeypatch, clustered):
  monkeypatch.setattr(searchers, "_SCORES_AT_ONCE", 7 * NUM_QUERIES)
  rows, queries = np.round(np.tile(clustered[0][:25], [4, 1])), np.round(clustered[1])  # whole numbers: equal scores are equal
  result = index.ExactSearcher(rows).search(tf.constant(queries), 9)
  numbers, scores = brute_force(rows, queries, 9)
  print(f"100 rows in blocks of 9: {np.mean(result.numbers == numbers):.3f} of the numbers equal")
  np.testing.assert_array_equal(result.numbers, numbers)
  np.testing.assert_array_equal(result.scores, scores)


def test_scann_scores_few_rows_without_partitions(clustered):
  rows, queries = clustered[0][:50], clustered[1]
  result = searcher_of("scann", rows).search(tf.constant(queries), 50)
  np.testing.assert_array_equal(result.numbers, brute_force(rows, queries, 50)[0])


@pytest.fixture(scope="module")
def displaced() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rows, and queries not drawn from their clusters, as questions are not from passages: 500 to choose by, 500 held out."""
  rng = np.random.default_rng(1)
  centres = rng.normal(size=[200, DIM])
  rows = centres[rng.integers(200, size=NUM_ROWS)] + 0.7 * rng.normal(size=[NUM_ROWS, DIM])
  queries = rng.normal(size=[1000, DIM]) + rng.normal(size=[1, DIM])
  return rows.astype(np.float32), queries[:500].astype(np.float32), queries[500:].astype(np.float32)


def recalls(searcher, rows, queries) -> dict[int, float]:
  """The share of the exact best that searches find as a trainer (8) and a server (100) asks, by NumPy."""
  found = {}
  for num in (8, 100):
    numbers, _ = brute_force(rows, queries, num)
    got = searcher.search(tf.constant(queries), num).numbers.numpy()
    found[num] = np.mean([np.isin(wanted, row).mean() for wanted, row in zip(numbers, got)])
  return found


def test_the_width_of_scann_is_chosen_for_the_wanted_recall(displaced, monkeypatch):
  rows, queries, others = displaced
  narrow = index.ScannSearcher.build(
    rows, IndexConfig(searcher="scann", leaves_to_search=15, reorder=100), queries
  )
  assert max(recalls(narrow, rows, others).values()) < 0.93, (
    "a tenth of the partitions, once the default, loses neighbours"
  )
  assert abs(narrow.width(8).recall - recalls(narrow, rows, others)[8]) < 0.05, "which is measured"
  default = index.ScannSearcher.build(rows, IndexConfig(searcher="scann"), queries)
  assert default.width(8).leaves == default.width(100).leaves == 141, (
    "all partitions of so few rows"
  )
  monkeypatch.setattr(searchers, "_ALL_LEAVES_ROWS", 0)
  for wanted in (0.9, 0.98):
    chosen = index.ScannSearcher.build(rows, IndexConfig(searcher="scann", recall=wanted), queries)
    got = recalls(chosen, rows, others)
    assert min(got.values()) >= wanted - 0.01, f"recall of held-out queries {got}, wanted {wanted}"
    assert chosen.width(8).leaves < 141, f"recall {wanted} needs not all: {chosen.widths}"
    assert [width.num for width in chosen.widths] == [
      10,
      100,
      1000,
      5000,
    ] and chosen.num_queries == 500
    assert all(width.recall >= wanted for width in chosen.widths), f"measured {chosen.widths}"
  assert min(recalls(default, rows, others).values()) >= 0.97, "as of all partitions"


def test_without_queries_and_out_of_reach_the_search_is_as_wide_as_it_can_be(displaced):
  rows, queries, others = displaced
  blind = index.ScannSearcher.build(rows, IndexConfig(searcher="scann"))
  assert blind.width(10) == searchers.Width(10, 141, 2000), "nothing was measured"
  assert min(recalls(blind, rows, others).values()) > 0.995
  few = index.ScannSearcher.build(
    rows, IndexConfig(searcher="scann", recall=1.0, leaves_to_search=2), queries
  )
  assert few.width(10).reorder == 2000 and few.width(100).reorder == 20_000, (
    f"the most candidates: {few.widths}"
  )
  info = {"config": {"recall": 1.0}, "scann": few.settings}
  assert index.measured_recall(info).startswith(
    f"WARNING: ScaNN's recall {few.width(10).recall:.4f} at 10, "
  )
  assert "500 queries, wanted 1.0; 141 partitions, searched 2, 2, 2, 2" in index.measured_recall(
    info
  )


def test_widths_hold_for_what_is_asked():
  widths = [searchers.Width(10, 3, 40), searchers.Width(100, 5, 300)]
  searcher = index.ScannSearcher(None, num_rows=5000, num_leaves=9, widths=widths, num_queries=0)
  assert [searcher.width(num) for num in (1, 10, 11, 100)] == [
    widths[0],
    widths[0],
    widths[1],
    widths[1],
  ]
  assert searcher.width(400) == searchers.Width(400, 5, 800) and searcher.width(
    4000
  ) == searchers.Width(4000, 5, 5000)


def test_one_scann_searcher_serves_every_width(clustered):
  """A searcher holds the rows in memory: one trace for all numbers asked for."""
  searcher = searcher_of("scann", clustered[0])
  for num in (3, 50, 700):
    assert searcher.search(tf.constant(clustered[1]), num).numbers.shape == (NUM_QUERIES, num)
  assert searcher._search.experimental_get_tracing_count() == 1


@pytest.mark.parametrize(
  "setting, said",
  [
    ({"recall": 0.0}, "wanted recall is 0.0"),
    ({"reorder": 0}, "reorder is 0; wanted at least 1"),
    ({"num_leaves": 5, "leaves_to_search": 6}, "leaves_to_search is 6 of 5 leaves"),
  ],
)
def test_settings_that_cannot_be(setting, said):
  with pytest.raises(artifacts.UserError, match=said):
    IndexConfig(searcher="scann", **setting)


def test_scann_marks_what_it_does_not_find(clustered):
  config = IndexConfig(searcher="scann", num_leaves=200, leaves_to_search=1)
  searcher = index.ScannSearcher.build(clustered[0], config)
  result = searcher.search(tf.constant(clustered[1]), 5000)
  missing = result.numbers.numpy() == index.MISSING
  print(f"{missing.mean():.3f} of 5000 candidates missing")
  assert missing.any() and result.numbers.shape == (NUM_QUERIES, 5000)
  np.testing.assert_array_equal(missing, np.isneginf(result.scores))


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_saved_index_and_exported_graph_answer_like_the_searcher(kind, clustered, tmp_path):
  rows, queries = clustered
  folder = publish(str(tmp_path / "index"), rows, config=IndexConfig(searcher=kind))
  loaded = index.load(folder)

  class Servable(tf.Module):
    def __init__(self):
      super().__init__()
      self.searcher = loaded

    @tf.function(input_signature=[tf.TensorSpec([None, DIM], tf.float32)])
    def top(self, queries):
      return self.searcher.search(queries, 5)._asdict()

  tf.saved_model.save(Servable(), str(tmp_path / "model"), options=tf.saved_model.SaveOptions(namespace_whitelist=["Scann"]))
  model = tf.saved_model.load(str(tmp_path / "model"))
  exported = model.top(tf.constant(queries))
  again, exact = loaded.search(tf.constant(queries), 5), index.load(folder, searcher="exact").search(tf.constant(queries), 5)
  print(f"{kind}: {type(loaded).__name__}, exported equal {np.mean(exported['numbers'] == again.numbers):.3f}, "
        f"exact search of the same folder equal {np.mean(exact.numbers == again.numbers):.3f}")
  np.testing.assert_array_equal(exported["numbers"], again.numbers)
  np.testing.assert_allclose(exported["scores"], again.scores, rtol=1e-6)
  np.testing.assert_array_equal(exact.numbers, brute_force(rows, queries, 5)[0])


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_more_candidates_than_passages_are_refused(kind, clustered):
  with pytest.raises(artifacts.UserError, match="11 candidates asked for, the index has 10 passages"):
    searcher_of(kind, clustered[0][:10]).search(tf.constant(clustered[1]), 11)


def test_embeddings_that_are_not_finite_are_refused_by_number(clustered, tmp_path):
  rows = clustered[0][:90].copy()
  rows[47, 3] = np.nan
  with pytest.raises(artifacts.ArtifactError, match="embedding of passage 47 .* is not finite"):
    publish(str(tmp_path / "index"), rows)
  assert not artifacts.is_complete(str(tmp_path / "index"))


def test_foreign_and_damaged_indexes_are_refused(clustered, tmp_path):
  passages, snapshot = artifact(tmp_path / "passages", "passages"), artifact(tmp_path / "snapshot", "snapshot")
  other = artifact(tmp_path / "other", "passages")
  folder = publish(str(tmp_path / "index"), clustered[0][:90], passages=passages, snapshot=snapshot)
  assert index.load(folder, passages=passages, snapshot=snapshot).num_rows == 90
  with pytest.raises(artifacts.ArtifactError, match="was made from passages"):
    index.load(folder, passages=other)
  with pytest.raises(artifacts.ArtifactError, match="was made for exact search"):
    index.load(folder, searcher="scann")
  with pytest.raises(artifacts.ArtifactError, match="holds passages, wanted index"):
    index.load(passages)
  os.remove(index.shard_paths(folder)[1])
  with pytest.raises(artifacts.ArtifactError, match="holds 60 embeddings, wanted 90"):
    index.load(folder)
  os.remove(os.path.join(folder, artifacts.COMPLETE))
  with pytest.raises(artifacts.ArtifactError, match="is not complete"):
    index.load(folder)
