"""Small files in the exact formats of published question sets.

ORQA's split is tested with questions whose part is known.
"""

import bz2
import gzip
import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from realm_tf import prepare_questions
from realm_tf.examples import question_datasets, questions
from realm_tf.examples.questions import Question
from realm_tf.storage import artifacts
from tests.processes import REPOSITORY

HTML = (
  "<html><body><p>Wilhelm R&ouml;ntgen won the <b title='a > b'>first</b> prize "
  "in 1901<sup>[1]</sup> in Köln &amp; Bonn.</p></body></html>"
)


def write(path, *rows, mode: str = "lines") -> str:
  """Writes rows as lines of JSON, or one JSON value, compressed as the name says."""
  text = (
    "".join(json.dumps(row) + "\n" for row in rows)
    if mode == "lines"
    else json.dumps(*rows, indent=1 if mode == "pretty" else None)
  )
  opened = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
  with opened(path, "wt", encoding="utf-8") as file:
    file.write(text)
  return str(path)


def read(folder, name: str) -> list[dict]:
  with open(os.path.join(folder, f"{name}.jsonl"), encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def prepared(name: str, inputs: str, folder, **what) -> list[dict]:
  """Returns all resulting questions, ordered by their text."""
  prepare_questions.prepare(name, inputs, str(folder), **what)
  parts = ("test",) if what.get("split") == "test" else ("train", "dev")
  return sorted(
    (row for part in parts for row in read(folder, part)), key=lambda row: row["question"]
  )


# -------------------------------------------------------------------------------- Natural Questions


def full(question: str, *annotations) -> dict:
  """A row of nq-train-*.jsonl.gz or nq-dev-*.jsonl.gz.

  Short answers are given as pieces of HTML and numbers of tokens.
  """

  def short(piece: str, num_tokens: int) -> dict:
    start = HTML.encode().index(piece.encode())
    return {
      "start_token": 7,
      "end_token": 7 + num_tokens,
      "start_byte": start,
      "end_byte": start + len(piece.encode()),
    }

  return {
    "question_text": question,
    "question_tokens": question.split(),
    "document_title": "X-ray",
    "document_url": "https://x",
    "example_id": 1,
    "document_html": HTML,
    "document_tokens": [{"token": "<P>", "start_byte": 12, "end_byte": 15, "html_token": True}],
    "long_answer_candidates": [],
    "annotations": [
      {
        "annotation_id": at,
        "long_answer": {
          "start_token": -1,
          "end_token": -1,
          "start_byte": -1,
          "end_byte": -1,
          "candidate_index": -1,
        },
        "yes_no_answer": "NONE",
        "short_answers": [short(*answer) for answer in answers],
      }
      for at, answers in enumerate(annotations)
    ],
  }


def test_natural_questions_as_published(tmp_path):
  rows = [
    full("a one annotator, two answers", [("R&ouml;ntgen", 1), ("1901", 1)]),
    full(
      "b any of five annotators",
      [],
      [("1901", 1)],
      [("1901", 1)],
      [],
      [("<b title='a > b'>first</b> prize", 5)],
    ),
    full("c six tokens are too many", [("<b title='a > b'>first</b> prize in 1901", 6)]),
    full(
      "d the short one is kept",
      [("<b title='a > b'>first</b> prize in 1901", 6), ("Köln &amp; Bonn", 3)],
    ),
    full("e none", [], []),
    {**full("f no annotations", []), "annotations": None},
    {**full("g half a pair", [("a", 1)]), "document_html": "\ud800"},
  ]
  got = prepared("nq", write(tmp_path / "nq-train-00.jsonl.gz", *rows), tmp_path / "Q")
  assert got == [
    {"question": "a one annotator, two answers", "answer": ["Röntgen", "1901"]},
    {"question": "b any of five annotators", "answer": ["1901", "first prize"]},
    {"question": "d the short one is kept", "answer": ["Köln & Bonn"]},
  ]
  rejected = read(tmp_path / "Q", "rejected.train")
  assert [(row["question"][0], row["record"]) for row in rejected] == [
    ("c", 3),
    ("e", 5),
    ("f", 6),
    ("g", 7),
  ]
  assert [row["reason"].partition(" (")[0] for row in rejected] == [
    "every short answer has over 5 tokens",
    "there is no short answer",
    *["a field is missing or of the wrong type"] * 2,
  ]


def test_natural_questions_simplified(tmp_path):
  text = "X - ray <P> Wilhelm Röntgen won the first prize , in 1901 </P>"

  def row(question: str, *spans) -> dict:
    return {
      "question_text": question,
      "document_text": text,
      "document_url": "https://x",
      "example_id": 5,
      "long_answer_candidates": [],
      "annotations": [
        {
          "annotation_id": 1,
          "yes_no_answer": "NONE",
          "long_answer": {"start_token": 3, "candidate_index": 0, "end_token": 14},
          "short_answers": [{"start_token": start, "end_token": end} for start, end in spans],
        }
      ],
    }

  got = prepared(
    "nq",
    write(
      tmp_path / "simplified-nq-train.jsonl",
      row("a", (4, 6), (12, 14)),
      row("b", (3, 9)),
      row("c", (8, 12)),
    ),
    tmp_path / "Q",
    split="test",
  )
  assert got == [
    {"question": "a", "answer": ["Wilhelm Röntgen", "1901"]},
    {"question": "c", "answer": ["first prize , in"]},
  ]
  assert (
    not os.path.exists(tmp_path / "Q/train.jsonl")
    and len(read(tmp_path / "Q", "rejected.test")) == 1
  )
  only_tokens = {
    **row("d", (4, 6)),
    "document_tokens": [
      {"token": token, "html_token": token.startswith("<")}
      for token in text.replace("Röntgen", "<B>").split()
    ],
  }
  del only_tokens["document_text"]
  assert prepared("nq", write(tmp_path / "t.jsonl", only_tokens), tmp_path / "T", split="test")[0][
    "answer"
  ] == ["Wilhelm"]


# --------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize(
  "name, mode",
  [
    ("webquestions.examples.train.json.bz2", "one line"),
    ("webquestions.examples.train.json", "pretty"),
  ],
)
def test_webquestions(name, mode, tmp_path):
  rows = [
    {
      "url": "http://www.freebase.com/view/en/jamaica",
      "utterance": "what does jamaican people speak?",
      "targetValue": '(list (description "Jamaican Creole English Language") '
      '(description "Jamaican English"))',
    },
    {
      "url": "http://x",
      "utterance": "which country?",
      "targetValue": "(list (description Jamaica) (description 1962) (description Jamaica))",
    },
    {
      "url": "http://x",
      "utterance": "what film?",
      "targetValue": '(list (description "The \\"Big\\" One (1997)") (description "Padmé"))',
    },
    {"url": "http://x", "utterance": "nothing?", "targetValue": "(list)"},
    {"url": "http://x", "utterance": "no target?"},
    {"utterance": "", "targetValue": "(list (description x))"},
  ]
  got = prepared("webquestions", write(tmp_path / name, rows, mode=mode), tmp_path / "Q")
  assert got == [
    {
      "question": "what does jamaican people speak?",
      "answer": ["Jamaican Creole English Language", "Jamaican English"],
    },
    {"question": "what film?", "answer": ['The "Big" One (1997)', "Padmé"]},
    {"question": "which country?", "answer": ["Jamaica", "1962"]},
  ]
  reasons = Counter(row["reason"] for row in read(tmp_path / "Q", "rejected.train"))
  assert reasons == {
    "there is no answer": 1,
    "a field is missing or of the wrong type (KeyError: 'targetValue')": 1,
    "the question is empty, or not text": 1,
  }


