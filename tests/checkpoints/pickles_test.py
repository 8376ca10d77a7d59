"""pickles.py and block_records.py: pickles are read as data, and hostile ones refused at once."""

import io
import os
import pickle
import struct
import time

import numpy as np
import pytest

from realm_tf import block_records
from realm_tf.checkpoints import pickles, pytorch_files
from realm_tf.checkpoints.pickles import PickleError
from realm_tf.checkpoints.tensor_files import CheckpointError


class Made:
  """An object that pickles as a call of `function`, and a state."""

  def __init__(self, function, arguments: tuple, state=None):
    self._parts = (function, arguments) if state is None else (function, arguments, state)

  def __reduce__(self):
    return self._parts


def load(data: bytes, allowed=(), **options):
  return pickles.load(io.BytesIO(data), dict(allowed), path="x.pkl", needs="numbers", **options)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_as_python_reads_them(protocol):
  value = {
    "a": [1, -(2**40), 2**70, 1.5, None, True, False],
    "b": ("x", (), (1,), (1, 2), (1, 2, 3), tuple(range(9))),
    "c": {"text": "é\U0001f600" * 300, "empty": [[], {}]},
  }
  value["shared"] = value["a"]
  got = load(pickle.dumps(value, protocol))
  assert got == value and got["shared"] is got["a"]
  assert load(pickle.dumps([1] * 5000, protocol)) == [1] * 5000
  if protocol > 2:
    assert load(pickle.dumps([b"x", b"y" * 300], protocol)) == [b"x", b"y" * 300]


def test_a_stand_in_takes_a_name_s_place():
  class Seen(pickles.StandIn):
    state: object = None

    def set_state(self, state) -> None:
      self.state = state

  made = Made(os.path.join, ("a", "b"), {"k": 1})

  def stands(*arguments):
    assert arguments == ("a", "b")
    return Seen()

  got = load(pickle.dumps(made, 2), {("posixpath", "join"): stands})
  assert isinstance(got, Seen) and got.state == {"k": 1}
  with pytest.raises(PickleError, match="wants to call posixpath.join; .*no more than numbers"):
    load(pickle.dumps(made, 2))


TWICE = b"".join(b"h\0h\0\x86q\0" for _ in range(60))  # a tuple of itself twice, 60 times
HOSTILE = {
  "memo index": b"]r\xff\xff\xff\xff" + b"h\0",
  "bytes": b"B\xff\xff\xff\x7f",
  "long bytes": b"\x8e" + struct.pack("<Q", 1 << 62),
  "long text": b"\x8d" + struct.pack("<Q", 1 << 40),
  "frame": b"\x95" + struct.pack("<Q", 1 << 62),
  "hash of a shared tuple": b")q\0" + TWICE + b"}h\0h\0s",
  "numbers that collide": b"}(" + b"\x8a\x09" + bytes(8) + b"\1Nu",
  "marks": b"(" * 100_000,
  "decimal": b"I" + b"9" * 5000 + b"\n",
  "class": b"(cposix\nsystem\no",
  "new object": b"cposix\nsystem\n)\x81",
  "extension": b"\x82\1",
  "pop": b"N0",
  "no value": b"",
  "call of a number": b"K\1)R",
  "state of a number": b"K\1Nb",
  "persistent": b"K\1Q",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_are_refused_at_once(body):
  started = time.process_time()
  with pytest.raises(PickleError):
    load(b"\x80\x02" + body + b".")
  assert time.process_time() - started < 1


def test_depth_is_no_danger():
  got = load(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")
  depth = 1
  while got:
    (got,), depth = got, depth + 1
  assert depth == 50_000
  shared = load(b"\x80\x02()q\0" + TWICE + b"t.")
  assert len(shared) == 61, "tuples, not 2**60"


# ==================================================================================== block records

RECONSTRUCT = np.empty(0, object).__reduce__()[0]


def records_of(body, path) -> str:
  """Writes a file like numpy.save's with the pickle of `body`."""
  np.lib.format.write_array_header_1_0(
    file := io.BytesIO(), {"descr": "|O", "fortran_order": False, "shape": (1,)}
  )
  path.write_bytes(file.getvalue() + pickle.dumps(body, 3))
  return str(path)


def test_no_array_over_chosen_bytes(tmp_path):
  """Writes an object array whose pointers the file chooses: reading its elements follows them."""
  dtype = Made(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))
  state = (1, (1,), dtype, False, b"A" * 8)
  path = records_of(Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), state), tmp_path / "records.npy")
  with pytest.raises(CheckpointError, match="wanted an array of bytes"):
    block_records.read(path)


@pytest.mark.parametrize(
  "body",
  [
    Made(RECONSTRUCT, (np.ndarray, (1 << 45,), b"b")),
    Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1 << 40,), np.dtype("i8"), False, b"")),
    Made(np.dtype, ("V2000000000",)),
    Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("O"), False, [["x"]])),
    Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), 5),
    [b"x"],
  ],
  ids=["huge", "huge state", "huge type", "list", "state", "no array"],
)
def test_arrays_that_are_none(body, tmp_path):
  with pytest.raises(CheckpointError):
    block_records.read(records_of(body, tmp_path / "records.npy"))


def test_nothing_of_numpy_or_pytorch_is_handed_out():
  for table in (block_records._ALLOWED, pytorch_files._WEIGHTS):
    for name, stands in table.items():
      assert isinstance(stands, str) or stands.__module__.startswith("realm_tf."), name


def test_large_records_round_trip(tmp_path):
  wanted = [bytes([n % 256]) * (n % 700) for n in range(3000)]
  array = np.empty(len(wanted), object)
  array[:] = wanted
  np.save(tmp_path / "records.npy", array, allow_pickle=True)
  assert block_records.read(str(tmp_path / "records.npy")) == wanted
