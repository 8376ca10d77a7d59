"""Explanations as single-file web pages."""

import collections
import itertools
import os
import string
from collections.abc import Mapping
from xml.etree import ElementTree

from realm_tf.corpus.candidates import NULL_PASSAGE
from realm_tf.storage import artifacts
from realm_tf.systems import explanations

_TEMPLATE = os.path.join(os.path.dirname(__file__), "explanation_page.html")


def html_page(report: explanations.Report) -> str:
  """Returns a page that loads nothing; input of users and corpora is escaped as text."""
  named = list(zip(report.corpora(), report.explanations, strict=True))
  axes = _axes(report)
  body = [
    _tag(
      "header", _tag("h1", "REALM"), _tag("p", "Look inside"), _tag("p", f"snapshot {report.step}")
    ),
    _tag("section", _tag("h2", "x"), _tag("p", *_with_masks(report.x), cls="x"), cls="query"),
    _tag("div", *(_headline(*one) for one in named), _answers(report), cls="cards"),
    _tag("div", *(_candidates(*one, axes) for one in named), cls="corpora"),
    _tag("footer", *(_tag("p", caption) for caption in explanations.CAPTIONS[report.kind])),
  ]
  page = string.Template(artifacts.read_text(_TEMPLATE))
  return page.substitute(
    title=_html(_tag("title", f"{report.x} – REALM")), body="\n".join(map(_html, body))
  )


def _axes(report: explanations.Report) -> dict[str, tuple[float, float]]:
  """Returns the lowest and highest value of each measure over all corpora, including zero."""
  values: dict[str, list[float]] = collections.defaultdict(lambda: [0.0])
  for explanation in report.explanations:
    for candidate in explanation.candidates:
      for measure in candidate.measures():
        values[measure.name].append(measure.value)
  return {name: (min(found), max(found)) for name, found in values.items()}


def _tag(
  name: str, *children: str | ElementTree.Element, cls: str = "", **attributes: str
) -> ElementTree.Element:
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
  masks = [_tag("span", mask, cls="mask") for mask in explanations.BLANK.findall(text)]
  return [
    part
    for pair in itertools.zip_longest(explanations.BLANK.split(text), masks, fillvalue="")
    for part in pair
  ]


def _headline(name: str, explanation: explanations.Explanation) -> ElementTree.Element:
  rows = [
    _tag("div", _tag("dt", symbol), _tag("dd", _tag("b", value), _tag("span", meaning)))
    for symbol, value, meaning in explanation.headline()
  ]
  heading = _tag("h2", f"y, {name}" if name else "y")
  return _tag(
    "section", heading, _tag("p", explanation.answer, cls="y"), _tag("dl", *rows, cls="headline")
  )


def _answers(report: explanations.Report) -> ElementTree.Element:
  high = max(p for _, probabilities in report.rows() for p in probabilities)
  head = _tag("tr", _tag("td"), *(_tag("th", name, scope="col") for name in report.columns()))
  rows = [
    _tag(
      "tr",
      _tag("th", text, scope="row"),
      *(_tag("td", explanations.show_probability(p), _bar(p, 0, high)) for p in probabilities),
    )
    for text, probabilities in report.rows()
  ]
  return _tag(
    "section",
    _tag("h2", "Most probable answers"),
    _tag("table", _tag("thead", head), _tag("tbody", *rows)),
    cls="answers",
  )


def _candidates(
  name: str, explanation: explanations.Explanation, axes: Mapping[str, tuple[float, float]]
) -> ElementTree.Element:
  items, rank = [], itertools.count(1)
  for candidate in explanation.candidates:
    null = candidate.number == NULL_PASSAGE
    title = "The null passage" if null else candidate.title
    text = [
      _tag("mark" if run.names else "span", run.text, cls=" ".join(sorted(run.names)))
      for run in candidate.runs()
    ]
    score, *others = candidate.measures()
    heading = _tag(
      "h3",
      _tag("span", "∅" if null else str(next(rank)), cls="rank"),
      title,
      _tag("small", f"{score.name} {score.shown}"),
    )
    rows = [
      _tag(
        "div",
        _tag("dt", measure.name),
        _tag("dd", measure.shown),
        _bar(measure.value, *axes[measure.name]),
      )
      for measure in others
    ]
    items.append(
      _tag(
        "li",
        _tag("dl", *rows, cls="measures"),
        _tag("div", heading, _tag("p", *text), cls="passage"),
      )
    )
  label = explanations.label(f"Candidates, {name}" if name else "Candidates", explanation)
  notes = [_tag("p", note, cls="note") for note in explanation.notes()]
  return _tag("section", _tag("h2", label), *notes, _tag("ol", *items), cls="candidates")


def _bar(value: float, low: float, high: float) -> ElementTree.Element:
  """Draws a bar from zero to `value` on an axis from `low` to `high`."""

  def at(x):
    return f"{100 * (x - low) / ((high - low) or 1):.2f}%"

  return _tag(
    "span",
    _tag("i"),
    cls="bar negative" if value < 0 else "bar",
    style=f"--zero:{at(0)};--from:{at(min(value, 0))};--to:{at(max(value, 0))}",
  )
