"""Asks a servable, from the command line; starts at once, since it needs no TensorFlow.

    python -m serving.client --server=localhost:8500 --question='who wrote hamlet'
    python -m serving.client --server=localhost:8500 --questions=Q.jsonl --output=predictions.jsonl
    python -m serving.client --server=localhost:8500 --fill='The [MASK] of France is Paris.'
    python -m serving.client --server=localhost:8500                                  # a prompt; an empty line ends it

It speaks TensorFlow Serving's gRPC protocol, to `serving.model_server` or to TensorFlow Serving itself. A server that does not
listen yet, or that still loads the model, is waited for, for --timeout_secs. The evidence is marked in the passages; predictions
are written as realm_tf.evaluate writes them.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import grpc
import numpy as np
from absl import app, flags

from realm_tf import json_lines
from serving import predict_protocol, signatures

_MAX_MESSAGE_BYTES = 64 << 20
_CHANNEL = {
  "grpc.max_receive_message_length": _MAX_MESSAGE_BYTES,
  "grpc.enable_retries": 0,
  # Or a server that has come up is seen half a minute later.
  "grpc.initial_reconnect_backoff_ms": 200,
  "grpc.max_reconnect_backoff_ms": 500,
  "grpc.min_reconnect_backoff_ms": 5000,
}
_LOOK_SECS = 0.5  # between two calls of a server that is not ready
_STATUS_SECS = 5.0  # for the question why there is no answer
_TIMEOUT_SECS = 60.0
_OPEN, _CLOSE = "\ue000", "\ue001"  # the marks around evidence while lines are broken: private use, so not in text


class ClientError(Exception):
  """What went wrong and what to do, for the person at the keyboard."""


# ============================================================================================================== results


@dataclasses.dataclass(frozen=True)
class Passage:
  """A passage read for a question.

  Attributes:
    number: its row in the corpus.
    probability: p(z|x) over the passages retrieved.
    retrieval_score, reader_score: of the passage, and of its best span alone.
    span: (start, end) of that span, in bytes of the UTF-8 text.
  """

  number: int
  title: str
  text: str
  probability: float
  retrieval_score: float
  reader_score: float
  span: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Answer:
  """One answer; `rank` is its place among the passages read."""

  text: str
  score: float
  rank: int


@dataclasses.dataclass(frozen=True)
class Answers:
  """A question's answers, best first, and the passages read, best retrieved first."""

  question: str
  answers: Sequence[Answer]
  passages: Sequence[Passage]


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A candidate for a masked text: p(z|x) and log p(y|z,x) - log p(y|null,x); the null passage has number -1."""

  number: int
  title: str
  text: str
  probability: float
  retrieval_utility: float


@dataclasses.dataclass(frozen=True)
class Filled:
  """A masked text with the best tokens in place.

  Attributes:
    text: with [MASK].
    filled: with the best tokens.
    tokens, tokens_without_retrieval: for each blank, (token, probability) pairs, best first.
    candidates: null passage first.
  """

  text: str
  filled: str
  tokens: Sequence[Sequence[tuple[str, float]]]
  tokens_without_retrieval: Sequence[Sequence[tuple[str, float]]]
  candidates: Sequence[Candidate]


# =============================================================================================================== server


class _State(NamedTuple):
  """The state of a version, as `predict_protocol.STATES` calls it, and why it could not be loaded."""

  name: str
  error: str


@dataclasses.dataclass(frozen=True)
class _Reason:
  """Why a call failed: a keyword, a sentence, and whether it may pass without anybody's help."""

  kind: str
  words: str
  may_pass: bool = False


