"""Makes passages from a corpus.

    python -m beam_jobs.make_passages --input='wiki/AA,wiki/AB,more.jsonl' --output=P -- \\
        --direct_num_workers=2 --direct_running_mode=multi_processing

Reads articles, splits them into blocks of whole sentences, numbers the blocks and writes them to
record files.

The number of a passage is its position in the corpus: files in the order of their paths, articles
in the order of the file. It does not depend on the runner or the number of workers: blocks are
first counted per chunk of input, then numbered, then grouped by shard.
"""

import collections
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence

from absl import flags

from beam_jobs import file_formats
from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string(
    "input", None, "Files, folders and globs, separated by commas.", required=True
  )
  flags.DEFINE_string("output", None, "The passages folder to write.", required=True)
  flags.DEFINE_enum(
    "format",
    "auto",
    file_formats.FORMATS,
    "Format of the files; auto detects it for each file by its contents. pdf needs pypdf.",
  )
  flags.DEFINE_string(
    "vocab",
    None,
    "A vocab.txt, or a folder that holds one; by default a vocabulary is learned from the corpus.",
  )
  flags.DEFINE_string(
    "vocab_input", "", "Further files, besides --input, from which to learn the vocabulary."
  )
  flags.DEFINE_integer("vocab_size", 30_522, "Maximum size of a learned vocabulary.")
  flags.DEFINE_bool(
    "lower_case",
    None,
    "Whether the vocabulary is uncased; by default as the files beside it say (learned: uncased).",
  )
  flags.DEFINE_integer(
    "max_tokens", 288, "Maximum number of word pieces in [CLS] title [SEP] text [SEP]."
  )
  flags.DEFINE_integer("passages_per_shard", 10_000, "Passages in each record file.")
  flags.DEFINE_integer(
    "segment_passages",
    1_000_000,
    "Maximum number of passages in a segment, the part of a corpus that is indexed as a whole.",
  )
  cli.start_job("beam_jobs.make_passages")


from beam_jobs import (
  blocking,
  corpus,
  passage_artifact,
  passage_shards,
  pipelines,
  rejections,
  sources,
)
from beam_jobs.sources import Chunk, CorpusError, Source
from realm_tf.corpus import passages, segments, tokenization, vocabularies
from realm_tf.corpus.characters import WordRules
from realm_tf.corpus.vocabularies import Vocabulary
from realm_tf.storage import artifacts, json_lines, ownership, publishing

_VOCABULARY_CHARS = 40_000_000  # sampled evenly from the corpus to learn a vocabulary


# ---------------------------------------------------------------------------------------------- job


def run(
  inputs: str,
  output: str,
  *,
  format: str = "auto",
  vocab: str | None = None,
  vocab_input: str = "",
  vocab_size: int = 30_522,
  lower_case: bool | None = None,
  max_tokens: int = 288,
  passages_per_shard: int = 10_000,
  segment_passages: int = 1_000_000,
  beam_args: Sequence[str] = (),
) -> dict:
  """Makes a passages folder, unless `output` was already made from the same corpus.

  Args:
    inputs: a path, or files, folders and globs separated by commas.
    output: the folder to write.
    format: one of file_formats.FORMATS.
    vocab: a vocab.txt or a folder that holds one; None learns one from the corpus.
    vocab_input: further files, given like `inputs`, used only to learn the vocabulary.
    vocab_size: maximum size of a learned vocabulary.
    lower_case: whether the vocabulary is uncased; None follows the files beside it, and learns an
      uncased one.
    max_tokens: maximum number of word pieces in `[CLS] title [SEP] text [SEP]`.
    passages_per_shard: passages in each record file.
    segment_passages: maximum number of passages in a segment.
    beam_args: Beam's options.

  Returns:
    The info of the artifact, or an empty dict if Beam's options do not wait for the job to finish.

  Raises:
    ArtifactError: `output` holds something else, or it is, contains or lies in an input.
    CorpusError: there is no input, or no passage can be made from it.
    VocabularyError: `vocab` is not a vocabulary.
  """
  if max_tokens < 16 or passages_per_shard < 1 or segment_passages < 1:
    raise CorpusError(
      f"got --max_tokens={max_tokens}, --passages_per_shard={passages_per_shard}, "
      f"--segment_passages={segment_passages}; wanted at least 16, 1 and 1."
    )

  # ---- Inputs
  reads = [*sources.paths_of(inputs), *sources.paths_of(vocab_input), *([vocab] if vocab else [])]
  ownership.check_apart(output, reads)
  files = sources.find_sources(inputs, format=format)
  also = _vocabulary_sources(vocab_input, format=format) if vocab_input and not vocab else []
  given = vocabularies.read(vocab).with_case(lower_case) if vocab else None
  rules = given.rules if given else WordRules.for_case(lower_case is not False)
  config = {
    "corpus": sources.fingerprint_of(files),
    "vocab": given.fingerprint if given else _learned(vocab_size, also),
    "tokenizer": dataclasses.asdict(rules),
    "max_tokens": max_tokens,
    "passages_per_shard": passages_per_shard,
    "segment_passages": segment_passages,
  }
  if artifacts.is_current(output, kind=passages.KIND, config=config, inputs={}):
    print(f"make_passages: {output} was already made from this corpus with these settings.")
    return passage_artifact.told(artifacts.read_info(output))
  passages.refuse_updated(output)

  # ---- Passages
  started = time.monotonic()
  print(
    f"make_passages: reading {len(files)} files, "
    f"{sum(file.size_bytes for file in files) / 1e6:.1f} MB"
  )
  publication = publishing.begin(
    output,
    kind=passages.KIND,
    config=config,
    inputs={},
    reads=reads,
    outlives=pipelines.is_left_running(beam_args),
  )
  with pipelines.published(publication):
    _build(
      publication,
      files,
      also,
      inputs=inputs,
      given=given,
      vocab_size=vocab_size,
      rules=rules,
      max_tokens=max_tokens,
      sizes=segments.Sizes(passages_per_shard, segment_passages),
      beam_args=beam_args,
    )
    if pipelines.is_left_running(beam_args):
      print(f"make_passages: submitted; its last step publishes {output}.")
      return {}
    if artifacts.gfile.exists(publication.path):
      raise _no_passages(inputs, publication.path)
  info = artifacts.read_info(output)
  _say_done(output, info["counts"], secs=max(time.monotonic() - started, 1e-3))
  return passage_artifact.told(info)


