"""What a user can mend."""


class UserError(ValueError):
  """A mistake that the person at the keyboard can mend; commands print it as one line, without a traceback."""


class ArtifactError(UserError):
  """A folder is missing, incomplete, of another kind, or does not belong with the others it is used with."""
