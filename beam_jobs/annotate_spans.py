"""Passages -> sentences with salient spans, the queries of REALM pre-training.

    python -m beam_jobs.annotate_spans --passages=P --tagger=rules --output=S -- --direct_num_workers=2 \
        --direct_running_mode=multi_processing

Dates follow regular expressions; names are found by rules, by a tagger of `realm_tf.train_tagger` (--tagger=DIR), or by a spaCy
pipeline that is installed or in a folder (--tagger=spacy:NAME). One record file of passages becomes one record file of
sentences, so the order is that of the passages on any runner.

Beside them stand the spans' holders (`realm_tf.holders`): each phrase that at most 21 of the passages of --knowledge hold, and
which. Phrases are matched with the passages' texts by words. info.json counts the distinct "phrases" of the spans, and the
"phrases_with_holders": those that 1 to 20 passages of the knowledge hold, not counting one (the span's own) where the
knowledge is the annotated passages.
"""

import bisect
import collections
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import apache_beam as beam
import numpy as np
import tensorflow as tf
from absl import flags
from apache_beam.utils import shared

from beam_jobs import pipelines
from realm_tf import artifacts, holders, metrics, passages, salient_spans, span_tagger, tokenization

KIND = "spans"
MAX_SPAN_TOKENS = 10  # longer spans cannot be masked (REALM, appendix)
REASONS = {"too_long", "unknown_word", "no_word_piece"}  # why spans are dropped
_BATCH_PASSAGES = 256  # per call of the tagger and of the tokenizer

RULES, SPACY = "rules", "spacy:"  # or a folder
_SPACY_NUMBERS = frozenset("DATE TIME PERCENT MONEY QUANTITY ORDINAL CARDINAL".split())  # what is no name

Tagger = Callable[[Sequence[Sequence[str]]], list[Sequence[tuple[int, int]]]]


class TaggerError(artifacts.UserError):
  """A --tagger that does not exist, or that finds nothing."""


# -------------------------------------------------------------------------------------------------------------- taggers


def load_tagger(name: str) -> Tagger:
  """What finds names: the sentences of passages -> the character ranges in each sentence, of all passages in a row.

  Raises:
    TaggerError: there is no such tagger.
  """
  if name == RULES:
    return lambda texts: [names for sentences in texts for names in salient_spans.find_names_of_passage(sentences)]
  if name.startswith(SPACY):
    nlp = _load_spacy(name)
    return lambda texts: [[(entity.start_char, entity.end_char) for entity in doc.ents if entity.label_ not in _SPACY_NUMBERS]
                          for doc in nlp.pipe(itertools.chain(*texts))]
  model = span_tagger.load(_folder_of(name))
  return lambda texts: [[(span.start, span.end) for span in spans]
                        for spans in span_tagger.find_names(model, list(itertools.chain(*texts)))]


def recipe_of(name: str) -> tuple[dict, dict[str, str]]:
  """What a spans folder's info.json says of its tagger: entries of its config, and of its inputs."""
  if name == RULES:
    return {"tagger": RULES}, {}
  if name.startswith(SPACY):
    meta = _load_spacy(name).meta
    return {"tagger": name, "model": f"{meta['lang']}_{meta['name']}-{meta['version']}"}, {}
  return {"tagger": span_tagger.KIND}, {"tagger": _folder_of(name)}


def _folder_of(name: str) -> str:
  if not artifacts.gfile.isdir(name):
    raise TaggerError(f"--tagger={name!r} is unknown; wanted one of {RULES}, {SPACY}NAME, or a folder of realm_tf.train_tagger.")
  return name


def _load_spacy(name: str):
  try:
    import spacy  # only for who has it
  except ImportError:
    raise TaggerError(f"--tagger={name} needs spaCy, which is not installed: pip install spacy.") from None
  try:
    return spacy.load(name.removeprefix(SPACY))
  except OSError as error:
    raise TaggerError(f"--tagger={name}: {error} (python -m spacy download NAME installs its models)") from None


