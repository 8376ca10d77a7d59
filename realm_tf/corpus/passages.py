"""Passages, the units of retrieval.

Includes the blocking of articles, the record files, and the table that trainers gather from.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import tensorflow as tf

from realm_tf.corpus import segments
from realm_tf.corpus.segments import Segment
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.corpus.vocabularies import VOCAB
from realm_tf.storage import arrow_files, artifacts, integrity, ownership, paths
from realm_tf.storage.columns import Fixed, Ragged

KIND = "passages"
VERSIONS = "former_versions"  # field of info.json: fingerprints of the corpus before its updates
SPECIAL_TOKENS = 3  # [CLS] title [SEP] text [SEP]
LEAST = "least type"  # of a field whose integers need more than 16 bits (in lists) or 32 bits
_ROWS_AT_ONCE = 1024  # converted together
_UID_BYTES = hashlib.sha1().digest_size


@dataclasses.dataclass(frozen=True)
class Passage:
  """A title and some whole sentences of one article.

  Attributes:
    number: row in passages, embeddings and index.
    document: what identifies its article when the corpus is updated: an id or url, or the title.
    title, text: as written; sentences are joined by one space.
    title_ids, text_ids: word pieces.
    token_starts, token_ends: byte offsets of each text word piece in the UTF-8 text.
    sentence_starts, sentence_ends: byte offsets of each sentence in the UTF-8 text.
  """

  number: int
  document: str
  title: str
  text: str
  title_ids: Sequence[int]
  text_ids: Sequence[int]
  token_starts: Sequence[int]
  token_ends: Sequence[int]
  sentence_starts: Sequence[int]
  sentence_ends: Sequence[int]

  @property
  def uid(self) -> bytes:
    """`uid_of` this passage."""
    return uid_of(self.title, self.text)


def uid_of(title: str, text: str) -> bytes:
  """Returns the SHA-1 of title and text, which identifies a passage in any corpus."""
  return hashlib.sha1(f"{title}\n{text}".encode()).digest()


def short_uids(uids: Fixed) -> np.ndarray:
  """Returns the first 64 bits of each passage's uid: [N] uint64.

  Two different passages collide in one of 200,000 corpora of 13 million passages.
  """
  parts = [np.ascontiguousarray(chunk[:, :8]).view(">u8") for chunk in uids.chunks]
  return np.concatenate(parts).ravel().astype(np.uint64)


def block_sentences(
  sentences: Sequence[str], lengths: Sequence[int], *, title_tokens: int, max_tokens: int
) -> list[list[str]]:
  """Greedily fills blocks with whole sentences (ORQA's rule).

  Args:
    sentences: one article's sentences in order.
    lengths: number of word pieces of each sentence.
    title_tokens: number of word pieces of the title.
    max_tokens: maximum number of word pieces of `[CLS] title [SEP] text [SEP]`. A sentence that
      exceeds it becomes a block by itself that is too long, so split such sentences first.

  Returns:
    Lists of sentences, without overlap; no sentence is lost.
  """
  room = max_tokens - title_tokens - SPECIAL_TOKENS
  blocks: list[list[str]] = []
  used = room + 1
  for sentence, length in zip(sentences, lengths, strict=True):
    if used + length > room:
      blocks.append([])
      used = 0
    blocks[-1].append(sentence)
    used += length
  return blocks


def make_passages(
  tokenizer: Tokenizer,
  titled_blocks: Sequence[tuple[str, Sequence[str]]],
  numbers: Iterable[int],
  documents: Sequence[str] = (),
) -> list[Passage]:
  """Tokenises (title, sentences) pairs into passages, in one batch.

  Without `documents`, their titles identify the articles.
  """
  titles = [title for title, _ in titled_blocks]
  texts = [" ".join(sentences) for _, sentences in titled_blocks]
  title_ids = tokenizer(tf.constant(titles, tf.string)).to_list()
  tokens = tokenizer.with_offsets(tf.constant(texts, tf.string))
  ids, starts, ends = (part.to_list() for part in (tokens.ids, tokens.starts, tokens.ends))
  made = []
  for i, (number, (title, sentences)) in enumerate(zip(numbers, titled_blocks, strict=True)):
    sizes = [len(sentence.encode()) for sentence in sentences]
    sentence_starts = [sum(sizes[:n]) + n for n in range(len(sizes))]
    made.append(
      Passage(
        number=number,
        document=documents[i] if documents else title,
        title=title,
        text=texts[i],
        title_ids=title_ids[i],
        text_ids=ids[i],
        token_starts=starts[i],
        token_ends=ends[i],
        sentence_starts=sentence_starts,
        sentence_ends=[start + size for start, size in zip(sentence_starts, sizes, strict=True)],
      )
    )
  return made


# ------------------------------------------------------------------------------------------ records


@dataclasses.dataclass(frozen=True)
class Sentence:
  """One sentence of a passage with its salient spans, as written by `annotate_spans`.

  Attributes:
    passage: number of the passage that contains it.
    text: as written.
    ids: word pieces.
    token_starts, token_ends: byte offsets of each word piece in the UTF-8 text.
    span_starts, span_ends: word-piece range [start, end) of each salient span, in order of start.
    span_phrases: key of each span in `holders.Holders`; 0 if the passage's title holds the span
      too, or if the span has no word.
  """

  passage: int
  text: str
  ids: Sequence[int]
  token_starts: Sequence[int]
  token_ends: Sequence[int]
  span_starts: Sequence[int]
  span_ends: Sequence[int]
  span_phrases: Sequence[int] = dataclasses.field(metadata={LEAST: pa.int64()})

  @property
  def span_texts(self) -> list[str]:
    """Each salient span as written."""
    data = self.text.encode()
    return [
      data[self.token_starts[start] : self.token_ends[end - 1]].decode(errors="ignore")
      for start, end in zip(self.span_starts, self.span_ends, strict=True)
    ]


def sentences_of(text: str, starts: Iterable[int], ends: Iterable[int]) -> list[str]:
  """Returns a passage's sentences, given their byte offsets in its text."""
  data = text.encode()
  return [data[start:end].decode() for start, end in zip(starts, ends, strict=True)]


Row = TypeVar("Row")


def _fields(row_type: type) -> Sequence[dataclasses.Field]:
  return dataclasses.fields(row_type)


def _schema_of(row_type: type, names: Sequence[str] = ()) -> pa.Schema:
  """Returns the columns of a row type and their least types; see `arrow_files.write`.

  They are its fields and, of passages, `uid`; or those of `names`.
  """
  columns = {}
  for field in _fields(row_type):
    integer = field.metadata.get(LEAST, pa.int32() if field.type is int else pa.uint16())
    least = integer if field.type is int else pa.list_(integer)
    columns[field.name] = pa.string() if field.type is str else least
  if row_type is Passage:
    columns["uid"] = pa.binary(_UID_BYTES)
  return pa.schema([(name, columns[name]) for name in names or columns])


def shard_paths(folder: str, kind: str) -> list[str]:
  """Returns the record files of one kind in a folder (complete or being written), in row order.

  Args:
    folder: passages or spans folder.
    kind: kind of the rows: "passages", "spans" or "holders".
  """
  return integrity.files_of(folder, kind + r"(-\d{5,})?-\d{5,}-of-\d{5,}\.arrow")


def shard_name(kind: str, shard: int, num_shards: int, *, segment: int | None = None) -> str:
  """Returns the name of a record file; passages have segments, spans and holders have none."""
  part = "" if segment is None else f"-{segment:05d}"
  return f"{kind}{part}-{shard:05d}-of-{num_shards:05d}.arrow"


def segments_of(folder: str) -> list[Segment]:
  """Returns the segments of a complete passages folder, in the order of their passages."""
  return segments.grouped(folder, shard_paths(folder, KIND))


def fingerprints_of_segments(folder: str) -> dict[str, str]:
  """Returns number -> fingerprint of each segment of a complete passages folder, for info.json."""
  return {str(part.number): part.fingerprint for part in segments_of(folder)}


def write_shard(path: str, rows: Iterable, row_type: type) -> dict:
  """Writes one record file atomically; returns its info.json entry (`integrity.describe`).

  Args:
    path: the file.
    rows: rows of the type; they are read a few at a time.
    row_type: `Passage`, `Sentence` or `holders.HeldPhrase`.
  """
  schema, rows = _schema_of(row_type), iter(rows)
  parts = iter(lambda: list(itertools.islice(rows, _ROWS_AT_ONCE)), [])
  columns = (
    {name: [getattr(row, name) for row in part] for name in schema.names} for part in parts
  )
  with paths.whole(path) as partial:
    num_rows = arrow_files.write(partial, schema, columns)
  return integrity.describe(path, records=num_rows)


def read_shard(path: str, row_type: type[Row]) -> Iterator[Row]:
  """Yields the rows of one record file, in order.

  Raises:
    ArtifactError: if the file is not as it was published.
  """
  names = [field.name for field in _fields(row_type)]
  for columns in read_columns(path, row_type, names):
    for values in zip(*map(_as_python, columns.values()), strict=True):
      yield row_type(*values)


def _as_python(column: list[str] | np.ndarray | Ragged) -> list:
  if isinstance(column, Ragged):
    return [row.tolist() for row in column]
  return column.tolist() if isinstance(column, np.ndarray) else column


def read_columns(
  path: str, row_type: type, names: Sequence[str], *, rows_at_once: int = _ROWS_AT_ONCE
) -> Iterator[dict]:
  """Reads some columns of one record file, a few rows at a time.

  Args:
    path: the file.
    row_type: type of its rows.
    names: names of the columns.
    rows_at_once: number of rows.

  Yields:
    Name -> the next rows: `Ragged` lists of integers, a list of strings, or an array of integers.

  Raises:
    ArtifactError: if the file is not as it was published.
  """
  columns = arrow_files.open_columns([path], _schema_of(row_type, names))
  for start in range(0, len(columns[names[0]]), rows_at_once):
    yield {name: columns[name][start : start + rows_at_once] for name in names}


def read_all(shards: Sequence[str], row_type: type) -> arrow_files.Columns:
  """Opens record files as columns, without an object for each row. Nothing is copied.

  Args:
    shards: paths of record files.
    row_type: type of their rows.

  Returns:
    Field of the row -> its column. Passages also have the column "uid".

  Raises:
    ArtifactError: if a file is not as it was published.
  """
  return arrow_files.open_columns(shards, _schema_of(row_type), keep=True)


def read_uids(folder: str) -> np.ndarray:
  """Returns the `short_uids` of the passages of a complete folder."""
  return short_uids(read_all(shard_paths(folder, KIND), Passage)["uid"])


# -------------------------------------------------------------------------------------------- table


_NO_UIDS = Fixed([np.zeros([0, _UID_BYTES], np.uint8)])


@dataclasses.dataclass(frozen=True)
class PassageTable:
  """All passages, by number, without a Python object for each.

  Attributes:
    titles, texts: as written.
    title_ids, text_ids: word pieces.
    token_starts, token_ends: byte offsets of text word pieces.
    sentence_starts, sentence_ends: byte offsets of sentences in the text.
    folder: folder whose record files the columns are mapped from.
    uids: [N, 20] uint8; none if the passages are from no folder.
    documents: see `Passage.document`.
    deleted: sorted numbers of the passages that were deleted: [M] int64. They keep their rows until
      the corpus is compacted.
    fingerprint: of the folder when it was opened; an update does not change an open table.
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
  uids: Fixed = _NO_UIDS
  documents: Sequence[str] = ()
  deleted: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros([0], np.int64))
  fingerprint: str = ""

  def __len__(self) -> int:
    return len(self.titles)

  @functools.cached_property
  def numbers(self) -> np.ndarray:
    """Numbers of the passages that are not deleted, ascending: [N] int64."""
    return np.delete(np.arange(len(self)), self.deleted)

  @property
  def num_alive(self) -> int:
    """The number of passages that are not deleted, which a search can find."""
    return len(self) - len(self.deleted)

  @functools.cached_property
  def short_uids(self) -> np.ndarray:
    """`short_uids` of all passages."""
    return short_uids(self.uids)


def find_of(folder: str, *, advice: str | None = None) -> str:
  """Returns the passages that an artifact was made from, or a later version of them.

  Args:
    folder: a complete artifact.
    advice: what to do if they are not found.

  Raises:
    ArtifactError: they are not found.
  """
  wanted = artifacts.read_info(folder)["inputs"].get(KIND, {}).get("fingerprint")
  return artifacts.find_input(
    folder,
    KIND,
    accept=lambda found: wanted in [found["fingerprint"], *found.get(VERSIONS, [])],
    advice=advice,
  )


def refuse_updated(folder: str) -> None:
  """Checks that there are no passages at `folder` that have been updated.

  Raises:
    ArtifactError: there are; they would be lost if they were made anew.
  """
  if (made := ownership.own_info(folder)) and made.get(VERSIONS):
    raise artifacts.ArtifactError(
      f"{folder!r} has been updated since it was made. Update it again with "
      "beam_jobs.update_passages, or delete it to make it anew."
    )


def load_tokenizer(folder: str) -> Tokenizer:
  """Returns the tokenizer that passages were made with.

  Raises:
    ArtifactError: if `folder` is not a complete passages folder, or is damaged.
  """
  artifacts.read_info(folder, kind=KIND)
  integrity.check_digests(folder, [VOCAB])
  return Tokenizer(folder)


def load(folder: str) -> PassageTable:
  """Opens a complete passages folder. Its columns are mapped, not read into memory.

  Raises:
    ArtifactError: if `folder` is not a complete passages folder, is damaged, or has records that
      are not numbered 0, 1, 2, ....
  """
  info = artifacts.read_info(folder, kind=KIND)
  wanted = info["counts"]["passages"]
  columns = read_all(shard_paths(folder, KIND), Passage)
  num, numbered = 0, True
  for part in columns.pop("number").chunks:  # its ends are enough: the digests cover the rest
    numbered &= not len(part) or (part[0] == num and part[-1] == num + len(part) - 1)
    num += len(part)
  if num != wanted or not numbered:
    raise artifacts.ArtifactError(
      f"{folder!r} holds {num} passages, but its info.json says {wanted}: a record file is missing "
      "or foreign. Make the passages again."
    )
  texts = {f"{name}s": columns.pop(name) for name in ("document", "title", "text", "uid")}
  rest = {"deleted": segments.read_deleted(folder), "fingerprint": info["fingerprint"]}
  return PassageTable(**texts, folder=folder, **rest, **columns)
