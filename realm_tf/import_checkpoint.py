"""Imports published checkpoints as a workdir.

It writes a snapshot and, for checkpoints with embeddings, passages and an index.

    python -m realm_tf.import_checkpoint --source=google/realm-orqa-nq-openqa --output=W \\
        --trust_pickle
    python -m realm_tf.import_checkpoint --output=W \\
        --source=realm-cc-news-pretrained-scorer,realm-cc-news-pretrained-encoder
    python -m realm_tf.import_checkpoint --source=bert-base-uncased --output=W

The last command makes a workdir for --config.encoder.preset=W. --source lists local folders,
separated by commas, which are parts of one system: see `realm_tf.checkpoints.published` for the
kinds. An openqa checkpoint has embeddings of 13,353,718 passages; --blocks is the file with their
text (blocks.tfr, or block_records.npy). If interrupted, run it again with the same sources to
resume.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from absl import flags

from realm_tf import cli

if __name__ == "__main__":
  flags.DEFINE_string(
    "source",
    None,
    "Folders of published checkpoints, separated by commas; or a KerasHub preset.",
    required=True,
  )
  flags.DEFINE_string("output", None, "The workdir to write.", required=True)
  flags.DEFINE_string("vocab", None, "A vocab.txt, if the sources have none.")
  flags.DEFINE_bool(
    "lower_case", None, "Whether the vocabulary is uncased, if the sources do not say (yes)."
  )
  flags.DEFINE_integer(
    "num_heads",
    None,
    "Attention heads, if the sources do not say (one for every 64 dimensions).",
  )
  flags.DEFINE_string(
    "blocks", None, "The text of the embedded passages: blocks.tfr, or block_records.npy."
  )
  flags.DEFINE_bool(
    "trust_pickle",
    False,
    "Whether a block_records.npy may be read; it is read as data, and no code in it is called.",
  )
  flags.DEFINE_alias("trust-pickle", "trust_pickle")
  cli.start("realm_tf.import_checkpoint")

import numpy as np

from realm_tf import progress
from realm_tf.checkpoints import (
  published,
  published_models,
  published_names,
  released_corpus,
  tensor_files,
)
from realm_tf.checkpoints.published import Source
from realm_tf.checkpoints.published_models import Loaded
from realm_tf.checkpoints.tensor_files import CheckpointError, Tensor
from realm_tf.corpus import passages, vocabularies
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.corpus.vocabularies import Vocabulary
from realm_tf.models import snapshots
from realm_tf.models.span_reader import SpanReader
from realm_tf.retrieval import index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts, ownership, publishing
from realm_tf.storage.paths import split as split_paths
from realm_tf.systems.workdir import DENSE, fine_tuned

_NUM_READ = 5  # passages that the released readers read


# ======================================================================================== the parts


def load_models(sources: Sequence[Source]) -> dict[str, Loaded]:
  """Loads the models of one system: "retriever" and "reader", or one of them.

  An openqa checkpoint holds the fine-tuned question tower; the passage tower that its embeddings
  were made with is that of the pre-trained embedder. If no embedder is given, the passage tower is
  a copy of the question tower.

  Raises:
    CheckpointError: there are two sources for one part, or tensors do not fit.
  """
  by_kind: dict[str, Source] = {}
  for source in sources:
    if source.kind in by_kind:
      raise CheckpointError(
        f"{by_kind[source.kind].path!r} and {source.path!r} are both {source.kind}; give one of "
        "them."
      )
    by_kind[source.kind] = source
  found = {}
  readers = [kind for kind in ("openqa", "reader", "encoder", "bert") if kind in by_kind]
  if len(readers) > 1:
    raise CheckpointError(
      f"{' and '.join(readers)} both hold a reader; a snapshot has one. Import them into two "
      "workdirs."
    )
  query, passage = _towers(by_kind)
  if query and passage:
    found["retriever"] = published_models.load_retriever(query, passage)
  for kind in readers:
    source = by_kind[kind]
    found["reader"] = (
      published_models.load_masked_reader(source)
      if kind in ("encoder", "bert")
      else published_models.load_span_reader(source, "reader." if kind == "openqa" else "")
    )
  return found


def _towers(
  by_kind: Mapping[str, Source],
) -> tuple[tuple[Source, str] | None, tuple[Source, str] | None]:
  """Returns (source, prefix of its tensors) of the query tower and of the passage tower."""
  query = passage = None
  if "scorer" in by_kind:
    source = by_kind["scorer"]
    passage = (source, "embedder.")
    own, shared = (
      published_names.under(source.tensors, prefix) for prefix in ("query_embedder.", "embedder.")
    )
    query = (source, "query_embedder.") if own and not _same(own, shared) else passage
  if "embedder" in by_kind:
    if passage:
      raise CheckpointError(
        "a scorer and an embedder both hold the passage tower; give one of them."
      )
    query = passage = (by_kind["embedder"], "")
  if "openqa" in by_kind:
    query = (by_kind["openqa"], "embedder.")
    if not passage:
      print(
        "import_checkpoint: no embedder is given, so new passages will be embedded by the "
        "question tower. The checkpoint's embeddings were made with the embedder that fine-tuning "
        "started from: add that to --source."
      )
    passage = passage or query
  return query, passage


def _same(first: tensor_files.Tensors, second: tensor_files.Tensors) -> bool:
  return set(first) == set(second) and all(
    np.array_equal(first[name].read(), second[name].read()) for name in first
  )


def find_vocabulary(
  sources: Sequence[Source], vocab: str | None, lower_case: bool | None
) -> Vocabulary:
  """Returns the vocabulary of the sources, or `vocab` if it is given.

  Raises:
    CheckpointError: there is no vocabulary.
  """
  found = (
    vocabularies.read(vocab)
    if vocab
    else next((source.vocabulary for source in sources if source.vocabulary), None)
  )
  if found is None:
    raise CheckpointError(
      f"no vocab.txt in {', '.join(repr(source.path) for source in sources)}; give --vocab."
    )
  return found.with_case(lower_case)


# ====================================================================================== the workdir


def import_checkpoint(
  paths: Sequence[str],
  output: str,
  *,
  vocab: str | None = None,
  lower_case: bool | None = None,
  blocks: str | None = None,
  trust_pickle: bool = False,
  config: Mapping = {},
) -> str:
  """Writes a workdir; returns its snapshot's folder.

  Args:
    paths: paths of the sources.
    output: the workdir to write.
    vocab: vocabulary to use instead of the sources' own.
    lower_case: whether letters are lower-cased; overrides the sources.
    blocks: TFRecord file or block_records.npy with the text of the embedded passages; None searches
      the sources.
    trust_pickle: whether a block_records.npy may be opened.
    config: values that the sources do not have, see `published.find`.

  Raises:
    CheckpointError: a source is unknown, damaged or incomplete, or parts do not belong together.
  """
  snapshot = artifacts.step_folder(os.path.join(output, "snapshots"), 0)
  folders = {
    "passages": os.path.join(output, "passages"),
    "index": index.folder_of(output, snapshot),
  }
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
  if embedded := _embedded(sources, blocks, trust_pickle=trust_pickle):
    passages.refuse_updated(folders["passages"])
  _report(sources, loaded, tokenizer)
  details = {
    "imported_from": [os.path.basename(path.rstrip("/")) for path in paths],
    "pad_row": vocabulary.pad_row,
    "fresh": {name: part.fresh for name, part in loaded.items() if part.fresh},
  }
  if isinstance(models.get("reader"), SpanReader):
    # The snapshot has its own index.
    details |= fine_tuned(DENSE if "retriever" in models else None, num_read=_num_read(sources))
  if embedded:
    with released_corpus.as_records(embedded.blocks) as records:
      released_corpus.write_passages(
        records,
        folders["passages"],
        tokenizer=tokenizer,
        num_passages=embedded.embeddings.shape[0],
        titles=_titles_of(embedded.blocks),
      )
  snapshots.publish(
    os.path.dirname(snapshot),
    0,
    models,
    tokenizer=tokenizer,
    made_by="import_checkpoint",
    details=details,
    inputs={"passages": folders["passages"]} if embedded else {},
  )
  if embedded:
    write_index(
      embedded.embeddings, folders["index"], snapshot=snapshot, passages_folder=folders["passages"]
    )
  return snapshot


class Embedded(NamedTuple):
  """Passages that come with embeddings.

  Attributes:
    embeddings: [N, D].
    blocks: path of their text.
  """

  embeddings: Tensor
  blocks: str


def _embedded(
  sources: Sequence[Source], blocks: str | None, *, trust_pickle: bool
) -> Embedded | None:
  embeddings = [
    source.tensors[published_names.BLOCK_EMBEDDINGS]
    for source in sources
    if published_names.BLOCK_EMBEDDINGS in source.tensors
  ]
  blocks = blocks or next((source.blocks for source in sources if source.blocks), None)
  if not embeddings:
    return None
  if not blocks:
    print(
      "import_checkpoint: the embeddings were left out, because the text of their passages is "
      "missing; give --blocks, or embed passages of your own."
    )
    return None
  if blocks.endswith(".npy") and not trust_pickle:
    raise CheckpointError(
      f"the passages are in {blocks!r}, a pickle: such a file can run any code on a machine that "
      "opens it with NumPy. Give --trust_pickle to read it as data, in a process with limited "
      "memory, or give the released blocks.tfr as --blocks."
    )
  return Embedded(embeddings[0], blocks)


def _titles_of(blocks: str) -> str | None:
  """Returns the titles.tfr that was released with a blocks.tfr, if it is beside it."""
  titles = os.path.join(os.path.dirname(blocks), "titles.tfr")
  if artifacts.gfile.exists(titles):
    return titles
  print(
    f"import_checkpoint: the passages of {blocks} have no titles. The released embeddings are of "
    "titles and texts, so passages that are embedded again will have other embeddings; put the "
    "released titles.tfr beside that file and import again."
  )
  return None


def _num_read(sources: Sequence[Source]) -> int:
  return next(
    (
      source.config["reader_beam_size"] for source in sources if "reader_beam_size" in source.config
    ),
    _NUM_READ,
  )


def _report(sources: Sequence[Source], loaded: Mapping[str, Loaded], tokenizer: Tokenizer) -> None:
  """Reports which tensors were used, and anything else that the user should know."""
  rules = ", ".join(
    f"{name}={value}" for name, value in dataclasses.asdict(tokenizer.rules).items()
  )
  print(f"import_checkpoint: tokenizer: {tokenizer.path}, {rules}")
  if tokenizer.vocabulary.num_unused:
    print(
      f"import_checkpoint: tokenizer: {tokenizer.vocabulary.num_unused} unreachable rows of the "
      "word embeddings are kept: spare rows, empty or repeated lines."
    )
  for source in sources:
    for note in source.notes:
      print(f"import_checkpoint: {source.path}: {note}.")
  paths = ", ".join(source.path for source in sources)
  for name, part in loaded.items():
    print(
      f"import_checkpoint: {name}: {type(part.model).__name__} of {part.model.count_params():,} "
      f"parameters from {paths}"
    )
    for what, names in (("not used by REALM", part.unused), ("missing, fresh", part.fresh)):
      if names:
        print(
          f"import_checkpoint: {name}: {what}: {', '.join(names[:3])}"
          + (f" and {len(names) - 3} more" if names[3:] else "")
        )


# ================================================================================ the embedded text


def write_index(embeddings: Tensor, output: str, *, snapshot: str, passages_folder: str) -> None:
  """Publishes an index for exact search from a checkpoint's embeddings, a few rows at a time.

  Raises:
    CheckpointError: a row that is not finite.
  """
  num_rows, config = embeddings.shape[0], IndexConfig()
  sizes, rate = released_corpus.SIZES, progress.Rate("embeddings", num_rows)
  inputs = {"snapshot": snapshot, "passages": passages_folder}
  with publishing.publish(
    output, kind=index.KIND, config=dataclasses.asdict(config), inputs=inputs
  ) as staged:
    blocks = embeddings.blocks(sizes.shard)
    for (segment, shard, _), rows in zip(sizes.shards(num_rows), blocks, strict=True):
      name = index.shard_name(shard, sizes.num_shards(num_rows, segment), segment=segment)
      index.write_shard(os.path.join(staged.path, name), rows)
      rate.add(len(rows))
    staged.details = index.build(staged.path, config, num_rows=num_rows) | {
      "snapshot_step": artifacts.step_of(snapshot),
      "segments": passages.fingerprints_of_segments(passages_folder),
    }
    staged.counts = {"passages": num_rows}


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  config = {"num_attention_heads": args.num_heads} if args.num_heads else {}
  print(
    import_checkpoint(
      split_paths(args.source),
      args.output,
      vocab=args.vocab,
      lower_case=args.lower_case,
      blocks=args.blocks,
      trust_pickle=args.trust_pickle,
      config=config,
    )
  )
