"""Reads pickles as data: nothing that a pickle names is imported or called.

A pickle is a program for a stack machine. The machine here supports only the operations that build
plain values (None, numbers, strings, bytes, tuples, lists, dicts). A function or class that a
pickle names is replaced by a stand-in from an allowlist; any other name is an error. NumPy and
PyTorch are never involved, so no pickle can make an array over memory of its choice.
"""

import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from realm_tf.errors import UserError

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
  "BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
  "SHORT_BINBYTES BINBYTES BINBYTES8".split()
)
_FRAMING = frozenset(["PROTO", "FRAME"])
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleError(UserError):
  """Raised for a pickle that is damaged, or holds more than plain values and allowed names."""


class Readable(Protocol):
  """The methods that a file must have."""

  def read(self, size: int, /) -> bytes: ...

  def readline(self) -> bytes: ...


class StandIn:
  """Replaces an object of a class that a pickle names; a pickle may set its state.

  A subclass that keeps the state overrides `set_state`.
  """

  def set_state(self, state) -> None:
    """Receives the state from the pickle; ignores it by default."""


class _Dict(dict, StandIn):
  """An ordered dict; its state is PyTorch's version metadata."""


def ordered_dict(pairs: Sequence = ()) -> dict:
  """Replaces collections.OrderedDict."""
  found = _Dict()
  for name, value in pairs:
    found[_key(name)] = value
  return found


def _key(value) -> str:
  """Returns a dict key after checking that it is a string.

  Other keys are rejected, because an attacker can choose numbers that collide, and tuples that take
  forever to hash.
  """
  if not isinstance(value, str):
    raise ValueError("a dict key is not a string")
  return value


def load(
  file: Readable,
  allowed: Mapping[tuple[str, str], object],
  *,
  path: str,
  needs: str,
  persistent: Callable | None = None,
):
  """Loads the value of a pickle of protocol 2 or later.

  Time and memory are proportional to the bytes that are read, for any contents.

  Args:
    file: the pickle.
    allowed: (module, name) -> its stand-in: a function that takes plain values, or a plain value.
    path: path of the file, for messages.
    needs: what such a file may hold, for messages.
    persistent: maps the id of a value outside of the pickle to its stand-in; None if there are no
      such values.

  Raises:
    PickleError: if the pickle is damaged, or holds more than plain values and allowed names.
  """
  machine = _Machine(allowed, path=path, needs=needs, persistent=persistent)
  try:
    # genops needs no more of a file than `Readable` has.
    for operation, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]
      machine.step(operation.name, argument)
    return machine.result()
  except PickleError:
    raise
  except (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:
    raise PickleError(f"{path!r} is not a complete pickle ({str(error)[:200]}).") from error


class _Machine:
  """The stack machine.

  Values that occur in several places are shared, as in any pickle. Therefore no code here traverses
  a value, and no message shows one.
  """

  def __init__(self, allowed: Mapping, *, path: str, needs: str, persistent: Callable | None):
    self._allowed, self._path, self._needs = allowed, path, needs
    self._persistent = persistent
    self._stack: list = []
    self._memo: dict[int, object] = {}  # a dict, so that a large number costs nothing

  def result(self):
    """Returns the only value left on the stack."""
    (value,) = self._stack
    return value

  def step(self, name: str, argument) -> None:
    """Runs one operation."""
    stack = self._stack
    if name in _LITERALS:
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in ("BINPUT", "LONG_BINPUT"):
      self._memo[argument] = stack[-1]
    elif name == "MEMOIZE":
      self._memo[len(self._memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
      stack.append(self._memo[argument])
    elif name in _TUPLES:
      size = _TUPLES[name]
      stack.append(tuple(self._pop() for _ in range(size))[::-1])
    elif name == "MARK":
      stack.append(_MARK)
    elif name not in _FRAMING and name != "STOP":
      self._build(name, argument)

  def _build(self, name: str, argument) -> None:
    """Runs one of the less frequent operations."""
    stack = self._stack
    match name:
      case "TUPLE":
        stack.append(tuple(self._to_mark()))
      case "EMPTY_LIST":
        stack.append([])
      case "APPEND" | "APPENDS":
        values = self._to_mark() if name == "APPENDS" else [self._pop()]
        self._top(list).extend(values)
      case "EMPTY_DICT":
        stack.append({})
      case "SETITEM" | "SETITEMS":
        flat = self._to_mark() if name == "SETITEMS" else [self._pop(), self._pop()][::-1]
        self._set_items(flat)
      case "GLOBAL":
        stack.append(self._named(*argument.split(" ", 1)))
      case "STACK_GLOBAL":
        called = self._pop()
        stack.append(self._named(self._pop(), called))
      case "REDUCE":
        self._call()
      case "BUILD":
        state = self._pop()
        self._top(StandIn).set_state(state)
      case "BINPERSID" if self._persistent:
        stack.append(self._persistent(self._pop()))
      case _:
        raise PickleError(
          f"{self._path!r} is a pickle with the operation {name}; such a file needs no more than "
          f"{self._needs}. It was not opened."
        )

  def _pop(self):
    value = self._stack.pop()
    if value is _MARK:
      raise ValueError("a value is missing")
    return value

  def _top(self, kind: type):
    if not isinstance(self._stack[-1], kind):
      raise ValueError(f"found a {type(self._stack[-1]).__name__}, wanted a {kind.__name__}")
    return self._stack[-1]

  def _to_mark(self) -> list:
    """Pops the values above the last mark, and the mark itself."""
    at = len(self._stack) - 1
    while self._stack[at] is not _MARK:
      at -= 1
      if at < 0:
        raise ValueError("a mark is missing")
    values = self._stack[at + 1 :]
    del self._stack[at:]
    return values

  def _set_items(self, flat: list) -> None:
    found = self._top(dict)
    for name, value in zip(flat[::2], flat[1::2], strict=True):
      found[_key(name)] = value

  def _named(self, module: str, name: str):
    if not isinstance(module, str) or not isinstance(name, str):
      raise ValueError("a name is not a string")
    if (module, name) not in self._allowed:
      raise PickleError(
        f"{self._path!r} wants to call {module[:80]}.{name[:80]}; such a file needs no more than "
        f"{self._needs}. It was not opened. Do not load it with another program either."
      )
    return self._allowed[module, name]

  def _call(self) -> None:
    arguments = self._pop()
    function = self._pop()
    # Plain values and stand-ins are not callable, so anything callable is from the allowlist.
    if not callable(function) or not isinstance(arguments, tuple):
      raise ValueError("a call of something that is not a function")
    self._stack.append(function(*arguments))
