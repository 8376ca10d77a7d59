"""realm_tf/retrieval/bm25.py: its words, in text with and without spaces."""

import dataclasses

import bm25s
import numpy as np
import pytest

from realm_tf.corpus.passages import PassageTable
from realm_tf.retrieval import bm25
from realm_tf.storage.columns import Ragged

CITIES = ["北京", "上海", "廣州", "深圳", "成都", "杭州", "武漢", "西安", "南京", "天津"]
FACTS = [
  ("位於華北平原的北部", "在哪個平原"),
  ("是中國最大的港口城市", "最大的港口"),
  ("以絲綢和茶葉聞名", "以什麼聞名"),
  ("的人口超過一千萬", "的人口有多少"),
]


def searcher_of(texts: list[str], titles: list[str] | None = None) -> bm25.Bm25Searcher:
  empty = Ragged.of([[] for _ in texts], np.int32)
  parts = {field.name: empty for field in dataclasses.fields(PassageTable) if field.type is Ragged}
  return bm25.Bm25Searcher(
    PassageTable(titles=titles or [""] * len(texts), texts=texts, folder="", **parts)
  )


def test_chinese_questions_find_their_passages():
  texts = [f"{city}{fact}，歷史悠久。" for city in CITIES for fact, _ in FACTS]
  questions = [f"{city}{question}？" for city in CITIES for _, question in FACTS]
  found = searcher_of(texts).search(questions, 5).numbers
  recall = np.mean([number in row for number, row in enumerate(found)])
  assert recall > 0.9, (
    f"recall@5 of {len(questions)} questions over {len(texts)} passages is {recall:.3f}"
  )


@pytest.mark.parametrize(
  "query, wanted", [("東京", 0), ("タワーは", 0), ("水道", 1), ("𠀀", 2), ("서울은", 3)]
)
def test_words_of_east_asian_text(query, wanted):
  texts = [
    "東京タワーは、港区にある。",
    "この水道は古い。",
    "𠀀 is rare",
    "서울은 수도이다",
    "nothing of that",
    "nor here",
  ]
  found = searcher_of(texts).search([query], 2)
  assert (found.numbers[0, 0], found.scores[0, 0] > 0, found.scores[0, 1]) == (wanted, True, 0), (
    f"{query}: {found}"
  )


def test_english_words_are_as_bm25s_has_them():
  texts = [
    "The U.S. navy's ships, 1845.",
    "a ship of state",
    "Navy blue; ships-of-the-line",
    "x y z",
  ]
  got = searcher_of(texts).search(["the navy ships of 1845", "x"], 4)
  plain = bm25s.BM25(k1=1.2, b=0.75)
  plain.index(
    bm25s.tokenize([f"\n{text}" for text in texts], stopwords=None, show_progress=False),
    show_progress=False,
  )
  tokens = bm25s.tokenize(
    ["the navy ships of 1845", "x"], stopwords=None, return_ids=False, show_progress=False
  )
  numbers, scores = plain.retrieve(tokens, k=4, show_progress=False)
  np.testing.assert_array_equal(got.numbers, numbers)
  np.testing.assert_allclose(got.scores, scores, rtol=1e-6)


def test_of_equal_scores_the_lower_number_comes_first():
  texts = ["a mill", "a lake", "a mill", "a lake", "a mill", "a bridge"]
  found = searcher_of(texts).search(["mill", "", "unknown"], 4)
  np.testing.assert_array_equal(found.numbers, [[0, 2, 4, 1], [0, 1, 2, 3], [0, 1, 2, 3]])
  assert (found.scores[0, :3] == found.scores[0, 0]).all() and not found.scores[1:].any()
