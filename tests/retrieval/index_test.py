"""Searchers against brute force in NumPy float64.

Also tests which index folders are kept, and which are refused.
"""

import dataclasses
import os

import numpy as np
import pytest
import tensorflow as tf

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.retrieval import approximate, exact, index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.retrieval.scann import ScannSearcher
from realm_tf.storage import artifacts, paths, publishing
from tests.folders import publish_index

NUM_ROWS, DIM, NUM_QUERIES = 20_000, 32, 100


@pytest.fixture(scope="module")
def clustered() -> tuple[np.ndarray, np.ndarray]:
  """Draws rows and queries around 200 centres, like embeddings."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=[200, DIM])

  def draw(count):
    return (centres[rng.integers(200, size=count)] + 0.4 * rng.normal(size=[count, DIM])).astype(
      np.float32
    )

  return draw(NUM_ROWS), draw(NUM_QUERIES)


def brute_force(rows, queries, num):
  scores = queries.astype(np.float64) @ rows.astype(np.float64).T
  numbers = np.argsort(-scores, axis=1, kind="stable")[:, :num]
  return numbers, np.take_along_axis(scores, numbers, axis=1)


KINDS = {
  "exact": {"searcher": "exact"},
  "scann": {"searcher": "scann"},
  "int8": {"searcher": "partitioned", "row_type": "int8"},
  "bfloat16": {"searcher": "partitioned", "row_type": "bfloat16"},
}
APPROXIMATE = [kind for kind in KINDS if kind != "exact"]


def searcher_of(kind, rows, queries=None, **settings):
  if kind == "exact":
    return index.ExactSearcher(rows)
  return index.build_approximate(rows, IndexConfig(**KINDS[kind], **settings), queries)


def recall_of(found, wanted) -> float:
  return np.mean([np.isin(row, got).mean() for row, got in zip(wanted, found, strict=True)])


def artifact(folder, kind):
  with publishing.publish(str(folder), kind=kind, config={"made": str(folder)}, inputs={}):
    pass
  return str(folder)


@pytest.fixture(scope="module")
def searchers(clustered) -> dict:
  """Makes a searcher of each kind, which searches all partitions."""
  return {kind: searcher_of(kind, clustered[0]) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_search_matches_brute_force(kind, searchers, clustered):
  rows, queries = clustered
  for batch, num in ((NUM_QUERIES, 1), (NUM_QUERIES, 5), (33, 100), (1, 5), (0, 5)):
    result = searchers[kind].search(tf.constant(queries[:batch]), num)
    numbers, scores = brute_force(rows, queries[:batch], num)
    found = result.numbers.numpy()
    assert found.shape == (batch, num) and found.dtype == np.int32
    own = np.einsum("qd,qnd->qn", queries[:batch].astype(float), rows[found].astype(float))
    np.testing.assert_allclose(result.scores, own, rtol=1e-5, atol=1e-5)
    assert (np.diff(result.scores, axis=1) <= 0).all()
    if kind == "scann":
      assert batch == 0 or recall_of(found, numbers) >= 0.95
    else:  # all partitions are searched
      np.testing.assert_array_equal(found, numbers)
      np.testing.assert_allclose(result.scores, scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("embedding_type", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_two_bytes_are_searched_as_they_are_stored(
  kind, embedding_type, clustered, tmp_path, monkeypatch
):
  monkeypatch.setattr(exact, "_CAST_AT_ONCE", 999)  # several blocks
  rows, queries = clustered
  config = IndexConfig(**KINDS[kind], embedding_type=embedding_type)
  folder = publish_index(str(tmp_path / "index"), rows, config=config)
  stored = index.read_embeddings(folder, num_rows=NUM_ROWS)
  assert stored.itemsize == 2 and stored.dtype.name == embedding_type
  assert os.path.getsize(index.shard_paths(folder)[0]) < rows.nbytes / 3 / 1.9
  bits = {"float16": 11, "bfloat16": 8}[embedding_type]
  np.testing.assert_allclose(stored.astype(float), rows, rtol=2.0**-bits, atol=1e-4)
  found = index.load(folder).search(tf.constant(queries), 5)
  numbers, scores = brute_force(stored, queries, 5)
  if kind == "scann":
    assert recall_of(found.numbers.numpy(), numbers) >= 0.95
  else:
    np.testing.assert_array_equal(found.numbers, numbers)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5, atol=1e-5)


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path):
  rows = np.full([3, 4], 70_000, np.float32)
  with pytest.raises(artifacts.UserError, match="7e.04, which is too large for float16; use"):
    index.write_shard(str(tmp_path / "embeddings.npy"), rows, embedding_type="float16")
  index.write_shard(str(tmp_path / "embeddings.npy"), rows, embedding_type="bfloat16")
  stored = index.read_shard(str(tmp_path / "embeddings.npy")).astype(float)
  np.testing.assert_allclose(stored, rows, rtol=0.004)


@pytest.mark.parametrize("kind", ["exact", "int8", "bfloat16"])
def test_among_equals_the_lower_number_comes_first(kind):
  rng = np.random.default_rng(2)
  rows = np.tile(rng.integers(-3, 4, size=[1250, 7]), [4, 1]).astype(np.float32)
  queries = rng.integers(-3, 4, size=[9, 7]).astype(np.float32)  # equal scores are equal
  result = searcher_of(kind, rows, reorder=500).search(tf.constant(queries), 9)
  numbers, scores = brute_force(rows, queries, 9)
  np.testing.assert_array_equal(result.numbers, numbers)
  np.testing.assert_array_equal(result.scores, scores)


def test_exact_search_in_many_blocks_keeps_the_lower_number_among_equals(monkeypatch, clustered):
  monkeypatch.setattr(exact, "SCORES_AT_ONCE", 7 * NUM_QUERIES)
  # whole numbers: equal scores are equal
  rows, queries = (
    np.round(np.tile(clustered[0][:25], [4, 1])),
    np.round(clustered[1]),
  )
  result = index.ExactSearcher(rows).search(tf.constant(queries), 9)
  numbers, scores = brute_force(rows, queries, 9)
  np.testing.assert_array_equal(result.numbers, numbers)
  np.testing.assert_array_equal(result.scores, scores)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_few_rows_are_scored_without_partitions(kind, clustered):
  rows, queries = clustered[0][:50], clustered[1]
  searcher = searcher_of(kind, rows)
  assert searcher.describe(50).endswith("every passage scored exactly")
  result = searcher.search(tf.constant(queries), 50)
  np.testing.assert_array_equal(result.numbers, brute_force(rows, queries, 50)[0])


@pytest.fixture(scope="module")
def displaced() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rows, and queries that are not drawn from their clusters, as questions are not from passages.

  200 queries are for choosing, and 200 are held out.
  """
  rng = np.random.default_rng(1)
  centres = rng.normal(size=[200, DIM])
  rows = centres[rng.integers(200, size=NUM_ROWS)] + 0.7 * rng.normal(size=[NUM_ROWS, DIM])
  queries = rng.normal(size=[400, DIM]) + rng.normal(size=[1, DIM])
  return rows.astype(np.float32), queries[:200].astype(np.float32), queries[200:].astype(np.float32)


