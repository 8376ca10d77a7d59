"""Passages: what is retrieved. Blocking of articles, the one record codec, and the table that trainers gather from."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import tensorflow as tf

from realm_tf import artifacts, paths
from realm_tf.tokenization import Tokenizer

KIND = "passages"
_OPTIONS = tf.io.TFRecordOptions(compression_type="GZIP")
SPECIAL_TOKENS = 3  # [CLS] title [SEP] text [SEP]
_ROWS_AT_ONCE = 4096  # records
Row = TypeVar("Row")  # a frozen dataclass whose fields are str, int and Sequence[int]


@dataclasses.dataclass(frozen=True)
class Passage:
  """A title and some whole sentences of one article.

  Attributes:
    number: row in passages, embeddings and index.
    title, text: as written; sentences are joined by one space.
    title_ids, text_ids: word pieces.
    token_starts, token_ends: byte offsets of each text word piece in the UTF-8 text.
    sentence_starts, sentence_ends: byte offsets of each sentence in the UTF-8 text.
  """

  number: int
  title: str
  text: str
  title_ids: Sequence[int]
  text_ids: Sequence[int]
  token_starts: Sequence[int]
  token_ends: Sequence[int]
  sentence_starts: Sequence[int]
  sentence_ends: Sequence[int]

  @property
  def uid(self) -> str:
    """SHA-1 of title and text: what the passage is known by in any corpus."""
    return uid_of(self.title, self.text)


def uid_of(title: str, text: str) -> str:
  return hashlib.sha1(f"{title}\n{text}".encode()).hexdigest()


def short_uids(titles: Iterable[bytes], texts: Iterable[bytes]) -> np.ndarray:
  """The first 64 bits of each passage's uid: [N] uint64.

  Two different passages share them in one of 200,000 corpora of 13 million.
  """
  digests = (
    hashlib.sha1(b"%b\n%b" % pair).digest()[:8] for pair in zip(titles, texts, strict=True)
  )
  return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def block_sentences(sentences: Sequence[str], lengths: Sequence[int], *, title_tokens: int, max_tokens: int) -> list[list[str]]:
  """Greedily fills blocks with whole sentences (ORQA's rule).

  Args:
    sentences: one article's sentences in order.
    lengths: word pieces of each.
    title_tokens: word pieces of the title.
    max_tokens: most word pieces of `[CLS] title [SEP] text [SEP]`; a sentence longer than the room left becomes a block of
      its own that is too long: split such sentences before.

  Returns:
    Lists of sentences, no overlap, none lost.
  """
  room = max_tokens - title_tokens - SPECIAL_TOKENS
  blocks, used = [], room + 1
  for sentence, length in zip(sentences, lengths, strict=True):
    if used + length > room:
      blocks.append([])
      used = 0
    blocks[-1].append(sentence)
    used += length
  return blocks


def make_passages(tokenizer: Tokenizer, titled_blocks: Sequence[tuple[str, Sequence[str]]], numbers: Iterable[int]) -> list[Passage]:
  """Tokenises (title, sentences) pairs into passages, all in one call of the tokenizer."""
  titles = [title for title, _ in titled_blocks]
  texts = [" ".join(sentences) for _, sentences in titled_blocks]
  title_ids = tokenizer(tf.constant(titles, tf.string)).to_list()
  tokens = tokenizer.with_offsets(tf.constant(texts, tf.string))
  ids, starts, ends = (part.to_list() for part in (tokens.ids, tokens.starts, tokens.ends))
  made = []
  for i, (number, (title, sentences)) in enumerate(zip(numbers, titled_blocks, strict=True)):
    sizes = [len(sentence.encode()) for sentence in sentences]
    sentence_starts = [sum(sizes[:n]) + n for n in range(len(sizes))]
    made.append(Passage(
        number=number, title=title, text=texts[i], title_ids=title_ids[i], text_ids=ids[i], token_starts=starts[i],
        token_ends=ends[i], sentence_starts=sentence_starts,
        sentence_ends=[start + size for start, size in zip(sentence_starts, sizes)]))
  return made


# ----------------------------------------------------------------------------------------------------------- records


@dataclasses.dataclass(frozen=True)
class Sentence:
  """One sentence of a passage with its salient spans: what `annotate_spans` writes.

  Attributes:
    passage: number of the passage that it stands in.
    text: as written.
    ids: word pieces.
    token_starts, token_ends: byte offsets of each word piece in the UTF-8 text.
    span_starts, span_ends: word-piece range [start, end) of each salient span, in order of start.
    span_phrases: what `holders.Holders` knows each span by; 0 where the passage's title holds the
      span too, or it has no word.
  """

  passage: int
  text: str
  ids: Sequence[int]
  token_starts: Sequence[int]
  token_ends: Sequence[int]
  span_starts: Sequence[int]
  span_ends: Sequence[int]
  span_phrases: Sequence[int]

  @property
  def span_texts(self) -> list[str]:
    """Each salient span as written."""
    data = self.text.encode()
    return [
      data[self.token_starts[start] : self.token_ends[end - 1]].decode(errors="ignore")
      for start, end in zip(self.span_starts, self.span_ends, strict=True)
    ]


def sentences_of(text: str, starts: Sequence[int], ends: Sequence[int]) -> list[str]:
  """A passage's sentences, by their byte offsets in its text."""
  data = text.encode()
  return [data[start:end].decode() for start, end in zip(starts, ends)]


def encode(row: Row) -> bytes:
  """A row as one serialised tf.train.Example: strings as bytes, integers as int64 lists."""
  features = {}
  for field in dataclasses.fields(row):
    value = getattr(row, field.name)
    if field.type is str:
      features[field.name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))
    else:
      features[field.name] = tf.train.Feature(int64_list=tf.train.Int64List(value=[value] if field.type is int else value))
  return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString(deterministic=True)


