"""The packages named in requirements files, and those installed."""

import functools
import importlib.metadata
import re

from tests.source_code import REPOSITORY


def pinned(file: str) -> dict[str, str]:
  """Normalised name → version of a requirements file."""
  lines = (REPOSITORY / file).read_text().splitlines()
  pins = (line.split("==") for line in lines if line and not line.startswith("#"))
  return {normalised(name): version for name, version in pins}


def normalised(name: str) -> str:
  return re.sub(r"[-_.]+", "_", name).lower()


@functools.cache
def distributions() -> dict[str, list[str]]:
  return dict(importlib.metadata.packages_distributions())
