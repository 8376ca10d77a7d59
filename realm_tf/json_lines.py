"""JSON as people have it: lines of objects, an array, or objects after each other; packed or not;
UTF-8, UTF-16 or UTF-32.

The one reader of such files, and standard library alone, so that a client that needs no TensorFlow
can use it. Lines end at
\\n only: U+2028, U+0085 and the like, which `str.splitlines` splits at, may stand inside a JSON
string.
"""

import atexit
import bz2
import codecs
import dataclasses
import functools
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

BOM = codecs.BOM_UTF8
MAX_RECORD_BYTES = 100_000_000  # a record is parsed as a whole; a file is not
SHOWN_CHARS = 200  # of a record that is named
# the reason against what is not `is_writable`
HALF_A_PAIR = "a text in the line is half of a surrogate pair (\\ud800)"

_BLOCK_BYTES = 1 << 18
_HEAD_BYTES = 1 << 16  # what tells how a file is written
_PACKINGS = {
  b"\x1f\x8b": ("gzip", gzip.GzipFile),
  b"BZh": ("bz2", bz2.BZ2File),
  b"\xfd7zXZ\x00": ("xz", lzma.LZMAFile),
}
_SPECIAL = re.compile(rb'[\\"{}\[\]\n]')
_NEWLINE, _QUOTE, _BACKSLASH = b'\n"\\'
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRecord(ValueError):
  """A record that cannot be used; its text is the reason, in words.

  Attributes:
    code: the reason as it is counted in an artifact's info.json.
  """

  def __init__(self, code: str, words: str):
    super().__init__(words)
    self.code = code


class Unreadable(Exception):
  """A file that cannot be read further; its text is the reason ("truncated_gzip", ..). What came
  before it is good.
  """


@dataclasses.dataclass(frozen=True)
class Record:
  """One record of a file.

  Attributes:
    number: of the line, or of the value where they do not stand on lines, from 1.
    unit: what is numbered: "line" or "record".
    row: the object, or None where the record is bad.
    reason: why it is bad, in words, or empty.
    text: its beginning, to be shown.
  """

  number: int
  unit: str
  row: dict | None
  reason: str
  text: str

  @property
  def place(self) -> str:
    """Where it stands, for people."""
    return f"{self.unit} {self.number}"


class Piece(NamedTuple):
  """The bytes of one record.

  Attributes:
    at: its offset in the unpacked file.
    line: the line that it begins on, from 1.
    raw: its bytes; longer than MAX_RECORD_BYTES where it was cut.
  """

  at: int
  line: int
  raw: bytes


def read(source: BinaryIO | bytes) -> Iterator[Record]:
  """The records of a file, bad ones too.

  Args:
    source: a file opened in binary mode, packed or not, or bytes.

  Yields:
    A record for every line, or for every value of an array or of values that follow each other; the
    last one says why, where
    the file cannot be read to its end.
  """
  return records(unpacked(io.BytesIO(source) if isinstance(source, bytes) else source))


def records(file: io.BufferedReader) -> Iterator[Record]:
  """The same of a file that is `unpacked` already."""
  number, unit = 0, "record"
  try:
    split = values
    if is_lines(file.peek(_HEAD_BYTES)):
      split, unit = lines, "line"
    for number, piece in enumerate(split(file), 1):
      if piece.raw.strip():
        try:
          yield Record(number, unit, parse(piece.raw), "", shown(piece.raw))
        except BadRecord as error:
          yield Record(number, unit, None, str(error), shown(piece.raw))
  except Unreadable as error:
    yield end_of(error, number, unit)


def end_of(error: Unreadable, number: int, unit: str) -> Record:
  """The record that says why a file cannot be read beyond its first `number` records."""
  reason = f"the file is {str(error).replace('_', ' ')} from there on"
  return Record(number + 1, unit, None, reason, "")