# ------------------------------------------------------------------------------------------------------------ sentences


class AnnotateShard(beam.DoFn):
  """(record file of passages, its shard, number of shards) -> (shard, counts, digest); writes the record file of sentences.

  The output "phrases" is the [P] int64 array of the spans' distinct phrases.
  """

  def __init__(self, passages_folder: str, folder: str, *, tagger: str):
    self._passages_folder, self._folder, self._tagger = passages_folder, folder, tagger
    self._shared = shared.Shared()  # one tagger per process, however many threads Beam runs bundles in

  def setup(self):
    self._tokenizer = tokenization.Tokenizer(self._passages_folder)
    self._find_names = self._shared.acquire(lambda: load_tagger(self._tagger))

  def process(self, item):
    path, shard, num_shards = item
    counts, phrases = collections.Counter(), set()
    written = os.path.join(self._folder, passages.shard_name(KIND, shard, num_shards))
    passages.write_shard(written, self._sentences(path, counts, phrases))
    yield shard, dict(counts), artifacts.file_digest(written)
    found = np.fromiter(phrases - {holders.NO_PHRASE}, np.int64)
    yield beam.pvalue.TaggedOutput("phrases", np.sort(found))

  def _sentences(self, path: str, counts: collections.Counter, phrases: set[int]) -> Iterator[passages.Sentence]:
    rows = passages.read_shard(path, passages.Passage)
    while batch := list(itertools.islice(rows, _BATCH_PASSAGES)):
      texts = [sentences_of(passage) for passage in batch]
      numbered = [(passage.number, text) for passage, sentences in zip(batch, texts) for text in sentences]
      counts["sentences"] += len(numbered)
      found = [(number, text, spans) for (number, text), names in zip(numbered, self._find_names(texts), strict=True)
               if (spans := salient_spans.with_dates(text, names))]
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
        span_starts, span_ends = zip(*kept)
        yield passages.Sentence(number, text, ids, starts, ends, span_starts, span_ends, span_phrases=())

  def _reason(self, ids: Sequence[int]) -> str:
    """Why a span of these word pieces is dropped, or empty."""
    if len(ids) > MAX_SPAN_TOKENS:
      return "too_long"
    return "unknown_word" if self._tokenizer.unk_id in ids else "" if ids else "no_word_piece"


def sentences_of(passage: passages.Passage) -> list[str]:
  return passages.sentences_of(passage.text, passage.sentence_starts, passage.sentence_ends)


def to_pieces(text: str, span: tuple[int, int], starts: Sequence[int], ends: Sequence[int]) -> tuple[int, int]:
  """Character range -> range [first, last) of the word pieces that lie fully inside it."""
  start, end = (len(text[:at].encode()) for at in span)
  return bisect.bisect_left(starts, start), bisect.bisect_right(ends, end)


def with_phrases(rows: Sequence[passages.Sentence], titles: Mapping[int, str]) -> Iterator[passages.Sentence]:
  """The rows with `span_phrases`.

  Args:
    rows: sentences.
    titles: of their passages, by number.
  """
  phrases = iter(holders.phrases_of([text for row in rows for text in row.span_texts]).tolist())
  for row in rows:
    title = metrics.searchable(titles[row.passage])
    yield dataclasses.replace(row, span_phrases=[
        holders.NO_PHRASE if metrics.searchable(text) in title else phrase for text, phrase in zip(row.span_texts, phrases)])


# -------------------------------------------------------------------------------------------------------------- holders


def union(arrays: Iterable[np.ndarray]) -> np.ndarray:
  """All phrases of some arrays: [P] int64, ascending, each once."""
  return np.unique(np.concatenate([np.zeros([0], np.int64), *arrays]))