def test_curatedtrec(tmp_path, capfd):
  lines = [
    "1669\tfactoid\tHow tall is Mount McKinley?\t"
    "20\\s?,?\\s?(32|40)0\\s?-?\\s?f(ee|oo)t|6,194-meter",
    '2383\tfactoid\tWho starred in "Jaws"?\tRoy|Scheider',
    "2115\tfactoid\tWhich province?\tQu[eé]bec",
    "9\tfactoid\tbroken?\t(a|b",
    "10\tfactoid\tshort?",
    "11\tfactoid\t\tx",
  ]
  path = tmp_path / "large2180-train.tsv"
  path.write_bytes("\r\n".join(lines).encode() + b"\n\xff\xfe\t\n")
  got = prepared("curatedtrec", str(path), tmp_path / "Q")
  rejected = read(tmp_path / "Q", "rejected.train")
  assert got == [
    {
      "question": "How tall is Mount McKinley?",
      "answer": ["20\\s?,?\\s?(32|40)0\\s?-?\\s?f(ee|oo)t|6,194-meter"],
      "regex": True,
    },
    {"question": "Which province?", "answer": ["Qu[eé]bec"], "regex": True},
    {"question": 'Who starred in "Jaws"?', "answer": ["Roy|Scheider"], "regex": True},
  ]
  assert [row["reason"] for row in rejected] == [
    "the answer is not a regular expression: missing ), unterminated subpattern",
    "the line has 3 columns, wanted 4",
    "the question is empty, or not text",
    "the line is neither JSON nor tab-separated columns in UTF-8",
  ]
  assert [row["record"] for row in rejected] == [4, 5, 6, 7]
  read_back = [
    row
    for part in ("train", "dev")
    if read(tmp_path / "Q", part)
    for row in questions.read_questions(str(tmp_path / f"Q/{part}.jsonl"))
  ]
  assert Question("Which province?", ["Qu[eé]bec"], regex=True) in read_back and len(read_back) == 3
  assert not capfd.readouterr().err


