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
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import apache_beam as beam
from absl import flags

from beam_jobs import corpus, pipelines
from beam_jobs.corpus import Article, Chunk, CorpusError
from realm_tf import artifacts, ownership, passages, paths, tokenization, vocabularies
from realm_tf.characters import WordRules
from realm_tf.vocabularies import Vocabulary

REJECTED = "rejected.jsonl"
_VOCABULARY_CHARS = 40_000_000  # what a vocabulary is learned from, spread evenly over the corpus
_BATCH_ARTICLES, _BATCH_PASSAGES = 64, 256  # per call of the tokenizer


@dataclasses.dataclass(frozen=True)
class Plan:
  """Where each chunk's blocks go.

  Attributes:
    first: chunk -> number of its first passage.
    duplicates: chunk -> its blocks (ascending places in the chunk) that stood earlier in the corpus.
    num_articles, num_passages: of the whole corpus.
  """

  first: dict[int, int]
  duplicates: dict[int, list[int]]
  num_articles: int
  num_passages: int


class ReadBlocks(beam.DoFn):
  """Chunk -> batches (chunk, file, place of the first block in the chunk, [(title, sentences)]); tags "tally", "rejected"."""

  def __init__(self, folder: str, *, rules: WordRules, max_tokens: int):
    self._folder, self._rules, self._max_tokens = folder, rules, max_tokens

  def setup(self):
    self._tokenizer = tokenization.Tokenizer(self._folder, self._rules)

  def process(self, chunk: Chunk):
    num_articles = num_blocks = 0
    articles = corpus.read_articles(chunk)
    while batch := list(itertools.islice(articles, _BATCH_ARTICLES)):
      kept, rejected = self._split(batch)
      for article, reason in rejected:
        row = {"reason": reason, "file": chunk.source.path, "at": article.at,
               "title": article.title[:200], "text": article.text[:200]}
        yield beam.pvalue.TaggedOutput("rejected", ((chunk.number, article.at), row))
      blocks = [(article.title, block) for article, sentence_blocks in kept for block in sentence_blocks]
      yield chunk.number, chunk.source.path, num_blocks, blocks
      num_articles += len(kept)
      num_blocks += len(blocks)
    yield beam.pvalue.TaggedOutput("tally", (chunk.number, num_articles, num_blocks))

  def _split(self, articles: Sequence[Article]):
    """Articles -> ([(article, blocks)], [(article, reason of rejection)])."""
    split, rejected = [], []
    for article in articles:
      try:
        split.append((article, corpus.sentences_of(article)))
      except corpus.Rejected as reason:
        rejected.append((article, str(reason)))
    title_tokens = self._tokenizer.lengths([article.title for article, _ in split])
    lengths = iter(self._tokenizer.lengths([sentence for _, sentences in split for sentence in sentences]))
    kept = []
    for (article, sentences), size in zip(split, title_tokens):
      blocks = passages.block_sentences(
          sentences, list(itertools.islice(lengths, len(sentences))), title_tokens=size, max_tokens=self._max_tokens)
      if size > self._max_tokens // 2:
        rejected.append((article, "title_too_long"))
      else:
        kept.append((article, blocks))
    return kept, rejected


def uids_of(batch) -> Iterator[tuple[str, tuple[int, int]]]:
  """(uid, (chunk, place)) of each block."""
  chunk, _, first, blocks = batch
  for place, (title, sentences) in enumerate(blocks, first):
    yield passages.uid_of(title, " ".join(sentences)), (chunk, place)


def all_but_first(uid_and_places) -> list[tuple[int, int]]:
  """(chunk, place) of the blocks that are the same as an earlier one."""
  return sorted(uid_and_places[1])[1:]


def make_plan(_, tallies: Iterable, duplicates: Iterable) -> Plan:
  dropped = collections.defaultdict(list)
  for chunk, place in sorted(duplicates):
    dropped[chunk].append(place)
  first, num_articles, num_passages = {}, 0, 0
  for chunk, articles, blocks in sorted(tallies):
    first[chunk] = num_passages
    num_articles += articles
    num_passages += blocks - len(dropped.get(chunk, ()))
  return Plan(first, dict(dropped), num_articles, num_passages)