def parsed(source: BinaryIO | bytes, parse: Callable[[dict], object]) -> tuple[list, list[Record]]:
  """What `parse` makes of the objects of a file, and the records that are left out.

  Args:
    source: see `read`.
    parse: an object → what is kept, or a text: the reason against it.
  """
  kept, bad = [], []
  for record in read(source):
    made = record.reason or parse(record.row)
    if isinstance(made, str):
      bad.append(dataclasses.replace(record, reason=made))
    else:
      kept.append(made)
  return kept, bad


def reasons(bad: Iterable[Record]) -> list[str]:
  """How many records are bad, by reason, each with its first example: for people."""
  found = {}
  for record in bad:
    found.setdefault(record.reason, []).append(record)
  return [
    f"{len(records)} {records[0].unit}s left out, {reason} (first: {records[0].place})"
    for reason, records in found.items()
  ]


def tell(path: str, bad: Sequence[Record], *, num_kept: int) -> None:
  """Says on stderr what is left out of a file; again as the program's last line, if that is most."""
  told = reasons(bad)
  for reason in told:
    print(f"{path}: {reason}", file=sys.stderr)
  if len(bad) > num_kept:
    total = len(bad) + num_kept
    words = f"WARNING: {len(bad)} of {total} records of {path} were left out: {'; '.join(told)}"
    atexit.register(lambda: print(words, file=sys.stderr, flush=True))


def parse(raw: bytes) -> dict:
  """The object that a record spells.

  Raises:
    BadRecord: it is not UTF-8, or not JSON as the standard says (NaN, a key that stands twice, ..),
      or not an object.
  """
  if len(raw) > MAX_RECORD_BYTES:
    raise BadRecord("too_long", f"the line is longer than {MAX_RECORD_BYTES:,} bytes")
  try:
    row = json.loads(raw.decode(), parse_constant=_no_constant, object_pairs_hook=_no_key_twice)
  except UnicodeDecodeError:
    raise BadRecord("bad_utf8", "the line is not JSON in UTF-8") from None
  except BadRecord:
    raise
  except RecursionError:
    raise BadRecord("bad_json", "the line is nested too deep") from None
  except ValueError as error:  # a number of over 4,300 digits is one too
    words = (
      "the line is not JSON in UTF-8"
      if isinstance(error, json.JSONDecodeError)
      else "a number in the line is too long"
    )
    raise BadRecord("bad_json", words) from None
  if not isinstance(row, dict):
    raise BadRecord("bad_record", "the line is not an object")
  return row


def _no_constant(name: str):
  raise BadRecord("bad_json", f"the line holds {name}, which is not JSON")


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict:
  row = dict(pairs)
  if len(row) < len(pairs):
    raise BadRecord("bad_json", "a key stands twice in the line")
  return row


def is_writable(text: str) -> bool:
  """Whether a text is Unicode; JSON can spell half of a surrogate pair, as \\ud800, which is not.
  """
  return not _SURROGATE.search(text)


def dumps(row) -> str:
  """A value as a line of JSON that can be written in UTF-8, whatever it was read from."""
  line = json.dumps(row, ensure_ascii=False)
  return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", line) + "\n"


def shown(raw: bytes) -> str:
  """The beginning of a record, for people."""
  return raw[: 4 * SHOWN_CHARS].decode(errors="replace").strip()[:SHOWN_CHARS]


# ========================================================================== unpacking and encodings


def packing_of(head: bytes) -> str:
  """What a file that begins so is packed with: "gzip", "bz2", "xz", or "" for nothing that is read
  here.
  """
  return next((name for magic, (name, _) in _PACKINGS.items() if head.startswith(magic)), "")


def is_plain(head: bytes) -> bool:
  """Whether a file that begins so is neither packed nor UTF-16 or UTF-32: no byte order mark of
  these, no zeros between letters.
  """
  return not packing_of(head) and _encoding_of(head).startswith("utf-8")


def _encoding_of(head: bytes) -> str:
  return json.detect_encoding(head[:4])


