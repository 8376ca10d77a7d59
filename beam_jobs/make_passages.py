"""Corpus -> passages: reads articles, splits them into blocks of whole sentences, numbers them, writes record files.

    python -m beam_jobs.make_passages --input='wiki/AA,wiki/AB,more.jsonl' --output=P -- --direct_num_workers=2 \
        --direct_running_mode=multi_processing

A passage's number is its place in the corpus: files in the order of their paths, articles in the order of the file. It does
not depend on the runner or the number of workers: blocks are first counted per chunk of input, then numbered, then brought
together by shard.
"""

import bisect
import collections
import dataclasses
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import apache_beam as beam
from absl import flags

from beam_jobs import blocking, corpus, pipelines, rejections, sources
from beam_jobs.corpus import Article
from beam_jobs.sources import Chunk, CorpusError
from realm_tf import (
    artifacts, json_lines, ownership, passages, paths, tokenization, vocabularies)
from realm_tf.characters import WordRules
from realm_tf.vocabularies import Vocabulary

REJECTED = "rejected.jsonl"
DUPLICATE = "duplicate"
_MOST_UNKNOWN = 0.01  # share of word pieces that are [UNK] above which people are told
_VOCABULARY_CHARS = 40_000_000  # what a vocabulary is learned from, spread evenly over the corpus
_BATCH_ARTICLES, _BATCH_CHARS, _BATCH_PASSAGES = 64, 4_000_000, 256  # per call of the tokenizer


