"""Published checkpoints as a workdir of ours: a snapshot, and where they come with embeddings, passages and an index.

    python -m realm_tf.import_checkpoint --source=google/realm-orqa-nq-openqa --output=W --trust_pickle
    python -m realm_tf.import_checkpoint --source=realm-cc-news-pretrained-scorer,realm-cc-news-pretrained-encoder --output=W
    python -m realm_tf.import_checkpoint --source=bert-base-uncased --output=W         # then --config.encoder.preset=W

--source names local folders, separated by commas, which are parts of one system: see `realm_tf.published` for the kinds. An openqa
checkpoint brings embeddings of 13,353,718 passages; --blocks says where their text is (blocks.tfr, or block_records.npy). Run again
with the same sources, it goes on where it stopped.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import flags

from realm_tf import (
    artifacts, checkpoints, index, ownership, passages, progress, published, settings, snapshots,
    vocabularies)
from realm_tf.checkpoints import CheckpointError, Tensor
from realm_tf.models.span_reader import SpanReader
from realm_tf.paths import split as split_paths
from realm_tf.published import Loaded, Source
from realm_tf.tokenization import Tokenizer
from realm_tf.vocabularies import Vocabulary

_ROWS_PER_SHARD = 10_000
_NUM_READ = 5  # passages that a released reader reads


# ============================================================================================================== the parts


def load_models(sources: Sequence[Source]) -> dict[str, Loaded]:
  """The models of one system: "retriever" and "reader", or one of them.

  An openqa checkpoint holds the fine-tuned question tower; the passage tower that its embeddings were made with is the pre-trained
  embedder's, and is the question tower's copy where no embedder is given.

  Raises:
    CheckpointError: two sources for one part, or tensors that do not fit.
  """
  by_kind = {}
  for source in sources:
    if source.kind in by_kind:
      raise CheckpointError(f"{by_kind[source.kind].path!r} and {source.path!r} are both {source.kind}; give one of them.")
    by_kind[source.kind] = source
  found = {}
  readers = [kind for kind in ("openqa", "reader", "encoder", "bert") if kind in by_kind]
  if len(readers) > 1:
    raise CheckpointError(f"{' and '.join(readers)} both hold a reader; a snapshot has one. Import them into two workdirs.")
  query, passage = _towers(by_kind)
  if query:
    found["retriever"] = published.load_retriever(query, passage)
  for kind in readers:
    source = by_kind[kind]
    found["reader"] = (published.load_masked_reader(source) if kind in ("encoder", "bert") else
                       published.load_span_reader(source, "reader." if kind == "openqa" else ""))
  return found


def _towers(by_kind: Mapping[str, Source]) -> tuple[tuple[Source, str] | None, tuple[Source, str] | None]:
  """(source, prefix of its tensors) of the query tower and of the passage tower."""
  query = passage = None
  if "scorer" in by_kind:
    source = by_kind["scorer"]
    passage = (source, "embedder.")
    own, shared = (published.under(source.tensors, prefix) for prefix in ("query_embedder.", "embedder."))
    query = (source, "query_embedder.") if own and not _same(own, shared) else passage
  if "embedder" in by_kind:
    if passage:
      raise CheckpointError("a scorer and an embedder both hold the passage tower; give one of them.")
    query = passage = (by_kind["embedder"], "")
  if "openqa" in by_kind:
    query = (by_kind["openqa"], "embedder.")
    if not passage:
      print("import_checkpoint: no embedder is given, so new passages will be embedded by the question tower. Its own embeddings were "
            "made with the embedder that fine-tuning began with: give that beside it as --source.")
    passage = passage or query
  return query, passage


def _same(first: checkpoints.Tensors, second: checkpoints.Tensors) -> bool:
  return set(first) == set(second) and all(np.array_equal(first[name].read(), second[name].read()) for name in first)


def find_vocabulary(sources: Sequence[Source], vocab: str | None, lower_case: bool | None) -> Vocabulary:
  """The vocabulary of the sources, or the one that is asked for.

  Raises:
    CheckpointError: none.
  """
  found = vocabularies.read(vocab) if vocab else next((source.vocabulary for source in sources if source.vocabulary), None)
  if found is None:
    raise CheckpointError(f"no vocab.txt in {', '.join(repr(source.path) for source in sources)}; give --vocab.")
  return found.with_case(lower_case)


# =========================================================================================================== the workdir


def import_checkpoint(paths: Sequence[str], output: str, *, vocab: str | None = None, lower_case: bool | None = None,
                      blocks: str | None = None, trust_pickle: bool = False, config: Mapping = {}) -> str:
  """Writes a workdir; returns its snapshot's folder.

  Args:
    paths: of the sources.
    output: the workdir.
    vocab, lower_case: instead of the sources' own.
    blocks: TFRecord file or block_records.npy with the text of the embedded passages; None looks into the sources.
    trust_pickle: whether a block_records.npy may be opened.
    config: values that the sources do not tell, see `published.find`.

  Raises:
    CheckpointError: a source that is not known, damaged or incomplete, or parts that do not belong together.
  """
  snapshot = artifacts.step_folder(os.path.join(output, "snapshots"), 0)
  folders = {"passages": os.path.join(output, "passages"), "index": index.folder_of(output, snapshot)}
  reads = [path for path in (*paths, vocab, blocks) if path and artifacts.gfile.exists(path)]
  for kind, folder in {snapshots.KIND: snapshot, **folders}.items():
    ownership.check_output(folder, kind=kind, reads=reads)
  sources = [published.find(path, **config) for path in paths]
  vocabulary = find_vocabulary(sources, vocab, lower_case)
  sources = [source.with_pad_first(vocabulary.pad_row) for source in sources]
  loaded = load_models(sources)
  models = {name: part.model for name, part in loaded.items()}
  size = next(iter(models.values())).get_config()["architecture"]["vocabulary_size"]
  tokenizer = Tokenizer(vocabulary.with_rows(size))
  embedded = _embedded(sources, blocks, trust_pickle=trust_pickle)
  _report(sources, loaded, tokenizer)
  details = {
      "imported_from": [os.path.basename(path.rstrip("/")) for path in paths],
      "pad_row": vocabulary.pad_row,
      "fresh": {name: part.fresh for name, part in loaded.items() if part.fresh}}
  if isinstance(models.get("reader"), SpanReader):
    details |= {"num_read": _num_read(sources)}
    if embedded:
      details |= {"retrieval": "dense", "index_snapshot": None}  # the index is its own
  if embedded:
    with _as_records(embedded.blocks) as records:
      write_passages(
          records, folders["passages"], tokenizer=tokenizer,
          num_passages=embedded.embeddings.shape[0], titles=_titles_of(embedded.blocks))
  snapshots.publish(os.path.dirname(snapshot), 0, models, tokenizer=tokenizer, made_by="import_checkpoint", details=details,
                    inputs={"passages": folders["passages"]} if embedded else {})
  if embedded:
    write_index(embedded.embeddings, folders["index"], snapshot=snapshot, passages_folder=folders["passages"])
  return snapshot


class Embedded(NamedTuple):
  """Passages that come with embeddings.

  Attributes:
    embeddings: [N, D].
    blocks: path of their text.
  """

  embeddings: Tensor
  blocks: str


def _embedded(sources: Sequence[Source], blocks: str | None, *, trust_pickle: bool) -> Embedded | None:
  embeddings = [source.tensors[published.BLOCK_EMBEDDINGS] for source in sources if published.BLOCK_EMBEDDINGS in source.tensors]
  blocks = blocks or next((source.blocks for source in sources if source.blocks), None)
  if not embeddings:
    return None
  if not blocks:
    print("import_checkpoint: the embeddings were left out, because nothing tells which passages they are of; give --blocks.")
    return None
  if blocks.endswith(".npy") and not trust_pickle:
    raise CheckpointError(
        f"the passages are in {blocks!r}, a pickle: such a file can run anything on the machine that opens it. Give --trust_pickle to "
        "have it read by a process that knows arrays and bytes and nothing else, or give the released blocks.tfr as --blocks.")
  return Embedded(embeddings[0], blocks)


def _titles_of(blocks: str) -> str | None:
  """The titles.tfr that was released with a blocks.tfr, if it stands beside it."""
  titles = os.path.join(os.path.dirname(blocks), "titles.tfr")
  if artifacts.gfile.exists(titles):
    return titles
  print(f"import_checkpoint: the passages of {blocks} have no titles. The released embeddings are of titles and texts, so passages that are "
        "embedded again will differ from them; put the released titles.tfr beside that file and import again.")
  return None


def _num_read(sources: Sequence[Source]) -> int:
  return next((source.config["reader_beam_size"] for source in sources if "reader_beam_size" in source.config), _NUM_READ)


def _report(sources: Sequence[Source], loaded: Mapping[str, Loaded], tokenizer: Tokenizer) -> None:
  """What became of every tensor, and what else a user should know."""
  rules = dataclasses.asdict(tokenizer.rules)
  print(f"import_checkpoint: tokenizer: {tokenizer.path}, {', '.join(f'{name}={value}' for name, value in rules.items())}")
  if tokenizer.vocabulary.num_unused:
    print(f"import_checkpoint: tokenizer: {tokenizer.vocabulary.num_unused} rows of the word embeddings are kept that no text gives: spare "
          "rows, empty or repeated lines.")
  for source in sources:
    for note in source.notes:
      print(f"import_checkpoint: {source.path}: {note}.")
  paths = ", ".join(source.path for source in sources)
  for name, part in loaded.items():
    print(f"import_checkpoint: {name}: {type(part.model).__name__} of {part.model.count_params():,} parameters from {paths}")
    for what, names in (("not used by REALM", part.unused), ("not there, fresh", part.fresh)):
      if names:
        print(f"import_checkpoint: {name}: {what}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else ""))


# ======================================================================================================== the embedded text


@contextlib.contextmanager
def _as_records(path: str) -> Iterator[str]:
  """A TFRecord file with the passages of `path`, which may be a pickle."""
  if not path.endswith(".npy"):
    yield path
    return
  with tempfile.TemporaryDirectory() as scratch:
    records = os.path.join(scratch, "blocks.tfr")
    done = subprocess.run([sys.executable, "-m", "realm_tf.block_records", f"--input={path}", f"--output={records}"],
                          stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
      raise CheckpointError(done.stderr.strip().splitlines()[-1].removeprefix("CheckpointError: "))
    yield records


def write_passages(records: str, output: str, *, tokenizer: Tokenizer, num_passages: int, titles: str | None = None) -> None:
  """Publishes passages of a released corpus: record i is the text of passage i, which counts as one sentence.

  Args:
    records: a TFRecord file of UTF-8 texts.
    num_passages: wanted; more in the file are left out.
    titles: a TFRecord file of their titles; without it they have none.

  Raises:
    CheckpointError: fewer records.
  """
  num_shards = -(-num_passages // _ROWS_PER_SHARD)
  config = {"blocks": artifacts.file_digest(records), "titles": artifacts.file_digest(titles) if titles else None,
            "vocab": tokenizer.fingerprint, "passages": num_passages}
  if artifacts.is_current(output, kind=passages.KIND, config=config, inputs={}):
    return
  texts = tf.data.TFRecordDataset(records)
  titled = tf.data.Dataset.zip(tf.data.TFRecordDataset(titles) if titles else texts.map(lambda text: ""), texts)
  rows, rate = titled.take(num_passages).batch(_ROWS_PER_SHARD), progress.Rate("passages", num_passages)
  with artifacts.publish(output, kind=passages.KIND, config=config, inputs={}, resume=True) as staged:
    found = bad = 0
    for shard, batch in enumerate(zip(*columns) for columns in rows.as_numpy_iterator()):
      path = os.path.join(staged.path, passages.shard_name("passages", shard, num_shards))
      batch = list(batch)
      blocks = [(title.decode(errors="replace"), [text.decode(errors="replace")]) for title, text in batch]
      if not artifacts.gfile.exists(path):
        passages.write_shard(path, passages.make_passages(tokenizer, blocks, range(found, found + len(batch))))
      found += len(batch)
      bad += sum((title.encode(), text.encode()) != record for (title, (text,)), record in zip(blocks, batch))
      rate.add(len(batch))
    if found < num_passages:
      files = [path for path in (records, titles) if path]
      raise CheckpointError(
          f"{' and '.join(map(repr, files))} {'hold' if files[1:] else 'holds'} {found} passages, the "
          f"checkpoint embeddings of {num_passages}: they do not belong together.")
    vocabularies.write(staged.path, tokenizer.pieces)
    staged.counts = {"passages": num_passages, "bad_utf8": bad}  # kept, with U+FFFD, because passage i is row i
    staged.details = tokenizer.details


def write_index(embeddings: Tensor, output: str, *, snapshot: str, passages_folder: str) -> None:
  """Publishes an index for exact search from a checkpoint's embeddings, a few rows at a time.

  Raises:
    ArtifactError: a row that is not finite.
  """
  num_rows, config = embeddings.shape[0], index.IndexConfig()
  num_shards, rate = -(-num_rows // _ROWS_PER_SHARD), progress.Rate("embeddings", num_rows)
  inputs = {"snapshot": snapshot, "passages": passages_folder}
  with artifacts.publish(output, kind=index.KIND, config=dataclasses.asdict(config), inputs=inputs) as staged:
    for shard, rows in enumerate(embeddings.blocks(_ROWS_PER_SHARD)):
      index.write_shard(os.path.join(staged.path, index.shard_name(shard, num_shards)), rows)
      rate.add(len(rows))
    staged.details = index.build(staged.path, config, num_rows=num_rows) | {"snapshot_step": artifacts.step_of(snapshot)}
    staged.counts = {"passages": num_rows}


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  config = {"num_attention_heads": args.num_heads} if args.num_heads else {}
  print(import_checkpoint(split_paths(args.source), args.output, vocab=args.vocab, lower_case=args.lower_case, blocks=args.blocks,
                          trust_pickle=args.trust_pickle, config=config))


if __name__ == "__main__":
  flags.DEFINE_string("source", None, "Folders of published checkpoints, separated by commas; or a KerasHub preset.", required=True)
  flags.DEFINE_string("output", None, "The workdir to write.", required=True)
  flags.DEFINE_string("vocab", None, "A vocab.txt, where the sources have none.")
  flags.DEFINE_bool("lower_case", None, "Whether the vocabulary is uncased, where the sources do not tell (yes).")
  flags.DEFINE_integer("num_heads", None, "Attention heads, where the sources do not tell (one for every 64 dimensions).")
  flags.DEFINE_string("blocks", None, "The text of the embedded passages: blocks.tfr, or block_records.npy.")
  flags.DEFINE_bool("trust_pickle", False, "Whether a block_records.npy may be opened.")
  flags.DEFINE_alias("trust-pickle", "trust_pickle")
  settings.start(main)