def decode(record: bytes, row_type: type[Row]) -> Row:
  """The inverse of `encode`."""
  feature, values = tf.train.Example.FromString(record).features.feature, {}
  for field in dataclasses.fields(row_type):
    if field.type is str:
      values[field.name] = feature[field.name].bytes_list.value[0].decode()
    else:
      integers = list(feature[field.name].int64_list.value)
      values[field.name] = integers[0] if field.type is int else integers
  return row_type(**values)


def shard_paths(folder: str, kind: str) -> list[str]:
  """The record files of one kind in a folder (complete or being written), in order of their rows.

  Args:
    folder: of passages or of spans.
    kind: what the rows are: "passages", "spans" or "holders".
  """
  return paths.listed(folder, kind + r"-\d{5,}-of-\d{5,}\.tfrecord\.gz")


def shard_name(kind: str, shard: int, num_shards: int) -> str:
  return f"{kind}-{shard:05d}-of-{num_shards:05d}.tfrecord.gz"


def write_shard(path: str, rows: Iterable[Row]) -> None:
  """Writes one record file whole (under a temporary name, then renamed)."""
  folder, name = os.path.split(path)
  partial = os.path.join(folder, f".partial-{os.getpid()}-{name}")
  with tf.io.TFRecordWriter(partial, _OPTIONS) as writer:
    for row in rows:
      writer.write(encode(row))
  artifacts.gfile.rename(partial, path, overwrite=True)


def read_shard(path: str, row_type: type[Row]) -> Iterator[Row]:
  """The rows of one record file, in order."""
  for record in tf.data.TFRecordDataset(path, compression_type="GZIP").as_numpy_iterator():
    yield decode(record, row_type)


def read_columns(shards: Sequence[str], features: Mapping) -> Iterator[dict]:
  """Some columns of record files' rows, of which few are in memory at once.

  Args:
    shards: paths of record files.
    features: name -> how `tf.io.parse_example` reads it.

  Yields:
    Name -> tensor of the next rows.
  """
  records = tf.data.TFRecordDataset(shards, compression_type="GZIP").batch(_ROWS_AT_ONCE)
  parsed = records.map(lambda batch: tf.io.parse_example(batch, features))
  yield from parsed.prefetch(1)


