"""realm_tf/train_tagger.py and the modules it uses.

Tests CoNLL files, word pieces with tags, scores, training, and the exported tagger.
"""

import json
import os
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import config_dict

from beam_jobs import annotate_spans, make_passages
from quickstart_corpus import generate
from realm_tf import settings, train_tagger
from realm_tf.corpus import passages
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.corpus.vocabularies import SPECIAL, VOCAB
from realm_tf.models import encoder
from realm_tf.models.tagger import Tagger
from realm_tf.spans import conll, span_tagger
from realm_tf.spans.conll import Sentence, Span
from realm_tf.storage import artifacts

# -------------------------------------------------------------------------------------- CoNLL files

WORDS = "Ada Lovelace met Charles Babbage Michael Faraday , of London .".split()
SCHEMES = {
  "IOB1": "I-PER I-PER O I-PER I-PER B-PER I-PER O O I-LOC O",
  "IOB2": "B-PER I-PER O B-PER I-PER B-PER I-PER O O B-LOC O",
  "BIOES": "B-PER E-PER O B-PER E-PER B-PER E-PER O O S-LOC O",
  "BILOU": "B-PER L-PER O B-PER L-PER B-PER L-PER O O U-LOC O",
}


def write(path, text: str) -> str:
  path.write_text(text)
  return str(path)


def named(sentence: Sentence) -> list[tuple[str, str]]:
  return [(sentence.text[span.start : span.end], span.label) for span in sentence.spans]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_the_same_names(scheme, tmp_path):
  rows = zip(WORDS, SCHEMES[scheme].split(), strict=True)
  ((sentence,),) = conll.read(
    write(tmp_path / "a", "".join(f"{word} {tag}\n" for word, tag in rows))
  )[0]
  assert sentence.text == "Ada Lovelace met Charles Babbage Michael Faraday, of London."
  assert named(sentence) == [
    ("Ada Lovelace", "PER"),
    ("Charles Babbage", "PER"),
    ("Michael Faraday", "PER"),
    ("London", "LOC"),
  ]


@pytest.mark.parametrize(
  "tags, expected",
  [
    # IO: no neighbours of one type
    (
      "I-PER I-PER I-LOC O I-LOC",
      [(0, 2, "PER"), (2, 3, "LOC"), (4, 5, "LOC")],
    ),
    ("S-PER S-PER E-PER", [(0, 1, "PER"), (1, 2, "PER"), (2, 3, "PER")]),
    ("B-PER E-PER I-PER O", [(0, 2, "PER"), (2, 3, "PER")]),
    ("O O", []),
  ],
)
def test_names_by_words(tags, expected):
  assert conll.spans_of(tags.split()) == [Span(*one) for one in expected]


def test_columns_documents_and_bad_lines(tmp_path):
  path = tmp_path / "a.conll"
  path.write_bytes(
    b"\xef\xbb\xbf-DOCSTART- -X- O O\r\n\r\n"
    b"EU NNP I-NP B-ORG\r\nrejects VBZ I-VP O\r\nlonely\r\n\r\n"
    b"-DOCSTART- O\nOslo\tB-LOC\nr\xff\xfe B-LOC\nweird PER\nworse Q-PER\n. O\n \n\n\n"
    b"in O\nPeru\tx\tI-LOC"
  )
  documents, dropped = conll.read(str(path))
  assert [[named(sentence) for sentence in document] for document in documents] == [
    [[("EU", "ORG")]],
    [[("Oslo", "LOC")], [("Peru", "LOC")]],
  ]
  assert [[sentence.text for sentence in document] for document in documents] == [
    ["EU rejects"],
    ["Oslo.", "in Peru"],
  ]
  assert dropped == {"no_tag": 1, "not_utf8": 1, "unknown_tag": 2}
  assert [
    named(sentence) for document in conll.read(str(path), types=["LOC"])[0] for sentence in document
  ] == [[], [("Oslo", "LOC")], [("Peru", "LOC")]]


@pytest.mark.parametrize(
  "words, text",
  [
    (
      'He said , " Is n\'t it ( the U.S. ) Bob \'s ? " and " left " .',
      'He said, "Isn\'t it (the U.S.) Bob\'s?" and "left".',
    ),
    ("It cost $ 5 [ sic ] ; that is 10 % !", "It cost $5 [sic]; that is 10%!"),
    ("“ Ja ” , do n’t !", "“Ja”, don’t!"),
  ],
)
def test_detokenised(words, text):
  got, starts = conll.detokenise(words.split())
  assert got == text
  assert [
    got[start : start + len(word)] for start, word in zip(starts, words.split(), strict=True)
  ] == words.split()


