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
