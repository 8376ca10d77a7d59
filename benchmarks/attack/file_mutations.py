"""Ways to damage a file: as bytes, as JSON, as a pickle, or as an index of TensorFlow."""

import json
import random
import struct
from collections.abc import Callable

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1)
_MOST_REPEATED_BYTES = 200_000

# =========================================================================================== bytes


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
  """Returns the bytes with one to four faults."""
  found = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4))):
    rng.choice(_FAULTS)(found, rng)
  return bytes(found)


def _flip(data: bytearray, rng: random.Random) -> None:
  for _ in range(rng.choice((1, 1, 3, 20))):
    if data:
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(data: bytearray, rng: random.Random) -> None:
  del data[rng.randrange(len(data) + 1) :]


def _delete(data: bytearray, rng: random.Random) -> None:
  start = rng.randrange(len(data) + 1)
  del data[start : start + rng.choice((1, 4, 30, 1000))]


def _insert(data: bytearray, rng: random.Random) -> None:
  at = rng.randrange(len(data) + 1)
  data[at:at] = rng.choice((b"\0", b"\xff\xfe", b"\n", b'"', b"[", b"{", rng.randbytes(9)))


def _repeat(data: bytearray, rng: random.Random) -> None:
  start = rng.randrange(len(data) + 1)
  part = bytes(data[start : start + rng.choice((1, 5, 12, 40, 200))])
  if part:
    times = rng.choice((2, 10, 1000, 20_000))
    data[start:start] = part * min(times, _MOST_REPEATED_BYTES // len(part))


def _number(data: bytearray, rng: random.Random) -> None:
  form = rng.choice(("<B", "<H", "<I", "<Q", ">I"))
  size = struct.calcsize(form)
  if len(data) >= size:
    at = rng.randrange(len(data) - size + 1)
    value = rng.choice(_NUMBERS) & ((1 << 8 * size) - 1)
    data[at : at + size] = struct.pack(form, value)


_FAULTS: tuple[Callable[[bytearray, random.Random], None], ...] = (
  _flip,
  _flip,
  _cut,
  _delete,
  _insert,
  _repeat,
  _number,
)

# ============================================================================================ JSON


def hostile_json(rng: random.Random) -> str:
  """Returns the text of an unexpected JSON value."""
  depth = rng.choice((50, 101, 900, 1000, 100_000))
  return rng.choice(
    (
      "[" * depth + "]" * depth,
      '{"a":' * depth + "1" + "}" * depth,
      "9" * rng.choice((19, 400, 4300, 4301, 50_000)),
      "-1",
      "0",
      "1e999",
      "1.5",
      "NaN",
      "-Infinity",
      "null",
      "true",
      "[]",
      "{}",
      '""',
      '"\\ud800"',
      '"\\u0000\\u001b[31m\\n\\r\\u2028"',
      '"' + "x" * 100_000 + '"',
      '"/etc/passwd"',
      '"../../../etc"',
      "1000000",
      "100000000000",
      f'"{"(" * 1000 + ")" * 1000}"',
      '"((((a{1000}){1000}){1000}){1000}){1000}"',
      '"(a*)*(a*)*(a*)*b"',
    )
  )


def damaged_json(data: bytes, rng: random.Random) -> bytes:
  """Returns a JSON document with an unexpected value or key, or damaged as bytes."""
  try:
    document = json.loads(data)
  except (ValueError, RecursionError):
    return damaged_bytes(data, rng)
  mark = "a value of the attack"
  places = list(_places(document))
  if not places or rng.random() < 0.1:
    return damaged_bytes(data, rng)
  parent, key = rng.choice(places)
  if isinstance(parent, dict) and rng.random() < 0.15:
    del parent[key]
  elif isinstance(parent, dict) and rng.random() < 0.1:
    parent[mark] = parent.pop(key)
  else:
    parent[key] = mark
  return json.dumps(document).replace(f'"{mark}"', hostile_json(rng), 1).encode()


def _places(value, depth: int = 0):
  """Yields (list or dict, key) of every value inside a value."""
  if not isinstance(value, dict | list):
    return
  for key, below in list(value.items() if isinstance(value, dict) else enumerate(value)):
    yield value, key
    if depth < 20:
      yield from _places(below, depth + 1)


def damaged_lines(data: bytes, rng: random.Random) -> bytes:
  """Returns lines of JSON, one of which is damaged."""
  lines = data.split(b"\n")
  at = rng.randrange(len(lines))
  lines[at] = damaged_json(lines[at], rng)
  return b"\n".join(lines)


# ========================================================================================= pickles


def hostile_pickle(rng: random.Random) -> bytes:
  """Returns a small pickle that, with Python's unpickler, takes memory or time, or runs code."""
  shared = b"".join(b"h\0h\0\x86q\0" for _ in range(60))  # a tuple of itself twice, 60 times
  number = rng.choice(_NUMBERS) & 0xFFFFFFFF
  body = rng.choice(
    (
      b"]r" + struct.pack("<I", number),
      b"\x8e" + struct.pack("<Q", 1 << rng.choice((20, 31, 40, 62))),
      b"B" + struct.pack("<I", number),
      b"X" + struct.pack("<I", number),
      b"\x8b" + struct.pack("<I", number),
      b"\x95" + struct.pack("<Q", 1 << rng.choice((20, 40, 62))) + b"N",
      b")q\0" + shared + b"}h\0Ns",
      b")q\0" + shared,
      b"(" * 100_000,
      b"]" * 100_000,
      b"](" + b"]" * 50_000 + b"e",
      b"cposix\nsystem\nX\x04\0\0\0true\x85R",
      b"cbuiltins\neval\nX\x03\0\0\x001+1\x85R",
      b"cnumpy\ndtype\nX\x02\0\0\0O8K\0K\1\x87R",
      b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R"
      b"(K\1K\1\x85cnumpy\ndtype\nX\2\0\0\0O8K\0K\1\x87R\x89C\x08AAAAAAAAtb",
      b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0K\1\x85K\1\x85tR",
      b"I" + b"9" * 5000 + b"\n",
      b"L" + b"9" * 5000 + b"L\n",
      b"\x8b\xff\xff\xff\x7f",
      b"}(" + b"".join(b"J" + struct.pack("<i", n) + b"N" for n in range(1000)) + b"u",
      b"0" * 10,
      b"h\7",
      b"R",
      b"b",
      b"Q",
    )
  )
  return b"\x80\x02" + body + b"."


def damaged_pickle(data: bytes, rng: random.Random) -> bytes:
  """Returns the pickle with faults, or a hostile one."""
  return hostile_pickle(rng) if rng.random() < 0.3 else damaged_bytes(data, rng)


# ==================================================================== indexes of TensorFlow's files

_POLYNOMIAL = 0x82F63B78


def _crc32c(data: bytes) -> int:
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def _varint(data: bytes | bytearray, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[at]
    value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
    if not byte & 0x80:
      return value, at


def damaged_index(data: bytes, rng: random.Random) -> bytes:
  """Returns an index whose first block has faults but a correct checksum: deliberate faults."""
  found = bytearray(data)
  # The last 48 bytes locate the list of blocks; the blocks precede it.
  _, at = _varint(data, len(data) - 48)
  size, at = _varint(data, at)
  list_start, at = _varint(data, at)
  first = found[list_start:]
  # An entry has the lengths shared, not shared, and of the value; the key; and as value, offset and
  # size.
  _, at = _varint(first, 0)
  key_bytes, at = _varint(first, at)
  _, at = _varint(first, at)
  start, at = _varint(first, at + key_bytes)
  size, _ = _varint(first, at)
  block = found[start : start + size]
  for _ in range(rng.choice((1, 1, 2, 5))):
    place = rng.randrange(len(block))
    block[place] = rng.choice((block[place] ^ 1 << rng.randrange(8), 0, 0xFF, 0x7F, 0x80))
  found[start : start + size] = block
  crc = _crc32c(bytes(found[start : start + size + 1]))
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
  found[start + size + 1 : start + size + 5] = struct.pack("<I", masked)
  return bytes(found)
