"""Embeds all passages with a snapshot's passage tower: Embed_doc(z) for every z. REALM, section 3.3.

    python -m beam_jobs.embed_passages --snapshot=SNAP --passages=P --output=E -- --direct_num_workers=2

Every record file of passages becomes one file of embeddings, row i of all of them being passage i, in whichever order and on
however many workers the files are done. Run again after a crash, files that are there are kept. The output is an index.

With --searcher=scann some sentences of the passages are embedded as queries, and searched for exactly and by
ScaNN. So the width of ScaNN's search is chosen for the wanted --recall. The recall that it has stands in
info.json and in the job's last line.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import apache_beam as beam
import keras
import numpy as np
import tensorflow as tf
from absl import flags

from beam_jobs import pipelines
from realm_tf import artifacts, examples, index, passages, progress, snapshots
from realm_tf.index import IndexConfig
from realm_tf.passages import Ragged

_LENGTH_STEP = 16  # one compiled program for every so many word pieces
_BATCHES_AT_ONCE = 64  # passages sorted by length together, in batches
_SEED = 0  # of the sentences drawn
_COUNTERS = ("passages", "tokens", "padded_tokens", "cut_passages", "cut_tokens")


# ----------------------------------------------------------------------------------------------------------- one worker


class Embedder:
  """The passage tower of a snapshot, compiled for few input shapes.

  Args:
    snapshot: folder.
    batch_size: passages in a batch.
    jit_compile: compile with XLA.
    mixed_precision: compute in bfloat16; weights and embeddings stay float32.
  """

  def __init__(self, snapshot: str, *, batch_size: int, jit_compile: bool, mixed_precision: bool):
    self.batch_size = batch_size
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16" if mixed_precision else "float32")
    try:
      self.retriever = snapshots.load_retriever(snapshot)
    finally:
      keras.config.set_dtype_policy(policy)
    self.tokenizer = snapshots.load_tokenizer(snapshot)
    self._snapshot = artifacts.read_info(snapshot)["fingerprint"]
    self._embed = tf.function(lambda tokens, segments: self.retriever.embed_passages(tokens, segments), jit_compile=jit_compile)
    self._embed_queries = tf.function(
      lambda tokens: self.retriever.embed_queries(tokens),
      input_signature=[tf.TensorSpec([None, self.retriever.query_length], tf.int32)],
    )  # few: not worth the time that XLA takes

  def use(self, snapshot: str) -> None:
    """Takes the weights of another snapshot of the same models; what is compiled stays."""
    fingerprint = artifacts.read_info(snapshot)["fingerprint"]
    if fingerprint != self._snapshot:
      snapshots.load_weights(self.retriever, os.path.join(snapshot, "retriever.weights.h5"))
      self._snapshot = fingerprint

  def __call__(self, title_ids: tf.RaggedTensor, text_ids: tf.RaggedTensor) -> tuple[np.ndarray, dict[str, int]]:
    """Embeds N passages in batches of like length.

    Returns:
      embeddings [N, D] float32 in the order given, and counts by the names of _COUNTERS.
    """
    if self.retriever.title_length is not None:  # what it does not read of titles on purpose is not counted as cut
      title_ids = title_ids[:, : self.retriever.title_length]
    packed = examples.pack_passages(title_ids, text_ids, tokenizer=self.tokenizer, length=self.retriever.passage_length)
    tokens, segments = packed.token_ids.numpy(), packed.segment_ids.numpy()  # [N, L]
    lengths = np.count_nonzero(tokens, axis=1)
    order = np.argsort(lengths, kind="stable")
    batches, computed = [], 0
    for start in range(0, len(order), self.batch_size):
      rows = order[start:start + self.batch_size]
      length = min(-(-lengths[rows[-1]] // _LENGTH_STEP) * _LENGTH_STEP, self.retriever.passage_length)
      filler = [[0, self.batch_size - len(rows)], [0, 0]]
      batches.append(self._embed(np.pad(tokens[rows, :length], filler), np.pad(segments[rows, :length], filler)))
      computed += self.batch_size * length
    embeddings = np.empty([len(order), self.retriever.dim], np.float32)
    embeddings[order] = tf.concat(batches, axis=0)[:len(order)].numpy()
    whole = (title_ids.row_lengths() + text_ids.row_lengths()).numpy() + passages.SPECIAL_TOKENS
    num_cut = int(np.count_nonzero(whole > self.retriever.passage_length))
    num_tokens = int(lengths.sum())
    counts = (len(order), num_tokens, computed - num_tokens, num_cut, int(whole.sum()) - num_tokens)
    return embeddings, dict(zip(_COUNTERS, map(int, counts), strict=True))

  def embed_queries(self, ids: Ragged) -> np.ndarray:
    """Embeds word pieces of N queries: [N, D] float32."""
    packed = examples.pack_queries(
      ids.tensor(), tokenizer=self.tokenizer, length=self.retriever.query_length
    )
    batches = [
      self._embed_queries(packed[start : start + self.batch_size])
      for start in range(0, len(ids), self.batch_size)
    ]
    return (
      tf.concat(batches, axis=0).numpy()
      if batches
      else np.empty([0, self.retriever.dim], np.float32)
    )


# One model per process, however many threads Beam runs bundles in: TensorFlow's own threads use all cores. It outlives a
# pipeline, so that a job which watches for snapshots compiles only once.
_lock = threading.Lock()
_embedders: dict[str, Embedder] = {}


def _embedder(snapshot: str, how: Mapping[str, int | bool]) -> Embedder:
  key = artifacts.fingerprint_of(snapshots.model_config(snapshot, "retriever"), how)
  if key not in _embedders:
    _embedders.clear()
    _embedders[key] = Embedder(snapshot, **how)
  _embedders[key].use(snapshot)
  return _embedders[key]


@dataclasses.dataclass(frozen=True)
class Shard:
  """A record file of passages and the file of embeddings to write."""

  number: int
  source: str
  target: str


class EmbedShard(beam.DoFn):
  """Embeds the passages of one record file, and as queries some of their sentences.

  Args:
    snapshot: folder.
    how: other arguments of `Embedder`.
    share_queried: share of the passages of which one sentence is embedded.
  """

  def __init__(self, snapshot: str, how: Mapping[str, int | bool], share_queried: float):
    self.snapshot, self.how, self.share_queried = snapshot, how, share_queried

  def setup(self):
    self.counters = {name: beam.metrics.Metrics.counter("embed_passages", name) for name in _COUNTERS}

  def process(self, shard: Shard):
    parts, queries, rng = [], [], np.random.default_rng([_SEED, shard.number])
    with _lock:
      embedder = _embedder(self.snapshot, self.how)
      for columns in _read_columns(
        shard.source, rows_at_once=_BATCHES_AT_ONCE * embedder.batch_size
      ):
        embeddings, counts = embedder(columns["title_ids"], columns["text_ids"])
        parts.append(embeddings)
        if self.share_queried:
          text = (
            _ragged(columns[name]) for name in ("text_ids", "token_starts", "sentence_starts")
          )
          drawn = examples.draw_sentences(*text, share=self.share_queried, rng=rng)
          queries.append(embedder.embed_queries(drawn))
        for name, count in counts.items():
          self.counters[name].inc(count)
    empty = [np.empty([0, embedder.retriever.dim])]
    if self.share_queried:  # first: where the embeddings are, a resumed job does not come by again
      index.write_shard(index.queries_path(shard.target), np.concatenate(queries or empty))
    index.write_shard(shard.target, np.concatenate(parts or empty))


def _read_columns(path: str, *, rows_at_once: int) -> Iterator[Mapping[str, tf.RaggedTensor]]:
  """The columns of a record file that are needed here, many rows at a time, parsed by TensorFlow."""
  names = ("title_ids", "text_ids", "token_starts", "sentence_starts")
  features = {name: tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int64) for name in names}
  records = tf.data.TFRecordDataset(path, compression_type="GZIP").batch(rows_at_once)
  yield from records.map(lambda batch: tf.io.parse_example(batch, features)).prefetch(1)


def _ragged(rows: tf.RaggedTensor) -> Ragged:
  return Ragged(rows.values.numpy(), rows.row_splits.numpy())


# -------------------------------------------------------------------------------------------------------------- the job


def embed(output: str, *, snapshot: str, passages_folder: str, config: IndexConfig = IndexConfig(), batch_size: int = 64,
          jit_compile: bool = True, beam_args: Sequence[str] = ()) -> dict:
  """Publishes an index: the embeddings of all passages, and ScaNN's state where the config says so.

  Args:
    output: the index folder to write; what an interrupted run left for it is used.
    config: how to embed, and the searcher.
    batch_size, jit_compile: see `Embedder`.
    beam_args: Beam's options.

  Returns:
    The index's info.json.

  Raises:
    ArtifactError: the snapshot or the passages are incomplete or have different vocabularies, or an embedding is not finite.
  """
  wanted = artifacts.read_info(passages_folder, kind=passages.KIND)
  examples.check_vocabulary(wanted, passages_folder, snapshots.load_tokenizer(snapshot))
  num_passages, started = wanted["counts"]["passages"], time.time()
  with artifacts.publish(output, kind=index.KIND, config=dataclasses.asdict(config),
                         inputs={"snapshot": snapshot, "passages": passages_folder}, resume=True) as staged:
    counts = _run(
      staged.path,
      snapshot,
      passages_folder,
      num_passages=num_passages,
      beam_args=beam_args,
      share_queried=index.share_queried(config, num_passages),
      how={
        "batch_size": batch_size,
        "jit_compile": jit_compile,
        "mixed_precision": config.mixed_precision,
      },
    )
    embed_secs = time.time() - started
    staged.details = index.build(staged.path, config, num_rows=num_passages) | {
        "snapshot_step": artifacts.read_info(snapshot)["step"], "started": started, "embed_secs": round(embed_secs, 3),
        "refresh_secs": round(time.time() - started, 3), "passages_per_sec": round(counts["passages"] / embed_secs, 1),
        "padded_share": round(counts["padded_tokens"] / max(counts["tokens"] + counts["padded_tokens"], 1), 4)}
    told = ("tokens", "cut_passages", "cut_tokens")
    staged.counts = {"passages": num_passages, "embedded_now": counts["passages"]}
    staged.counts |= {name: counts[name] for name in told}
  info = artifacts.read_info(output)
  recall = index.measured_recall(info)
  print(
    f"{output}: {num_passages:,} passages, {info['passages_per_sec']:,.0f}/s, "
    f"{info['refresh_secs']:.1f} s{recall and '; '}{recall}",
    flush=True,
  )
  if counts["cut_passages"]:
    share = counts["cut_tokens"] / (counts["cut_tokens"] + counts["tokens"])
    print(
      f"{output}: WARNING: {counts['cut_passages']:,} of {counts['passages']:,} passages are "
      f"longer than the retriever reads, and {share:.1%} of all word pieces are not embedded. Make the "
      "passages with a --max_tokens of at most its passage_length, or train one that reads more.",
      flush=True,
    )
  return info


def _run(
  folder: str,
  snapshot: str,
  passages_folder: str,
  *,
  num_passages: int,
  share_queried: float,
  how: Mapping[str, int | bool],
  beam_args: Sequence[str],
) -> dict[str, int]:
  """Writes the embedding files that `folder` lacks; counts of those by the names of _COUNTERS."""
  sources = passages.shard_paths(passages_folder, passages.KIND)
  shards = [
    Shard(i, source, os.path.join(folder, index.shard_name(i, len(sources))))
    for i, source in enumerate(sources)
  ]
  missing = [shard for shard in shards if not artifacts.gfile.exists(shard.target)]
  pipeline, ended = pipelines.pipeline(beam_args), threading.Event()
  to_do = num_passages * len(missing) // len(shards)
  threading.Thread(target=_show_progress, args=[folder, len(missing), to_do, ended]).start()
  try:
    with pipeline:
      _ = (
        pipeline
        | beam.Create(missing)
        | beam.Reshuffle()
        | beam.ParDo(EmbedShard(snapshot, how, share_queried))
      )
  finally:
    ended.set()
  found = {counter.key.metric.name: counter.result for counter in pipeline.result.metrics().query()["counters"]}
  return {name: found.get(name, 0) for name in _COUNTERS}


def _show_progress(folder: str, num_files: int, num_passages: int, ended: threading.Event) -> None:
  """Prints the rate by the files that have appeared: they are the one thing to see from here, wherever the workers are."""
  rate, before = progress.Rate("passages", num_passages), len(index.shard_paths(folder))
  while not ended.wait(2):
    done_files = len(index.shard_paths(folder)) - before
    rate.add(num_passages * done_files // max(num_files, 1) - rate.done)


def define_flags() -> None:
  """Flags of every job that makes an index."""
  flags.DEFINE_enum(
    "searcher", "exact", ("exact", "scann"), "What the index is for; exact is the embeddings alone."
  )
  flags.DEFINE_float(
    "recall",
    IndexConfig.recall,
    "For ScaNN: the wanted share of the exact best passages that a search finds.",
  )
  flags.DEFINE_integer(
    "num_leaves", None, "ScaNN's partitions; the square root of the number of passages by default."
  )
  flags.DEFINE_integer(
    "leaves_to_search", None, "Partitions looked into for a query; by default chosen for --recall."
  )
  flags.DEFINE_integer(
    "reorder", None, "Candidates whose score is computed exactly; by default chosen for --recall."
  )
  flags.DEFINE_bool("mixed_precision", False, "Compute in bfloat16.")
  flags.DEFINE_integer("batch_size", 64, "Passages in a batch.")
  flags.DEFINE_bool("jit_compile", True, "Compile the tower with XLA.")


def index_config(args: flags.FlagValues) -> IndexConfig:
  """What the flags of `define_flags` say of the index."""
  return IndexConfig(
    searcher=args.searcher,
    recall=args.recall,
    num_leaves=args.num_leaves,
    leaves_to_search=args.leaves_to_search,
    reorder=args.reorder,
    mixed_precision=args.mixed_precision,
  )


def main(argv: Sequence[str]) -> None:
  args = flags.FLAGS
  embed(
    args.output,
    snapshot=args.snapshot,
    passages_folder=args.passages,
    config=index_config(args),
    batch_size=args.batch_size,
    jit_compile=args.jit_compile,
    beam_args=argv[1:],
  )


if __name__ == "__main__":
  flags.DEFINE_string("snapshot", None, "The snapshot folder to embed with.", required=True)
  flags.DEFINE_string("passages", None, "The passages folder.", required=True)
  flags.DEFINE_string("output", None, "The index folder to write.", required=True)
  define_flags()
  pipelines.start("beam_jobs.embed_passages")
