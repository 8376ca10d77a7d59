"""Embeds passages and builds their index on Beam: Embed_doc(z) for every z (REALM, section 3.3).

Each record file of passages becomes one file of embeddings; row i across all of them is passage i,
regardless of the order of processing and the number of workers. Used by `beam_jobs.embed_passages`
and `beam_jobs.refresh_index`.
"""

import collections
import dataclasses
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np

from beam_jobs import pipelines
from beam_jobs.embedder import COUNTERS, Embedder
from realm_tf import progress
from realm_tf.corpus import passages, segments
from realm_tf.examples import packing, sentences
from realm_tf.models import snapshots
from realm_tf.retrieval import index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts, integrity, paths, publishing

_BATCHES_AT_ONCE = 64  # how many batches of passages are sorted by length together
_SEED = 0  # for drawing sentences
_DEFAULT_CONFIG = IndexConfig()
_OF_EMBEDDINGS = ("embedding_type", "mixed_precision")  # IndexConfig's other settings: the searcher


# One model per process, however many threads Beam runs bundles in: TensorFlow's own threads use all
# cores. It outlives a pipeline, so that a job that watches for snapshots compiles only once.
_lock = threading.Lock()
_embedders: dict[str, Embedder] = {}
_num_embedded: collections.Counter[str] = collections.Counter()  # by file, in this process


def _embedder(snapshot: str, how: Mapping[str, Any]) -> Embedder:
  key = artifacts.fingerprint_of(snapshots.model_config(snapshot, "retriever"), how)
  if key not in _embedders:
    _embedders.clear()
    _embedders[key] = Embedder(snapshot, **how)
  _embedders[key].use(snapshot)
  return _embedders[key]


@dataclasses.dataclass(frozen=True)
class Shard:
  """A record file of passages and the file of embeddings to write for it."""

  number: int
  source: str
  target: str


class EmbedShard(beam.DoFn):
  """Embeds the passages of one record file, and some of their sentences as queries.

  Passages that were embedded before stay as they are.

  Args:
    snapshot: the snapshot folder.
    how: the other arguments of `Embedder`.
    share_queried: share of the passages for which one sentence is embedded as a query.
    embedding_type: see `IndexConfig`.
  """

  def __init__(
    self,
    snapshot: str,
    how: Mapping[str, int | bool],
    share_queried: float,
    embedding_type: str,
  ):
    self.snapshot, self.how, self.share_queried = snapshot, how, share_queried
    self.embedding_type = embedding_type

  def setup(self):
    self.counters = {
      name: beam.metrics.Metrics.counter("embed_passages", name) for name in COUNTERS
    }

  def process(self, shard: Shard):
    parts, queries, rng = [], [], np.random.default_rng([_SEED, shard.number])
    is_embedded = artifacts.gfile.exists(shard.target)
    with _lock:
      embedder = _embedder(self.snapshot, self.how)
      for columns in passages.read_columns(
        shard.source,
        passages.Passage,
        ["title_ids", "text_ids", "token_starts", "sentence_starts"],
        rows_at_once=_BATCHES_AT_ONCE * embedder.batch_size,
      ):
        if not is_embedded:
          embeddings, counts = embedder(
            columns["title_ids"].tensor(),
            columns["text_ids"].tensor(),
            after_batch=lambda num: _num_embedded.update({shard.target: num}),
          )
          parts.append(embeddings)
          for name, count in counts.items():
            self.counters[name].inc(count)
        if self.share_queried:
          drawn = sentences.draw_sentences(
            columns["text_ids"],
            columns["token_starts"],
            columns["sentence_starts"],
            share=self.share_queried,
            rng=rng,
          )
          queries.append(embedder.embed_queries(drawn))
    empty = [np.empty([0, embedder.retriever.dim])]
    if self.share_queried:
      index.write_shard(index.queries_path(shard.target), np.concatenate(queries or empty))
    if not is_embedded:
      rows = np.concatenate(parts or empty)
      index.write_shard(shard.target, rows, embedding_type=self.embedding_type)
    yield segments.number_of(shard.target)


class BuildSegment(beam.DoFn):
  """Builds the searcher of a segment, given by its number.

  Args:
    folder: the index that is being written.
    config: configuration of the index.
  """

  def __init__(self, folder: str, config: IndexConfig):
    self.folder, self.config = folder, config

  def process(self, number: int):
    with _lock:
      index.build_segment(self.folder, self.config, number)


