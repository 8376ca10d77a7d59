"""Answers and passages scored by the published rules.

These are SQuAD's and NQ-open's normalisation, and DPR's has-answer.
"""

import re
import time
import unicodedata

import numpy as np
import pytest

from realm_tf.corpus import metrics


@pytest.mark.parametrize(
  "text, wanted",
  [
    ("The Beatles", "beatles"),
    ("an  apple,\ta day;\nTHE end", "apple day end"),
    ("a", ""),
    ("theatre, anagram and banana", "theatre anagram and banana"),  # articles are whole words
    ("U.S.A.", "usa"),
    ("rock'n'roll-band", "rocknrollband"),  # punctuation is removed and does not split words
    ("the-end", "theend"),  # punctuation is removed before articles
    ("“curly” – dash", "“curly” – dash"),  # only ASCII punctuation
    ("", ""),
    ("...", ""),
    ("  ", ""),
    ("Zürich", "zu\u0308rich"),
  ],
)
def test_normalize_answer(text, wanted):
  got = metrics.normalize_answer(text)
  assert got == wanted


@pytest.mark.parametrize(
  "prediction, answers, wanted",
  [
    ("the Eiffel Tower!", ["Eiffel tower"], True),
    ("Zürich", [unicodedata.normalize("NFD", "Zürich")], True),
    (unicodedata.normalize("NFD", "Röntgen"), ["RÖNTGEN"], True),
    ("Zurich", ["Zürich"], False),  # accents count
    ("1969", ["in 1969", "1970"], False),
    ("1970", ["in 1969", "1970"], True),
    ("", ["the"], True),  # both are empty after normalisation
    ("", ["x"], False),
    ("x", [], False),
  ],
)
def test_exact_match(prediction, answers, wanted):
  assert metrics.exact_match(prediction, answers) is wanted


@pytest.mark.parametrize(
  "prediction, answers, wanted",
  [
    ("Barack Obama", ["Barack Hussein Obama"], 2 * 1.0 * (2 / 3) / (1 + 2 / 3)),
    # a word counts as often as both have it
    (
      "the cat sat sat",
      ["a cat sat"],
      2 * (2 / 3) * 1.0 / (2 / 3 + 1),
    ),
    ("cat", ["dog", "the cat"], 1.0),  # the best answer
    ("cat", ["dog"], 0.0),
    ("", ["dog"], 0.0),
    ("the", ["an"], 1.0),
    ("dog", [""], 0.0),
  ],
)
def test_f1(prediction, answers, wanted):
  got = metrics.f1(prediction, answers)
  assert got == pytest.approx(wanted)


TEXTS = ["The Band played in Zürich, 1969.", "A bandage.", "the band; THE end", ""]


@pytest.mark.parametrize(
  "answers, words, raw",
  [
    # raw: any substring, case as written
    (
      ["band"],
      [True, False, True, False],
      [False, True, True, False],
    ),
    (["Zürich"], [True, False, False, False], [True, False, False, False]),
    (
      [unicodedata.normalize("NFD", "zürich")],
      [True, False, False, False],
      [False, False, False, False],
    ),
    (["zurich", "1969"], [True, False, False, False], [True, False, False, False]),
    (["played the Zürich"], [False] * 4, [False] * 4),
    (["played in a Zürich"], [True, False, False, False], [False] * 4),  # articles never count
    (["196"], [False] * 4, [True, False, False, False]),
    ([], [False] * 4, [False] * 4),
    (["the"], [False] * 4, [False, False, True, False]),  # nothing is left of it
  ],
)
def test_has_answer(answers, words, raw):
  for kind, wanted in ((False, words), (True, raw)):
    got = metrics.AnswerMatcher(TEXTS, raw=kind).has_answer([0, 1, 2, 3], answers)
    assert got.dtype == bool and got.tolist() == wanted, f"raw={kind}"


CHINESE = [
  "北京是中華人民共和國的首都，位於華北平原。",
  "東京タワーは、東京都港区にある。",
  "서울은 대한민국의 수도이다.",
  "上海在長江口。",
]


@pytest.mark.parametrize(
  "answer, wanted",
  [
    ("北京", [True, False, False, False]),
    ("首都", [True, False, False, False]),
    ("華北平原", [True, False, False, False]),
    ("京都", [False, True, False, False]),
    ("東京", [False, True, False, False]),
    ("タワーは", [False, True, False, False]),
    ("ワー", [False] * 4),
    ("にある", [False, True, False, False]),
    ("수도이다", [False, False, True, False]),
    ("수도", [False] * 4),
    ("長江", [False, False, False, True]),
    ("港区にある", [False, True, False, False]),
  ],
)
def test_has_answer_in_text_without_spaces(answer, wanted):
  """A Chinese character is a word; kana and Hangul stay together, as BERT has them."""
  assert metrics.AnswerMatcher(CHINESE).has_answer(range(4), [answer]).tolist() == wanted


def test_answers_in_chinese_are_compared_whole():
  assert metrics.exact_match("北京", ["北京"]) and not metrics.exact_match("北 京", ["北京"]), (
    "exact match keeps the published rule"
  )


