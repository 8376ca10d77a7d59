"""The built-in corpus is deterministic, and split without leaks.

It is neither trivial nor impossible for word matching.
"""

import json
import re
from collections import Counter, defaultdict

import bm25s
import numpy as np
import pytest

from quickstart_corpus import generate, tables

NUM_ENTITIES = 1000
STOP_WORDS = set(
  (
    "a all an and are as at be by did do does every for from had has have he how if in into is it "
    "its last many must of on one or some that the their them there they this to under up was were "
    "what when where which who whom whose with would"
  ).split()
)


def _read(folder, pattern):
  return [
    json.loads(line)
    for path in sorted(folder.glob(pattern))
    for line in path.read_text(encoding="utf-8").splitlines()
  ]


def _words(text):
  return re.findall(r"\w+", text.lower())


def _contains(text, phrase):
  return f" {' '.join(_words(phrase))} " in f" {' '.join(_words(text))} "


@pytest.fixture(scope="module", name="corpus")
def _corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  generate.generate(folder, seed=0, num_entities=NUM_ENTITIES)
  return folder


@pytest.fixture(scope="module", name="passages")
def _passages(corpus):
  return _read(corpus, "knowledge/*.jsonl")


@pytest.fixture(scope="module", name="facts")
def _facts(corpus):
  return _read(corpus, "facts.jsonl")


# ---- what is written ----


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
  for seed in (0, 1):
    generate.generate(tmp_path / str(seed), seed=seed, num_entities=NUM_ENTITIES)
  paths = sorted(path.relative_to(corpus) for path in corpus.rglob("*.jsonl"))
  assert paths == sorted(
    path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*.jsonl")
  )
  for path in paths:
    assert (corpus / path).read_bytes() == (tmp_path / "0" / path).read_bytes(), path
    assert (corpus / path).read_bytes() != (tmp_path / "1" / path).read_bytes(), path


def test_counts(corpus, passages, facts):
  splits = Counter(fact["split"] for fact in facts)
  sentences = sum(len(_sentences(row["text"])) for row in _read(corpus, "pretraining/*.jsonl"))
  counts = {
    split: len(_read(corpus, f"questions.{split}.jsonl")) for split in ("train", "dev", "test")
  }
  clozes = {split: len(_read(corpus, f"clozes.{split}.jsonl")) for split in ("dev", "test")}
  assert len(passages) == 2 * NUM_ENTITIES
  assert splits == {
    "train": 3 * NUM_ENTITIES,
    "dev": 0.4 * NUM_ENTITIES,
    "test": 0.6 * NUM_ENTITIES,
  }
  assert sentences == 9 * NUM_ENTITIES
  assert counts == {
    "train": 6 * NUM_ENTITIES,
    "dev": 0.4 * NUM_ENTITIES,
    "test": 0.6 * NUM_ENTITIES,
  }
  assert clozes == {"dev": 0.4 * NUM_ENTITIES, "test": 1.2 * NUM_ENTITIES}


def test_a_number_that_cannot_be_divided_is_refused(tmp_path):
  with pytest.raises(ValueError, match="1001.*multiple of 8"):
    generate.generate(tmp_path, seed=0, num_entities=1001)


def test_names_and_aliases_are_unique_and_share_no_word(facts):
  entities = {(fact["title"], fact["alias"]) for fact in facts}
  for names in zip(*entities, strict=True):
    assert len({name.lower() for name in names}) == NUM_ENTITIES
  for fact in facts:
    assert not set(_words(fact["title"])) & set(_words(fact["alias"])), fact
    assert fact["answer"].lower() not in fact["title"].lower(), fact


def test_passages_tell_every_fact_once_and_name_their_entity_first(passages, facts):
  texts = defaultdict(list)
  for passage in passages:
    texts[passage["title"]].append(passage["text"])
    assert _contains(_sentences(passage["text"])[0], passage["title"]), passage
  for fact in facts:
    for told in (fact["answer"], fact["alias"]):
      assert sum(_contains(text, told) for text in texts[fact["title"]]) == 1, (
        fact,
        texts[fact["title"]],
      )
  lengths = [len(_words(passage["text"])) for passage in passages]
  named = np.mean([_contains(s, p["title"]) for p in passages for s in _sentences(p["text"])])
  told = Counter(word for passage in passages for word in set(_words(passage["text"])))
  shared = np.mean([told[fact["answer"].lower()] for fact in facts])
  assert 10 <= min(lengths) and max(lengths) <= 30
  assert 0.4 < named < 0.65
  assert shared < 3


# ---- no leaks ----


