"""realm_tf/tokenization.py: word pieces, offsets into the original bytes, vocabularies that are refused or learned."""

import numpy as np
import pytest
import tensorflow as tf

from realm_tf import tokenization

PIECES = [*tokenization.SPECIAL, "ron", "##tgen", "was", ",", "born", "a", "##b"]


def write(path, pieces) -> str:
  path.write_text("\n".join(pieces) + "\n")
  return str(path)


def test_ids_and_offsets_in_the_original_text(tmp_path):
  tokenizer = tokenization.Tokenizer(write(tmp_path / "vocab.txt", PIECES))
  texts = ["Röntgen was, BORN", "", "ab 東 a\u0301b"]
  tokens = tokenizer.with_offsets(tf.constant(texts))
  pieces = [[PIECES[i] for i in row] for row in tokens.ids.to_list()]
  surfaces = [[text.encode()[a:b].decode() for a, b in zip(starts, ends)]
              for text, starts, ends in zip(texts, tokens.starts.to_list(), tokens.ends.to_list())]
  print(pieces, surfaces)
  assert pieces == [["ron", "##tgen", "was", ",", "born"], [], ["a", "##b", "[UNK]", "a", "##b"]]
  assert surfaces[0] == ["Rön", "tgen", "was", ",", "BORN"] and surfaces[2][:3] == ["a", "b", "東"]
  assert tokenizer(tf.constant(texts)).to_list() == tokens.ids.to_list()
  np.testing.assert_array_equal(tokenizer.lengths(texts), [5, 0, 5])
  assert tokenizer.lengths([]).shape == (0,)
  assert [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id] == [0, 1, 2, 3, 4]


def test_cased_vocabulary_keeps_case(tmp_path):
  path = write(tmp_path / "vocab.txt", [*tokenization.SPECIAL, "Ab", "ab"])
  ids = [tokenization.Tokenizer(path, lower_case=lower)(tf.constant(["Ab ab"])).to_list() for lower in (False, True)]
  assert ids == [[[5, 6]], [[6, 6]]]


def test_folder_and_fingerprint(tmp_path):
  path = write(tmp_path / "vocab.txt", PIECES)
  one, two = tokenization.Tokenizer(path), tokenization.Tokenizer(str(tmp_path))
  assert one.fingerprint == two.fingerprint != tokenization.Tokenizer(path, lower_case=False).fingerprint


@pytest.mark.parametrize("pieces, words", [
    ([p for p in PIECES if p != "[MASK]"], r"lacks \[MASK\]"),
    ([*PIECES[1:], "[PAD]"], r"begins with '\[UNK\]', wanted \[PAD\]"),
    ([*PIECES, "was"], "'was' more than once"),
    ([], "lacks"),
])
def test_bad_vocabulary_is_refused(pieces, words, tmp_path):
  with pytest.raises(tokenization.VocabularyError, match=words) as caught:
    tokenization.Tokenizer(write(tmp_path / "vocab.txt", pieces))
  print(caught.value)


def test_missing_vocabulary(tmp_path):
  with pytest.raises(tokenization.VocabularyError, match="no vocabulary at"):
    tokenization.Tokenizer(str(tmp_path))


def test_learned_vocabulary_is_the_same_every_time_and_covers_the_texts(tmp_path):
  texts = [f"Town {n} was BUILT by émigrés in {1500 + n}; its bridges, towers and walls stand." for n in range(300)]
  learned = [tokenization.train_vocabulary(iter(texts), size=400) for _ in range(3)]
  print(len(learned[0]), learned[0][:12], learned[0][-6:])
  assert learned[0] == learned[1] == learned[2]
  assert learned[0][:5] == list(tokenization.SPECIAL) and 100 < len(learned[0]) <= 400 and len(set(learned[0])) == len(learned[0])
  tokenizer = tokenization.Tokenizer(write(tmp_path / "vocab.txt", learned[0]))
  ids = tokenizer(tf.constant(texts)).values.numpy()
  assert tokenizer.unk_id not in ids and "bridges" in learned[0] and "emigres" in learned[0]
