"""The parts of a trained system that an export needs: models, passages, index and searcher."""

import dataclasses
import sys

from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.models import snapshots
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.models.span_reader import SpanReader
from realm_tf.retrieval import dense, index
from realm_tf.retrieval.index_config import IndexConfig
from realm_tf.storage import artifacts
from realm_tf.systems.workdir import (
  DENSE,
  SnapshotInfo,
  Workdir,
  find_pretrained,
  newest_snapshot,
  open_workdir,
)

_TRAIN_FIRST = "give the workdir of a realm_tf.finetune or realm_tf.pretrain run that has finished."


@dataclasses.dataclass(frozen=True)
class System:
  """The system to export: models, and the passages and index that belong to them.

  Attributes:
    folders: inputs by name: snapshot, index, passages and, if there is one, pretrained.
    retriever: the retriever whose query tower embeds questions.
    span_reader: the reader of answers; None for a pre-trained system.
    num_read: passages that it was trained to read; 0 for a pre-trained system.
    pretrained: the retriever whose query tower embeds texts with blanks; None if blanks are not
      filled.
    masked_reader: the reader that fills blanks, or None.
  """

  folders: dict[str, str]
  tokenizer: Tokenizer
  retriever: Retriever
  span_reader: SpanReader | None
  num_read: int
  pretrained: Retriever | None
  masked_reader: MaskedReader | None


def find_parts(
  workdir: str,
  *,
  pretrained: str | None = None,
  index_folder: str | None = None,
  passages_folder: str | None = None,
) -> tuple[Workdir, SnapshotInfo | None, dict[str, str]]:
  """Finds the parts of a trained system and checks that they belong together.

  Args:
    workdir: a workdir of realm_tf.finetune or realm_tf.pretrain.
    pretrained: the workdir of realm_tf.pretrain that made the index of a fine-tuned system; None
      searches next to that index.
    index_folder: an index to use instead of the one used in training.
    passages_folder: passages to use instead of those used in training.

  Returns:
    The opened workdir, the snapshot that fills blanks if there is one, and the folders of all
    parts, as in `System`.

  Raises:
    ArtifactError: parts are missing or do not belong together.
    UserError: the workdir is a baseline, which has no retriever to serve.
  """
  snapshot = newest_snapshot(workdir, advice=_TRAIN_FIRST)
  if snapshot.retrieval not in (DENSE, None):
    raise artifacts.UserError(
      f"{workdir!r} is a baseline (finetune.retrieval={snapshot.retrieval}); export a workdir with "
      "finetune.retrieval=dense."
    )
  opened = open_workdir(
    workdir, snapshot=snapshot, index_folder=index_folder, passages_folder=passages_folder
  )
  if snapshot.is_fine_tuned:
    with_masks = find_pretrained(opened, pretrained)
  else:
    with_masks = snapshot if snapshot.has_masked_reader else None
  folders = {
    "snapshot": snapshot.folder,
    "index": opened.searched_index,
    "passages": opened.passages,
  }
  return opened, with_masks, folders | ({"pretrained": with_masks.folder} if with_masks else {})


def find_system(workdir: str, **where: str | None) -> System:
  """Finds a trained system, as `find_parts` does, and loads its models."""
  opened, with_masks, folders = find_parts(workdir, **where)
  snapshot = opened.snapshot
  return System(
    folders=folders,
    tokenizer=opened.tokenizer,
    retriever=opened.load_model("retriever"),
    span_reader=opened.load_model("reader") if snapshot.is_fine_tuned else None,
    num_read=snapshot.num_read,
    pretrained=snapshots.load_retriever(with_masks.folder) if with_masks else None,
    masked_reader=snapshots.load_model(with_masks.folder, "reader") if with_masks else None,
  )


def open_searcher(system: System, table: PassageTable, *, kind: str) -> index.Searcher:
  """Opens the searcher of the index.

  If the index was made for another searcher, builds this one with the default recall.
  """
  folder = system.folders["index"]
  info = artifacts.read_info(folder, kind=index.KIND)
  if kind in ("exact", info["config"]["searcher"]):
    return index.load(folder, searcher=kind)
  config = IndexConfig(searcher=kind)
  queries = dense.sample_queries(system.retriever, table, tokenizer=system.tokenizer, config=config)
  embeddings = index.read_embeddings(folder, num_rows=len(table))
  searcher = index.build_approximate(embeddings, config, queries)
  said = index.measured_recall(
    {"config": dataclasses.asdict(config), "searchers": {"0": searcher.settings}}
  )
  print(f"{folder}: {said}", file=sys.stderr, flush=True)
  return index.merged([searcher], table.deleted)
