"""realm_tf/corpus/vocabularies.py: vocabularies and tokenizer rules in third-party files."""

import json

import pytest

from realm_tf.corpus import vocabularies
from realm_tf.corpus.characters import WordRules
from realm_tf.corpus.vocabularies import SPECIAL, VocabularyError, read, unused
from realm_tf.storage import publishing

PIECES = [*SPECIAL, "the", "##s", "tower"]
NORMALIZER = {
  "type": "BertNormalizer",
  "clean_text": True,
  "handle_chinese_chars": True,
  "strip_accents": None,
  "lowercase": True,
}
MODEL = {
  "type": "WordPiece",
  "unk_token": "[UNK]",
  "continuing_subword_prefix": "##",
  "max_input_chars_per_word": 100,
}


def folder_of(tmp_path, *, pieces=PIECES, tokenizer=None, end="\n", **files) -> str:
  """Writes vocab.txt, tokenizer.json as `tokenizer` changes it, and JSON files by stem."""
  if pieces is not None:
    (tmp_path / "vocab.txt").write_bytes(end.join([*pieces, ""]).encode())
  if tokenizer is not None:
    told = {
      "normalizer": NORMALIZER,
      "pre_tokenizer": {"type": "BertPreTokenizer"},
      "added_tokens": [],
      "model": MODEL | {"vocab": {piece: row for row, piece in enumerate(PIECES)}},
    }
    files["tokenizer"] = told | tokenizer
  for name, content in files.items():
    path = tmp_path / f"{name.replace('__', '/')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
  return str(tmp_path)


@pytest.mark.parametrize(
  "data",
  [
    "\n".join(PIECES) + "\n",
    "\r\n".join(PIECES) + "\r\n",
    "\ufeff" + "\n".join(PIECES),
    "\n".join(PIECES) + "\n\n",
    "\r\n".join(PIECES) + "\r\n\r\n",
  ],
  ids=["unix", "windows", "byte order mark", "blank last line", "windows, blank last line"],
)
def test_lines_as_files_have_them(data, tmp_path):
  (tmp_path / "vocab.txt").write_bytes(data.encode())
  assert (
    list(read(str(tmp_path)).pieces) == PIECES == list(read(str(tmp_path / "vocab.txt")).pieces)
  )


def test_only_line_feeds_end_a_piece(tmp_path):
  pieces = [*PIECES, "\u2028", "\x85", "\u3000"]
  assert list(read(folder_of(tmp_path, pieces=pieces)).pieces) == pieces, (
    "characters that some programs take for line ends are pieces"
  )


def test_a_repeated_piece_is_its_last_line_and_ids_count_lines(tmp_path):
  found = read(folder_of(tmp_path, pieces=[*PIECES, "the", "", "end"]))
  assert list(found.pieces) == [*SPECIAL, unused(5), "##s", "tower", "the", unused(9), "end"], (
    "as BERT's load_vocab numbers them"
  )
  assert found.num_unused == 2


def test_padding_is_moved_to_the_first_row(tmp_path):
  pieces = ["the", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]"]
  found = read(folder_of(tmp_path, pieces=pieces))
  assert (found.pieces, found.pad_row) == (("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"), 5)


def test_tokenizer_json_alone(tmp_path):
  added = [{"id": 0, "content": "[PAD]"}, {"id": 9, "content": "<new>"}]
  found = read(folder_of(tmp_path, pieces=None, tokenizer={"added_tokens": added}))
  assert list(found.pieces) == [*PIECES, unused(0), "<new>"], "an added token has the row it names"
  assert found.rules == WordRules()


def test_added_tokens_and_spare_rows(tmp_path):
  folder = folder_of(tmp_path, added_tokens={"<new>": 8}, config={"vocab_size": 16})
  found = read(folder)
  assert list(found.pieces) == [*PIECES, "<new>", *map(unused, range(9, 16))], (
    "one piece for each row of the embeddings"
  )
  assert read(folder).with_rows(16) == found
  for rows in (15, 17):
    with pytest.raises(
      VocabularyError, match=f"has 16 word pieces, but the checkpoint has {rows}; give the vocab"
    ):
      found.with_rows(rows)