class FindHolders(beam.DoFn):
  """(record file of the knowledge's passages, all phrases) -> per bucket, (bucket, [M] phrases and [M] passages that hold them).

  All phrases are a side input. 13 million passages have some 20 million: 160 MB in each worker process.
  """

  def __init__(self, num_buckets: int):
    self._num_buckets = num_buckets

  def process(self, path: str, phrases: np.ndarray):
    features = {"number": tf.io.FixedLenFeature([], tf.int64), "text": tf.io.FixedLenFeature([], tf.string)}
    found, numbers = holders.pairs(
        holders.find(phrases, [text.decode() for text in rows["text"].numpy()], rows["number"].numpy())
        for rows in passages.read_columns([path], features))
    few = np.ones([len(found)], bool)
    most = holders.MAX_HOLDERS + 2  # of so many it is known that they are too many
    few[most:] = found[most:] != found[:-most]
    found, numbers = found[few], numbers[few]
    bounds = np.searchsorted(holders.bucket_of(found, self._num_buckets), np.arange(self._num_buckets + 1))
    for bucket, (start, end) in enumerate(itertools.pairwise(bounds)):
      yield bucket, (found[start:end], numbers[start:end])


class WriteHolders(beam.DoFn):
  """(bucket, pairs of arrays) -> (bucket, counts, digest); writes the record file of the bucket's phrases.

  Args:
    folder: where to write.
    num_buckets: how many files there are.
    num_own: 1 if the sentences' own passages are among the holders, otherwise 0.
  """

  def __init__(self, folder: str, num_buckets: int, *, num_own: int):
    self._folder, self._num_buckets, self._num_own = folder, num_buckets, num_own

  def process(self, item):
    bucket, parts = item
    phrases, numbers = holders.pairs(parts)
    starts = np.flatnonzero(np.diff(phrases, prepend=holders.NO_PHRASE))
    sizes = np.diff(starts, append=len(phrases))
    kept = sizes <= holders.MAX_HOLDERS + 1
    rows = (holders.HeldPhrase(int(phrases[start]), numbers[start:start + size].tolist())
            for start, size in zip(starts[kept], sizes[kept], strict=True))
    written = os.path.join(self._folder, passages.shard_name(holders.KIND, bucket, self._num_buckets))
    passages.write_shard(written, rows)
    others = sizes - self._num_own
    num_useful = int(np.sum((others >= 1) & (others <= holders.MAX_HOLDERS)))
    yield bucket, {"phrases_with_holders": num_useful}, artifacts.file_digest(written)


# -------------------------------------------------------------------------------------------------------------- the job


def finish(publication: artifacts.Publication, annotated: Iterable, held: Iterable, num_phrases: int, *,
           details: Mapping) -> None:
  """Publishes the sentences and their holders, if there are any spans, with the sums of the files' counts."""
  total, digests = collections.Counter({"sentences": 0, "sentences_with_spans": 0, "spans": 0, "phrases": num_phrases}), []
  for _, counts, digest in [*_in_order(annotated), *_in_order(held)]:
    total.update(counts)
    digests.append(digest)
  dropped = {reason: total.pop(reason) for reason in sorted(REASONS & set(total))}
  if total["spans"]:
    publication.finish({**total, "dropped": dropped}, content=artifacts.fingerprint_of(digests), details=details)


def _in_order(files: Iterable) -> list:
  return sorted(files, key=lambda item: item[0])


def build(root: beam.Pipeline, publication: artifacts.Publication, *, tagger: str, num_own: int, details: Mapping) -> None:
  """Adds the steps of the job to a pipeline; the last one publishes.

  Args:
    root: the pipeline.
    publication: of the spans folder.
    tagger: see `run`.
    num_own: see `WriteHolders`.
    details: for info.json.
  """
  source, knowledge = (publication.made_by["inputs"][name]["path"] for name in ("passages", "knowledge"))
  paths = passages.shard_paths(source, passages.KIND)
  shards = [(path, shard, len(paths)) for shard, path in enumerate(paths)]
  annotated = (
      root | "Shards" >> beam.Create(shards) | "Spread shards" >> beam.Reshuffle()
      | "Annotate" >> beam.ParDo(AnnotateShard(source, publication.path, tagger=tagger)).with_outputs("phrases", main="shards"))
  phrases = annotated.phrases | "Union" >> beam.CombineGlobally(union)
  held = (
      root | "Knowledge" >> beam.Create(passages.shard_paths(knowledge, passages.KIND)) | "Spread knowledge" >> beam.Reshuffle()
      | "Find holders" >> beam.ParDo(FindHolders(len(paths)), beam.pvalue.AsSingleton(phrases))
      | "Buckets" >> beam.GroupByKey()
      | "Write holders" >> beam.ParDo(WriteHolders(publication.path, len(paths), num_own=num_own)))
  _ = root | "Publication" >> beam.Create([publication]) | "Publish" >> beam.Map(
      finish, beam.pvalue.AsIter(annotated.shards), beam.pvalue.AsIter(held),
      beam.pvalue.AsSingleton(phrases | "Number of phrases" >> beam.Map(len)), details=details)


