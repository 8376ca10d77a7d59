"""tokenization.py: word pieces, offsets into the original bytes, learned vocabularies."""

import dataclasses
import itertools
import unicodedata

import numpy as np
import pytest
import tensorflow as tf
import tokenizers

from realm_tf.corpus import tokenization, vocabularies
from realm_tf.corpus.characters import WordRules

PIECES = [*tokenization.SPECIAL, "ron", "##tgen", "was", ",", "born", "a", "##b"]


def write(path, pieces) -> str:
  path.write_text("\n".join(pieces) + "\n")
  return str(path)


def test_ids_and_offsets_in_the_original_text(tmp_path):
  tokenizer = tokenization.Tokenizer(write(tmp_path / "vocab.txt", PIECES))
  texts = ["Röntgen was, BORN", "", "ab 東 a\u0301b"]
  tokens = tokenizer.with_offsets(tf.constant(texts))
  pieces = [[PIECES[i] for i in row] for row in tokens.ids.to_list()]
  surfaces = [
    [text.encode()[a:b].decode() for a, b in zip(starts, ends, strict=True)]
    for text, starts, ends in zip(
      texts, tokens.starts.to_list(), tokens.ends.to_list(), strict=True
    )
  ]
  assert pieces == [["ron", "##tgen", "was", ",", "born"], [], ["a", "##b", "[UNK]", "a", "##b"]]
  assert surfaces[0] == ["Rön", "tgen", "was", ",", "BORN"] and surfaces[2][:3] == ["a", "b", "東"]
  assert tokenizer(tf.constant(texts)).to_list() == tokens.ids.to_list()
  np.testing.assert_array_equal(tokenizer.lengths(texts), [5, 0, 5])
  assert tokenizer.lengths([]).shape == (0,)
  assert [
    tokenizer.pad_id,
    tokenizer.unk_id,
    tokenizer.cls_id,
    tokenizer.sep_id,
    tokenizer.mask_id,
  ] == [0, 1, 2, 3, 4]


def test_lists_of_texts_are_converted_in_one_call(tmp_path, monkeypatch):
  """A call takes 20 ms, so a call for each question would take minutes."""
  tokenizer = tokenization.Tokenizer(write(tmp_path / "vocab.txt", PIECES))
  lists = [("ron was", ""), (), ["born"], ("a , ab",), ()]
  wanted = [tokenizer(tf.constant(texts, tf.string)).to_list() for texts in map(list, lists)]
  calls, call = [], tokenization.Tokenizer.__call__
  monkeypatch.setattr(
    tokenization.Tokenizer,
    "__call__",
    lambda self, texts: calls.append(len(texts)) or call(self, texts),
  )
  assert tokenizer.of_lists(lists) == wanted == [[[5, 7], []], [], [[9]], [[10, 8, 10, 11]], []]
  assert calls == [4]
  assert tokenizer.of_lists([]) == [] and tokenizer.of_lists([[]]) == [[]]


def test_cased_vocabulary_keeps_case(tmp_path):
  path = write(tmp_path / "vocab.txt", [*tokenization.SPECIAL, "Ab", "ab", "ä", "a"])

  def ids(**rules):
    return tokenization.Tokenizer(path, WordRules(**rules))(tf.constant(["Ab ab Ä"])).to_list()

  assert ids() == [[6, 6, 8]]
  assert ids(lower_case=False, strip_accents=False) == [[5, 6, 1]]
  assert ids(strip_accents=False) == [[6, 6, 7]], "lower case, with its accent"


def test_folder_and_fingerprint(tmp_path):
  path = write(tmp_path / "vocab.txt", PIECES)
  one, two = tokenization.Tokenizer(path), tokenization.Tokenizer(str(tmp_path))
  others = {
    dataclasses.replace(one.vocabulary, rules=WordRules(**{name: value})).fingerprint
    for name, value in (
      ("lower_case", False),
      ("strip_accents", False),
      ("split_cjk", False),
      ("clean_text", False),
      ("max_word_chars", 99),
    )
  }
  assert one.fingerprint == two.fingerprint and len(others | {one.fingerprint}) == 6, (
    "every rule counts"
  )


# ======================================================================================= any script

