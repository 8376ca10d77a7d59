"""Faults in questions files.

They are counted, reported, and never fatal as long as one line is usable.
"""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from realm_tf import split_questions
from realm_tf.corpus import passages
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import questions
from realm_tf.examples.open_qa import QaExamples
from realm_tf.examples.questions import Question
from realm_tf.models.open_qa import OpenQaModel
from realm_tf.models.span_reader import SpanReader
from realm_tf.retrieval import bm25, dense
from realm_tf.storage import artifacts
from tests.processes import REPOSITORY

LONG = "where is the long question about Armos? " * 250  # 10,000 characters


def write(path, *lines) -> str:
  path.write_bytes(
    b"".join(
      (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )
  )
  return str(path)


def test_bad_lines_are_counted_by_reason(tmp_path, capfd):
  assert len(LONG) == 10_000
  path = write(
    tmp_path / "q.jsonl",
    {"question": "who?", "answer": ["a", "", " "]},  # 1
    {"question": "", "answer": ["a"]},
    {"question": "  \t", "answer": ["a"]},
    {"question": 7, "answer": ["a"]},  # 4
    {"answer": ["a"]},
    {"question": ["who?"], "answer": ["a"]},
    b'{"question": "wh',  # 7
    b'{"question": "\xff\xfe", "answer": ["a"]}',
    b"[1, 2]",  # 9
    b'"text"',
    {"question": "who?", "answer": []},  # 11
    {"question": "who?", "answer": [" "]},
    {"question": "who?"},
    {"question": "who?", "answer": [1]},  # 14
    {"question": "who?", "answer": {"a": 1}},
    {"question": "who?", "answer": None},
    b"",
    b"   ",
    {"question": LONG, "answer": "one"},  # 19
    {"question": "wer ist Rön? 東", "answer": ["Rön"], "title": "more"},
  )
  rows = questions.read_questions(path)
  told = capfd.readouterr().err
  assert rows == [
    Question("who?", ["a"]),
    Question(LONG, ["one"]),
    Question("wer ist Rön? 東", ["Rön"]),
  ]
  assert told.splitlines() == [
    f"{path}: {words}"
    for words in (
      "2 lines left out, the question is empty (first: line 2)",
      "3 lines left out, the question is not text (first: line 4)",
      "2 lines left out, the line is not JSON in UTF-8 (first: line 7)",
      "2 lines left out, the line is not an object (first: line 9)",
      "3 lines left out, there is no answer (first: line 11)",
      "3 lines left out, the answer is not a list of text (first: line 14)",
    )
  ]


def test_odd_separators_encodings_and_arrays(tmp_path, capfd):
  rows = [
    {"question": f"what is{mark}{n}", "answer": [f"a{mark}b"], "title": f"t{n % 9}"}
    for n, mark in enumerate("\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e" * 5)
  ]
  lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
  wanted = [Question(row["question"], row["answer"]) for row in rows]
  for name, data in (
    ("bom", lines.encode("utf-8-sig")),
    ("utf16", lines.encode("utf-16")),
    ("gz", gzip.compress(lines.encode())),
    ("array", json.dumps(rows, indent=1).encode()),
  ):
    (tmp_path / name).write_bytes(data)
    assert questions.read_questions(str(tmp_path / name)) == wanted, name
    parts = [str(tmp_path / part) for part in ("train.jsonl", "test.jsonl")]
    assert sum(
      split_questions.split_by_title(
        str(tmp_path / name), train=parts[0], test=parts[1], test_share=0.5
      ).values()
    ) == len(rows)
    assert sorted(q.text for part in parts for q in questions.read_questions(part)) == sorted(
      row["question"] for row in rows
    )
  assert not capfd.readouterr().err


def test_bad_lines_cost_themselves_and_the_last_line_says_so(tmp_path):
  path = write(
    tmp_path / "q.jsonl",
    b'{"question": "half \\ud800", "answer": ["a"]}',
    b'{"question": "n", "answer": ["\\udc00"]}',
    b'{"question": NaN, "answer": ["a"]}',
    b'{"question": "a", "question": "b", "answer": ["a"]}',
    b'{"question": "x", "answer": ["a"], "n": ' + b"1" * 5000 + b"}",
    b'{"question": "x", "n": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    {"question": "good", "answer": ["a"], "title": "t"},
  )
  code = (
    "from realm_tf.examples import questions; "
    f"print(len(questions.read_questions({path!r})), 'questions'); print('done')"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
  )
  assert done.stdout == "1 questions\ndone\n" and "Traceback" not in done.stderr
  lines = done.stderr.strip().splitlines()
  assert (
    lines[0]
    == f"{path}: 2 lines left out, a string in the line has half of a surrogate pair (\\ud800) "
    "(first: line 1)"
  )
  assert len(lines) == 6 and lines[-1].startswith(
    f"WARNING: 6 of 7 records of {path} were left out: 2 lines left out, a string"
  )


def test_answers_may_be_expressions(tmp_path, capfd):
  path = write(
    tmp_path / "q.jsonl",
    {"question": "a?", "answer": [r"19\d\d|Sept?(ember)?"], "regex": True},
    {"question": "b?", "answer": ["(a"]},
    {"question": "c?", "answer": ["x", "(a"], "regex": True},
    {"question": "d?", "answer": ["*"], "regex": True},
    {"question": "e?", "answer": ["x"], "regex": "yes"},
    {"question": "f?", "answer": ["x"], "regex": False},
  )
  rows, told = questions.read_questions(path), capfd.readouterr().err
  assert rows == [
    Question("a?", [r"19\d\d|Sept?(ember)?"], regex=True),
    Question("b?", ["(a"]),
    Question("f?", ["x"]),
  ]
  assert told.splitlines() == [
    f"{path}: 1 lines left out, {words}"
    for words in (
      "the answer is not a regular expression: missing ), unterminated subpattern (first: line 3)",
      "the answer is not a regular expression: nothing to repeat (first: line 4)",
      "regex is neither true nor false (first: line 5)",
    )
  ]


def test_answers_may_be_unknown(tmp_path):
  path = write(tmp_path / "q.jsonl", {"question": "who?"}, {"question": "what?", "answer": ["x"]})
  assert [row.answers for row in questions.read_questions(path, need_answers=False)] == [[], ["x"]]


@pytest.mark.parametrize("lines", [[], [b"", b"  "], [b"{"], [{"question": "", "answer": ["a"]}]])
def test_none_usable(lines, tmp_path):
  path = write(tmp_path / "q.jsonl", *lines)
  with pytest.raises(
    artifacts.UserError, match='q.jsonl.* has no usable line; wanted lines of {"question"'
  ):
    questions.read_questions(path)


def test_missing_file(tmp_path):
  for read, form in ((questions.read_questions, '"question"'), (questions.read_clozes, '"span"')):
    with pytest.raises(
      artifacts.UserError, match=f"no file .*nothing.jsonl.*; wanted lines of .*{form}"
    ):
      read(str(tmp_path / "nothing.jsonl"))


def test_clozes(tmp_path, capfd):
  text = "Der Rön wohnt in Köln."
  path = write(
    tmp_path / "c.jsonl",
    {"text": text, "span": [17, 21], "answer": ["Köln"]},
    {"text": text, "span": [17, 99], "answer": ["x"]},
    {"text": text, "span": [5, 5], "answer": ["x"]},
    {"text": text, "span": [-1, 5], "answer": ["x"]},
    {"text": text, "answer": ["x"]},
    {"text": text, "span": ["a", "b"], "answer": ["x"]},
    {"text": text, "span": [0.5, 1.5], "answer": ["x"]},
    {"text": text, "span": [1, 2]},
    {"text": text, "span": [1, 2], "answer": [3]},
    b"\xff",
  )
  (row,) = questions.read_clozes(path)
  told = capfd.readouterr().err
  # in bytes, although the file counts characters
  assert row.text.encode()[slice(*row.span)].decode() == "Köln"
  assert told.splitlines() == [
    f"{path}: {words}"
    for words in (
      "3 lines left out, the span is not inside the text (first: line 2)",
      "2 lines left out, text, span or answer is missing (first: line 5)",
      "3 lines left out, the span is not two integers, or the answer not a list of text "
      "(first: line 6)",
      "1 lines left out, the line is not JSON in UTF-8 (first: line 10)",
    )
  ]


def test_masked_clozes_mask_just_the_answer(toy):
  tokenizer = Tokenizer(toy.config().passages)
  for row in questions.read_clozes(toy.path("corpus/clozes.test.jsonl")):
    masked = questions.masked_clozes([row], tokenizer=tokenizer, max_masks=9)
    left, answer, right = (
      part.decode()
      for part in np.split(np.frombuffer(row.text.encode(), "S1"), row.span)
      for part in [part.tobytes()]
    )
    ids = tokenizer([left, answer, right]).to_list()
    assert masked.ids[0].tolist() == ids[0] + [tokenizer.mask_id] * len(ids[1]) + ids[2], row
    assert masked.targets[0][masked.target_mask[0] > 0].tolist() == ids[1]
    assert answer in row.answers


def test_split_by_title(tmp_path):
  lines = [{"question": f"q{n}", "answer": ["a"], "title": f"title {n % 40}"} for n in range(200)]
  source, parts = (
    write(tmp_path / "q.jsonl", *lines),
    [str(tmp_path / "out" / name) for name in ("train.jsonl", "test.jsonl")],
  )
  counts = split_questions.split_by_title(source, train=parts[0], test=parts[1], test_share=0.3)
  got = [[json.loads(line) for line in open(part)] for part in parts]
  titles = [{row["title"] for row in rows} for rows in got]
  assert counts == {parts[0]: len(got[0]), parts[1]: len(got[1])} and not titles[0] & titles[1]
  assert sorted(map(str, got[0] + got[1])) == sorted(map(str, lines)) and 4 <= len(titles[1]) <= 20
  split_questions.split_by_title(
    write(tmp_path / "fewer.jsonl", *lines[:120]), train=parts[0], test=parts[1], test_share=0.3
  )
  assert {json.loads(line)["title"] for line in open(parts[1])} == titles[1], (
    "a title's part depends on nothing else"
  )
  with pytest.raises(artifacts.UserError, match=":2 has no title"):
    split_questions.split_by_title(
      write(tmp_path / "none.jsonl", lines[0], {"question": "q"}), train=parts[0], test=parts[1]
    )
  with pytest.raises(artifacts.UserError, match="too few titles to split"):
    one = write(tmp_path / "one.jsonl", lines[0])
    split_questions.split_by_title(one, train=parts[0], test=parts[1])


@pytest.fixture(scope="module")
def first_index(toy) -> dense.IndexedRetriever:
  return dense.load(
    toy.path("ict/indexes/00000000"),
    table=passages.load(toy.config().passages),
    snapshot=toy.path("ict/snapshots/00000000"),
  )


def test_long_and_strange_questions_are_retrieved_for_and_answered(toy, first_index, capfd):
  """Goes through packing, both searchers, reading and the choice of an answer."""
  from realm_tf.examples import answering
  from realm_tf.retrieval import index

  config = toy.config()
  table, tokenizer = passages.load(config.passages), Tokenizer(config.passages)
  rows = [
    Question(text, ["Lorwash"])
    for text in (LONG, "x" * 10_000, "?", "東京はどこ", "\u0000\u200b", "where is Armos?")
  ]
  query_ids = questions.packed_questions(rows, tokenizer=tokenizer, length=24)
  assert (
    query_ids.shape == (6, 24)
    and (query_ids[0] != 0).all()
    and query_ids[0, -1] == tokenizer.sep_id
  )
  # cut, otherwise unchanged
  np.testing.assert_array_equal(
    query_ids[0, :-1],
    questions.packed_questions([Question(LONG[:400], [])], tokenizer=tokenizer, length=24)[0, :-1],
  )
  architecture = first_index.retriever.get_config()["architecture"]
  reader = SpanReader(architecture=architecture, query_length=24, length=64, max_span=5, span_dim=8)
  sparse = bm25.Bm25Searcher(table)
  for name, search, embeddings in (
    (
      "dense",
      lambda ids, texts: first_index.search(ids, 8),
      index.read_embeddings(first_index.folder, num_rows=len(table)),
    ),
    ("bm25", lambda ids, texts: sparse.search(texts, 8), None),
  ):
    data = QaExamples(
      rows,
      table,
      tokenizer=tokenizer,
      search=search,
      embeddings=embeddings,
      reader=reader,
      num_read=2,
    )
    cut = sum(len(tokenizer([row.text])[0]) > 22 for row in rows)
    told = f"WARNING: {cut} of 6 questions are longer than 22 word pieces"
    assert cut and told in capfd.readouterr().err
    inputs, numbers = data.inputs(np.arange(6))
    model = OpenQaModel(
      None if embeddings is None else first_index.retriever.query_tower,
      reader,
      sep_id=tokenizer.sep_id,
    )
    outputs = model.predict_on_batch(inputs)
    assert np.isfinite(outputs["span_scores"]).all() and numbers.shape == (6, 8)
    for i in range(6):
      answer = answering.best_answer(
        outputs["span_scores"][i],
        outputs["span_mask"][i],
        inputs["reader_ids"][i],
        inputs["reader_segments"][i],
        numbers[i],
        outputs["beam_scores"][i],
        table,
        continues=tokenizer.continues,
      )
      assert answer.text and answer.read_from in numbers[i, :2], f"{name}: {rows[i].text[:20]!r}"
      assert (
        table.texts[answer.read_from].encode()[slice(*answer.byte_span)].decode() == answer.text
      )


HOSTILE_EXPRESSIONS = {
  "parentheses": "(" * 1000 + ")" * 1000,
  "open parentheses": "(" * 3000,
  "repeated repetition": "((((a{1000}){1000}){1000}){1000}){1000}",
  "large repetition": "a{99999999999}",
  "many digits": "a{" + "9" * 5000 + "}",
  "long": "a" * 5000,
  "groups": "(?:" * 900 + "a" + ")?" * 900,
}


@pytest.mark.parametrize("pattern", HOSTILE_EXPRESSIONS.values(), ids=HOSTILE_EXPRESSIONS)
def test_an_expression_that_takes_everything_costs_its_question(pattern, tmp_path, capfd):
  path = write(
    tmp_path / "q.jsonl",
    {"question": "bad", "answer": [pattern], "regex": True},
    {"question": "good", "answer": [r"19\d{2}"], "regex": True},
  )
  (kept,) = questions.read_questions(path)
  assert kept.text == "good"
  told = capfd.readouterr().err
  assert "1 lines left out, the answer is " in told and "(first: line 1)" in told
  assert "regular expression" in told and len(told) < 500


def test_nested_records_and_long_numbers_cost_themselves(tmp_path, capfd):
  path = write(
    tmp_path / "q.jsonl",
    b'{"question": "x", "answer": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    b'{"question": "x", "answer": ["y"], "more": ' + b"9" * 4301 + b"}",
    {"question": "good", "answer": ["y"]},
  )
  (kept,) = questions.read_questions(path)
  assert kept.text == "good"
  told = capfd.readouterr().err
  assert "the line is nested too deep (first: line 1)" in told
  assert "a number in the line is too long (first: line 2)" in told


def test_names_of_keys_do_not_reach_the_terminal(tmp_path):
  path = write(tmp_path / "q.jsonl", {"\x1b]0;title\x07" + "k" * 10_000: 1})
  with pytest.raises(artifacts.UserError, match="has no usable line") as caught:
    questions.read_questions(path)
  assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000