def test_squad(tmp_path):
  def question(text, *answers, **more):
    return {
      "id": text,
      "question": text,
      "answers": [{"text": answer, "answer_start": 0} for answer in answers],
      **more,
    }

  data = {
    "version": "v2.0",
    "data": [
      {
        "title": "Super_Bowl_50",
        "paragraphs": [
          {
            "context": "c",
            "qas": [
              question("q1", "Denver", "Denver", "Broncos", is_impossible=False),
              question("q2", is_impossible=True, plausible_answers=[]),
            ],
          }
        ],
      },
      {
        "title": "Warsaw",
        "paragraphs": [
          {"context": "c", "qas": [question("q3", "1")]},
          {"context": "d", "qas": [question("q4")]},
        ],
      },
      *(
        {"title": title, "paragraphs": [{"context": "c", "qas": [question("q5", "1")]}]}
        for title in (50, 5.5, ["Warsaw"], {"a": 1}, True)
      ),
    ],
  }
  for mode in ("one line", "pretty"):
    got = prepared(
      "squad", write(tmp_path / "dev-v1.1.json", data, mode=mode), tmp_path / "Q", split="test"
    )
    assert got == [
      {"question": "q1", "answer": ["Denver", "Broncos"], "title": "Super_Bowl_50"},
      {"question": "q3", "answer": ["1"], "title": "Warsaw"},
    ]
    assert [row["reason"] for row in read(tmp_path / "Q", "rejected.test")] == [
      "it cannot be answered",
      "there is no answer",
      *["the title is not text"] * 5,
    ]


@pytest.mark.parametrize("name", list(question_datasets.DATASETS))
def test_plain_lines_and_lists(name, tmp_path):
  """NQ-open's lines and YodaQA's JSON are read for every dataset."""
  lines = [
    {"question": "a?", "answer": ["x", "x", " "]},
    {"question": "b?", "answer": "y", "title": "t"},
    {"question": "c?", "answer": [1]},
    {"answer": ["x"]},
  ]
  more = {"regex": True} if name == "curatedtrec" else {}
  wanted = [
    {"question": "a?", "answer": ["x"], **more},
    {"question": "b?", "answer": ["y"], "title": "t", **more},
  ]
  assert prepared(name, write(tmp_path / "l.jsonl", *lines), tmp_path / "L") == wanted
  listed = [
    {"qId": "wqr000000", "qText": "a?", "answers": ["x"]},
    {"qId": "1", "qText": "b?", "answers": ["y"], "title": "t"},
  ]
  assert prepared(name, write(tmp_path / "m.json", listed, mode="pretty"), tmp_path / "M") == wanted