SCRIPTS = {
  "greek": "Ὁ Σίσυφος ΣΙΣΥΦΟΣ κύλησε τὸν ΛΊΘΟΝ. Ἀχιλλεύς;",
  "german": "Straße STRASSE ẞ Müller groß GROẞ",
  "turkish": "İstanbul IĞDIR ığdır İ ı",
  "full width": "Ｆｕｌｌ，ｗｉｄｔｈ（１２）！ full，width",
  "symbols": "½ cup… ™ ©2019 1⁄2 №5 ℃ 20℃ ¼ … a™",
  "ligatures": "ﬁne ﬂag ﬃ ǆ Ǆ œuvre ĳ",
  "hangul": "한국어 위키백과는 대한민국의 한국어",
  "combining": "e\u0301t\u0301 Z\u0308ürich a\u0328\u0301",
  "arabic": "ﻡﺮﺤﺑﺍ مَرْحَبًا العَرَبِيَّة ﷺ ٣٤",
  "hebrew": "שָׁלוֹם עוֹלָם",
  "hindi": "हिन्दी में विकिपीडिया क़लम",
  "chinese": "北京是中華人民共和國的首都，位於华北平原。𠀀豈",
  "japanese": "東京タワーは、東京都港区にある。",
  "thai": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย เมืองที่ใหญ่ที่สุด",
  "khmer": "ភ្នំពេញជារាជធានីនៃប្រទេសកម្ពុជា",
  "tibetan": "བོད་ལྗོངས་ནི་རྒྱ་གར་དང་",
  "burmese": "မြန်မာနိုင်ငံသည်အရှေ့တောင်အာရှတွင်",
  "emoji": "a 😀b 👩\u200d🔬 ❤\ufe0f",
  "invisible": "soft\u00adhyphen zero\u200bwidth \u200ejoin\u200cer \ufeffx a\u00a0b\u3000c\u2028d",
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> dict[WordRules, tokenization.Tokenizer]:
  """Tokenizers by rules, with vocabularies of all SCRIPTS."""
  found = {}
  for lower_case, strip_accents, split_cjk in itertools.product((True, False), repeat=3):
    rules = WordRules(lower_case=lower_case, strip_accents=strip_accents, split_cjk=split_cjk)
    pieces = tokenization.train_vocabulary(SCRIPTS.values(), size=4000, rules=rules, min_count=1)
    found[rules] = tokenization.Tokenizer(
      write(tmp_path_factory.mktemp("learned") / "vocab.txt", pieces), rules
    )
  return found


def test_what_was_learned_from_comes_out_whole(learned):
  for rules, tokenizer in learned.items():
    tokens = tokenizer.with_offsets(tf.constant(list(SCRIPTS.values())))
    for name, text, ids, starts, ends in zip(
      SCRIPTS,
      SCRIPTS.values(),
      *(part.to_list() for part in (tokens.ids, tokens.starts, tokens.ends)),
      strict=True,
    ):
      unknown = [
        text.encode()[start:end].decode()
        for start, end, piece in zip(starts, ends, ids, strict=True)
        if piece == tokenizer.unk_id
      ]
      assert not unknown, f"{name}, {rules}: [UNK] for {unknown}"
      assert tokenizer.spell(ids).split() == rules.words(text), (
        f"{name}: the words of the vocabulary and of the tokenizer"
      )
      assert all(start < end for start, end in zip(starts, ends, strict=True)), (
        f"{name}: a word piece has no bytes"
      )
      assert starts == sorted(starts) and ends == sorted(ends), (
        f"{name}: pieces in the order of the text"
      )
      spaces = text.encode()
      for start, end in zip(starts, ends, strict=True):
        spaces[start:end].decode()  # whole characters
  whole = [
    piece
    for tokenizer in learned.values()
    for piece in tokenizer.pieces[5:]
    if not piece.startswith("##")
  ]
  assert len(whole) > 1000


def test_every_whole_word_of_a_learned_vocabulary_can_come_out(learned):
  for rules, tokenizer in learned.items():
    words = [piece for piece in tokenizer.pieces[5:] if not piece.startswith("##")]
    got = tokenizer(tf.constant(words)).to_list()
    lost = [word for word, ids in zip(words, got, strict=True) if tokenizer.spell(ids) != word]
    assert not lost, f"{rules}: {len(lost)} of {len(words)} can never come out: {lost[:5]}"


@pytest.mark.parametrize(
  "text, answer",
  [
    ("Take 1 ½", "½"),
    ("and so on…", "on…"),
    ("Brand™ is", "Brand™"),
    ("the ﬁ", "ﬁ"),
    ("在北京，", "北京"),
    ("한국어 한", "한국어"),
    ("cafe\u0301 x", "cafe\u0301"),
    ("20℃.", "20℃"),
    ("เมืองที่ใหญ่", "เมืองที่ใหญ่"),
  ],
)
def test_an_answer_is_found_again_in_its_bytes(text, answer, learned):
  for rules, tokenizer in learned.items():
    if not rules.split_cjk and answer == "北京":
      continue  # it is inside a word
    tokens = tokenizer.with_offsets(tf.constant([text]))
    starts, ends, data = tokens.starts[0].numpy(), tokens.ends[0].numpy(), text.encode()
    first = len(text[: text.index(answer)].encode())
    last = first + len(answer.encode())
    assert first in starts and last in ends, (
      f"{rules}: pieces {[data[a:b].decode() for a, b in zip(starts, ends, strict=True)]}"
    )


@pytest.mark.parametrize(
  "rules",
  [
    WordRules(),
    WordRules(False, False),
    WordRules(strip_accents=False),
    WordRules(split_cjk=False),
    WordRules(False, True),
  ],
  ids=repr,
)
def test_word_pieces_are_those_of_the_tokenizers_library(rules, learned, tmp_path):
  """Hugging Face's tokenizers as models are published with them."""
  ours = learned[rules]
  theirs = tokenizers.BertWordPieceTokenizer(
    vocab={piece: i for i, piece in enumerate(ours.pieces)},
    lowercase=rules.lower_case,
    strip_accents=rules.strip_accents,
    handle_chinese_chars=rules.split_cjk,
    clean_text=rules.clean_text,
  )
  texts = [*SCRIPTS.values(), "x" * 100, "a [unk] b"]
  got, wanted = (
    ours(tf.constant(texts)).to_list(),
    [theirs.encode(text, add_special_tokens=False).ids for text in texts],
  )
  for text, one, other in zip(texts, got, wanted, strict=True):
    assert one == other, (
      f"{text[:40]!r}: {ours.spell(one)[:200]!r}, theirs {ours.spell(other)[:200]!r}"
    )


# their category in Unicode 8, which Hugging Face uses, is not that in Python's Unicode
CHANGED = {
  0x166D,
  0x1734,
  0x1885,
  0x1886,
}


@pytest.mark.parametrize(
  "rules", [WordRules(), WordRules(False, False), WordRules(strip_accents=False)], ids=repr
)
def test_words_are_those_of_the_tokenizers_library_for_every_character(rules):
  """Compares alphabets and signs among the characters assigned in Unicode 3.2."""
  normalizer = tokenizers.normalizers.BertNormalizer(
    strip_accents=rules.strip_accents, lowercase=rules.lower_case
  )
  splitter, differ = tokenizers.pre_tokenizers.BertPreTokenizer(), set()
  codes = [
    code
    for code in (
      *range(0x3500),
      *range(0xABF0, 0xAC10),
      *range(0xF900, 0x10000),
      *range(0x1D400, 0x1D500),
      *range(0x2F800, 0x2FA20),
    )
    if unicodedata.ucd_3_2_0.category(chr(code)) != "Cn"
  ]
  for code in codes:
    text = f"a{chr(code)}b"
    if rules.words(text) != [
      word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    ]:
      differ.add(code)
  assert len(codes) > 11_000 and differ <= CHANGED, (
    f"words differ around {[hex(code) for code in differ - CHANGED]}"
  )


def test_nothing_of_a_text_without_spaces_is_lost(learned):
  tokenizer = learned[WordRules()]
  text = "".join(SCRIPTS["thai"].split()) * 20
  tokens = tokenizer.with_offsets(tf.constant([text]))
  assert tokenizer.unk_id not in tokens.ids[0].numpy(), "a word of 1,000 Thai letters"
  bounds = [[0, *tokens.ends[0].numpy()], [*tokens.starts[0].numpy(), len(text.encode())]]
  assert bounds[0] == bounds[1], "every byte has its piece"
  begins = [
    piece for piece in tokens.ids[0].numpy() if not tokenizer.pieces[piece].startswith("##")
  ]
  assert len(begins) == len(tokenizer.rules.words(text)), "a new word after every 100 letters"


def test_an_unknown_letter_costs_at_most_one_part_of_a_long_word(learned):
  tokenizer = learned[WordRules()]
  letters = tokenizer.rules.words(SCRIPTS["thai"])[0]
  text = letters * 20 + "\U00010280" + letters * 20
  ids = tokenizer(tf.constant([text]))[0].numpy()
  assert np.sum(ids == tokenizer.unk_id) == 1 and len(ids) > 40


def test_words_may_begin_anywhere_in_a_script_without_spaces(tmp_path):
  """Otherwise an answer in Thai or kana would be a whole run of letters, not a reader's span."""
  pieces = ["##s", "##タワ", "##の", "##ไทย", "##ខ", "##가", "##न", "##"]
  tokenizer = tokenization.Tokenizer(
    write(tmp_path / "vocab.txt", [*tokenization.SPECIAL, *pieces])
  )
  assert tokenizer.continues[5:].tolist() == [True, False, False, False, False, True, True, True]


def test_pieces_longer_than_the_op_takes(tmp_path):
  long, ends = "ก" * 90, "x" * 260
  tokenizer = tokenization.Tokenizer(
    write(tmp_path / "vocab.txt", [*PIECES, long, ends, "ก", "##ก"])
  )
  assert tokenizer.spell(tokenizer(tf.constant(["ก" * 90]))[0].numpy()) == long


def test_texts_of_nothing(tmp_path):
  tokenizer = tokenization.Tokenizer(write(tmp_path / "vocab.txt", PIECES))
  for texts in ([], [""], ["", " \u0301\n", "\u200b"]):
    tokens = tokenizer.with_offsets(tf.constant(texts, tf.string))
    assert (
      tokens.ids.to_list()
      == tokens.ends.to_list()
      == tokenizer(tf.constant(texts, tf.string)).to_list()
      == [[] for _ in texts]
    )
  broken = tf.constant([b"was \xff born", b"born \xe0\xb8"])
  tokens = tokenizer.with_offsets(broken)
  assert (tokens.ids.to_list(), tokens.starts.to_list()) == ([[7, 9], [9]], [[0, 6], [0]]), (
    "bytes that are not UTF-8 are left out"
  )


def test_the_same_in_a_saved_model_with_ops_of_tensorflow_and_tf_text_only(learned, tmp_path):
  tokenizer, texts = learned[WordRules()], tf.constant(list(SCRIPTS.values()))
  module = tf.Module()

  @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
  def serve(texts):
    tokens = tokenizer.with_offsets(texts)
    return {
      name: part.to_tensor(-1)
      for name, part in (("ids", tokens.ids), ("starts", tokens.starts), ("ends", tokens.ends))
    }

  module.serve = serve
  tf.saved_model.save(module, str(tmp_path / "M"))
  wanted, got = serve(texts), tf.saved_model.load(str(tmp_path / "M")).serve(texts)
  eager = tokenizer.with_offsets(texts)
  for name, value in wanted.items():
    np.testing.assert_array_equal(got[name], value)
    np.testing.assert_array_equal(getattr(eager, name).to_tensor(-1), value, err_msg=name)
  ops = {node.type for node in serve.get_concrete_function().graph.get_operations()}
  assert {op for op in ops if "Fast" in op or "Text" in op} == {
    "FastWordpieceTokenizeWithOffsets"
  } and "PyFunc" not in ops


# ===================================================================================== vocabularies


@pytest.mark.parametrize(
  "pieces, words", [([p for p in PIECES if p != "[MASK]"], r"lacks \[MASK\]"), ([], "lacks")]
)
def test_bad_vocabulary_is_refused(pieces, words, tmp_path):
  with pytest.raises(vocabularies.VocabularyError, match=words):
    tokenization.Tokenizer(write(tmp_path / "vocab.txt", pieces))


def test_missing_vocabulary(tmp_path):
  with pytest.raises(vocabularies.VocabularyError, match="no vocabulary at"):
    tokenization.Tokenizer(str(tmp_path))


def test_learned_vocabulary_is_the_same_every_time_and_covers_the_texts(tmp_path):
  texts = [
    f"Town {n} was BUILT by émigrés in {1500 + n}; its bridges, towers and walls stand."
    for n in range(300)
  ]
  learned = [tokenization.train_vocabulary(iter(texts), size=400) for _ in range(3)]
  assert learned[0] == learned[1] == learned[2]
  assert (
    learned[0][:5] == list(tokenization.SPECIAL)
    and 100 < len(learned[0]) <= 400
    and len(set(learned[0])) == len(learned[0])
  )
  tokenizer = tokenization.Tokenizer(write(tmp_path / "vocab.txt", learned[0]))
  ids = tokenizer(tf.constant(texts)).values.numpy()
  assert tokenizer.unk_id not in ids and "bridges" in learned[0] and "emigres" in learned[0]


def test_a_chinese_vocabulary_has_the_letters_that_the_text_needs():
  """An alphabet of 1,000 letters would make a tenth of Chinese [UNK]."""
  letters = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
  texts = ["".join(letters[at : at + 30]) for at in range(0, 3000, 30)] * 3
  pieces = tokenization.train_vocabulary(texts, size=20_000)
  assert set(letters) <= set(pieces) and not any(piece.startswith("##") for piece in pieces), (
    "no Chinese character continues a word"
  )
