"""NumPy's files of one array (.npy).

These files have no name for bfloat16; such arrays are stored as uint16 with the same bits.
"""

import ml_dtypes
import numpy as np

from realm_tf.storage import artifacts


def write(path: str, array: np.ndarray) -> None:
  """Writes an array, of any numbers but uint16."""
  stored = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
  with artifacts.gfile.GFile(path, "wb") as file:
    np.save(file, stored, allow_pickle=False)


def read(path: str, *, advice: str) -> np.ndarray:
  """Reads an array.

  `advice` says what to do if the file holds no array.

  Raises:
    ArtifactError: it is not such a file.
  """
  try:
    with artifacts.gfile.GFile(path, "rb") as file:
      array = np.load(file, allow_pickle=False)
  except (ValueError, EOFError, SyntaxError) as error:
    raise _not_an_array(path, advice) from error
  return array.view(_type_of(array.dtype))


def header(path: str, *, advice: str) -> tuple[tuple[int, ...], np.dtype]:
  """Returns the shape and type of an array from the header of its file; otherwise like `read`."""
  try:
    with artifacts.gfile.GFile(path, "rb") as file:
      np.lib.format.read_magic(file)
      shape, _, dtype = np.lib.format.read_array_header_1_0(file)
  except (ValueError, EOFError, SyntaxError) as error:
    raise _not_an_array(path, advice) from error
  return shape, _type_of(dtype)


def _type_of(stored: np.dtype) -> np.dtype:
  return np.dtype(ml_dtypes.bfloat16) if stored == np.uint16 else stored


def _not_an_array(path: str, advice: str) -> artifacts.ArtifactError:
  return artifacts.ArtifactError(f"{path!r} is not a NumPy array. {advice}")
