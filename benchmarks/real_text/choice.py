"""Chooses the config for a command line of this benchmark."""

import argparse
from collections.abc import Sequence

from configs import real_text as config_file


def config_path(argv: Sequence[str]) -> str:
  """Returns the config for --corpus and --start, which must be read before flags of the config."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument("--corpus", default="covid", choices=config_file.CORPORA)
  parser.add_argument("--start", default="scratch", choices=config_file.STARTS)
  chosen, _ = parser.parse_known_args(argv[1:])
  return f"{config_file.__file__}:{chosen.corpus}+{chosen.start}"