class Client:
  """A servable behind gRPC.

  Args:
    server: host:port.
    model_name: as the server calls it.
    version, label: a version's number or label; the newest if neither is given.
    timeout_secs: for one call, including the wait for a server that is not ready.
  """

  def __init__(self, server: str, *, model_name: str = signatures.MODEL_NAME, version: int | None = None,
               label: str | None = None, timeout_secs: float = _TIMEOUT_SECS):
    self.server, self.model_name, self.version, self.label, self.timeout_secs = server, model_name, version, label, timeout_secs
    channel = grpc.insecure_channel(server, options=list(_CHANNEL.items()))
    self._predict = channel.unary_unary(
        predict_protocol.METHOD, request_serializer=predict_protocol.PredictRequest.SerializeToString,
        response_deserializer=predict_protocol.PredictResponse.FromString)
    self._status = channel.unary_unary(
      predict_protocol.STATUS_METHOD,
      request_serializer=predict_protocol.StatusRequest.SerializeToString,
      response_deserializer=predict_protocol.StatusResponse.FromString,
    )

  def predict(self, signature: str, inputs: Mapping[str, Sequence]) -> dict[str, np.ndarray]:
    """One call: input name → values to output name → values.

    Waits for a server that does not listen yet or still loads the model; standard error says what it waits for.

    Raises:
      ClientError: no server, no such model, version or signature, too late, too large, or not understood.
    """
    request = predict_protocol.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = self.model_name, signature
    if self.version is not None:
      request.model_spec.version.value = self.version
    if self.label is not None:
      request.model_spec.version_label = self.label
    for name, values in inputs.items():
      request.inputs.add(key=name, value=predict_protocol.to_tensor(values))
    deadline, told = time.monotonic() + self.timeout_secs, set()
    while True:
      try:
        response = self._predict(request, timeout=max(deadline - time.monotonic(), 1e-3))
        return {output.key: predict_protocol.to_array(output.value) for output in response.outputs}
      except grpc.RpcError as error:
        reason = self._explain(error)
        if not reason.may_pass or time.monotonic() + _LOOK_SECS > deadline:
          late = (
            f" It was waited for, {self.timeout_secs:g} s; for longer, give --timeout_secs."
            if reason.may_pass
            else ""
          )
          raise ClientError(
            f"{self.server}: {reason.words}{late}\n  {error.code().name}: {error.details()}"
          ) from error
        if reason.kind not in told:
          print(
            f"{self.server}: {reason.words} Waiting, for {deadline - time.monotonic():.0f} s at most ..",
            file=sys.stderr,
            flush=True,
          )
        told.add(reason.kind)
        time.sleep(_LOOK_SECS)
      except ValueError as error:
        raise ClientError(
          f"{self.server} answered what this client cannot read: {error}"
        ) from error

  def _explain(self, error: grpc.RpcError) -> _Reason:
    """A failed call in words, and whether to wait."""
    codes = grpc.StatusCode
    if error.code() in (codes.UNAVAILABLE, codes.NOT_FOUND):
      return self._explain_missing(error)
    return _Reason(
      error.code().name,
      {
        codes.DEADLINE_EXCEEDED: f"no answer within {self.timeout_secs:g} s. Try again, ask fewer questions at once (--batch_size), or wait longer "
        "(--timeout_secs).",
        codes.RESOURCE_EXHAUSTED: "the question or the answer is too large, or the server is overloaded. Ask fewer or "
        "shorter questions at once (--batch_size).",
      }.get(error.code(), f"{self._model()} refused the call."),
    )

  def _explain_missing(self, error: grpc.RpcError) -> _Reason:
    """No server, or no model there: asks it for the states of the model's versions."""
    not_found = error.code() == grpc.StatusCode.NOT_FOUND
    states = self._states()
    if isinstance(states, grpc.RpcError):
      if "http1.x" in error.details():
        return _Reason("http", f"that is an HTTP port; gRPC is usually at {signatures.GRPC_PORT}.")
      if not_found:
        names = (
          dict(states.trailing_metadata() or ())
          .get(predict_protocol.MODELS_METADATA, b"")
          .decode(errors="replace")
        )
        there = f" Models there: {names}." if names else ""
        return _Reason("model", f"it has no {self._model()}.{there} Give another --model_name.")
      if states.code() == grpc.StatusCode.UNAVAILABLE:
        return _Reason(
          "listens",
          f"nothing answers there. Is the server running, and is this its gRPC port (usually "
          f"{signatures.GRPC_PORT}; {signatures.REST_PORT} is REST)?",
          may_pass=True,
        )
      return _Reason("ready", f"{self._model()} is not ready.", may_pass=True)
    asked = {version: state for version, state in states.items() if self.version in (None, version)}
    if any(state.name in ("START", "LOADING") for state in asked.values()):
      return _Reason("loading", f"{self._model()} is still being loaded.", may_pass=True)
    if failed := [
      f"version {version}: {state.error}" for version, state in asked.items() if state.error
    ]:
      if not any(state.name == "AVAILABLE" for state in asked.values()):
        return _Reason("failed", f"{self._model()} could not be loaded there; {'; '.join(failed)}.")
    if not_found:
      there = ", ".join(f"{version} ({state.name.lower()})" for version, state in states.items())
      return _Reason(
        "version",
        f"it has no {self._model()}. Versions there: {there}. Give another --version or --label.",
      )
    return _Reason("ready", f"{self._model()} is not ready.", may_pass=True)

  def _states(self) -> Mapping[int, _State] | grpc.RpcError:
    """The model's versions and their states, or why the server does not tell."""
    request = predict_protocol.StatusRequest()
    request.model_spec.name = self.model_name
    try:
      response = self._status(request, timeout=min(self.timeout_secs, _STATUS_SECS))
    except grpc.RpcError as error:
      return error
    return {
      one.version: _State(
        predict_protocol.STATES.get(one.state, "UNKNOWN"), one.status.error_message
      )
      for one in response.model_version_status
    }

  def _model(self) -> str:
    chosen = [("version", self.version), ("label", self.label)]
    return ", ".join([f"model {self.model_name!r}", *(f"{what} {value!r}" for what, value in chosen if value is not None)])

  def answer(self, questions: Sequence[str]) -> list[Answers]:
    """Answers a batch of questions. Raises ClientError."""
    return [_answers(question, row) for question, row in zip(questions, self._rows(signatures.ANSWER, questions))]

  def fill_mask(self, texts: Sequence[str]) -> list[Filled]:
    """Fills a batch of texts with [MASK]. Raises ClientError."""
    return [_filled(text, row) for text, row in zip(texts, self._rows(signatures.FILL_MASK, texts))]

  def _rows(self, signature: signatures.Signature, texts: Sequence[str]) -> list[dict[str, list]]:
    """The outputs of one call, a dictionary for each text."""
    outputs = self.predict(signature.name, {signature.inputs[0].name: texts})
    names = [field.name for field in signature.outputs]
    if missing := [name for name in names if name not in outputs]:
      raise ClientError(f"{self._model()} at {self.server} gave no {', '.join(missing)}: it is not a servable of serving.export.")
    return [dict(zip(names, row)) for row in zip(*(outputs[name].tolist() for name in names))]