def test_has_answer_follows_the_numbers_given():
  matcher = metrics.AnswerMatcher(TEXTS)
  assert matcher.has_answer(np.array([2, 1, 0, 2], np.int32), ["band"]).tolist() == [
    True,
    False,
    True,
    True,
  ]
  assert matcher.has_answer([], ["band"]).tolist() == []


def test_no_passage_has_no_answer_and_recall_may_stop_early():
  matcher = metrics.AnswerMatcher(TEXTS)
  assert matcher.has_answer([-1, 0, -1, 2], ["band", "bandage"]).tolist() == [
    False,
    True,
    False,
    True,
  ]
  assert matcher.has_answer([1, 0, 2], ["band"], first_only=True).tolist() == [False, True, False]


# ------------------------------------------------------------------------------ regular expressions

EXPRESSIONS = [
  "Sept?(ember)?|Feb(ruary)?",
  r"(5,?778|6,?[05]00)\s*K|5778\.0",
  r"\b2,?[4567][0-9][0-9]\b",
  "Qu[eé]bec",
  r"R.\s?D. Hull",
  "",
  "^the",
  "west$",
  "((Rothman|Schekman|S[uü]dhof).*){2}",
  r"[^\W\d]+ 1969",
  "straße",
  "ǅ",
]
PREDICTIONS = [
  "february 1924",
  "In February",
  "5,778 k",
  "15778 K",
  "2,500 feet",
  "QUÉBEC city",
  "Québec",
  "r d. hull",
  "The\nthe",
  "north-WEST",
  "west\nx",
  "rothman and sudhof",
  "Żółw 1969",
  "zółw  1969",
  "STRASSE",
  "STRAßE",
  "ǆ",
  "",
]


def test_expressions_match_as_the_released_scorer_does():
  """Expressions match from the start, ignoring case, with Unicode's letters: re.match.

  In passages they match anywhere: re.search.
  """
  right, found = 0, 0
  for pattern in EXPRESSIONS:
    compiled = re.compile(pattern, re.IGNORECASE | re.UNICODE | re.MULTILINE)
    for text in PREDICTIONS:
      wanted = compiled.match(text) is not None
      assert metrics.exact_match(text, ["no such thing", pattern], regex=True) is wanted, (
        pattern,
        text,
      )
      assert metrics.f1(text, [pattern], regex=True) == float(wanted)
      assert metrics.expression(pattern).found_in(text) is (compiled.search(text) is not None), (
        pattern,
        text,
      )
      assert metrics.expression(pattern).ranges(text) == [
        match.span() for match in compiled.finditer(text)
      ], (pattern, text)
      right, found = right + wanted, found + (compiled.search(text) is not None)
  assert 20 < right < found
  assert not metrics.exact_match("Sept?(ember)?|Feb(ruary)?", [r"\(x"], regex=True)
  assert metrics.exact_match("a.c", ["A.C"]) and not metrics.exact_match("abc", ["a.c"]), (
    "without regex, a dot is a dot"
  )


def test_has_answer_by_expression(monkeypatch):
  calls = []
  found_in = metrics.Expression.found_in
  monkeypatch.setattr(
    metrics.Expression, "found_in", lambda self, text: calls.append(text) or found_in(self, text)
  )
  for raw in (False, True):
    calls.clear()
    matcher = metrics.AnswerMatcher(TEXTS, raw=raw)
    for _ in range(2):
      assert matcher.has_answer(
        [0, 1, 2, 3, -1], [r"z[uü]rich,?\s19\d\d", "^a b"], regex=True
      ).tolist() == [True, True, False, False, False]
    assert len(calls) == 7, (
      f"raw={raw}: each pair of expression and passage once; "
      "the second expression only where the first is not found"
    )


@pytest.mark.parametrize("pattern", ["(a", "*", "[z-a]", "a{2,1}"])
def test_what_is_no_expression(pattern):
  with pytest.raises(ValueError, match="not a regular expression: .+"):
    metrics.Expression(pattern)


def test_endless_expression_is_given_up(capfd):
  expression, text = metrics.Expression("(a|aa)+$"), "a" * 60 + "b"
  started = time.monotonic()
  assert not expression.found_in(text)
  first = time.monotonic() - started
  assert [expression.matches(text), expression.matches("aa"), expression.ranges(text)] == [
    False,
    False,
    [],
  ]
  assert 0.5 < first < 20 and time.monotonic() - started < 2 * first
  assert (
    capfd.readouterr().err
    == "WARNING: the answer '(a|aa)+$' takes over 1 s to match and will be ignored.\n"
  )
  assert metrics.Expression("(a|aa)+$").found_in("aaa")


def test_recall_at():
  found = [np.array(row, bool) for row in ([0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 1])]
  got = metrics.recall_at(found, [1, 2, 3, 20])
  assert got == {"recall_at_1": 0.25, "recall_at_2": 0.5, "recall_at_3": 0.75, "recall_at_20": 0.75}
