"""Every kind of file that this project reads: a valid example, ways to damage it, its reader."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import pathlib
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping

import keras_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pypdf
import tensorflow as tf

from beam_jobs import corpus, sources
from benchmarks.attack.file_mutations import (
  damaged_bytes,
  damaged_index,
  damaged_json,
  damaged_lines,
  damaged_pickle,
)
from realm_tf import block_records, import_checkpoint, prepare_questions
from realm_tf.checkpoints import published
from realm_tf.corpus import vocabularies
from realm_tf.examples import questions
from realm_tf.spans import conll
from realm_tf.storage import artifacts, publishing

FIXTURES = pathlib.Path(__file__).parents[2] / "testdata" / "transformers_realm"
Damage = Callable[[bytes, random.Random], bytes]


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of file, with its reader.

  Attributes:
    make: writes a valid example to a new folder.
    damage: name of a file in it -> ways to damage it.
    read: reads the folder.
    weight: how often it is tried; readers that build a model are slow.
  """

  make: Callable[[pathlib.Path], object]
  damage: Mapping[str, tuple[Damage, ...]]
  read: Callable[[pathlib.Path], object]
  weight: int = 4


# ========================================================================================== corpora

_TEXT = "The Gorneth flows into the sea near Talvik. It rises in the north.\n"
_ROWS = [{"title": f"River {number}", "text": _TEXT * 3} for number in range(4)]
_LINES = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
_DOCS = "".join(
  f'<doc id="{number}" url="https://x?curid={number}" title="River {number}">\n'
  f"River {number}\n\n{_TEXT}\n</doc>\n"
  for number in range(4)
).encode()


_TABLE = pa.table(
  {
    "id": ["0", "1", "2", "3"],
    "title": [row["title"] for row in _ROWS],
    "text": pa.array([row["text"] for row in _ROWS]).dictionary_encode(),
  }
)
_HTML = (
  "<!DOCTYPE html><html><head><title>Rivers</title><style>p {}</style></head><body><nav>x</nav>"
  f"<h1>North</h1><p>{_TEXT}</p><h2>Sea</h2><table><tr><th>a<td>b</table><ul><li>{_TEXT}</ul>"
  f"<pre>{_TEXT}</pre><script>1 < 2</script></body></html>\n"
).encode()
_MARKDOWN = (
  f"---\ntitle: Rivers\n---\n# North\n\n{_TEXT}\n> - *a* [b](c) `d`\n\n## Sea\n\n"
  f"| a | b |\n|---|---|\n| c | d |\n\n```\n{_TEXT}```\n\n<b>e</b>\n"
).encode()


def _parquet() -> bytes:
  with io.BytesIO() as file:
    pq.write_table(_TABLE, file, row_group_size=2, compression="zstd")
    return file.getvalue()


