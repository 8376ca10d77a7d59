"""The inputs and outputs of a servable: names, types and shapes of every signature.

    python -m serving.signatures     # prints the document that is part of every exported model

Server, clients and documents share these definitions. The module is plain Python, so that clients
do not need TensorFlow.
"""

import dataclasses
from collections.abc import Iterable, Mapping

# passage_number if there is no passage, answer_rank if there is no answer
from realm_tf.corpus.candidates import NULL_PASSAGE  # noqa: F401

MODEL_NAME = "realm"
GRPC_PORT = 8500
REST_PORT = 8501
# The signature used if a request names none: `answer`, if the servable has it.
DEFAULT = "serving_default"

MASK = "[MASK]"  # the blank in a text for `fill_mask`
NO_SCORE = -3.4028234663852886e38  # the lowest float32: JSON cannot represent infinity

DIMENSIONS = {
  "B": "questions or texts in the request; any number, including 0",
  "N": "answers, or tokens for each blank",
  "K": "passages retrieved",
  "R": "passages read, the best of those retrieved",
  "C": "candidates, including the null passage",
  "M": "blanks: the maximum over the texts of the request, at least 1",
}


@dataclasses.dataclass(frozen=True)
class Field:
  """A named tensor.

  Attributes:
    dtype: "string", "int32" or "float32".
    shape: keys of `DIMENSIONS`.
    description: one sentence.
  """

  name: str
  dtype: str
  shape: tuple[str, ...]
  description: str


@dataclasses.dataclass(frozen=True)
class Signature:
  """A function of a servable, with its inputs and outputs."""

  name: str
  description: str
  inputs: tuple[Field, ...]
  outputs: tuple[Field, ...]


def _passages(size: str, *, order: str, probability: str) -> tuple[Field, ...]:
  return (
    Field(
      "passage_number", "int32", ("B", size), f"Row in the corpus, {order}; -1 if there is none."
    ),
    Field("title", "string", ("B", size), 'Title of the passage; "" if there is none.'),
    Field(
      "text",
      "string",
      ("B", size),
      'Original text of the passage; "" if there is none.',
    ),
    Field(
      "probability",
      "float32",
      ("B", size),
      f"p(z|x), softmax of the retrieval scores over the {probability}.",
    ),
  )


_QUESTION = Field("question", "string", ("B",), "A question in plain text, UTF-8.")
_LOWEST = "the lowest float32 if there is none"
_RETRIEVAL_SCORE = (
  f"f(x, z), the inner product of the embeddings of question and passage; {_LOWEST}."
)

ANSWER = Signature(
  "answer",
  "Answers questions with spans of the passages that it retrieves and reads.",
  inputs=(_QUESTION,),
  outputs=(
    Field(
      "answer",
      "string",
      ("B", "N"),
      'Answers, best first, without duplicates; "" if there are no more.',
    ),
    Field(
      "score", "float32", ("B", "N"), f"Reader score + retrieval score of the answer; {_LOWEST}."
    ),
    Field(
      "answer_rank",
      "int32",
      ("B", "N"),
      "Index of the passage that the answer was read from, among the R passages; -1 if there is "
      "none.",
    ),
    *_passages("R", order="best retrieved first", probability="K passages retrieved"),
    Field("retrieval_score", "float32", ("B", "R"), _RETRIEVAL_SCORE),
    Field(
      "reader_score",
      "float32",
      ("B", "R"),
      f"The reader's score of the passage's best span, without the retrieval score; {_LOWEST}.",
    ),
    Field(
      "answer_start",
      "int32",
      ("B", "R"),
      "First byte, in the UTF-8 text, of the passage's best span.",
    ),
    Field(
      "answer_end",
      "int32",
      ("B", "R"),
      "Byte after the last of that span; equal to answer_start if there is none.",
    ),
  ),
)

