"""realm_tf/salient_spans.py by examples, and beam_jobs/annotate_spans.py from record files to record files."""

import json

import pytest

from beam_jobs import annotate_spans, make_passages
from realm_tf import artifacts, passages, salient_spans

SENTENCES = [
    ("He met J. R. R. Tolkien at the University of Oxford on March 12, 2004.",
     ["J. R. R. Tolkien", "University of Oxford", "March 12, 2004"]),
    ("I think Vincent van Gogh died in July 1969 near St. Louis.", ["Vincent van Gogh", "July 1969", "St. Louis"]),
    ("It was built in the 4th century BC by Julius Caesar, who died 44 BC.", ["4th century BC", "Julius Caesar", "44 BC"]),
    ("The Beatles played in Hamburg in the 1960s.", ["Beatles", "Hamburg", "1960s"]),
    ("They wed on 12 March 2004 and 1st of May.", ["12 March 2004", "1st of May"]),
    ("About 1500 people and 1,200 men paid $1500 in May on a Monday.", []),
    ("Paris is big.", []),
    ("Rivers are long.", []),
    ("Marie Curie won it.", ["Marie Curie"]),
    ("Gone With the Wind was written in 1936–37 by Mitchell.", ["Gone With the Wind", "1936–37", "Mitchell"]),
    ("Early life. Born in Köln, Özil's father moved to the U.S. Navy.", ["Köln", "Özil", "U.S. Navy"]),
    ("She said that I and He and You are words.", []),
    ("In 1815, Napoleon lost.", ["1815", "Napoleon"]),
    ("Hewlett & Packard, of Palo Alto, was founded by Jean-Luc O'Neill.", ["Hewlett & Packard", "Palo Alto", "Jean-Luc O'Neill"]),
    ("", []),
]


@pytest.mark.parametrize("sentence, expected", SENTENCES)
def test_find_spans(sentence, expected):
  found = [sentence[start:end] for start, end in salient_spans.find_spans(sentence)]
  print(found)
  assert found == expected


def test_first_word_counts_where_another_sentence_writes_it_so():
  sentences = ["Paris is big.", "He went to Paris.", "Rivers flow."]
  spans = salient_spans.find_spans_of_passage(sentences)
  assert [[text[a:b] for a, b in found] for text, found in zip(sentences, spans)] == [["Paris"], ["Paris"], []]
  assert salient_spans.find_spans_of_passage(sentences[:1]) == [[]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("spans")
  texts = ["Émile Zola met Paul Cézanne in 1852. They were at school. Rain fell on Aix-en-Provence for years.",
           "No name is here. Nor is one here.",
           "The " + " ".join(["Grand"] * 12) + " Hotel burned. It stood in Köln."]
  (folder / "a.jsonl").write_text("".join(
      json.dumps({"title": f"Title {n}", "text": f"{texts[n % 3]} Number {n} was made in {1900 + n}."}) + "\n" for n in range(60)))
  make_passages.run(str(folder / "a.jsonl"), str(folder / "P"), vocab_size=300, passages_per_shard=25)
  info = annotate_spans.run(str(folder / "P"), str(folder / "S"))
  return folder, info


def read(folder) -> list[passages.Sentence]:
  return [row for path in passages.shard_paths(str(folder)) for row in passages.read_shard(path, passages.Sentence)]


def test_sentences_and_word_pieces(made):
  folder, info = made
  rows, table = read(folder / "S"), passages.load(str(folder / "P"))
  found = []
  for row in rows:
    text = row.text.encode()
    found.append([text[row.token_starts[a]:row.token_ends[b - 1]].decode() for a, b in zip(row.span_starts, row.span_ends)])
  print(found[:4], info["counts"])
  assert found[:3] == [["Émile Zola", "Paul Cézanne", "1852"], ["Aix-en-Provence"], ["1900"]]
  assert [row.passage for row in rows] == sorted(row.passage for row in rows)
  assert all(row.text in table.texts[row.passage] for row in rows)
  assert info["counts"] == {
      "sentences": 20 * (4 + 3 + 3), "sentences_with_spans": 20 * (3 + 1 + 2), "spans": 20 * (5 + 1 + 2), "dropped": {"too_long": 20}}
  assert info["inputs"]["passages"]["fingerprint"] == table.fingerprint and len(passages.shard_paths(str(folder / "S"))) == 3


def test_same_again(made, capsys):
  folder, info = made
  again = annotate_spans.run(str(folder / "P"), str(folder / "again"))
  assert again["fingerprint"] == info["fingerprint"]
  for one, two in zip(passages.shard_paths(str(folder / "S")), passages.shard_paths(str(folder / "again")), strict=True):
    assert artifacts.file_digest(one) == artifacts.file_digest(two)
  assert annotate_spans.run(str(folder / "P"), str(folder / "S")) == info and "already made" in capsys.readouterr().out


def test_unknown_tagger_and_missing_passages(made, tmp_path):
  with pytest.raises(annotate_spans.TaggerError, match="wanted one of rules"):
    annotate_spans.run(str(made[0] / "P"), str(tmp_path / "S"), tagger="rule")
  with pytest.raises(artifacts.ArtifactError, match="does not exist"):
    annotate_spans.run(str(tmp_path / "absent"), str(tmp_path / "S"))
  with pytest.raises(artifacts.ArtifactError, match="holds spans, wanted passages"):
    annotate_spans.run(str(made[0] / "S"), str(tmp_path / "S"))
