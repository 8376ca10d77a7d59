"""JSON records in files: objects on lines, in an array, or one after another.

Files may be compressed, and may be in UTF-8, UTF-16 or UTF-32.

This is the only reader of such files. It uses only the standard library, so that clients can use it
without TensorFlow.
"""

import atexit
import dataclasses
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO

from realm_tf.storage.json_values import MAX_RECORD_BYTES, is_lines, lines, values
from realm_tf.storage.packed_files import HEAD_BYTES, Unreadable, unpacked

MAX_DEPTH = 100  # nested lists and objects; published files have six levels
SHOWN_CHARS = 200  # of a record in a message
_SHOWN_KEYS, _SHOWN_KEY_CHARS = 10, 40
# why a text that is not `is_writable` is rejected
HALF_A_PAIR = "a string in the line has half of a surrogate pair (\\ud800)"

_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRecord(ValueError):
  """A record that cannot be used; the message is the reason in words.

  Attributes:
    code: the reason under which it is counted in an artifact's info.json.
  """

  def __init__(self, code: str, words: str):
    super().__init__(words)
    self.code = code


@dataclasses.dataclass(frozen=True)
class Record:
  """One record of a file.

  Attributes:
    number: line number, or the number of the value if values are not on lines of their own; from 1.
    unit: what is numbered: "line" or "record".
    row: the object, or None if the record is bad.
    reason: why the record is bad, in words, or empty.
    text: the beginning of the record, for display.
  """

  number: int
  unit: str
  row: dict | None
  reason: str
  text: str

  @property
  def place(self) -> str:
    """The position of the record, for display."""
    return f"{self.unit} {self.number}"


def read(source: BinaryIO | bytes) -> Iterator[Record]:
  """Reads the records of a file, including bad ones.

  Args:
    source: a file opened in binary mode, compressed or not, or bytes.

  Yields:
    A record for every line, or for every value of an array or of a sequence of values. If the file
    cannot be read to its end, the last record gives the reason.
  """
  return records(unpacked(io.BytesIO(source) if isinstance(source, bytes) else source))


def records(file: io.BufferedReader) -> Iterator[Record]:
  """Reads the records of a file that is already `unpacked`; see `read`."""
  number, unit = 0, "record"
  try:
    split = values
    if is_lines(file.peek(HEAD_BYTES)):
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
  """Returns the record that says why a file cannot be read beyond its first `number` records."""
  reason = f"the file is {str(error).replace('_', ' ')} from there on"
  return Record(number + 1, unit, None, reason, "")


def parsed(source: BinaryIO | bytes, parse: Callable[[dict], object]) -> tuple[list, list[Record]]:
  """Parses the objects of a file; returns the results and the records that are left out.

  Args:
    source: see `read`.
    parse: maps an object to the result to keep, or to a string: the reason to leave it out.
  """
  kept, bad = [], []
  for record in read(source):
    made = parse(record.row) if record.row is not None else record.reason
    if isinstance(made, str):
      bad.append(dataclasses.replace(record, reason=made))
    else:
      kept.append(made)
  return kept, bad


def reasons(bad: Iterable[Record]) -> list[str]:
  """Returns a line for each reason: how many records are bad, and where the first one is."""
  found: dict[str, list[Record]] = {}
  for record in bad:
    found.setdefault(record.reason, []).append(record)
  return [
    f"{len(records)} {records[0].unit}s left out, {reason} (first: {records[0].place})"
    for reason, records in found.items()
  ]


def tell(path: str, bad: Sequence[Record], *, num_kept: int) -> None:
  """Reports on stderr which records of a file are left out.

  If that is most of the file, repeats the report as the last line of the program's output.
  """
  told = reasons(bad)
  for reason in told:
    print(f"{path}: {reason}", file=sys.stderr)
  if len(bad) > num_kept:
    total = len(bad) + num_kept
    words = f"WARNING: {len(bad)} of {total} records of {path} were left out: {'; '.join(told)}"
    atexit.register(lambda: print(words, file=sys.stderr, flush=True))


def parse(raw: bytes) -> dict:
  """Returns the object that a record encodes.

  Raises:
    BadRecord: if the record is not UTF-8, not standard JSON (it has NaN, a duplicate key, ..), or
      not an object.
  """
  if len(raw) > MAX_RECORD_BYTES:
    raise BadRecord("too_long", f"the line is longer than {MAX_RECORD_BYTES:,} bytes")
  try:
    row = json.loads(
      raw.decode(),
      parse_constant=_no_constant,
      parse_float=_finite,
      object_pairs_hook=_no_key_twice,
    )
  except UnicodeDecodeError:
    raise BadRecord("bad_utf8", "the line is not JSON in UTF-8") from None
  except BadRecord:
    raise
  except RecursionError:
    raise BadRecord("bad_json", "the line is nested too deep") from None
  except ValueError as error:  # also raised for a number of over 4,300 digits
    words = (
      "the line is not JSON in UTF-8"
      if isinstance(error, json.JSONDecodeError)
      else "a number in the line is too long"
    )
    raise BadRecord("bad_json", words) from None
  if not isinstance(row, dict):
    raise BadRecord("bad_record", "the line is not an object")
  if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and is_deep(row):
    raise BadRecord("bad_json", "the line is nested too deep")
  return row


def is_deep(value) -> bool:
  """Returns whether lists and objects are nested more than MAX_DEPTH levels deep.

  A deeper value may parse, but then fail to be written or shown, because Python's own limit depends
  on the depth of the call stack at that moment.
  """
  level = [value]
  for _ in range(MAX_DEPTH):
    level = [
      below
      for above in level
      for below in (above.values() if isinstance(above, dict) else above)
      if isinstance(below, dict | list)
    ]
    if not level:
      return False
  return True


def _finite(digits: str) -> float:
  number = float(digits)
  if not math.isfinite(number):
    raise BadRecord("bad_json", "a number in the line is too large")
  return number


def _no_constant(name: str):
  raise BadRecord("bad_json", f"the line holds {name}, which is not JSON")


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict:
  row = dict(pairs)
  if len(row) < len(pairs):
    raise BadRecord("bad_json", "a key occurs twice in the line")
  return row


def is_writable(text: str) -> bool:
  """Returns whether a text is valid Unicode.

  JSON can encode half of a surrogate pair, such as \\ud800, which is not.
  """
  return not _SURROGATE.search(text)


def dumps(row) -> str:
  """Returns a value as a line of JSON that can always be written in UTF-8."""
  line = json.dumps(row, ensure_ascii=False)
  return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", line) + "\n"


def keys_of(row: Mapping) -> str:
  """Returns the first keys of an object for display: shortened, without control characters."""
  names = [repr(name)[1:-1][:_SHOWN_KEY_CHARS] for name in itertools.islice(row, _SHOWN_KEYS)]
  return ", ".join(names) or "none"


def shown(raw: bytes) -> str:
  """Returns the beginning of a record, for display."""
  return raw[: 4 * SHOWN_CHARS].decode(errors="replace").strip()[:SHOWN_CHARS]
