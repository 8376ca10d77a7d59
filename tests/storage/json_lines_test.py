"""realm_tf/storage/json_lines.py: every shape, packing and encoding of users' files.

All give the same records; only bad records are left out.
"""

import bz2
import gzip
import io
import json
import lzma
import random

import pytest

from benchmarks import model_server_load
from realm_tf import progress
from realm_tf.pipeline import summary
from realm_tf.storage import json_lines, json_values, packed_files
from serving import client

ROWS = [
  {"title": f"T{n}", "text": 'a "q" {x} [y] \\ \u2028 \u0085 z', "more": {"a": [1, {"b": 2}]}}
  for n in range(3)
]
SHAPES = {
  "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
  "windows lines": "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n\r\n",
  "array": json.dumps(ROWS),
  "array over lines": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
  "pretty": json.dumps(ROWS, indent=2),
  "not indented": json.dumps(ROWS, indent=0),
  "after each other": "".join(json.dumps(row) for row in ROWS),
  "pretty after each other": "\n".join(json.dumps(row, indent=2) for row in ROWS),
  "commas, no brackets": ",\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
}
PACKINGS = {
  "plain": bytes,
  "gzip": gzip.compress,
  "bz2": bz2.compress,
  "xz": lzma.compress,
  "two members": lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:]),
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


