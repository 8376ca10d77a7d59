"""Reads files that may be compressed (gzip, bz2, xz) or in UTF-16 or UTF-32 as plain UTF-8.

Uses only the standard library.
"""

import bz2
import codecs
import functools
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

BOM = codecs.BOM_UTF8
HEAD_BYTES = 1 << 16  # enough to detect a file's format

_BLOCK_BYTES = 1 << 18
_PACKINGS = {
  b"\x1f\x8b": ("gzip", gzip.GzipFile),
  b"BZh": ("bz2", bz2.BZ2File),
  b"\xfd7zXZ\x00": ("xz", lzma.LZMAFile),
}


class Unreadable(Exception):
  """Raised when a file cannot be read further; the message is the reason ("truncated_gzip", ..).

  The data read before it is good.
  """


def packing_of(head: bytes) -> str:
  """Returns the compression of a file that begins with `head`: "gzip", "bz2", "xz"; "" if none."""
  return next((name for magic, (name, _) in _PACKINGS.items() if head.startswith(magic)), "")


def is_plain(head: bytes) -> bool:
  """Returns whether a file that begins with `head` is neither compressed nor UTF-16 or UTF-32.

  Such a file has no UTF-16 or UTF-32 byte order mark, and no zero bytes between letters.
  """
  return not packing_of(head) and _encoding_of(head).startswith("utf-8")


def _encoding_of(head: bytes) -> str:
  return json.detect_encoding(head[:4])


def unpacked(file: BinaryIO) -> io.BufferedReader:
  """Returns a reader of a file's contents, decompressed, in UTF-8.

  A UTF-8 byte order mark is kept. Text that is not Unicode becomes bytes that are not UTF-8.

  The reader raises Unreadable where the compressed file is truncated or broken.
  """
  plain = _buffered(blocks(file.read))
  head = plain.peek(HEAD_BYTES)
  if packing := packing_of(head):
    open_ = next(open_ for name, open_ in _PACKINGS.values() if name == packing)
    plain = _buffered(_unpack(packing, open_(fileobj=plain) if packing == "gzip" else open_(plain)))
    try:
      head = plain.peek(HEAD_BYTES)
    except Unreadable:
      return _buffered(_unpack(packing, plain))  # the error is raised on reading
  encoding = _encoding_of(head)
  return plain if encoding.startswith("utf-8") else _buffered(_recode(encoding, plain))


def _unpack(packing: str, file) -> Iterator[bytes]:
  try:
    yield from blocks(file.read1)
  except EOFError:
    raise Unreadable(f"truncated_{packing}") from None
  except (OSError, zlib.error, lzma.LZMAError):
    raise Unreadable(f"broken_{packing}") from None


def _recode(encoding: str, file) -> Iterator[bytes]:
  """Yields blocks in another encoding as UTF-8."""
  decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
  try:
    for block in blocks(file.read1):
      yield decoder.decode(block).encode("utf-8", "surrogatepass")
    decoder.decode(b"", final=True)
  except UnicodeDecodeError:
    raise Unreadable(f"broken_{encoding}") from None


class _Blocks(io.RawIOBase):
  """A raw file over blocks of bytes. Raises an error only after all bytes before it were read."""

  def __init__(self, blocks: Iterator[bytes]):
    self._blocks, self._left = blocks, memoryview(b"")
    self._error: StopIteration | Unreadable | None = None

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


def blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
  return iter(functools.partial(read, _BLOCK_BYTES), b"")


def _buffered(blocks: Iterator[bytes]) -> io.BufferedReader:
  return io.BufferedReader(_Blocks(blocks), HEAD_BYTES)
