"""Arrow files: what is written is read, by Arrow too; what is no such file is one sentence."""

import os
import random

import numpy as np
import pyarrow as pa
import pytest

from realm_tf.errors import ArtifactError
from realm_tf.storage import arrow_files

SCHEMA = pa.schema(
  {
    "number": pa.int32(),
    "text": pa.string(),
    "ids": pa.list_(pa.uint16()),
    "hashes": pa.list_(pa.int64()),
    "uid": pa.binary(4),
  }
)


def rows_of(num: int, *, seed: int = 0, highest: int = 1 << 16) -> list[dict]:
  rng = np.random.default_rng(seed)
  return [
    {
      "number": number,
      "text": "ü東a" * int(rng.integers(4)),
      "ids": rng.integers(highest, size=rng.integers(5)).tolist(),
      "hashes": rng.integers(-(1 << 63), 1 << 63, size=rng.integers(3), endpoint=False).tolist(),
      "uid": rng.bytes(4),
    }
    for number in range(num)
  ]


def parts_of(rows: list[dict], size: int) -> list[dict]:
  parts = [rows[start : start + size] for start in range(0, len(rows), size)]
  return [{name: [row[name] for row in part] for name in SCHEMA.names} for part in parts]


def write(path, rows: list[dict], *, size: int = 7) -> str:
  assert arrow_files.write(str(path), SCHEMA, parts_of(rows, size)) == len(rows)
  return str(path)


def rows_in(columns: arrow_files.Columns) -> list[dict]:
  plain = {
    "number": columns["number"].joined().tolist(),
    "text": columns["text"][:],
    "ids": [row.tolist() for row in columns["ids"]],
    "hashes": [row.tolist() for row in columns["hashes"]],
    "uid": [row.tobytes() for row in columns["uid"].joined()],
  }
  return [dict(zip(plain, values, strict=True)) for values in zip(*plain.values(), strict=True)]


@pytest.mark.parametrize("most_rows, most_elements", [(1 << 16, 1 << 30), (3, 1 << 30), (9, 6)])
def test_rows_come_back(tmp_path, monkeypatch, most_rows, most_elements):
  monkeypatch.setattr(arrow_files, "ROWS_PER_BATCH", most_rows)
  monkeypatch.setattr(arrow_files, "_MOST_ELEMENTS", most_elements)
  rows = rows_of(40)
  files = [
    write(tmp_path / "a", rows[:25]),
    write(tmp_path / "b", []),
    write(tmp_path / "c", rows[25:]),
  ]
  columns = arrow_files.open_columns(files, SCHEMA)
  assert rows_in(columns) == rows
  for chunk in columns["ids"].chunks:
    most = max(most_elements, int(np.diff(chunk.splits).max(initial=0)))
    assert len(chunk) <= most_rows and chunk.splits[-1] <= most
  assert rows_in(arrow_files.open_columns(files[1:2], SCHEMA)) == []
  assert rows_in(arrow_files.open_columns([], SCHEMA)) == []


def test_arrow_reads_the_same(tmp_path, monkeypatch):
  monkeypatch.setattr(arrow_files, "ROWS_PER_BATCH", 10)
  rows = rows_of(25)
  with pa.memory_map(write(tmp_path / "a", rows)) as file:
    table = pa.ipc.open_file(file).read_all()
    table.validate(full=True)
    assert table.to_pylist() == rows
  assert [str(field.type) for field in table.schema] == [
    "int32",
    "string",
    "list<item: uint16>",
    "list<item: int64>",
    "fixed_size_binary[4]",
  ]


def test_bytes_depend_on_the_rows_only(tmp_path):
  rows = rows_of(50)
  one, other = write(tmp_path / "a", rows, size=50), write(tmp_path / "b", rows, size=3)
  assert open(one, "rb").read() == open(other, "rb").read()