def test_documents_are_held_out_whole():
  documents = [
    [Sentence(f"{number}.{row}", ()) for row in range(size)]
    for number, size in enumerate([4, 3, 2, 2, 1])
  ]
  train, held_out = conll.split(documents, 0.25)
  assert (train, held_out) == (documents[:3], documents[3:])  # 3 of 12
  (train,), (held_out,) = conll.split(documents[:1], 0.5)  # a file without documents
  assert (train, held_out) == (documents[0][:2], documents[0][2:])


# ---------------------------------------------------------------------------------- pieces and tags


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
  letters = "abcdefghijklmnopqrstuvwxyz"
  pieces = [
    *SPECIAL,
    *letters,
    *(f"##{letter}" for letter in letters),
    ".",
    ",",
    "-",
    "met",
    "anna",
    "##bel",
  ]
  return Tokenizer(write(tmp_path_factory.mktemp("vocab") / VOCAB, "\n".join(pieces) + "\n"))


def test_pieces_and_tags_of_accents_other_planes_and_long_words(small):
  """Has words of several pieces, letters of 2 and 4 bytes, an unknown word, and a cut name."""
  text = "Annabel Évë met 𝕏 𝕐 Łó, bob-Jo zzzzzzzzzz Anna"
  names = ["Annabel Évë", "𝕏", "Łó", "bob-Jo", "Anna"]
  sentence = Sentence(
    text,
    tuple(
      Span((at := text.rindex(name)), at + len(name), "AB"[n % 2]) for n, name in enumerate(names)
    ),
  )
  length = 24
  pieces = span_tagger.read_pieces(tf.constant([text]), tokenizer=small, length=length)
  ids, starts, ends = (
    part[0].numpy() for part in (pieces.tokens.ids, pieces.tokens.starts, pieces.tokens.ends)
  )
  labels = span_tagger.label_pieces(
    train_tagger.in_bytes(sentence), starts, ~small.continues[ids], types=["A", "B"], length=length
  )
  raw = text.encode()
  shown = [
    (raw[a:b].decode(), *(int(value) for value in values))
    for a, b, *values in zip(
      starts[: length - 2],
      ends[: length - 2],
      labels["bounds"][1:-1],
      labels["types"][1:-1],
      pieces.capitals[0].numpy()[1:-1],
      strict=True,
    )
  ]
  skip, outside, begin, inside = -1, 0, 1, 2
  assert shown == [
    ("Anna", begin, 0, 1),
    ("bel", skip, skip, 0),
    ("É", inside, 0, 1),
    ("v", skip, skip, 0),
    ("ë", skip, skip, 0),
    ("met", outside, skip, 0),
    ("𝕏", begin, 1, 0),
    ("𝕐", outside, skip, 0),
    ("Łó", begin, 0, 1),
    (",", outside, skip, 0),
    ("b", begin, 1, 0),
    ("o", skip, skip, 0),
    ("b", skip, skip, 0),
    ("-", inside, 1, 0),
    ("J", inside, 1, 1),
    ("o", skip, skip, 0),
    ("z", outside, skip, 0),
    *[("z", skip, skip, 0)] * 5,
  ]
  # the last name is beyond the cut
  assert pieces.token_ids.shape == (1, length) and len(ids) > length - 2
  assert all(row[0] == row[-1] == skip and row.shape == (length,) for row in labels.values())


class Scripted(keras.Model):
  """Tags every word piece by its id alone: rows of `table` from id 100 on."""

  table = np.zeros([7, 5], np.float32)  # O, B, I, and types X, Y
  table[0, 0] = 9  # o
  table[1, [1, 3]] = 9, 1  # b: B, rather X
  table[2, [2, 3]] = 9, 1  # i: I, rather X
  table[3, [1, 4]] = 9, 5  # c: B, surely Y
  table[4, [2, 4]] = 9, 5  # j: I, surely Y
  table[6, [1, 3]] = 9, 1  # full stop: B, rather X

  def call(self, inputs, training=False):
    return keras.ops.take(self.table, keras.ops.clip(inputs["token_ids"] - 100, 0, 6), axis=0)