def recalls(searcher, rows, queries) -> dict[int, float]:
  """Returns the share of the exact best that searches find, by NumPy.

  The searches are for 8, as in a trainer, and for 100, as in a server.
  """
  found = {}
  for num in (8, 100):
    numbers, _ = brute_force(rows, queries, num)
    found[num] = recall_of(searcher.search(tf.constant(queries), num).numbers.numpy(), numbers)
  return found


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_the_width_is_chosen_for_the_wanted_recall(kind, displaced, monkeypatch):
  rows, queries, others = displaced
  narrow = searcher_of(kind, rows, queries, leaves_to_search=15, reorder=100)
  assert max(recalls(narrow, rows, others).values()) < 0.96, (
    "a tenth of the partitions, once the default, loses neighbours"
  )
  assert abs(narrow.width(8).recall - recalls(narrow, rows, others)[8]) < 0.05, "which is measured"
  default = searcher_of(kind, rows, queries)
  assert default.width(8).leaves == default.width(100).leaves == 141, (
    "all partitions, because the rows are few"
  )
  monkeypatch.setattr(approximate, "_ALL_LEAVES_ROWS", 0)
  wanted = 0.96
  chosen = searcher_of(kind, rows, queries, recall=wanted)
  got = recalls(chosen, rows, others)
  assert min(got.values()) >= wanted - 0.01, f"recall of held-out queries {got}, wanted {wanted}"
  assert chosen.width(8).leaves < 141, f"recall {wanted} needs not all: {chosen.widths}"
  assert [width.num for width in chosen.widths] == [
    10,
    100,
    1000,
    5000,
  ] and chosen.num_queries == 200
  assert all(width.recall >= wanted for width in chosen.widths), f"measured {chosen.widths}"
  assert min(recalls(default, rows, others).values()) >= 0.97, "as of all partitions"