# ------------------------------------------------------------------------------------------ the job


def embed(
  output: str,
  *,
  snapshot: str,
  passages_folder: str,
  config: IndexConfig = _DEFAULT_CONFIG,
  batch_size: int = 64,
  jit_compile: bool = True,
  beam_args: Sequence[str] = (),
) -> dict:
  """Publishes an index: the embeddings of all passages, and the searcher's state if it has one.

  Args:
    output: the index folder to write; an interrupted run is resumed.
    snapshot: the snapshot folder with the retriever.
    passages_folder: a complete passages folder.
    config: how to embed, and which searcher to build.
    batch_size: see `Embedder`.
    jit_compile: see `Embedder`.
    beam_args: Beam's options.

  Returns:
    The info.json of the index.

  Raises:
    ArtifactError: the snapshot or the passages are incomplete, their vocabularies differ, or an
      embedding is not finite.
  """
  wanted = artifacts.read_info(passages_folder, kind=passages.KIND)
  packing.check_vocabulary(wanted, passages_folder, snapshots.load_tokenizer(snapshot))
  num_passages, started = wanted["counts"]["passages"], time.monotonic()
  started_at = time.time()
  with publishing.publish(
    output,
    kind=index.KIND,
    config=dataclasses.asdict(config),
    inputs={"snapshot": snapshot, "passages": passages_folder},
    resume=True,
  ) as staged:
    _take_over(output, staged, snapshot, passages_folder, config)
    counts = _run(
      staged.path,
      snapshot,
      passages_folder,
      num_passages=num_passages,
      beam_args=beam_args,
      share_queried=index.share_queried(config, num_passages),
      config=config,
      how={
        "batch_size": batch_size,
        "jit_compile": jit_compile,
        "mixed_precision": config.mixed_precision,
      },
    )
    embed_secs = max(_last_written(staged.path) - started_at, 1e-3)
    staged.details = index.build(staged.path, config, num_rows=num_passages) | {
      "segments": passages.fingerprints_of_segments(passages_folder),
      "snapshot_step": artifacts.read_info(snapshot)["step"],
      "started": started_at,
      "embed_secs": round(embed_secs, 3),
      "refresh_secs": round(time.monotonic() - started, 3),
      "passages_per_sec": round(counts["passages"] / embed_secs, 1),
      "padded_share": round(
        counts["padded_tokens"] / max(counts["tokens"] + counts["padded_tokens"], 1), 4
      ),
    }
    told = ("tokens", "cut_passages", "cut_tokens")
    staged.counts = {"passages": num_passages, "embedded_now": counts["passages"]}
    staged.counts |= {name: counts[name] for name in told}
  info = artifacts.read_info(output)
  _say_done(output, info, counts)
  return info


def _say_done(output: str, info: Mapping, counts: Mapping[str, int]) -> None:
  """Prints the result of a job, and a warning if the retriever does not read all word pieces."""
  recall = index.measured_recall(info)
  rate = f"{info['passages_per_sec']:,.0f}/s" if counts["passages"] else "none embedded anew"
  print(
    f"{output}: {info['counts']['passages']:,} passages, {rate}, "
    f"{info['refresh_secs']:.1f} s{recall and '; '}{recall}",
    flush=True,
  )
  if counts["cut_passages"]:
    share = counts["cut_tokens"] / (counts["cut_tokens"] + counts["tokens"])
    print(
      f"{output}: WARNING: {counts['cut_passages']:,} of {counts['passages']:,} passages are "
      f"longer than the retriever reads, and {share:.1%} of all word pieces are not embedded. "
      "Make the passages with --max_tokens of at most its passage_length, or train a retriever "
      "with a greater passage_length.",
      flush=True,
    )


def _last_written(folder: str) -> float:
  """Returns when the newest embedding file of a folder was written: seconds since the epoch."""
  stats = [artifacts.gfile.stat(path) for path in index.shard_paths(folder)]
  return max(stat.mtime_nsec for stat in stats) / 1e9