def unpacked(file: BinaryIO) -> io.BufferedReader:
  """A file as unpacked UTF-8. A byte order mark of UTF-8 stays; text that is not Unicode becomes
  bytes that are not UTF-8.

  Reading on raises Unreadable where the packed file is cut off or broken.
  """
  plain = _buffered(_blocks(file.read))
  head = plain.peek(_HEAD_BYTES)
  if packing := packing_of(head):
    open_ = next(open_ for name, open_ in _PACKINGS.values() if name == packing)
    plain = _buffered(_unpack(packing, open_(fileobj=plain) if packing == "gzip" else open_(plain)))
    try:
      head = plain.peek(_HEAD_BYTES)
    except Unreadable:
      return _buffered(_unpack(packing, plain))  # whoever reads is told
  encoding = _encoding_of(head)
  return plain if encoding.startswith("utf-8") else _buffered(_recode(encoding, plain))


def _unpack(packing: str, file) -> Iterator[bytes]:
  try:
    yield from _blocks(file.read1)
  except EOFError:
    raise Unreadable(f"truncated_{packing}") from None
  except (OSError, zlib.error, lzma.LZMAError):
    raise Unreadable(f"broken_{packing}") from None


def _recode(encoding: str, file) -> Iterator[bytes]:
  """Blocks of another encoding as UTF-8."""
  decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
  try:
    for block in _blocks(file.read1):
      yield decoder.decode(block).encode("utf-8", "surrogatepass")
    decoder.decode(b"", final=True)
  except UnicodeDecodeError:
    raise Unreadable(f"broken_{encoding}") from None


class _Blocks(io.RawIOBase):
  """A raw file over blocks of bytes. An error comes after all bytes that came before it."""

  def __init__(self, blocks: Iterator[bytes]):
    self._blocks, self._left, self._error = blocks, memoryview(b""), None

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    filled = 0
    while filled < len(buffer) and self._error is None:
      if not self._left:
        try:
          self._left = memoryview(next(self._blocks))
        except (StopIteration, Unreadable) as error:
          self._error = error
      size = min(len(buffer) - filled, len(self._left))
      buffer[filled : filled + size], self._left = self._left[:size], self._left[size:]
      filled += size
    if not filled and isinstance(self._error, Unreadable):
      raise self._error
    return filled


def _blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
  return iter(functools.partial(read, _BLOCK_BYTES), b"")


def _buffered(blocks: Iterator[bytes]) -> io.BufferedReader:
  return io.BufferedReader(_Blocks(blocks), _HEAD_BYTES)


# ======================================================================================== splitting


def is_lines(head: bytes) -> bool:
  """Whether a file that begins so is lines of JSON, not an array or objects that are printed over
  many lines or follow each other.
  """
  head = head.removeprefix(BOM).lstrip()
  first, _, rest = head.partition(b"\n")
  if first.startswith(b"["):
    return _is_list_of_no_object(first)
  if not first.startswith(b"{"):
    return True
  try:
    text = first.decode(errors="replace").rstrip()
    return json.JSONDecoder().raw_decode(text)[1] == len(text)  # nothing follows it on its line
  except (ValueError, RecursionError):  # broken, or it goes on: after the head or in the next line
    return b"\n" not in head or rest.lstrip().startswith(b"{")


def _is_list_of_no_object(first: bytes) -> bool:
  """Whether a first line is a whole list without any object: then it is a bad line of a file of
  lines.
  """
  try:
    return (
      not any(isinstance(value, dict) for value in json.loads(first)) and first.strip() != b"[]"
    )
  except (ValueError, RecursionError):
    return False


def lines(file: BinaryIO, start: int = 0, *, limit: int = MAX_RECORD_BYTES) -> Iterator[Piece]:
  """The lines that begin at byte `start` or later, numbered from there; one that is longer than
  `limit` is cut.
  """
  at, number = max(start - 1, 0), 0
  if start:
    file.seek(at)
  begins = start == 0  # otherwise the first piece is the end of the line before
  while raw := file.readline(limit + 1):
    if begins:
      number += 1
      yield Piece(at, number, raw.removeprefix(BOM) if at == 0 else raw)
    at += len(raw)
    begins = raw.endswith(b"\n")