def number_blocks(batch, plan: Plan, *, passages_per_shard: int):
  """Batch -> (shard, [(number, title, sentences)]); tag "rejected": the duplicates."""
  chunk, file, first, blocks = batch
  duplicates = plan.duplicates.get(chunk, [])
  shards = collections.defaultdict(list)
  for place, (title, sentences) in enumerate(blocks, first):
    before = bisect.bisect_left(duplicates, place)
    if before < len(duplicates) and duplicates[before] == place:
      row = {"reason": "duplicate", "file": file, "title": title, "text": " ".join(sentences)[:200]}
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
  rows = [row for _, row in sorted([*read, *repeated], key=lambda item: item[0])]
  if artifacts.gfile.exists(publication.path):
    artifacts.write_text(os.path.join(publication.path, REJECTED), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
  if plan.num_passages:
    publication.finish(
        {"passages": plan.num_passages, "articles": plan.num_articles,
         "dropped": dict(sorted(collections.Counter(row["reason"] for row in rows).items()))},
        content=artifacts.fingerprint_of(sorted(digests)), details=details)


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
    inputs: files, folders and globs, separated by commas.
    output: the folder to write.
    format: one of corpus.FORMATS.
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
  sources = corpus.find_sources(inputs, format=format)
  also = corpus.find_sources(vocab_input, format=format) if vocab_input and not vocab else []
  given = vocabularies.read(vocab).with_case(lower_case) if vocab else None
  rules = given.rules if given else WordRules.for_case(lower_case is not False)
  config = {
      "corpus": _fingerprint(sources),
      "vocab": given.fingerprint if given else f"learned, at most {vocab_size}" + (f", with {_fingerprint(also)}" if also else ""),
      "tokenizer": dataclasses.asdict(rules), "max_tokens": max_tokens, "passages_per_shard": passages_per_shard}
  if artifacts.is_current(output, kind=passages.KIND, config=config, inputs={}):
    print(f"make_passages: {output} is already made from just this corpus.")
    return artifacts.read_info(output)
  started = time.time()
  print(f"make_passages: reading {len(sources)} files, {sum(s.size_bytes for s in sources) / 1e6:.1f} MB")
  publication = artifacts.begin(output, kind=passages.KIND, config=config, inputs={}, reads=reads)
  with pipelines.removed_on_failure(publication.path):
    chunks = corpus.split_into_chunks(sources)
    tokenizer = _write_vocabulary(
        publication.path, chunks + corpus.split_into_chunks(also), given=given, size=vocab_size, rules=rules)
    details = {**tokenizer.details, "input": inputs}
    with pipelines.pipeline(beam_args) as root:
      build(root, chunks, publication, details=details, rules=rules, max_tokens=max_tokens,
            passages_per_shard=passages_per_shard)
    if pipelines.is_left_running(beam_args):
      print(f"make_passages: submitted; its last step publishes {output}.")
      return {}
    if artifacts.gfile.exists(publication.path):
      rows = [json.loads(line) for line in artifacts.read_text(os.path.join(publication.path, REJECTED)).splitlines()]
      dropped = dict(collections.Counter(row["reason"] for row in rows))
      raise CorpusError(f"--input {inputs!r} gives no passage; dropped {dropped}, the first of them {rows[:1]}.")
  info, secs = artifacts.read_info(output), time.time() - started
  counts = info["counts"]
  print(f"make_passages: {counts['passages']} passages of {counts['articles']} articles in {secs:.0f} s "
        f"({counts['passages'] / secs:.0f}/s); dropped {counts['dropped']}; {output}")
  return info


def _fingerprint(sources: Sequence[corpus.Source]) -> str:
  return artifacts.fingerprint_of([(os.path.basename(s.path), s.format, s.size_bytes, s.digest) for s in sources])


def _write_vocabulary(
    folder: str, chunks: Sequence[Chunk], *, given: Vocabulary | None, size: int, rules: WordRules) -> tokenization.Tokenizer:
  vocabularies.write(folder, given.pieces if given else tokenization.train_vocabulary(_sample(chunks), size=size, rules=rules))
  return tokenization.Tokenizer(folder, rules)


def _sample(chunks: Sequence[Chunk]) -> Iterator[str]:
  """The same number of characters from the beginning of every chunk."""
  for chunk in chunks:
    left = _VOCABULARY_CHARS // len(chunks)
    for article in corpus.read_articles(chunk):
      if left <= 0:
        break
      if not article.reason:
        yield f"{article.title}\n{article.text}"[:left]
        left -= len(article.title) + len(article.text)


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  run(args.input, args.output, format=args.format, vocab=args.vocab, vocab_input=args.vocab_input,
      vocab_size=args.vocab_size, lower_case=args.lower_case, max_tokens=args.max_tokens,
      passages_per_shard=args.passages_per_shard, beam_args=argv[1:])


if __name__ == "__main__":
  flags.DEFINE_string("input", None, "Files, folders and globs, separated by commas.", required=True)
  flags.DEFINE_string("output", None, "The passages folder to write.", required=True)
  flags.DEFINE_enum("format", "auto", corpus.FORMATS, "What the files hold; auto decides for each file.")
  flags.DEFINE_string("vocab", None, "A vocab.txt, or a folder that holds one; without it one is learned from the corpus.")
  flags.DEFINE_string("vocab_input", "", "Further files that a vocabulary is learned from, besides --input.")
  flags.DEFINE_integer("vocab_size", 30_522, "Most word pieces of a learned vocabulary.")
  flags.DEFINE_bool("lower_case", None, "Whether the vocabulary is uncased; if not given, as the files beside it say (learned: yes).")
  flags.DEFINE_integer("max_tokens", 288, "Most word pieces of [CLS] title [SEP] text [SEP].")
  flags.DEFINE_integer("passages_per_shard", 10_000, "Rows of one record file.")
  pipelines.start("beam_jobs.make_passages")