def test_without_queries_the_search_is_as_wide_as_it_can_be_and_out_of_reach_is_told(displaced):
  rows, queries, others = displaced
  blind = index.ScannSearcher.build(rows, IndexConfig(searcher="scann"))
  assert blind.width(10) == approximate.Width(10, 141, 2000), "nothing was measured"
  assert min(recalls(blind, rows, others).values()) > 0.995
  few = index.ScannSearcher.build(
    rows, IndexConfig(searcher="scann", recall=1.0, leaves_to_search=2), queries
  )
  assert few.width(10).leaves == 2 and few.width(10).recall < 0.99, f"{few.widths}"
  info = {"config": {"recall": 1.0}, "searchers": {"0": few.settings}}
  assert index.measured_recall(info).startswith(
    f"WARNING: measured recall {few.width(10).recall:.4f} at 10, "
  )
  assert "200 queries, wanted 1.0; 141 partitions, searched 2, 2, 2, 2" in index.measured_recall(
    info
  )


def test_a_recall_that_no_search_reaches_does_not_make_it_as_wide_as_it_can_be():
  """Beyond the width that finds as much as the widest, a wider search only takes longer."""
  asked = []

  def scores(queries, num, leaves, reorder):  # 97 of 100 at most, from 20 leaves and 40 rows on
    asked.append((leaves, reorder))
    share = 0.97 * min(leaves / 20, 1) * min(reorder / 40, 1)
    return np.where(np.arange(1000) < 1000 * share, 1.0, 0.0).reshape([100, 10])

  sample = approximate.Sample(10, np.zeros([100, 2]), np.ones([100, 10], np.float32))
  sizes = dict(num_rows=200_000, num_leaves=400, reorder_times=(2, 4, 8, 200))
  (width,) = approximate.choose_widths([sample], scores, IndexConfig(recall=0.99), **sizes)
  assert 20 <= width.leaves < 30 and width.reorder == 40, f"{width}; asked {asked}"
  assert width.recall == pytest.approx(0.97, abs=0.005)
  (within,) = approximate.choose_widths([sample], scores, IndexConfig(recall=0.9), **sizes)
  assert within.leaves <= width.leaves and within.recall >= 0.9


def test_widths_hold_for_what_is_asked():
  widths = [approximate.Width(10, 3, 40), approximate.Width(100, 5, 300)]
  rows = np.zeros([5000, 2], np.float32)
  searcher = index.ScannSearcher(rows, None, num_leaves=9, widths=widths, num_queries=0)
  assert [searcher.width(num) for num in (1, 10, 11, 100)] == [
    widths[0],
    widths[0],
    widths[1],
    widths[1],
  ]
  assert searcher.width(400) == approximate.Width(400, 5, 800) and searcher.width(
    4000
  ) == approximate.Width(4000, 5, 5000)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_one_searcher_serves_every_width(kind, clustered):
  """A searcher holds the rows in memory; one trace serves all numbers of results."""
  searcher = searcher_of(kind, clustered[0])
  for num in (3, 50, 700):
    assert searcher.search(tf.constant(clustered[1]), num).numbers.shape == (NUM_QUERIES, num)
  assert searcher._search.experimental_get_tracing_count() == 1