def values(file: io.BufferedReader) -> Iterator[Piece]:
  """The elements of an array, or the values that follow each other, however they are broken into
  lines.

  Only one value is held in memory. A value that is broken costs itself, not those after it: a
  string ends with its line, and an
  object cannot begin inside another one without a key.
  """
  scanner = _Scanner()
  for block in _blocks(file.read1):
    yield from scanner.feed(block)
  yield from scanner.end()


class _Scanner:
  """Finds where values begin and end."""

  def __init__(self):
    self._data, self._offset = (
      bytearray(),
      0,
    )  # what is not given yet, and where it begins in the file
    self._start = 0  # of the value, or of what stands between values
    self._open = bytearray()  # the brackets of the value that are open; none between values
    self._array = self._in_string = self._too_long = False
    self._escaped, self._line, self._start_line = -1, 1, 1

  def feed(self, block: bytes) -> Iterator[Piece]:
    scanned = len(self._data)
    self._data += block
    for place in [match.start() for match in _SPECIAL.finditer(self._data, scanned)]:
      yield from self._see(place)
    if len(self._data) - self._start > MAX_RECORD_BYTES:
      yield from self._give(len(self._data)) if self._open else self._between(len(self._data))
      self._too_long = bool(
        self._open
      )  # its beginning was given: what follows of it is passed over
    del self._data[: self._start]
    self._offset, self._escaped, self._start = (
      self._offset + self._start,
      self._escaped - self._start,
      0,
    )

  def end(self) -> Iterator[Piece]:
    """What is left. Raises Unreadable if an array ends between two elements, without its bracket."""
    if self._open:
      yield from self._give(len(self._data))
      return
    yield from self._between(len(self._data))
    if self._array:
      raise Unreadable("truncated_array")

  def _see(self, place: int) -> Iterator[Piece]:
    byte = self._data[place]
    if byte == _NEWLINE:
      self._line, self._in_string = self._line + 1, False
    elif place == self._escaped:
      pass
    elif byte == _BACKSLASH:
      self._escaped = place + 1 if self._in_string else -1
    elif byte == _QUOTE:
      self._in_string = not self._in_string
    elif self._in_string:
      pass
    elif byte in b"{[":
      yield from self._see_opening(place, byte)
    elif self._open:
      self._open.pop()
      if not self._open:
        yield from self._give(place + 1)
    elif byte == ord("]"):
      yield from self._between(place)
      self._array, self._start = False, place + 1

  def _see_opening(self, place: int, byte: int) -> Iterator[Piece]:
    if self._open:
      before = self._data[max(place - 64, 0) : place].rstrip()
      if byte != ord("{") or self._open[-1] != byte or before.endswith(b":"):
        self._open.append(byte)
        return
      yield from self._give(place)  # the object around it was never closed
    else:
      yield from self._between(place)
      if byte == ord("[") and not self._array:
        self._array, self._start = True, place + 1
        return
    self._open[:], self._start, self._start_line = [byte], place, self._line

  def _give(self, end: int) -> Iterator[Piece]:
    """The value that ends here."""
    if not self._too_long:
      yield Piece(
        self._offset + self._start, self._start_line, bytes(self._data[self._start : end])
      )
    self._start, self._too_long = end, False

  def _between(self, end: int) -> Iterator[Piece]:
    """What stands between values and is no comma: numbers, texts, rubbish."""
    rubbish = bytes(self._data[self._start : end]).removeprefix(BOM).strip(b", \t\r\n")
    if rubbish:
      for raw in _elements(rubbish):
        yield Piece(self._offset + self._start, self._line, raw)
    self._start = end


def _elements(rubbish: bytes) -> list[bytes]:
  """Its values one by one, where it is JSON."""
  try:
    return [json.dumps(value).encode() for value in json.loads(b"[" + rubbish + b"]")]
  except (ValueError, RecursionError):
    return [rubbish]