@pytest.mark.parametrize("value, wanted", [(65535, np.uint16), (65536, np.int32), (-1, np.int32)])
def test_integers_are_as_wide_as_the_widest(tmp_path, value, wanted):
  rows = rows_of(20, highest=9)
  rows[11]["ids"].append(value)
  columns = arrow_files.open_columns([write(tmp_path / "a", rows)], SCHEMA)
  assert columns["ids"].values.dtype == wanted and rows_in(columns) == rows
  assert columns["hashes"].values.dtype == np.int64


def test_columns_are_mapped(tmp_path):
  """No column is copied, and neither the file nor an open descriptor of it is needed later."""
  path, rows = write(tmp_path / "mapped.arrow", rows_of(500)), rows_of(500)
  columns = arrow_files.open_columns([path], SCHEMA)
  with open("/proc/self/maps") as maps:
    ranges = [line.split()[0].split("-") for line in maps if "mapped.arrow" in line]
  (start, end), *more = ((int(at, 16) for at in part) for part in ranges)
  (chunk,) = columns["ids"].chunks
  arrays = [chunk.values, chunk.splits, *columns["uid"].chunks, *columns["number"].chunks]
  arrays += [columns["text"].chunks[0].values]
  assert not more and all(start <= array.ctypes.data < end for array in arrays)
  assert not any(array.flags.writeable for array in arrays)
  open_files = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
  assert path not in [os.readlink(link) for link in open_files if os.path.islink(link)]
  os.remove(path)
  assert rows_in(columns) == rows


def arrow_of(kind, **columns) -> bytes:
  table = pa.table(columns)
  sink = pa.BufferOutputStream()
  with kind(sink, table.schema) as writer:
    writer.write_table(table)
  return sink.getvalue().to_pybytes()


FOREIGN = {
  "empty": b"",
  "text": b"no columns\n" * 99,
  "only the magic": b"ARROW1\0\0",
  "a stream": arrow_of(pa.ipc.new_stream, ids=pa.array([[1]], pa.list_(pa.uint16()))),
  "other columns": arrow_of(pa.ipc.new_file, others=[1]),
  "another type": arrow_of(pa.ipc.new_file, ids=["a"]),
  "wider lists": arrow_of(pa.ipc.new_file, ids=pa.array([[1]], pa.large_list(pa.uint16()))),
  "no list": arrow_of(pa.ipc.new_file, ids=pa.array([[1], None], pa.list_(pa.uint16()))),
  "no integer": arrow_of(pa.ipc.new_file, ids=pa.array([[1, None]], pa.list_(pa.uint16()))),
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_one_sentence(tmp_path, data):
  (tmp_path / "a").write_bytes(data)
  with pytest.raises(ArtifactError, match="not an Arrow file with the columns ids") as caught:
    arrow_files.open_columns([str(tmp_path / "a")], pa.schema({"ids": pa.list_(pa.uint16())}))
  assert "\n" not in str(caught.value) and caught.value.__cause__ is None


def test_cut_files_are_one_sentence(tmp_path):
  path = write(tmp_path / "a", rows_of(30))
  whole = open(path, "rb").read()
  for size in range(0, len(whole), 41):
    (tmp_path / "b").write_bytes(whole[:size])
    with pytest.raises(ArtifactError, match="not an Arrow file"):
      arrow_files.open_columns([str(tmp_path / "b")], SCHEMA)


def test_damaged_files_read_nothing_outside_of_them(tmp_path):
  """A file without digests is read as it is, or refused with one sentence."""
  path, rng, refused = write(tmp_path / "a", rows_of(30)), random.Random(0), 0
  whole = open(path, "rb").read()
  for _ in range(1500):
    data = bytearray(whole)
    for _ in range(rng.randint(1, 3)):
      data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    (tmp_path / "b").write_bytes(data)
    try:
      columns = arrow_files.open_columns([str(tmp_path / "b")], SCHEMA)
      columns["ids"].take(range(len(columns["ids"])))
      rows_in(columns)
    except ArtifactError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused > 100
