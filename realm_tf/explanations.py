"""What `realm_tf.explain` finds, and how it is shown: in a terminal, and as a web page of one file."""

import collections
import dataclasses
import itertools
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from xml.etree import ElementTree

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from realm_tf import artifacts
from realm_tf.examples import NULL_PASSAGE
from realm_tf.tokenization import MASK

BLANK = re.compile(rf"{re.escape(MASK)}(?:\s*{re.escape(MASK)})*")  # masks side by side

_TEMPLATE = os.path.join(os.path.dirname(__file__), "explanations.html")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_STYLES = {"evidence": "black on bright_yellow", "span": "underline", "unread": "dim"}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_CAPTIONS = {
    "text": (
        "p(y|x) = Σ p(y|z,x) p(z|x) over the candidates (REALM, equation 1). p(z|x) is the softmax of f(x,z), the inner product "
        "of x's and z's embeddings; p(y|z,x) is the reader's, with z beside x; p(y,z|x) is what z adds to p(y|x).",
        "Retrieval utility: log p(y|z,x) − log p(y|∅,x), what z is worth to the reader beside no passage at all.",
        "y is marked wherever it stands in a passage; what is greyed did not fit into the reader. The longest bar is the largest "
        "number of its kind."),
    "question": (
        "p(z|x) is the softmax of f(x,z), the inner product of x's and z's embeddings, over the retriever's beam. Every span of "
        "the passages read competes with all others by the reader's score plus f(x,z); p(y,z|x) is the share of those in z that "
        "read y, p(y|x) that of all (ORQA, section 3).",
        "y is marked wherever it stands in a passage, each passage's best span is underlined; what is greyed did not fit into "
        "the reader. The longest bar is the largest number of its kind.")}


# ================================================================================================================ found


@dataclasses.dataclass(frozen=True)
class Measure:
  """A named number of a candidate; `kind` is "probability", "signed" or "plain"."""

  name: str
  value: float
  kind: str

  @property
  def shown(self) -> str:
    show = {"probability": show_probability, "signed": show_signed, "plain": "{:.2f}".format}[self.kind]
    return show(self.value).replace("-", "−")


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A candidate z for a text or question x with answer y.

  Attributes:
    number: of the passage; NULL_PASSAGE for the null passage.
    title, text: as written.
    score: f(x, z).
    prior: p(z|x), over the candidates of a text, or over the retriever's beam of a question.
    likelihood: p(y|z,x); None for a question, where the spans of all passages compete with each other.
    utility: retrieval utility, log p(y|z,x) − log p(y|∅,x), natural; None for a question.
    joint: p(y,z|x); all together are p(y|x).
    reader_score: of the best span; None for a text.
    best_span: byte range of the best span in the UTF-8 text; None for a text.
    evidence: byte ranges in the UTF-8 text where y stands.
    bytes_read: how much of the UTF-8 text fitted into the reader.
  """

  number: int
  title: str
  text: str
  score: float
  prior: float
  likelihood: float | None
  utility: float | None
  joint: float
  reader_score: float | None
  best_span: tuple[int, int] | None
  evidence: Sequence[tuple[int, int]]
  bytes_read: int

  def measures(self) -> list[Measure]:
    """What is shown, in the order of equation 1."""
    found = [
        ("f(x,z)", self.score, "plain"), ("p(z|x)", self.prior, "probability"), ("reader", self.reader_score, "signed"),
        ("p(y|z,x)", self.likelihood, "probability"), ("p(y,z|x)", self.joint, "probability"),
        ("utility", self.utility, "signed")]
    return [Measure(*row) for row in found if row[1] is not None]

  def runs(self) -> list[tuple[str, set[str]]]:
    """The text in pieces, each with what it is of "evidence", "span" and "unread"."""
    data = self.text.encode()
    named = [*(("evidence", *span) for span in self.evidence), ("unread", self.bytes_read, len(data))]
    named += [("span", *self.best_span)] if self.best_span else []
    cuts = sorted({0, len(data), *(at for _, *span in named for at in span)})
    return [(data[start:end].decode(), {name for name, first, last in named if first <= start and end <= last})
            for start, end in itertools.pairwise(cuts)]


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What one corpus makes of x.

  Attributes:
    index, passages: folders.
    num_passages: of the corpus.
    answer: y.
    probability: p(y|x).
    without_retrieval: p(y|∅,x); None for a question.
    utility: log p(y|x) − log p(y|∅,x), natural; None for a question.
    own_passage: the passage that the text is a sentence of, which is no candidate; None where there is none.
    candidates: best first; of a text after the null passage.
  """

  index: str
  passages: str
  num_passages: int
  answer: str
  probability: float
  without_retrieval: float | None
  utility: float | None
  own_passage: int | None
  candidates: Sequence[Candidate]

  def headline(self) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of what came out."""
    shown = show_probability(self.probability)
    if self.without_retrieval is None:
      return [("p(y|x)", shown, "of all spans that read y")]
    return [("p(y|∅,x)", show_probability(self.without_retrieval), "without retrieval"), ("p(y|x)", shown, "with retrieval"),
            ("utility", show_signed(self.utility), "log p(y|x) − log p(y|∅,x)")]

  def notes(self) -> list[str]:
    if self.own_passage is None:
      return []
    return [f"Passage {self.own_passage} holds this very sentence and is no candidate (REALM, section 3.4)."]


@dataclasses.dataclass(frozen=True)
class Answer:
  """Some y: p(y|∅,x) (None for a question), and p(y|x) with each corpus."""

  text: str
  without_retrieval: float | None
  probabilities: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Report:
  """All that is shown.

  Attributes:
    kind: "text" or "question".
    x: the text with [MASK], or the question.
    snapshot: folder.
    step: of the snapshot.
    explanations: of each corpus.
    answers: the most probable of every corpus and of the null passage, best by the last corpus first.
  """

  kind: str
  x: str
  snapshot: str
  step: int
  explanations: Sequence[Explanation]
  answers: Sequence[Answer]

  def corpora(self) -> list[str]:
    """What each explanation's corpus is called: nothing where there is one."""
    num = len(self.explanations)
    return [f"corpus {number}" for number in range(1, num + 1)] if num > 1 else [""]

  def columns(self) -> list[str]:
    """Names of the probabilities of every answer, as `rows` has them."""
    return ["p(y|∅,x)"] * (self.kind == "text") + [f"p(y|x), {name}" if name else "p(y|x)" for name in self.corpora()]

  def rows(self) -> list[tuple[str, list[float]]]:
    """The answers with their probabilities."""
    alone = self.kind == "text"
    return [(answer.text, [answer.without_retrieval] * alone + list(answer.probabilities)) for answer in self.answers]