def test_hugging_faces_layouts(tmp_path):
  squad = [
    {
      "id": str(n),
      "title": "Mill",
      "context": "c",
      "question": f"q{n}",
      "answers": {"text": answers, "answer_start": [0] * len(answers)},
    }
    for n, answers in enumerate((["Ada", "Ada", "Bob"], [], ["Ost"]))
  ]
  wanted = [
    {"question": "q0", "answer": ["Ada", "Bob"], "title": "Mill"},
    {"question": "q2", "answer": ["Ost"], "title": "Mill"},
  ]
  assert prepared("squad", write(tmp_path / "s.jsonl", *squad), tmp_path / "S") == wanted
  assert (
    prepared(
      "squad",
      write(tmp_path / "s.json", {"version": "2", "data": squad}, mode="pretty"),
      tmp_path / "S2",
    )
    == wanted
  )

  def natural(text: str, *annotators) -> dict:
    short = [
      {
        "start_token": [start for start, _, _ in answers],
        "end_token": [end for _, end, _ in answers],
        "start_byte": [0] * len(answers),
        "end_byte": [0] * len(answers),
        "text": [said for _, _, said in answers],
      }
      for answers in annotators
    ]
    return {
      "id": "1",
      "document": {"title": "X", "tokens": {"token": ["a"], "is_html": [False]}},
      "question": {"text": text, "tokens": text.split()},
      "long_answer_candidates": {"start_token": [1]},
      "annotations": {
        "id": ["7"] * len(short),
        "long_answer": [{"start_token": 1}] * len(short),
        "short_answers": short,
        "yes_no_answer": [-1] * len(short),
      },
    }

  rows = [
    natural("q0", [(0, 1, "Ada")], [], [(2, 4, "the Ost"), (5, 11, "six tokens are far too many")]),
    natural("q1", []),
    natural("q2", [(0, 6, "six tokens")]),
  ]
  listed = natural("q3", [(0, 1, "x")])
  answers = listed["annotations"]["short_answers"][0]
  listed["annotations"] = [
    {
      "short_answers": [
        dict(zip(answers, values, strict=True)) for values in zip(*answers.values(), strict=True)
      ]
    }
  ]
  assert prepared("nq", write(tmp_path / "n.jsonl.gz", *rows, listed), tmp_path / "N") == [
    {"question": "q0", "answer": ["Ada", "the Ost"]},
    {"question": "q3", "answer": ["x"]},
  ]
  assert [row["reason"] for row in read(tmp_path / "N", "rejected.train")] == [
    "there is no short answer",
    "every short answer has over 5 tokens",
  ]


def test_dprs_lists(tmp_path):
  rows = [
    {
      "dataset": "nq_train",
      "question": "q0",
      "answers": ["Ada"],
      "positive_ctxs": [{"title": "t", "text": "x"}],
    }
  ]
  assert prepared("nq", write(tmp_path / "d.json", rows, mode="pretty"), tmp_path / "D") == [
    {"question": "q0", "answer": ["Ada"]}
  ]
  path = tmp_path / "nq-test.csv"
  path.write_text(
    "who was it\t['Ada', \"Ada's\"]\n"
    '"who said ""no"""\t"[""Bob""]"\n'
    'broken\t[1\nbroken\t__import__("os")\n'
  )
  assert prepared("nq", str(path), tmp_path / "E") == [
    {"question": 'who said "no"', "answer": ["Bob"]},
    {"question": "who was it", "answer": ["Ada", "Ada's"]},
  ]
  assert len(read(tmp_path / "E", "rejected.train")) == 2


@pytest.mark.parametrize(
  "value, words",
  [
    (
      {"Data": [{"Question": "q", "Answer": {"Value": "x"}}], "Domain": "Web"},
      "there is no question among its keys: Question, Answer",
    ),
    (
      [{"question": "q", "answer": {"value": "x", "aliases": ["x"]}}],
      "the answer is an object with the keys value, aliases",
    ),
    (
      [{"id": 1, "question": "q", "choices": ["x"]}],
      "there is no answer among its keys: id, question, choices",
    ),
    ([{"question": ["q"], "answers": ["x"]}], "the question is empty, or not text"),
    (
      {"data": [{"title": "t", "paragraphs": [{"context": "c"}]}]},
      "there is no question among its keys: paragraphs",
    ),
  ],
)
def test_other_shapes_get_a_line_that_says_what_is_wanted(value, words, tmp_path):
  for name in ("nq", "squad"):
    with pytest.raises(artifacts.UserError, match=words) as caught:
      prepare_questions.prepare(
        name, write(tmp_path / "t.json", value, mode="pretty"), str(tmp_path / "Q")
      )
    assert 'lines or a list of {"question": str, "answer": [str, ..]}' in str(caught.value)
    assert f"first: record 1 of {tmp_path}/t.json" in str(caught.value)