FILL_MASK = Signature(
  "fill_mask",
  "Fills the blanks of a text using the passages that it retrieves and, for comparison, without "
  "any.",
  inputs=(
    Field(
      "text",
      "string",
      ("B",),
      f"A text in UTF-8 with one or more {MASK}, each a single word piece to predict.",
    ),
  ),
  outputs=(
    Field(
      "num_masks",
      "int32",
      ("B",),
      f"Number of blanks filled; excess ones, and ones too far from the start, stay {MASK}.",
    ),
    Field(
      "token",
      "string",
      ("B", "M", "N"),
      'Word pieces for each blank, best first; ## continues a word; "" beyond num_masks.',
    ),
    Field(
      "token_probability",
      "float32",
      ("B", "M", "N"),
      "p(y|x), the marginal over the candidates; 0 beyond num_masks.",
    ),
    Field(
      "token_without_retrieval", "string", ("B", "M", "N"), "The same, from the null passage only."
    ),
    Field(
      "token_probability_without_retrieval",
      "float32",
      ("B", "M", "N"),
      "p(y|null,x); 0 beyond num_masks.",
    ),
    *_passages(
      "C",
      order="the null passage (-1) first, then best retrieved first",
      probability="C candidates",
    ),
    Field(
      "retrieval_utility",
      "float32",
      ("B", "C"),
      "log p(y|z,x) - log p(y|null,x) of the filled word pieces y; if positive, the passage helps.",
    ),
    Field("filled", "string", ("B",), "The text with the best word pieces in place."),
  ),
)

RETRIEVE = Signature(
  "retrieve",
  "Retrieves passages for questions.",
  inputs=(_QUESTION,),
  outputs=(
    *_passages("K", order="best first", probability="K passages retrieved"),
    Field("retrieval_score", "float32", ("B", "K"), _RETRIEVAL_SCORE),
  ),
)

SIGNATURES = {signature.name: signature for signature in (ANSWER, FILL_MASK, RETRIEVE)}


# ---------------------------------------------------------------------------------------- documents


def as_json(names: Iterable[str], sizes: Mapping[str, int]) -> dict:
  """Returns the signatures of a servable as values that can be written as JSON.

  The format is {"sizes": {"N": 5, ..}, "signatures": {name: {..}}}.
  """
  return {
    "sizes": dict(sizes),
    "signatures": {name: dataclasses.asdict(SIGNATURES[name]) for name in names},
  }


def markdown(names: Iterable[str], sizes: Mapping[str, int]) -> str:
  """Returns the same as a Markdown document.

  Args:
    names: signatures of the servable.
    sizes: the dimensions whose size is fixed in it.
  """
  names = list(names)
  default = f" The default is `{ANSWER.name}`." if ANSWER.name in names else ""
  lines = [
    "# Signatures",
    "",
    f"Model name `{MODEL_NAME}`; signatures {', '.join(f'`{name}`' for name in names)}.{default}",
    "",
    f"    gRPC  localhost:{GRPC_PORT}  tensorflow.serving.PredictionService/Predict",
    f"    REST  POST http://localhost:{REST_PORT}/v1/models/{MODEL_NAME}:predict",
    "",
    "| dimension | size | meaning |",
    "| --- | --- | --- |",
  ]
  used = {
    word
    for name in names
    for field in (*SIGNATURES[name].inputs, *SIGNATURES[name].outputs)
    for word in field.shape
  }
  lines += [
    f"| {word} | {sizes.get(word, 'any')} | {meaning} |"
    for word, meaning in DIMENSIONS.items()
    if word in used
  ]
  for name in names:
    signature = SIGNATURES[name]
    lines += [
      "",
      f"## {name}",
      "",
      signature.description,
      "",
      "| | name | type | shape | |",
      "| --- | --- | --- | --- | --- |",
    ]
    for kind, fields in (("in", signature.inputs), ("out", signature.outputs)):
      lines += [
        f"| {kind} | `{field.name}` | {field.dtype} | [{', '.join(field.shape)}] | "
        f"{_cell(field.description)} |"
        for field in fields
      ]
    body = f'{{"signature_name": "{name}", "instances": ["{_EXAMPLES[name]}"]}}'
    lines += [
      "",
      f"    curl -d '{body}' http://localhost:{REST_PORT}/v1/models/{MODEL_NAME}:predict",
    ]
  return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
  return text.replace("|", r"\|")  # a bar ends a cell


_EXAMPLES = {
  "answer": "who wrote hamlet?",
  "retrieve": "who wrote hamlet?",
  "fill_mask": f"Hamlet was written by {MASK}.",
}


if __name__ == "__main__":
  print(markdown(SIGNATURES, {}), end="")
