"""Passages -> sentences with salient spans, the queries of REALM pre-training.

    python -m beam_jobs.annotate_spans --passages=P --tagger=rules --output=S -- --direct_num_workers=2 \
        --direct_running_mode=multi_processing

One record file of passages becomes one record file of sentences, so the order is that of the passages on any runner.
"""

import bisect
import collections
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
import tensorflow as tf
from absl import flags

from beam_jobs import pipelines
from realm_tf import artifacts, passages, salient_spans, tokenization

KIND = "spans"
MAX_SPAN_TOKENS = 10  # longer spans cannot be masked (REALM, appendix)
REASONS = {"too_long", "unknown_word", "no_word_piece"}  # why spans are dropped
_REPORT = "report.json"  # from the workers to this process; not part of the artifact
_BATCH_SENTENCES = 1024  # per call of the tokenizer

TAGGERS = {"rules": salient_spans.find_spans_of_passage}  # name -> sentences of a passage to character ranges in each


class TaggerError(ValueError):
  """A --tagger that does not exist."""


class AnnotateShard(beam.DoFn):
  """(record file of passages, its shard, number of shards) -> Counter; writes the record file of sentences beside it."""

  def __init__(self, vocab: str, folder: str, *, lower_case: bool, tagger: str):
    self._vocab, self._folder, self._lower_case, self._tagger = vocab, folder, lower_case, tagger

  def setup(self):
    self._tokenizer = tokenization.Tokenizer(self._vocab, lower_case=self._lower_case)
    self._find_spans = TAGGERS[self._tagger]

  def process(self, item):
    path, shard, num_shards = item
    counts = collections.Counter()
    name = passages.shard_name(KIND, shard, num_shards)
    passages.write_shard(os.path.join(self._folder, name), self._sentences(path, counts))
    yield shard, dict(counts), artifacts.file_digest(os.path.join(self._folder, name))

  def _sentences(self, path: str, counts: collections.Counter) -> Iterator[passages.Sentence]:
    batch = []
    for passage in passages.read_shard(path, passages.Passage):
      texts = sentences_of(passage)
      batch.extend((passage.number, text, spans) for text, spans in zip(texts, self._find_spans(texts), strict=True))
      if len(batch) >= _BATCH_SENTENCES:
        yield from self._tokenise(batch, counts)
        batch = []
    yield from self._tokenise(batch, counts)

  def _tokenise(self, batch, counts: collections.Counter) -> Iterator[passages.Sentence]:
    counts["sentences"] += len(batch)
    batch = [row for row in batch if row[2]]
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
  text = passage.text.encode()
  return [text[start:end].decode() for start, end in zip(passage.sentence_starts, passage.sentence_ends)]


def to_pieces(text: str, span: tuple[int, int], starts: Sequence[int], ends: Sequence[int]) -> tuple[int, int]:
  """Character range -> range [first, last) of the word pieces that lie fully inside it."""
  start, end = (len(text[:at].encode()) for at in span)
  return bisect.bisect_left(starts, start), bisect.bisect_right(ends, end)


def write_report(folder: str, annotated: Iterable) -> None:
  """Sums the shards' counts for info.json."""
  total, digests = collections.Counter({"sentences": 0, "sentences_with_spans": 0, "spans": 0}), []
  for _, counts, digest in sorted(annotated, key=lambda item: item[0]):
    total.update(counts)
    digests.append(digest)
  dropped = {reason: total.pop(reason) for reason in sorted(REASONS & set(total))}
  artifacts.write_text(os.path.join(folder, _REPORT), json.dumps(
      {"counts": {**total, "dropped": dropped}, "content": artifacts.fingerprint_of(digests)}))


def run(passages_folder: str, output: str, *, tagger: str = "rules", beam_args: Sequence[str] = ()) -> dict:
  """Makes a spans folder, unless it is there and was made from just these passages.

  Args:
    passages_folder: a complete passages folder.
    output: the folder to write.
    tagger: one of TAGGERS.
    beam_args: Beam's options.

  Returns:
    The artifact's info.

  Raises:
    ArtifactError: `passages_folder` is not a complete passages folder.
    TaggerError: an unknown tagger, or one that finds nothing.
  """
  if tagger not in TAGGERS:
    raise TaggerError(f"--tagger={tagger!r} is unknown; wanted one of {', '.join(TAGGERS)}.")
  source = artifacts.read_info(passages_folder, kind=passages.KIND)
  config, inputs = {"tagger": tagger, "max_span_tokens": MAX_SPAN_TOKENS}, {"passages": passages_folder}
  if artifacts.is_current(output, kind=KIND, config=config, inputs=inputs):
    print(f"annotate_spans: {output} is already made from just these passages.")
    return artifacts.read_info(output)
  started = time.time()
  with artifacts.publish(output, kind=KIND, config=config, inputs=inputs) as staged:
    paths = passages.shard_paths(passages_folder)
    shards = [(path, shard, len(paths)) for shard, path in enumerate(paths)]
    with pipelines.pipeline(beam_args) as root:
      annotated = (
          root | "Shards" >> beam.Create(shards) | beam.Reshuffle()
          | "Annotate" >> beam.ParDo(
              AnnotateShard(passages_folder, staged.path, lower_case=source["lower_case"], tagger=tagger)))
      _ = root | "Folder" >> beam.Create([staged.path]) | "Report" >> beam.Map(write_report, beam.pvalue.AsIter(annotated))
    report = os.path.join(staged.path, _REPORT)
    written = json.loads(artifacts.read_text(report))
    artifacts.gfile.remove(report)
    staged.counts, staged.content = written["counts"], written["content"]
    staged.details = {"vocab_fingerprint": source["vocab_fingerprint"]}
    if not staged.counts["spans"]:
      raise TaggerError(f"--tagger={tagger} finds no span in the {source['counts']['passages']} passages of {passages_folder!r}.")
  secs = time.time() - started
  print(f"annotate_spans: {staged.counts['sentences']} sentences in {secs:.0f} s ({staged.counts['sentences'] / secs:.0f}/s): "
        f"{staged.counts}; {output}")
  return artifacts.read_info(output)


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  run(args.passages, args.output, tagger=args.tagger, beam_args=argv[1:])


if __name__ == "__main__":
  flags.DEFINE_string("passages", None, "The passages folder to annotate.", required=True)
  flags.DEFINE_string("tagger", "rules", f"What finds the spans: {', '.join(TAGGERS)}.")
  flags.DEFINE_string("output", None, "The spans folder to write.", required=True)
  pipelines.start("beam_jobs.annotate_spans")