def test_decoding_takes_whole_words_only(tmp_path):
  """Handles any order of bounds that a model may give.

  Later pieces of a word do not count; all words of a name decide its type together.
  """
  pieces = [*SPECIAL, *(f"[unused{n}]" for n in range(95)), *"obicj", "##z", "."]
  tokenizer = Tokenizer(write(tmp_path / VOCAB, "\n".join(pieces) + "\n"))
  tagger = span_tagger.SpanTagger(Scripted(), tokenizer, types=["X", "Y"], length=12)
  texts = [
    "o bz i, i o",
    "i i j jz",
    "",
    "b b i",
    "oz cz iz i c",
    "o o o o o o o o b iz i i",
    "o o o o o o o o o bzzz i",
    "o o o o o o o o o o b",
    "i",
    "o . o .i",
  ]
  got = [
    [(text[span.start : span.end], span.label) for span in spans]
    for text, spans in zip(texts, span_tagger.find_names(tagger, texts), strict=True)
  ]
  # a full stop alone is not a name
  assert got == [
    [("bz i", "X"), ("i", "X")],  # the comma is unknown, so outside
    [("i i j jz", "Y")],
    [],
    [("b", "X"), ("b i", "X")],
    [("cz iz i", "Y"), ("c", "Y")],
    [("b iz", "X")],  # 10 pieces are seen: b is the 9th, the i of iz the last
    [("bzzz", "X")],  # its first piece is the last one seen, and decides for the whole word
    [],
    [("i", "X")],
    [(".i", "X")],
  ]


# ------------------------------------------------------------------------------------------- scores


def test_seqeval_agrees_with_sets():
  rng = np.random.default_rng(0)

  def draw() -> list[Span]:
    bounds = np.sort(rng.choice(30, 8, replace=False))
    return [
      Span(int(a), int(b), "XYZ"[rng.integers(3)])
      for a, b in zip(bounds[::2], bounds[1::2], strict=True)
    ][: rng.integers(5)]

  wanted = [draw() for _ in range(300)]
  found = [
    [span if rng.random() < 0.6 else span._replace(label="X") for span in spans]
    if rng.random() < 0.8
    else draw()
    for spans in wanted
  ]
  got = train_tagger.score(wanted, found)
  for name, keep in {"X": 3, "Y": 3, "Z": 3, "micro avg": 3, train_tagger.MERGED: 2}.items():
    sides = [
      {
        (row, *span[:keep])
        for row, spans in enumerate(side)
        for span in spans
        if name not in "XYZ" or span.label == name
      }
      for side in (wanted, found)
    ]
    right, (gold, given) = len(sides[0] & sides[1]), map(len, sides)
    expected = {
      "precision": right / given,
      "recall": right / gold,
      "f1-score": 2 * right / (gold + given),
      "support": gold,
    }
    assert got[name] == pytest.approx(expected, abs=1e-4), name
  assert 0.3 < got["micro avg"]["f1-score"] < got[train_tagger.MERGED]["f1-score"] < 1


