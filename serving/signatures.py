"""What a servable takes and gives: names, types and shapes of every signature, in one place for server, clients and documents.

    python -m serving.signatures     # prints the document that stands beside every exported model

Plain Python: a client needs no TensorFlow to read this.
"""

import dataclasses
from collections.abc import Iterable, Mapping

MODEL_NAME = "realm"
GRPC_PORT = 8500
REST_PORT = 8501
DEFAULT = "serving_default"  # the signature of requests that name none: `answer`, where the servable has it

MASK = "[MASK]"  # the blank in a text for `fill_mask`
NO_PASSAGE = -1  # passage_number of the null passage, answer_rank of an answer that is not there
NO_SCORE = -3.4028234663852886e38  # float32's lowest: JSON carries no infinity

DIMENSIONS = {
    "B": "questions or texts in the request; any number, also 0",
    "N": "answers, or tokens for each blank",
    "K": "passages retrieved",
    "R": "passages read, the best of those retrieved",
    "C": "candidates, the null passage included",
    "M": "blanks: the most that any text of the request has, and at least 1",
}


@dataclasses.dataclass(frozen=True)
class Field:
  """One named tensor.

  Attributes:
    dtype: "string", "int32" or "float32".
    shape: words of `DIMENSIONS`.
    description: one sentence.
  """

  name: str
  dtype: str
  shape: tuple[str, ...]
  description: str


@dataclasses.dataclass(frozen=True)
class Signature:
  """One thing that a servable does."""

  name: str
  description: str
  inputs: tuple[Field, ...]
  outputs: tuple[Field, ...]


def _passages(size: str, *, order: str, probability: str) -> tuple[Field, ...]:
  return (
      Field("passage_number", "int32", ("B", size), f"Row in the corpus, {order}; -1 where there is none."),
      Field("title", "string", ("B", size), "Title of the passage; \"\" where there is none."),
      Field("text", "string", ("B", size), "Text of the passage as it was written; \"\" where there is none."),
      Field("probability", "float32", ("B", size), f"p(z|x), softmax of the retrieval scores over the {probability}."),
  )


_QUESTION = Field("question", "string", ("B",), "A question in plain text, UTF-8.")
_LOWEST = "float32's lowest where there is none"
_RETRIEVAL_SCORE = f"f(x, z), the inner product of the embeddings of question and passage; {_LOWEST}."

ANSWER = Signature(
    "answer", "Answers questions with spans of the passages that it retrieves and reads.",
    inputs=(_QUESTION,),
    outputs=(
        Field("answer", "string", ("B", "N"), "Answers, best first, no text twice; \"\" where there are no more."),
        Field("score", "float32", ("B", "N"), f"Reader score + retrieval score of the answer; {_LOWEST}."),
        Field("answer_rank", "int32", ("B", "N"),
              "Which of the R passages the answer was read from, 0 the first; -1 where there is none."),
        *_passages("R", order="best retrieved first", probability="K passages retrieved"),
        Field("retrieval_score", "float32", ("B", "R"), _RETRIEVAL_SCORE),
        Field("reader_score", "float32", ("B", "R"),
              f"The reader's score of the passage's best span, without the retrieval score; {_LOWEST}."),
        Field("answer_start", "int32", ("B", "R"), "First byte, in the UTF-8 text, of the passage's best span."),
        Field("answer_end", "int32", ("B", "R"), "Byte after the last of that span; equal to answer_start where there is none."),
    ))

FILL_MASK = Signature(
    "fill_mask", "Fills the blanks of a text, with the passages that it retrieves and, for comparison, without any.",
    inputs=(Field("text", "string", ("B",), f"A text in UTF-8 with one or more {MASK}, each a word piece to predict."),),
    outputs=(
        Field("num_masks", "int32", ("B",), f"Blanks filled; further ones stay {MASK}: too many, or too far from the beginning."),
        Field("token", "string", ("B", "M", "N"),
              "Word pieces for each blank, best first; ## goes on inside a word; \"\" past num_masks."),
        Field("token_probability", "float32", ("B", "M", "N"), "p(y|x), the marginal over the candidates; 0 past num_masks."),
        Field("token_without_retrieval", "string", ("B", "M", "N"), "The same from the null passage alone."),
        Field("token_probability_without_retrieval", "float32", ("B", "M", "N"), "p(y|null,x); 0 past num_masks."),
        *_passages("C", order="the null passage (-1) first, then best retrieved first", probability="C candidates"),
        Field("retrieval_utility", "float32", ("B", "C"),
              "log p(y|z,x) - log p(y|null,x) of the filled word pieces y; above 0, the passage helps."),
        Field("filled", "string", ("B",), "The text with the best word pieces in place."),
    ))

RETRIEVE = Signature(
    "retrieve", "Retrieves passages for questions.",
    inputs=(_QUESTION,),
    outputs=(
        *_passages("K", order="best first", probability="K passages retrieved"),
        Field("retrieval_score", "float32", ("B", "K"), _RETRIEVAL_SCORE),
    ))

SIGNATURES = {signature.name: signature for signature in (ANSWER, FILL_MASK, RETRIEVE)}


# ----------------------------------------------------------------------------------------------------------- documents


def as_json(names: Iterable[str], sizes: Mapping[str, int]) -> dict:
  """The signatures of a servable as JSON-able values: {"sizes": {"N": 5, ..}, "signatures": {name: {..}}}."""
  return {"sizes": dict(sizes), "signatures": {name: dataclasses.asdict(SIGNATURES[name]) for name in names}}


def markdown(names: Iterable[str], sizes: Mapping[str, int]) -> str:
  """The same as a document.

  Args:
    names: signatures of the servable.
    sizes: dimensions with a fixed size in it.
  """
  names = list(names)
  default = f" Requests that name none get `{ANSWER.name}`." if ANSWER.name in names else ""
  lines = [
      "# Signatures", "",
      f"Model name `{MODEL_NAME}`; signatures {', '.join(f'`{name}`' for name in names)}.{default}", "",
      f"    gRPC  localhost:{GRPC_PORT}  tensorflow.serving.PredictionService/Predict",
      f"    REST  POST http://localhost:{REST_PORT}/v1/models/{MODEL_NAME}:predict", "",
      "| dimension | size | meaning |", "| --- | --- | --- |"]
  used = {word for name in names for field in (*SIGNATURES[name].inputs, *SIGNATURES[name].outputs) for word in field.shape}
  lines += [f"| {word} | {sizes.get(word, 'any')} | {meaning} |" for word, meaning in DIMENSIONS.items() if word in used]
  for name in names:
    signature = SIGNATURES[name]
    lines += ["", f"## {name}", "", signature.description, "", "| | name | type | shape | |", "| --- | --- | --- | --- | --- |"]
    for kind, fields in (("in", signature.inputs), ("out", signature.outputs)):
      lines += [f"| {kind} | `{field.name}` | {field.dtype} | [{', '.join(field.shape)}] | {_cell(field.description)} |"
                for field in fields]
    body = f'{{"signature_name": "{name}", "instances": ["{_EXAMPLES[name]}"]}}'
    lines += ["", f"    curl -d '{body}' http://localhost:{REST_PORT}/v1/models/{MODEL_NAME}:predict"]
  return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
  return text.replace("|", r"\|")  # a bar ends a cell


_EXAMPLES = {"answer": "who wrote hamlet?", "retrieve": "who wrote hamlet?", "fill_mask": f"Hamlet was written by {MASK}."}


if __name__ == "__main__":
  print(markdown(SIGNATURES, {}), end="")