def run(passages_folder: str, output: str, *, tagger: str = "rules", knowledge: str = "", beam_args: Sequence[str] = ()) -> dict:
  """Makes a spans folder, unless it is there and was made from just these passages and this knowledge.

  Args:
    passages_folder: a complete passages folder.
    output: the folder to write.
    tagger: "rules", "spacy:NAME", or a tagger's folder.
    knowledge: a complete passages folder, of the passages that may hold the spans; by default `passages_folder`. Another
      vocabulary will do.
    beam_args: Beam's options.

  Returns:
    The artifact's info; nothing yet where Beam's options do not wait for the end.

  Raises:
    ArtifactError: `passages_folder` or `knowledge` is not a complete passages folder, or the tagger's not a complete tagger.
    TaggerError: an unknown tagger, or one that finds nothing.
  """
  knowledge = knowledge or passages_folder
  source, held_by = (artifacts.read_info(folder, kind=passages.KIND) for folder in (passages_folder, knowledge))
  config, inputs = recipe_of(tagger)
  config = {**config, "max_span_tokens": MAX_SPAN_TOKENS, "max_holders": holders.MAX_HOLDERS}
  inputs = {**inputs, "passages": passages_folder, "knowledge": knowledge}
  if artifacts.is_current(output, kind=KIND, config=config, inputs=inputs):
    print(f"annotate_spans: {output} is already made from just these passages, by this tagger.")
    return artifacts.read_info(output)
  started = time.time()
  publication = artifacts.begin(output, kind=KIND, config=config, inputs=inputs)
  with pipelines.removed_on_failure(publication.path):
    with pipelines.pipeline(beam_args) as root:
      build(root, publication, tagger=tagger, details={"vocab_fingerprint": source["vocab_fingerprint"]},
            num_own=int(held_by["fingerprint"] == source["fingerprint"]))
    if pipelines.is_left_running(beam_args):
      print(f"annotate_spans: submitted; its last step publishes {output}.")
      return {}
    if artifacts.gfile.exists(publication.path):
      raise TaggerError(
        f"--tagger={tagger} finds no span to mask in the {source['counts']['passages']} passages "
        f"of {passages_folder!r}. The rules know capital letters and English dates; for other texts "
        "give --tagger=spacy:NAME or a tagger's folder (in a config, corpus.tagger)."
      )
  info, secs = artifacts.read_info(output), time.time() - started
  counts = info["counts"]
  print(f"annotate_spans: {counts['sentences']} sentences in {secs:.0f} s ({counts['sentences'] / secs:.0f}/s): {counts}; {output}")
  return info


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  run(args.passages, args.output, tagger=args.tagger, knowledge=args.knowledge, beam_args=argv[1:])


if __name__ == "__main__":
  flags.DEFINE_string("passages", None, "The passages folder to annotate.", required=True)
  flags.DEFINE_string("tagger", RULES, f"What finds names: {RULES}, {SPACY}NAME, or a folder of realm_tf.train_tagger.")
  flags.DEFINE_string("knowledge", "", "The passages folder whose passages may hold the spans; by default --passages.")
  flags.DEFINE_string("output", None, "The spans folder to write.", required=True)
  pipelines.start("beam_jobs.annotate_spans")