def test_bad_records_cost_themselves_and_can_be_written(tmp_path):
  path = tmp_path / "q[1].jsonl"
  path.write_bytes(
    b"\n".join(
      [
        b'{"question": "half \\ud800", "answer": ["a"]}',
        b'{"question": "n", "answer": [NaN]}',
        b'{"question": "\xff", "answer": ["a"]}',
        b'{"question": "x", "n": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        b"3",
        '{"question": "good\u2028", "answer": ["a"]}'.encode(),
      ]
    )
  )
  table = prepare_questions.prepare("nq", str(path), str(tmp_path / "Q"), split="test")
  assert read(tmp_path / "Q", "test") == [{"question": "good\u2028", "answer": ["a"]}]
  assert [row["record"] for row in read(tmp_path / "Q", "rejected.test")] == [1, 2, 3, 4, 5]
  assert (
    table.splitlines()[-1].startswith("WARNING: 5 of 6 records were rejected: ")
    and f"first: record 1 of {path}" in table
  )


@pytest.mark.parametrize(
  "rows", [b'{"question": "q%d", "answer": ["a"]}\n', b"q%d\t['a']\n"], ids=["JSON", "columns"]
)
def test_what_is_whole_in_a_file_that_was_cut_off_is_used(rows, tmp_path):
  path = tmp_path / "q.gz"
  path.write_bytes(gzip.compress(b"".join(rows % number for number in range(3000)))[:-2000])
  table = prepare_questions.prepare("nq", str(path), str(tmp_path / "Q"), split="test")
  kept = read(tmp_path / "Q", "test")
  assert kept == [{"question": f"q{number}", "answer": ["a"]} for number in range(len(kept))]
  assert 100 < len(kept) < 3000 and "rejected: the file is truncated gzip from there on" in table
  assert read(tmp_path / "Q", "rejected.test")[0]["record"] == len(kept) + 1
  path.write_bytes(gzip.compress(rows % 1)[:12])
  with pytest.raises(artifacts.UserError, match="no usable question.*the file is truncated gzip"):
    prepare_questions.prepare("nq", str(path), str(tmp_path / "E"))


# ----------------------------------------------------------------------------- split, counts, words


def test_split_is_orqas():
  """Uses questions of TriviaQA, which ORQA split by the same rule; their parts are published."""
  dev = [
    "The VS-300 was a type of what?",
    "Who wrote The Turn Of The Screw in the 19th century and The Ambassadors in the 20th?",
    "Name the artist and the title of this 1978 classic that remains popular today: "
    "We were at the beach Everybody had matching towels "
    "Somebody went under a dock And there they saw a rock It wasnt a rock",
  ]
  train = [
    "Who was President when the first Peanuts cartoon was published?",
    "Which was the first European country to abolish capital punishment?",
    "According to the Bart Simpsons TV ad, Nobody better lay a finger on my what??",
  ]
  got = prepare_questions.is_dev([*dev, *train])
  share = sum(prepare_questions.is_dev([f"question {number}" for number in range(10_000)])) / 10_000
  assert got == [True] * 3 + [False] * 3 and abs(share - 0.1) < 0.01


def test_command_reports_counts(tmp_path):
  rows = [{"question": f"question {number}", "answer": ["x"]} for number in range(1200)]
  for at in range(2):
    write(
      tmp_path / f"nq-{at}.jsonl.gz",
      *rows[at * 600 : (at + 1) * 600],
      {"question": f"bad {at}", "answer": []},
    )

  def run(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "realm_tf.prepare_questions", *arguments],
      cwd=REPOSITORY,
      capture_output=True,
      text=True,
    )

  done = run("--dataset=nq", f"--input={tmp_path}/nq-*.gz", f"--output={tmp_path}/Q")
  counts = {row.split("  ")[0].strip(): row.split()[-2:] for row in done.stdout.splitlines()}
  train, dev = (read(tmp_path / "Q", part) for part in ("train", "dev"))
  assert (
    counts.get("train") == [f"{len(train):,}", "79,168"]
    and counts.get("dev") == [str(len(dev)), "8,757"]
    and len(train) + len(dev) == 1200
  ), done.stderr
  assert counts["rejected: there is no answer"][-1] == "2" and 60 < len(dev) < 180
  assert [row["question"] for row in train] == [row["question"] for row in rows if row in train], (
    "in their order"
  )
  done = run("--dataset=nq", f"--input={tmp_path}/none*", f"--output={tmp_path}/R")
  assert (
    done.returncode == 1 and "UserError: no file" in done.stderr and "Traceback" not in done.stderr
  ), done.stderr
  for name, value, words in (
    ("webquestions", [1, 2], "has no usable question of webquestions: the line is not an object"),
    ("squad", {"a": 1}, "has no usable question of squad: there is no question among its keys: a"),
  ):
    with pytest.raises(artifacts.UserError, match=words):
      prepare_questions.prepare(
        name, write(tmp_path / f"{name}.json", value, mode="pretty"), str(tmp_path / "R")
      )