def test_held_out_facts_stand_in_knowledge_only(corpus, facts):
  held_out = [fact for fact in facts if fact["split"] != "train"]
  training = [s for row in _read(corpus, "pretraining/*.jsonl") for s in _sentences(row["text"])]
  training += [
    " ".join([row["question"], *row["answer"], row["title"]])
    for row in _read(corpus, "questions.train.jsonl")
  ]
  # an answer is one word, so an index by word finds every text that has it
  by_word = defaultdict(set)
  for number, text in enumerate(training):
    for word in _words(text):
      by_word[word].add(number)
  compared = 0
  for fact in held_out:
    for number in by_word[fact["answer"].lower()]:
      compared += 1
      for reference in (fact["title"], fact["alias"]):
        assert not _contains(training[number], reference), (fact, training[number])
  assert compared


def test_questions_can_be_answered_and_do_not_hold_their_answer(corpus, passages):
  texts = defaultdict(str)
  for passage in passages:
    texts[passage["title"]] += passage["text"] + " "
  for split in ("train", "dev", "test"):
    rows = _read(corpus, f"questions.{split}.jsonl")
    shares = {
      kind: count / len(rows) for kind, count in Counter(row["kind"] for row in rows).items()
    }
    assert shares == pytest.approx(generate.QUESTION_SHARES, abs=0.06), split
    for row in rows:
      assert all(_contains(texts[row["title"]], answer) for answer in row["answer"]), row
      assert not any(_contains(row["question"], answer) for answer in row["answer"]), row
      assert _contains(row["question"], row["title"]) == (row["kind"] == "name"), row


def test_cloze_spans_slice_to_the_answer(corpus):
  rows = _read(corpus, "clozes.dev.jsonl") + _read(corpus, "clozes.test.jsonl")
  for row in rows:
    start, end = row["span"]
    assert [row["text"][start:end]] == row["answer"], row
    assert start > 0, row
  lengths = [len(_words(row["text"])) for row in rows]
  assert 7 <= min(lengths) and max(lengths) <= 15


@pytest.mark.parametrize("subject", tables.SUBJECTS, ids=lambda subject: subject.noun)
def test_only_the_first_text_shares_words_with_the_passages(subject):
  for relation in subject.relations:
    known = _content_words(subject, *relation.passages)
    shared = [known & _content_words(subject, text) for text in relation.texts]
    asked = [_content_words(subject, question) for question in relation.questions]
    assert shared[0] and not shared[1] and not shared[2], (relation.name, shared)
    assert all(asked[i] & _content_words(subject, *relation.texts[1:]) for i in (0, 2)), (
      relation.name,
      asked,
    )
    assert asked[1] & known, (relation.name, asked)
    assert not any(wording.startswith("{a}") for wording in relation.passages + relation.texts)
    assert len(relation.passages) >= 4


def _content_words(subject, *wordings):
  return set(_words(re.sub(r"{\w}", " ", " ".join(wordings)))) - STOP_WORDS - {subject.noun}


def _sentences(text):
  return re.findall(r"[^.]+\.", text)


# ---- not too easy, not too hard ----


def test_word_matching_finds_some_answers_but_not_all(corpus, passages):
  tokens = {"stopwords": None, "show_progress": False}
  searcher = bm25s.BM25()
  texts = [f"{passage['title']} {passage['text']}" for passage in passages]
  searcher.index(bm25s.tokenize(texts, **tokens), show_progress=False)

  def recall(rows, text_key):
    found, _ = searcher.retrieve(
      bm25s.tokenize([row[text_key] for row in rows], **tokens), k=5, show_progress=False
    )
    hits = np.array(
      [
        [any(_contains(texts[i], a) for a in row["answer"]) for i in top]
        for row, top in zip(rows, found, strict=True)
      ]
    )
    return hits[:, 0].mean(), hits.any(axis=1).mean()

  rows = _read(corpus, "questions.test.jsonl")
  for kind in generate.QUESTION_SHARES:
    print(
      "BM25 recall@1, @5, questions by",
      kind,
      recall([row for row in rows if row["kind"] == kind], "question"),
    )
  at_1, at_5 = recall(rows, "question")
  print("BM25 recall@1, @5, all questions", (at_1, at_5))
  masked = [
    dict(row, text=row["text"][: row["span"][0]] + row["text"][row["span"][1] :])
    for row in _read(corpus, "clozes.test.jsonl")
  ]
  print("BM25 recall@1, @5, clozes", recall(masked, "text"))
  assert 0.5 < at_5 < 0.95


def test_answers_cannot_be_guessed(corpus, facts):
  training, relations = defaultdict(Counter), {}
  for fact in facts:
    relations[fact["title"], fact["answer"]] = fact["relation"]
    if fact["split"] == "train":
      training[fact["relation"]][fact["answer"]] += 1
  rows = _read(corpus, "questions.test.jsonl")
  right = [
    training[relations[row["title"], row["answer"][0]]].most_common(1)[0][0] in row["answer"]
    for row in rows
  ]
  assert np.mean(right) < 0.05