def show_probability(p: float) -> str:
  """0.129, 0.0042, or 1.1×10⁻¹⁴."""
  if p == 0:
    return "0"
  if p >= 0.1:
    return f"{p:.3f}"
  if p >= 0.001:
    return f"{p:#.2g}"
  digits, power = f"{p:.1e}".split("e")
  return f"{digits}×10{str(int(power)).translate(_SUPERSCRIPTS)}"


def show_signed(value: float) -> str:
  return f"{value:+.2f}".replace("-", "−")


# ============================================================================================================= terminal


def print_report(report: Report, console: Console) -> None:
  """Prints a report, as wide as the console; evidence is >>so<< where there is no colour."""
  console.print(_grid([("x", _plain(report.x, "bold"))]))
  for name, explanation in zip(report.corpora(), report.explanations):
    console.print()
    console.rule(_plain(_label(name or "corpus", explanation)), align="left", style="dim")
    named = [(name, f"{value:<12}{meaning}") for name, value, meaning in explanation.headline()]
    console.print(_grid([("y", _plain(explanation.answer, "bold")), *named]))
    for note in explanation.notes():
      console.print(note, style="dim")
    names = [measure.name for measure in explanation.candidates[0].measures()]
    console.print("\n    " + "".join(f"{name:>11}" for name in names), style="dim")
    for rank, candidate in enumerate(explanation.candidates, 1 - (report.kind == "text")):
      _print_candidate(rank, candidate, names, console)
  console.print()
  console.rule("most probable answers", align="left", style="dim")
  table = Table("y", box=None, padding=(0, 2, 0, 0), header_style="dim")
  for name in report.columns():
    table.add_column(name, justify="right")
  for text, probabilities in report.rows():
    table.add_row(_plain(text), *map(show_probability, probabilities))
  console.print(table)


def _print_candidate(rank: int, candidate: Candidate, names: Sequence[str], console: Console) -> None:
  shown = {measure.name: measure.shown for measure in candidate.measures()}
  null = candidate.number == NULL_PASSAGE
  console.print(f"{'∅' if null else rank:>4}" + "".join(f"{shown.get(name, ''):>11}" for name in names))
  if null:
    return
  marks = (">>", "<<") if not console.is_terminal or console.no_color else ("", "")
  text = _plain(candidate.title, "bold").append("  ")
  for run, kinds in candidate.runs():
    begin, end = marks if "evidence" in kinds else ("", "")
    text.append(_plain(begin + run + end, " ".join(style for kind, style in _STYLES.items() if kind in kinds)))
  console.print(Padding(text, (0, 0, 1, 6)))


def _label(name: str, explanation: Explanation) -> str:
  return f"{name}: {explanation.num_passages:,} passages of {explanation.passages}"


def _grid(rows: Iterable[tuple[str, str | Text]]) -> Table:
  grid = Table.grid(padding=(0, 2))
  grid.add_column(style="dim", min_width=8)
  grid.add_column(overflow="fold")
  for row in rows:
    grid.add_row(*row)
  return grid


