"""Queries a servable from the command line; starts instantly, since it does not need TensorFlow.

    python -m serving.client --server=localhost:8500 --question='who wrote hamlet'
    python -m serving.client --server=localhost:8500 --questions=Q.jsonl --output=predictions.jsonl
    python -m serving.client --server=localhost:8500 --fill='The [MASK] of France is Paris.'
    python -m serving.client --server=localhost:8500

The last command opens a prompt; an empty line ends it.

The client speaks TensorFlow Serving's gRPC protocol, with `serving.model_server` or with TensorFlow
Serving itself. If the server is not listening yet or is still loading the model, the client waits
for up to --timeout_secs. The evidence is marked in the passages; predictions are written in the
format of realm_tf.evaluate.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from absl import flags

from realm_tf import cli, errors
from realm_tf.storage import json_lines
from serving import pages, results, signatures
from serving.remote import TIMEOUT_SECS, Client, ClientError


def read_questions(path: str) -> list[tuple[str, list[str]]]:
  """Reads (question, acceptable answers) from each record of a file.

  Bad records are skipped, and counted by reason on stderr.

  Raises:
    ClientError: there is no such file, or no question in it.
  """
  try:
    with open(path, "rb") as file:
      rows, rejected = json_lines.parsed(file, _question_of)
  except OSError as error:
    raise ClientError(f"cannot read {path!r}: {error}") from error
  if not rows:
    told = "; ".join(json_lines.reasons(rejected)) or "an empty file"
    raise ClientError(
      f'{path!r} has no question; wanted lines of {{"question": str, ..}}. Got: {told}.'
    )
  json_lines.tell(path, rejected, num_kept=len(rows))
  return rows


def _question_of(row: dict) -> tuple[str, list[str]] | str:
  """Returns the question and acceptable answers of a record, or what is wrong with it."""
  question, wanted = row.get("question"), row.get("answer", [])
  if not isinstance(question, str):
    return "the question is not text"
  if not question.strip():
    return "the question is empty"
  if not json_lines.is_writable(question):
    return json_lines.HALF_A_PAIR
  wanted = [wanted] if isinstance(wanted, str) else wanted if isinstance(wanted, list) else []
  return question, [
    text for text in wanted if isinstance(text, str) and json_lines.is_writable(text)
  ]


def answer_all(
  client: Client, rows: Sequence[tuple[str, list[str]]], *, batch_size: int
) -> Iterator[tuple[results.Answers, list[str]]]:
  """Yields answers and acceptable answers, in order; shows progress on standard error."""
  started = shown = time.monotonic()
  every_secs, end = (0, "\r") if sys.stderr.isatty() else (10, "\n")
  for start in range(0, len(rows), batch_size):
    batch = rows[start : start + batch_size]
    found = client.answer([question for question, _ in batch])
    done, now = start + len(batch), time.monotonic()
    if done == len(rows) or now - shown >= every_secs:
      shown, rate = now, done / (now - started)
      print(
        f"{done:,}/{len(rows):,} questions, {rate:,.1f}/s, {(len(rows) - done) / rate:,.0f} s "
        "left   ",
        file=sys.stderr,
        flush=True,
        end="\n" if done == len(rows) else end,
      )
    yield from zip(found, (wanted for _, wanted in batch), strict=True)


def write_lines(path: str, lines: Iterable[str]) -> None:
  """Writes a file atomically: under a temporary name, which is then renamed.

  Raises:
    ClientError: the file cannot be written.
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


def ask(client: Client, page: pages.JsonPage | pages.TextPage, text: str) -> str:
  """Returns the page for a question, or for a text with [MASK]. Raises ClientError."""
  return _printed(
    page,
    page.filled(client.fill_mask([text])[0])
    if signatures.MASK in text
    else page.answers(client.answer([text])[0]),
  )


def _printed(page: pages.JsonPage | pages.TextPage, text: str) -> str:
  """Returns the text of a page, safe to print; text pages are safe apart from their own codes."""
  return pages.plain_json(text) if isinstance(page, pages.JsonPage) else text


