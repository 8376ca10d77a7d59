"""holders.py, and the files annotate_spans writes for it, against a plain search for words."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from beam_jobs import annotate_spans, make_passages
from realm_tf.corpus import metrics, passages
from realm_tf.spans import holders, rules
from realm_tf.spans.holders import MAX_HOLDERS, Holders
from realm_tf.storage import artifacts, publishing
from realm_tf.storage.columns import Ragged
from tests.processes import REPOSITORY

ARTICLES = [
  ("Rome", "Rome was founded by Romulus. They say that Romulus of Rome met Remus in 753 BC."),
  ("Remus", "His brother was Romulus, they say. In 753 BC Remus died near Alba Longa."),
  (
    "Émile Zola",
    "The critic Émile Zola met Paul Cézanne in Aix-en-Provence. He knew Cézanne well.",
  ),
  ("Painters", "Nobody knew the painter Paul Cézanne then. He was from Aix-En-Provence."),
  (
    "Letters",
    "A letter from paul CE\u0301ZANNE exists. Another was sent by Émile Zola to Alba. "
    "Longa was cold.",
  ),
  ("Words", "It was read by O'Neill and by Oneill. He lived at the House of the Rising Sun."),
  ("Songs", "Who wrote House of Rising Sun is unknown. Some say O’Neill did."),
  ("東京", "He went to 東京タワー in Tokyo. She saw 京都 and 東 京 in Kyoto."),
  ("Cities", "They call Tokyo 東京 there. They call Kyoto 京都 there."),
  *(
    (f"Month {n}", f"In all, {n} men saw General Wolfe there. They left in May {1700 + n % 30}.")
    for n in range(30)
  ),
  *((f"Day {n}", f"So {n} women saw Captain Cook there.") for n in range(MAX_HOLDERS + 1)),
  *((f"Hour {n}", f"So {n} boys saw Captain Ahab Cook there.") for n in range(MAX_HOLDERS + 2)),
]
KNOWLEDGE = [
  ("Sea", "The ship of CAPTAIN COOK sank. Captain Ahab did not."),
  ("Land", "An answer (Paul Cézanne!) was given; Romulus was not asked."),
  ("Nobody", "Nothing was said of Alba; Longa was not seen by Paul."),
]  # fmt: skip


def write(folder, name, articles) -> str:
  rows = (json.dumps({"title": title, "text": text}) + "\n" for title, text in articles)
  (folder / f"{name}.jsonl").write_text("".join(rows))
  vocab = {"vocab": str(folder / "P")} if (folder / "P").exists() else {"vocab_size": 400}
  make_passages.run(
    f"{folder}/{name}.jsonl", f"{folder}/{name}", passages_per_shard=20, max_tokens=64, **vocab
  )
  return f"{folder}/{name}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("holders")
  write(folder, "P", ARTICLES)
  write(folder, "Z", KNOWLEDGE)
  annotate_spans.run(f"{folder}/P", f"{folder}/S")
  return folder


def sentences(folder: str) -> list[passages.Sentence]:
  paths = passages.shard_paths(folder, rules.KIND)
  return [row for path in paths for row in passages.read_shard(path, passages.Sentence)]


def held_by_search(words: str, texts: list[str]) -> list[int]:
  """Returns numbers of the texts that hold these normalised words between spaces."""
  return [number for number, text in enumerate(texts) if words in metrics.searchable(text)]


@pytest.mark.parametrize("knowledge", ["P", "Z"])
def test_holders_are_those_of_a_plain_search(made, tmp_path, knowledge):
  folder = f"{tmp_path}/S"
  info = annotate_spans.run(f"{made}/P", folder, knowledge=f"{made}/{knowledge}")
  table, texts = passages.load(f"{made}/P"), passages.load(f"{made}/{knowledge}").texts
  rows, listed = sentences(folder), Holders.load(folder)
  num_own = int(knowledge == "P")
  seen, wanted = {}, {}  # by phrase: the words, the passages that hold them
  for row in rows:
    title = metrics.searchable(table.titles[row.passage])
    for text, phrase in zip(row.span_texts, row.span_phrases, strict=True):
      words = metrics.searchable(text)
      if not words.strip() or words in title:
        assert phrase == 0, f"{text!r} is in the title {title!r}"
        continue
      assert phrase == holders.phrase_of(words) != 0
      assert seen.setdefault(phrase, words) == words, f"{words!r} has the hash of {seen[phrase]!r}"
      wanted[phrase] = held_by_search(words, texts)
  phrases = np.array(sorted(wanted), np.int64)
  got = listed.of(phrases)
  assert got.shape == (len(phrases), MAX_HOLDERS + 1) and got.dtype == np.int32
  for phrase, found in zip(phrases.tolist(), got, strict=True):
    held = wanted[phrase] if len(wanted[phrase]) <= MAX_HOLDERS + 1 else []
    assert found.tolist() == held + [-1] * (MAX_HOLDERS + 1 - len(held)), seen[phrase]
  sizes = np.array([len(held) for held in wanted.values()])
  assert len(listed) == np.sum((sizes > 0) & (sizes <= MAX_HOLDERS + 1))
  assert (np.diff(listed.phrases) > 0).all(), "the files in their order are one sorted list"
  others = sizes - num_own
  assert info["counts"]["phrases"] == len(wanted)
  assert (
    info["counts"]["phrases_with_holders"] == np.sum((others > 0) & (others <= MAX_HOLDERS)) > 0
  )
  assert (
    info["inputs"]["knowledge"]["fingerprint"]
    == artifacts.read_info(f"{made}/{knowledge}")["fingerprint"]
  )


def test_what_is_held_and_what_is_not(made, tmp_path):
  """The numbers are written by hand, so that not everything depends on the plain search."""
  spans = {
    text: phrase
    for row in sentences(f"{made}/S")
    for text, phrase in zip(row.span_texts, row.span_phrases, strict=True)
  }
  numbers = {title: number for number, title in enumerate(passages.load(f"{made}/P").titles)}

  def held(text: str) -> list[str]:
    found = Holders.load(f"{made}/S").of([holders.phrase_of(text)])[0]
    return [title for title in numbers if numbers[title] in found.tolist()]

  assert held("paul cézanne") == ["Émile Zola", "Painters", "Letters"]
  assert held("753 BC") == ["Rome", "Remus"] and held("Romulus") == ["Rome", "Remus"]
  assert held("Aix-en-Provence.") == ["Émile Zola", "Painters"]
  assert held("Alba Longa") == ["Remus", "Letters"], "across sentences"
  assert held("House of the Rising Sun") == ["Words", "Songs"], "articles do not count"
  assert held("O'Neill") == ["Words"], "a typographic apostrophe is a letter, as for answers"
  assert held("Tokyo") == ["東京", "Cities"]
  assert len(held("Captain Cook")) == MAX_HOLDERS + 1 and not held("Captain Ahab Cook")
  assert not held("General Wolfe") and not held("Emile Zola is nowhere") and not held("...")
  assert "Paul Cézanne" in spans and "Captain Cook" in spans


def test_phrases():
  assert holders.phrase_of("") == holders.phrase_of("The ...") == 0
  assert holders.phrase_of("The Beatles!") == holders.phrase_of("beatles") != 0
  texts = ["b c", "c b", "c b b", "b", "c", "b b", "東京", "東 京", "京 東", "x" * 300]
  got = holders.phrases_of(texts)
  assert got.dtype == np.int64 and got.tolist() == [holders.phrase_of(text) for text in texts]
  assert len(set(got.tolist())) == len(texts) - 1 and got[6] == got[7]
  longest = " ".join(f"w{n}" for n in range(holders.MAX_WORDS))
  assert holders.phrase_of(longest) != 0 and holders.phrase_of(longest + " w") == 0
  assert holders.phrases_of([]).shape == (0,)
  found, numbers = holders.find(np.sort(got), ["b b The c", "", "b"], np.array([7, 3, 5]))
  wanted = {("b b", 7), ("b c", 7), ("b", 7), ("c", 7), ("b", 5)}
  assert {*zip(found.tolist(), numbers.tolist(), strict=True)} == {
    (holders.phrase_of(text), number) for text, number in wanted
  }


def test_unknown_phrases_have_no_holders(made):
  listed = Holders.load(f"{made}/S")
  got = listed.of(
    np.array([0, 1, -(1 << 63), (1 << 63) - 1, listed.phrases[0], listed.phrases[-1]])
  )
  assert (got[:4] == -1).all() and (got[4:, 0] >= 0).all()
  none = Holders(listed.phrases[:0], Ragged.of([], np.int32))
  assert (none.of(listed.phrases) == -1).all() and none.of([]).shape == (0, MAX_HOLDERS + 1)


def test_two_processes_write_the_same_files(made, tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "beam_jobs.annotate_spans",
      f"--passages={made}/P",
      f"--output={tmp_path}/S",
      "--",
      "--direct_num_workers=2",
      "--direct_running_mode=multi_processing",
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr
  assert "'phrases_with_holders': " in done.stdout
  annotate_spans.run(f"{made}/P", f"{tmp_path}/again")
  names = sorted(os.listdir(made / "S"))
  num_files = len(passages.shard_paths(f"{made}/P", passages.KIND))
  assert names == sorted(os.listdir(tmp_path / "S")) == sorted(os.listdir(tmp_path / "again"))
  kinds = (rules.KIND, holders.KIND)
  wanted = [passages.shard_name(kind, n, num_files) for kind in kinds for n in range(num_files)]
  info = artifacts.read_info(f"{made}/S")
  assert num_files > 2 and list(info["files"]) == sorted(wanted)
  for name in wanted:
    bytes_of = {
      (folder / name).read_bytes() for folder in (made / "S", tmp_path / "S", tmp_path / "again")
    }
    assert len(bytes_of) == 1, f"{name} depends on the runner"
  assert artifacts.read_info(f"{tmp_path}/S")["fingerprint"] == info["fingerprint"]


def test_another_knowledge_or_limit_is_made_again(made, tmp_path, monkeypatch, capsys):
  folder = f"{tmp_path}/S"
  first = annotate_spans.run(f"{made}/P", folder)
  second = annotate_spans.run(f"{made}/P", folder, knowledge=f"{made}/Z")
  assert first["fingerprint"] != second["fingerprint"]
  capsys.readouterr()
  assert annotate_spans.run(f"{made}/P", folder, knowledge=f"{made}/Z") == second
  assert "already made" in capsys.readouterr().out
  monkeypatch.setattr(holders, "MAX_HOLDERS", 1)
  third = annotate_spans.run(f"{made}/P", folder, knowledge=f"{made}/Z")
  assert third["config"]["max_holders"] == 1 and third["fingerprint"] != second["fingerprint"]
  with pytest.raises(artifacts.ArtifactError, match="holds spans, wanted passages"):
    annotate_spans.run(f"{made}/P", folder, knowledge=f"{made}/S")


def test_a_spans_folder_without_holders_is_refused(tmp_path):
  with publishing.publish(f"{tmp_path}/S", kind="spans", config={}, inputs={}):
    pass
  with pytest.raises(artifacts.ArtifactError, match="Run beam_jobs.annotate_spans again"):
    Holders.load(f"{tmp_path}/S")


def test_records_of_held_phrases_come_back(tmp_path):
  rows = [holders.HeldPhrase(-(1 << 63) + 7, [0, 2, 5])]
  path = str(tmp_path / passages.shard_name(holders.KIND, 0, 1))
  passages.write_shard(path, rows, holders.HeldPhrase)
  assert list(passages.read_shard(path, holders.HeldPhrase)) == rows
  assert dataclasses.fields(holders.HeldPhrase)[0].name == "phrase"