def read_uids(folder: str) -> np.ndarray:
  """`short_uids` of the passages of a complete folder."""
  features = {name: tf.io.FixedLenFeature([], tf.string) for name in ("title", "text")}
  columns = read_columns(shard_paths(folder, KIND), features)
  return np.concatenate([short_uids(rows["title"].numpy(), rows["text"].numpy()) for rows in columns])


# ------------------------------------------------------------------------------------------------------------- table


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Rows of different lengths in one flat array: row i is `values[splits[i]:splits[i + 1]]`."""

  values: np.ndarray
  splits: np.ndarray

  @classmethod
  def of(cls, rows: Iterable[Sequence[int]], dtype) -> "Ragged":
    arrays = [np.asarray(row, dtype) for row in rows]
    splits = np.concatenate([[0], np.cumsum([len(row) for row in arrays])]).astype(np.int64)
    return cls(np.concatenate(arrays) if arrays else np.zeros([0], dtype), splits)

  def __len__(self) -> int:
    return len(self.splits) - 1

  def __getitem__(self, row: int) -> np.ndarray:
    return self.values[self.splits[row]:self.splits[row + 1]]

  def tensor(self) -> tf.RaggedTensor:
    """All rows as a ragged int32 tensor."""
    return self.gather(np.arange(len(self)))

  def gather(self, rows) -> tf.RaggedTensor:
    """Rows ([N] int) as a ragged int32 tensor [N, None]."""
    rows = np.asarray(rows)
    starts, sizes = self.splits[rows], self.splits[rows + 1] - self.splits[rows]
    splits = np.concatenate([[0], np.cumsum(sizes)])
    at = np.arange(splits[-1]) + np.repeat(starts - splits[:-1], sizes)
    return tf.RaggedTensor.from_row_splits(self.values[at].astype(np.int32), splits, validate=False)


@dataclasses.dataclass(frozen=True)
class PassageTable:
  """All passages in memory, ids as 16-bit integers where the vocabulary allows.

  Attributes:
    titles, texts: by passage number.
    title_ids, text_ids: word pieces.
    token_starts, token_ends: byte offsets of text word pieces.
    sentence_starts, sentence_ends: byte offsets of sentences in the text.
    folder: where they came from.
  """

  titles: Sequence[str]
  texts: Sequence[str]
  title_ids: Ragged
  text_ids: Ragged
  token_starts: Ragged
  token_ends: Ragged
  sentence_starts: Ragged
  sentence_ends: Ragged
  folder: str

  def __len__(self) -> int:
    return len(self.titles)

  @property
  def fingerprint(self) -> str:
    return artifacts.read_info(self.folder)["fingerprint"]

  @functools.cached_property
  def short_uids(self) -> np.ndarray:
    """`short_uids` of all passages."""
    return short_uids(map(str.encode, self.titles), map(str.encode, self.texts))


def load(folder: str) -> PassageTable:
  """Reads a complete passages folder into memory.

  Raises:
    ArtifactError: not a complete passages folder, or its records are not numbered 0, 1, 2, ....
  """
  info = artifacts.read_info(folder, kind=KIND)
  dtype = np.uint16 if info["vocab_size"] <= 1 << 16 else np.int32
  rows = [row for path in shard_paths(folder, KIND) for row in read_shard(path, Passage)]
  if [passage.number for passage in rows] != list(range(info["counts"]["passages"])):
    raise artifacts.ArtifactError(
        f"{folder!r} holds {len(rows)} passages, its info.json says {info['counts']['passages']}: a record file is missing or "
        "foreign. Make the passages again.")
  ragged = {field.name: Ragged.of((getattr(row, field.name) for row in rows), dtype if field.name.endswith("_ids") else np.int32)
            for field in dataclasses.fields(Passage) if field.type not in (int, str)}
  return PassageTable(titles=[row.title for row in rows], texts=[row.text for row in rows], folder=folder, **ragged)