def _plain(text: str, style: str = "") -> Text:
  """A corpus may hold control characters; none of them reaches the terminal."""
  return Text(_CONTROL.sub(" ", text), style=style)


# ============================================================================================================= web page


def html_page(report: Report) -> str:
  """One file that loads nothing; what comes from the user or the corpus is put in as text."""
  named, axes = list(zip(report.corpora(), report.explanations)), _axes(report)
  body = [
      _tag("header", _tag("h1", "REALM"), _tag("p", "Look inside"), _tag("p", f"snapshot {report.step}")),
      _tag("section", _tag("h2", "x"), _tag("p", *_with_masks(report.x), cls="x"), cls="query"),
      _tag("div", *(_headline(*one) for one in named), _answers(report), cls="cards"),
      _tag("div", *(_candidates(*one, axes) for one in named), cls="corpora"),
      _tag("footer", *(_tag("p", caption) for caption in _CAPTIONS[report.kind]))]
  page = string.Template(artifacts.read_text(_TEMPLATE))
  return page.substitute(title=_html(_tag("title", f"{report.x} – REALM")), body="\n".join(map(_html, body)))


def _axes(report: Report) -> dict[str, tuple[float, float]]:
  """Name of each measure → its lowest and highest value of all corpora, zero included."""
  values = collections.defaultdict(lambda: [0.0])
  for explanation in report.explanations:
    for candidate in explanation.candidates:
      for measure in candidate.measures():
        values[measure.name].append(measure.value)
  return {name: (min(found), max(found)) for name, found in values.items()}


def _tag(name: str, *children: str | ElementTree.Element, cls: str = "", **attributes: str) -> ElementTree.Element:
  element = ElementTree.Element(name, attributes | ({"class": cls} if cls else {}))
  for child in children:
    if not isinstance(child, str):
      element.append(child)
    elif len(element):
      element[-1].tail = (element[-1].tail or "") + child
    else:
      element.text = (element.text or "") + child
  return element


def _html(element: ElementTree.Element) -> str:
  return ElementTree.tostring(element, encoding="unicode", method="html")


def _with_masks(text: str) -> list[str | ElementTree.Element]:
  masks = [_tag("span", mask, cls="mask") for mask in BLANK.findall(text)]
  return [part for pair in itertools.zip_longest(BLANK.split(text), masks, fillvalue="") for part in pair]


def _headline(name: str, explanation: Explanation) -> ElementTree.Element:
  rows = [_tag("div", _tag("dt", symbol), _tag("dd", _tag("b", value), _tag("span", meaning)))
          for symbol, value, meaning in explanation.headline()]
  heading = _tag("h2", f"y, {name}" if name else "y")
  return _tag("section", heading, _tag("p", explanation.answer, cls="y"), _tag("dl", *rows, cls="headline"))


def _answers(report: Report) -> ElementTree.Element:
  high = max(p for _, probabilities in report.rows() for p in probabilities)
  head = _tag("tr", _tag("td"), *(_tag("th", name, scope="col") for name in report.columns()))
  rows = [_tag("tr", _tag("th", text, scope="row"), *(_tag("td", show_probability(p), _bar(p, 0, high)) for p in probabilities))
          for text, probabilities in report.rows()]
  return _tag("section", _tag("h2", "Most probable answers"), _tag("table", _tag("thead", head), _tag("tbody", *rows)),
              cls="answers")


def _candidates(name: str, explanation: Explanation, axes: Mapping[str, tuple[float, float]]) -> ElementTree.Element:
  items, rank = [], itertools.count(1)
  for candidate in explanation.candidates:
    null = candidate.number == NULL_PASSAGE
    title = "The null passage" if null else candidate.title
    text = [_tag("mark" if kinds else "span", run, cls=" ".join(sorted(kinds))) for run, kinds in candidate.runs()]
    score, *others = candidate.measures()
    heading = _tag("h3", _tag("span", "∅" if null else str(next(rank)), cls="rank"), title,
                   _tag("small", f"{score.name} {score.shown}"))
    rows = [_tag("div", _tag("dt", measure.name), _tag("dd", measure.shown), _bar(measure.value, *axes[measure.name]))
            for measure in others]
    items.append(_tag("li", _tag("dl", *rows, cls="measures"), _tag("div", heading, _tag("p", *text), cls="passage")))
  label = _label(f"Candidates, {name}" if name else "Candidates", explanation)
  notes = [_tag("p", note, cls="note") for note in explanation.notes()]
  return _tag("section", _tag("h2", label), *notes, _tag("ol", *items), cls="candidates")


def _bar(value: float, low: float, high: float) -> ElementTree.Element:
  """From zero to `value` on an axis from `low` to `high`."""
  at = lambda x: f"{100 * (x - low) / ((high - low) or 1):.2f}%"
  return _tag("span", _tag("i"), cls="bar negative" if value < 0 else "bar",
              style=f"--zero:{at(0)};--from:{at(min(value, 0))};--to:{at(max(value, 0))}")
