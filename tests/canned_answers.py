"""The answers of stand-ins for a servable, and how the client prints them."""

import numpy as np

from serving import signatures

TITLES = ["Zoë", "Čapek"]
TEXTS = ["Zoë Müller wrote »Übermut« in Zürich, long ago.", "Karel Čapek wrote R.U.R. in Prague."]
SPAN = (0, len("Zoë Müller".encode()))
OTHER_SPAN = (len("Karel Čapek wrote ".encode()), len("Karel Čapek wrote R.U.R.".encode()))
ANSWERS_TEXT = """\
>>Zoë Müller<<   score 12.50
    or R.U.R. (3.25)

 75.0 % ██████    Zoë   reader 4.50   <- read here
    >>Zoë Müller<< wrote »Übermut« in Zürich, long ago.

  6.2 % ▌         Čapek   reader -1.25
    Karel Čapek wrote >>R.U.R.<< in Prague.
"""


def answer_outputs(questions: list[str]) -> dict:
  """Returns what a servable answers: X to "echo X", and nothing to "nothing"."""
  rows = len(questions)

  def repeat(values, dtype):
    return np.array([values] * rows, dtype)

  outputs = {
    "answer": repeat(["Zoë Müller", "R.U.R.", ""], object),
    "score": repeat([12.5, 3.25, signatures.NO_SCORE], np.float32),
    "answer_rank": repeat([0, 1, -1], np.int32),
    "passage_number": repeat([7, 3, -1], np.int32),
    "title": repeat([*TITLES, ""], object),
    "text": repeat([*TEXTS, ""], object),
    "probability": repeat([0.75, 0.0625, 0], np.float32),
    "retrieval_score": repeat([8, 4.5, signatures.NO_SCORE], np.float32),
    "reader_score": repeat([4.5, -1.25, signatures.NO_SCORE], np.float32),
    "answer_start": repeat([SPAN[0], OTHER_SPAN[0], 0], np.int32),
    "answer_end": repeat([SPAN[1], OTHER_SPAN[1], 0], np.int32),
  }
  for row, question in enumerate(questions):
    if question.startswith("echo "):
      outputs["answer"][row, 0] = outputs["text"][row, 0] = question.removeprefix("echo ")
      outputs["answer_end"][row, 0] = len(question.removeprefix("echo ").encode())
    if question == "nothing":
      outputs["answer"][row], outputs["answer_rank"][row], outputs["passage_number"][row] = (
        "",
        -1,
        -1,
      )
  return outputs