@dataclasses.dataclass(frozen=True)
class Tally:
  """What was found in one chunk.

  Attributes:
    chunk, file: which.
    num_articles, num_blocks: kept.
    num_lines: how many lines begin in it.
    counts: of blocking.Blocker.
    first: for each of these counts the first article, as a row of rejected.jsonl.
  """

  chunk: int
  file: str
  num_articles: int
  num_blocks: int
  num_lines: int
  counts: Mapping[str, int]
  first: Mapping[str, dict]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Where each chunk's blocks go, and what was found in all of them.

  Attributes:
    first: chunk -> number of its first passage.
    duplicates: chunk -> its blocks (ascending places in the chunk) that stood earlier in the corpus.
    lines_before: chunk -> lines of its file before it.
    num_articles, num_passages: of the whole corpus.
    kept: file -> articles that were kept.
    counts, examples: of all tallies.
  """

  first: dict[int, int]
  duplicates: dict[int, list[int]]
  lines_before: dict[int, int]
  num_articles: int
  num_passages: int
  kept: dict[str, int]
  counts: dict[str, int]
  examples: dict[str, dict]


class ReadBlocks(beam.DoFn):
  """Chunk -> batches (chunk, file, place of the first block, [(title, sentences, line)]); tags "tally", "rejected"."""

  def __init__(self, folder: str, *, rules: WordRules, max_tokens: int):
    self._folder, self._rules, self._max_tokens = folder, rules, max_tokens

  def setup(self):
    self._tokenizer = tokenization.Tokenizer(self._folder, self._rules)

  def process(self, chunk: Chunk):
    num_articles = num_blocks = 0
    articles, file = corpus.Articles(chunk), chunk.source.path
    blocker = blocking.Blocker(self._tokenizer, max_tokens=self._max_tokens)
    for batch in _batches(articles):
      blocks = []
      for number, found in enumerate(blocker(batch)):
        if found.reason:
          row = {"reason": found.reason, **rejections.row(found.article, file)}
          yield beam.pvalue.TaggedOutput("rejected", ((chunk.number, found.article.at, number), row))
        else:
          num_articles += not found.article.part
          blocks += [(found.title, block, found.article.line) for block in found.blocks]
      yield chunk.number, file, num_blocks, blocks
      num_blocks += len(blocks)
    first = {what: {**rejections.row(article, file), "text": text} for what, (article, text) in blocker.first.items()}
    yield beam.pvalue.TaggedOutput(
        "tally", Tally(chunk.number, file, num_articles, num_blocks, articles.num_lines, dict(blocker.counts), first))


def _batches(articles: Iterable[Article]) -> Iterator[list[Article]]:
  """A batch holds one very long article, or many short ones."""
  batch, size = [], 0
  for article in articles:
    batch.append(article)
    size += len(article.text)
    if len(batch) == _BATCH_ARTICLES or size > _BATCH_CHARS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def uids_of(batch) -> Iterator[tuple[str, tuple[int, int]]]:
  """(uid, (chunk, place)) of each block."""
  chunk, _, first, blocks = batch
  for place, (title, sentences, _) in enumerate(blocks, first):
    yield passages.uid_of(title, " ".join(sentences)), (chunk, place)


def all_but_first(uid_and_places) -> list[tuple[int, int]]:
  """(chunk, place) of the blocks that are the same as an earlier one."""
  return sorted(uid_and_places[1])[1:]


def make_plan(_, tallies: Iterable[Tally], duplicates: Iterable) -> Plan:
  dropped = collections.defaultdict(list)
  for chunk, place in sorted(duplicates):
    dropped[chunk].append(place)
  first, lines_before, num_passages = {}, {}, 0
  kept, lines, counts, examples = collections.Counter(), collections.Counter(), collections.Counter(), {}
  tallies = sorted(tallies, key=lambda tally: tally.chunk)
  for tally in tallies:
    first[tally.chunk], lines_before[tally.chunk] = num_passages, lines[tally.file]
    num_passages += tally.num_blocks - len(dropped.get(tally.chunk, ()))
    for what, row in tally.first.items():
      examples.setdefault(what, {**row, "line": row["line"] + lines[tally.file]})
    kept[tally.file] += tally.num_articles
    lines[tally.file] += tally.num_lines
    counts.update(tally.counts)
  return Plan(
      first, dict(dropped), lines_before, num_articles=sum(kept.values()), num_passages=num_passages, kept=dict(kept),
      counts=dict(counts), examples=examples)


def number_blocks(batch, plan: Plan, *, passages_per_shard: int):
  """Batch -> (shard, [(number, title, sentences)]); tag "rejected": the duplicates."""
  chunk, file, first, blocks = batch
  duplicates = plan.duplicates.get(chunk, [])
  shards = collections.defaultdict(list)
  for place, (title, sentences, line) in enumerate(blocks, first):
    before = bisect.bisect_left(duplicates, place)
    if before < len(duplicates) and duplicates[before] == place:
      row = {"reason": DUPLICATE, "file": file, "line": line, "title": title,
             "text": " ".join(sentences)[:json_lines.SHOWN_CHARS]}
      yield beam.pvalue.TaggedOutput("rejected", ((chunk, float("inf"), place), row))
    else:
      number = plan.first[chunk] + place - before
      shards[number // passages_per_shard].append((number, title, sentences))
  yield from shards.items()


class WriteShard(beam.DoFn):
  """(shard, lists of numbered blocks) -> (shard, digest of the record file that it wrote)."""

  def __init__(self, folder: str, *, rules: WordRules, passages_per_shard: int):
    self._folder, self._rules, self._passages_per_shard = folder, rules, passages_per_shard

  def setup(self):
    self._tokenizer = tokenization.Tokenizer(self._folder, self._rules)

  def process(self, shard_and_blocks, plan: Plan):
    shard, lists = shard_and_blocks
    blocks = sorted(itertools.chain.from_iterable(lists))
    num_shards = -(-plan.num_passages // self._passages_per_shard)
    path = os.path.join(self._folder, passages.shard_name(passages.KIND, shard, num_shards))
    passages.write_shard(path, self._passages(blocks))
    yield shard, artifacts.file_digest(path)

  def _passages(self, blocks) -> Iterator[passages.Passage]:
    for start in range(0, len(blocks), _BATCH_PASSAGES):
      numbers, titles, sentences = zip(*blocks[start:start + _BATCH_PASSAGES])
      yield from passages.make_passages(self._tokenizer, list(zip(titles, sentences)), numbers)


def finish(publication: artifacts.Publication, plan: Plan, read: Iterable, repeated: Iterable, digests: Iterable, *,
           details: Mapping) -> None:
  """Writes what was rejected, and publishes the passages, if there are any."""
  rows = [{**row, "line": row["line"] + plan.lines_before[key[0]]}
          for key, row in sorted([*read, *repeated], key=lambda item: item[0])]
  if artifacts.gfile.exists(publication.path):
    artifacts.write_text(os.path.join(publication.path, REJECTED), "".join(map(json_lines.dumps, rows)))
  if plan.num_passages:
    dropped = collections.Counter(row["reason"] for row in rows)
    counts = {"passages": plan.num_passages, "articles": plan.num_articles, "dropped": dict(sorted(dropped.items())), **plan.counts}
    examples = {**rejections.first_by_reason(rows), **plan.examples}
    publication.finish(counts, content=artifacts.fingerprint_of(sorted(digests)), details={
        **details, "first_of_each": examples, "warnings": list(_warnings(plan, rows))})


def _warnings(plan: Plan, rows: Sequence[Mapping]) -> Iterator[str]:
  """What must not be overlooked: poor files, titles that were cut, words that the vocabulary does not know."""
  lost = [row for row in rows if row["reason"] != DUPLICATE]
  rejected = collections.Counter(row["file"] for row in lost)
  poor = {file for file, num in rejected.items() if num > plan.kept.get(file, 0)}
  if poor:
    reasons = rejections.reasons([row for row in lost if row["file"] in poor])
    yield f"most is rejected of {len(poor)} of {len(plan.kept)} files: {reasons}"
  if plan.counts[blocking.CUT_TITLES] > plan.num_articles / 2:
    first = rejections.place(plan.examples[blocking.CUT_TITLES])
    yield f"most titles are too long and were cut, first {first}"
  share = plan.counts[blocking.UNKNOWN] / max(plan.counts[blocking.WORD_PIECES], 1)
  if share > _MOST_UNKNOWN:
    first = rejections.place(plan.examples[blocking.UNKNOWN])
    yield (f"{share:.1%} of all word pieces are {tokenization.UNK}, words that the vocabulary does not know, "
           f"first {first}")


def build(root: beam.Pipeline, chunks: Sequence[Chunk], publication: artifacts.Publication, *, details: Mapping, rules: WordRules,
          max_tokens: int, passages_per_shard: int):
  """The pipeline: read and block, find duplicates, number, write, publish."""
  folder = publication.path
  read = (
      root | "Chunks" >> beam.Create(chunks) | beam.Reshuffle()
      | "Read" >> beam.ParDo(ReadBlocks(folder, rules=rules, max_tokens=max_tokens)).with_outputs(
          "tally", "rejected", main="blocks"))
  duplicates = read.blocks | beam.FlatMap(uids_of) | "ByUid" >> beam.GroupByKey() | beam.FlatMap(all_but_first)
  plan = beam.pvalue.AsSingleton(
      root | "Once" >> beam.Create([None])
      | "Plan" >> beam.Map(make_plan, beam.pvalue.AsIter(read.tally), beam.pvalue.AsIter(duplicates)))
  numbered = read.blocks | "Number" >> beam.FlatMap(number_blocks, plan, passages_per_shard=passages_per_shard).with_outputs(
      "rejected", main="blocks")
  digests = numbered.blocks | "ByShard" >> beam.GroupByKey() | "Write" >> beam.ParDo(
      WriteShard(folder, rules=rules, passages_per_shard=passages_per_shard), plan)
  _ = root | "Publication" >> beam.Create([publication]) | "Publish" >> beam.Map(
      finish, plan, *(beam.pvalue.AsIter(part) for part in (read.rejected, numbered.rejected, digests)), details=details)


# --------------------------------------------------------------------------------------------------------------- job


def run(inputs: str, output: str, *, format: str = "auto", vocab: str | None = None, vocab_input: str = "",
        vocab_size: int = 30_522, lower_case: bool | None = None, max_tokens: int = 288, passages_per_shard: int = 10_000,
        beam_args: Sequence[str] = ()) -> dict:
  """Makes a passages folder, unless it is there and was made from just this.

  Args:
    inputs: a path, or files, folders and globs separated by commas.
    output: the folder to write.
    format: one of sources.FORMATS.
    vocab: a vocab.txt or a folder that holds one; None learns one from the corpus.
    vocab_input: further files, as `inputs`, for learning the vocabulary only.
    vocab_size: most word pieces of a learned vocabulary.
    lower_case: whether the vocabulary is uncased; None asks the files beside it, and learns an uncased one.
    max_tokens: most word pieces of `[CLS] title [SEP] text [SEP]`.
    passages_per_shard: rows of one record file.
    beam_args: Beam's options.

  Returns:
    The artifact's info; nothing yet where Beam's options do not wait for the end.

  Raises:
    ArtifactError: `output` holds something else, or is, holds or lies in an input.
    CorpusError: no input, or nothing in it that makes a passage.
    VocabularyError: `vocab` is none.
  """
  if max_tokens < 16 or passages_per_shard < 1:
    raise CorpusError(f"got --max_tokens={max_tokens}, --passages_per_shard={passages_per_shard}; wanted at least 16 and 1.")
  reads = [path for given in (inputs, vocab_input) for part in paths.split(given) for path in paths.matching(part)]
  reads += [vocab] if vocab else []
  ownership.check_apart(output, reads)
  files = sources.find_sources(inputs, format=format)
  also = sources.find_sources(vocab_input, format=format) if vocab_input and not vocab else []
  unread = [{"reason": file.reason, "file": file.path, "line": 1, "title": "", "text": ""} for file in also if file.reason]
  if unread:
    raise CorpusError(f"--vocab_input {vocab_input!r} has files that cannot be read: {rejections.reasons(unread)}; {sources.WANTED}.")
  given = vocabularies.read(vocab).with_case(lower_case) if vocab else None
  rules = given.rules if given else WordRules.for_case(lower_case is not False)
  learned = f"learned, at most {vocab_size}" + (f", with {_fingerprint(also)}" if also else "")
  config = {
      "corpus": _fingerprint(files), "vocab": given.fingerprint if given else learned,
      "tokenizer": dataclasses.asdict(rules), "max_tokens": max_tokens, "passages_per_shard": passages_per_shard}
  if artifacts.is_current(output, kind=passages.KIND, config=config, inputs={}):
    print(f"make_passages: {output} is already made from just this corpus.")
    return _told(artifacts.read_info(output))
  started = time.time()
  print(f"make_passages: reading {len(files)} files, {sum(file.size_bytes for file in files) / 1e6:.1f} MB")
  publication = artifacts.begin(output, kind=passages.KIND, config=config, inputs={}, reads=reads)
  with pipelines.removed_on_failure(publication.path):
    chunks = sources.split_into_chunks(files)
    tokenizer = _write_vocabulary(
        publication.path, chunks + sources.split_into_chunks(also), inputs=inputs, given=given,
        size=vocab_size, rules=rules)
    details = {**tokenizer.details, "input": inputs}
    with pipelines.pipeline(beam_args) as root:
      build(root, chunks, publication, details=details, rules=rules, max_tokens=max_tokens,
            passages_per_shard=passages_per_shard)
    if pipelines.is_left_running(beam_args):
      print(f"make_passages: submitted; its last step publishes {output}.")
      return {}
    if artifacts.gfile.exists(publication.path):
      with artifacts.gfile.GFile(os.path.join(publication.path, REJECTED), "rb") as file:
        raise rejections.nothing(inputs, [record.row for record in json_lines.read(file)])
  info, secs = artifacts.read_info(output), time.time() - started
  counts = info["counts"]
  print(f"make_passages: {counts['passages']} passages of {counts['articles']} articles in {secs:.0f} s "
        f"({counts['passages'] / secs:.0f}/s); dropped {counts['dropped']}; split {counts[blocking.SPLIT]} sentences, cut "
        f"{counts[blocking.CUT_TITLES]} titles; {output}")
  return _told(info)


def _told(info: dict) -> dict:
  """Prints the artifact's warnings, as the last line."""
  if info.get("warnings"):
    print(f"make_passages: WARNING: {'; '.join(info['warnings'])}; all of it is in {REJECTED} and {artifacts.INFO}")
  return info


