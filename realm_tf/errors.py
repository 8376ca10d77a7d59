"""Errors that the user can fix."""

import re

# Characters that a terminal may interpret as commands, except the end of a line.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
  """Makes a text safe to print on a terminal: its control characters become spaces."""
  return CONTROL.sub(" ", text)


class UserError(ValueError):
  """A mistake that the user can fix.

  Commands print it as one line, without a traceback. Control characters, which a name or another
  library's error may have, become spaces.
  """

  def __str__(self) -> str:
    return plain(super().__str__())


class ArtifactError(UserError):
  """A folder is missing, incomplete, of another kind, or does not match the other folders used."""


def words_of(error: Exception) -> str:
  """Describes an error that ends a command in one line."""
  if isinstance(error, UserError):
    return str(error)
  if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":
    return f"{error.object!r} is not UTF-8, but file names must be. Rename it."
  lines = [plain(line).strip() for line in str(error).splitlines() if line.strip()]
  if isinstance(error, KeyError) and lines:  # its text is only the key
    return f"missing key: {lines[-1]}"
  return lines[-1] if lines else type(error).__name__
