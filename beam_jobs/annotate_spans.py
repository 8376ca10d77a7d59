"""Passages -> sentences with salient spans, the queries of REALM pre-training.

    python -m beam_jobs.annotate_spans --passages=P --tagger=rules --output=S -- --direct_num_workers=2 \
        --direct_running_mode=multi_processing

Dates follow regular expressions; names are found by rules, by a tagger of `realm_tf.train_tagger` (--tagger=DIR), or by a spaCy
pipeline that is installed or in a folder (--tagger=spacy:NAME). One record file of passages becomes one record file of
sentences, so the order is that of the passages on any runner.
"""

import bisect
import collections
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import apache_beam as beam
import tensorflow as tf
from absl import flags
from apache_beam.utils import shared

from beam_jobs import pipelines
from realm_tf import artifacts, passages, salient_spans, span_tagger, tokenization

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


# -------------------------------------------------------------------------------------------------------------- the job


class AnnotateShard(beam.DoFn):
  """(record file of passages, its shard, number of shards) -> Counter; writes the record file of sentences beside it."""

  def __init__(self, passages_folder: str, folder: str, *, tagger: str):
    self._passages_folder, self._folder, self._tagger = passages_folder, folder, tagger
    self._shared = shared.Shared()  # one tagger per process, however many threads Beam runs bundles in

  def setup(self):
    self._tokenizer = tokenization.Tokenizer(self._passages_folder)
    self._find_names = self._shared.acquire(lambda: load_tagger(self._tagger))

  def process(self, item):
    path, shard, num_shards = item
    counts = collections.Counter()
    name = passages.shard_name(KIND, shard, num_shards)
    passages.write_shard(os.path.join(self._folder, name), self._sentences(path, counts))
    yield shard, dict(counts), artifacts.file_digest(os.path.join(self._folder, name))

  def _sentences(self, path: str, counts: collections.Counter) -> Iterator[passages.Sentence]:
    rows = passages.read_shard(path, passages.Passage)
    while batch := list(itertools.islice(rows, _BATCH_PASSAGES)):
      texts = [sentences_of(passage) for passage in batch]
      numbered = [(passage.number, text) for passage, sentences in zip(batch, texts) for text in sentences]
      counts["sentences"] += len(numbered)
      found = [(number, text, spans) for (number, text), names in zip(numbered, self._find_names(texts), strict=True)
               if (spans := salient_spans.with_dates(text, names))]
      yield from self._tokenise(found, counts)

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
        yield passages.Sentence(number, text, ids, starts, ends, span_starts, span_ends)

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


def finish(publication: artifacts.Publication, annotated: Iterable, *, details: Mapping) -> None:
  """Publishes the sentences, if there are any spans, with the sums of the shards' counts."""
  total, digests = collections.Counter({"sentences": 0, "sentences_with_spans": 0, "spans": 0}), []
  for _, counts, digest in sorted(annotated, key=lambda item: item[0]):
    total.update(counts)
    digests.append(digest)
  dropped = {reason: total.pop(reason) for reason in sorted(REASONS & set(total))}
  if total["spans"]:
    publication.finish({**total, "dropped": dropped}, content=artifacts.fingerprint_of(digests), details=details)


def run(passages_folder: str, output: str, *, tagger: str = "rules", beam_args: Sequence[str] = ()) -> dict:
  """Makes a spans folder, unless it is there and was made from just these passages.

  Args:
    passages_folder: a complete passages folder.
    output: the folder to write.
    tagger: "rules", "spacy:NAME", or a tagger's folder.
    beam_args: Beam's options.

  Returns:
    The artifact's info; nothing yet where Beam's options do not wait for the end.

  Raises:
    ArtifactError: `passages_folder` is not a complete passages folder, or the tagger's not a complete tagger.
    TaggerError: an unknown tagger, or one that finds nothing.
  """
  source = artifacts.read_info(passages_folder, kind=passages.KIND)
  config, inputs = recipe_of(tagger)
  config, inputs = {**config, "max_span_tokens": MAX_SPAN_TOKENS}, {**inputs, "passages": passages_folder}
  if artifacts.is_current(output, kind=KIND, config=config, inputs=inputs):
    print(f"annotate_spans: {output} is already made from just these passages, by this tagger.")
    return artifacts.read_info(output)
  started = time.time()
  publication = artifacts.begin(output, kind=KIND, config=config, inputs=inputs)
  with pipelines.removed_on_failure(publication.path):
    paths = passages.shard_paths(passages_folder)
    shards = [(path, shard, len(paths)) for shard, path in enumerate(paths)]
    with pipelines.pipeline(beam_args) as root:
      annotated = (
          root | "Shards" >> beam.Create(shards) | beam.Reshuffle()
          | "Annotate" >> beam.ParDo(
              AnnotateShard(passages_folder, publication.path, tagger=tagger)))
      _ = root | "Publication" >> beam.Create([publication]) | "Publish" >> beam.Map(
          finish, beam.pvalue.AsIter(annotated), details={"vocab_fingerprint": source["vocab_fingerprint"]})
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
  run(args.passages, args.output, tagger=args.tagger, beam_args=argv[1:])


if __name__ == "__main__":
  flags.DEFINE_string("passages", None, "The passages folder to annotate.", required=True)
  flags.DEFINE_string("tagger", RULES, f"What finds names: {RULES}, {SPACY}NAME, or a folder of realm_tf.train_tagger.")
  flags.DEFINE_string("output", None, "The spans folder to write.", required=True)
  pipelines.start("beam_jobs.annotate_spans")