# ----------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """The built-in corpus at 48 entities as passages, and as a CoNLL file.

  Titles are ENTITY, answers VALUE.
  """
  folder = tmp_path_factory.mktemp("tagger")
  generate.generate(folder, seed=0, num_entities=48)
  facts = [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()]
  types = {fact["title"]: "ENTITY" for fact in facts} | {
    fact["answer"]: "VALUE" for fact in facts if fact["answer"][0].isupper()
  }
  names = re.compile(
    "|".join(rf"\b{re.escape(name)}\b" for name in sorted(types, key=len, reverse=True))
  )
  lines = []
  for path in sorted((folder / "knowledge").iterdir()):
    for article in path.read_text().splitlines():
      lines.append("-DOCSTART- O\n")
      for sentence in re.split(r"(?<=\.) ", json.loads(article)["text"]):
        found = {match.start(): match for match in names.finditer(sentence)}
        inside = None
        for word in re.finditer(r"\w+|[^\w\s]", sentence):
          inside = found.get(
            word.start(), inside if inside and word.start() < inside.end() else None
          )
          lines.append(f"{word[0]} {'O' if inside is None else 'I-' + types[inside[0]]}\n")
        lines.append("\n")
  (folder / "a.conll").write_text("".join(lines))
  make_passages.run(str(folder / "knowledge/*"), str(folder / "P"), vocab_size=600)
  return folder


def config_of(corpus, **values) -> config_dict.ConfigDict:
  return config_dict.ConfigDict(
    dict(
      seed=0,
      jit_compile=False,
      vocab=str(corpus / "P"),
      lower_case=True,
      optimizer=dict(bias_correction=True, min_warmup_steps=1),
      encoder=dict(
        preset="",
        num_layers=1,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        max_sequence_length=64,
        dropout=0.0,
        init_std=0.15,
      ),
      tagger=dict(
        dict(
          workdir="",
          train=str(corpus / "a.conll"),
          held_out="0.25",
          types=(),
          length=48,
          steps=120,
          batch_size=16,
          learning_rate=5e-3,
          log_every=40,
          checkpoint_every=40,
        ),
        **values,
      ),
    )
  )


@pytest.fixture(scope="module")
def trained(corpus) -> str:
  return train_tagger.train_tagger(config_of(corpus), str(corpus / "W"))


def test_learns_names_it_never_saw(corpus, trained):
  info = artifacts.read_info(trained, kind="tagger")
  scores = info["scores"]["tagger"]
  assert info["config"]["types"] == ["ENTITY", "VALUE"] and info["counts"] == {
    "train": 144,
    "held_out": 48,
  }
  assert scores["micro avg"]["f1-score"] >= 0.75
  assert scores["any"]["f1-score"] >= 0.85 > info["scores"]["rules"]["any"]["f1-score"] > 0.5


def decoded(
  sentence: str, tokenizer: Tokenizer, model: Tagger, names, length: int
) -> list[tuple[int, int, str]]:
  """Finds the names of one sentence by loops, word by word, from the model's raw scores."""
  tokens = tokenizer.with_offsets([sentence])
  ids, starts, ends = (
    part[0].numpy().tolist() for part in (tokens.ids, tokens.starts, tokens.ends)
  )
  raw = sentence.encode()
  capitals = [
    int(raw[a:b].decode() != raw[a:b].decode().lower()) for a, b in zip(starts, ends, strict=True)
  ]
  packed = [tokenizer.cls_id, *ids[: length - 2], tokenizer.sep_id]
  logits = model(
    {"token_ids": np.array([packed]), "capitals": np.array([[0, *capitals[: length - 2], 0]])}
  )[0].numpy()
  found, before = [], 0
  for at, (piece, start) in enumerate(zip(ids, starts, strict=True)):
    if tokenizer.continues[piece]:
      if before:
        found[-1][1] = ends[at]
      continue
    bound = int(logits[at + 1, :3].argmax()) if at < length - 2 else 0
    types = logits[at + 1, 3:] if bound else None
    if bound == 2 and before:
      found[-1][1], found[-1][2] = ends[at], found[-1][2] + types - np.logaddexp.reduce(types)
    elif bound:
      found.append([start, ends[at], types - np.logaddexp.reduce(types)])
    before = bound
  return [
    (start, end, names[int(votes.argmax())])
    for start, end, votes in found
    if re.search(r"\w", raw[start:end].decode())
  ]


def test_saved_model_is_the_model(corpus, trained):
  """tf.saved_model.load alone gives what loops over the trained weights give.

  The outputs are equal byte for byte, in any batch.
  """
  info = artifacts.read_info(trained)
  model, tokenizer = Tagger(**info["config"]["tagger"]), Tokenizer(str(corpus / "P"))
  train_tagger.TaggerModel(model).load_weights(
    os.path.join(artifacts.latest(str(corpus / "W/checkpoints")), "train.weights.h5")
  )
  table = passages.load(str(corpus / "P"))
  texts = [text.replace("o", "ö").replace(" the ", " 𝕏 ") for text in table.texts[:20]] + [
    "",
    "  ",
    "word",
    table.texts[0] * 4,
  ]
  loaded = tf.saved_model.load(os.path.join(trained, "saved_model"))
  spans = {
    name: column.numpy()
    for name, column in loaded.signatures["serving_default"](sentences=tf.constant(texts)).items()
  }
  got = [[] for _ in texts]
  for row, start, end, label in zip(
    *(spans[name] for name in ("sentence", "start", "end", "label")), strict=True
  ):
    got[row].append((start, end, label.decode()))
  expected = [
    decoded(text, tokenizer, model, info["config"]["types"], info["config"]["length"])
    for text in texts
  ]
  assert got == expected and sum(map(len, got)) > 40 and not got[-4] + got[-3]
  assert {
    name: (column.dtype.kind, column.dtype.itemsize)
    for name, column in spans.items()
    if name != "label"
  } == {"sentence": ("i", 4), "start": ("i", 4), "end": ("i", 4), "score": ("f", 4)}
  assert np.all((spans["score"] > 0.2) & (spans["score"] <= 1))
  one_by_one = [
    [tuple(span) for span in span_tagger.find_names(loaded, [text])[0]] for text in texts
  ]
  together = [[tuple(span) for span in found] for found in span_tagger.find_names(loaded, texts)]
  assert (
    together
    == one_by_one
    == [
      [
        (len(text.encode()[:a].decode()), len(text.encode()[:b].decode()), label)
        for a, b, label in found
      ]
      for text, found in zip(texts, got, strict=True)
    ]
  )


