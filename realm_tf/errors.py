"""What a user can mend."""


class UserError(ValueError):
  """A mistake that the person at the keyboard can mend; commands print it as one line, without a traceback."""


class ArtifactError(UserError):
  """A folder is missing, incomplete, of another kind, or does not belong with the others it is used with."""


def words_of(error: Exception) -> str:
  """An error that ends a command, in one line for people."""
  if isinstance(error, UserError):
    return str(error)
  if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":
    return f"{error.object!r} is not UTF-8, as names of files must be here. Rename it."
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return lines[-1] if lines else type(error).__name__