def _fingerprint(files: Sequence[sources.Source]) -> str:
  return artifacts.fingerprint_of([(os.path.basename(file.path), file.format, file.size_bytes, file.digest) for file in files])


def _write_vocabulary(
    folder: str, chunks: Sequence[Chunk], *, inputs: str, given: Vocabulary | None, size: int,
    rules: WordRules) -> tokenization.Tokenizer:
  if given:
    pieces = given.pieces
  else:
    sample = [text for text in _sample(chunks) if text.strip()]
    if not sample:
      raise rejections.nothing(inputs, list(_rejected(chunks)))
    pieces = tokenization.train_vocabulary(sample, size=size, rules=rules)
    if not set(pieces) - set(tokenization.SPECIAL):
      raise CorpusError(
          f"no word piece can be learned with --vocab_size={size} from texts like {sample[0].strip()[:60]!r}; wanted letters, and room "
          "for them.")
  vocabularies.write(folder, pieces)
  return tokenization.Tokenizer(folder, rules)


def _sample(chunks: Sequence[Chunk]) -> Iterator[str]:
  """The same number of characters from the beginning of every chunk."""
  for chunk in chunks:
    left = _VOCABULARY_CHARS // len(chunks)
    for article in corpus.Articles(chunk):
      if left <= 0:
        break
      if not article.reason:
        yield f"{article.title}\n{article.text}"[:left]
        left -= len(article.title) + len(article.text)


