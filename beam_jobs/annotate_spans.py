"""Finds salient spans in passages: the queries of REALM pre-training.

    python -m beam_jobs.annotate_spans --passages=P --tagger=rules --output=S -- \\
        --direct_num_workers=2 --direct_running_mode=multi_processing

Dates are found by regular expressions; names by rules, by a tagger trained with
`realm_tf.train_tagger` (--tagger=DIR), or by a spaCy pipeline, installed or in a folder
(--tagger=spacy:NAME). Each record file of passages becomes one record file of sentences, so the
sentences are in the order of the passages on any runner.

The output also lists the holders of the spans (`realm_tf.spans.holders`): each phrase that at most
21 passages of --knowledge contain, with the numbers of those passages. Phrases are matched with the
passages' texts word by word. info.json counts the distinct "phrases" of the spans, and the
"phrases_with_holders": those that 1 to 20 passages of the knowledge contain, not counting one (the
span's own) if the knowledge is the annotated passages.
"""

import bisect
import collections
import dataclasses
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string("passages", None, "The passages folder to annotate.", required=True)
  flags.DEFINE_string(
    "tagger",
    "rules",
    "How names are found: rules, spacy:NAME, or a folder written by realm_tf.train_tagger.",
  )
  flags.DEFINE_string(
    "knowledge", "", "The passages folder to search for the spans; by default --passages."
  )
  flags.DEFINE_string("output", None, "The spans folder to write.", required=True)
  cli.start_job("beam_jobs.annotate_spans")

import apache_beam as beam
import numpy as np
import tensorflow as tf
from apache_beam.utils import shared

from beam_jobs import holder_lists, pipelines, taggers
from realm_tf.corpus import metrics, passages, segments
from realm_tf.spans import holders, rules
from realm_tf.storage import artifacts, publishing

MAX_SPAN_TOKENS = 10  # longer spans cannot be masked (REALM, appendix)
REASONS = {"too_long", "unknown_word", "no_word_piece"}  # for dropping a span
_BATCH_PASSAGES = 256  # per call of the tagger and of the tokenizer


# ---------------------------------------------------------------------------------------- sentences


class AnnotateShard(beam.DoFn):
  """(record file of passages, its shard, number of shards) -> (name, counts, description).

  Writes the record file of sentences, under the returned name. The output tagged "phrases" is a
  [P] int64 array of the distinct phrases of the spans.
  """

  def __init__(self, passages_folder: str, folder: str, *, tagger: str):
    self._passages_folder, self._folder, self._tagger = passages_folder, folder, tagger
    # One tagger per process, however many threads Beam runs bundles in.
    self._shared = shared.Shared()

  def setup(self):
    self._tokenizer = passages.load_tokenizer(self._passages_folder)
    self._deleted = set(segments.read_deleted(self._passages_folder).tolist())
    self._find_names = self._shared.acquire(lambda: taggers.load_tagger(self._tagger))

  def process(self, item):
    path, shard, num_shards = item
    counts, phrases = collections.Counter(), set()
    name = passages.shard_name(rules.KIND, shard, num_shards)
    rows = self._sentences(path, counts, phrases)
    described = passages.write_shard(os.path.join(self._folder, name), rows, passages.Sentence)
    yield name, dict(counts), described
    found = np.fromiter(phrases - {holders.NO_PHRASE}, np.int64)
    yield beam.pvalue.TaggedOutput("phrases", np.sort(found))

  def _sentences(
    self, path: str, counts: collections.Counter, phrases: set[int]
  ) -> Iterator[passages.Sentence]:
    every = passages.read_shard(path, passages.Passage)
    rows = (row for row in every if row.number not in self._deleted)
    while batch := list(itertools.islice(rows, _BATCH_PASSAGES)):
      texts = [sentences_of(passage) for passage in batch]
      numbered = [
        (passage.number, text)
        for passage, sentences in zip(batch, texts, strict=True)
        for text in sentences
      ]
      counts["sentences"] += len(numbered)
      found = [
        (number, text, spans)
        for (number, text), names in zip(numbered, self._find_names(texts), strict=True)
        if (spans := rules.with_dates(text, names))
      ]
      titles = {passage.number: passage.title for passage in batch}
      for row in with_phrases(list(self._tokenise(found, counts)), titles):
        phrases.update(row.span_phrases)
        yield row

  def _tokenise(self, batch, counts: collections.Counter) -> Iterator[passages.Sentence]:
    tokens = self._tokenizer.with_offsets(tf.constant([text for _, text, _ in batch], tf.string))
    columns = (part.to_list() for part in (tokens.ids, tokens.starts, tokens.ends))
    for (number, text, spans), ids, starts, ends in zip(batch, *columns, strict=True):
      kept = []
      for span in spans:
        first, last = to_pieces(text, span, starts, ends)
        reason = self._reason(ids[first:last])
        counts[reason or "spans"] += 1
        if not reason:
          kept.append((first, last))
      if kept:
        counts["sentences_with_spans"] += 1
        span_starts, span_ends = zip(*kept, strict=True)
        yield passages.Sentence(
          number, text, ids, starts, ends, span_starts, span_ends, span_phrases=()
        )

  def _reason(self, ids: Sequence[int]) -> str:
    """Returns why a span of these word pieces is dropped, or an empty string."""
    if len(ids) > MAX_SPAN_TOKENS:
      return "too_long"
    return "unknown_word" if self._tokenizer.unk_id in ids else "" if ids else "no_word_piece"


