"""Opening trained workdirs: finds and checks the snapshot, passages and index.

    opened = open_workdir("runs/quickstart/finetune/realm")
    opened.snapshot.retrieval      # "dense"
    opened.table                   # the passages
    opened.load_index()            # query tower and searcher, of the same snapshot

The fields of a snapshot's info.json other than its models are written and read only here:
`fine_tuned` makes them, `SnapshotInfo` parses them.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping

import keras

from realm_tf.corpus import passages
from realm_tf.corpus.passages import PassageTable
from realm_tf.corpus.tokenization import Tokenizer
from realm_tf.examples import packing
from realm_tf.models import snapshots
from realm_tf.models.masked_reader import MaskedReader
from realm_tf.models.retriever import Retriever
from realm_tf.retrieval import dense, index
from realm_tf.storage import artifacts, ownership

TRAIN_FIRST = "give the workdir of a trainer that has finished."

DENSE, BM25, CLOSED_BOOK = "dense", "bm25", "none"  # how a fine-tuned system finds passages


# ======================================================================================== snapshots


@dataclasses.dataclass(frozen=True)
class SnapshotInfo:
  """Fields of a snapshot's info.json.

  Attributes:
    folder: folder of the snapshot.
    fingerprint: fingerprint of its content.
    models: "retriever" and "reader", or one of them → class and config.
    inputs: names of the artifacts that it belongs to: "passages", and the "index" that it was
      fine-tuned with.
    retrieval: how a fine-tuned system finds passages: DENSE, BM25 or CLOSED_BOOK; None if the
      snapshot is pre-trained.
    index_snapshot: fingerprint of the snapshot that its index was made from; None if that is this
      snapshot.
    num_read: passages that its span reader was trained to read; 0 without a span reader.
    score_weight: factor of BM25's scores; 1 without BM25.
    pad_row: row of the word embeddings for [PAD] in an imported vocabulary.
  """

  folder: str
  fingerprint: str
  models: Mapping[str, Mapping]
  inputs: frozenset[str]
  retrieval: str | None
  index_snapshot: str | None
  num_read: int
  score_weight: float
  pad_row: int

  @classmethod
  def read(cls, folder: str) -> "SnapshotInfo":
    """Reads a snapshot's info.json.

    Raises:
      ArtifactError: there is no complete snapshot.
    """
    info = artifacts.read_info(folder, kind=snapshots.KIND)
    return cls(
      folder=folder,
      fingerprint=info["fingerprint"],
      models=info["config"],
      inputs=frozenset(info["inputs"]),
      retrieval=info.get("retrieval"),
      index_snapshot=info.get("index_snapshot"),
      num_read=info.get("num_read", 0),
      score_weight=info.get("score_weight", 1.0),
      pad_row=info.get("pad_row", 0),
    )

  @property
  def is_fine_tuned(self) -> bool:
    """Whether the snapshot is fine-tuned to answer questions."""
    return self.retrieval is not None

  @property
  def has_masked_reader(self) -> bool:
    """Whether the snapshot fills masks."""
    reader = self.models.get("reader", {}).get("class")
    return not self.is_fine_tuned and reader == MaskedReader.__name__

  @property
  def step(self) -> int:
    """The training step of the snapshot."""
    return artifacts.step_of(self.folder)


def fine_tuned(
  retrieval: str | None,
  *,
  num_read: int | None = None,
  index_snapshot: str | None = None,
  score_weight: float | None = None,
) -> dict:
  """Makes the info.json fields of a fine-tuned snapshot, the `details` of `snapshots.publish`.

  See `SnapshotInfo` for the arguments. Only those of the kind of retrieval are written. A
  `retrieval` of None means a span reader without passages to search.
  """
  written: dict[str | None, dict] = {
    DENSE: {"retrieval": DENSE, "num_read": num_read, "index_snapshot": index_snapshot},
    BM25: {"retrieval": BM25, "num_read": num_read, "score_weight": score_weight},
    CLOSED_BOOK: {"retrieval": CLOSED_BOOK},
    None: {"num_read": num_read},
  }
  return written[retrieval]


def newest_snapshot(workdir: str, *, advice: str = TRAIN_FIRST) -> SnapshotInfo:
  """Returns the newest snapshot of a trainer's workdir.

  Args:
    workdir: workdir of the trainer.
    advice: what to do if there is none; ends the message.

  Raises:
    ArtifactError: there is none.
  """
  return SnapshotInfo.read(snapshots.newest(workdir, advice=advice))


def newest_indexed_snapshot(workdir: str, *, advice: str = TRAIN_FIRST) -> SnapshotInfo:
  """Returns the snapshot of a pre-trained workdir's newest index, or else the newest snapshot.

  During training, the newest snapshot has no index yet.

  Raises:
    ArtifactError: there is no snapshot.
  """
  newest = newest_snapshot(workdir, advice=advice)
  indexed = artifacts.latest(os.path.join(workdir, "indexes"))
  if newest.is_fine_tuned or indexed is None:
    return newest
  roots = os.path.join(workdir, "snapshots")
  return SnapshotInfo.read(artifacts.step_folder(roots, artifacts.step_of(indexed)))


# ========================================================================================== workdir


@dataclasses.dataclass(frozen=True)
class Workdir:
  """An opened workdir, whose parts belong together.

  Attributes:
    folder: the workdir.
    snapshot: the snapshot in use.
    tokenizer: tokenizer with the snapshot's vocabulary.
    passages: folder of the passages.
    index: folder of the index; None if the system searches none.
  """

  folder: str
  snapshot: SnapshotInfo
  tokenizer: Tokenizer
  passages: str
  index: str | None

  @property
  def searched_index(self) -> str:
    """Folder of the index, for a system that searches one."""
    assert self.index is not None, f"{self.folder!r} was opened without an index"
    return self.index

  @functools.cached_property
  def table(self) -> PassageTable:
    """The passages, opened once."""
    return passages.load(self.passages)

  def load_model(self, name: str) -> keras.Model:
    """Opens a model of the snapshot, "retriever" or "reader".

    Raises:
      ArtifactError: the snapshot has no such model.
    """
    return snapshots.load_model(self.snapshot.folder, name)

  def load_index(self, retriever: Retriever | None = None) -> dense.IndexedRetriever:
    """Opens the searcher over the passage embeddings, with the retriever that made them.

    `retriever` is the snapshot's retriever, if it is already open.
    """
    return dense.IndexedRetriever(
      retriever=retriever or self.load_model("retriever"),
      searcher=index.load(self.searched_index, passages=self.passages),
      table=self.table,
      step=self.snapshot.step,
      folder=self.searched_index,
    )


def open_workdir(
  workdir: str,
  *,
  index_folder: str | None = None,
  passages_folder: str | None = None,
  snapshot: SnapshotInfo | None = None,
  need_index: bool = True,
  advice: str = TRAIN_FIRST,
  passages_advice: str | None = None,
) -> Workdir:
  """Finds the parts of a trained workdir and checks that they belong together.

  Args:
    workdir: workdir of a trainer, or of realm_tf.import_checkpoint.
    index_folder: an index instead of the one that the snapshot was trained with.
    passages_folder: passages instead of those of `index_folder`, or of the snapshot.
    snapshot: one of the workdir's snapshots; None means the newest.
    need_index: whether an index is searched; if False, it only serves to find the passages and is
      not checked.
    advice: what to do if there is no snapshot.
    passages_advice: what to do if the passages of `index_folder` are not found.

  Raises:
    ArtifactError: parts are missing, or do not belong together.
  """
  snapshot = snapshot or newest_snapshot(workdir, advice=advice)
  if index_folder and not passages_folder:
    passages_folder = passages.find_of(index_folder, advice=passages_advice)
  if snapshot.retrieval in (BM25, CLOSED_BOOK):
    index_folder = None
  elif not index_folder and (need_index or not passages_folder):
    index_folder = find_index(workdir, snapshot)
    if not artifacts.is_complete(index_folder):
      if "retriever" not in snapshot.models:
        raise artifacts.ArtifactError(
          f"{snapshot.folder!r} has no retriever, only a {' and a '.join(snapshot.models)}. Give "
          "the workdir of a trainer that trains one, such as realm_tf.pretrain."
        )
      raise artifacts.ArtifactError(
        f"no index in {workdir!r}. Make one, and give it as --index=INDEX:\n"
        f"python -m beam_jobs.embed_passages --snapshot={snapshot.folder} --passages=P "
        "--output=INDEX"
      )
  if not passages_folder and "passages" in snapshot.inputs:
    passages_folder = passages.find_of(snapshot.folder)
  elif not passages_folder:
    passages_folder = passages.find_of(index_folder or snapshot.folder, advice=passages_advice)
  opened = Workdir(
    folder=workdir,
    snapshot=snapshot,
    tokenizer=snapshots.load_tokenizer(snapshot.folder),
    passages=passages_folder,
    index=index_folder if need_index else None,
  )
  if need_index:
    _check(opened)
  return opened


def _check(opened: Workdir) -> None:
  """Raises ArtifactError if a workdir's parts do not belong together."""
  if opened.index:
    if opened.snapshot.is_fine_tuned:
      _check_fine_tuned_index(opened.index, opened.snapshot)
    else:
      artifacts.check_input(opened.index, "snapshot", opened.snapshot.folder)
    artifacts.check_input(opened.index, "passages", opened.passages)
  info = artifacts.read_info(opened.passages, kind=passages.KIND)
  packing.check_vocabulary(info, opened.passages, opened.tokenizer)