def _answers(question: str, row: Mapping[str, list]) -> Answers:
  passages = zip(row["passage_number"], row["title"], row["text"], row["probability"], row["retrieval_score"],
                 row["reader_score"], zip(row["answer_start"], row["answer_end"]))
  return Answers(question, [Answer(*values) for values in zip(row["answer"], row["score"], row["answer_rank"]) if values[0]],
                 [Passage(*values) for values in passages if values[0] != signatures.NO_PASSAGE])


def _filled(text: str, row: Mapping[str, list]) -> Filled:
  def pairs(tokens, probabilities):
    return [list(zip(*blank)) for blank in zip(tokens[:row["num_masks"]], probabilities)]

  candidates = zip(row["passage_number"], row["title"], row["text"], row["probability"], row["retrieval_utility"])
  return Filled(text, row["filled"], pairs(row["token"], row["token_probability"]),
                pairs(row["token_without_retrieval"], row["token_probability_without_retrieval"]),
                [Candidate(*values) for values in candidates])


# ================================================================================================================ pages


@dataclasses.dataclass(frozen=True)
class JsonPage:
  """Results as JSON, an object a line.

  Args:
    num_passages: how many to show.
  """

  num_passages: int

  def answers(self, answers: Answers, *, wanted: Sequence[str] = ()) -> str:
    """A prediction as realm_tf.evaluate writes it, with what only a servable tells under further names."""
    best = answers.answers[0] if answers.answers else None
    source = answers.passages[best.rank] if best else None
    return json.dumps({
        "question": answers.question, "prediction": best.text if best else "", "answer": list(wanted),
        "score": best.score if best else None, "read_from": source.number if source else signatures.NO_PASSAGE,
        "byte_span": source.span if source else [0, 0],
        "passages": [{"number": passage.number, "title": passage.title, "text": passage.text, "score": passage.retrieval_score,
                      "probability": passage.probability, "reader_score": passage.reader_score, "byte_span": passage.span}
                     for passage in answers.passages[:self.num_passages]],
        "other_answers": [dataclasses.asdict(answer) for answer in answers.answers[1:]],
    }, ensure_ascii=False)

  def filled(self, filled: Filled) -> str:
    """All fields; the null passage and `num_passages` others."""
    shown = dataclasses.replace(filled, candidates=filled.candidates[:self.num_passages + 1])
    return json.dumps(dataclasses.asdict(shown), ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class TextPage:
  """Results for the eye.

  Args:
    num_passages: how many to show, beside the one that was read from.
    marks: what goes before and after evidence.
    width: columns.
  """

  num_passages: int
  marks: tuple[str, str]
  width: int

  def answers(self, answers: Answers, *, wanted: Sequence[str] = ()) -> str:
    """Answer, score, other answers, then the passages with p(z|x)."""
    lines, source = ["(no answer)"], signatures.NO_PASSAGE
    if answers.answers:
      best, *others = answers.answers
      lines, source = [f"{_OPEN}{best.text}{_CLOSE}   score {best.score:.2f}"], best.rank
      lines += self._wrap("or " + ", ".join(f"{other.text} ({other.score:.2f})" for other in others), indent=4) if others else []
    lines += [f"    wanted: {', '.join(wanted)}"] if wanted else []
    for rank, passage in enumerate(answers.passages):
      if rank >= self.num_passages and rank != source:
        continue
      reader = f"reader {passage.reader_score:.2f}" if passage.span[0] < passage.span[1] else "no span"
      lines += ["", f"{_percent(passage.probability)}  {passage.title}   {reader}{'   <- read here' if rank == source else ''}"]
      lines += self._wrap(_marked(passage.text, passage.span), indent=4)
    return self._finish(lines)

  def filled(self, filled: Filled) -> str:
    """The text, each blank's tokens with and without retrieval, then the candidates with p(z|x) and utility."""
    lines = self._wrap(filled.filled, indent=0)
    for number, (tokens, without) in enumerate(zip(filled.tokens, filled.tokens_without_retrieval), 1):
      lines += ["", f"{f'{signatures.MASK} {number}, with retrieval':40}without"]
      lines += [f"{f'{_percent(probability)}  {token}':40}{_percent(probability_without)}  {token_without}"
                for (token, probability), (token_without, probability_without) in zip(tokens, without)]
    lines += ["", "p(z|x)            utility"]
    for candidate in filled.candidates[:self.num_passages + 1]:
      title = candidate.title if candidate.number != signatures.NO_PASSAGE else "(no passage)"
      lines += [f"{_percent(candidate.probability)} {candidate.retrieval_utility:+8.2f}  {title}"]
      lines += self._wrap(candidate.text, indent=4)
    return self._finish(lines)

  def _wrap(self, text: str, *, indent: int) -> list[str]:
    """Lines; marks end with a line and begin again on the next, so that the indent is not marked."""
    lines, inside = [], False
    for line in textwrap.wrap(text, self.width - indent):
      begins = inside
      inside = line.rfind(_OPEN) > line.rfind(_CLOSE) or (inside and _CLOSE not in line)
      lines.append(" " * indent + _OPEN * begins + line + _CLOSE * inside)
    return lines

  def _finish(self, lines: Sequence[str]) -> str:
    """A corpus may hold control characters; none of them reaches the terminal."""
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", "\n".join(lines))
    return text.replace(_OPEN, self.marks[0]).replace(_CLOSE, self.marks[1])


def _marked(text: str, span: tuple[int, int]) -> str:
  """`text` with the bytes of `span` between marks."""
  start, end = span
  if start >= end:
    return text
  encoded = text.encode()
  before, evidence, after = (part.decode(errors="replace") for part in (encoded[:start], encoded[start:end], encoded[end:]))
  return before + _OPEN + evidence + _CLOSE + after


def _percent(probability: float, *, width: int = 8) -> str:
  """' 62.5 % █████   '."""
  eighths = round(min(max(probability, 0.0), 1.0) * width * 8)
  return f"{100 * probability:5.1f} % {'█' * (eighths // 8) + ' ▏▎▍▌▋▊▉'[eighths % 8]:{width}.{width}}"


def text_page(*, num_passages: int) -> TextPage:
  """A page for standard output as it is: bold only on a terminal, and not with NO_COLOR (no-color.org)."""
  plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
  return TextPage(num_passages, marks=(">>", "<<") if plain else ("\033[1;4m", "\033[0m"),
                  width=min(shutil.get_terminal_size().columns, 100))


# ================================================================================================================= runs


def read_questions(path: str) -> list[tuple[str, list[str]]]:
  """(question, acceptable answers) of each record of a file; bad ones are counted by reason on stderr and left out.

  Raises:
    ClientError: no such file, or no question in it.
  """
  try:
    with open(path, "rb") as file:
      rows, rejected = json_lines.parsed(file, _question_of)
  except OSError as error:
    raise ClientError(f"cannot read {path!r}: {error}") from error
  if not rows:
    told = "; ".join(json_lines.reasons(rejected)) or "an empty file"
    raise ClientError(f'{path!r} has no question; wanted lines of {{"question": str, ..}}. Got: {told}.')
  json_lines.tell(path, rejected, num_kept=len(rows))
  return rows


def _question_of(row: dict) -> tuple[str, list[str]] | str:
  """A record's question and acceptable answers, or what is wrong with it."""
  question, wanted = row.get("question"), row.get("answer", [])
  if not isinstance(question, str):
    return "the question is not text"
  if not question.strip():
    return "the question is empty"
  if not json_lines.is_writable(question):
    return json_lines.HALF_A_PAIR
  wanted = [wanted] if isinstance(wanted, str) else wanted if isinstance(wanted, list) else []
  return question, [text for text in wanted if isinstance(text, str) and json_lines.is_writable(text)]


def answer_all(client: Client, rows: Sequence[tuple[str, list[str]]], *, batch_size: int) -> Iterator[tuple[Answers, list[str]]]:
  """Answers with what was wanted, in order; a line on standard error shows how far it is."""
  started = shown = time.monotonic()
  every_secs, end = (0, "\r") if sys.stderr.isatty() else (10, "\n")
  for start in range(0, len(rows), batch_size):
    batch = rows[start:start + batch_size]
    results = client.answer([question for question, _ in batch])
    done, now = start + len(batch), time.monotonic()
    if done == len(rows) or now - shown >= every_secs:
      shown, rate = now, done / (now - started)
      print(f"{done:,}/{len(rows):,} questions, {rate:,.1f}/s, {(len(rows) - done) / rate:,.0f} s left   ",
            file=sys.stderr, flush=True, end="\n" if done == len(rows) else end)
    yield from zip(results, (wanted for _, wanted in batch))


def write_lines(path: str, lines: Iterable[str]) -> None:
  """Writes a file whole: under a temporary name, then renamed.

  Raises:
    ClientError: it cannot be written.
  """
  partial = f"{path}.partial-{os.getpid()}"
  try:
    with open(partial, "w", encoding="utf-8") as file:
      file.writelines(line + "\n" for line in lines)
    os.replace(partial, path)
  except OSError as error:
    raise ClientError(f"cannot write {path!r}: {error}") from error
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)


