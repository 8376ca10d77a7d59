"""realm_tf/corpus/passages.py: blocking against a slow, obvious version.

Also tests that records are read as they were written, and the table.
"""

import hashlib
import json
import random

import numpy as np
import pytest

from realm_tf.corpus import passages, tokenization
from realm_tf.storage import artifacts, publishing
from realm_tf.storage.columns import Ragged

PIECES = [*tokenization.SPECIAL, "ron", "##tgen", "was", "born", ".", "in", "1845", "a", "b", "c"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> tokenization.Tokenizer:
  path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
  path.write_text("\n".join(PIECES) + "\n")
  return tokenization.Tokenizer(str(path))


@pytest.mark.parametrize(
  "lengths, blocks",
  [
    ([4, 4, 4], [[0, 1], [2]]),  # room is 10 - 0 - 3 + 2 = 9
    ([9], [[0]]),
    ([10], [[0]]),
    ([1, 50, 1, 1], [[0], [1], [2, 3]]),
    ([], []),
    ([5, 4, 9], [[0, 1], [2]]),
  ],
)
def test_blocks_by_hand(lengths, blocks):
  sentences = [f"s{i}" for i in range(len(lengths))]
  got = passages.block_sentences(sentences, lengths, title_tokens=2, max_tokens=14)
  assert got == [[f"s{i}" for i in block] for block in blocks]


def test_blocks_lose_nothing_and_could_not_take_one_more():
  rng = random.Random(0)
  for _ in range(200):
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(0, 30))]
    got = passages.block_sentences(
      list(range(len(lengths))), lengths, title_tokens=rng.randint(0, 10), max_tokens=64
    )
    assert [s for block in got for s in block] == list(range(len(lengths)))


def test_offsets_point_into_the_original_bytes(tokenizer):
  (made,) = passages.make_passages(
    tokenizer, [("Röntgen", ["Röntgen was born.", "In 1845 ."])], [7]
  )
  text = made.text.encode()
  assert (made.number, made.text) == (7, "Röntgen was born. In 1845 .")
  assert [text[a:b].decode() for a, b in zip(made.token_starts, made.token_ends, strict=True)] == [
    "Rön",
    "tgen",
    "was",
    "born",
    ".",
    "In",
    "1845",
    ".",
  ]
  assert [
    text[a:b].decode() for a, b in zip(made.sentence_starts, made.sentence_ends, strict=True)
  ] == [
    "Röntgen was born.",
    "In 1845 .",
  ]
  assert [PIECES[i] for i in made.text_ids] == [
    "ron",
    "##tgen",
    "was",
    "born",
    ".",
    "in",
    "1845",
    ".",
  ]


def test_records_come_back(tokenizer, tmp_path):
  rows = passages.make_passages(
    tokenizer, [("", ["a"]), ("ü " * 500, ["b c", "東京"]), ("t", [""])], [0, 1, 2]
  )
  path = str(tmp_path / passages.shard_name("passages", 0, 1))
  passages.write_shard(path, rows, passages.Passage)
  assert list(passages.read_shard(path, passages.Passage)) == rows
  first = open(path, "rb").read()
  passages.write_shard(path, rows, passages.Passage)
  assert open(path, "rb").read() == first and [p.name for p in tmp_path.iterdir()] == [
    "passages-00000-of-00001.arrow"
  ]
  path = str(tmp_path / passages.shard_name("spans", 0, 1))
  rows = [passages.Sentence(3, "a b", [13, 14], [0, 2], [1, 3], [0], [2], [-(1 << 63) + 5])]
  passages.write_shard(path, rows, passages.Sentence)
  assert list(passages.read_shard(path, passages.Sentence)) == rows


def test_rows_and_columns_are_the_same(tokenizer, tmp_path):
  blocks = [("", ["a"]), ("ü " * 500, ["b c", "東京"]), ("t", [""])]
  rows = passages.make_passages(tokenizer, blocks, range(3))
  paths = [str(tmp_path / passages.shard_name("passages", shard, 2)) for shard in range(2)]
  passages.write_shard(paths[0], rows[:1], passages.Passage)
  passages.write_shard(paths[1], rows[1:], passages.Passage)
  columns = passages.read_all(paths, passages.Passage)
  assert b"".join(columns.pop("uid").joined()) == b"".join(
    hashlib.sha1(f"{row.title}\n{row.text}".encode()).digest() for row in rows
  )
  assert columns.pop("number").joined().tolist() == [0, 1, 2]
  for name, column in columns.items():
    got = [list(part) if isinstance(column, Ragged) else part for part in column]
    assert got == [getattr(row, name) for row in rows], name
  assert columns["text_ids"].values.dtype == np.uint16
  phrases = [[], [-(1 << 63) + 5, 7]]
  sentences = [
    passages.Sentence(n, "a", [13], [0], [1], [], [], row) for n, row in enumerate(phrases)
  ]
  passages.write_shard(
    path := str(tmp_path / passages.shard_name("spans", 0, 1)), sentences, passages.Sentence
  )
  found = passages.read_all([path], passages.Sentence)["span_phrases"]
  assert [list(row) for row in found] == phrases
  assert [list(row) for row in found.take([1, 1, 0])] == [phrases[1], phrases[1], []]
  assert passages.read_all([], passages.Sentence)["ids"].splits.tolist() == [0]


def write_folder(tokenizer, folder, numbers) -> None:
  with publishing.publish(str(folder), kind=passages.KIND, config={}, inputs={}) as staged:
    rows = passages.make_passages(
      tokenizer, [(f"t{n}", ["a b c"[: 1 + 2 * (n % 3)]]) for n in numbers], numbers
    )
    for shard in range(2):
      passages.write_shard(
        f"{staged.path}/{passages.shard_name('passages', shard, 2)}",
        rows[3 * shard : 3 * shard + 3],
        passages.Passage,
      )
    staged.counts, staged.details = {"passages": 6}, {"vocab_size": tokenizer.size}


def test_load(tokenizer, tmp_path):
  write_folder(tokenizer, tmp_path / "P", range(6))
  table = passages.load(str(tmp_path / "P"))
  assert table.titles[:] == [f"t{n}" for n in range(6)] and table.text_ids.values.dtype == np.uint16
  assert table.text_ids.gather([5, 0, 1]).to_list() == [[12, 13, 14], [12], [12, 13]]
  assert table.fingerprint == json.loads((tmp_path / "P" / "info.json").read_text())["fingerprint"]


def test_load_refuses_a_missing_record_file(tokenizer, tmp_path):
  write_folder(tokenizer, tmp_path / "P", range(6))
  (tmp_path / "P" / passages.shard_name("passages", 0, 2)).unlink()
  with pytest.raises(
    artifacts.ArtifactError,
    match="damaged: its file 'passages-00000-of-00002.arrow' is missing",
  ):
    passages.load(str(tmp_path / "P"))