def _check_fine_tuned_index(folder: str, snapshot: SnapshotInfo) -> None:
  """Raises ArtifactError if an index was made with another passage tower than the snapshot's.

  The snapshot that fine-tuning started from and the fine-tuned one have the same passage tower.
  """
  wanted = [name for name in (snapshot.index_snapshot, snapshot.fingerprint) if name]
  got = artifacts.read_info(folder, kind=index.KIND)["inputs"]["snapshot"]["fingerprint"]
  if got not in wanted:
    raise artifacts.ArtifactError(
      f"index {folder!r} was made from snapshot {got}, but the fine-tuned retriever wants "
      f"{wanted[0]}. Make the index again from that snapshot, or fine-tune again."
    )


def find_index(workdir: str, snapshot: SnapshotInfo) -> str:
  """Returns the index of a workdir's snapshot.

  This is its own below the workdir, or else the one that the snapshot was fine-tuned with.

  Raises:
    ArtifactError: the index that the snapshot was fine-tuned with is not found.
  """
  own = index.folder_of(workdir, snapshot.folder)
  made = ownership.own_info(own) if artifacts.is_complete(own) else None
  if "index" not in snapshot.inputs or (made and _made_from(made) == snapshot.fingerprint):
    return own
  return artifacts.find_input(  # with any searcher
    snapshot.folder,
    "index",
    accept=lambda found: _made_from(found) == snapshot.index_snapshot,
    advice="Put it back, give its location as --index, or make one:\n"
    f"python -m beam_jobs.refresh_index --snapshots={os.path.join(workdir, 'snapshots')} "
    f"--passages=P --indexes={os.path.join(workdir, 'indexes')}",
  )


