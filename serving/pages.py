"""Formats the results of a servable as pages: JSON for programs, text for people."""

import dataclasses
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from realm_tf import errors
from serving import results, signatures

# The marks around evidence while lines are wrapped: private-use characters, which texts lack.
_OPEN, _CLOSE = ("\ue000", "\ue001")


def plain_json(text: str) -> str:
  """Makes JSON safe to print on a terminal: the same values, with control characters escaped.

  json.dumps escapes only those below U+0020.
  """
  return errors.CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


@dataclasses.dataclass(frozen=True)
class JsonPage:
  """Formats results as JSON, one object per line.

  Args:
    num_passages: how many passages to show.
  """

  num_passages: int

  def answers(self, answers: results.Answers, *, wanted: Sequence[str] = ()) -> str:
    """Returns a prediction in the format of realm_tf.evaluate.

    Values that only a servable returns have additional names.
    """
    best = answers.answers[0] if answers.answers else None
    source = answers.passages[best.rank] if best else None
    return json.dumps(
      {
        "question": answers.question,
        "prediction": best.text if best else "",
        "answer": list(wanted),
        "score": best.score if best else None,
        "read_from": source.number if source else signatures.NULL_PASSAGE,
        "byte_span": source.span if source else [0, 0],
        "passages": [
          {
            "number": passage.number,
            "title": passage.title,
            "text": passage.text,
            "score": passage.retrieval_score,
            "probability": passage.probability,
            "reader_score": passage.reader_score,
            "byte_span": passage.span,
          }
          for passage in answers.passages[: self.num_passages]
        ],
        "other_answers": [dataclasses.asdict(answer) for answer in answers.answers[1:]],
      },
      ensure_ascii=False,
    )

  def filled(self, filled: results.Filled) -> str:
    """Returns all fields, with the null passage and `num_passages` other candidates."""
    shown = dataclasses.replace(filled, candidates=filled.candidates[: self.num_passages + 1])
    return json.dumps(dataclasses.asdict(shown), ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class TextPage:
  """Formats results as text.

  Args:
    num_passages: how many passages to show, in addition to the one that the answer is read from.
    marks: strings to put before and after evidence.
    width: number of columns.
  """

  num_passages: int
  marks: tuple[str, str]
  width: int

  def answers(self, answers: results.Answers, *, wanted: Sequence[str] = ()) -> str:
    """Returns the answer, its score, other answers, then the passages with p(z|x)."""
    lines, source = ["(no answer)"], signatures.NULL_PASSAGE
    if answers.answers:
      best, *others = answers.answers
      lines, source = [f"{_OPEN}{best.text}{_CLOSE}   score {best.score:.2f}"], best.rank
      lines += (
        self._wrap(
          "or " + ", ".join(f"{other.text} ({other.score:.2f})" for other in others), indent=4
        )
        if others
        else []
      )
    lines += [f"    wanted: {', '.join(wanted)}"] if wanted else []
    for rank, passage in enumerate(answers.passages):
      if rank >= self.num_passages and rank != source:
        continue
      reader = (
        f"reader {passage.reader_score:.2f}" if passage.span[0] < passage.span[1] else "no span"
      )
      read_here = "   <- read here" if rank == source else ""
      lines += ["", f"{_percent(passage.probability)}  {passage.title}   {reader}{read_here}"]
      lines += self._wrap(_marked(passage.text, passage.span), indent=4)
    return self._finish(lines)

  def filled(self, filled: results.Filled) -> str:
    """Returns the text, the tokens of each blank with and without retrieval, and the candidates.

    Candidates are shown with p(z|x) and utility.
    """
    lines = self._wrap(filled.filled, indent=0)
    for number, (tokens, without) in enumerate(
      zip(filled.tokens, filled.tokens_without_retrieval, strict=True), 1
    ):
      lines += ["", f"{f'{signatures.MASK} {number}, with retrieval':40}without"]
      lines += [
        f"{f'{_percent(probability)}  {token}':40}{_percent(probability_without)}  {token_without}"
        for (token, probability), (token_without, probability_without) in zip(
          tokens, without, strict=True
        )
      ]
    lines += ["", "p(z|x)            utility"]
    for candidate in filled.candidates[: self.num_passages + 1]:
      title = candidate.title if candidate.number != signatures.NULL_PASSAGE else "(no passage)"
      lines += [f"{_percent(candidate.probability)} {candidate.retrieval_utility:+8.2f}  {title}"]
      lines += self._wrap(candidate.text, indent=4)
    return self._finish(lines)

  def _wrap(self, text: str, *, indent: int) -> list[str]:
    """Wraps text; marks are closed at line ends and reopened after the indent of the next line."""
    lines, inside = [], False
    for line in textwrap.wrap(text, self.width - indent):
      begins = inside
      inside = line.rfind(_OPEN) > line.rfind(_CLOSE) or (inside and _CLOSE not in line)
      lines.append(" " * indent + _OPEN * begins + line + _CLOSE * inside)
    return lines

  def _finish(self, lines: Sequence[str]) -> str:
    return (
      errors.plain("\n".join(lines)).replace(_OPEN, self.marks[0]).replace(_CLOSE, self.marks[1])
    )


def _marked(text: str, span: tuple[int, int]) -> str:
  """Returns `text` with marks around the bytes of `span`."""
  start, end = span
  if start >= end:
    return text
  encoded = text.encode()
  before, evidence, after = (
    part.decode(errors="replace") for part in (encoded[:start], encoded[start:end], encoded[end:])
  )
  return before + _OPEN + evidence + _CLOSE + after


def _percent(probability: float, *, width: int = 8) -> str:
  """Formats a probability with a bar: ' 62.5 % █████   '."""
  eighths = round(min(max(probability, 0.0), 1.0) * width * 8)
  return (
    f"{100 * probability:5.1f} % {'█' * (eighths // 8) + ' ▏▎▍▌▋▊▉'[eighths % 8]:{width}.{width}}"
  )


def text_page(*, num_passages: int) -> TextPage:
  """Returns a page for standard output.

  It uses bold only on a terminal, and not if NO_COLOR is set (no-color.org).
  """
  plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
  return TextPage(
    num_passages,
    marks=(">>", "<<") if plain else ("\033[1;4m", "\033[0m"),
    width=min(shutil.get_terminal_size().columns, 100),
  )