def _rejected(chunks: Sequence[Chunk]) -> Iterator[dict]:
  """Rows about the articles of chunks that hold no usable one."""
  lines = collections.Counter()
  for chunk in chunks:
    articles, file = corpus.Articles(chunk), chunk.source.path
    for article in articles:
      row = rejections.row(article, file)
      yield {**row, "reason": article.reason or "empty", "line": row["line"] + lines[file]}
    lines[file] += articles.num_lines


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  run(args.input, args.output, format=args.format, vocab=args.vocab, vocab_input=args.vocab_input,
      vocab_size=args.vocab_size, lower_case=args.lower_case, max_tokens=args.max_tokens,
      passages_per_shard=args.passages_per_shard, beam_args=argv[1:])


if __name__ == "__main__":
  flags.DEFINE_string("input", None, "Files, folders and globs, separated by commas.", required=True)
  flags.DEFINE_string("output", None, "The passages folder to write.", required=True)
  flags.DEFINE_enum("format", "auto", sources.FORMATS, "What the files hold; auto decides for each file.")
  flags.DEFINE_string("vocab", None, "A vocab.txt, or a folder that holds one; without it one is learned from the corpus.")
  flags.DEFINE_string("vocab_input", "", "Further files that a vocabulary is learned from, besides --input.")
  flags.DEFINE_integer("vocab_size", 30_522, "Most word pieces of a learned vocabulary.")
  flags.DEFINE_bool("lower_case", None, "Whether the vocabulary is uncased; if not given, as the files beside it say (learned: yes).")
  flags.DEFINE_integer("max_tokens", 288, "Most word pieces of [CLS] title [SEP] text [SEP].")
  flags.DEFINE_integer("passages_per_shard", 10_000, "Rows of one record file.")
  pipelines.start("beam_jobs.make_passages")