def _made_from(info: Mapping) -> str | None:
  """Returns the fingerprint of the snapshot that an index was made from, given its info.json."""
  return info["inputs"].get("snapshot", {}).get("fingerprint")


# ============================================================================= pre-trained snapshot


def find_pretrained(opened: Workdir, pretrained: str | None = None) -> SnapshotInfo | None:
  """Finds the pre-trained snapshot, with a masked reader, of a fine-tuned system's index.

  Args:
    opened: the fine-tuned system.
    pretrained: the workdir to search; None searches the workdir of the index.

  Returns:
    The snapshot; None if it is not in the workdir of the index.

  Raises:
    ArtifactError: the snapshot is not in `pretrained`.
  """
  if pretrained:
    there = _snapshots_by_fingerprint(pretrained)
    found = _with_masked_reader(there, opened.snapshot.index_snapshot)
    if found is None:
      raise artifacts.ArtifactError(
        f"no snapshot {opened.snapshot.index_snapshot} with a masked reader in {pretrained!r} "
        f"(there: {', '.join(there) or 'none'}); the fine-tuned index was made from it. Give the "
        "realm_tf.pretrain workdir that realm_tf.finetune started from."
      )
    return found
  if opened.index is None:
    return None
  found = _beside(opened.index, opened.snapshot)
  if found is None and "index" in opened.snapshot.inputs:
    try:
      found = _beside(find_index(opened.folder, opened.snapshot), opened.snapshot)
    except artifacts.ArtifactError:  # `opened` uses another index instead
      return None
  return found


def _beside(index_folder: str, snapshot: SnapshotInfo) -> SnapshotInfo | None:
  workdir = os.path.dirname(os.path.dirname(index_folder.rstrip("/")))
  return _with_masked_reader(_snapshots_by_fingerprint(workdir), snapshot.index_snapshot)


def _with_masked_reader(
  there: Mapping[str, SnapshotInfo], fingerprint: str | None
) -> SnapshotInfo | None:
  """Returns the snapshot with a fingerprint, if there is one and it fills masks."""
  found = there.get(fingerprint) if fingerprint else None
  return found if found and found.has_masked_reader else None


def _snapshots_by_fingerprint(workdir: str) -> dict[str, SnapshotInfo]:
  folders = artifacts.complete_folders(os.path.join(workdir, "snapshots"))
  return {info.fingerprint: info for info in map(SnapshotInfo.read, folders)}
