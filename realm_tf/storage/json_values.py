"""Finds where the values of a JSON file begin and end, whether or not they are on separate lines.

Uses only the standard library. Lines end at \\n only: U+2028, U+0085 and other characters at which
`str.splitlines` splits may occur inside a JSON string.
"""

import io
import json
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from realm_tf.storage.packed_files import BOM, Unreadable, blocks

MAX_RECORD_BYTES = 100_000_000  # records, unlike files, are parsed in one piece

_SPECIAL = re.compile(rb'[\\"{}\[\]\n]')
_NEWLINE, _QUOTE, _BACKSLASH = b'\n"\\'


class Piece(NamedTuple):
  """The bytes of one record.

  Attributes:
    at: offset of the record in the unpacked file.
    line: line on which the record begins, from 1.
    raw: the bytes; longer than MAX_RECORD_BYTES if the record was cut.
  """

  at: int
  line: int
  raw: bytes


def is_lines(head: bytes) -> bool:
  """Returns whether a file that begins with `head` is lines of JSON.

  Arrays are not, nor are objects that span several lines or share a line.
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
  except (ValueError, RecursionError):  # broken, or continued after the head or on the next line
    return b"\n" not in head or rest.lstrip().startswith(b"{")


def _is_list_of_no_object(first: bytes) -> bool:
  """Returns whether a first line is a complete list without any object.

  If so, it is a bad line in a file of lines.
  """
  try:
    return (
      not any(isinstance(value, dict) for value in json.loads(first)) and first.strip() != b"[]"
    )
  except (ValueError, RecursionError):
    return False


def lines(file: BinaryIO, start: int = 0, *, limit: int = MAX_RECORD_BYTES) -> Iterator[Piece]:
  """Yields the lines that begin at byte `start` or later, numbered from there.

  A line longer than `limit` is cut.
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
  """Yields the elements of an array, or values that follow one another.

  Line breaks may be anywhere between tokens. Only one value is held in memory. A broken value does
  not affect the values after it: a string ends with its line, and an object cannot begin inside
  another one without a key.
  """
  scanner = _Scanner()
  for block in blocks(file.read1):
    yield from scanner.feed(block)
  yield from scanner.end()


class _Scanner:
  """Finds where values begin and end."""

  def __init__(self):
    # the data not yielded yet, and its offset in the file
    self._data, self._offset = (
      bytearray(),
      0,
    )
    self._start = 0  # of the value, or of the text between values
    self._open = bytearray()  # the open brackets of the value; empty between values
    self._array = self._in_string = self._too_long = False
    self._escaped, self._line, self._start_line = -1, 1, 1

  def feed(self, block: bytes) -> Iterator[Piece]:
    scanned = len(self._data)
    self._data += block
    for place in [match.start() for match in _SPECIAL.finditer(self._data, scanned)]:
      yield from self._see(place)
    if len(self._data) - self._start > MAX_RECORD_BYTES:
      yield from self._give(len(self._data)) if self._open else self._between(len(self._data))
      # the beginning of the value was yielded; the rest is skipped
      self._too_long = bool(self._open)
    del self._data[: self._start]
    self._offset, self._escaped, self._start = (
      self._offset + self._start,
      self._escaped - self._start,
      0,
    )

  def end(self) -> Iterator[Piece]:
    """Yields the remaining values.

    Raises:
      Unreadable: if an array ends between two elements, without its closing bracket.
    """
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
      yield from self._give(place)  # the enclosing object was never closed
    else:
      yield from self._between(place)
      if byte == ord("[") and not self._array:
        self._array, self._start = True, place + 1
        return
    self._open[:], self._start, self._start_line = [byte], place, self._line

  def _give(self, end: int) -> Iterator[Piece]:
    """Yields the value that ends at `end`."""
    if not self._too_long:
      yield Piece(
        self._offset + self._start, self._start_line, bytes(self._data[self._start : end])
      )
    self._start, self._too_long = end, False

  def _between(self, end: int) -> Iterator[Piece]:
    """Yields the data between values, except commas: numbers, strings, garbage."""
    rubbish = bytes(self._data[self._start : end]).removeprefix(BOM).strip(b", \t\r\n")
    if rubbish:
      for raw in _elements(rubbish):
        yield Piece(self._offset + self._start, self._line, raw)
    self._start = end


def _elements(rubbish: bytes) -> list[bytes]:
  """Splits `rubbish` into its values if it is JSON."""
  try:
    return [json.dumps(value).encode() for value in json.loads(b"[" + rubbish + b"]")]
  except (ValueError, RecursionError):
    return [rubbish]
