"""Named entities in CoNLL's columns: a word and its tag a line, a blank line after each sentence."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from realm_tf import artifacts, paths

_TAG = re.compile(r"O|([BIESLU])-(\S+)")  # of IO, BIO (IOB1 and IOB2), BIOES and BILOU
_BEGIN, _END = frozenset("BSU"), frozenset("ESLU")
_DOCUMENT = "-DOCSTART-"
_CLOSING = re.compile(r"[.,;:!?%)\]}»”’…]+|n['’]t|['’](?:s|m|d|re|ve|ll)", re.I)  # no space before
_OPENING = frozenset("( [ { « “ ‘ $ £ € #".split())  # no space after


class ConllError(artifacts.UserError):
  """Files with no sentences to learn from."""


class Span(NamedTuple):
  """A named entity: characters [start, end) of its sentence, and its type."""

  start: int
  end: int
  label: str


class Sentence(NamedTuple):
  """A sentence as it is written outside of such files, and its names in order."""

  text: str
  spans: tuple[Span, ...]


Document = list[Sentence]


def matching(patterns: str) -> list[str]:
  """Paths of files and globs that are separated by commas.

  Raises:
    ConllError: one of them matches nothing.
  """
  found = []
  for pattern in paths.split(patterns):
    files = paths.matching(pattern)
    if not files:
      raise ConllError(f"no file matches {pattern!r}; give files in CoNLL's columns (a word and its tag a line, a blank "
                       "line after each sentence).")
    found += files
  return found


def read(path: str, *, types: Collection[str] = ()) -> tuple[list[Document], Counter]:
  """Reads one file: the first column is the word, the last its tag, columns are separated by blanks or tabs.

  Args:
    path: the file.
    types: what names to keep; none: all.

  Returns:
    Its documents (one, where it has no -DOCSTART- lines), and how many lines were left out, by reason: "not_utf8", "no_tag",
    "unknown_tag".
  """
  documents, words, tags, dropped = [[]], [], [], Counter()
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
  """The first documents, and the last ones with about `share` of the sentences.

  The sentences of a document speak of the same names, so documents stay whole; only where there is a single one, which may be
  many whose bounds are not told, it is cut: once, so that one document at most lies on both sides.
  """
  if len(documents) == 1:
    cut = round(len(documents[0]) * (1 - share))
    return [documents[0][:cut]], [documents[0][cut:]]
  wanted, best, held = share * sum(map(len, documents)), 0, 0
  for number, document in enumerate(reversed(documents), start=1):
    if abs(held + len(document) - wanted) >= abs(held - wanted):
      break
    held, best = held + len(document), number
  return list(documents[:len(documents) - best]), list(documents[len(documents) - best:])


def spans_of(tags: Sequence[str]) -> list[Span]:
  """The names that tags of any scheme mark, as ranges of words: a name goes on where type and scheme allow it."""
  spans, open_type = [], None
  for at, tag in enumerate(tags):
    prefix, label = _TAG.fullmatch(tag).groups()
    if label is not None and label == open_type and prefix not in _BEGIN:
      spans[-1] = spans[-1]._replace(end=at + 1)
    elif label is not None:
      spans.append(Span(at, at + 1, label))
    open_type = None if prefix in _END else label
  return spans


def _sentence(words: Sequence[str], tags: Sequence[str], types: Collection[str]) -> Sentence:
  text, starts = detokenise(words)
  spans = (Span(starts[span.start], starts[span.end - 1] + len(words[span.end - 1]), span.label)
           for span in spans_of(tags) if not types or span.label in types)
  return Sentence(text, tuple(spans))


def detokenise(words: Sequence[str]) -> tuple[str, list[int]]:
  """Words and punctuation as they are written, and the character where each begins."""
  text, starts, after_opening, quoted = "", [], True, False
  for word in words:
    closing = quoted if word == '"' else _CLOSING.fullmatch(word)
    text += "" if closing or after_opening else " "
    starts.append(len(text))
    text += word
    after_opening = not quoted if word == '"' else word in _OPENING
    quoted ^= word == '"'
  return text, starts