def test_first_and_empty_lines(tmp_path):
  path = tmp_path / "q.jsonl"
  path.write_bytes(
    b"\xef\xbb\xbf" + b'{"question": "a?", "answer": ["x"]}\n\n{"question": "b?", "answer": ["y"]}'
  )
  assert [row["question"] for row in prepared("nq", str(path), tmp_path / "Q")] == ["a?", "b?"]
  (tmp_path / "empty.jsonl").write_text("")
  with pytest.raises(artifacts.UserError, match="no usable question of nq: it is empty"):
    prepare_questions.prepare("nq", str(tmp_path / "empty.jsonl"), str(tmp_path / "E"))


DATA = os.path.join(REPOSITORY, "..", "shared", "data", "qa")


@pytest.mark.skipif(not os.path.isdir(DATA), reason="no real questions here")
@pytest.mark.parametrize(
  "name, total, dev", [("webquestions", 2834, 279), ("curatedtrec", 1704, 155)]
)
def test_real_questions(name, total, dev, tmp_path):
  got = prepared(name, f"{DATA}/{name}.train.jsonl", tmp_path / "Q")
  assert (
    len(got) == total
    and len(read(tmp_path / "Q", "dev")) == dev
    and not read(tmp_path / "Q", "rejected.train")
  )


def test_hostile_records_cost_themselves_and_are_named(tmp_path):
  lines = [
    "1\t2\twhen\t" + "(" * 1000 + ")" * 1000,
    "1\t2\twhen\t((((a{1000}){1000}){1000}){1000}){1000}",
    "1\t2\twhere\tby (the )?sea",
  ]
  (tmp_path / "trec").write_text("".join(f"{line}\n" for line in lines))
  (kept,) = prepared("curatedtrec", str(tmp_path / "trec"), tmp_path / "T")
  assert kept["question"] == "where"
  rejected = read(tmp_path / "T", "rejected.train")
  assert [row["record"] for row in rejected] == [1, 2]
  assert all("regular expression" in row["reason"] and row["found"] for row in rejected)


def test_articles_whose_questions_are_no_objects(tmp_path):
  good = {"question": "who", "answers": [{"text": "a sea"}]}
  articles = [{"title": "Sea", "paragraphs": [{"qas": [good, "text", 5, None, [1], True]}]}]
  (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
  (kept,) = prepared("squad", str(tmp_path / "squad.json"), tmp_path / "S")
  assert kept["question"] == "who" and len(read(tmp_path / "S", "rejected.train")) == 5


@pytest.mark.parametrize(
  "row",
  [
    {"utterance": "who", "targetValue": "(description " * 60_000},
    {
      "question_text": "who",
      "document_html": "<" + "<!--<![" * 40_000,
      "annotations": [
        {
          "short_answers": [
            {"start_token": 1, "end_token": 2, "start_byte": 0, "end_byte": 280_000}
          ]
        }
      ],
    },
  ],
  ids=["descriptions", "comments"],
)
def test_time_grows_with_a_record_not_with_its_square(row, tmp_path):
  (tmp_path / "raw").write_text(json.dumps(row) + "\n")
  name = "webquestions" if "utterance" in row else "nq"
  started = time.process_time()
  with pytest.raises(artifacts.UserError, match="no usable question"):
    prepare_questions.prepare(name, str(tmp_path / "raw"), str(tmp_path / "out"))
  assert time.process_time() - started < 2