def test_annotate_spans_with_the_tagger(corpus, trained, tmp_path, capsys):
  info = annotate_spans.run(str(corpus / "P"), str(tmp_path / "S"), tagger=trained)
  loaded, found = span_tagger.load(trained), {}
  for path in passages.shard_paths(str(tmp_path / "S"), "spans"):
    for row in passages.read_shard(path, passages.Sentence):
      raw = row.text.encode()
      found[row.text] = [
        raw[row.token_starts[a] : row.token_ends[b - 1]].decode()
        for a, b in zip(row.span_starts, row.span_ends, strict=True)
      ]
  sentences = [
    text
    for path in passages.shard_paths(str(corpus / "P"), "passages")
    for passage in passages.read_shard(path, passages.Passage)
    for text in annotate_spans.sentences_of(passage)
  ]
  expected = {
    text: [text[span.start : span.end] for span in spans]
    for text, spans in zip(sentences, span_tagger.find_names(loaded, sentences), strict=True)
    if spans
  }
  dated = {text for text in found if re.search(r"\d{4}", text)}
  assert {text: spans for text, spans in found.items() if text not in dated} == {
    text: spans for text, spans in expected.items() if text not in dated
  } and len(found) > 100
  assert info["config"]["tagger"] == "tagger"
  assert info["inputs"]["tagger"] == {
    "path": trained,
    "relative": os.path.relpath(trained, tmp_path / "S"),
    "fingerprint": artifacts.read_info(trained)["fingerprint"],
  }
  capsys.readouterr()
  annotate_spans.run(str(corpus / "P"), str(tmp_path / "S"), tagger=trained)
  assert "already made" in capsys.readouterr().out


def test_another_tagger_makes_spans_again(corpus, trained, tmp_path, capsys):
  spans, other = (
    str(tmp_path / "S"),
    train_tagger.train_tagger(config_of(corpus, steps=40), str(tmp_path / "W")),
  )
  made = [
    annotate_spans.run(str(corpus / "P"), spans, tagger=tagger)["fingerprint"]
    for tagger in (trained, other, "rules", trained)
  ]
  assert made[0] == made[3] and len(set(made)) == 3


def test_resumed_training_gives_the_same_tagger(corpus, trained, tmp_path, monkeypatch):
  """Killed after its first checkpoint, and started again."""
  workdir, draw = str(tmp_path / "W"), train_tagger.Examples.batch

  def fails_at_60(self, step, **how):
    if step == 60:
      raise OSError("pulled the plug")
    return draw(self, step, **how)

  monkeypatch.setattr(train_tagger.Examples, "batch", fails_at_60)
  with pytest.raises(OSError, match="pulled the plug"):
    train_tagger.train_tagger(config_of(corpus), workdir)
  assert [
    artifacts.step_of(folder)
    for folder in artifacts.complete_folders(os.path.join(workdir, "checkpoints"))
  ] == [40]
  assert not os.path.exists(os.path.join(workdir, "tagger"))
  monkeypatch.setattr(train_tagger.Examples, "batch", draw)
  again = train_tagger.train_tagger(config_of(corpus), workdir)
  assert artifacts.read_info(again)["fingerprint"] == artifacts.read_info(trained)["fingerprint"]


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
  "values, words",
  [
    (dict(train="absent*.conll"), "no file matches 'absent"),
    (dict(held_out="absent.conll"), "no file matches 'absent.conll'"),
    (dict(held_out="0"), "tagger.held_out='0' gives 0 sentences"),
    (dict(types=("PER",)), "without a name of types PER"),
  ],
)
def test_mistakes_in_data_are_explained(corpus, values, words, tmp_path):
  with pytest.raises(conll.ConllError, match=re.escape(words)):
    train_tagger.train_tagger(config_of(corpus, **values), str(tmp_path))


def test_encoder_that_does_not_fit(corpus):
  config = config_of(corpus, length=65)
  with pytest.raises(
    encoder.EncoderError, match="takes 64 word pieces, but the config asks for 65"
  ):
    start = settings.encoder_start(config.encoder)
    train_tagger.new_tagger(start, Tokenizer(config.vocab), length=65, num_types=3)
