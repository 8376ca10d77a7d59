"""The Beam steps of make_passages: from articles to numbered blocks to shards."""

import bisect
import collections
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import apache_beam as beam

from beam_jobs import blocking, corpus, passage_artifact, passage_plan, rejections
from beam_jobs.corpus import Article
from beam_jobs.passage_plan import Base, Plan, Tally
from beam_jobs.sources import Chunk
from realm_tf.corpus import passages, segments, tokenization
from realm_tf.corpus.characters import WordRules
from realm_tf.storage import json_lines, publishing

_BATCH_ARTICLES, _BATCH_CHARS, _BATCH_PASSAGES = 64, 4_000_000, 256  # per call of the tokenizer


class Block(NamedTuple):
  """A passage before it has a number and word pieces.

  Attributes:
    document, title, sentences: see `passages.Passage`.
    line: the line of its file on which its article begins, counted from the beginning of its chunk.
  """

  document: str
  title: str
  sentences: Sequence[str]
  line: int

  @property
  def text(self) -> str:
    return " ".join(self.sentences)


class ReadBlocks(beam.DoFn):
  """Chunk -> batches (chunk, file, position of the first block, [`Block`]).

  Further outputs are tagged "tally" and "rejected".
  """

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
          yield beam.pvalue.TaggedOutput(
            "rejected", ((chunk.number, found.article.at, number), row)
          )
        else:
          num_articles += not found.article.part
          article = found.article
          blocks += [
            Block(article.document, found.title, block, article.line) for block in found.blocks
          ]
      yield chunk.number, file, num_blocks, blocks
      num_blocks += len(blocks)
    first = {
      what: {**rejections.row(article, file), "text": text}
      for what, (article, text) in blocker.first.items()
    }
    yield beam.pvalue.TaggedOutput(
      "tally",
      Tally(
        chunk.number,
        file,
        num_articles,
        num_blocks,
        articles.num_lines,
        dict(blocker.counts),
        first,
      ),
    )


def _batches(articles: Iterable[Article]) -> Iterator[list[Article]]:
  """Yields batches of articles: one very long article, or many short ones."""
  batch, size = [], 0
  for article in articles:
    batch.append(article)
    size += len(article.text)
    if len(batch) == _BATCH_ARTICLES or size > _BATCH_CHARS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def uids_of(batch) -> Iterator[tuple[bytes, tuple[int, int]]]:
  """Yields (uid, (chunk, position)) of each block."""
  chunk, _, first, blocks = batch
  for place, block in enumerate(blocks, first):
    yield passages.uid_of(block.title, block.text), (chunk, place)


def documents_of(batch) -> set[str]:
  return {block.document for block in batch[-1]}


def all_but_first(uid_and_places) -> list[tuple[int, int]]:
  """Returns (chunk, position) of each block that duplicates an earlier one."""
  return sorted(uid_and_places[1])[1:]


def number_blocks(batch, plan: Plan, *, sizes: segments.Sizes):
  """Batch -> ((segment, shard), [(number, `Block`)]); duplicates are tagged "rejected".

  Numbers and segments are counted from those of the plan.
  """
  chunk, file, first, blocks = batch
  duplicates = plan.duplicates.get(chunk, [])
  shards = collections.defaultdict(list)
  for place, block in enumerate(blocks, first):
    before = bisect.bisect_left(duplicates, place)
    if before < len(duplicates) and duplicates[before] == place:
      row = {
        "reason": passage_artifact.DUPLICATE,
        "file": file,
        "line": block.line,
        "title": block.title,
        "text": block.text[: json_lines.SHOWN_CHARS],
      }
      yield beam.pvalue.TaggedOutput("rejected", ((chunk, float("inf"), place), row))
    else:
      number = plan.first[chunk] + place - before
      segment, offset = divmod(number, sizes.segment)
      shards[segment, offset // sizes.shard].append((number, block))
  yield from shards.items()


class WriteShard(beam.DoFn):
  """Writes the record file of a shard.

  ((segment, shard), lists of numbered blocks) -> (name, description) of the file.
  """

  def __init__(self, folder: str, *, rules: WordRules, sizes: segments.Sizes):
    self._folder, self._rules, self._sizes = folder, rules, sizes

  def setup(self):
    self._tokenizer = tokenization.Tokenizer(self._folder, self._rules)

  def process(self, shard_and_blocks, plan: Plan):
    (segment, shard), lists = shard_and_blocks
    blocks = sorted(itertools.chain.from_iterable(lists), key=lambda numbered: numbered[0])
    num_shards = self._sizes.num_shards(plan.num_passages, segment)
    name = passages.shard_name(passages.KIND, shard, num_shards, segment=plan.segment + segment)
    path, rows = os.path.join(self._folder, name), self._passages(blocks, base=plan.base)
    yield name, passages.write_shard(path, rows, passages.Passage)

  def _passages(self, blocks, *, base: int) -> Iterator[passages.Passage]:
    for start in range(0, len(blocks), _BATCH_PASSAGES):
      numbers, batch = zip(*blocks[start : start + _BATCH_PASSAGES], strict=True)
      yield from passages.make_passages(
        self._tokenizer,
        [(block.title, block.sentences) for block in batch],
        [base + number for number in numbers],
        [block.document for block in batch],
      )


def build(
  root: beam.Pipeline,
  chunks: Sequence[Chunk],
  publication: publishing.Publication,
  *,
  details: Mapping,
  rules: WordRules,
  max_tokens: int,
  sizes: segments.Sizes,
  base: Base | None = None,
):
  """Adds the steps of the job: read and block, find duplicates, number, write, publish.

  With a `base`, what is read is added to that corpus.
  """
  folder = publication.path
  read = (
    root
    | "Chunks" >> beam.Create(chunks)
    | beam.Reshuffle()
    | "Read"
    >> beam.ParDo(ReadBlocks(folder, rules=rules, max_tokens=max_tokens)).with_outputs(
      "tally", "rejected", main="blocks"
    )
  )
  uids = read.blocks | beam.FlatMap(uids_of)
  duplicates = uids | "ByUid" >> beam.GroupByKey() | beam.FlatMap(all_but_first)
  of_update = [uids, read.blocks | beam.FlatMap(documents_of)] if base else []
  plan = beam.pvalue.AsSingleton(
    root
    | "Once" >> beam.Create([None])
    | "Plan"
    >> beam.Map(
      passage_plan.make_plan,
      *(beam.pvalue.AsIter(part) for part in (read.tally, duplicates, *of_update)),
      base=base,
    )
  )
  numbered = read.blocks | "Number" >> beam.FlatMap(number_blocks, plan, sizes=sizes).with_outputs(
    "rejected", main="blocks"
  )
  files = (
    numbered.blocks
    | "ByShard" >> beam.GroupByKey()
    | "Write" >> beam.ParDo(WriteShard(folder, rules=rules, sizes=sizes), plan)
  )
  _ = (
    root
    | "Publication" >> beam.Create([publication])
    | "Publish"
    >> beam.Map(
      passage_artifact.finish,
      plan,
      *(beam.pvalue.AsIter(part) for part in (read.rejected, numbered.rejected, files)),
      details=details,
      base=base,
    )
  )
