"""Small JSON files from other programs: configs, tokenizers, lists of parts."""

import json

from realm_tf.errors import UserError
from realm_tf.storage import json_lines
from realm_tf.storage.artifacts import gfile

_MAX_BYTES = 20_000_000  # twice the tokenizer.json of a multilingual BERT
_MAX_DIGITS = 40  # tokenizers write 10^30 for "no limit"


def read(path: str, kind: type, *, error: type[UserError]):
  """Returns the value of a JSON file, or an empty value if the file does not exist.

  Args:
    path: path of the file.
    kind: type that the value must have: dict or list.
    error: class of the error to raise.

  Raises:
    UserError: of class `error`, if the file is not JSON of that kind, nested too deep, too large,
      or has an integer of over 40 digits.
  """
  if not gfile.exists(path):
    return kind()
  if gfile.isdir(path) or (size := gfile.stat(path).length) > _MAX_BYTES:
    what = "a folder" if gfile.isdir(path) else f"{size:,} bytes long"
    raise error(f"{path!r} is {what}; wanted a JSON file of at most {_MAX_BYTES:,} bytes.")
  try:
    with gfile.GFile(path, "rb") as file:
      value = json.loads(file.read(), parse_int=_integer)
    if not isinstance(value, kind) or json_lines.is_deep(value):
      raise ValueError("it has another type, or is nested too deep")
  except (ValueError, RecursionError) as reason:
    wanted = "object" if kind is dict else "list"
    raise error(
      f"{path!r} is not a JSON {wanted}: {str(reason)[:200]}. Download it again."
    ) from reason
  return value


def _integer(digits: str) -> int:
  if len(digits) > _MAX_DIGITS:
    raise ValueError(f"it has an integer of over {_MAX_DIGITS} digits")
  return int(digits)
