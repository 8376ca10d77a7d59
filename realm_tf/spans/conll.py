"""Named entities in CoNLL column format.

Each line has a word and its tag. A blank line follows each sentence.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from realm_tf.storage import artifacts, paths

_TAG = re.compile(r"O|([BIESLU])-(\S+)")  # IO, BIO (IOB1 and IOB2), BIOES and BILOU
_BEGIN, _END = frozenset("BSU"), frozenset("ESLU")
_DOCUMENT = "-DOCSTART-"
_CLOSING = re.compile(r"[.,;:!?%)\]}»”’…]+|n['’]t|['’](?:s|m|d|re|ve|ll)", re.I)  # no space before
_OPENING = frozenset("( [ { « “ ‘ $ £ € #".split())  # no space after


class ConllError(artifacts.UserError):
  """Raised for files without sentences to learn from."""


class Span(NamedTuple):
  """A named entity: a character range [start, end) of its sentence, and its type."""

  start: int
  end: int
  label: str


class Sentence(NamedTuple):
  """A sentence as ordinary text, and its names in order."""

  text: str
  spans: tuple[Span, ...]


Document = list[Sentence]


def matching(patterns: str) -> list[str]:
  """Returns the paths that match files and globs separated by commas.

  Raises:
    ConllError: if one of them matches nothing.
  """
  found = []
  for pattern in paths.split(patterns):
    files = paths.matching(pattern)
    if not files:
      raise ConllError(
        f"no file matches {pattern!r}; give files in CoNLL column format (a word and its tag per "
        "line, a blank line after each sentence)."
      )
    found += files
  return found


def read(path: str, *, types: Collection[str] = ()) -> tuple[list[Document], Counter]:
  """Reads one file, whose first column is the word and whose last column is the tag.

  Columns are separated by spaces or tabs.

  Args:
    path: the file.
    types: types of names to keep; empty for all.

  Returns:
    The documents (one if there are no -DOCSTART- lines), and the number of lines left out, by
    reason: "not_utf8", "no_tag", "unknown_tag".
  """
  documents: list[Document] = [[]]
  words: list[str] = []
  tags: list[str] = []
  dropped: Counter[str] = Counter()
  with artifacts.gfile.GFile(path, "rb") as file:
    lines = file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
  for line in [*lines, b""]:
    try:
      columns = re.split(r"[ \t]+", line.decode().strip(" \t\r"))
    except UnicodeDecodeError:
      dropped["not_utf8"] += 1
      continue
    if columns == [""] or columns[0] == _DOCUMENT:
      if words:
        documents[-1].append(_sentence(words, tags, types))
        words, tags = [], []
      if columns[0] == _DOCUMENT:
        documents.append([])
    elif len(columns) == 1:
      dropped["no_tag"] += 1
    elif not _TAG.fullmatch(columns[-1]):
      dropped["unknown_tag"] += 1
    else:
      words.append(columns[0])
      tags.append(columns[-1])
  return [document for document in documents if document], dropped


def split(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
  """Splits documents in two: the first ones, and the last ones with about `share` of the sentences.

  Documents stay whole, because the sentences of a document mention the same names. Only a single
  document is cut, because it may be many documents without marked bounds. It is cut once, so that
  at most one of them is on both sides.
  """
  if len(documents) == 1:
    cut = round(len(documents[0]) * (1 - share))
    return [documents[0][:cut]], [documents[0][cut:]]
  wanted, best, held = share * sum(map(len, documents)), 0, 0
  for number, document in enumerate(reversed(documents), start=1):
    if abs(held + len(document) - wanted) >= abs(held - wanted):
      break
    held, best = held + len(document), number
  return list(documents[: len(documents) - best]), list(documents[len(documents) - best :])


def spans_of(tags: Sequence[str]) -> list[Span]:
  """Returns the names that tags of any scheme mark, as ranges of words.

  A name continues wherever type and scheme allow it.
  """
  spans: list[Span] = []
  open_type = None
  for at, tag in enumerate(tags):
    match = _TAG.fullmatch(tag)
    assert match, tag
    prefix, label = match.groups()
    if label is not None and label == open_type and prefix not in _BEGIN:
      spans[-1] = spans[-1]._replace(end=at + 1)
    elif label is not None:
      spans.append(Span(at, at + 1, label))
    open_type = None if prefix in _END else label
  return spans


def _sentence(words: Sequence[str], tags: Sequence[str], types: Collection[str]) -> Sentence:
  text, starts = detokenise(words)
  spans = (
    Span(starts[span.start], starts[span.end - 1] + len(words[span.end - 1]), span.label)
    for span in spans_of(tags)
    if not types or span.label in types
  )
  return Sentence(text, tuple(spans))


def detokenise(words: Sequence[str]) -> tuple[str, list[int]]:
  """Joins words and punctuation to ordinary text; also returns the character where each begins."""
  text, starts, after_opening, quoted = "", [], True, False
  for word in words:
    closing = quoted if word == '"' else _CLOSING.fullmatch(word)
    text += "" if closing or after_opening else " "
    starts.append(len(text))
    text += word
    after_opening = not quoted if word == '"' else word in _OPENING
    quoted ^= word == '"'
  return text, starts