def _build(
  publication: publishing.Publication,
  files: Sequence[Source],
  also: Sequence[Source],
  *,
  inputs: str,
  given: Vocabulary | None,
  vocab_size: int,
  rules: WordRules,
  max_tokens: int,
  sizes: segments.Sizes,
  beam_args: Sequence[str],
) -> None:
  """Writes the vocabulary, then runs the job that writes the passages of `files`.

  A vocabulary that is not given is learned from `files` and `also`.
  """
  chunks = sources.split_into_chunks(files)
  tokenizer = _write_vocabulary(
    publication.path,
    chunks + sources.split_into_chunks(also),
    inputs=inputs,
    given=given,
    size=vocab_size,
    rules=rules,
  )
  with pipelines.pipeline(beam_args) as root:
    passage_shards.build(
      root,
      chunks,
      publication,
      details={**tokenizer.details, "input": inputs},
      rules=rules,
      max_tokens=max_tokens,
      sizes=sizes,
    )


def _learned(size: int, also: Sequence[Source]) -> str:
  """Describes how a vocabulary is learned, for the config of the passages."""
  more = f", with {sources.fingerprint_of(also)}" if also else ""
  return f"learned, at most {size}{more}"


def _vocabulary_sources(inputs: str, *, format: str) -> list[Source]:
  """Returns the further files that a vocabulary is learned from.

  Raises:
    CorpusError: one cannot be read, and would be missing silently.
  """
  found = sources.find_sources(inputs, format=format)
  unread = [
    {"reason": file.reason, "file": file.path, "line": 1, "title": "", "text": ""}
    for file in found
    if file.reason
  ]
  if unread:
    raise CorpusError(
      f"--vocab_input {inputs!r} has files that cannot be read: "
      f"{rejections.reasons(unread)}; {sources.WANTED}."
    )
  return found


def _no_passages(inputs: str, folder: str) -> CorpusError:
  """Returns the error if all records of a corpus were rejected; `folder` has the reasons."""
  with artifacts.gfile.GFile(os.path.join(folder, passage_artifact.REJECTED), "rb") as file:
    rows = [record.row for record in json_lines.read(file) if record.row is not None]
  return rejections.nothing(inputs, rows)


def _say_done(output: str, counts: Mapping, *, secs: float) -> None:
  print(
    f"make_passages: {counts['passages']} passages from {counts['articles']} articles in "
    f"{secs:.0f} s ({counts['passages'] / secs:.0f}/s); dropped {counts['dropped']}; split "
    f"{counts[blocking.SPLIT]} sentences, cut {counts[blocking.CUT_TITLES]} titles; {output}"
  )


def _write_vocabulary(
  folder: str,
  chunks: Sequence[Chunk],
  *,
  inputs: str,
  given: Vocabulary | None,
  size: int,
  rules: WordRules,
) -> tokenization.Tokenizer:
  if given:
    pieces = list(given.pieces)
  else:
    sample = [text for text in _sample(chunks) if text.strip()]
    if not sample:
      raise rejections.nothing(inputs, list(_rejected(chunks)))
    pieces = tokenization.train_vocabulary(sample, size=size, rules=rules)
    if not set(pieces) - set(tokenization.SPECIAL):
      raise CorpusError(
        f"no word piece can be learned with --vocab_size={size} from texts like "
        f"{sample[0].strip()[:60]!r}; wanted texts with letters, and a --vocab_size with room for "
        "them."
      )
  vocabularies.write(folder, pieces)
  return tokenization.Tokenizer(folder, rules)


def _sample(chunks: Sequence[Chunk]) -> Iterator[str]:
  """Yields texts from the beginning of every chunk, the same number of characters from each."""
  for chunk in chunks:
    left = _VOCABULARY_CHARS // len(chunks)
    for article in corpus.Articles(chunk):
      if left <= 0:
        break
      if not article.reason:
        yield f"{article.title}\n{article.text}"[:left]
        left -= len(article.title) + len(article.text)


def _rejected(chunks: Sequence[Chunk]) -> Iterator[dict]:
  """Yields a row of rejected.jsonl for each article of chunks that hold no usable article."""
  lines: collections.Counter[str] = collections.Counter()
  for chunk in chunks:
    articles, file = corpus.Articles(chunk), chunk.source.path
    for article in articles:
      row = rejections.row(article, file)
      yield {**row, "reason": article.reason or "empty", "line": row["line"] + lines[file]}
    lines[file] += articles.num_lines


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  run(
    args.input,
    args.output,
    format=args.format,
    vocab=args.vocab,
    vocab_input=args.vocab_input,
    vocab_size=args.vocab_size,
    lower_case=args.lower_case,
    max_tokens=args.max_tokens,
    passages_per_shard=args.passages_per_shard,
    segment_passages=args.segment_passages,
    beam_args=argv[1:],
  )
