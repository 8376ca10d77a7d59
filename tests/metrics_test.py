"""Answers and passages scored by the published rules (SQuAD's and NQ-open's normalisation, DPR's has-answer)."""

import unicodedata

import numpy as np
import pytest

from realm_tf import metrics


@pytest.mark.parametrize("text, wanted", [
    ("The Beatles", "beatles"),
    ("an  apple,\ta day;\nTHE end", "apple day end"),
    ("a", ""),
    ("theatre, anagram and banana", "theatre anagram and banana"),  # articles are whole words
    ("U.S.A.", "usa"),
    ("rock'n'roll-band", "rocknrollband"),  # punctuation vanishes, it does not part words
    ("the-end", "theend"),  # punctuation goes before articles do
    ("“curly” – dash", "“curly” – dash"),  # only ASCII punctuation
    ("", ""), ("...", ""), ("  ", ""),
    ("Zürich", "zu\u0308rich"),
])
def test_normalize_answer(text, wanted):
  got = metrics.normalize_answer(text)
  print(repr(text), "→", repr(got))
  assert got == wanted


@pytest.mark.parametrize("prediction, answers, wanted", [
    ("the Eiffel Tower!", ["Eiffel tower"], True),
    ("Zürich", [unicodedata.normalize("NFD", "Zürich")], True),
    (unicodedata.normalize("NFD", "Röntgen"), ["RÖNTGEN"], True),
    ("Zurich", ["Zürich"], False),  # accents count
    ("1969", ["in 1969", "1970"], False),
    ("1970", ["in 1969", "1970"], True),
    ("", ["the"], True),  # both are empty after normalisation
    ("", ["x"], False),
    ("x", [], False),
])
def test_exact_match(prediction, answers, wanted):
  assert metrics.exact_match(prediction, answers) is wanted


@pytest.mark.parametrize("prediction, answers, wanted", [
    ("Barack Obama", ["Barack Hussein Obama"], 2 * 1.0 * (2 / 3) / (1 + 2 / 3)),
    ("the cat sat sat", ["a cat sat"], 2 * (2 / 3) * 1.0 / (2 / 3 + 1)),  # a word counts as often as it stands in both
    ("cat", ["dog", "the cat"], 1.0),  # the best answer
    ("cat", ["dog"], 0.0),
    ("", ["dog"], 0.0),
    ("the", ["an"], 1.0),
    ("dog", [""], 0.0),
])
def test_f1(prediction, answers, wanted):
  got = metrics.f1(prediction, answers)
  print(prediction, answers, got)
  assert got == pytest.approx(wanted)


TEXTS = ["The Band played in Zürich, 1969.", "A bandage.", "the band; THE end", ""]


@pytest.mark.parametrize("answers, words, raw", [
    (["band"], [True, False, True, False], [False, True, True, False]),  # raw: any substring, case as written
    (["Zürich"], [True, False, False, False], [True, False, False, False]),
    ([unicodedata.normalize("NFD", "zürich")], [True, False, False, False], [False, False, False, False]),
    (["zurich", "1969"], [True, False, False, False], [True, False, False, False]),
    (["played the Zürich"], [False] * 4, [False] * 4),
    (["played in a Zürich"], [True, False, False, False], [False] * 4),  # articles never count
    (["196"], [False] * 4, [True, False, False, False]),
    ([], [False] * 4, [False] * 4),
    (["the"], [False] * 4, [False, False, True, False]),  # nothing is left of it
])
def test_has_answer(answers, words, raw):
  for kind, wanted in ((False, words), (True, raw)):
    got = metrics.AnswerMatcher(TEXTS, raw=kind).has_answer([0, 1, 2, 3], answers)
    print(answers, f"raw={kind}", got)
    assert got.dtype == bool and got.tolist() == wanted


def test_has_answer_follows_the_numbers_given():
  matcher = metrics.AnswerMatcher(TEXTS)
  assert matcher.has_answer(np.array([2, 1, 0, 2], np.int32), ["band"]).tolist() == [True, False, True, True]
  assert matcher.has_answer([], ["band"]).tolist() == []


def test_recall_at():
  found = [np.array(row, bool) for row in ([0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 1])]
  got = metrics.recall_at(found, [1, 2, 3, 20])
  print(got)
  assert got == {"recall_at_1": 0.25, "recall_at_2": 0.5, "recall_at_3": 0.75, "recall_at_20": 0.75}