@pytest.mark.parametrize(
  "files, wanted",
  [
    ({}, WordRules()),
    (
      dict(tokenizer_config={"do_lower_case": False}),
      WordRules(lower_case=False, strip_accents=False),
    ),
    (
      dict(tokenizer_config={"do_lower_case": True, "strip_accents": False}),
      WordRules(strip_accents=False),
    ),
    (
      dict(tokenizer_config={"do_lower_case": False, "strip_accents": True}),
      WordRules(lower_case=False),
    ),
    (
      dict(tokenizer_config={"tokenize_chinese_chars": False, "strip_accents": None}),
      WordRules(split_cjk=False),
    ),
    (
      dict(tokenizer={"normalizer": NORMALIZER | {"lowercase": False}}),
      WordRules(lower_case=False, strip_accents=False),
    ),
    (
      dict(
        tokenizer={
          "normalizer": NORMALIZER
          | {"strip_accents": False, "handle_chinese_chars": False, "clean_text": False}
        }
      ),
      WordRules(strip_accents=False, split_cjk=False, clean_text=False),
    ),
    (dict(tokenizer={"normalizer": None}), WordRules(False, False, False, False)),
    (
      dict(
        tokenizer={"normalizer": NORMALIZER | {"lowercase": False}},
        tokenizer_config={"do_lower_case": True},
      ),
      WordRules(),
    ),
    (
      dict(tokenizer={"model": MODEL | {"vocab": {}, "max_input_chars_per_word": 200}}),
      WordRules(max_word_chars=200),
    ),
    (
      dict(tokenizer_config={"do_lower_case": False}, sentence_bert_config={"do_lower_case": True}),
      WordRules(strip_accents=False),
    ),
    # nothing else says so
    (
      dict(pieces=[*PIECES, "The"]),
      WordRules(lower_case=False, strip_accents=False),
    ),
  ],
  ids=[
    "nothing",
    "cased",
    "accents kept",
    "accents stripped, cased",
    "Chinese together",
    "tokenizer.json: cased",
    "tokenizer.json: all",
    "tokenizer.json: no normalizer",
    "the config wins",
    "long words",
    "lower-cased before",
    "upper-case pieces",
  ],
)
def test_rules(files, wanted, tmp_path):
  folder = folder_of(tmp_path, **files)
  assert read(folder).rules == read(f"{folder}/vocab.txt").rules == wanted


def test_rules_of_our_own_artifacts(tmp_path):
  rules = WordRules(lower_case=False, split_cjk=False)
  with publishing.publish(str(tmp_path / "A"), kind="passages", config={}, inputs={}) as staged:
    vocabularies.write(staged.path, PIECES)
    staged.details = {"tokenizer": {**rules.__dict__}}
  found = read(str(tmp_path / "A"))
  assert (list(found.pieces), found.rules) == (PIECES, rules)
  assert found.fingerprint != read(folder_of(tmp_path)).fingerprint, (
    "the same pieces with other rules are another vocabulary"
  )
  assert (
    found.with_case(None) == found.with_case(False) == found
    and found.with_case(True).rules.lower_case
  )


@pytest.mark.parametrize(
  "files, words",
  [
    (
      dict(tokenizer={"model": {"type": "BPE", "vocab": {}, "merges": []}}),
      "has the model 'BPE'; wanted 'WordPiece'",
    ),
    (dict(tokenizer={"model": {"type": "Unigram", "vocab": []}}), "has the model 'Unigram'"),
    (
      dict(tokenizer={"model": MODEL | {"vocab": {}, "continuing_subword_prefix": "@@"}}),
      "prefix of pieces inside a word '@@'",
    ),
    (
      dict(tokenizer={"model": MODEL | {"vocab": {}, "unk_token": "<unk>"}}),
      "unknown token '<unk>'",
    ),
    (
      dict(tokenizer={"normalizer": {"type": "NFKC"}}),
      "normalizer 'NFKC'; wanted 'BertNormalizer'",
    ),
    (dict(tokenizer={"pre_tokenizer": {"type": "Metaspace"}}), "pre-tokenizer 'Metaspace'"),
    (
      dict(tokenizer_config={"tokenizer_class": "BertJapaneseTokenizer"}),
      "says BertJapaneseTokenizer",
    ),
    (
      dict(tokenizer_config={"tokenizer_class": "XLMRobertaTokenizerFast"}),
      "says XLMRobertaTokenizerFast",
    ),
    (dict(tokenizer_config={"do_basic_tokenize": False}), "do_basic_tokenize=false"),
    (dict(tokenizer_config={"pad_token": "<pad>"}), "has pad_token '<pad>'; BERT's is '\\[PAD\\]'"),
    (dict(special_tokens_map={"mask_token": {"content": "<mask>"}}), "has mask_token '<mask>'"),
    (dict(pieces=PIECES[1:]), r"lacks \[PAD\]; a BERT vocabulary has all of"),
    (dict(pieces=None), "no vocabulary at .*give a BERT vocab.txt"),
    (
      dict(
        modules=[
          {"type": "sentence_transformers.models.WordEmbeddings", "path": "0_WordEmbeddings"}
        ]
      ),
      "consists of WordEmbeddings",
    ),
    (dict(modules={"no": "list"}), "is not a list of modules"),
    (
      dict(pieces=[*PIECES[:-2], "tower", "##s"], tokenizer={}),
      "line 7 of .*vocab.txt' is 'tower', but tokenizer.json beside it has '##s' there",
    ),
    (dict(pieces=None, tokenizer={"model": {"type": "WordPiece"}}), "not in the layout of Hugging"),
    (dict(tokenizer={"added_tokens": None}), "not in the layout of Hugging Face"),
    (dict(added_tokens={"[X]": "8"}), "not in the layout of Hugging Face"),
    (dict(config={"vocab_size": "8"}), "not in the layout of Hugging Face"),
    (dict(info={"tokenizer": {"lowercase": True}}), "not in the layout of Hugging Face"),
  ],
)
def test_what_is_refused(files, words, tmp_path):
  with pytest.raises(VocabularyError, match=words):
    read(folder_of(tmp_path, **files))