def sentences_of(passage: passages.Passage) -> list[str]:
  return passages.sentences_of(passage.text, passage.sentence_starts, passage.sentence_ends)


def to_pieces(
  text: str, span: tuple[int, int], starts: Sequence[int], ends: Sequence[int]
) -> tuple[int, int]:
  """Converts a character range to the range [first, last) of the word pieces fully inside it."""
  start, end = (len(text[:at].encode()) for at in span)
  return bisect.bisect_left(starts, start), bisect.bisect_right(ends, end)


def with_phrases(
  rows: Sequence[passages.Sentence], titles: Mapping[int, str]
) -> Iterator[passages.Sentence]:
  """Yields the rows with `span_phrases` filled in.

  Args:
    rows: sentences.
    titles: titles of their passages, by passage number.
  """
  phrases = iter(holders.phrases_of([text for row in rows for text in row.span_texts]).tolist())
  for row in rows:
    title = metrics.searchable(titles[row.passage])
    yield dataclasses.replace(
      row,
      span_phrases=[
        holders.NO_PHRASE if metrics.searchable(text) in title else phrase
        # Not strict: the phrases of the following rows come next.
        for text, phrase in zip(row.span_texts, phrases, strict=False)
      ],
    )


# ------------------------------------------------------------------------------------------ the job


def finish(
  publication: publishing.Publication,
  annotated: Iterable,
  held: Iterable,
  num_phrases: int,
  *,
  details: Mapping,
) -> None:
  """Publishes sentences, holders and the summed counts of all files, if any spans were found."""
  total = collections.Counter(
    {"sentences": 0, "sentences_with_spans": 0, "spans": 0, "phrases": num_phrases}
  )
  files = {}
  for name, counts, described in [*_in_order(annotated), *_in_order(held)]:
    total.update(counts)
    files[name] = described
  dropped = {reason: total.pop(reason) for reason in sorted(REASONS & set(total))}
  if total["spans"]:
    publication.finish(
      {**total, "dropped": dropped},
      content=artifacts.fingerprint_of([described["sha256"] for described in files.values()]),
      details=details,
      files=files,
    )


def _in_order(files: Iterable) -> list:
  return sorted(files, key=lambda item: item[0])