def _take_over(
  output: str,
  staged: publishing.Staged,
  snapshot: str,
  passages_folder: str,
  config: IndexConfig,
) -> None:
  """Takes the intact segments of an earlier index of the same snapshot.

  Their searchers and queries are taken too, unless the settings of the search have changed. Also
  lists the deleted passages.
  """
  deleted = segments.read_deleted(passages_folder)
  if len(deleted):
    segments.write_deleted(staged.path, deleted)
  try:
    info = artifacts.read_info(output, kind=index.KIND)
  except artifacts.ArtifactError:  # there is none, or it is damaged
    return
  if info["inputs"]["snapshot"]["fingerprint"] != artifacts.read_info(snapshot)["fingerprint"]:
    return
  now, before = dataclasses.asdict(config), info["config"]
  changed = {name: f"{before[name]} → {now[name]}" for name in now if now[name] != before[name]}
  other_embeddings = not changed.keys().isdisjoint(_OF_EMBEDDINGS)
  if changed:
    what = "everything is embedded" if other_embeddings else "embeddings are kept, searchers built"
    why = ", ".join(f"{name} {values}" for name, values in changed.items())
    print(f"{output}: {what} anew, because of {why}", flush=True)
  if other_embeddings:
    return
  for number, fingerprint in passages.fingerprints_of_segments(passages_folder).items():
    names = index.files_of_segment(info["files"], int(number))
    if changed:
      names = [name for name in names if index.is_shard(name)]
    if info.get("segments", {}).get(number) == fingerprint and _are_intact(output, names):
      paths.link_files(output, names, to=staged.path)
      staged.files |= {name: info["files"][name] for name in names}


def _are_intact(folder: str, names: Sequence[str]) -> bool:
  """Returns whether files of an artifact are as they were published."""
  try:
    integrity.check_digests(folder, names)
  except artifacts.ArtifactError:
    return False
  return True


def _run(
  folder: str,
  snapshot: str,
  passages_folder: str,
  *,
  num_passages: int,
  share_queried: float,
  config: IndexConfig,
  how: Mapping[str, int | bool],
  beam_args: Sequence[str],
) -> dict[str, int]:
  """Writes the embeddings and queries that `folder` lacks, and builds each segment's searcher.

  Returns:
    The counts of these files, by the names of COUNTERS.
  """
  sources = passages.shard_paths(passages_folder, passages.KIND)
  shards = [
    Shard(i, source, os.path.join(folder, _name_of(source))) for i, source in enumerate(sources)
  ]
  targets = [shard.target for shard in shards if not artifacts.gfile.exists(shard.target)]

  def lacks_queries(shard: Shard) -> bool:
    return (
      share_queried > 0
      and not artifacts.gfile.exists(index.queries_path(shard.target))
      and not index.is_built(folder, config, segments.number_of(shard.target))
    )

  embedded_now = set(targets)
  missing = [shard for shard in shards if shard.target in embedded_now or lacks_queries(shard)]
  pipeline, ended = pipelines.pipeline(beam_args), threading.Event()
  to_do = num_passages * len(targets) // len(shards)
  threading.Thread(target=_show_progress, args=[folder, targets, to_do, ended]).start()
  try:
    with pipeline:
      embedded = (
        pipeline
        | beam.Create(missing)
        | beam.Reshuffle()
        | beam.ParDo(EmbedShard(snapshot, how, share_queried, config.embedding_type))
      )
      if config.searcher != "exact":
        # Each segment once, when all files have been written.
        numbers = {segments.number_of(shard.target) for shard in shards}
        _ = (
          (embedded, pipeline | "segments" >> beam.Create(sorted(numbers)))
          | beam.Flatten()
          | beam.Distinct()
          | "reshuffle segments" >> beam.Reshuffle()
          | beam.ParDo(BuildSegment(folder, config))
        )
  finally:
    ended.set()
  found = {
    counter.key.metric.name: counter.result
    for counter in pipeline.result.metrics().query()["counters"]
  }
  return {name: found.get(name, 0) for name in COUNTERS}


def _name_of(source: str) -> str:
  """Returns the name of the embedding file of a record file of passages."""
  name = os.path.basename(source).removeprefix(passages.KIND)
  return f"embeddings{os.path.splitext(name)[0]}.npy"


def _show_progress(
  folder: str, targets: Sequence[str], num_passages: int, ended: threading.Event
) -> None:
  """Prints the rate of embedding.

  Batches are counted where this process embeds them. Of workers elsewhere only the files are seen
  that they have written.
  """
  rate, before = progress.Rate("passages", num_passages), len(index.shard_paths(folder))
  while not ended.wait(2):
    by_files = num_passages * (len(index.shard_paths(folder)) - before) // max(len(targets), 1)
    here = sum(_num_embedded[target] for target in targets)
    rate.add(min(max(here, by_files), num_passages) - rate.done)
