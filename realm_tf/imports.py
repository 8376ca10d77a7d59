"""Imports of libraries that would also import others, only because they are installed."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
  """Makes modules look as if they were not installed, except those that are imported already.

  Args:
    names: top-level modules.
  """
  hidden = set(names) - set(sys.modules)
  for name in hidden:
    sys.modules[name] = None  # type: ignore[assignment]  # makes Python's import fail
  try:
    yield
  finally:
    for name in hidden:
      del sys.modules[name]