def build(
  root: beam.Pipeline,
  publication: publishing.Publication,
  *,
  tagger: str,
  num_own: int,
  details: Mapping,
) -> None:
  """Adds the steps of the job to a pipeline; the last step publishes.

  Args:
    root: the pipeline.
    publication: the publication of the spans folder.
    tagger: see `run`.
    num_own: see `WriteHolders`.
    details: further entries of info.json.
  """
  source, knowledge = (
    publication.made_by["inputs"][name]["path"] for name in ("passages", "knowledge")
  )
  paths = passages.shard_paths(source, passages.KIND)
  shards = [(path, shard, len(paths)) for shard, path in enumerate(paths)]
  annotated = (
    root
    | "Shards" >> beam.Create(shards)
    | "Spread shards" >> beam.Reshuffle()
    | "Annotate"
    >> beam.ParDo(AnnotateShard(source, publication.path, tagger=tagger)).with_outputs(
      "phrases", main="shards"
    )
  )
  phrases = annotated.phrases | "Union" >> beam.CombineGlobally(holder_lists.union)
  held = (
    root
    | "Knowledge" >> beam.Create(passages.shard_paths(knowledge, passages.KIND))
    | "Spread knowledge" >> beam.Reshuffle()
    | "Find holders"
    >> beam.ParDo(holder_lists.FindHolders(len(paths)), beam.pvalue.AsSingleton(phrases))
    | "Buckets" >> beam.GroupByKey()
    | "Write holders"
    >> beam.ParDo(holder_lists.WriteHolders(publication.path, len(paths), num_own=num_own))
  )
  _ = (
    root
    | "Publication" >> beam.Create([publication])
    | "Publish"
    >> beam.Map(
      finish,
      beam.pvalue.AsIter(annotated.shards),
      beam.pvalue.AsIter(held),
      beam.pvalue.AsSingleton(phrases | "Number of phrases" >> beam.Map(len)),
      details=details,
    )
  )


def run(
  passages_folder: str,
  output: str,
  *,
  tagger: str = "rules",
  knowledge: str = "",
  beam_args: Sequence[str] = (),
) -> dict:
  """Makes a spans folder, unless `output` was already made from the same inputs.

  Args:
    passages_folder: a complete passages folder.
    output: the folder to write.
    tagger: "rules", "spacy:NAME", or the folder of a tagger.
    knowledge: a complete passages folder, whose passages are searched for the spans; by default
      `passages_folder`. Its vocabulary may differ.
    beam_args: Beam's options.

  Returns:
    The info of the artifact, or an empty dict if Beam's options do not wait for the job to finish.

  Raises:
    ArtifactError: `passages_folder` or `knowledge` is not a complete passages folder, or the folder
      of the tagger is not a complete tagger.
    TaggerError: the tagger is unknown or finds nothing.
  """
  knowledge = knowledge or passages_folder
  source, held_by = (
    artifacts.read_info(folder, kind=passages.KIND) for folder in (passages_folder, knowledge)
  )
  config, inputs = taggers.recipe_of(tagger)
  config = {**config, "max_span_tokens": MAX_SPAN_TOKENS, "max_holders": holders.MAX_HOLDERS}
  inputs = {**inputs, "passages": passages_folder, "knowledge": knowledge}
  if artifacts.is_current(output, kind=rules.KIND, config=config, inputs=inputs):
    print(f"annotate_spans: {output} was already made from these passages with this tagger.")
    return artifacts.read_info(output)
  started = time.monotonic()
  publication = publishing.begin(
    output,
    kind=rules.KIND,
    config=config,
    inputs=inputs,
    outlives=pipelines.is_left_running(beam_args),
  )
  with pipelines.published(publication):
    with pipelines.pipeline(beam_args) as root:
      build(
        root,
        publication,
        tagger=tagger,
        details={"vocab_fingerprint": source["vocab_fingerprint"]},
        num_own=int(held_by["fingerprint"] == source["fingerprint"]),
      )
    if pipelines.is_left_running(beam_args):
      print(f"annotate_spans: submitted; its last step publishes {output}.")
      return {}
    if artifacts.gfile.exists(publication.path):
      raise taggers.TaggerError(
        f"--tagger={tagger} finds no span to mask in the {source['counts']['passages']} passages "
        f"of {passages_folder!r}. The rules rely on capital letters and English dates; for other "
        "texts set --tagger to spacy:NAME or to a tagger's folder (in a config, corpus.tagger)."
      )
  info, secs = artifacts.read_info(output), max(time.monotonic() - started, 1e-3)
  counts = info["counts"]
  print(
    f"annotate_spans: {counts['sentences']} sentences in {secs:.0f} s "
    f"({counts['sentences'] / secs:.0f}/s): {counts}; {output}"
  )
  return info


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  run(args.passages, args.output, tagger=args.tagger, knowledge=args.knowledge, beam_args=argv[1:])
