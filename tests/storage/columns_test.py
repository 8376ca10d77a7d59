"""Columns of several chunks against plain Python lists."""

import numpy as np
import pytest

from realm_tf.errors import ArtifactError
from realm_tf.storage.columns import Chunk, Fixed, Picked, Ragged, Texts, splits_of


def chunks_of(rows: list[list[int]], num_chunks: int, dtype=np.uint16) -> list[Chunk]:
  """Cuts rows into chunks; the first is empty if there are several."""
  bounds = np.linspace(0, len(rows), num_chunks).astype(int) if num_chunks > 1 else [len(rows)]
  made, first = [], 0
  for end in bounds:
    part = rows[first:end]
    values = np.array([value for row in part for value in row], dtype)
    made.append(Chunk(values, splits_of([len(row) for row in part]).astype(np.int32)))
    first = end
  return made


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
  rng = np.random.default_rng(0)
  return [rng.integers(1 << 16, size=rng.integers(6)).tolist() for _ in range(300)]


@pytest.mark.parametrize("num_chunks", [1, 2, 5, 40])
def test_ragged(rows, num_chunks):
  column = Ragged(chunks_of(rows, num_chunks))
  assert len(column) == len(rows) and [row.tolist() for row in column] == rows
  assert column[7].dtype == np.int32 and column[-1].tolist() == rows[-1]
  assert column.values.tolist() == sum(rows, []) and column.values.dtype == np.uint16
  assert column.sizes().tolist() == [len(row) for row in rows]
  np.testing.assert_array_equal(column.splits, splits_of([len(row) for row in rows]))
  assert column.splits.dtype == np.int64
  assert column.tensor().to_list() == rows
  for part in (slice(0, 0), slice(3, 90), slice(290, 999), slice(None)):
    cut = column[part]
    assert cut.tensor().to_list() == rows[part] and len(cut) == len(rows[part])
    assert cut.take(range(len(cut))).tensor().to_list() == rows[part]
  with pytest.raises(IndexError):
    column[len(rows)]


@pytest.mark.parametrize("num_chunks", [1, 2, 5, 40])
@pytest.mark.parametrize("num", [0, 1, 20, 2000])
def test_take(rows, num_chunks, num):
  """Few rows of many chunks are copied one by one, many rows chunk by chunk."""
  column = Ragged(chunks_of(rows, num_chunks))
  drawn = np.random.default_rng(num).integers(len(rows), size=num)
  for wanted in (drawn, np.sort(drawn)):
    taken = column.take(wanted)
    assert [row.tolist() for row in taken] == [rows[row] for row in wanted]
    assert taken.values.dtype == np.uint16 and taken.splits.dtype == np.int64
    assert column.gather(wanted).to_list() == [rows[row] for row in wanted]
  for outside in (-1, len(rows)):
    with pytest.raises(IndexError, match="there are 300"):
      column.take([*drawn, outside])


def test_picked(rows):
  wanted = np.array([7, 299, 7, 0])
  picked = Picked(Ragged(chunks_of(rows, 5)), wanted)
  assert len(picked) == 4 and [row.tolist() for row in picked] == [rows[row] for row in wanted]


@pytest.mark.parametrize("num_chunks", [1, 2, 5])
def test_texts(num_chunks):
  texts = ["", "Röntgen", "東京", "a", "", "b" * 70000, "ü"]
  column = Texts(chunks_of([list(text.encode()) for text in texts], num_chunks, np.uint8))
  assert list(column) == texts and len(column) == len(texts) and column[-1] == "ü"
  assert [column[row] for row in range(len(texts))] == texts and column[2:5] == texts[2:5]
  assert column[:] == texts and column[9:] == [] and "東京" in column
  with pytest.raises(IndexError):
    column[7]


def test_fixed():
  column = Fixed([np.arange(0, dtype=np.int32), np.arange(3, dtype=np.int32), np.array([7, 9])])
  assert column.joined().tolist() == [0, 1, 2, 7, 9] and column[2:4].tolist() == [2, 7]
  assert column[5:].tolist() == []


@pytest.mark.parametrize("splits", [[0, 3, 2, 9], [-4, 0, 2, 4], [0, 1 << 30, 2, 4]])
def test_lying_offsets_read_nothing_outside(splits):
  column = Ragged([Chunk(np.arange(4, dtype=np.uint16), np.array(splits, np.int32))])
  with pytest.raises(ArtifactError, match="offsets outside of its data"):
    column.take([0, 1, 2])
  assert all(set(row.tolist()) <= set(range(4)) for row in column)


def test_every_access_asks_whether_the_files_are_damaged():
  def check():
    raise ArtifactError("damaged")

  (chunk,) = chunks_of([[65], [66]], 1, np.uint8)
  ragged, texts, fixed = Ragged([chunk], check), Texts([chunk], check), Fixed([np.arange(2)], check)
  for read in (
    lambda: ragged[0],
    lambda: ragged[:1],
    lambda: ragged.take([0]),
    lambda: ragged.values,
    lambda: texts[0],
    lambda: texts[:],
    lambda: list(texts),
    lambda: fixed[:1],
  ):
    with pytest.raises(ArtifactError, match="damaged"):
      read()