def test_files_that_are_damaged(tmp_path):
  (tmp_path / "vocab.txt").write_bytes("\n".join(PIECES).encode("utf-16"))
  with pytest.raises(VocabularyError, match="is not UTF-8"):
    read(str(tmp_path))
  folder_of(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case":')
  with pytest.raises(VocabularyError, match="tokenizer_config.json' is not a JSON object"):
    read(str(tmp_path))


@pytest.mark.parametrize("name", ["0_Transformer", "0_BERT"])
def test_the_older_layout_of_sentence_transformers(name, tmp_path):
  (tmp_path / name).mkdir()
  folder_of(tmp_path / name, tokenizer_config={"do_lower_case": False})
  modules = [
    {"type": f"sentence_transformers.models.{name[2:]}", "path": name},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
  ]
  found = read(folder_of(tmp_path, pieces=None, modules=modules))
  assert (list(found.pieces), found.rules) == (PIECES, WordRules.for_case(False))


def with_vocab(**pieces) -> dict:
  return {"model": MODEL | {"vocab": {piece: row for row, piece in enumerate(PIECES)} | pieces}}


@pytest.mark.parametrize(
  "files, message",
  [
    ({"config": {"vocab_size": 10**12}}, "vocab_size=1000000000000; at most"),
    ({"config": {"vocab_size": 10**40}}, "not a JSON object: it has an integer of over 40 digits"),
    ({"tokenizer_config": {"model_max_length": 10**4000}}, "over 40 digits"),
    ({"tokenizer": {"model": MODEL | {"vocab": {"[X]": 10**4000}}}}, "over 40 digits"),
    ({"config": "text"}, "is not a JSON object"),
    ({"tokenizer_config": {"tokenizer_class": "x" * 10_000}}, "says xxx"),
    ({"added_tokens": {"[X]": 10**9}}, "it is not a vocabulary"),
    ({"added_tokens": {"[X]": 8.0}}, "not integers"),
    ({"tokenizer": {"model": MODEL | {"max_input_chars_per_word": 10**9}}}, "wanted 1 to"),
    ({"tokenizer": {"model": MODEL | {"max_input_chars_per_word": [1]}}}, "wanted 1 to"),
    ({"tokenizer": {"model": MODEL | {"unk_token": "\x1b" + "x" * 10_000}}}, "wanted"),
    ({"tokenizer": with_vocab(**{"two\nlines": 8}), "pieces": None}, "which is not a line"),
    ({"tokenizer": with_vocab(**{"half\ud800": 8}), "pieces": None}, "which is not a line"),
    ({"tokenizer": with_vocab(more=True), "pieces": None}, "not integers"),
    ({"modules": [{"type": "a.Transformer", "path": "../../etc"}]}, "outside of it"),
    ({"modules": [{"type": "a.Transformer", "path": "/etc"}]}, "outside of it"),
  ],
)
def test_files_that_lie(files, message, tmp_path):
  with pytest.raises(VocabularyError, match=message) as caught:
    read(folder_of(tmp_path, **files))
  assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "modules.json"])
@pytest.mark.parametrize(
  "text", ["[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, '{"a": ' + "9" * 5000 + "}", "5"]
)
def test_json_that_is_none(name, text, tmp_path):
  folder = folder_of(tmp_path)
  (tmp_path / name).write_text(text)
  with pytest.raises(VocabularyError, match="is not a JSON"):
    read(folder)


def test_more_lines_than_any_vocabulary(tmp_path):
  (tmp_path / "vocab.txt").write_bytes(b"\n" * 5_000_000)
  with pytest.raises(VocabularyError, match="has over 4,000,000 lines"):
    read(str(tmp_path))
