"""The partitions of `PartitionedSearcher`: which rows they have, and what is read of them."""

import os

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from realm_tf.retrieval import index, partitioned
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.retrieval.partitioned import PartitionedSearcher
from realm_tf.storage import artifacts
from tests.folders import publish_index

NUM_ROWS, DIM, NUM_LEAVES = 6000, 13, 40


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
  """Draws rows around 60 centres, with norms that differ a hundredfold."""
  rng = np.random.default_rng(0)
  around = rng.normal(size=[60, DIM])[rng.integers(60, size=NUM_ROWS)]
  norms = 10 ** rng.uniform(-1, 1, size=[NUM_ROWS, 1])
  return ((around + 0.3 * rng.normal(size=[NUM_ROWS, DIM])) * norms).astype(np.float32)


@pytest.mark.parametrize("row_type", ["int8", "bfloat16"])
def test_a_partition_holds_the_rows_nearest_by_angle(rows, row_type):
  parts = partitioned.divide(rows, NUM_LEAVES, row_type=row_type)
  np.testing.assert_array_equal(np.sort(parts.numbers), np.arange(NUM_ROWS))
  assert parts.splits[0] == 0 and parts.splits[-1] == NUM_ROWS and len(parts.splits) == 41
  assert np.diff(parts.splits).max() < 6 * NUM_ROWS / NUM_LEAVES, "no partition is huge"
  codes = parts.rows.astype(np.float64)
  if row_type == "int8":
    codes *= parts.scales[:, np.newaxis]
  wanted = rows[parts.numbers].astype(np.float64)
  errors = np.abs(codes - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
  assert 0 < errors.max() < 1 / 250, "of the greatest number of each row, whatever its norm"
  for start, end, centre, spread in zip(
    parts.splits[:-1], parts.splits[1:], parts.centres, parts.spreads, strict=True
  ):
    assert (np.diff(parts.numbers[start:end]) > 0).all(), "ascending"
    members = wanted[start:end]
    np.testing.assert_allclose(centre, members.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(spread, np.sqrt(members.var(axis=0).mean()), rtol=1e-3)
  again = partitioned.divide(rows, NUM_LEAVES, row_type=row_type)
  for name, values in parts._asdict().items():
    np.testing.assert_array_equal(values, getattr(again, name), f"{name} is the same every time")


def test_identical_rows_leave_partitions_empty():
  rows = np.ones([5000, 4], np.float32)
  rows[4990:] = 0
  searcher = PartitionedSearcher.build(rows, IndexConfig(searcher="partitioned", num_leaves=9))
  found = searcher.search(tf.ones([2, 4]), 4)
  np.testing.assert_array_equal(found.scores, np.full([2, 4], 4.0))


def test_queries_in_many_blocks(rows, monkeypatch):
  queries = rows[:50] + 1
  searcher = PartitionedSearcher.build(rows, IndexConfig(searcher="partitioned"))
  wanted = searcher.search(tf.constant(queries), 7)
  monkeypatch.setattr(partitioned, "_KEPT_AT_ONCE", 4 * NUM_ROWS)  # four queries
  searcher = PartitionedSearcher.build(rows, IndexConfig(searcher="partitioned"))
  found = searcher.search(tf.constant(queries), 7)
  np.testing.assert_array_equal(found.numbers, wanted.numbers)
  np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-6)


def test_partitions_of_long_rows_are_searched_first(rows):
  """Of two partitions in nearly the same direction, the one with the longer rows has the best."""
  rng = np.random.default_rng(3)
  directions = np.eye(DIM)[rng.integers(DIM, size=5000)] + 0.01 * rng.normal(size=[5000, DIM])
  directions[:, 0] += 1  # towards the query
  long = np.argmax(directions[:, 1:], axis=1) == 4
  rows = (directions * np.where(long, 3, 1)[:, np.newaxis]).astype(np.float32)
  query = np.eye(DIM, dtype=np.float32)[:1] + 0.1
  searcher = PartitionedSearcher.build(
    rows, IndexConfig(searcher="partitioned", num_leaves=12, leaves_to_search=1)
  )
  assert long[searcher.search(tf.constant(query), 5).numbers[0]].all()


def test_an_exported_search_has_only_tensorflows_own_ops(rows, tmp_path):
  class Servable(tf.Module):
    def __init__(self):
      super().__init__()
      self.searcher = PartitionedSearcher.build(rows, IndexConfig(searcher="partitioned"))

    @tf.function(input_signature=[tf.TensorSpec([None, DIM], tf.float32)])
    def top(self, queries):
      return self.searcher.search(queries, 5)._asdict()

  servable = Servable()
  tf.saved_model.save(servable, str(tmp_path))  # without a whitelist of other ops
  saved = saved_model_pb2.SavedModel.FromString((tmp_path / "saved_model.pb").read_bytes())
  graph = saved.meta_graphs[0].graph_def
  nodes = [node for part in (graph, *graph.library.function) for node in nodes_of(part)]
  ops = {node.op for node in nodes} - {
    function.signature.name for function in graph.library.function
  }
  assert {"TopKV2", "MatMul", "StridedSlice"} <= ops
  assert all(hasattr(tf.raw_ops, op) for op in ops - {"_Arg", "_Retval"}), ops
  assert not [op for op in ops if ">" in op or "PyFunc" in op], ops
  assert max(node.ByteSize() for node in nodes) < 10_000, "the rows are in variables"


def nodes_of(part):
  return part.node_def if hasattr(part, "node_def") else part.node


def test_a_damaged_file_is_refused(rows, tmp_path):
  folder = publish_index(
    str(tmp_path / "index"), rows, config=IndexConfig(searcher="partitioned", row_type="bfloat16")
  )
  arrays = ("centres", "numbers", "rows", "scales", "splits", "spreads")
  wanted = {"settings.json", *(f"{name}.npy" for name in arrays)}
  assert set(os.listdir(f"{folder}/partitioned-00000")) == wanted
  with open(f"{folder}/partitioned-00000/rows.npy", "r+b") as file:
    file.seek(500)
    file.write(b"\x01\x02\x03\x04")
  with pytest.raises(
    artifacts.ArtifactError, match="damaged: its file 'partitioned-00000/rows.npy'"
  ):
    index.load(folder)
  assert index.load(folder, searcher="exact").num_rows == NUM_ROWS
