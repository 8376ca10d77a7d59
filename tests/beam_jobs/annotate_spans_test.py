"""Salient spans: the rules, the job and the page.

Examples for realm_tf/spans/rules.py, beam_jobs/annotate_spans.py from record files to record
files, and show_spans.py's page.

train_tagger_test.py tests the trained tagger.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest

from beam_jobs import annotate_spans, make_passages, taggers, update_passages
from realm_tf.corpus import passages
from realm_tf.spans import rules, show_spans
from realm_tf.storage import artifacts, publishing

SENTENCES = [
  (
    "He met J. R. R. Tolkien at the University of Oxford on March 12, 2004.",
    ["J. R. R. Tolkien", "University of Oxford", "March 12, 2004"],
  ),
  (
    "I think Vincent van Gogh died in July 1969 near St. Louis.",
    ["Vincent van Gogh", "July 1969", "St. Louis"],
  ),
  (
    "It was built in the 4th century BC by Julius Caesar, who died 44 BC.",
    ["4th century BC", "Julius Caesar", "44 BC"],
  ),
  ("The Beatles played in Hamburg in the 1960s.", ["Beatles", "Hamburg", "1960s"]),
  ("They wed on 12 March 2004 and 1st of May.", ["12 March 2004", "1st of May"]),
  ("About 1500 people and 1,200 men paid $1500 in May on a Monday.", []),
  ("Paris is big.", []),
  ("Rivers are long.", []),
  ("Marie Curie won it.", ["Marie Curie"]),
  (
    "Gone With the Wind was written in 1936–37 by Mitchell.",
    ["Gone With the Wind", "1936–37", "Mitchell"],
  ),
  (
    "Early life. Born in Köln, Özil's father moved to the U.S. Navy.",
    ["Köln", "Özil", "U.S. Navy"],
  ),
  ("She said that I and He and You are words.", []),
  ("In 1815, Napoleon lost.", ["1815", "Napoleon"]),
  (
    "Hewlett & Packard, of Palo Alto, was founded by Jean-Luc O'Neill.",
    ["Hewlett & Packard", "Palo Alto", "Jean-Luc O'Neill"],
  ),
  ("", []),
]


@pytest.mark.parametrize("sentence, expected", SENTENCES)
def test_find_spans(sentence, expected):
  found = [
    sentence[start:end] for start, end in rules.with_dates(sentence, rules.find_names(sentence))
  ]
  assert found == expected


def test_first_word_counts_where_another_sentence_writes_it_so():
  sentences = ["Paris is big.", "He went to Paris.", "Rivers flow."]
  names = rules.find_names_of_passage(sentences)
  assert [[text[a:b] for a, b in found] for text, found in zip(sentences, names, strict=True)] == [
    ["Paris"],
    ["Paris"],
    [],
  ]
  assert rules.find_names_of_passage(sentences[:1]) == [[]]


@pytest.mark.parametrize("date", ["July 1969", "12 March 2004", "1990s", "4th century BC"])
def test_dates_stand_against_any_tagger(date):
  sentence = f"It happened in {date} at Rome Fair {date}."
  start, again = sentence.index(date), sentence.rindex(date)
  # spans that a tagger may return: across dates and inside them
  names = [
    (sentence.index("Rome"), len(sentence) - 1),
    (start, start + 2),
  ]
  assert (
    rules.with_dates(sentence, [])
    == rules.with_dates(sentence, names)
    == [(start, start + len(date)), (again, again + len(date))]
  )
  rome = (sentence.index("Rome"), sentence.index("Rome") + len("Rome Fair"))
  assert rules.with_dates(sentence, [rome]) == [
    (start, start + len(date)),
    rome,
    (again, again + len(date)),
  ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("spans")
  texts = [
    "Émile Zola met Paul Cézanne in 1852. They were at school. "
    "Rain fell on Aix-en-Provence for years.",
    "No name is here. Nor is one here.",
    "The " + " ".join(["Grand"] * 12) + " Hotel burned. It stood in Köln.",
  ]
  (folder / "a.jsonl").write_text(
    "".join(
      json.dumps(
        {"title": f"Title {n}", "text": f"{texts[n % 3]} Number {n} was made in {1900 + n}."}
      )
      + "\n"
      for n in range(60)
    )
  )
  make_passages.run(
    str(folder / "a.jsonl"), str(folder / "P"), vocab_size=300, passages_per_shard=25
  )
  info = annotate_spans.run(str(folder / "P"), str(folder / "S"))
  return folder, info


def files(folder) -> list[str]:
  return [path for kind in ("spans", "holders") for path in passages.shard_paths(str(folder), kind)]


def read(folder) -> list[passages.Sentence]:
  return [
    row
    for path in passages.shard_paths(str(folder), "spans")
    for row in passages.read_shard(path, passages.Sentence)
  ]


def test_sentences_and_word_pieces(made):
  folder, info = made
  rows, table = read(folder / "S"), passages.load(str(folder / "P"))
  found = []
  for row in rows:
    text = row.text.encode()
    found.append(
      [
        text[row.token_starts[a] : row.token_ends[b - 1]].decode()
        for a, b in zip(row.span_starts, row.span_ends, strict=True)
      ]
    )
  assert found[:3] == [["Émile Zola", "Paul Cézanne", "1852"], ["Aix-en-Provence"], ["1900"]]
  assert [row.passage for row in rows] == sorted(row.passage for row in rows)
  assert all(row.text in table.texts[row.passage] for row in rows)
  # four names are in 20 passages each, and "1852" in those and in passage 52
  assert info["counts"] == {
    "sentences": 20 * (4 + 3 + 3),
    "sentences_with_spans": 20 * (3 + 1 + 2),
    "spans": 20 * (5 + 1 + 2),
    "dropped": {"too_long": 20},
    "phrases": 5 + 60,
    "phrases_with_holders": 5,
  }
  assert (
    info["inputs"]["passages"]["fingerprint"] == table.fingerprint
    and len(files(folder / "S")) == 2 * 3
  )


def test_same_again(made, capsys):
  folder, info = made
  again = annotate_spans.run(str(folder / "P"), str(folder / "again"))
  assert again["fingerprint"] == info["fingerprint"]
  for one, two in zip(files(folder / "S"), files(folder / "again"), strict=True):
    assert artifacts.file_digest(one) == artifacts.file_digest(two)
  assert (
    annotate_spans.run(str(folder / "P"), str(folder / "S")) == info
    and "already made" in capsys.readouterr().out
  )


def test_texts_without_capital_letters_get_advice(tmp_path):
  (tmp_path / "mill.txt").write_text("水车坐落在河边。磨坊主姓张。", encoding="utf-8")
  make_passages.run(f"{tmp_path}/mill.txt", f"{tmp_path}/P", vocab_size=100)
  with pytest.raises(taggers.TaggerError, match="finds no span.*English.*spacy:NAME"):
    annotate_spans.run(f"{tmp_path}/P", f"{tmp_path}/S")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["P", "mill.txt"]


def test_unknown_tagger_and_missing_passages(made, tmp_path):
  with pytest.raises(
    taggers.TaggerError,
    match="wanted one of rules, spacy:NAME, or a folder written by realm_tf.train_tagger",
  ):
    annotate_spans.run(str(made[0] / "P"), str(tmp_path / "S"), tagger="rule")
  with pytest.raises(artifacts.ArtifactError, match="holds passages, wanted tagger"):
    annotate_spans.run(str(made[0] / "P"), str(tmp_path / "S"), tagger=str(made[0] / "P"))
  with pytest.raises(artifacts.ArtifactError, match="does not exist"):
    annotate_spans.run(str(tmp_path / "absent"), str(tmp_path / "S"))
  with pytest.raises(artifacts.ArtifactError, match="holds spans, wanted passages"):
    annotate_spans.run(str(made[0] / "S"), str(tmp_path / "S"))


def test_spacy(made, tmp_path):
  """A spaCy pipeline that knows two names, loaded from a folder.

  Its numbers are not names, and dates come from our rules.
  """
  spacy = pytest.importorskip("spacy")
  nlp = spacy.blank("en")
  nlp.add_pipe("entity_ruler").add_patterns(
    [
      {"label": "PERSON", "pattern": "Émile Zola"},
      {"label": "GPE", "pattern": "Köln"},
      {"label": "CARDINAL", "pattern": "Number"},
      {"label": "DATE", "pattern": "years"},
      {"label": "ORG", "pattern": "1900"},
    ]
  )
  nlp.meta["version"] = "1.2.3"
  nlp.to_disk(tmp_path / "nlp")
  info = annotate_spans.run(str(made[0] / "P"), str(tmp_path / "S"), tagger=f"spacy:{tmp_path}/nlp")
  found = [
    [
      row.text.encode()[row.token_starts[a] : row.token_ends[b - 1]].decode()
      for a, b in zip(row.span_starts, row.span_ends, strict=True)
    ]
    for row in read(tmp_path / "S")
  ]
  assert found[:2] == [["Émile Zola", "1852"], ["1900"]] and ["Köln"] in found
  assert (
    info["counts"]["spans"] == 20 * (2 + 0 + 1) + 60
    and info["config"]["model"] == "en_pipeline-1.2.3"
  )
  nlp.meta["version"] = "1.2.4"
  nlp.to_disk(tmp_path / "nlp")
  again = annotate_spans.run(
    str(made[0] / "P"), str(tmp_path / "S"), tagger=f"spacy:{tmp_path}/nlp"
  )
  assert again["config"]["model"] == "en_pipeline-1.2.4"
  with pytest.raises(taggers.TaggerError, match="no_such_model.*python -m spacy download"):
    annotate_spans.run(str(made[0] / "P"), str(tmp_path / "S"), tagger="spacy:no_such_model")


def test_spacy_that_is_not_installed(made, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "spacy", None)
  with pytest.raises(taggers.TaggerError, match="--tagger=spacy:en needs spaCy.*pip install spacy"):
    annotate_spans.run(str(made[0] / "P"), str(tmp_path / "S"), tagger="spacy:en")


# ----------------------------------------------------------------------------------------- the page


def test_marks_of_two_taggers():
  text = "Ö & Böll met <X>"
  got = show_spans.marked(text, [[(0, 2), (5, 10)], [(0, 10)]])
  assert re.sub(r"</?span[^>]*>", "", got) == "Ö &amp; Böll met &lt;X&gt;"
  assert re.findall(r'class="([^"]*)">([^<]*)<', got) == [
    ("first second starts ends", "Ö"),
    ("second", " &amp; "),
    ("first second starts ends", "Böll"),
  ]
  assert show_spans.marked(text, [[]]) == "Ö &amp; Böll met &lt;X&gt;"


def test_page_of_two_folders(made, tmp_path):
  folder, info = made
  # The same spans except in one passage, as another tagger may return them.
  first, second = show_spans.read(str(folder / "S")), tmp_path / "S2"
  rows = read(folder / "S")
  with publishing.publish(
    str(second), kind="spans", config={"tagger": "tagger"}, inputs={"passages": str(folder / "P")}
  ) as staged:
    kept = [row for row in rows if row.passage >= 1]
    passages.write_shard(
      f"{staged.path}/{passages.shard_name('spans', 0, 1)}", kept, passages.Sentence
    )
    missing = sum(len(row.span_starts) for row in rows if row.passage < 1)
    staged.counts = {**info["counts"], "spans": info["counts"]["spans"] - missing}
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "realm_tf.spans.show_spans",
      f"--spans={folder}/S,{second}",
      "--num=30",
      "--seed=3",
      f"--output={tmp_path}/page.html",
      "--source=Made up, <free>",
    ],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  page = (tmp_path / "page.html").read_text()

  def rate(count):
    return f"{1000 * count / info['counts']['sentences']:,.0f}"

  cells = re.findall(r"<td>(.*?)</td>", page)
  num_spans = info["counts"]["spans"]
  assert missing > 0 and cells == [
    rate(num_spans),
    rate(num_spans - missing),
    rate(num_spans - missing),
  ]
  texts = [re.sub(r"<[^>]*>", "", text) for text in re.findall(r"</h2><p>(.*?)</p>", page)]
  assert (
    len(texts) == 30
    and len(first.spans) == len(rows)
    and "Made up, &lt;free&gt;" in page
    and "http" not in page
  )
  assert page == show_spans.page(
    [str(folder / "S"), str(second)], num=30, seed=3, source="Made up, <free>"
  )
  assert page != show_spans.page(
    [str(folder / "S"), str(second)], num=30, seed=4, source="Made up, <free>"
  )
  alone = show_spans.page([str(folder / "S")], num=10_000, seed=0, source="")
  assert (
    alone.count("<li>") == info["counts"]["sentences"]
    and alone.count('class="first starts ends"') == num_spans + 2
  )


def test_page_of_an_updated_corpus(made, tmp_path):
  """It has the sentences of the documents that are there now."""
  folder, _ = made
  corpus, spans = str(shutil.copytree(folder / "P", tmp_path / "P")), str(tmp_path / "S")
  gone = passages.load(corpus).titles[0]
  (tmp_path / "new.jsonl").write_text(
    json.dumps({"title": "Zarnholm", "text": "Ottoline Quexby founded Zarnholm in 1815."})
  )
  update_passages.update(corpus, add=str(tmp_path / "new.jsonl"), delete=[gone])
  info = annotate_spans.run(corpus, spans)
  page = show_spans.page([spans], num=10_000, seed=0, source="")
  shown = set(re.findall(r"<h2>(.*?)</h2>", page))
  assert gone not in shown and "Zarnholm" in shown
  assert page.count("<li>") == info["counts"]["sentences"]