def _arrow(new: Callable, **options) -> bytes:
  with io.BytesIO() as file:
    with new(file, _TABLE.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
      writer.write_table(_TABLE, max_chunksize=2)
    return file.getvalue()


def _pdf() -> bytes:
  """Returns a PDF file of two pages, the second one compressed."""
  name = pypdf.generic.NameObject
  writer = pypdf.PdfWriter()
  font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
  fonts = _dictionary({"/F": _dictionary({key: name(value) for key, value in font.items()})})
  for number in range(2):
    page = writer.add_blank_page(600, 800)
    page[name("/Resources")] = _dictionary({"/Font": fonts})
    contents = pypdf.generic.DecodedStreamObject()
    contents.set_data(f"BT /F 12 Tf 50 700 Td (Page {number}. {_TEXT.strip()}) Tj ET".encode())
    page[name("/Contents")] = contents.flate_encode() if number else contents
  with io.BytesIO() as file:
    writer.write(file)
    return file.getvalue()


def _dictionary(entries: Mapping) -> pypdf.generic.DictionaryObject:
  return pypdf.generic.DictionaryObject(
    {pypdf.generic.NameObject(key): value for key, value in entries.items()}
  )


def _nested(data: bytes, rng: random.Random) -> bytes:
  """Inserts what is deeply nested, or repeated where a parser may look for its end."""
  unit = rng.choice(
    (b"<div>", b"<table><tr><td>", b"<b>", b"<!--", b"<a b='", b"> ", b"- ", b"[", b"![", b"*a **")
  )
  at = rng.randrange(len(data) + 1)
  return data[:at] + unit * rng.choice((10, 300, 10_000)) + data[at:]


def _read_corpus(folder: pathlib.Path) -> int:
  found = 0
  for chunk in sources.split_into_chunks(sources.find_sources(str(folder), format="auto")):
    for article in corpus.Articles(chunk):
      try:
        found += len(corpus.sentences_of(article))
      except corpus.Rejected:
        found += 1
  return found


def _corpus(name: str, data: bytes, *damage: Damage) -> Kind:
  return Kind(lambda folder: _write(folder / name, data), {name: damage}, _read_corpus)


def _write(path: pathlib.Path, data: bytes) -> None:
  path.write_bytes(data)


def _in_header(data: bytes, rng: random.Random) -> bytes:
  """Inserts a <doc> whose header has a pattern that may be slow to match."""
  unit = rng.choice((b'<doc  title="', b'a="" ', b'" a="', b'title=" "', b"<doc ", b' x="'))
  return b"<doc " + unit * rng.choice((10, 300, 20_000)) + b'title="x">\ny\n</doc>\n' + data


# ======================================================================================== questions

_QUESTIONS = [{"question": "where does it flow", "answer": ["the sea", "a lake"]}] * 3
_EXPRESSIONS = [
  {"question": "in which year", "answer": [r"19\d{2}|(eighteen|18)\s?12"], "regex": True}
] * 3
_CLOZES = [{"text": "It flows to the sea.", "span": [16, 19], "answer": ["sea"]}] * 3


def _lines(rows) -> bytes:
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _questions(rows, read: Callable) -> Kind:
  data = _lines(rows)
  return Kind(
    lambda folder: _write(folder / "q.jsonl", data),
    {"q.jsonl": (damaged_lines, damaged_lines, damaged_bytes)},
    lambda folder: len(read(str(folder / "q.jsonl"))),
  )


_RAW = {
  "nq": _lines(
    [
      {
        "question_text": "who",
        "document_text": "The sea is <B> deep",
        "annotations": [{"short_answers": [{"start_token": 1, "end_token": 2}]}],
      },
      {
        "question_text": "what",
        "document_html": "<P>The sea</P> is",
        "annotations": [
          {"short_answers": [{"start_token": 1, "end_token": 2, "start_byte": 3, "end_byte": 10}]}
        ],
      },
    ]
  ),
  "webquestions": _lines(
    [{"utterance": "who", "targetValue": '(list (description Jamaica) (description "An isle"))'}]
    * 2
  ),
  "curatedtrec": b"1\t2\twhen was it\t19\\d{2}\n1\t2\twhere is it\tby (the )?sea\n",
  "squad": json.dumps(
    {
      "data": [
        {
          "title": "Sea",
          "paragraphs": [{"qas": [{"question": "who", "answers": [{"text": "a sea"}]}]}],
        }
      ]
    }
  ).encode(),
}


def _published_questions(name: str) -> Kind:
  return Kind(
    lambda folder: _write(folder / "raw", _RAW[name]),
    {"raw": (damaged_lines, damaged_json, damaged_bytes)},
    lambda folder: prepare_questions.prepare(name, str(folder / "raw"), str(folder / "out")),
  )


_CONLL = b"-DOCSTART- O\n\nThe O\nGorneth B-LOC\nflows O\n\nAda B-PER\nLov I-PER\n. O\n\n" * 3

# ====================================================================================== checkpoints


def _copied(name: str) -> Callable[[pathlib.Path], None]:
  def make(folder: pathlib.Path) -> None:
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    if path := next(folder.glob("block_records.npy"), None):
      path.unlink()

  return make


def _damaged_header(data: bytes, rng: random.Random) -> bytes:
  """Damages the header of a safetensors file, which is its length followed by JSON."""
  (size,) = struct.unpack("<Q", data[:8])
  header = damaged_json(data[8 : 8 + size], rng)
  return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _not_finite(data: bytes, rng: random.Random) -> bytes:
  at = len(data) - 4 * rng.randrange(1, 200)
  return data[:at] + struct.pack("<f", rng.choice((np.nan, np.inf))) + data[at + 4 :]


def _damaged_part(data: bytes, rng: random.Random) -> bytes:
  """Damages or compresses the pickle in a PyTorch file; the archive around it stays intact."""
  packed, out = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
  how = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
  with zipfile.ZipFile(out, "w", how) as archive:
    for info in packed.infolist():
      part = packed.read(info)
      if info.filename.endswith("data.pkl"):
        part = damaged_pickle(part, rng)
        part += bytes(rng.choice((0, 0, 1 << 24)))
      archive.writestr(info.filename, part)
  return out.getvalue()


def _damaged_records(data: bytes, rng: random.Random) -> bytes:
  """Damages a block_records.npy, which is a header of 128 bytes and a pickle."""
  return data[:128] + damaged_pickle(data[128:], rng)


def _make_tensorflow(folder: pathlib.Path) -> None:
  tensors = published.find(str(FIXTURES / "bert")).tensors
  names = {
    name.replace("layer.", "layer_").replace(".", "/"): tensor.read()
    for name, tensor in tensors.items()
  }
  names = {
    name.replace("_embeddings/weight", "_embeddings")
    .replace("LayerNorm/weight", "LayerNorm/gamma")
    .replace("LayerNorm/bias", "LayerNorm/beta")
    .replace("predictions/bias", "predictions/output_bias"): value
    for name, value in names.items()
  }
  names = {
    name.removesuffix("weight") + "kernel" if name.endswith("/weight") else name: (
      value.T if name.endswith("/weight") else value
    )
    for name, value in names.items()
  }
  tf.raw_ops.SaveV2(
    prefix=str(folder / "model.ckpt-1"),
    tensor_names=list(names),
    shape_and_slices=[""] * len(names),
    tensors=list(names.values()),
  )
  shutil.copy(FIXTURES / "bert" / "vocab.txt", folder)
  _write(folder / "bert_config.json", b'{"num_attention_heads": 4, "hidden_size": 16}')


def _make_preset(folder: pathlib.Path) -> None:
  pieces = (FIXTURES / "bert" / "vocab.txt").read_text().split("\n")[:-1]
  bert = keras_hub.models.BertBackbone(
    vocabulary_size=len(pieces),
    num_layers=1,
    num_heads=2,
    hidden_dim=16,
    intermediate_dim=24,
    max_sequence_length=48,
  )
  bert.save_to_preset(str(folder))
  tokenizer = keras_hub.models.BertTokenizer(vocabulary=pieces, lowercase=True)
  tokenizer.save_to_preset(str(folder))


def _read_checkpoint(folder: pathlib.Path) -> list[str]:
  """Opens a checkpoint and builds its models, as import_checkpoint does before it writes."""
  source = published.find(str(folder))
  vocabulary = import_checkpoint.find_vocabulary([source], None, None)
  source = source.with_pad_first(vocabulary.pad_row)
  return list(import_checkpoint.load_models([source]))


def _make_tokenizer(folder: pathlib.Path) -> None:
  pieces = (FIXTURES / "bert" / "vocab.txt").read_text().split("\n")[:-1]
  told = {
    "normalizer": {"type": "BertNormalizer", "lowercase": True, "strip_accents": None},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "added_tokens": [{"content": "[X]", "id": len(pieces)}],
    "model": {
      "type": "WordPiece",
      "unk_token": "[UNK]",
      "continuing_subword_prefix": "##",
      "max_input_chars_per_word": 100,
      "vocab": {piece: row for row, piece in enumerate(pieces)},
    },
  }
  _write(folder / "tokenizer.json", json.dumps(told).encode())
  config = {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}
  _write(folder / "tokenizer_config.json", json.dumps(config).encode())
  _write(folder / "config.json", json.dumps({"vocab_size": len(pieces) + 1}).encode())


def _make_artifact(folder: pathlib.Path) -> None:
  with publishing.publish(str(folder / "P"), kind="passages", config={"a": 1}, inputs={}) as staged:
    vocabularies.write(staged.path, (FIXTURES / "bert" / "vocab.txt").read_text().split("\n")[:-1])
    staged.details = {"tokenizer": {"lower_case": True, "max_word_chars": 100}}


def _read_artifact(folder: pathlib.Path) -> int:
  path = str(folder / "P")
  artifacts.read_info(path, kind="passages")
  artifacts.is_current(path, kind="passages", config={"a": 1}, inputs={})
  return len(vocabularies.read(path).pieces)


_JSON = (damaged_json, damaged_json, damaged_json, damaged_bytes)

KINDS: dict[str, Kind] = {
  "corpus of lines": _corpus("a.jsonl", _LINES, damaged_lines, damaged_bytes),
  "corpus of a list": _corpus("a.json", json.dumps(_ROWS, indent=1).encode(), *_JSON),
  "corpus of WikiExtractor": _corpus("wiki_00", _DOCS, damaged_bytes, _in_header),
  "corpus of text": _corpus("a.txt", _TEXT.encode() * 5, damaged_bytes),
  "corpus in gzip": _corpus("a.jsonl.gz", gzip.compress(_LINES, mtime=0), damaged_bytes),
  "corpus in bz2": _corpus("a.jsonl.bz2", bz2.compress(_LINES), damaged_bytes),
  "corpus in xz": _corpus("a.jsonl.xz", lzma.compress(_LINES), damaged_bytes),
  "corpus in UTF-16": _corpus("a.json", _LINES.decode().encode("utf-16"), damaged_bytes),
  "corpus in Parquet": _corpus("a.parquet", _parquet(), damaged_bytes),
  "corpus in Arrow": _corpus("a.arrow", _arrow(pa.ipc.new_file), damaged_bytes),
  "corpus in a stream of Arrow": _corpus(
    "a.arrow", _arrow(pa.ipc.new_stream, compression="lz4"), damaged_bytes
  ),
  "corpus of HTML": _corpus("a.html", _HTML, damaged_bytes, _nested),
  "corpus of Markdown": _corpus("a.md", _MARKDOWN, damaged_bytes, _nested),
  "corpus in PDF": _corpus("a.pdf", _pdf(), damaged_bytes),
  "questions": _questions(_QUESTIONS, questions.read_questions),
  "questions with expressions": _questions(_EXPRESSIONS, questions.read_questions),
  "clozes": _questions(_CLOZES, questions.read_clozes),
  **{f"published questions {name}": _published_questions(name) for name in _RAW},
  "CoNLL": Kind(
    lambda folder: _write(folder / "x.conll", _CONLL),
    {"x.conll": (damaged_bytes,)},
    lambda folder: len(conll.read(str(folder / "x.conll"))),
  ),
  "vocab.txt": Kind(
    lambda folder: shutil.copy(FIXTURES / "bert" / "vocab.txt", folder),
    {"vocab.txt": (damaged_bytes,)},
    lambda folder: len(vocabularies.read(str(folder)).pieces),
  ),
  "tokenizer.json": Kind(
    _make_tokenizer,
    {"tokenizer.json": _JSON, "tokenizer_config.json": _JSON, "config.json": _JSON},
    lambda folder: len(vocabularies.read(str(folder)).pieces),
  ),
  "info.json": Kind(_make_artifact, {"P/info.json": _JSON}, _read_artifact, weight=2),
  "block_records.npy": Kind(
    lambda folder: shutil.copy(FIXTURES / "openqa" / "block_records.npy", folder),
    {"block_records.npy": (damaged_bytes, _damaged_records, _damaged_records)},
    lambda folder: len(block_records.read(str(folder / "block_records.npy"))),
    weight=8,
  ),
  "safetensors": Kind(
    _copied("embedder"),
    {"model.safetensors": (_damaged_header, _damaged_header, _not_finite, damaged_bytes)},
    _read_checkpoint,
  ),
  "PyTorch": Kind(
    _copied("reader"),
    {"pytorch_model.bin": (_damaged_part, _damaged_part, _not_finite, damaged_bytes)},
    _read_checkpoint,
  ),
  "Hugging Face folder": Kind(
    _copied("reader"), {"config.json": _JSON, "tokenizer_config.json": _JSON}, _read_checkpoint, 2
  ),
  "TensorFlow checkpoint": Kind(
    _make_tensorflow,
    {
      "model.ckpt-1.index": (damaged_index, damaged_index, damaged_bytes),
      "model.ckpt-1.data-00000-of-00001": (_not_finite, damaged_bytes),
      "bert_config.json": _JSON,
    },
    _read_checkpoint,
  ),
  "KerasHub preset": Kind(
    _make_preset,
    {
      "config.json": _JSON,
      "tokenizer.json": _JSON,
      "assets/tokenizer/vocabulary.txt": (damaged_bytes,),
      "model.weights.h5": (damaged_bytes,),
    },
    _read_checkpoint,
    2,
  ),
}


def damage(kind: Kind, folder: pathlib.Path, rng: random.Random) -> str:
  """Damages one file of a valid example; returns a description for the report."""
  name = rng.choice(list(kind.damage))
  how = rng.choice(kind.damage[name])
  path = folder / name
  path.write_bytes(how(path.read_bytes(), rng))
  return f"{name}: {how.__name__.strip('_')}"