def ask(client: Client, page: JsonPage | TextPage, text: str) -> str:
  """The page for a question, or for a text with [MASK]. Raises ClientError."""
  return page.filled(client.fill_mask([text])[0]) if signatures.MASK in text else page.answers(client.answer([text])[0])


def prompt(client: Client, page: JsonPage | TextPage) -> None:
  """Answers line by line until an empty one or Ctrl-D."""
  with contextlib.suppress(ImportError):  # not on every system
    import readline  # noqa: F401  gives input() history and editing
  sign = "> " if sys.stdin.isatty() else ""
  if sign:
    print(f"A question, or a text with {signatures.MASK}; an empty line ends.")
  with contextlib.suppress(EOFError, KeyboardInterrupt):
    while text := input(sign).strip():
      try:
        print(ask(client, page, text), end="\n\n" if sign else "\n", flush=True)
      except ClientError as error:
        print(error, file=sys.stderr)


def run(args: flags.FlagValues) -> None:
  """Does what the flags say. Raises ClientError."""
  if args.output and not args.questions:
    raise ClientError("--output goes with --questions.")
  if args.output and os.path.isdir(args.output):
    raise ClientError(f"--output={args.output!r} is a folder; give the name of a file to write.")
  if args.output and os.path.realpath(args.output) == os.path.realpath(args.questions):
    raise ClientError(f"--output={args.output!r} is the file of the questions; write elsewhere.")
  if args.fill is not None and signatures.MASK not in args.fill:
    raise ClientError(f"got --fill={args.fill!r}; put {signatures.MASK} where a word is to be filled in.")
  client = Client(args.server, model_name=args.model_name, version=args.version, label=args.label, timeout_secs=args.timeout_secs)
  page = JsonPage(args.num_passages) if args.json or args.output else text_page(num_passages=args.num_passages)
  if args.questions:
    rows = read_questions(args.questions)
    results = answer_all(client, rows, batch_size=args.batch_size)
    if args.output:
      write_lines(args.output, (page.answers(answers, wanted=wanted) for answers, wanted in results))
    else:
      for answers, wanted in results:
        text = page.answers(answers, wanted=wanted)
        print(text if args.json else f"{answers.question}\n{text}\n", flush=True)
  elif args.question or args.fill:
    print(ask(client, page, args.question or args.fill))
  else:
    prompt(client, page)


