"""Splits a file of questions by title, so that no title has questions in both parts.

python -m realm_tf.split_questions --input=questions.jsonl --train=train.jsonl --test=test.jsonl
"""

import dataclasses
import hashlib
from collections.abc import Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("input", None, 'Lines of {"question", "answer", "title"}.', required=True)
  flags.DEFINE_string("train", None, "File to write.", required=True)
  flags.DEFINE_string("test", None, "File to write, with held-out titles.", required=True)
  flags.DEFINE_float("test_share", 0.1, "Share of the titles to hold out.")
  cli.start("realm_tf.split_questions")

from realm_tf.storage import artifacts, json_lines, ownership


def split_by_title(
  source: str, *, train: str, test: str, test_share: float = 0.1
) -> dict[str, int]:
  """Splits questions so that no title has questions in both parts.

  The part depends on the title only.

  Args:
    source: records of `{"question", "answer", "title", ...}`.
    train: the file of training questions to write.
    test: the file of test questions to write.
    test_share: share of the titles in the test part.

  Returns:
    Number of questions by part.

  Raises:
    UserError: an object without a title, a part without questions, or a part that would overwrite
      the source.
  """
  for path in (train, test):
    ownership.check_file(path, reads=[source])
  parts: dict[str, list[str]] = {train: [], test: []}
  rejected = []
  with artifacts.gfile.GFile(source, "rb") as file:
    for record in json_lines.read(file):
      title = record.row and record.row.get("title")
      if record.row is None:
        rejected.append(record)
      elif not isinstance(title, str):
        raise artifacts.UserError(
          f'{source}:{record.number} has no title; wanted {{"question", "answer", "title"}} on '
          "every line."
        )
      elif not json_lines.is_writable(title):
        rejected.append(dataclasses.replace(record, reason=json_lines.HALF_A_PAIR))
      else:
        bucket = int(hashlib.sha1(title.encode()).hexdigest(), 16) % 1000
        parts[test if bucket < 1000 * test_share else train].append(json_lines.dumps(record.row))
  json_lines.tell(source, rejected, num_kept=sum(map(len, parts.values())))
  for path, lines in parts.items():
    if not lines:
      raise artifacts.UserError(
        f"{source!r} has too few titles to split: nothing is left for {path!r}."
      )
    artifacts.write_text(path, "".join(lines))
  return {path: len(lines) for path, lines in parts.items()}


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  print(split_by_title(args.input, train=args.train, test=args.test, test_share=args.test_share))
