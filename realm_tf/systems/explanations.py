"""Explanations that `realm_tf.explain` makes, and how they are shown in a terminal.

`explanation_page` shows them as a web page.
"""

import dataclasses
import io
import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from realm_tf.corpus import marks
from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.corpus.marks import Mark
from realm_tf.corpus.vocabularies import MASK

BLANK = re.compile(rf"{re.escape(MASK)}(?:\s*{re.escape(MASK)})*")  # adjacent masks

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_STYLES = {"evidence": "black on bright_yellow", "span": "underline", "unread": "dim"}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
CAPTIONS = {
  "text": (
    "p(y|x) = Σ p(y|z,x) p(z|x) over the candidates (REALM, equation 1). p(z|x) is the softmax of "
    "f(x,z), the inner product of x's and z's embeddings; p(y|z,x) is the reader's probability "
    "given x and z; p(y,z|x) is the contribution of z to p(y|x).",
    "Retrieval utility: log p(y|z,x) − log p(y|∅,x), how much z helps the reader compared to no "
    "passage at all.",
    "y is marked wherever it occurs in a passage; greyed text did not fit into the reader. "
    "The longest bar is the largest number of its kind.",
  ),
  "question": (
    "p(z|x) is the softmax of f(x,z), the inner product of x's and z's embeddings, over the "
    "retriever's beam. Every span of the passages read competes with all others by the reader's "
    "score plus f(x,z); p(y,z|x) is the probability of the spans in z that read y, p(y|x) that of "
    "all spans that read y (ORQA, section 3).",
    "y is marked wherever it occurs in a passage; each passage's best span is underlined; greyed "
    "text did not fit into the reader. The longest bar is the largest number of its kind.",
  ),
}


# ============================================================================================ found


@dataclasses.dataclass(frozen=True)
class Measure:
  """A named number of a candidate; `kind` is "probability", "signed" or "plain"."""

  name: str
  value: float
  kind: str

  @property
  def shown(self) -> str:
    show = {"probability": show_probability, "signed": show_signed, "plain": "{:.2f}".format}[
      self.kind
    ]
    return show(self.value).replace("-", "−")


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A candidate z for a text or question x with answer y.

  Attributes:
    number: number of the passage; NULL_PASSAGE for the null passage.
    title, text: as written.
    score: f(x, z).
    prior: p(z|x), over the candidates of a text, or over the retriever's beam of a question.
    likelihood: p(y|z,x); None for a question, where the spans of all passages compete with each
      other.
    utility: retrieval utility, log p(y|z,x) − log p(y|∅,x), natural; None for a question.
    joint: p(y,z|x); the sum over all candidates is p(y|x).
    reader_score: reader score of the best span; None for a text.
    best_span: byte range of the best span in the UTF-8 text; None for a text.
    evidence: byte ranges in the UTF-8 text where y occurs.
    bytes_read: number of bytes of the UTF-8 text that fitted into the reader.
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
    """Returns the measures to show, in the order of equation 1."""
    found = [
      ("f(x,z)", self.score, "plain"),
      ("p(z|x)", self.prior, "probability"),
      ("reader", self.reader_score, "signed"),
      ("p(y|z,x)", self.likelihood, "probability"),
      ("p(y,z|x)", self.joint, "probability"),
      ("utility", self.utility, "signed"),
    ]
    return [Measure(name, value, kind) for name, value, kind in found if value is not None]

  def runs(self) -> Sequence[marks.Run]:
    """Splits the text into parts, each marked with any of "evidence", "span" and "unread"."""
    named = [Mark("evidence", *span) for span in self.evidence]
    named += [Mark("span", *self.best_span)] if self.best_span else []
    return marks.runs(self.text, [*named, Mark("unread", self.bytes_read, len(self.text.encode()))])


