"""Finds published encoders in installed packages."""

import importlib.util
import os


def folder(preset: str) -> str:
  """Resolves `package/folder` of an installed package; returns anything else unchanged."""
  package, _, rest = preset.partition("/")
  if os.path.exists(preset) or not package.isidentifier():
    return preset
  found = importlib.util.find_spec(package)
  return os.path.join(os.path.dirname(found.origin), rest) if found and found.origin else preset
