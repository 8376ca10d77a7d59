"""Outlines: the readable text of HTML by section, collected while it is parsed."""

from collections.abc import Mapping
from typing import NamedTuple

from realm_tf.storage.json_lines import BadRecord

MAX_HEADING_CHARS = 300  # a longer heading is text
# A reader adds it to a page, to see whether an element that is never closed hides the rest.
_END = "realm-end-of-page"
END_MARK = f"</p><{_END}>"
_MAX_DEPTH = 2000  # the parser's time grows with the depth times the number of elements

_HEADINGS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
# Programs, pictures, controls and navigation.
_LEFT_OUT = frozenset(
  "script style template noscript nav footer menu button select textarea datalist svg canvas audio"
  " video iframe object applet".split()
)
_ROLES_LEFT_OUT = ("navigation", "banner", "contentinfo", "search")
_CELLS = ("td", "th")
# Elements that are not part of the line around them.
_BLOCKS = frozenset(
  "address article aside blockquote body br caption center dd details dialog dir div dl dt fieldset"
  " figcaption figure form header hgroup hr html legend li main ol option p pre section summary"
  " table tbody tfoot thead tr ul".split()
)


class Section(NamedTuple):
  """A heading and the text below it, up to the next heading.

  Attributes:
    level: 1 to 6, or 0 for the text before the first heading.
    heading: on one line; empty for level 0.
    text: lines. A row of a table is a line, with " | " between its cells.
  """

  level: int
  heading: str
  text: str


class Outline:
  """A target for an HTML parser of lxml, which calls its methods. No tree is made.

  Attributes:
    title: of the element <title>, or empty.
    sections: all of them, once the parser is closed.
    is_whole: whether END_MARK was read, and not inside of what is left out.
    hides_end: if not, what it was inside of, such as "<nav>", and how many characters of the page
      this has left out.
  """

  def __init__(self) -> None:
    self.title = ""
    self.sections: list[Section] = []
    self.is_whole = False
    self.hides_end: tuple[str, int | None] = ("a tag", None)
    self._left_out, self._num_chars = "", 0  # the last element that was left out
    self._level, self._heading = 0, ""
    self._lines: list[str] = []
    self._words: list[str] = []  # of the line that is being read
    self._inside = ""  # the heading or title that is being read
    self._depth = self._num_left_out = self._num_pre = self._num_cells = (
      0  # open elements of these kinds
    )

  def start(self, tag: str, attributes: Mapping[str, str]) -> None:
    """Begins an element.

    Raises:
      BadRecord: elements are nested too deep.
    """
    self._depth += 1
    if self._depth > _MAX_DEPTH:
      raise BadRecord("too_deep", f"elements are nested over {_MAX_DEPTH:,} levels deep")
    if tag == _END:
      self.is_whole, self.hides_end = not self._num_left_out, (self._left_out, self._num_chars)
    if self._num_left_out or _is_left_out(tag, attributes):
      if not self._num_left_out:
        self._left_out, self._num_chars = f"<{tag}>", 0
      self._num_left_out += 1
    elif not self._inside and (tag in _HEADINGS or tag == "title" and not self.title):
      self._end_line()
      self._inside = tag
    elif tag in _CELLS:
      self._num_cells += 1
      if any(word.strip() for word in self._words):
        self._words.append(" | ")
    elif tag in _BLOCKS:
      self._break()
      self._num_pre += tag == "pre"

  def end(self, tag: str) -> None:
    """Ends an element. The parser ends each that it begins."""
    self._depth -= 1
    if self._num_left_out:
      self._num_left_out -= 1
    elif tag == self._inside:
      self._end_heading(tag)
    elif tag in _CELLS:
      self._num_cells -= 1
    elif tag in _BLOCKS:
      self._break()
      self._num_pre -= tag == "pre"

  def data(self, text: str) -> None:
    """Adds text inside an element."""
    text, mark, _ = text.partition(END_MARK)
    if self._num_left_out:
      self._num_chars += len(text)
    if mark:  # inside of an element that has no elements inside
      self.is_whole = not self._num_left_out and not self._inside
      self.hides_end = (
        (self._left_out, self._num_chars) if self._num_left_out else ("<title>", None)
      )
    if self._num_left_out:
      return
    first, *more = text.split("\n") if self._num_pre else [text]
    self._words.append(first)
    for line in more:
      self._break()
      self._words.append(line)

  def comment(self, text: str) -> None:
    """Passes over a comment."""
    text, mark, _ = text.partition(END_MARK)
    if mark:
      self.hides_end = ("a comment", len(text))

  def close(self) -> "Outline":
    """Returns the outline after the last element."""
    self._end_line()
    self._end_section()
    return self

  def _break(self) -> None:
    """Ends a line, except in a heading or a cell, which are on one line."""
    if self._inside or self._num_cells:
      self._words.append(" ")
    else:
      self._end_line()

  def _end_line(self) -> None:
    line = "".join(self._words)
    self._words.clear()
    if line.strip():
      self._lines.append(line.rstrip() if self._num_pre else " ".join(line.split()))

  def _end_heading(self, tag: str) -> None:
    self._inside = ""
    heading = " ".join("".join(self._words).split())
    if len(heading) > MAX_HEADING_CHARS:
      self._end_line()
      return
    self._words.clear()
    heading = heading.removesuffix("¶").rstrip()  # the link to itself that documentation has
    if tag == "title":
      self.title = heading
    elif heading:
      self._end_section()
      self._level, self._heading = _HEADINGS[tag], heading

  def _end_section(self) -> None:
    self.sections.append(Section(self._level, self._heading, "\n".join(self._lines)))
    self._lines.clear()


def _is_left_out(tag: str, attributes: Mapping[str, str]) -> bool:
  return (
    tag in _LEFT_OUT
    or "hidden" in attributes
    or attributes.get("aria-hidden") == "true"
    or attributes.get("role") in _ROLES_LEFT_OUT
  )
