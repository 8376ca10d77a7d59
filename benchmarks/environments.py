"""Environments of the peers, each with pinned packages."""

import os
import subprocess
import sys

from realm_tf import errors

ROOT = "runs/environments"  # by default
PINS = {
  "faiss": ("faiss-cpu==1.15.1", "numpy==2.4.6"),
  "torch": ("torch==2.13.0", "numpy==2.4.6"),
  "transformers": ("torch==2.13.0", "transformers==4.39.3", "numpy==1.26.4"),
}
_INSTALLED = "installed.txt"  # the pins of a finished environment


def python_of(root: str, name: str) -> str:
  """Returns the path of an environment's Python."""
  return os.path.join(root, name, "bin", "python")


def exists(root: str, name: str) -> bool:
  """Returns whether an environment is there with the packages of PINS."""
  try:
    with open(os.path.join(root, name, _INSTALLED), encoding="utf-8") as file:
      return tuple(file.read().split()) == PINS[name]
  except FileNotFoundError:
    return False


def make(root: str, name: str) -> None:
  """Makes an environment with pip, unless it exists.

  Raises:
    UserError: pip could not install the packages.
  """
  if exists(root, name):
    return
  print(f"{os.path.join(root, name)}: installing {', '.join(PINS[name])}", flush=True)
  python = python_of(root, name)
  commands = (
    [sys.executable, "-m", "venv", os.path.join(root, name)],
    [python, "-m", "pip", "install", "--quiet", *PINS[name]],
  )
  for command in commands:
    if subprocess.run(command).returncode:
      raise errors.UserError(
        f"{' '.join(command)} failed; its messages are above. The environment {name!r} needs "
        "Python 3.11 and a package registry. Or leave it out."
      )
  with open(os.path.join(root, name, _INSTALLED), "w", encoding="utf-8") as file:
    file.write("\n".join(PINS[name]) + "\n")