@dataclasses.dataclass(frozen=True)
class Explanation:
  """The explanation of a prediction for x with one corpus.

  Attributes:
    index, passages: folders.
    num_passages: number of passages in the corpus.
    answer: y.
    probability: p(y|x).
    without_retrieval: p(y|∅,x); None for a question.
    utility: log p(y|x) − log p(y|∅,x), natural; None for a question.
    own_passage: the passage that contains the text as a sentence and is therefore not a candidate;
      None if there is none.
    candidates: best first; for a text, after the null passage.
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
    """Returns (name, value, meaning) of the main results."""
    shown = show_probability(self.probability)
    if self.without_retrieval is None or self.utility is None:
      return [("p(y|x)", shown, "of all spans that read y")]
    return [
      ("p(y|∅,x)", show_probability(self.without_retrieval), "without retrieval"),
      ("p(y|x)", shown, "with retrieval"),
      ("utility", show_signed(self.utility), "log p(y|x) − log p(y|∅,x)"),
    ]

  def notes(self) -> list[str]:
    if self.own_passage is None:
      return []
    return [
      f"Passage {self.own_passage} contains this sentence itself and is not a candidate "
      "(REALM, section 3.4)."
    ]


@dataclasses.dataclass(frozen=True)
class PossibleAnswer:
  """One of the possible answers y.

  Attributes:
    text: y.
    without_retrieval: p(y|∅,x); None for a question.
    probabilities: p(y|x) with each corpus.
  """

  text: str
  without_retrieval: float | None
  probabilities: Sequence[float]


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
  """A full explanation; `print(report)` shows it as `realm_tf.explain` does.

  Attributes:
    kind: "text" or "question".
    x: the text with [MASK], or the question.
    snapshot: folder of the snapshot.
    step: step of the snapshot.
    explanations: one for each corpus.
    answers: the most probable answers with every corpus and with the null passage, ordered by their
      probability with the last corpus.
  """

  kind: str
  x: str
  snapshot: str
  step: int
  explanations: Sequence[Explanation]
  answers: Sequence[PossibleAnswer]

  def __repr__(self) -> str:
    found = [
      f"{one.answer!r}, probability={one.probability:.4g}, {len(one.candidates)} candidates"
      for one in self.explanations
    ]
    return f"Report({self.x!r}: {'; '.join(found)})"

  def __str__(self) -> str:
    printed = io.StringIO()
    print_report(self, Console(file=printed, width=100, no_color=True, highlight=False))
    return printed.getvalue()

  def corpora(self) -> list[str]:
    """Returns the name of each explanation's corpus; "" if there is only one."""
    num = len(self.explanations)
    return [f"corpus {number}" for number in range(1, num + 1)] if num > 1 else [""]

  def columns(self) -> list[str]:
    """Returns the names of the probabilities in `rows`."""
    return ["p(y|∅,x)"] * (self.kind == "text") + [
      f"p(y|x), {name}" if name else "p(y|x)" for name in self.corpora()
    ]

  def rows(self) -> list[tuple[str, list[float]]]:
    """Returns the answers with their probabilities."""
    return [
      (answer.text, [p for p in (answer.without_retrieval, *answer.probabilities) if p is not None])
      for answer in self.answers
    ]


def best_first(answers: Iterable[PossibleAnswer]) -> list[PossibleAnswer]:
  """Sorts answers by their probability with the last corpus."""
  return sorted(answers, key=lambda answer: -answer.probabilities[-1])


def show_probability(p: float) -> str:
  """Formats a probability as 0.129, 0.0042, or 1.1×10⁻¹⁴."""
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


# ========================================================================================= terminal


def print_report(report: Report, console: Console) -> None:
  """Prints a report to the width of the console; without colours, evidence is marked >>so<<."""
  console.print(_grid([("x", _plain(report.x, "bold"))]))
  for name, explanation in zip(report.corpora(), report.explanations, strict=True):
    console.print()
    console.rule(_plain(label(name or "corpus", explanation)), align="left", style="dim")
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


def _print_candidate(
  rank: int, candidate: Candidate, names: Sequence[str], console: Console
) -> None:
  shown = {measure.name: measure.shown for measure in candidate.measures()}
  null = candidate.number == NULL_PASSAGE
  console.print(
    f"{'∅' if null else rank:>4}" + "".join(f"{shown.get(name, ''):>11}" for name in names)
  )
  if null:
    return
  brackets = (">>", "<<") if not console.is_terminal or console.no_color else ("", "")
  text = _plain(candidate.title, "bold").append("  ")
  for run in candidate.runs():
    begin, end = brackets if "evidence" in run.names else ("", "")
    styles = [style for name, style in _STYLES.items() if name in run.names]
    text.append(_plain(begin + run.text + end, " ".join(styles)))
  console.print(Padding(text, (0, 0, 1, 6)))


def label(name: str, explanation: Explanation) -> str:
  return f"{name}: {explanation.num_passages:,} passages of {explanation.passages}"


def _grid(rows: Iterable[tuple[str, str | Text]]) -> Table:
  grid = Table.grid(padding=(0, 2))
  grid.add_column(style="dim", min_width=8)
  grid.add_column(overflow="fold")
  for row in rows:
    grid.add_row(*row)
  return grid


def _plain(text: str, style: str = "") -> Text:
  """Removes control characters, which a corpus may hold, before text reaches the terminal."""
  return Text(_CONTROL.sub(" ", text), style=style)