def rows_of(data: bytes) -> list[dict | None]:
  return [record.row for record in json_lines.read(data)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packing", PACKINGS)
def test_shapes_packings_encodings(shape, packing):
  for encoding in ENCODINGS:
    assert rows_of(PACKINGS[packing](SHAPES[shape].encode(encoding))) == ROWS, encoding


@pytest.mark.parametrize("block_bytes", [1, 7])
def test_records_do_not_depend_on_the_blocks_they_are_read_in(block_bytes, monkeypatch):
  monkeypatch.setattr(packed_files, "_BLOCK_BYTES", block_bytes)
  for shape, text in SHAPES.items():
    assert rows_of(text.encode()) == ROWS, shape


BAD = {  # as it is spelled -> the reason
  "1": "the line is not an object",
  '"text]"': "the line is not an object",
  "null": "the line is not an object",
  '[2, {"n": 1}]': "the line is not an object",
  '{"n": NaN}': "the line holds NaN, which is not JSON",
  '{"n": -Infinity}': "the line holds -Infinity, which is not JSON",
  '{"n": 1, "n": 2}': "a key occurs twice in the line",
  '{"n": ' + "1" * 4301 + "}": "a number in the line is too long",
  '{"n": ' + "[" * 100_000 + "]" * 100_000 + "}": "the line is nested too deep",
  '{"n": "\0"}': "the line is not JSON in UTF-8",
  '{"n": tru}': "the line is not JSON in UTF-8",
}


@pytest.mark.parametrize("shape", ["lines", "array"])
def test_a_bad_record_costs_itself(shape):
  good = ['{"n": 0}'] + [json.dumps({"n": n}) for n in range(1, len(BAD) + 1)]
  texts = [text for pair in zip(good[:-1], BAD, strict=True) for text in pair] + good[-1:]
  data = "\n".join(texts) if shape == "lines" else f"[{', '.join(texts)}]"
  records = list(json_lines.read(data.encode()))
  assert [record.row["n"] for record in records if record.row] == list(range(len(BAD) + 1))
  assert [record.reason for record in records if not record.row] == list(BAD.values())
  unit = "line" if shape == "lines" else "record"
  assert [record.place for record in records] == [f"{unit} {n + 1}" for n in range(len(texts))]


def test_broken_values_cost_little():
  never_closed = b'[\n{"n": 1},\n{"n": 2, "t": "x",\n{"n": 3},\n{"t": "no end\n},\n{"n": 4}\n]'
  assert [row and row["n"] for row in rows_of(never_closed)] == [1, None, 3, None, 4]
  assert [row and row["n"] for row in rows_of(b'[{"n": 1}, {"n": 2}, {"n"')] == [1, 2, None]
  assert [row and row.get("n") for row in rows_of(b'{"n": \n{"n": 1}\n\xff\xfe\n{"n": 2}')] == [
    None,
    1,
    None,
    2,
  ]
  assert rows_of(b"") == rows_of(b"[]") == rows_of(b"\xef\xbb\xbf\n \n") == []


def test_what_is_whole_in_a_broken_file_is_used():
  lines = "".join(
    json.dumps({"n": n, "t": random.Random(n).random()}) + "\n" for n in range(5000)
  ).encode()
  for name, data in (
    ("gzip", gzip.compress(lines)),
    ("bz2", bz2.compress(lines, 1)),
    ("xz", lzma.compress(lines)),
  ):
    *records, last = json_lines.read(data[: len(data) * 3 // 4])
    assert [record.row["n"] for record in records if record.row] == list(range(len(records)))
    assert last.row is None and last.reason == f"the file is truncated {name} from there on"
    assert len(records) > 1000 or name == "bz2", "more than half of it is there"
  *records, last = json_lines.read(gzip.compress(b'{"n": 1}\n') + b"no further member")
  assert [record.row for record in records] == [{"n": 1}] and "broken gzip" in last.reason
  *records, last = json_lines.read('{"n": 1}\n{"n": 2}'.encode("utf-16")[:-1])
  assert records[0].row == {"n": 1} and "utf-16" in last.reason


def test_values_are_bounded(monkeypatch):
  for module in (json_lines, json_values):
    monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1_000_000)
  data = json.dumps([{"n": 1}, {"n": ["b"] * 900_000, "more": {"n": 5}}, {"n": 2}]).encode()
  assert [row and row["n"] for row in rows_of(data)] == [1, None, 2]
  assert [record.reason for record in json_lines.read(b"x" * 5_000_000)] == [
    "the line is longer than 1,000,000 bytes"
  ]


def test_no_bytes_raise():
  rng = random.Random(0)
  for _ in range(500):
    data = bytearray(rng.choice(list(SHAPES.values())).encode())
    for _ in range(rng.randint(1, 4)):
      data[rng.randrange(len(data))] = rng.choice(b'{}[]",:\\\n\x00\xff a')
    list(json_lines.read(bytes(data)))
    packed = bytearray(rng.choice([gzip.compress, bz2.compress, lzma.compress])(bytes(data)))
    packed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
    list(json_lines.read(bytes(packed)))


def test_whatever_was_read_can_be_written():
  row = json_lines.parse(b'{"half": "\\ud83d", "line": "\\u2028\\u0085", "pair": "\\ud83d\\ude00"}')
  line = json_lines.dumps(row)
  assert json.loads(line.encode()) == row and list(json_lines.read(line.encode()))[0].row == row
  assert not json_lines.is_writable(row["half"]) and json_lines.is_writable(row["pair"])


def test_a_pipe_is_read():
  """A file that does not support seeking: a process substitution."""

  class Pipe(io.RawIOBase):
    def __init__(self):
      self.file = io.BytesIO(SHAPES["pretty"].encode())

    def read(self, size=-1):
      return self.file.read(size)

  assert [record.row for record in json_lines.read(Pipe())] == ROWS


# -------------------------------------------------------------------------------- who reads with it


def test_metrics_with_odd_separators_and_nan(tmp_path):
  path = tmp_path / progress.METRICS
  path.write_bytes(
    '{"step": 1, "what": "a\u2028b\u0085c"}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo'.encode()
  )
  assert [row["step"] for row in progress.read_metrics(str(tmp_path))] == [1, 2]


def test_the_pipelines_summary_reads_any_answer(tmp_path):
  passage = {"number": 3, "title": "t", "text": "x", "score": 1.0}
  rows = [
    {
      "question": "who\u2028?",
      "prediction": "a\u0085b",
      "answer": ["x"],
      "read_from": 3,
      "byte_span": [0, 1],
      "passages": [passage],
    }
  ] * 4
  path = tmp_path / "p.jsonl"
  path.write_text("".join(map(json_lines.dumps, rows)), encoding="utf-8")
  assert [found["answer"] for found in summary._answers(str(path), 2)] == ["a\u0085b"] * 2


QUESTIONS = [
  b'\xef\xbb\xbf{"question": "a\xe2\x80\xa8?", "answer": ["x", 3, "\\ud83d"]}\r',
  b'{"question": "what is \\ud83d?", "answer": ["x"]}',
  b'{"question": "b?", "answer": 7}',
  b"[1]",
  b'{"question": " "}',
]


def test_the_client_uses_the_good_lines(tmp_path, capfd):
  path = tmp_path / "q.jsonl"
  path.write_bytes(b"\n".join(QUESTIONS))
  assert client.read_questions(str(path)) == [("a\u2028?", ["x"]), ("b?", [])]
  assert capfd.readouterr().err.splitlines() == [
    f"{path}: 1 lines left out, {words}"
    for words in (
      f"{json_lines.HALF_A_PAIR} (first: line 2)",
      "the line is not an object (first: line 4)",
      "the question is empty (first: line 5)",
    )
  ]
  path.write_text("[1]\n")
  with pytest.raises(
    client.ClientError,
    match="has no question; wanted lines .*1 lines left out, the line is not an object",
  ):
    client.read_questions(str(path))


def test_the_benchmark_reads_them_too(tmp_path):
  path = tmp_path / "q.jsonl"
  path.write_bytes(b"\n".join(QUESTIONS[:1] + QUESTIONS[2:4]))
  assert len(model_server_load.requests_of(str(path))) == 2


@pytest.mark.parametrize("end", ["", ",", ",\n  ", "\n"])
def test_an_array_that_ends_between_two_elements_is_told(end):
  records = list(json_lines.read((json.dumps(ROWS)[:-1] + end).encode()))
  assert [record.row for record in records] == [*ROWS, None], records
  assert records[-1].reason == "the file is truncated array from there on", records[-1]


def nested(depth: int) -> bytes:
  return b'{"a":' * depth + b"1" + b"}" * depth


@pytest.mark.parametrize("depth", [101, 500, 900, 990, 1000, 100_000])
def test_what_is_nested_too_deep_is_rejected_at_every_depth(depth):
  """Python parses some of it but could not write it again; the limit is the same everywhere."""
  lists = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
  data = b"\n".join([nested(depth), lists, b'{"n": 1}'])
  first, second, good = json_lines.read(data)
  assert first.reason == second.reason == "the line is nested too deep" and good.row == {"n": 1}
  assert json_lines.parse(nested(100)) and first.text.startswith('{"a":')


def test_brackets_in_a_text_and_long_lists_are_not_deep():
  row = {"text": "[{" * 5000, "list": [[1]] * 5000}
  assert json_lines.parse(json.dumps(row).encode()) == row


@pytest.mark.parametrize("number", ["9" * 4301, "1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_that_are_none(number):
  with pytest.raises(json_lines.BadRecord, match="number|not JSON"):
    json_lines.parse(b'{"n": [' + number.encode() + b"]}")


def test_keys_are_shown_short_and_harmless():
  row = {"a": 1, "\x1b[31m": 1, "k" * 10_000: 1, **{str(n): 1 for n in range(99)}}
  told = json_lines.keys_of(row)
  assert (
    told.startswith("a, \\x1b[31m, kkk") and len(told) < 500 and json_lines.keys_of({}) == "none"
  )