def main(argv):
  del argv
  try:
    run(flags.FLAGS)
  except ClientError as error:
    sys.exit(f"{error}")
  except KeyboardInterrupt:
    sys.exit(130)  # as shells call it


if __name__ == "__main__":
  flags.DEFINE_string("server", f"localhost:{signatures.GRPC_PORT}", "host:port of the server's gRPC.")
  flags.DEFINE_string("model_name", signatures.MODEL_NAME, "Model as the server calls it.")
  flags.DEFINE_integer("version", None, "Version of the model; the newest if neither this nor --label is given.")
  flags.DEFINE_string("label", None, "Version's label, such as stable.")
  flags.DEFINE_string("question", None, "One question.")
  flags.DEFINE_string("questions", None, 'Lines of {"question": str, ..}.')
  flags.DEFINE_string("fill", None, f"One text with {signatures.MASK}.")
  flags.DEFINE_string("output", None, "Predictions to write for --questions.")
  flags.DEFINE_bool("json", False, "Print one JSON object a question.")
  flags.DEFINE_integer("num_passages", 5, "Passages to show.", lower_bound=0)
  flags.DEFINE_integer("batch_size", 32, "Questions of --questions in one call.", lower_bound=1)
  flags.DEFINE_float(
    "timeout_secs",
    _TIMEOUT_SECS,
    "Time for one call, the wait for a server that is not ready included.",
    lower_bound=0.001,
  )
  flags.mark_flags_as_mutual_exclusive(["question", "questions", "fill"])
  flags.mark_flags_as_mutual_exclusive(["version", "label"])
  app.run(main)