@pytest.mark.parametrize(
  "setting, said",
  [
    ({"recall": 0.0}, "wanted recall is 0.0"),
    ({"reorder": 0}, "reorder is 0; wanted at least 1"),
    ({"searcher": "fast"}, "searcher is 'fast'; use one of exact, partitioned, scann"),
    ({"embedding_type": "int8"}, "embedding_type is 'int8'; use one of float32, float16, bfloat16"),
    ({"row_type": "int4"}, "row_type is 'int4'; use one of int8, bfloat16"),
    ({"num_leaves": 5, "leaves_to_search": 6}, "leaves_to_search is 6 of 5 leaves"),
  ],
)
def test_settings_that_cannot_be(setting, said):
  with pytest.raises(artifacts.UserError, match=said):
    IndexConfig(**{"searcher": "scann", **setting})


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_what_is_not_found_is_marked(kind, clustered):
  searcher = searcher_of(kind, clustered[0], num_leaves=200, leaves_to_search=1)
  result = searcher.search(tf.constant(clustered[1]), 5000)
  missing = result.numbers.numpy() == NULL_PASSAGE
  assert missing.any() and result.numbers.shape == (NUM_QUERIES, 5000)
  np.testing.assert_array_equal(missing, np.isneginf(result.scores))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_index_and_exported_graph_answer_like_the_searcher(kind, clustered, tmp_path):
  rows, queries = clustered
  folder = publish_index(str(tmp_path / "index"), rows, config=IndexConfig(**KINDS[kind]))
  loaded = index.load(folder)

  class Servable(tf.Module):
    def __init__(self):
      super().__init__()
      self.searcher = loaded

    @tf.function(input_signature=[tf.TensorSpec([None, DIM], tf.float32)])
    def top(self, queries):
      return self.searcher.search(queries, 5)._asdict()

  tf.saved_model.save(
    Servable(),
    str(tmp_path / "model"),
    options=tf.saved_model.SaveOptions(namespace_whitelist=["Scann"]),
  )
  model = tf.saved_model.load(str(tmp_path / "model"))
  exported = model.top(tf.constant(queries))
  again = loaded.search(tf.constant(queries), 5)
  exactly = index.load(folder, searcher="exact").search(tf.constant(queries), 5)
  np.testing.assert_array_equal(exported["numbers"], again.numbers)
  np.testing.assert_allclose(exported["scores"], again.scores, rtol=1e-6)
  np.testing.assert_array_equal(exactly.numbers, brute_force(rows, queries, 5)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_more_candidates_than_passages_are_refused(kind, clustered):
  with pytest.raises(
    artifacts.UserError, match="11 candidates asked for, the index has 10 passages"
  ):
    searcher_of(kind, clustered[0][:10]).search(tf.constant(clustered[1]), 11)


def test_embeddings_that_are_not_finite_are_refused_by_number(clustered, tmp_path):
  rows = clustered[0][:90].copy()
  rows[47, 3] = np.nan
  with pytest.raises(artifacts.ArtifactError, match="embedding of passage 47 .* is not finite"):
    publish_index(str(tmp_path / "index"), rows)
  assert not artifacts.is_complete(str(tmp_path / "index"))


def test_foreign_and_damaged_indexes_are_refused(clustered, tmp_path):
  passages, snapshot = (
    artifact(tmp_path / "passages", "passages"),
    artifact(tmp_path / "snapshot", "snapshot"),
  )
  other = artifact(tmp_path / "other", "passages")
  folder = publish_index(
    str(tmp_path / "index"), clustered[0][:90], passages=passages, snapshot=snapshot
  )
  assert index.load(folder, passages=passages, snapshot=snapshot).num_rows == 90
  with pytest.raises(artifacts.ArtifactError, match="was made from passages"):
    index.load(folder, passages=other)
  with pytest.raises(
    artifacts.ArtifactError, match="was made for searcher 'exact', wanted 'scann'"
  ):
    index.load(folder, searcher="scann")
  with pytest.raises(artifacts.ArtifactError, match="holds passages, wanted index"):
    index.load(passages)
  os.remove(index.shard_paths(folder)[1])
  with pytest.raises(
    artifacts.ArtifactError, match="damaged: its file 'embeddings-00001-of-.*npy' is missing"
  ):
    index.load(folder)
  os.remove(os.path.join(folder, artifacts.COMPLETE))
  with pytest.raises(artifacts.ArtifactError, match="is not complete"):
    index.load(folder)


def test_a_segment_is_built_once_and_a_half_built_one_again(tmp_path):
  folder, config = str(tmp_path), IndexConfig(searcher="partitioned")
  rows = np.random.default_rng(0).standard_normal([20, 4]).astype(np.float32)
  for number, part in enumerate(np.split(rows, 2)):
    index.write_shard(str(tmp_path / index.shard_name(0, 1, segment=number)), part)
  assert index.segments_of(folder) == [0, 1]
  index.build_segment(folder, config, 0)
  whole, half = (tmp_path / name for name in ("partitioned-00000", "partitioned-00001"))
  before = (whole / "settings.json").stat().st_ino
  half.mkdir()
  (half / "rows.npy").write_bytes(b"of a process that was killed")
  found = index.build(folder, config, num_rows=20)["searchers"]
  assert found.keys() == {"0", "1"} and found["1"]["num_leaves"] == 0
  assert (whole / "settings.json").stat().st_ino == before, "not built again"
  assert not (half / "rows.npy").exists() and (half / "settings.json").exists()


def test_the_message_about_a_value_counts_the_segments_before(tmp_path):
  rows = np.zeros([20, 4], np.float32)
  rows[13, 2] = np.nan
  for number, part in enumerate(np.split(rows, 2)):
    index.write_shard(str(tmp_path / index.shard_name(0, 1, segment=number)), part)
  message = "the embedding of passage 13 in .* finite"
  for searcher in ("exact", "partitioned"):
    with pytest.raises(artifacts.ArtifactError, match=message):
      index.build(str(tmp_path), IndexConfig(searcher=searcher), num_rows=20)
  config = dataclasses.asdict(IndexConfig())
  with publishing.publish(
    str(tmp_path / "index"), kind=index.KIND, config=config, inputs={}
  ) as staged:
    names = [index.shard_name(0, 1, segment=number) for number in range(2)]
    paths.link_files(str(tmp_path), names, to=staged.path)
    staged.details, staged.counts = {"searchers": {}}, {"passages": 20}
  with pytest.raises(artifacts.ArtifactError, match=message):
    index.load(str(tmp_path / "index"))


def test_a_built_scann_searcher_is_freed(monkeypatch):
  """Otherwise an index of many segments would need memory for all of their searchers."""
  from scann.scann_ops.py import scann_ops

  made, create = [], scann_ops.create_searcher

  def recording(*args, **options):
    made.append(create(*args, **options))
    return made[-1]

  monkeypatch.setattr(scann_ops, "create_searcher", recording)
  rows = np.random.default_rng(0).standard_normal([5000, 8]).astype(np.float32)
  searcher = index.build_approximate(rows, IndexConfig(searcher="scann"), rows[:20])
  (handle,) = made
  with pytest.raises(tf.errors.NotFoundError):
    handle.search_batched(rows[:2], final_num_neighbors=1)
  assert searcher.search(tf.constant(rows[:2]), 1).numbers.shape == (2, 1)


def test_scanns_files_have_codes_and_no_embeddings(clustered, tmp_path):
  rows, queries = clustered
  searcher = index.build_approximate(rows, IndexConfig(searcher="scann", recall=0.95), queries)
  searcher.save(str(tmp_path / "scann"))
  size = sum(file.stat().st_size for file in tmp_path.rglob("*"))
  assert size < 0.4 * rows.nbytes, f"{size} bytes beside embeddings of {rows.nbytes}"
  loaded = ScannSearcher.load(str(tmp_path / "scann"), rows, **searcher.settings)
  numbers, scores = (part.numpy() for part in loaded.search(tf.constant(queries), 10))
  exact = np.einsum("qd,qnd->qn", queries, rows[numbers])
  np.testing.assert_allclose(scores, exact, rtol=1e-5, atol=1e-6)
  wanted, _ = brute_force(rows, queries, 10)
  recall = np.mean([np.isin(*pair).mean() for pair in zip(wanted, numbers, strict=True)])
  assert recall >= 0.94