def prompt(client: Client, page: pages.JsonPage | pages.TextPage) -> None:
  """Answers line by line until an empty line or Ctrl-D."""
  with contextlib.suppress(ImportError):  # not available on every system
    import readline  # noqa: F401  gives input() history and editing
  sign = "> " if sys.stdin.isatty() else ""
  if sign:
    print(f"Enter a question, or a text with {signatures.MASK}; an empty line quits.")
  with contextlib.suppress(EOFError, KeyboardInterrupt):
    while text := input(sign).strip():
      try:
        print(ask(client, page, text), end="\n\n" if sign else "\n", flush=True)
      except ClientError as error:
        print(errors.plain(f"{error}"), file=sys.stderr)


def run(args: flags.FlagValues) -> None:
  """Carries out the command given by the flags. Raises ClientError."""
  if args.output and not args.questions:
    raise ClientError("--output needs --questions.")
  if args.output and os.path.isdir(args.output):
    raise ClientError(f"--output={args.output!r} is a folder; give the name of a file to write.")
  if args.output and os.path.realpath(args.output) == os.path.realpath(args.questions):
    raise ClientError(f"--output={args.output!r} is the file of questions; give another file.")
  if args.fill is not None and signatures.MASK not in args.fill:
    raise ClientError(f"got --fill={args.fill!r}; put {signatures.MASK} where a word is missing.")
  client = Client(
    args.server,
    model_name=args.model_name,
    version=args.version,
    label=args.label,
    timeout_secs=args.timeout_secs,
  )
  page = (
    pages.JsonPage(args.num_passages)
    if args.json or args.output
    else pages.text_page(num_passages=args.num_passages)
  )
  if args.questions:
    rows = read_questions(args.questions)
    answered = answer_all(client, rows, batch_size=args.batch_size)
    if args.output:
      write_lines(
        args.output, (page.answers(answers, wanted=wanted) for answers, wanted in answered)
      )
    else:
      for answers, wanted in answered:
        text = page.answers(answers, wanted=wanted)
        if args.json:
          print(pages.plain_json(text), flush=True)
        else:
          print(f"{errors.plain(answers.question)}\n{text}\n", flush=True)
  elif asked := args.question or args.fill:
    print(ask(client, page, asked))
  else:
    prompt(client, page)


def main(argv):
  del argv
  signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends a conversation quietly
  try:
    run(flags.FLAGS)
  except ClientError as error:
    sys.exit(errors.plain(f"{error}"))
  except KeyboardInterrupt:
    sys.exit(130)  # the convention of shells


if __name__ == "__main__":
  flags.DEFINE_string(
    "server", f"localhost:{signatures.GRPC_PORT}", "host:port of the server's gRPC."
  )
  flags.DEFINE_string("model_name", signatures.MODEL_NAME, "Name of the model on the server.")
  flags.DEFINE_integer(
    "version", None, "Version of the model; the newest if neither this nor --label is given."
  )
  flags.DEFINE_string("label", None, "Label of the version, such as stable.")
  flags.DEFINE_string("question", None, "A question to answer.")
  flags.DEFINE_string("questions", None, 'File of questions: lines of {"question": str, ..}.')
  flags.DEFINE_string("fill", None, f"A text with {signatures.MASK} to fill.")
  flags.DEFINE_string("output", None, "File to write the predictions for --questions to.")
  flags.DEFINE_bool("json", False, "Print one JSON object per question.")
  flags.DEFINE_integer("num_passages", 5, "Passages to show.", lower_bound=0)
  flags.DEFINE_integer("batch_size", 32, "Questions of --questions per call.", lower_bound=1)
  flags.DEFINE_float(
    "timeout_secs",
    TIMEOUT_SECS,
    "Time limit of a call, including the wait for a server that is not ready.",
    lower_bound=0.001,
  )
  flags.mark_flags_as_mutual_exclusive(["question", "questions", "fill"])
  flags.mark_flags_as_mutual_exclusive(["version", "label"])
  cli.start("serving.client", tensorflow=False)
